"""Time and memory of every scan backend at the networks' shapes, beside the hardware's floor and the original's recipe.

    python -m evmamba.launch.measure.kernel_bench [--shapes T-s1 ...] [--backends triton original] [--output FOLDER]

On a GPU all shapes in bfloat16; on a CPU the small ones in float32, with one thread and with all, beside the scans of
mambapy and transformers where these are installed, all of them taking turns. Prints a table of medians; with --output
also writes it as JSON (with device, versions, 20th and 80th percentiles) and Markdown, and a plot if matplotlib is
installed. A backend that fails at a shape (out of memory, say) is reported with its error, not left out.
"""

import argparse
import functools
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from evmamba.kernels.ops import BACKENDS, es2d_scan
from evmamba.kernels.paths import path_length
from evmamba.launch.measure.hardware import cpu_scan_floor_us, hardware_of, scan_floor_us
from evmamba.launch.measure.original import original_es2d, other_scans, scan_name
from evmamba.processor import processor_name

N = 16
SECONDS, ROUNDS = 1.0, 5


@dataclass(frozen=True)
class Shape:
    """A scan as one stage of a network runs it: batch, map, inner channels and rank."""

    name: str
    B: int
    H: int
    W: int
    D: int
    R: int

    @property
    def tokens(self) -> int:
        return 4 * self.B * path_length(self.H, self.W, "es2d")


GPU_SHAPES = (
    Shape("T-s1 classification", 128, 56, 56, 96, 3),
    Shape("T-s2 classification", 128, 28, 28, 192, 6),
    Shape("S-s1 classification", 128, 56, 56, 128, 4),
    Shape("S-s2 classification", 128, 28, 28, 256, 8),
    Shape("B-s1 classification", 128, 56, 56, 192, 6),
    Shape("B-s2 classification", 128, 28, 28, 384, 12),
    Shape("T-s1 detection", 2, 200, 333, 96, 3),
    Shape("B-s1 detection", 2, 200, 333, 192, 6),
    Shape("T-s1 segmentation", 4, 128, 128, 96, 3),
    Shape("B-s1 segmentation", 4, 128, 128, 192, 6),
)
CPU_SHAPES = (
    Shape("T-s1 one image", 1, 56, 56, 96, 3),
    Shape("T-s2 one image", 1, 28, 28, 192, 6),
    Shape("B-s1 one image", 1, 56, 56, 192, 6),
)


def floor_ms(shape: Shape, device: torch.device, training: bool) -> float | None:
    """No scan of this shape is faster (see `hardware`); None for devices that are not known, and a CPU's training."""
    if device.type == "cpu":
        floor = None if training else cpu_scan_floor_us(shape.tokens * shape.D, N, torch.get_num_threads())
        return floor and floor / 1e3
    hardware = hardware_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return scan_floor_us(hardware, shape.tokens * shape.D, N, training) / 1e3 if hardware else None


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs of ordinary size, ready for gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    D, R = shape.D, shape.R
    inputs = [
        normal(shape.B, shape.H, shape.W, D).to(dtype),
        normal(4, R + 2 * N, D) * D**-0.5,
        normal(4, D, R) * R**-0.5,
        normal(4, D) - 4,
        torch.log(torch.arange(1, N + 1.0, device=device)).repeat(4 * D, 1),
        torch.ones(4 * D, device=device),
    ]
    return [t.requires_grad_() for t in inputs]


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of a call (20th percentile, median, 80th percentile) and MB it allocates beyond its inputs."""

    p20: float
    median: float
    p80: float
    memory: float


def measure(call: Callable[[], object], device: torch.device, seconds: float = 1.0) -> Measurement:
    """Time and peak memory, after a warm-up."""
    if device.type != "cuda":
        (measured,) = measure_in_turns([call], seconds)
        if isinstance(measured, Exception):
            raise measured
        return measured
    call()
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    p20, median, p80 = do_bench(call, warmup=200, rep=int(1e3 * seconds), quantiles=[0.2, 0.5, 0.8])
    return Measurement(p20, median, p80, memory)


def measure_in_turns(calls: Sequence[Callable[[], object]], seconds: float) -> list[Measurement | Exception]:
    """On a CPU: after a warm-up the calls take turns, so that what else the machine does falls on all of them alike.

    Args:
        calls: what to time.
        seconds: for each of them, in `ROUNDS` rounds with a call at least in each.

    Returns:
        For each what was measured, or the error with which it failed (see `failures`).
    """
    results: list[Measurement | Exception] = [RuntimeError("not measured")] * len(calls)
    times: dict[int, list[float]] = {}
    for k, call in enumerate(calls):
        try:
            call()
            times[k] = []
        except failures() as error:
            results[k] = error
    for _ in range(ROUNDS):
        for k, taken in times.items():
            end = time.perf_counter() + seconds / ROUNDS
            while True:
                start = time.perf_counter()
                calls[k]()
                taken.append(1e3 * (time.perf_counter() - start))
                if time.perf_counter() >= end:
                    break
    for k, taken in times.items():
        p20, _, _, p80 = statistics.quantiles(taken, n=5)
        results[k] = Measurement(p20, statistics.median(taken), p80, _cpu_memory(calls[k]))
    return results


def _cpu_memory(call: Callable[[], object]) -> float:
    """Peak MB of the tensors that a call allocates: the profiler's trace has every allocation and release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report starting and stopping
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes), default=0) / 1e6


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """EVMAMBA_BACKEND=name for a while."""
    before = os.environ.get("EVMAMBA_BACKEND")
    os.environ["EVMAMBA_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("EVMAMBA_BACKEND")
        if before is not None:
            os.environ["EVMAMBA_BACKEND"] = before


def run(shape: Shape, backends: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row a backend: forward without gradients, and forward with backward."""
    inputs = make_inputs(shape, device, dtype)
    dy = torch.randn(inputs[0].shape, device=device)
    sizes = {"B": shape.B, "H": shape.H, "W": shape.W, "D": shape.D, "R": shape.R, "N": N}
    rows: dict[str, dict[str, Any]] = {name: {"shape": shape.name, "backend": name, **sizes} for name in backends}

    def call(name: str, key: str) -> object:
        scan = scan_of(name)
        with forced_backend(name if name in BACKENDS else "torch"):
            if key == "training":
                return torch.autograd.grad(scan(*inputs), inputs, dy)
            with torch.inference_mode():
                return scan(*inputs)

    for key, in_training in (("forward", False), ("training", True)):
        able = [name for name in backends if "error" not in rows[name]]
        calls = [functools.partial(call, name, key) for name in able]
        for name, measured in zip(able, _measured(calls, device), strict=True):
            rows[name] |= (
                {"error": first_line(measured)} if isinstance(measured, Exception) else _columns(key, measured)
            )
        floor = floor_ms(shape, device, in_training)
        if floor is not None:
            for row in rows.values():
                row[f"{key}_floor_ms"] = floor
    if device.type == "cpu":
        for row in rows.values():
            row["threads"] = torch.get_num_threads()
    gc.collect()
    return list(rows.values())


def _measured(calls: Sequence[Callable[[], object]], device: torch.device) -> list[Measurement | Exception]:
    if device.type == "cpu":
        return measure_in_turns(calls, SECONDS)
    results: list[Measurement | Exception] = []
    for call in calls:
        try:
            results.append(measure(call, device, SECONDS))
        except failures() as error:
            results.append(error)
    return results


def scan_of(name: str) -> Callable[..., Tensor]:
    """The function behind a row: one of our backends (to be chosen by `forced_backend`), or somebody else's scan."""
    if name in BACKENDS:
        return es2d_scan
    if name == "original":
        return original_es2d
    return functools.partial(original_es2d, scan=other_scans()[name])


def cpu_backends() -> list[str]:
    """What a CPU can be measured with here, the fastest first."""
    return [*(["numba"] if importlib.util.find_spec("numba") else []), "torch", *other_scans(), "original"]


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of a backend that cannot run a shape: PyTorch's, and Triton's, which are errors of its own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError, ValueError
    return RuntimeError, ValueError, TritonError


def first_line(error: Exception) -> str:
    """An exception in a cell of a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _columns(name: str, measured: Measurement) -> dict[str, float]:
    return {
        f"{name}_ms": measured.median,
        f"{name}_p20_ms": measured.p20,
        f"{name}_p80_ms": measured.p80,
        f"{name}_mb": measured.memory,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; "x original" is how many times faster than the original's recipe."""
    originals = {_case(row): row for row in rows if row["backend"] == "original"}
    lines = [
        "| shape | backend | forward ms | x floor | x original | MB | training ms | x floor | x original | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_case(row), row["backend"]]
        if "error" in row:
            lines.append(f"| {cells[0]} | {row['backend']} | {row['error']} |" + " |" * 7)
            continue
        for key in ("forward", "training"):
            value = row[f"{key}_ms"]
            floor, original = row.get(f"{key}_floor_ms"), originals.get(_case(row), {}).get(f"{key}_ms")
            cells.append(f"{value:.3f}")
            cells.append(f"{value / floor:.2f}" if floor else "")
            cells.append(f"{original / value:.1f}" if original else "")
            cells.append(f"{row[f'{key}_mb']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> str:
    threads = row.get("threads")
    return row["shape"] if threads is None else f"{row['shape']}, {threads} thread{'s' * (threads > 1)}"


def triton_version() -> str:
    """The installed Triton's version, or none."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time for every shape and backend, forward and training, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(map(_case, rows)))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.5 * len(shapes) * len(backends) / 2 + 2), sharey=True)
    for axis, key in zip(axes, ("forward", "training"), strict=True):
        for i, backend in enumerate(backends):
            values = {_case(row): row.get(f"{key}_ms", float("nan")) for row in rows if row["backend"] == backend}
            heights = [j + 0.8 * (i + 0.5) / len(backends) - 0.4 for j in range(len(shapes))]
            axis.barh(heights, [values.get(s, float("nan")) for s in shapes], 0.8 / len(backends), label=backend)
        axis.set_xscale("log")
        axis.set_xlabel(f"{key}, ms")
        axis.set_yticks(range(len(shapes)), shapes)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the scan backends at the networks' shapes.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    backends = ["triton", "torch", "original"] if device.type == "cuda" else cpu_backends()
    all_threads = [] if device.type == "cuda" else sorted({1, torch.get_num_threads()})
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="WORD", help="only shapes whose name has one of these"
    )
    parser.add_argument("--backends", nargs="+", default=backends, choices=[*BACKENDS, *other_scans(), "original"])
    parser.add_argument("--threads", nargs="+", type=int, default=all_threads, help="on a CPU (default: one, and all)")
    parser.add_argument("--output", type=Path, help="folder for kernels.json, kernels.md and kernels.png")
    options = parser.parse_args()
    chosen = [shape for shape in shapes if not options.shapes or any(word in shape.name for word in options.shapes)]
    if not chosen:
        parser.error(f"no shape has one of these words; there are: {', '.join(shape.name for shape in shapes)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "dtype": str(dtype).removeprefix("torch."),
        "original_scan": scan_name(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for shape in chosen:
        for threads in options.threads or [None]:
            if threads is not None:
                torch.set_num_threads(threads)
            for row in run(shape, options.backends, device, dtype):
                rows.append(row)
                print(f"  {_case(row)}, {row['backend']}: {row.get('error', 'done')}", flush=True)
    table = markdown(rows)
    print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "kernels.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        heading = "\n".join(f"- {key}: {value}" for key, value in about.items())
        (options.output / "kernels.md").write_text(f"# Scan backends\n\n{heading}\n\n{table}\n")
        try:
            plot(rows, options.output / "kernels.png")
        except ImportError:
            print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()

"""The steps of a day on a GPU (gpu_day.py): each yields named measurements.

A step takes the conditions and needs no other step. In a dry run the device is a CPU, Triton is its interpreter, and
sizes are tiny: figures mean nothing then, but every line has run.
"""

# mypy: disable-error-code="no-untyped-def"

import importlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from evmamba.kernels import reference
from evmamba.kernels.ops import es2d_scan
from evmamba.launch.measure import kernel_bench, tune
from evmamba.launch.measure.hardware import Hardware, hardware_of, predicted_us, scan_floor_us
from evmamba.launch.measure.kernel_bench import GPU_SHAPES, N, Shape, forced_backend, make_inputs
from evmamba.launch.measure.original import original_es2d, scan_name
from evmamba.processor import processor_name

ROOT = Path(__file__).parents[2]
TINY = Shape("tiny", 1, 2, 2, 8, 1)
SMALL = Shape("small", 2, 56, 56, 96, 3)
Row = dict[str, Any]
Measurements = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True)
class Conditions:
    """Where and how the steps run."""

    output: Path
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def hardware(self) -> Hardware | None:
        return None if self.dry else hardware_of(torch.cuda.get_device_name())

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (TINY,) if self.dry else GPU_SHAPES

    @property
    def small(self) -> Shape:
        return TINY if self.dry else SMALL

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16


def call_us(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """Median microseconds of a call; on a GPU of its replay as a CUDA graph, so that Python's time is not in it."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last))
    return statistics.median(times)


def kernels_us(call: Callable[[], object], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Microseconds of each kernel in a call, by name; nothing on a CPU."""
    if device.type == "cpu":
        return {}
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    on_gpu = [event for event in trace.key_averages() if event.device_type == DeviceType.CUDA]
    return {event.key: round(event.self_device_time_total / rounds, 2) for event in on_gpu}


def scan_calls(shape: Shape, c: Conditions) -> dict[str, Callable[[], object]]:
    """The scan without gradients, and with its backward, by the Triton backend alone."""
    backend: Any = importlib.import_module("evmamba.kernels.triton_es2d")
    inputs = [t.detach() for t in make_inputs(shape, c.device, c.dtype)]
    dy = torch.randn(inputs[0].shape, device=c.device)

    def train() -> None:
        _, states = backend.forward(*inputs, "es2d", save=True)
        backend.backward(dy, *inputs, states, "es2d")

    return {"inference": lambda: backend.forward(*inputs, "es2d", save=False), "training": train}


def environment(c: Conditions) -> Measurements:
    """What runs here."""

    def read() -> Row:
        row: Row = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
        if c.dry:
            return row | {"device": processor_name()}
        properties = torch.cuda.get_device_properties(0)
        return row | {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }  # fmt: skip

    yield "environment", read


def compile_all(c: Conditions) -> Measurements:
    """Compile what later steps run, a process a shape, side by side."""

    def once(shape: Shape) -> Row:
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__).with_name("gpu_day.py")), "--once", shape.name]
        run = subprocess.run([*command, "--output", str(c.output)], capture_output=True, text=True, check=False)
        row: Row = {"seconds_to_compile": round(time.perf_counter() - start, 1)}
        return row if run.returncode == 0 else row | {"error": run.stderr.strip().splitlines()[-1][:300]}

    def together() -> Row:
        if c.dry:
            return {"skipped": "the interpreter compiles nothing"}
        with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
            return dict(zip((shape.name for shape in c.shapes), pool.map(once, c.shapes), strict=True))

    yield "compile", together


def smoke(c: Conditions) -> Measurements:
    """Forward and backward against the definition in float64, and twice the same bits."""
    backend: Any = importlib.import_module("evmamba.kernels.triton_es2d")
    for dtype in (torch.float32,) if c.dry else (torch.bfloat16, torch.float32, torch.float16):

        def compare(dtype: torch.dtype = dtype) -> Row:
            inputs = [t.detach() for t in make_inputs(c.small, c.device, dtype)]
            rounded = [t.to(dtype) if i in (1, 2) else t for i, t in enumerate(inputs)]
            exact: Any = [t.double().requires_grad_() for t in rounded]
            x, weight, dt_weight, bias, A_logs, skip = exact
            expected = reference.scan(x, weight, dt_weight, bias, A_logs, skip, "es2d")
            dy = torch.randn(expected.shape, device=c.device)
            wanted = torch.autograd.grad(expected, exact, dy.double())
            results = []
            for _ in range(2):
                y, states = backend.forward(*inputs, "es2d", save=True)
                results.append((y, *backend.backward(dy, *inputs, states, "es2d")))
            names = ("y", "dx", "d_x_proj", "d_dt_proj", "d_bias", "d_A_logs", "d_D")
            errors: Row = {
                name: float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
                for name, got, want in zip(names, results[0], (expected.detach(), *wanted), strict=True)
            }
            # The map and what is rounded to a half type twice; all else is float32's.
            limit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            wrong = [name for name, e in errors.items() if not e < (limit if name in ("dx", "d_x_proj") else 1e-5)]
            same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            return errors | {"bits_repeat": same, "wrong": wrong, "passed": same and not wrong}

        yield str(dtype).removeprefix("torch."), compare


@triton.jit
def _exponentials_kernel(out, rounds, BLOCK: tl.constexpr):
    # Chains of dependent exponentials, several a thread; values stay near 0.64.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = i.to(tl.float32) * 1e-9
    for _ in range(rounds):
        v = tl.exp2(-v)
    tl.store(out + i, v)


@triton.jit
def _broadcast_kernel(table, out, rounds, BLOCK: tl.constexpr):
    # One number for all lanes at a time, as the scans load B, C and the step's numbers; the table stays in L1.
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(rounds):
        total += tl.load(table + i % 1024)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def calibrate(c: Conditions) -> Measurements:
    """Bandwidth of a copy, exponentials, broadcast loads, and the time between two empty launches."""
    clock = c.hardware.clock if c.hardware else 1e9
    processors = 1 if c.dry else torch.cuda.get_device_properties(0).multi_processor_count
    programs, rounds = (2, 4) if c.dry else (processors * 16, 4096)

    def copy() -> Row:
        source = torch.empty(1 << (16 if c.dry else 31), dtype=torch.uint8, device=c.device)
        target = torch.empty_like(source)
        us = call_us(lambda: target.copy_(source), c.device)
        return {"us": us, "terabytes_a_second": 2e-6 * source.numel() / us}

    def exponentials() -> Row:
        out = torch.empty(programs * 1024, device=c.device)
        us = call_us(lambda: _exponentials_kernel[(programs,)](out, rounds, BLOCK=1024), c.device)
        done = out.numel() * rounds
        return {"us": us, "a_clock_and_multiprocessor": done / (us * 1e-6 * clock * processors), "clock": clock}

    def broadcasts() -> Row:
        table, out = torch.ones(1024, device=c.device), torch.empty(programs * 32, device=c.device)
        us = call_us(lambda: _broadcast_kernel[(programs,)](table, out, rounds, BLOCK=32, num_warps=1), c.device)
        return {"us": us, "warp_loads_a_clock_and_multiprocessor": programs * rounds / (us * 1e-6 * clock * processors)}

    def launches() -> Row:
        tensor = torch.zeros(1, device=c.device)

        def hundred() -> None:
            for _ in range(100):
                tensor.add_(1)

        return {"us_a_kernel_in_a_graph": call_us(hundred, c.device) / 100}

    yield "copy", copy
    yield "exponentials", exponentials
    yield "broadcast loads", broadcasts
    yield "launches", launches


def kernels(c: Conditions) -> Measurements:
    """Every shape: the whole scan as a CUDA graph beside its floor, and its kernels beside their predictions."""
    for shape in c.shapes:
        for phase in ("inference", "training"):

            def measure(shape: Shape = shape, phase: str = phase) -> Row:
                call = scan_calls(shape, c)[phase]
                row: Row = {"us": call_us(call, c.device), "kernels_us": kernels_us(call, c.device)}
                if c.hardware is None:
                    return row
                row["floor_us"] = scan_floor_us(c.hardware, shape.tokens * shape.D, N, phase == "training")
                names = ("scan_backward_kernel", "segment_state_kernel", f"scan_forward_kernel, {phase}")
                predicted = {name: predicted_us(c.hardware, shape.name, name) for name in names}
                row["predicted_us"] = {name: round(us, 1) for name, us in predicted.items() if us is not None}
                return row

            yield f"{shape.name}, {phase}", measure


def original(c: Conditions) -> Measurements:
    """The published network's way to the same scan, beside ours through the operator."""
    shape = c.shapes[0]

    def measure(scan: Callable[..., Tensor]) -> Row:
        inputs = make_inputs(shape, c.device, c.dtype)
        dy = torch.randn(inputs[0].shape, device=c.device)

        def infer() -> None:
            with torch.no_grad():
                scan(*inputs)

        forward_us = call_us(infer, c.device)
        if c.dry:
            return {"forward_us": forward_us}
        timing = kernel_bench.measure(lambda: torch.autograd.grad(scan(*inputs), inputs, dy), c.device, seconds=0.5)
        return {"forward_us": forward_us, "training_us": 1e3 * timing.median, "training_mb": timing.memory}

    yield f"original ({scan_name()})", lambda: measure(original_es2d)
    with forced_backend("triton"):
        yield "ours", lambda: measure(es2d_scan)


def networks(c: Conditions) -> Measurements:
    """EfficientVMamba-T as a whole: images a second, memory, and the slowest kernels."""
    batch, size = (2, 32) if c.dry else (128, 224)
    amp = None if c.dry else torch.bfloat16

    def measure(phase: str, mode: str) -> Row:
        importlib.import_module("evmamba.timm_models")  # what `import evmamba` does where it is installed
        variants: Any = importlib.import_module("evmamba.variants")
        cost: Any = importlib.import_module("evmamba.cost")
        with forced_backend("torch" if c.dry else "triton"):
            model = variants.create_model("efficientvmamba_t").to(c.device).train(phase == "training")
            images = torch.randn(batch, 3, size, size, device=c.device)
            fused = mode == "fused"
            if fused:  # weights cast once in place of autocast
                fusion: Any = importlib.import_module("evmamba.fusion")
                model, images = fusion.fuse(model, amp), images.to(amp)
            forward = torch.compile(model, dynamic=False) if mode == "compiled" else model
            if phase == "training":
                step, _ = cost.training_step(model, (images,), amp, forward=forward, capturable=not c.dry)
            else:
                step = cost.inference_step(forward, (images,), None if fused else amp)
            for _ in range(3):
                step()
            us = call_us(step, c.device, seconds=1.0)
            slowest = sorted(kernels_us(step, c.device).items(), key=lambda item: -item[1])
        row: Row = {"ms": us / 1e3, "images_a_second": batch / (us * 1e-6), "kernels": len(slowest)}
        row["slowest_us"] = dict(slowest[:15])
        if not c.dry:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    for phase in ("inference", "training"):
        modes = ("eager",) if c.dry else ("eager", "compiled")
        for mode in (*modes, "fused") if phase == "inference" else modes:
            yield f"T, batch {batch}, {phase}, {mode}", partial(measure, phase, mode)


def tuning(c: Conditions) -> Measurements:
    """The backend's choices, one at a time, and the file that the backend would load."""
    shapes = tuple(s for s in GPU_SHAPES if s.name in ("T-s1 classification", "T-s1 detection"))

    def measure() -> Row:
        if c.dry:
            return {"skipped": "the interpreter has nothing to tune"}
        rows = tune.tune(shapes, c.device)
        about = {"device": torch.cuda.get_device_name()}
        return {"file": tune.write(rows, about, c.output).name, "tuning": str(tune.best(rows))}

    yield "tuning", measure


def installed_copy(folder: Path) -> Path:
    """The project's packages and the kernels' tests, laid out as an installation would: nothing is installed."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "evmamba", folder / "evmamba", ignore=without)
    for floor in ("kernels", "launch", "tasks", "conf"):
        shutil.copytree(ROOT / floor, folder / "evmamba" / floor, ignore=without)
    for part in ("kernels", "emulator", "assets/golden"):
        shutil.copytree(ROOT / "tests" / part, folder / "tests" / part, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def tests(c: Conditions) -> Measurements:
    """The kernels' tests that need a GPU."""

    def run() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            site = installed_copy(Path(folder))
            chosen = ["tests/kernels/test_paths.py"] if c.dry else ["-m", "gpu", "tests/kernels"]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
            if not c.dry and importlib.util.find_spec("xdist"):
                command += ["-n", str(min(12, os.cpu_count() or 2))]
            ran = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
        (c.output / "tests.log").write_text(ran.stdout + ran.stderr)
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        lines = ran.stdout.strip().splitlines()
        return {"passed": ran.returncode == 0, "summary": lines[-1] if lines else ran.stderr[-300:], "failed": failed}

    yield "pytest", run


def tools(c: Conditions) -> Measurements:
    """Hardware counters of the scans, and the sanitizer's search for races, where the tools are installed."""
    once = [sys.executable, str(Path(__file__).with_name("gpu_day.py")), "--output", str(c.output), "--once"]
    commands = {
        "ncu": ["ncu", "--set", "full", "--kernel-name", "regex:scan_|_gradient_|project_", "--launch-count", "5"],
        "compute-sanitizer": ["compute-sanitizer", "--tool", "racecheck"],
    }
    for tool, command in commands.items():

        def run(tool: str = tool, command: list[str] = command) -> Row:
            if shutil.which(tool) is None:
                return {"skipped": f"{tool} is not on the PATH"}
            shape = c.shapes[0].name if tool == "ncu" else c.small.name
            ran = subprocess.run([*command, *once, shape], capture_output=True, text=True, check=False)
            log = c.output / f"{tool}.log"
            log.write_text(ran.stdout + ran.stderr)
            return {"returncode": ran.returncode, "log": log.name, "last": ran.stdout.strip().splitlines()[-1:]}

        yield tool, run


def once(shape_name: str, c: Conditions) -> None:
    """Forward and backward of one shape, for a process that only compiles or is watched by a tool."""
    shape = next(s for s in (*GPU_SHAPES, SMALL, TINY) if s.name == shape_name)
    for call in scan_calls(shape, c).values():
        call()
    if not c.dry:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Step:
    """A step and the minutes it may take."""

    run: Callable[[Conditions], Measurements]
    minutes: float


STEPS = {
    "environment": Step(environment, 1),
    "compile": Step(compile_all, 3),
    "smoke": Step(smoke, 3),
    "calibrate": Step(calibrate, 2),
    "kernels": Step(kernels, 4),
    "tests": Step(tests, 8),
    "tools": Step(tools, 5),
    "networks": Step(networks, 8),
    "original": Step(original, 3),
    "tuning": Step(tuning, 6),
}

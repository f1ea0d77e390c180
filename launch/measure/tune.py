"""Finds the Triton backend's tuning for this GPU and writes the file that the backend loads (kernels/tuning.py).

    python -m evmamba.launch.measure.tune [--shapes T-s1 ...] [--output FOLDER] [--keep]

One choice at a time, the others at their defaults, at the benchmark's shapes in bfloat16, the scan with its norm and
gate, without the operators around them. A value is taken over if it is clearly faster over all shapes together. Needs a
CUDA GPU.
"""

import argparse
import importlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from evmamba.kernels.tuning import Tuning, tuning_file
from evmamba.launch.measure import kernel_bench as bench

# Fields of `Tuning`, and what is tried.
CHOICES: dict[str, tuple[Any, ...]] = {
    "backward_registers": (128, 168, 200, None),
    "tensor_cores": (True, False),
    "few_programs": (0, 500, 750, 1000, 2000, 4000),
    "shortest_segment": (32, 64, 128, 256),
    "weight_gradient_splits": (16, 32, 64, 128, 256),
    "row_elements": (1024, 2048, 4096, 8192),
    "row_programs": (264, 528, 1056, 2112),
}
# What another value has to gain, beyond what two measurements of the same differ by.
CLEARLY_FASTER = 0.98


def tune(shapes: Sequence[bench.Shape], device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape, choice and value: milliseconds of forward, and of forward with backward."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        defaults = _times(shape, device, Tuning())
        rows.append({"shape": shape.name, "choice": "defaults", "value": None} | defaults)
        for choice, values in CHOICES.items():
            for value in values:
                tuning = replace(Tuning(), **{choice: value})
                times = defaults if tuning == Tuning() else _times(shape, device, tuning)
                rows.append({"shape": shape.name, "choice": choice, "value": value} | times)
    return rows


def _times(shape: bench.Shape, device: torch.device, tuning: Tuning) -> dict[str, Any]:
    backend: Any = importlib.import_module("evmamba.kernels.triton_es2d")
    norm: Any = importlib.import_module("evmamba.kernels.triton_norm")
    inputs = [t.detach() for t in bench.make_inputs(shape, device, torch.bfloat16)]
    dy = torch.randn(inputs[0].shape, device=device)
    gate = torch.randn_like(inputs[0])
    scale, shift = torch.randn(2, shape.D, device=device)

    def infer() -> None:
        y, _ = backend.forward(*inputs, "es2d", save=False, tuning=tuning)
        norm.forward(y, gate, scale, shift, 1e-5, tuning=tuning)

    def train() -> None:
        y, states = backend.forward(*inputs, "es2d", save=True, tuning=tuning)
        out = norm.forward(y, gate, scale, shift, 1e-5, tuning=tuning)
        norm.backward(out, y, gate, scale, shift, 1e-5, tuning=tuning)
        backend.backward(dy, *inputs, states, "es2d", tuning=tuning)

    try:
        forward, training = (bench.measure(call, device, seconds=0.3) for call in (infer, train))
    except bench.failures() as error:
        return {"error": bench.first_line(error)}
    return {"forward_ms": forward.median, "training_ms": training.median}


def best(rows: Sequence[dict[str, Any]]) -> Tuning:
    """The defaults with every value that is clearly faster, forward and training, in the mean over all shapes."""
    slowdown: dict[tuple[str, Any], list[float]] = {}
    defaults = {row["shape"]: row for row in rows if row["choice"] == "defaults"}
    for row in rows:
        default = defaults[row["shape"]]
        ran = "error" not in row and "error" not in default
        times = [row[key] / default[key] for key in ("forward_ms", "training_ms")] if ran else [math.inf]
        slowdown.setdefault((row["choice"], row["value"]), []).extend(times)
    chosen: dict[str, Any] = {}
    for choice, values in CHOICES.items():
        means = {value: math.prod(s := slowdown[choice, value]) ** (1 / len(s)) for value in values}
        fastest = min(means, key=means.__getitem__)
        if means[fastest] < CLEARLY_FASTER:
            chosen[choice] = fastest
    return replace(Tuning(), **chosen)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; the fastest training of each shape and choice is bold."""
    fastest: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["shape"], row["choice"]
        fastest[key] = min(fastest.get(key, float("inf")), row.get("training_ms", float("inf")))
    lines = ["| shape | choice | value | forward ms | training ms |", "|---|---|---|--:|--:|"]
    for row in rows:
        cells = [row["shape"], row["choice"], str(row["value"])]
        if "error" in row:
            cells += [row["error"], ""]
        else:
            training = f"{row['training_ms']:.3f}"
            is_best = row["training_ms"] == fastest[row["shape"], row["choice"]]
            cells += [f"{row['forward_ms']:.3f}", f"**{training}**" if is_best else training]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> Path:
    """Write the table as tuning.md, and with the tuning that it speaks for as tuning.json; returns the latter."""
    tuning = asdict(best(rows))
    folder.mkdir(parents=True, exist_ok=True)
    heading = "\n".join(f"- {key}: {value}" for key, value in (about | tuning).items())
    (folder / "tuning.md").write_text(f"# The Triton backend's tuning\n\n{heading}\n\n{markdown(rows)}\n")
    path = folder / "tuning.json"
    path.write_text(json.dumps({"about": about, "tuning": tuning, "rows": rows}, indent=1) + "\n")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Find the Triton backend's tuning for this GPU.")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="WORD", help="only shapes whose name has one of these"
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder for tuning.json and tuning.md")
    parser.add_argument("--keep", action="store_true", help="install the tuning: the backend loads it on this device")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    shapes = [s for s in bench.GPU_SHAPES if not options.shapes or any(word in s.name for word in options.shapes)]
    rows = tune(shapes, torch.device("cuda"))
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": bench.triton_version()}
    written = write(rows, about, options.output)
    print(markdown(rows))
    print(f"{written}: {best(rows)}")
    if options.keep:
        kept = tuning_file(about["device"])
        kept.parent.mkdir(exist_ok=True)
        print(f"loaded from now on: {shutil.copy(written, kept)}")
    else:
        print(f"EVMAMBA_TUNING={written} loads it; --keep installs it")


if __name__ == "__main__":
    main()

"""Times what the Triton backend decides by constants: on a GPU it shows which of them should change.

    python -m evmamba.launch.measure.tune [--shapes T-s1 ...] [--output FOLDER]

One constant at a time, the others as they are, at the benchmark's shapes in bfloat16: registers of the backward, its
sums on tensor cores or by folds, and below how many programs a scan is cut into segments. Needs a CUDA GPU.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from evmamba.kernels.ops import es2d_scan
from evmamba.launch.measure import kernel_bench as bench

# Attribute of triton_es2d (or of its _Call), and what is tried in its place; the names stand in the table.
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "backward registers": (
        "BACKWARD_OPTIONS",
        {"128": {"maxnreg": 128}, "168": {"maxnreg": 168}, "200": {"maxnreg": 200}, "free": {}},
    ),
    "sums over channels": ("_Call.tensor_cores", {"tensor cores": True, "folds": False}),
    "cut below programs": ("FEW_PROGRAMS", {"never": 0, "500": 500, "1000": 1000, "2000": 2000, "4000": 4000}),
}


def tune(shapes: Sequence[bench.Shape], device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape, choice and value: milliseconds of forward, and of forward with backward."""
    from evmamba.kernels import triton_es2d

    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for choice, (attribute, values) in CHOICES.items():
            owner = triton_es2d._Call if attribute.startswith("_Call.") else triton_es2d
            for name, value in values.items():
                with mock.patch.object(owner, attribute.removeprefix("_Call."), value):
                    row = {"shape": shape.name, "choice": choice, "value": name}
                    rows.append(row | _times(shape, device))
    return rows


def _times(shape: bench.Shape, device: torch.device) -> dict[str, Any]:
    inputs = bench.make_inputs(shape, device, torch.bfloat16)
    dy = torch.randn(inputs[0].shape, device=device)
    scan: Callable[..., torch.Tensor] = es2d_scan
    try:
        with bench.forced_backend("triton"):
            with torch.inference_mode():
                forward = bench.measure(lambda: scan(*inputs), device, seconds=0.3)
            training = bench.measure(lambda: torch.autograd.grad(scan(*inputs), inputs, dy), device, seconds=0.3)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"forward_ms": forward.median, "training_ms": training.median}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; the fastest training of each shape and choice is bold."""
    fastest: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["shape"], row["choice"]
        fastest[key] = min(fastest.get(key, float("inf")), row.get("training_ms", float("inf")))
    lines = ["| shape | choice | value | forward ms | training ms |", "|---|---|---|--:|--:|"]
    for row in rows:
        cells = [row["shape"], row["choice"], row["value"]]
        if "error" in row:
            cells += [row["error"], ""]
        else:
            training = f"{row['training_ms']:.3f}"
            best = row["training_ms"] == fastest[row["shape"], row["choice"]]
            cells += [f"{row['forward_ms']:.3f}", f"**{training}**" if best else training]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the Triton backend's constants on this GPU.")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="WORD", help="only shapes whose name has one of these"
    )
    parser.add_argument("--output", type=Path, help="folder for tuning.json and tuning.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    shapes = [s for s in bench.GPU_SHAPES if not options.shapes or any(word in s.name for word in options.shapes)]
    rows = tune(shapes, torch.device("cuda"))
    table = markdown(rows)
    print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": bench.triton_version()}
        (options.output / "tuning.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        heading = "\n".join(f"- {key}: {value}" for key, value in about.items())
        (options.output / "tuning.md").write_text(f"# The backend's constants\n\n{heading}\n\n{table}\n")


if __name__ == "__main__":
    main()

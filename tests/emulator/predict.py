"""Compiles the scans as the JIT does for an H200 and writes what the simulated scheduler says of them.

python -m tests.emulator.predict        writes launch/measure/predictions.json; minutes on one core
"""

import json
import tempfile
from math import ceil
from pathlib import Path

import torch
import triton

from evmamba.kernels import triton_es2d
from evmamba.kernels.triton_math import CHECKPOINT, GROUP_TOKENS
from evmamba.launch.measure.kernel_bench import GPU_SHAPES, N, Shape, make_inputs

from . import sass, schedule
from .host import Launched, emulated, on_device

FILE = Path(__file__).parents[2] / "launch" / "measure" / "predictions.json"
SCANS = ("segment_state_kernel", "scan_forward_kernel", "scan_backward_kernel")


def launches(shape: Shape, cache: Path) -> list[Launched]:
    """All launches of a forward without gradients, and of one with its backward."""
    inputs = [t.detach() for t in make_inputs(shape, torch.device("cpu"), torch.bfloat16)]
    inputs[0] = on_device(inputs[0])
    dy = on_device(torch.empty(inputs[0].shape))
    with emulated(cache, execute=False, machine_code=True) as emulation:
        triton_es2d.forward(*inputs, "es2d", save=False)
        _, states = triton_es2d.forward(*inputs, "es2d", save=True)
        triton_es2d.backward(dy, *inputs, states, "es2d")
    return emulation.launches


def predict(shape: Shape, launch: Launched) -> dict[str, float]:
    """What one scan kernel's machine code is and takes; instructions of a round of its innermost loop."""
    code = sass.disassemble(launch.compiled.asm["cubin"])
    tokens = int(launch.arguments.get("tokens", 0)) or ceil(shape.tokens / 4 / shape.B)
    tokens = min(tokens, int(launch.arguments["L"]))
    inner = code.innermost()
    if launch.kernel == "scan_backward_kernel":
        body = schedule.outermost(code, lambda loop: N if any(i.name == "MUFU.EX2" for i in loop) else shape.R)
        rounds = ceil(tokens / CHECKPOINT)
    elif launch.kernel == "scan_forward_kernel":
        body = schedule.outermost(code, lambda loop: CHECKPOINT // GROUP_TOKENS)
        rounds = ceil(tokens / CHECKPOINT)
    else:
        body, rounds = inner, ceil(tokens / GROUP_TOKENS)
    return {
        "programs": launch.grid[0],
        "registers": code.registers,
        "stack": code.stack,
        "instructions": len(inner),
        "us": round(schedule.microseconds(rounds, launch.grid[0], body, code.registers), 1),
    }


def main() -> None:
    """Write the predictions of all shapes."""
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for shape in GPU_SHAPES:
            found: dict[str, dict[str, float]] = {}
            for launch in launches(shape, Path(cache)):
                if launch.kernel in SCANS:
                    saves = launch.arguments.get("SAVE")
                    name = launch.kernel + {True: ", training", False: ", inference", None: ""}[saves]
                    if launch.arguments.get("REVERSE"):
                        name += ", reversed"
                    if name not in found:
                        found[name] = predict(shape, launch)
            rows[shape.name] = found
            print(shape.name, found, flush=True)
    about = {"triton": triton.__version__, "architecture": "sm_90", "multiprocessors": 132, "clock_mhz": 1980}
    FILE.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the Triton backend decides by numbers that another GPU may want otherwise, and each device's file of them.

`python -m evmamba.launch.measure.tune` measures and writes such a file. The backend loads the one that EVMAMBA_TUNING
names, else the device's own in the folder `tuned` beside this file, else it takes the defaults.
"""

import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).with_name("tuned")


@dataclass(frozen=True)
class Tuning:
    """Choices of the Triton backend. Results do not depend on them but for the order of sums.

    Attributes:
        few_programs: programs below which a GPU is far from full: scanning in segments, twice as many programs, then
            pays for twice the exponentials. 0 never cuts.
        shortest_segment: tokens of a segment at least.
        backward_registers: of a thread at most; three backward warps a scheduler instead of two are worth a few
            spilled values. None leaves it to the compiler. NVIDIA only.
        tensor_cores: whether the backward adds up over channels on tensor cores, which cut to 10 bits. None: for
            bfloat16, which has 7, on NVIDIA.
        weight_gradient_splits: parts of the tokens whose share of the projections' weight gradient is summed apart.
        row_elements: numbers that a program of a norm, and of what else walks over pixels, holds at once.
        row_programs: programs of their backwards that sum over pixels; eight for each of 132 multiprocessors.
    """

    few_programs: int = 750
    shortest_segment: int = 64
    backward_registers: int | None = 168
    tensor_cores: bool | None = None
    weight_gradient_splits: int = 64
    row_elements: int = 4096
    row_programs: int = 1056


def tuning_of(device: torch.device) -> Tuning:
    """The tuning of scans on this device. Raises ValueError for a file that holds something else."""
    return _tuning_of(device, os.environ.get("EVMAMBA_TUNING"))


@lru_cache
def _tuning_of(device: torch.device, named: str | None) -> Tuning:
    if named:
        return load(Path(named))
    if device.type != "cuda":
        return Tuning()
    path = tuning_file(torch.cuda.get_device_name(device))
    return load(path) if path.exists() else Tuning()


def tuning_file(device_name: str) -> Path:
    """Where the tuning of a device is looked for, by the name its driver gives it."""
    return TUNED / f"{device_name.lower().replace(' ', '-')}.json"


def load(path: Path) -> Tuning:
    """The entry "tuning" of a JSON file; what it leaves out has its default. Raises ValueError for anything else."""
    try:
        values = json.loads(path.read_text())["tuning"]
        known: dict[str, Any] = {field.name: field.type for field in fields(Tuning)}
        wrong = [name for name, value in values.items() if name not in known or not isinstance(value, known[name])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tuning file: {type(error).__name__}: {error}") from None
    if wrong:
        raise ValueError(f"tuning file {path} has wrong {', '.join(wrong)}; known are {', '.join(known)}")
    return Tuning(**values)

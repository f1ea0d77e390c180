"""What devices can do at most, the scan's floor by it, and what the simulated scheduler predicts (predictions.json)."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

EXPONENTIALS_A_CLOCK = 16  # of a multiprocessor; a warp takes two cycles of each of its four schedulers
VECTOR_INSTRUCTIONS = 17  # of a CPU, for a vector of states
PREDICTIONS = Path(__file__).with_name("predictions.json")


@dataclass(frozen=True)
class Hardware:
    """A GPU's limits.

    Attributes:
        name: a word of the name that the driver gives.
        bandwidth: bytes a second that a copy reaches, read and written: measured for H200 and H100, three quarters of
            the data sheet's for the others.
        clock: of the multiprocessors under load, Hz.
        multiprocessors: of the whole chip; some products have fewer.
    """

    name: str
    bandwidth: float
    clock: float
    multiprocessors: int

    def seconds(self, bytes: float, exponentials: float) -> float:
        """The larger of memory's and the exponential units' time."""
        rate = EXPONENTIALS_A_CLOCK * self.multiprocessors * self.clock
        return max(bytes / self.bandwidth, exponentials / rate)


KNOWN = (
    Hardware("H200", 4.3e12, 1.98e9, 132),
    Hardware("H100", 3.0e12, 1.98e9, 132),
    Hardware("A100", 1.5e12, 1.41e9, 108),
)


def hardware_of(device_name: str) -> Hardware | None:
    """The limits of a GPU by the name its driver gives, or None for one that is not known here."""
    return next((hardware for hardware in KNOWN if hardware.name in device_name), None)


def scan_floor_us(hardware: Hardware, token_channels: int, states: int, training: bool) -> float:
    """No kernel of the recurrence is faster, with bfloat16 maps; forward, or with `training` the backward as well.

    Memory: x read and y written (backward: x, dy read, dx written). Exponentials: one a state, token and channel, and
    two for the step size (backward: one more for its slope).
    """
    forward = hardware.seconds(4 * token_channels, (states + 2) * token_channels)
    backward = hardware.seconds(6 * token_channels, (states + 3) * token_channels)
    return 1e6 * (forward + backward if training else forward)


def cpu_scan_floor_us(token_channels: int, states: int, threads: int) -> float | None:
    """No CPU code that keeps its states in registers is faster, forward, in float32; None where the clock is not told.

    Counted: `VECTOR_INSTRUCTIONS` for a vector of states (exponential by a polynomial, recurrence, sum), two a clock,
    at the clock that the operating system tells now.
    """
    try:
        import psutil
    except ImportError:  # not needed by the kernels alone
        return None
    clock = psutil.cpu_freq()
    if clock is None or not clock.current:
        return None
    lanes = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    vectors = token_channels * states / lanes
    return vectors * VECTOR_INSTRUCTIONS / 2 / (clock.current * threads)


@lru_cache
def _predictions() -> dict[str, Any]:
    return json.loads(PREDICTIONS.read_text())


def predicted_us(hardware: Hardware, shape: str, kernel: str) -> float | None:
    """The simulated time of a scan kernel at one of the benchmark's shapes, scaled by multiprocessors and clock."""
    predictions = _predictions()
    row = predictions["rows"].get(shape, {}).get(kernel)
    if row is None:
        return None
    about = predictions["about"]
    theirs = about["multiprocessors"] * about["clock_mhz"] * 1e6
    return row["us"] * theirs / (hardware.multiprocessors * hardware.clock)

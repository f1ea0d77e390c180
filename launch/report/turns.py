"""Whether one network is faster than another, from the rounds in which both had their turns."""

import statistics
from collections.abc import Sequence
from typing import Literal

# Numbers of a cost that are counted, not timed: they are compared as they are.
COUNTED = ("parameters", "macs")


def drift(rounds: Sequence[float]) -> float:
    """How far a network's rounds lie apart: half their range over their median."""
    return (max(rounds) - min(rounds)) / 2 / statistics.median(rounds)


def ahead(one: Sequence[float], other: Sequence[float], better: Literal["max", "min"]) -> bool:
    """Whether one network is better than another in every round, and on the whole by more than either drifts."""
    sign = 1 if better == "max" else -1
    gaps = [sign * (a - b) / max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)]
    return min(gaps) > 0 and statistics.median(gaps) > max(drift(one), drift(other))


def first_of(rounds: Sequence[Sequence[float]], better: Literal["max", "min"]) -> int | None:
    """The network that is ahead of all others; None where there is none."""
    for k, own in enumerate(rounds):
        if all(ahead(own, other, better) for n, other in enumerate(rounds) if n != k):
            return k
    return None

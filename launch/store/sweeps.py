"""Curves of one network over a size: the points of a result's `sweeps`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

# What was varied, metrics and cost keys -> numbers; or "failed" -> a reason.
Point = dict[str, Any]


def sweep(name: str, values: Iterable[int], measure: Callable[[int], Point]) -> list[Point]:
    """Points in the order of the values, up to the first that cannot be measured, which says why."""
    points: list[Point] = []
    for value in values:
        try:
            points.append({name: value} | measure(value))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
            reason = "out of memory" if out else str(error).strip().splitlines()[0]
            points.append({name: value, "failed": reason})
            break
    return points

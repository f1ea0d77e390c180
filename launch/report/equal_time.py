"""A second view of a comparison: how good networks are after equal wall-clock time, which is what a user pays."""

import statistics
from collections.abc import Iterable

from evmamba.launch.report.columns import Column
from evmamba.launch.report.paper import label_of
from evmamba.launch.store.results import Result


def at_equal_time(results: Iterable[Result], column: Column) -> str | None:
    """Who had reached what when the fastest network had finished its training; None where fewer than two can tell.

    Read off the curves of the metric in validation, as if all steps of a training took equally long.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        if result.finished and result.training.get("seconds") and result.training.get("steps"):
            runs.setdefault(label_of(result.model), []).append(result)
    if len(runs) < 2:
        return None
    seconds = {label: statistics.fmean(r.training["seconds"] for r in own) for label, own in runs.items()}
    fastest = min(seconds, key=lambda label: seconds[label])
    reached: dict[str, float] = {}
    early = []
    for label, own in runs.items():
        values = [_value(result, column, seconds[fastest]) for result in own]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            reached[label] = column.scale * statistics.fmean(known)
        else:
            early.append(label)
    if len(reached) < 2:
        return None
    sign = -1 if column.better == "max" else 1
    order = sorted(reached, key=lambda label: sign * reached[label])
    texts = [f"{label} {column.show(reached[label])}" for label in order]
    texts += [f"{label} not validated yet" for label in early]
    return (
        f"{column.header} in validation after {_duration(seconds[fastest])} of training each, as long as {fastest} "
        f"takes: {', '.join(texts)} (the others' learning rates have not fallen yet)"
    )


def _value(result: Result, column: Column, seconds: float) -> float | None:
    """The metric at the last validation within so many seconds of training."""
    training = result.training
    share = min(1.0, seconds / training["seconds"])
    found = [
        values[column.key]
        for step, values in training.get("validation") or []
        if step <= training["steps"] * share and values.get(column.key) is not None
    ]
    # Seeds of the fastest network itself differ a little from their mean: its last validation counts.
    return found[-1] if found else None


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

"""A second view of a comparison: how good networks are after equal wall-clock time, which is what a user pays."""

import statistics
from collections.abc import Iterable

from evmamba.launch.report.columns import Column
from evmamba.launch.report.paper import label_of
from evmamba.launch.store.results import Result

NEAR = 0.9  # of the steps until then: an earlier validation is of another time
ALIKE = 1.2  # seeds of one network that differ by more in their time had neighbours


def at_equal_time(results: Iterable[Result], column: Column) -> str | None:
    """Who had reached what when the fastest network had finished its training; None where fewer than two can tell, or
    seeds of one network took so different times that times mean nothing.

    Read off the curves of the metric in validation, as if all steps of a training took equally long.
    """
    runs: dict[str, list[tuple[Result, float, int]]] = {}
    for result in results:
        training = result.training
        if result.finished and (took := training.get("seconds")) and (steps := training.get("steps")):
            runs.setdefault(label_of(result.model), []).append((result, took, steps))
    if len(runs) < 2:
        return None
    for own in runs.values():
        times = [took for _, took, _ in own]
        if max(times) > ALIKE * min(times):
            return None
    seconds = {label: statistics.fmean(took for _, took, _ in own) for label, own in runs.items()}
    fastest = min(seconds, key=lambda label: seconds[label])
    reached: dict[str, float] = {}
    early = []
    for label, own in runs.items():
        # Seeds of the fastest network itself differ a little from their mean: they have ended.
        values = [
            _value(result, column, steps if label == fastest else steps * min(1.0, seconds[fastest] / took))
            for result, took, steps in own
        ]
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
    texts += [f"{label} not validated near then" for label in early]
    return (
        f"{column.header} in validation after {_duration(seconds[fastest])} of training each, as long as {fastest} "
        f"takes: {', '.join(texts)} (the others' learning rates have not fallen yet)"
    )


def _value(result: Result, column: Column, steps: float) -> float | None:
    """The metric at the last validation within so many steps, if that was not long before; at the end of a training
    that was tested on its validation images, the test's."""
    if steps == result.training.get("steps") and result.data is not None and result.data.get("split") == "val":
        return result.metrics.get(column.key)
    found = [
        value
        for step, values in result.training.get("validation") or []
        if NEAR * steps <= step <= steps and (value := values.get(column.key)) is not None
    ]
    return found[-1] if found else None


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

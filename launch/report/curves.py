"""Curves of the report: what several results say as a function of the input's size, the batch, or the training step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evmamba.launch.report.columns import Column
from evmamba.launch.report.notes import precision_of
from evmamba.launch.report.paper import label_of
from evmamba.launch.store.results import Result

POINTS = 120


@dataclass(frozen=True)
class Curve:
    """`points` are (x, y) by rising x; `run` is where they come from."""

    label: str
    points: Sequence[tuple[float, float]]
    run: str = ""


def training_curves(results: Iterable[Result]) -> list[Curve]:
    """The loss of each finished or failed training over its optimizer steps, thinned."""
    curves = []
    for result in results:
        points = [(float(x), float(y)) for x, y in result.training.get("curve") or [] if y is not None]
        if len(points) > 1:
            curves.append(Curve(label_of(result.model), thinned(points), result.run))
    return curves


def validation_curves(results: Iterable[Result], column: Column) -> list[Curve]:
    """A metric on the validation data during each training, in its column's unit."""
    curves = []
    for result in results:
        points = [
            (float(step), column.scale * value)
            for step, values in result.training.get("validation") or []
            if (value := values.get(column.key)) is not None
        ]
        if len(points) > 1:
            curves.append(Curve(label_of(result.model), thinned(points), result.run))
    return curves


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points, each the mean of its neighbours, so that noise is not picked but averaged."""
    width = math.ceil(len(points) / POINTS)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def size_curves(results: Iterable[Result], key: str, where: str | None = None) -> list[Curve]:
    """A cost or metric over the side of a square input, from results with a sweep over ``input_size``.

    Args:
        key: of the sweep's points: a cost or a metric, in the unit of the results.
        where: only results on this device; None takes all.

    Several results of one network, e.g. of several seeds, are one curve: their mean at every side.
    """
    found: dict[str, dict[float, list[float]]] = {}
    swept = [r for r in results if r.sweeps.get("input_size") and where in (None, r.provenance.get("device"))]
    # Multiply-accumulates are the same in every precision.
    labelled = [(label_of(r.model), r) for r in swept] if key == "macs" else _told_apart(swept)
    for label, result in labelled:
        for point in result.sweeps["input_size"]:
            side, value = side_of(point.get("input_size")), point.get(key)
            if side and value is not None:
                found.setdefault(label, {}).setdefault(side, []).append(float(value))
    return _curves(found)


def batch_curves(results: Iterable[Result], key: str) -> list[Curve]:
    """A cost over the batch size, from results with a sweep over ``batch_size``."""
    found: dict[str, dict[float, list[float]]] = {}
    for label, result in _told_apart(r for r in results if r.sweeps.get("batch_size")):
        for point in result.sweeps["batch_size"]:
            size, value = point.get("batch_size"), point.get(key)
            if size and value is not None:
                found.setdefault(label, {}).setdefault(float(size), []).append(float(value))
    return _curves(found)


def _told_apart(results: Iterable[Result]) -> list[tuple[str, Result]]:
    """Results with the name of their network, and of the precision where there are several."""
    results = list(results)
    kinds = [precision_of(result) for result in results]
    several = len(set(kinds)) > 1
    return [
        (f"{label_of(result.model)}, {kind}" if several else label_of(result.model), result)
        for result, kind in zip(results, kinds, strict=True)
    ]


def side_of(size: Any) -> float | None:
    """The side of the square with as many pixels, of 224, [224, 224] or [3, 224, 224]."""
    if isinstance(size, int | float):
        return float(size)
    if isinstance(size, list | tuple) and len(size) >= 2:
        return math.sqrt(size[-1] * size[-2])
    return None


def _curves(found: Mapping[str, Mapping[float, Sequence[float]]]) -> list[Curve]:
    return [
        Curve(label, [(x, sum(values) / len(values)) for x, values in sorted(points.items())])
        for label, points in found.items()
        if len(points) > 1
    ]


def devices(results: Iterable[Result]) -> list[str]:
    """The devices of some results, in their order."""
    return list(dict.fromkeys(str(r.provenance["device"]) for r in results if r.provenance.get("device")))

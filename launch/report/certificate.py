"""A certificate: measured numbers beside published ones, with the interval over the test images, and a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from evmamba.errors import UserError, unknown_name
from evmamba.launch.report.columns import columns_of
from evmamba.launch.report.over_images import half_width, wilson
from evmamba.launch.store.results import Result
from evmamba.tasks.per_image import PerImage


@dataclass(frozen=True)
class Comparison:
    """One metric, in its printed unit.

    Attributes:
        header: the metric with its unit.
        measured: here.
        published: elsewhere.
        rounding: half a unit of the published number's last digit.
        low, high: the 95 % interval of the measured number over the images; None where there is none to tell.
        tolerance: how far apart they may be, in place of the interval; None: the interval decides.
    """

    header: str
    measured: float
    published: float
    rounding: float
    low: float | None
    high: float | None
    tolerance: float | None

    @property
    def difference(self) -> float:
        return self.measured - self.published

    @property
    def agrees(self) -> bool:
        """Whether the published number, before it was rounded, may lie in the interval (or within the tolerance)."""
        slack = self.rounding + 1e-9
        if self.tolerance is not None or self.low is None or self.high is None:
            return abs(self.difference) <= (self.tolerance or 0.0) + slack
        return self.low - slack <= self.published <= self.high + slack

    @property
    def rule(self) -> str:
        if self.tolerance is not None:
            return f"at most {self.tolerance:g} apart"
        return "rounding alone" if self.low is None else "95% interval"


def read_published(texts: Sequence[str], task: str, head: str | None) -> dict[str, str]:
    """Published numbers as users give them: ``AP=37.5``, or ``76.5`` for the task's first metric.

    Raises:
        UserError: no such metric, or no number.
    """
    columns = {column.key: column for column in columns_of(task, head)}
    found = {}
    for text in texts:
        metric, equals, value = text.rpartition("=")
        key = metric if equals else next(iter(columns))
        if key not in columns:
            raise unknown_name("metric", key, columns)
        try:
            float(value)
        except ValueError:
            raise UserError(f"--published {text}: write METRIC=NUMBER as it is printed, e.g. {key}=76.5") from None
        found[key] = value
    return found


def compare(
    result: Result,
    images: PerImage | None,
    published: Mapping[str, str],
    tolerance: float | None = None,
    given: bool = True,
) -> list[Comparison]:
    """Put every published number beside the measured one.

    Args:
        result: of the test.
        images: what it kept of each image; None: no interval.
        published: metric -> number as printed (its digits count).
        tolerance: in the printed unit.
        given: the user asks for each of these numbers; else one of an optional metric that was not measured is left
            out.

    Raises:
        UserError: a published metric that was not measured.
    """
    found = []
    for column in columns_of(result.task, result.head):
        if column.key not in published:
            continue
        measured, text = result.metrics.get(column.key), published[column.key]
        if measured is None and column.optional and not given:
            continue
        if measured is None:
            raise UserError(f"{column.key} was not measured on this data, though a published number is given for it")
        low = high = None
        if images is not None and (reach := interval(images, column.key)):
            low, high = (bound * column.scale for bound in reach)
        digits = len(text.partition(".")[2])
        found.append(
            Comparison(column.header, measured * column.scale, float(text), 0.5 * 10**-digits, low, high, tolerance)
        )
    return found


def interval(images: PerImage, metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric over the images, as fractions: Wilson's, or by bootstrap."""
    right = images.outcomes(metric) if metric in images.metrics else None
    if right is not None:
        return wilson(right)
    reach = half_width(images, metric)
    if reach is None:
        return None
    value = recomputed(images, metric)
    return value - reach, value + reach


def recomputed(images: PerImage, metric: str) -> float:
    """A metric from what was kept of every image, as a fraction."""
    return float(images.metric(metric, np.ones((1, len(images.images))))[0])


def print_certificate(facts: Mapping[str, Any], comparisons: Sequence[Comparison], console: Console) -> None:
    """Print facts as lines, then the numbers."""
    for name, value in facts.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
        console.print(f"{name:12}{text}", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("", "measured", "published", "difference", "its 95% interval", "agrees"):
        table.add_column(header, justify="left" if not header or header == "agrees" else "right")
    for one in comparisons:
        known = one.low is not None and one.high is not None
        reach = f"{one.low - one.published:+.2f} to {one.high - one.published:+.2f}" if known else "unknown"  # type: ignore[operator]
        verdict = f"{'yes' if one.agrees else 'NO'} ({one.rule})"
        shown = (f"{one.measured:.2f}", f"{one.published:g}", f"{one.difference:+.2f}", reach, verdict)
        table.add_row(one.header, *shown)
    if comparisons:
        console.print(table)

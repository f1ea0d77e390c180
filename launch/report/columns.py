"""What a table shows of each kind of run: its columns, their units and roundings, and the names of tasks and heads."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from evmamba.launch.store.results import COST
from evmamba.launch.store.spec import EXPORTED_FORMS
from evmamba.tasks import TASKS, Head


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Attributes:
        key: name in `Result.metrics` (or `Result.cost`).
        header: as printed, with its unit.
        show: rounds the number to the digits that mean something.
        scale: from the stored unit to the printed one.
        better: which end of the column is the good one.
        optional: left out when nothing in its group was measured.
        cost: whether a training or evaluation has it in `Result.cost`.
    """

    key: str
    header: str
    show: Callable[[float], str]
    scale: float = 1.0
    better: Literal["max", "min"] = "max"
    optional: bool = False
    cost: bool = False


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _two_decimals_or_none(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


COST_COLUMNS = (
    Column("parameters", "params (M)", _two_decimals, 1e-6, "min"),
    Column("macs", "MACs (G)", _two_decimals_or_none, 1e-9, "min"),
    Column("latency_ms_median", "latency (ms)", _three_digits, 1.0, "min"),
    Column("latency_ms_p95", "p95 (ms)", _three_digits, 1.0, "min", optional=True),
    Column("images_per_s", "img/s", _three_digits),
    Column("train_images_per_s", "train img/s", _three_digits, optional=True),
    Column("peak_memory_mb", "memory (GB)", _two_decimals, 1 / 1024, "min"),
    Column("train_peak_memory_mb", "train memory (GB)", _two_decimals, 1 / 1024, "min", optional=True),
    Column("energy_j_per_image", "energy (J/img)", _three_digits, 1.0, "min", optional=True),
    Column("elsewhere", "img/s reported elsewhere", _three_digits, optional=True),
)


def columns_of(task: str, head: str | None) -> tuple[Column, ...]:
    """The columns that a task shows, in order; the first is the one that figures plot."""
    if task == COST:
        return COST_COLUMNS
    return tuple(
        Column(
            metric.key, metric.header, f"{{:.{metric.digits}f}}".format, metric.scale, metric.better, metric.optional
        )
        for metric in TASKS[task].metrics_of(head)
    )


def exported_columns(task: str, head: str | None) -> list[Column]:
    """The columns of a trained network's exported forms: the task's first metric, size and latency of each."""
    if task == COST:
        return []
    metric = columns_of(task, head)[0]
    columns = []
    for form, name in EXPORTED_FORMS.items():
        columns += [
            dataclasses.replace(metric, key=f"{form}_{metric.key}", header=f"{name} {metric.header}", optional=True),
            Column(f"{form}_mb", f"{name} (MB)", _three_digits, better="min", optional=True, cost=True),
            Column(f"{form}_latency_ms", f"{name} (ms)", _three_digits, better="min", optional=True, cost=True),
        ]
    return columns


def head_of(task: str, head: str | None) -> Head | None:
    """The record of what stands on a backbone; None for a bare one."""
    if head is None:
        return None
    return (TASKS.of_head(head) if task == COST else TASKS[task]).head(head)


def title_of(task: str, head: str | None) -> str:
    """A group of columns in words; a backbone's own classifier is no head to be named."""
    found = head_of(task, head)
    return task if found is None or (task != COST and not TASKS[task].pyramid) else f"{task} · {found.name}"

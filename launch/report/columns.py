"""What a table shows of each kind of run: its columns, their units and roundings, and the names of tasks and heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

HEADS = {
    "linear": "linear",
    "retinanet": "RetinaNet",
    "maskrcnn": "Mask R-CNN",
    "fasterrcnn": "Faster R-CNN",
    "upernet": "UPerNet",
}


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
    """

    key: str
    header: str
    show: Callable[[float], str]
    scale: float = 1.0
    better: Literal["max", "min"] = "max"
    optional: bool = False


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _two_decimals_or_none(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _metric(key: str, header: str, optional: bool = False) -> Column:
    return Column(key, header, _percent, scale=100.0, optional=optional)


COST = (
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
BOXES = tuple(_metric(key, key) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
BOXES_AND_MASKS = tuple(_metric(key, f"box {key}") for key in ("AP", "AP50", "AP75")) + tuple(
    _metric(f"mask_{key}", f"mask {key}") for key in ("AP", "AP50", "AP75")
)


def columns_of(task: str, head: str | None) -> tuple[Column, ...]:
    """The columns that a task shows, in order; the first is the one that figures plot."""
    if task == "cost":
        return COST
    if task == "classification":
        return (_metric("top1", "top-1 (%)"), _metric("top5", "top-5 (%)"))
    if task == "detection":
        return BOXES_AND_MASKS if head == "maskrcnn" else BOXES
    return (_metric("mIoU", "mIoU (%)"), _metric("mIoU_ms", "mIoU ms (%)", optional=True))


def title_of(task: str, head: str | None) -> str:
    """A group of columns in words; every classifier is linear, so only detectors and segmentors are named."""
    return task if head is None or task == "classification" else f"{task} · {HEADS.get(head, head)}"

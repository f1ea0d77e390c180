"""The one table: from any set of results to groups, rows and cells that every format of the report prints alike.

A cell is text that is already rounded, beside the number it came from, so terminal, Markdown, CSV, JSON and HTML cannot
disagree. Published numbers (paper.yaml) stand in rows of their own and are never mixed with measured ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from evmamba.launch.results import Result

HEADS = {
    "linear": "linear",
    "retinanet": "RetinaNet",
    "maskrcnn": "Mask R-CNN",
    "fasterrcnn": "Faster R-CNN",
    "upernet": "UPerNet",
}
# Lightning's names, for people.
PRECISIONS = {"32-true": "float32", "64-true": "float64", "bf16-mixed": "mixed bfloat16", "16-mixed": "mixed float16"}
DASH = "\N{EN DASH}"

State = Literal["measured", "published", "failed", "missing", "undefined", "blank"]


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


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _metric(key: str, header: str, optional: bool = False) -> Column:
    return Column(key, header, _percent, scale=100.0, optional=optional)


COST = (
    Column("parameters", "params (M)", _two_decimals, 1e-6, "min"),
    Column("macs", "MACs (G)", _two_decimals, 1e-9, "min"),
    Column("latency_ms_median", "latency (ms)", _three_digits, 1.0, "min"),
    Column("images_per_s", "img/s", _three_digits),
    Column("peak_memory_mb", "memory (GB)", _two_decimals, 1 / 1024, "min"),
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


@dataclass
class Group:
    """Columns that come from one kind of run: the cost, or one task with one head on one data set."""

    task: str
    head: str | None
    title: str
    columns: list[Column]
    data: dict[str, Any] | None = None
    comparable: bool = False
    """Whether the paper's numbers are on the same data: as many classes and validation images as its set has."""


@dataclass
class Cell:
    text: str
    state: State
    value: float | None = None
    best: bool = False
    run: str | None = None


@dataclass
class Row:
    """One line: `cells` holds one list a group, one cell a column."""

    model: str
    label: str
    kind: Literal["measured", "published"]
    cells: list[list[Cell]]


@dataclass
class Table:
    caption: str
    groups: list[Group]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    """The results behind the cells, in the table's order."""


@functools.cache
def published() -> dict[str, Any]:
    """The paper's numbers, as `paper.yaml` holds them."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


def label_of(model: str) -> str:
    """The name that people read: EfficientVMamba-T, or the model's own name."""
    return published()["models"].get(model, {}).get("label", model)


def title_of(task: str, head: str | None) -> str:
    """A group of columns in words; every classifier is linear, so only detectors and segmentors are named."""
    return task if head is None or task == "classification" else f"{task} · {HEADS.get(head, head)}"


def build_table(results: Iterable[Result], models: Sequence[str] | None = None) -> Table:
    """Put results into the one table.

    Args:
        results: any number of runs, finished or failed; of several runs of the same thing the newest one counts.
        models: order of the rows; by default the models follow their number of parameters.
    """
    # A training that another run evaluates has no numbers of its own.
    results, superseded = _newest(r for r in results if not (r.finished and r.protocol.get("stage") == "fit"))
    chosen = {(result.model, _group_key(result)): result for result in results}
    failures = {(r.model, r.task, r.head): r for r in results if not r.finished}
    groups = _groups(results)
    models = list(models) if models else _by_size(results)

    rows: list[Row] = []
    notes: list[str] = []
    used: list[Result] = []
    elsewhere: list[Group] = []
    for model in models:
        measured: list[list[Cell]] = []
        for key, group in groups:
            result = chosen.get((model, key)) or failures.get((model, group.task, group.head))
            measured.append(_measured_cells(result, group, label_of(model), notes))
            if result is not None:
                used.append(result)
        rows.append(Row(model, label_of(model), "measured", measured))
        paper = published()["models"].get(model)
        if paper:
            cells = [_published_cells(paper, group) for _, group in groups]
            if any(cell.state == "published" for part in cells for cell in part):
                rows.append(Row(model, "published", "published", cells))
            elsewhere += [group for _, group in groups if not group.comparable and _published_numbers(paper, group)]

    plain_groups = [group for _, group in groups]
    _mark_best(rows, plain_groups)
    if elsewhere:
        names = ", ".join(dict.fromkeys(published()["data"][group.task]["name"] for group in elsewhere))
        notes.append(f"published metrics are on {names}, not on this table's data, and are left out")
    notes += _memory_notes(used)
    if superseded:
        notes.append(f"{superseded} older run{'s' if superseded > 1 else ''} of the same things not shown")
    return Table(_caption(used), plain_groups, rows, notes, used)


def _group_key(result: Result) -> tuple[str, ...]:
    if result.task == "cost":
        # Throughput and memory depend on the batch.
        where = tuple(str(result.provenance.get(key)) for key in ("device", "precision"))
        where += (str(result.cost.get("batch_size")),)
    else:
        data = result.data or {}
        where = (str(data.get("name")), str(data.get("fingerprint")))
    return (result.task, result.head or "", *where)


def _newest(results: Iterable[Result]) -> tuple[list[Result], int]:
    """Keep the newest run of each thing, a finished one before a failed one; say how many fell away."""
    best: dict[tuple[str, ...], Result] = {}
    count = 0
    for result in results:
        count += 1
        key = (result.model, *_group_key(result))
        other = best.get(key)
        if other is None or _rank(result) >= _rank(other):
            best[key] = result
    return list(best.values()), count - len(best)


def _rank(result: Result) -> tuple[bool, str]:
    return result.finished, str(result.provenance.get("start", ""))


def _groups(results: list[Result]) -> list[tuple[tuple[str, ...], Group]]:
    """The groups in the table's order; a failed run opens one only where no finished run of its kind did."""
    members: dict[tuple[str, ...], list[Result]] = {}
    for result in sorted(results, key=lambda r: not r.finished):
        kind = (result.task, result.head or "")
        if not result.finished and any(key[:2] == kind for key in members):
            continue
        members.setdefault(_group_key(result), []).append(result)
    order = {"cost": 0, "classification": 1, "detection": 2, "segmentation": 3}
    heads = list(HEADS)
    keys = sorted(members, key=lambda k: (order[k[0]], heads.index(k[1]) if k[1] in heads else len(heads), k))
    kinds = [key[:2] for key in keys]
    return [(key, _group(members[key], several=kinds.count(key[:2]) > 1)) for key in keys]


def _group(results: list[Result], several: bool) -> Group:
    first = results[0]
    title = title_of(first.task, first.head)
    if several:
        # The same kind of run on several data sets, or the same measurement on several devices.
        where = first.provenance.get("device") if first.task == "cost" else (first.data or {}).get("name")
        title += f" · {where}"
    reference = published()["data"].get(first.task)
    data = first.data or {}
    comparable = bool(reference) and all(data.get(key) == reference[key] for key in ("num_classes", "val_images"))
    columns = [
        column
        for column in columns_of(first.task, first.head)
        if not column.optional or comparable or any(column.key in result.metrics for result in results)
    ]
    if first.task == "cost" and (batch := first.cost.get("batch_size")):
        columns = [
            dataclasses.replace(column, header=f"{column.header} (b{batch})")
            if column.key == "images_per_s"
            else column
            for column in columns
        ]
    return Group(first.task, first.head, title, columns, first.data, comparable or first.task == "cost")


def _measured_cells(result: Result | None, group: Group, label: str, notes: list[str]) -> list[Cell]:
    where = f"{label}, {group.title}"
    if result is None or not result.finished:
        state: State = "missing" if result is None else "failed"
        reason = "not run" if result is None else result.reason
        notes.append(f"{where}: {'failed: ' if result else ''}{reason}")
        run = result.run if result else None
        return [Cell(state if i == 0 else DASH, state, run=run) for i in range(len(group.columns))]
    numbers = result.cost if group.task == "cost" else result.metrics
    cells = []
    undefined = []
    for column in group.columns:
        number = numbers.get(column.key)
        # pycocotools answers -1 where no object of that size exists.
        if number is None or not math.isfinite(number) or number < 0:
            cells.append(Cell(DASH, "undefined", run=result.run))
            undefined.append(column)
        else:
            value = number * column.scale
            cells.append(Cell(column.show(value), "measured", value, run=result.run))
    if undefined:
        names = ", ".join(column.header.split(" (")[0] for column in undefined)
        # A task leaves out what its data does not define, e.g. APs without small objects.
        unmeasured = group.task == "cost" or any(column.optional for column in undefined)
        notes.append(f"{where}: {names} {'not measured' if unmeasured else 'undefined on this data'}")
    return cells


def _published_numbers(paper: dict[str, Any], group: Group) -> dict[str, Any]:
    numbers = paper.get(group.task, {})
    return numbers if group.task == "cost" else numbers.get(group.head, {})


def _published_cells(paper: dict[str, Any], group: Group) -> list[Cell]:
    """The paper's numbers, blank where its data is another: side by side they would be taken for a comparison."""
    numbers = _published_numbers(paper, group) if group.comparable else {}
    values = [numbers.get(column.key) for column in group.columns]
    return [Cell("", "blank") if v is None else Cell(str(v), "published", float(v)) for v in values]


def _memory_notes(results: list[Result]) -> list[str]:
    """What the memory column holds besides the activations; on the CPU not the model."""
    kinds = {result.cost.get("peak_memory_kind", "") for result in results if result.task == "cost"}
    if any("resident" in kind for kind in kinds):
        return ["memory on the CPU: the process's peak above that before the measurement, without the model itself"]
    return []


def _mark_best(rows: list[Row], groups: list[Group]) -> None:
    for g, group in enumerate(groups):
        for c, column in enumerate(group.columns):
            cells = [row.cells[g][c] for row in rows if row.kind == "measured"]
            values = [cell.value for cell in cells if cell.value is not None]
            if len(values) < 2:
                continue
            best = max(values) if column.better == "max" else min(values)
            for cell in cells:
                cell.best = cell.value == best


def _by_size(results: list[Result]) -> list[str]:
    sizes: dict[str, float] = {}
    for result in results:
        size = result.cost.get("parameters", math.inf) if result.task == "cost" else math.inf
        sizes[result.model] = min(size, sizes.get(result.model, math.inf))
    return sorted(sizes, key=lambda model: (sizes[model], model))


def _caption(results: list[Result]) -> str:
    """One line: data, device, precision, versions, date."""
    data: dict[str, dict[str, Any]] = {}
    places: dict[str, dict[str, None]] = {}
    software: dict[str, None] = {}
    days: list[str] = []
    for result in results:
        if result.data and result.data.get("name"):
            data.setdefault(result.data["name"], {}).setdefault(result.task, result.data.get("val_images", "?"))
        origin = result.provenance
        if origin.get("device"):
            precision = str(origin.get("precision", ""))
            places.setdefault(origin["device"], {}).setdefault(PRECISIONS.get(precision, precision))
        if origin.get("versions"):
            names = ("evmamba", "torch")
            software.setdefault(", ".join(f"{n} {origin['versions'][n]}" for n in names if n in origin["versions"]))
        if origin.get("start"):
            days.append(str(origin["start"])[:10])
    when = f"{min(days)} to {max(days)}" if days and min(days) != max(days) else "".join(days[:1])
    sets = [f"{name} ({', '.join(f'{t} {n}' for t, n in tasks.items())} test images)" for name, tasks in data.items()]
    devices = [", ".join(filter(None, [device, *kinds])) for device, kinds in places.items()]
    parts = ["; ".join(sets), "; ".join(devices), "; ".join(software), when]
    return " | ".join(part for part in parts if part)

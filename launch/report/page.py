"""report.html: one page that asks for nothing from outside; style, script, figures and pictures are inside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evmamba.launch.report.cells import Table
from evmamba.launch.report.columns import COST_COLUMNS, columns_of, title_of
from evmamba.launch.report.curves import Curve, batch_curves, devices, size_curves, training_curves, validation_curves
from evmamba.launch.report.figures import confusion_figure, cost_quality_figures, curve_figure, exponent
from evmamba.launch.report.paper import label_of, paper
from evmamba.launch.report.run_details import confusion, facts_of, per_class, pictures, title_of_run
from evmamba.launch.report.table import DASH
from evmamba.launch.store.results import Result

# Costs over the input's size, on logarithmic axes: key, axis, unit's factor.
SIZE_COSTS = (
    ("macs", "multiply-adds (G)", 1e-9),
    ("latency_ms_median", "latency of one image (ms)", 1.0),
    ("peak_memory_mb", "peak memory (GB)", 1 / 1024),
)
# Columns of the published logs.
LOG_HEADINGS = {
    "top1": "top-1 (%)",
    "last_top1": "last top-1 (%)",
    "images_per_gpu": "images per GPU",
    "step_s": "step (s)",
    "memory_mb": "memory (MiB)",
}
LARGE = 512  # pixels a side: from here on a cost's growth is that of its arithmetic, not of fixed costs


def to_html(table: Table) -> str:
    """The report as one page."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    results = list(table.results)
    ablated = [r for r in table.ablations.results if r not in results] if table.ablations else []
    kinds = _kinds(results)
    whole = [result for _, members in kinds for result in members if result.model in {r.model for r in ablated}]
    studied = _kinds([*whole, *ablated])
    return templates.get_template("report.html.j2").render(
        table=table,
        figures=_markup(cost_quality_figures(table)),
        sizes=_size_section([*results, *ablated]),
        batches=_batch_section([*results, *ablated]),
        training=_training_figures(kinds) + _training_figures([(f"{t} · ablations", m) for t, m in studied if ablated]),
        classes=[(title, classes) for title, members in kinds if (classes := per_class(members))],
        confusions=_confusions(kinds),
        galleries=_galleries(kinds),
        paper=paper(),
        paper_columns=_paper_columns,
        paper_headings=_paper_headings,
        log_headings=LOG_HEADINGS,
        label_of=label_of,
        runs=[_run(result) for result in [*results, *ablated]],
        number={result.run: n for n, result in enumerate([*results, *ablated])},
    )


def _run(result: Result) -> dict[str, Any]:
    return {
        "title": title_of_run(result),
        "name": result.run,
        "failed": None if result.finished else result.reason,
        "facts": facts_of(result),
    }


def _markup(pictures: Sequence[str]) -> list[Markup]:
    return [Markup(picture) for picture in pictures]


def _kinds(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The trainings by task, head and data set, with a title."""
    kinds: dict[str, list[Result]] = {}
    names = {(result.data or {}).get("name") for result in results if result.task != "cost"}
    for result in results:
        if result.task != "cost":
            name = (result.data or {}).get("name")
            title = title_of(result.task, result.head) + (f" · {name}" if name and len(names) > 1 else "")
            kinds.setdefault(title, []).append(result)
    return list(kinds.items())


def _training_figures(kinds: Sequence[tuple[str, list[Result]]]) -> list[Markup]:
    figures = []
    for title, results in kinds:
        column = columns_of(results[0].task, results[0].head)[0]
        for curves, name in (
            (training_curves(results), "training loss"),
            (validation_curves(results, column), f"{column.header} in validation"),
        ):
            if curves:
                figures.append(curve_figure(title, "optimizer steps", name, curves))
    return _markup(figures)


def _size_section(results: Sequence[Result]) -> dict[str, Any]:
    """Figures of cost and accuracy over the input's size, and how each cost grows: the power of the number of pixels
    that fits its larger sizes, 1 for a linear cost."""
    figures: list[str] = []
    growth: dict[str, dict[str, str]] = {}
    costs = [result for result in results if result.task == "cost" and result.head is None]
    for n, device in enumerate(devices(costs)):
        for key, name, unit in SIZE_COSTS:
            if key == "macs" and n:
                continue  # they do not depend on the device
            curves = _scaled(size_curves(costs, key, where=None if key == "macs" else device), unit)
            if not curves:
                continue
            title = "counted" if key == "macs" else device
            figures.append(curve_figure(title, "side of the image (pixels)", name, curves, log=True))
            column = name.split(" (")[0] + ("" if key == "macs" else f", {device}")
            for curve in curves:
                large = [(side * side, y) for side, y in curve.points if side >= LARGE]
                power = exponent(large if len(large) > 1 else [(side * side, y) for side, y in curve.points])
                if power is not None:
                    growth.setdefault(curve.label, {})[column] = f"{power:.2f}"
    trained = [result for result in results if result.task != "cost"]
    for title, members in _kinds(trained):
        first = columns_of(members[0].task, members[0].head)[0]
        if curves := _scaled(size_curves(members, first.key), first.scale):
            name = f"{first.header}, one training"
            figures.append(curve_figure(title, "side of the image (pixels)", name, curves))
    columns = list(dict.fromkeys(column for powers in growth.values() for column in powers))
    rows = [(label, [powers.get(column, DASH) for column in columns]) for label, powers in growth.items()]
    return {"figures": _markup(figures), "columns": columns, "rows": rows, "from": LARGE}


def _batch_section(results: Sequence[Result]) -> dict[str, Any]:
    """Figures of throughput and memory over the batch, and where each sweep ended."""
    figures = []
    costs = [result for result in results if result.task == "cost" and result.head is None]
    for device in devices(costs):
        there = [result for result in costs if result.provenance.get("device") == device]
        for key, name, unit in (("images_per_s", "images/s", 1.0), ("peak_memory_mb", "peak memory (GB)", 1 / 1024)):
            curves = _scaled(batch_curves(there, key), unit)
            if curves:
                figures.append(curve_figure(device, "batch size", name, curves, log=True))
    ends: dict[str, list[str]] = {}
    for result in costs:
        for point in result.sweeps.get("batch_size", []):
            if point.get("failed"):
                ends.setdefault(f"{point['failed']} at {point['batch_size']}", []).append(label_of(result.model))
    return {"figures": _markup(figures), "ends": [f"{why} ({', '.join(labels)})" for why, labels in ends.items()]}


def _scaled(curves: Sequence[Curve], unit: float) -> list[Curve]:
    return [Curve(curve.label, [(x, y * unit) for x, y in curve.points]) for curve in curves]


def _confusions(kinds: Sequence[tuple[str, list[Result]]]) -> list[tuple[str, list[Markup], int]]:
    """By kind of training, one matrix a model: that of its first seed; and how many classes are left out."""
    found = []
    for title, results in kinds:
        matrices = [(result, matrix) for result in _first_of_each(results) if (matrix := confusion(result))]
        if matrices:
            pictures = [
                confusion_figure(label_of(result.model), title, shares, names)
                for result, (shares, names, _) in matrices
            ]
            found.append((title, _markup(pictures), max(left_out for _, (_, _, left_out) in matrices)))
    return found


def _galleries(kinds: Sequence[tuple[str, list[Result]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    found = []
    for title, results in kinds:
        models = [
            {"label": label_of(result.model), "pictures": shown}
            for result in _first_of_each(results)
            if (shown := pictures(result))
        ]
        if models:
            found.append((title, models))
    return found


def _first_of_each(results: Sequence[Result]) -> list[Result]:
    first: dict[str, Result] = {}
    for result in results:
        if result.finished:
            first.setdefault(result.model, result)
    return list(first.values())


def _paper_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The numbers that the rows of one of the paper's tables have, in their order."""
    names = ("parameters", "macs", "images_per_s")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return [key for key in names if key in keys] + [key for key in keys if key not in names]


def _paper_headings(task: str, head: str) -> dict[str, str]:
    """The numbers of one of the paper's tables, named as in the report's own, with their units."""
    return {column.key: column.header for column in (*COST_COLUMNS, *columns_of(task, head))}

"""report.html: one page that asks for nothing from outside; style, script, figures and pictures are inside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evmamba.launch.columns import columns_of, title_of
from evmamba.launch.evidence import confusion, facts_of, per_class, pictures, title_of_run
from evmamba.launch.figures import confusion_figure, cost_quality_figures, curve_figure, exponent
from evmamba.launch.paper import label_of, paper
from evmamba.launch.results import Result
from evmamba.launch.series import Curve, batch_curves, devices, size_curves, training_curves, validation_curves
from evmamba.launch.table import Table

# Costs over the input's size: key, axis, unit's factor, whether the axes are logarithmic.
SIZE_COSTS = (
    ("macs", "multiply-adds (G)", 1e-9),
    ("latency_ms_median", "latency of one image (ms)", 1.0),
    ("peak_memory_mb", "peak memory (GB)", 1 / 1024),
)
SIZE_METRICS = (("top1", "top-1 (%)"), ("AP", "AP"), ("mIoU", "mIoU (%)"))


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
    if table.ablations:
        results += [result for result in table.ablations.results if result not in results]
    results += [result for result in table.curves if result not in results]
    kinds = _kinds(results)
    return templates.get_template("report.html.j2").render(
        table=table,
        figures=_markup(cost_quality_figures(table)),
        sizes=_size_section(table),
        batches=_batch_figures(table),
        training=_training_figures(kinds),
        classes=[(title, classes) for title, members in kinds if (classes := per_class(members))],
        confusions=_confusions(kinds),
        galleries=_galleries(kinds),
        paper=paper(),
        label_of=label_of,
        runs=[_run(result) for result in results],
        number={result.run: n for n, result in enumerate(results)},
        # Packages' own words for a column of the paper's tables.
        paper_columns=_paper_columns,
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
            (validation_curves(results, column.key), f"{column.header} in validation"),
        ):
            if curves:
                figures.append(curve_figure(title, "optimizer steps", name, curves))
    return _markup(figures)


def _size_section(table: Table) -> dict[str, Any]:
    """Figures of cost and accuracy over the input's size, and a sentence on how each cost grows."""
    results = [*table.results, *table.curves]
    figures, growth = [], []
    costs = [result for result in results if result.task == "cost" and result.head is None]
    for device in devices(costs):
        for key, name, unit in SIZE_COSTS:
            curves = size_curves(costs, key, where=device)
            if key == "macs" and device != devices(costs)[0]:
                continue  # they do not depend on the device
            curves = [Curve(c.label, [(x, y * unit) for x, y in c.points]) for c in curves]
            if curves:
                figures.append(
                    curve_figure(
                        device if key != "macs" else "all", "side of the image (pixels)", name, curves, log=True
                    )
                )
                powers = {c.label: exponent([(x * x, y) for x, y in c.points if x >= 384] or c.points) for c in curves}
                said = ", ".join(f"{label} {power:.2f}" for label, power in powers.items() if power is not None)
                if said:
                    where = "" if key == "macs" else f" on {device}"
                    growth.append(f"{name.split(' (')[0]}{where} grows as pixels to the power of: {said}")
    for key, name in SIZE_METRICS:
        curves = size_curves(table.curves, key)
        if curves:
            figures.append(curve_figure("one checkpoint at other sizes", "side of the image (pixels)", name, curves))
    return {"figures": _markup(figures), "growth": growth}


def _batch_figures(table: Table) -> list[Markup]:
    figures = []
    results = [*table.results, *table.curves]
    for device in devices(results):
        there = [result for result in results if result.provenance.get("device") == device]
        for key, name, unit in (("images_per_s", "images/s", 1.0), ("peak_memory_mb", "peak memory (GB)", 1 / 1024)):
            curves = [Curve(c.label, [(x, y * unit) for x, y in c.points]) for c in batch_curves(there, key)]
            if curves:
                figures.append(curve_figure(device, "batch size", name, curves, log=True))
    return _markup(figures)


def _confusions(kinds: Sequence[tuple[str, list[Result]]]) -> list[tuple[str, Markup, int]]:
    """One matrix a model and data set: that of its first seed."""
    found = []
    for title, results in kinds:
        for result in _first_of_each(results):
            if matrix := confusion(result):
                shares, names, left_out = matrix
                name = f"{label_of(result.model)}, {title}"
                found.append((name, Markup(confusion_figure(name, shares, names)), left_out))
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

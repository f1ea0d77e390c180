"""Print the one table: terminal, Markdown, CSV, JSON and a self-contained HTML page."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.console import Group as RichGroup
from rich.table import Table as RichTable
from rich.text import Text

from evmamba.launch.figures import cost_quality_figures
from evmamba.launch.results import Result, find_results, read_result, write_json, write_text
from evmamba.launch.table import DASH, HEADS, Cell, Table, build_table, label_of

REPORT_SCHEMA = 1
PICTURE_WIDTH = 900
PICTURES_A_RUN = 6


def report_from(paths: Iterable[Path]) -> Table:
    """Build the table of every result under some files and folders.

    Raises:
        UserError: a path is missing, holds no result, or a result cannot be read (the message names the file).
    """
    return build_table([read_result(path) for path in find_results(paths)])


def write_report(table: Table, folder: Path) -> list[Path]:
    """Write report.md, .csv, .json and .html into a folder and return their paths."""
    folder = Path(folder)
    texts = {"report.md": to_markdown(table), "report.csv": to_csv(table), "report.html": to_html(table)}
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "report.json", to_json(table))
    return [folder / name for name in ("report.md", "report.csv", "report.json", "report.html")]


def print_table(table: Table, console: Console) -> None:
    """Print to a terminal; groups of columns that do not fit beside each other go under each other."""
    console.print()
    console.print(Text(table.caption, style="dim"))
    labels = _rich_labels(table)
    blocks: list[list[RichTable]] = []
    width = console.width
    used = width + 1
    for part in _rich_groups(table):
        needed = console.measure(part).maximum + 1
        if used + needed > width:
            blocks.append([])
            used = console.measure(labels).maximum + 1
        blocks[-1].append(part)
        used += needed
    for block in blocks:
        grid = RichTable.grid(padding=(0, 1, 0, 0))
        grid.add_row(labels, *block)
        console.print(grid)
    if table.notes:
        console.print(RichGroup(*(Text(note, style="dim") for note in table.notes)))


def _rich_labels(table: Table) -> RichTable:
    part = RichTable(box=None, title=" ", padding=(0, 1, 0, 0))
    part.add_column("model", no_wrap=True)
    for row in table.rows:
        text = row.label if row.kind == "measured" else f"  {row.label}"
        part.add_row(Text(text, style="bold" if row.kind == "measured" else "dim"))
    return part


def _rich_groups(table: Table) -> list[RichTable]:
    parts = []
    styles = {"published": "dim", "failed": "red", "missing": "yellow", "undefined": "dim", "blank": "", "measured": ""}
    for g, group in enumerate(table.groups):
        part = RichTable(
            box=None, title=group.title, title_style="bold", min_width=len(group.title) + 1, padding=(0, 1, 0, 0)
        )
        for column in group.columns:
            part.add_column(column.header, justify="right", no_wrap=True)
        for row in table.rows:
            cells = row.cells[g]
            part.add_row(*(Text(c.text, style="bold green" if c.best else styles[c.state]) for c in cells))
        parts.append(part)
    return parts


def _headers(table: Table) -> list[str]:
    return ["model"] + [f"{group.title}: {column.header}" for group in table.groups for column in group.columns]


def to_markdown(table: Table) -> str:
    """A table for a README: groups stand in the headers, the best of a column is bold, published rows are italic."""
    lines = [table.caption, "", "| " + " | ".join(_headers(table)) + " |"]
    lines.append("|---|" + "--:|" * (len(_headers(table)) - 1))
    for row in table.rows:
        cells = [cell for part in row.cells for cell in part]
        if row.kind == "published":
            texts = [f"*{row.label}*"] + [f"*{cell.text}*" if cell.text else "" for cell in cells]
        else:
            texts = [row.label] + [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """One header line, one line a row; the second column tells measured rows from published ones."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headers = _headers(table)
    writer.writerow([headers[0], "kind", *headers[1:]])
    for row in table.rows:
        label = label_of(row.model)
        writer.writerow([label, row.kind] + [cell.text for part in row.cells for cell in part])
    return out.getvalue()


def to_json(table: Table) -> dict[str, Any]:
    """The table as data: the printed text beside the number in the printed unit."""

    def cell(cell: Cell) -> dict[str, Any]:
        return {"text": cell.text, "value": cell.value, "state": cell.state, "best": cell.best, "run": cell.run}

    return {
        "schema": REPORT_SCHEMA,
        "caption": table.caption,
        "groups": [
            {
                "title": group.title,
                "task": group.task,
                "head": group.head,
                "data": group.data,
                "columns": [{"key": column.key, "header": column.header} for column in group.columns],
            }
            for group in table.groups
        ],
        "rows": [
            {"model": row.model, "kind": row.kind, "cells": [[cell(c) for c in part] for part in row.cells]}
            for row in table.rows
        ],
        "notes": table.notes,
    }


def to_html(table: Table) -> str:
    """One page that asks for nothing from outside: style, figure and pictures are inside it."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return templates.get_template("report.html.j2").render(
        table=table,
        figures=[Markup(figure) for figure in cost_quality_figures(table)],
        runs=[_run_for_page(result) for result in table.results],
    )


def _run_for_page(result: Result) -> dict[str, Any]:
    """What the page says about one run: a title, a few lists of names and values, pictures."""
    title = " · ".join(
        [label_of(result.model), result.task, *([HEADS.get(result.head, result.head)] if result.head else [])]
    )
    origin = result.provenance
    commit = origin.get("git_commit")
    facts = {
        "data": _sentence(
            result.data or {}, ("name", "split", "train_images", "val_images", "num_classes", "fingerprint")
        ),
        "metrics": _sentence({k: f"{v:.4f}" for k, v in result.metrics.items() if v is not None}),
        "cost": _sentence(result.cost),
        "protocol": _sentence(result.protocol),
        "training": _sentence({k: v for k, v in result.training.items() if not isinstance(v, list | dict)}),
        "device": _sentence(origin, ("device", "precision", "nodes", "processes")),
        "code": f"{commit[:12]}{' with changes' if origin.get('git_dirty') else ''}" if commit else "installed package",
        "versions": _sentence(origin.get("versions", {})),
        "configuration": _sentence(origin, ("config_hash", "seed")),
        "time": _sentence(origin, ("start", "duration_s")),
    }
    return {
        "title": title,
        "name": result.run,
        "failed": None if result.finished else result.reason,
        "facts": {name: text for name, text in facts.items() if text},
        "per_class": _per_class(result.details.get("per_class")),
        "pictures": _pictures(result),
    }


def _sentence(values: dict[str, Any], keys: Sequence[str] | None = None) -> str:
    names = keys or list(values)
    return ", ".join(
        f"{name.replace('_', ' ')} {_short(values[name])}" for name in names if values.get(name) is not None
    )


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return f"({_sentence(value)})"
    return str(value)


def _per_class(values: Any) -> dict[str, Any] | None:
    """``{class: {metric: fraction}}`` as a table of percent; at most 40 classes, the rest stays in result.json."""
    if not isinstance(values, dict) or not values or not all(isinstance(v, dict) for v in values.values()):
        return None
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    rows = [(label, [_percent_or_count(row.get(name)) for name in names]) for label, row in list(values.items())[:40]]
    return {"names": names, "rows": rows, "left_out": max(0, len(values) - 40)}


def _percent_or_count(value: Any) -> str:
    if isinstance(value, float):
        return f"{value * 100:.1f}" if value >= 0 else DASH
    return DASH if value is None else str(value)


def _pictures(result: Result) -> list[dict[str, Any]]:
    """The first pictures of a run's gallery, scaled down, as data URIs; wide ones show several views side by side."""
    pictures = []
    for name in result.gallery[:PICTURES_A_RUN]:
        path = (result.folder or Path()) / name
        if not path.is_file():
            continue
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            wide = small.width > 1.5 * small.height
            small.thumbnail((PICTURE_WIDTH if wide else PICTURE_WIDTH // 2, PICTURE_WIDTH))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=82)
        uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        pictures.append({"uri": uri, "wide": wide, "size": small.size})
    return pictures

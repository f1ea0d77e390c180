"""The table as files for people and programs: Markdown, CSV, JSON, LaTeX. The page is in `page.py`."""

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

from evmamba.launch.report.cells import Cell, Row, Table
from evmamba.launch.report.paper import label_of

REPORT_SCHEMA = 3
LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    # At the beginning of a line these would belong to the "\\" before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
}


# What Markdown takes for more than text; a name's underscores it leaves alone.
MARKDOWN = {"&": "&amp;", "<": "&lt;", "\\": "\\\\", "`": "\\`", "*": "\\*", "[": "\\["}
NUMBER = re.compile(r"[+-]?\d[\d.,]*")


def headers(table: Table) -> list[str]:
    """The columns' names, each with its group."""
    return ["model"] + [f"{group.title}: {column.header}" for group in table.groups for column in group.columns]


def cells_of(row: Row) -> list[Cell]:
    return [cell for part in row.cells for cell in part]


def to_markdown(table: Table) -> str:
    """Tables for a README: groups stand in the headers, what is better than all others of a column is bold, published
    rows are italic, with the difference of the measured number in brackets."""
    parts = [_markdown(table.caption), *_markdown_table(table)]
    if table.ablations:
        parts += ["", "**Ablations**", *_markdown_table(table.ablations)]
    return "\n".join(parts) + "\n"


def _markdown_table(table: Table) -> list[str]:
    lines = ["", _markdown_line(map(_markdown, headers(table)))]
    lines.append("|---|" + "--:|" * (len(headers(table)) - 1))
    for row in table.rows:
        cells = cells_of(row)
        label = _markdown(row.label)
        if row.kind == "published":
            texts = [f"*{label}*"] + [f"*{_markdown(cell.full_text)}*" if cell.text else "" for cell in cells]
        else:
            plain = [_markdown(cell.text) for cell in cells]
            texts = [label] + [f"**{text}**" if cell.best else text for text, cell in zip(plain, cells, strict=True)]
        lines.append(_markdown_line(texts))
    if table.notes:
        lines += ["", *(f"- {_markdown(note)}" for note in table.notes)]
    return lines


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _markdown(text: str) -> str:
    return "".join(MARKDOWN.get(character, character) for character in text)


def to_csv(table: Table) -> str:
    """One header line, one line a row; the second column tells measured rows from published ones and from their
    difference, measured - published. A name that a spreadsheet would take for a formula has an apostrophe before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    first, *others = headers(table)
    writer.writerow(map(_csv, [first, "kind", *others]))
    for row in table.rows:
        label, cells = label_of(row.model), cells_of(row)
        writer.writerow(map(_csv, [label, row.kind, *(cell.text for cell in cells)]))
        if any(cell.difference for cell in cells):
            differences = ((cell.difference or "").replace("\N{MINUS SIGN}", "-") for cell in cells)
            writer.writerow(map(_csv, [label, "difference", *differences]))
    return out.getvalue()


def _csv(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not NUMBER.fullmatch(text) else text


def to_json(table: Table) -> dict[str, Any]:
    """The table as data: the printed text beside the number in the printed unit, half of its 95 % interval (over seeds,
    of a single one over the test images), its seeds and its runs."""

    def cell(cell: Cell) -> dict[str, Any]:
        return {
            "text": cell.text,
            "value": cell.value,
            "half_width": cell.half_width,
            "values": cell.values,
            "count": cell.count,
            "state": cell.state,
            "best": cell.best,
            "tied": cell.tied,
            "like": cell.like,
            "apart": cell.apart,
            "difference": cell.difference,
            "runs": cell.runs,
            "source": cell.source,
        }

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
        "ablations": to_json(table.ablations) if table.ablations else None,
    }


def to_latex(table: Table) -> str:
    """A table for a paper (packages booktabs and graphicx); published rows are in italics, what is better than all
    others is bold."""
    groups = [[column.header for column in group.columns] for group in table.groups]
    spans, rules, start = [], [], 2
    for group, names in zip(table.groups, groups, strict=True):
        spans.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_latex(group.title)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(names) - 1}}}")
        start += len(names)
    lines = [
        f"% {' '.join(table.caption.split())}",
        *(f"% {' '.join(note.split())}" for note in table.notes),
        r"\resizebox{\linewidth}{!}{%",
        r"\begin{tabular}{l" + "".join(" " + "r" * len(names) for names in groups) + "}",
        r"\toprule",
        _latex_line(["", *spans]),
        " ".join(rules),
        _latex_line(["model", *(_latex(name) for names in groups for name in names)]),
        r"\midrule",
    ]
    for row in table.rows:
        published = row.kind == "published"
        texts = [r"\quad\textit{published}" if published else _latex(row.label)]
        for cell in cells_of(row):
            text = _latex(cell.full_text)
            style = r"\textit" if published else r"\textbf" if cell.best else ""
            texts.append(f"{style}{{{text}}}" if style and text else text)
        lines.append(_latex_line(texts))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", "}"]) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)

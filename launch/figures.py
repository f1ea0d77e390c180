"""The cost/quality figures of the report: one a task, models over their multiply-adds, as inline SVG.

Colours are written as CSS variables, so the picture follows the page into the dark; text stays text.
"""

import io
import re
from typing import Any

from evmamba.launch.table import Group, Table, label_of, published

# Placeholders that matplotlib can parse; each becomes a CSS variable of the page.
INK = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--accent)", "#040404": "var(--line)"}
SIZE = (4.2, 3.3)  # inches, of one panel


def cost_quality_figures(table: Table) -> list[str]:
    """One SVG a task: its first metric over the backbone's MACs; none for a task without a measured point.

    Measured models are filled points; the paper's numbers are hollow, and there only where they are on the same data.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": "#010101",
        "axes.labelcolor": "#020202",
        "axes.edgecolor": "#040404",
        "xtick.color": "#020202",
        "ytick.color": "#020202",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    pictures = []
    for group in table.groups:
        points = _measured(table, group) if group.task != "cost" else []
        if not points:
            continue
        # The salt keeps the ids inside one page's pictures apart and the same from run to run.
        with matplotlib.rc_context(style | {"svg.hashsalt": group.title}):
            figure = Figure(figsize=SIZE, layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            _panel(axes, group, points)
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor="#020202")
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pictures.append(_inline(out.getvalue(), f"{group.columns[0].header} over multiply-adds, {group.title}"))
    return pictures


def _panel(axes: Any, group: Group, points: list[tuple[str, float, float]]) -> None:
    reference = _published(group) if group.comparable else []
    if reference:
        x, y = [x for _, x, _ in reference], [y for _, _, y in reference]
        name = published()["data"][group.task]["name"]
        axes.plot(x, y, "--", color="#040404", linewidth=1, zorder=1)
        axes.scatter(x, y, s=34, facecolors="none", edgecolors="#020202", label=f"published, on {name}", zorder=2)
    x, y = [x for _, x, _ in points], [y for _, _, y in points]
    data = (group.data or {}).get("name")
    axes.scatter(x, y, s=46, color="#030303", label=f"measured, on {data}" if data else "measured", zorder=3)
    short = [(label.removeprefix("EfficientVMamba-"), macs, quality) for label, macs, quality in reference]
    for name, macs, quality in [*points, *short]:
        color = "#010101" if (name, macs, quality) in points else "#020202"
        axes.annotate(name, (macs, quality), xytext=(6, 5), textcoords="offset points", color=color, fontsize=8)
    axes.set_title(group.title, fontsize=10, loc="left")
    axes.set_xlabel("multiply-adds of the backbone at 224 x 224 (G)")
    axes.set_ylabel(group.columns[0].header)
    axes.grid(color="#040404", linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.2, y=0.15)  # room for the names
    axes.set_xlim(left=0)


def _macs(table: Table) -> dict[str, float]:
    found: dict[str, float] = {}
    for g, group in enumerate(table.groups):
        if group.task != "cost":
            continue
        for row in table.rows:
            for column, cell in zip(group.columns, row.cells[g], strict=True):
                if row.kind == "measured" and column.key == "macs" and cell.value is not None:
                    found.setdefault(row.model, cell.value)
    return found


def _measured(table: Table, group: Group) -> list[tuple[str, float, float]]:
    g = table.groups.index(group)
    macs = _macs(table)
    rows = [row for row in table.rows if row.kind == "measured" and row.model in macs]
    cells = [(row.label, macs[row.model], row.cells[g][0].value) for row in rows]
    return [(label, x, y) for label, x, y in cells if y is not None]


def _published(group: Group) -> list[tuple[str, float, float]]:
    key = group.columns[0].key
    points = []
    for name, paper in published()["models"].items():
        y = paper.get(group.task, {}).get(group.head, {}).get(key)
        if y is not None and "macs" in paper["cost"]:
            points.append((label_of(name), float(paper["cost"]["macs"]), float(y)))
    return points


def _inline(svg: str, label: str) -> str:
    """Make an SVG file part of a page: no prolog, no metadata, no fixed size, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img" aria-label="' + label + '"', svg, count=1)
    for placeholder, variable in INK.items():
        svg = svg.replace(placeholder, variable)
    return svg

"""The report's figures through matplotlib, as inline SVG: quality over cost, curves, confusion matrices.

Colours are written as CSS variables, so the pictures follow the page into the dark; text stays text.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evmamba.launch.report.cells import Group, Table
from evmamba.launch.report.curves import Curve
from evmamba.launch.report.paper import OURS, label_of, paper, published, split_tags

# Placeholders that matplotlib can parse; each becomes a CSS variable of the page.
INK, MUTED, ACCENT, LINE = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0{n:x}00ff" for n in range(1, 11))
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", ACCENT: "var(--accent)", LINE: "var(--line)"} | {
    color: f"var(--s{n})" for n, color in enumerate(SERIES, 1)
}
MARKERS = "os^Dv"
LONGEST = 26  # characters of a name
WIDE = 10  # costs that differ by more have a logarithmic axis
SIZE = (4.2, 3.4)  # inches
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COSTS = {"macs": "multiply-adds of the backbone at 224 x 224 (G)", "latency_ms_median": "latency of one image (ms)"}
SEQUENTIAL = (0.05, 0.52, 0.52)  # of the confusion matrix; its opacity is the share, so it suits any background


@dataclass(frozen=True)
class Point:
    """A model in a plane of cost and quality; `half_width` is half of the quality's 95 % interval."""

    label: str
    x: float
    y: float
    half_width: float | None = None
    ours: bool = False


def cost_quality_figures(table: Table) -> list[str]:
    """For each task, its first metric over the backbone's MACs and over its latency, where both were measured.

    EfficientVMamba stands out among the measured points; a line joins those that no other beats in both; the paper's
    numbers are hollow, and there only where they are on the same data.
    """
    pictures = []
    for group in table.groups:
        if group.task == "cost":
            continue
        for key, name in COSTS.items():
            costs, where = _costs(table, key)
            points = _measured(table, group, costs)
            if not points:
                continue
            name = f"{name}, {where}" if where else name
            reference = _published(group) if group.comparable and key == "macs" else []
            label = f"{group.columns[0].header} over {name}, {group.title}"
            pictures.append(
                _svg(label, lambda axes, g=group, p=points, r=reference, n=name: _plane(axes, g, p, r, n))  # type: ignore[misc]
            )
    return pictures


def curve_figure(
    title: str, x_label: str, y_label: str, curves: Sequence[Curve], log: bool = False, zero: bool = False
) -> str:
    """Lines of several models; those with equal labels share a colour.

    Args:
        log: both axes logarithmic, with ticks at the points.
        zero: the y axis begins at 0.
    """

    def draw(axes: Any) -> None:
        labels = list(dict.fromkeys(curve.label for curve in curves))
        for curve in curves:
            n = labels.index(curve.label)
            axes.plot(
                [x for x, _ in curve.points],
                [y for _, y in curve.points],
                color=SERIES[n % len(SERIES)],
                linewidth=1.4,
                marker=MARKERS[n // len(SERIES) % len(MARKERS)] if len(curve.points) <= 20 else None,
                markersize=3.5,
                label=_legend(curve.label) if curve is next(c for c in curves if c.label == curve.label) else None,
            )
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = sorted({x for curve in curves for x, _ in curve.points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=45 if len(ticks) > 6 else 0)
            axes.minorticks_off()
        elif zero:
            axes.set_ylim(bottom=0)
        _describe(axes, title, x_label, y_label)
        axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=MUTED)

    return _svg(f"{y_label} over {x_label}, {title}", draw)


def confusion_figure(title: str, where: str, shares: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """Rows are true classes, columns predicted ones; the opacity is the share of the row."""

    def draw(axes: Any) -> None:
        axes.imshow([[(*SEQUENTIAL, share) for share in row] for row in shares], interpolation="nearest")
        size = 8 if len(names) <= 15 else 6
        shown = [_plain(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), shown, fontsize=size)
        if len(names) <= 12:
            for r, row in enumerate(shares):
                for c, share in enumerate(row):
                    if share >= 0.005:
                        axes.text(c, r, f"{share * 100:.0f}", ha="center", va="center", fontsize=7, color=INK)
        axes.set_title(_plain(title), fontsize=10, loc="left")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")

    return _svg(f"confusion matrix, {title}, {where}", draw)


def _svg(label: str, draw: Callable[[Any], None]) -> str:
    """One picture with one pair of axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt keeps the ids inside one page's pictures apart and the same from run to run.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), label)


def _plane(axes: Any, group: Group, points: list[Point], reference: list[Point], x_label: str) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    if reference:
        name = paper()["data"][group.task]["name"]
        xs, ys = [p.x for p in reference], [p.y for p in reference]
        axes.scatter(xs, ys, s=34, facecolors="none", edgecolors=MUTED, label=f"published, on {name}", zorder=2)
    front = _front(points)
    if len(front) > 1:
        xs, ys = [p.x for p in front], [p.y for p in front]
        axes.plot(xs, ys, "--", color=MUTED, linewidth=1, zorder=1, label="unbeaten means")
    for ours, color, name in ((True, ACCENT, "EfficientVMamba"), (False, INK, "others")):
        chosen = [p for p in points if p.ours == ours]
        if chosen:
            xs, ys, reach = [p.x for p in chosen], [p.y for p in chosen], [p.half_width or 0.0 for p in chosen]
            axes.errorbar(xs, ys, reach, fmt="o", color=color, markersize=6, elinewidth=1, label=name, zorder=3)
    _describe(axes, group.title, x_label, group.columns[0].header)
    axes.margins(y=0.15)
    low, high = (f(p.x for p in [*points, *reference]) for f in (min, max))
    if low > 0 and high > WIDE * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.4, 1.8 * high)  # room for the names
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.2 * high)
    axes.figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8, labelcolor=MUTED)
    axes.figure.draw_without_rendering()  # the layout decides where the names have room
    # Ours and the best get their names first: where there is no room, a name is left out.
    order = sorted(points, key=lambda p: (not p.ours, p not in front, -p.y))
    _name_points(axes, [(p, INK) for p in order] + [(p, MUTED) for p in reference])


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in cost and quality, by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _name_points(axes: Any, points: Sequence[tuple[Point, str]]) -> None:
    """Write names beside their points, each on the first side where it hides no other name and no point; one that would
    hide some on every side is left out."""
    taken = [axes.transData.transform((p.x, p.y)) for p, _ in points]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in taken]
    frame = axes.get_window_extent()
    sides = [((6, 4), "left"), ((-6, 4), "right"), ((6, -11), "left"), ((-6, -11), "right"), ((0, 9), "center")]
    for point, color in points:
        for offset, align in sides:
            note = axes.annotate(
                point.label, (point.x, point.y), offset, textcoords="offset points", ha=align, fontsize=8, color=color
            )
            box = note.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20
            if inside and not any(
                box.x0 < right and left < box.x1 and box.y0 < top and bottom < box.y1
                for left, bottom, right, top in boxes
            ):
                boxes.append((box.x0, box.y0, box.x1, box.y1))
                break
            note.remove()


def _describe(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(_plain(title), fontsize=10, loc="left")
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(y_label)
    axes.grid(color=LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)


def _costs(table: Table, key: str) -> tuple[dict[str, float], str]:
    """Model -> what the bare networks cost, and where it was measured, if that was in several places: times of two
    devices are never mixed, the one with most models counts. Multiply-adds are the same everywhere."""
    found: list[tuple[dict[str, float], str]] = []
    for g, group in enumerate(table.groups):
        keys = [column.key for column in group.columns]
        if group.task == "cost" and group.head is None and key in keys:
            cells = {row.model: row.cells[g][keys.index(key)].value for row in table.rows if row.kind == "measured"}
            costs = {model: value for model, value in cells.items() if value is not None}
            found.append((costs, group.title.partition(" · ")[2]))
    if key == "macs":
        return {model: value for costs, _ in reversed(found) for model, value in costs.items()}, ""
    return max(found, key=lambda one: len(one[0]), default=({}, ""))


def _measured(table: Table, group: Group, costs: Mapping[str, float]) -> list[Point]:
    g = table.groups.index(group)
    points = []
    for row in table.rows:
        cell = row.cells[g][0]
        if row.kind == "measured" and row.model in costs and cell.value is not None:
            ours = split_tags(row.model)[0] in OURS
            points.append(Point(_short(row.label), costs[row.model], cell.value, cell.half_width, ours))
    return points


def _short(label: str) -> str:
    return _legend(label).removeprefix("EfficientVMamba-")


def _legend(label: str) -> str:
    """A name that fits twice beside each other: timm's names go on about patches and sizes."""
    label = label.split("_patch")[0]
    short = label if len(label) <= LONGEST else label[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return _plain(f" {short}" if short.startswith("_") else short)  # matplotlib hides the others


def _plain(text: str) -> str:
    """A name that matplotlib takes for nothing else: between dollars it would see a formula."""
    return text.replace("$", r"\$")


def _published(group: Group) -> list[Point]:
    if group.schedules and group.schedule is None:
        return []  # of the paper's two schedules neither
    key = group.columns[0].key
    points = []
    for model in paper()["labels"]:
        numbers: list[Mapping[str, float]] = [
            row.numbers
            for row in (published(model, "cost", None), published(model, group.task, group.head, group.schedule))
            if row
        ]
        if len(numbers) == 2 and key in numbers[1]:
            points.append(Point(_short(label_of(model)), float(numbers[0]["macs"]), float(numbers[1][key])))
    return points


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The power b of y ~ x^b by least squares in the logarithms; None for fewer than two points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    x_mean = sum(x for x, _ in logs) / len(logs)
    y_mean = sum(y for _, y in logs) / len(logs)
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


def _inline(svg: str, label: str) -> str:
    """Make an SVG file part of a page: no prolog, no metadata, no fixed size, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda m: f'{m[1]} role="img" aria-label="{label}"', svg, count=1)
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg

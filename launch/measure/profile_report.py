"""A profile as a terminal table, Markdown, JSON and a plot; what is the same in all rows stands above the table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evmamba.files import write_text
from evmamba.launch.measure.profile_parts import Share
from evmamba.launch.measure.profiling import Row
from evmamba.launch.store.results import write_json

SCHEMA = 1
DASH = "\N{EN DASH}"
AXES: dict[str, Callable[[Row], str]] = {
    "phase": lambda row: row.case.phase,
    "size": lambda row: f"{row.case.height}x{row.case.width}",
    "batch": lambda row: str(row.case.batch_size),
    "mode": lambda row: row.case.mode,
    "precision": lambda row: row.case.precision,
    "layout": lambda row: row.case.layout.replace("_", " "),
}
NUMBERS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: _number(row.latency_ms),
    "p95 ms": lambda row: _number(row.latency_p95_ms),
    "images/s": lambda row: _number(row.images_per_s),
    "MB": lambda row: _number(row.memory_mb),
    "x first": lambda row: "" if row.ratio is None else f"{row.ratio:.2f}",
    "J/image": lambda row: _number(row.joule_per_image),
}


def _number(value: float | None) -> str:
    # Three digits: a machine does not repeat more.
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def headers(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The axes that vary, and the numbers of which there is any."""
    axes = [name for name, show in AXES.items() if len({show(row) for row in rows}) > 1]
    numbers = [name for name, show in NUMBERS.items() if any(show(row) for row in rows)]
    return axes, numbers or ["ms"]


def caption(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """What all rows share, and where they were measured."""
    varying, _ = headers(rows)
    same = [f"{name} {show(rows[0])}" for name, show in AXES.items() if name not in varying]
    load = f", load {about['load_before']:.1f} before" if about.get("load_before") is not None else ""
    where = f"{about['device']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''}{load}"
    return "; ".join([*same, where, f"torch {about['versions'].get('torch')}"])


def print_profile(rows: Sequence[Row], shares: Sequence[Share], about: dict[str, Any], console: Console) -> None:
    """To a terminal; a row that was not measured says why."""
    axes, numbers = headers(rows)
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(", ".join(_described(name, row) for name in axes), []).append(row)
    table = RichTable(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for heading, members in cases.items():
        if heading:
            table.add_row(Text(heading, style="bold"))
        for row in members:
            table.add_row(f"  {row.backbone}", *(["", DASH] if row.reason else [NUMBERS[n](row) for n in numbers]))
    console.print(Text(caption(rows, about), style="dim"))
    console.print(table)
    for reason, who in _reasons(rows, axes).items():
        console.print(Text(f"{DASH} {reason}: {', '.join(who)}", style="red"))
    for kind in dict.fromkeys(share.kind for share in shares):
        part = RichTable(box=None, padding=(0, 2, 0, 0), title=f"inference time by {kind}", title_justify="left")
        for name, justify in (("backbone", "left"), (kind, "left"), ("ms", "right"), ("share", "right")):
            part.add_column(name, justify=justify)  # type: ignore[arg-type]
        for share in shares:
            if share.kind == kind:
                part.add_row(share.backbone, share.name, _number(share.ms), f"{100 * share.share:.0f} %")
        console.print(part)


def _reasons(rows: Sequence[Row], axes: Sequence[str]) -> dict[str, list[str]]:
    """Who was not measured, by reason; where it happened to all backbones, the place alone."""
    backbones = {row.backbone for row in rows}
    places: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.reason:
            place = ", ".join(_described(name, row) for name in axes)
            places.setdefault(row.reason, {}).setdefault(place, []).append(row.backbone)
    return {
        reason: [place if set(who) == backbones else f"{' and '.join(who)} at {place}" for place, who in where.items()]
        for reason, where in places.items()
    }


def _described(axis: str, row: Row) -> str:
    return f"batch {AXES[axis](row)}" if axis == "batch" else AXES[axis](row)


def to_markdown(rows: Sequence[Row], shares: Sequence[Share], about: dict[str, Any]) -> str:
    axes, numbers = headers(rows)
    names = [*axes, "backbone", *numbers]
    lines = ["# Profile", "", caption(rows, about), ""]
    lines += ["`" + about["command"] + "`", ""] if about.get("command") else []
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * (len(axes) + 1) + "--:|" * len(numbers)]
    for row in rows:
        cells = [AXES[name](row) for name in axes] + [row.backbone]
        # One cell holds the reason, the others stay empty.
        values = [NUMBERS[name](row) for name in numbers]
        cells += [row.reason.replace("|", "\\|"), *[""] * (len(numbers) - 1)] if row.reason else values
        lines.append("| " + " | ".join(cells) + " |")
    for kind in dict.fromkeys(share.kind for share in shares):
        lines += ["", f"| backbone | {kind} | ms | share |", "|---|---|--:|--:|"]
        lines += [
            f"| {share.backbone} | `{share.name}` | {_number(share.ms)} | {100 * share.share:.0f} % |"
            for share in shares
            if share.kind == kind
        ]
    return "\n".join(lines) + "\n"


def write_profile(rows: Sequence[Row], shares: Sequence[Share], about: dict[str, Any], folder: Path) -> list[Path]:
    """Write profile.json, profile.md and profile.png into a folder and return their paths."""
    document = {"schema": SCHEMA, "about": about, "rows": [row.flat() for row in rows]}
    if shares:
        document["shares"] = [share.flat() for share in shares]
    write_json(folder / "profile.json", document)
    write_text(folder / "profile.md", to_markdown(rows, shares, about))
    written = [folder / "profile.json", folder / "profile.md"]
    if any(row.reason is None for row in rows):
        plot(rows, folder / "profile.png")
        written.append(folder / "profile.png")
    return written


def plot(rows: Sequence[Row], path: Path) -> None:
    """Images per second, a panel for each phase: over the batch where that varies, else over the images' size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.reason is None]
    axes_names, _ = headers(rows)
    over = "batch" if "batch" in axes_names else "size"
    lines = [name for name in axes_names if name not in (over, "phase")]
    phases = list(dict.fromkeys(row.case.phase for row in measured))
    figure = Figure(figsize=(5.5 * len(phases) + 2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels: dict[str, None] = {}
    for i, phase in enumerate(phases):
        panel = figure.add_subplot(1, len(phases), i + 1)
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in measured:
            if row.case.phase == phase:
                x = float(row.case.batch_size) if over == "batch" else (row.case.height * row.case.width) ** 0.5
                label = " ".join([row.backbone, *(AXES[name](row) for name in lines)])
                curves.setdefault(label, []).append((x, row.images_per_s or 0.0))
        for label, points in curves.items():
            number = list(labels).index(label) if label in labels else len(labels)
            labels[label] = None
            panel.plot(*zip(*sorted(points), strict=True), "o-", color=f"C{number % 10}", label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("images a step" if over == "batch" else "side of the image (pixels)")
        panel.set_ylabel("images/s")
        panel.set_title(phase)
        panel.grid(alpha=0.3)
        if i == len(phases) - 1:
            panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)

"""Build the report of any result files: print its table in a terminal, write it in every format."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.console import Group as RichGroup
from rich.table import Table as RichTable
from rich.text import Text

from evmamba.files import write_text
from evmamba.launch.report.cells import Table
from evmamba.launch.report.formats import to_csv, to_json, to_latex, to_markdown
from evmamba.launch.report.page import to_html
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import find_results, read_result, write_json

STYLES = {
    "published": "dim",
    "elsewhere": "dim",
    "failed": "red",
    "missing": "yellow",
    "undefined": "dim",
    "blank": "",
    "measured": "",
}


def report_from(paths: Iterable[Path]) -> Table:
    """Build the table of every result under some files and folders.

    Raises:
        UserError: a path is missing, holds no result, or a result cannot be read (the message names the file).
    """
    return build_table([read_result(path) for path in find_results(paths)])


def write_report(table: Table, folder: Path) -> list[Path]:
    """Write report.md, .csv, .json, .tex and .html into a folder, the ablations as .csv and .tex of their own, and
    return the paths."""
    folder = Path(folder)
    texts = {"report.md": to_markdown(table), "report.csv": to_csv(table), "report.tex": to_latex(table)}
    if table.ablations:
        texts |= {"ablations.csv": to_csv(table.ablations), "ablations.tex": to_latex(table.ablations)}
    texts["report.html"] = to_html(table)
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "report.json", to_json(table))
    return [folder / name for name in (*texts, "report.json")]


def show_report(table: Table, folder: Path, console: Console) -> None:
    """Write the report into a folder, print the table, and say where the files are."""
    written = write_report(table, folder)  # first: a terminal's reader may go away
    print_table(table, console)
    console.print("\n" + "  ".join(map(str, written)), style="dim", markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """Print to a terminal; groups of columns that do not fit beside each other go under each other."""
    console.print()
    console.print(Text(table.caption, style="dim"))
    _print_one(table, console)
    if table.ablations:
        console.print(Text("\nAblations", style="bold"))
        _print_one(table.ablations, console)


def _print_one(table: Table, console: Console) -> None:
    labels = _rich_labels(table)
    blocks: list[list[RichTable]] = []
    width = console.width
    label_width = console.measure(labels).maximum + 1
    used = width + 1
    for part in _rich_parts(table, console, width - label_width - 1):
        needed = console.measure(part).maximum + 1
        if used + needed > width:
            blocks.append([])
            used = label_width
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


def _rich_parts(table: Table, console: Console, width: int) -> list[RichTable]:
    """Each group's columns, those of a group that is too wide in several parts."""
    parts = []
    for g, group in enumerate(table.groups):
        waiting = list(range(len(group.columns)))
        while waiting:
            count = len(waiting)
            while console.measure(part := _rich_part(table, g, waiting[:count])).maximum > width and count > 1:
                count -= 1
            parts.append(part)
            waiting = waiting[count:]
    return parts


def _rich_part(table: Table, g: int, columns: list[int]) -> RichTable:
    group = table.groups[g]
    part = RichTable(
        box=None, title=Text(group.title), title_style="bold", min_width=len(group.title) + 1, padding=(0, 1, 0, 0)
    )
    for c in columns:
        part.add_column(group.columns[c].header, justify="right", no_wrap=True)
    for row in table.rows:
        cells = [row.cells[g][c] for c in columns]
        part.add_row(*(Text(c.full_text, style="bold green" if c.best else STYLES[c.state]) for c in cells))
    return part

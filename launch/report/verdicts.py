"""What of a table is called better, and what is said about it below."""

from collections.abc import Mapping, Sequence

from evmamba.launch.report import over_images
from evmamba.launch.report.cells import Cell, Group, Row
from evmamba.launch.report.columns import Column
from evmamba.launch.report.paper import OURS
from evmamba.launch.report.significance import ENOUGH, RULE, differences
from evmamba.launch.report.turns import drift, first_of
from evmamba.launch.store.results import COST
from evmamba.tasks.per_image import PerImage


def mark_best(rows: list[Row], groups: list[Group], images: Sequence[Mapping[str, PerImage]]) -> None:
    """Mark what is better than all others of its column, and who cannot be told from whom.

    Args:
        rows, groups: of the table; cells are changed.
        images: for each group the networks by label of which a single run counts, with what it kept of its images.
    """
    for g, group in enumerate(groups):
        for c, column in enumerate(group.columns):
            cells = {
                row.label: row.cells[g][c]
                for row in rows
                if row.kind == "measured" and row.cells[g][c].value is not None
            }
            if len({cell.value for cell in cells.values()}) < 2:
                continue
            top = (max if column.better == "max" else min)(cells, key=lambda label: cells[label].value or 0.0)
            if group.task == COST:
                _mark_cost(list(cells.values()), cells[top], column)
                continue
            told = differences({label: cell.values for label, cell in cells.items()})
            for label, cell in cells.items():
                cell.like = [other for other in cells if (d := told.get((label, other))) and not d.real]
            apart = over_images.differences(images[g], column.key)
            for label, cell in cells.items():
                cell.apart = [other for other in cells if (d := apart.get((label, other))) and d.real]
            others = [told.get((top, other)) for other in cells if other != top]
            cells[top].best = all(difference is not None and difference.real for difference in others)
            for label in cells[top].like:
                cells[label].tied = cells[top].tied = True


def _mark_cost(cells: list[Cell], top: Cell, column: Column) -> None:
    """What is exact is compared as it is; what is timed only where all had their turns together."""
    if all(cell.exact for cell in cells):
        for cell in cells:
            cell.best = cell.value == top.value
    elif len({(cell.turns, len(cell.rounds)) for cell in cells}) == 1 and cells[0].rounds:
        first = first_of([cell.rounds for cell in cells], column.better)
        if first is not None:
            cells[first].best = True


def verdict_notes(rows: list[Row], groups: list[Group], images: Sequence[Mapping[str, PerImage]]) -> list[str]:
    """Who cannot be told from the highest mean of a group's first metric, and from our own networks, and of whom
    nothing is said for want of seeds; what the test images tell of single runs; the rules behind it. Arguments as of
    `mark_best`."""
    notes = []
    repeated = single = False
    for g, group in enumerate(groups):
        if group.task == COST:
            notes += _cost_notes(rows, group, g)
            continue
        entries = [(row, row.cells[g][0]) for row in rows if row.kind == "measured"]
        repeated |= any(cell.count > 1 for _, cell in entries)
        tied = [cell for _, cell in entries if cell.tied]
        top = max(tied, key=lambda cell: cell.value or 0.0, default=None)
        said: set[str] = set()
        for row, cell in sorted(entries, key=lambda entry: entry[1] is not top):
            if (cell is top or row.model in OURS) and (like := [label for label in cell.like if label not in said]):
                of = f"{row.label}, the highest mean" if cell is top else row.label
                notes.append(f"{group.title}: not told apart from {of}: {', '.join(like)}")
                said.add(row.label)
        few = [row.label for row, cell in entries if 0 < cell.count < ENOUGH]
        if sum(cell.count > 0 for _, cell in entries) > 1 and few:
            notes.append(f"{group.title}: no verdict below {ENOUGH} seeds: {', '.join(few)}")
        alone = {row.label: (row, cell) for row, cell in entries if row.label in images[g] and cell.half_width}
        single |= bool(alone)
        if len(alone) > 1:
            sign = 1 if group.columns[0].better == "max" else -1
            best = max(alone, key=lambda label: sign * (alone[label][1].value or 0.0))
            number = len(images[g][best].images)
            for label, (row, cell) in alone.items():
                if label == best or row.model in OURS:
                    others = ", ".join(cell.apart) or "none of the others"
                    notes.append(f"{group.title}, these weights on {number} test images: {label} differs from {others}")
    rules = [RULE] if repeated else []
    return [*rules, *([over_images.RULE] if single else []), *notes]


def _cost_notes(rows: list[Row], group: Group, g: int) -> list[str]:
    """How far timed numbers drifted, or that their networks had no turns together."""
    timed = {
        row.label: [cell for cell in row.cells[g] if cell.value is not None and not cell.exact]
        for row in rows
        if row.kind == "measured"
    }
    cells = [cell for own in timed.values() for cell in own]
    if sum(bool(own) for own in timed.values()) < 2:
        return []
    if len({cell.turns for cell in cells}) > 1 or cells[0].turns is None:
        return [f"{group.title}: not all networks were timed in turns with each other, so no time is marked"]
    drifts = [drift(cell.rounds) for cell in cells if cell.rounds]
    if not drifts:
        return []
    return [
        f"{group.title}: timed in turns; a number drifted over the rounds by ±{100 * max(drifts):.0f}% at most, and "
        "what lies within its drift is not marked"
    ]

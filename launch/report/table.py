"""The one table: from any set of results to groups, rows and cells that every format of the report prints alike.

A cell is text that is already rounded, beside the number it came from, so terminal, Markdown, CSV, JSON, LaTeX and HTML
cannot disagree. Published numbers (paper.yaml) stand in rows of their own and are never mixed with measured ones.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from evmamba.launch.report import over_images
from evmamba.launch.report.cells import Cell, Group, Row, State, Table
from evmamba.launch.report.columns import Column, columns_of, exported_columns, head_of, title_of
from evmamba.launch.report.equal_time import at_equal_time
from evmamba.launch.report.notes import Notes, budgets, caption, commits, memory, other_trainings, sizes
from evmamba.launch.report.paper import claims, comparable, label_of, paper, published, split_tags
from evmamba.launch.report.seeds import Estimate, Repetitions, repetitions
from evmamba.launch.report.trials import best_trials, is_trial, trial_notes
from evmamba.launch.report.turns import COUNTED
from evmamba.launch.report.verdicts import mark_best, verdict_notes
from evmamba.launch.store.precision import in_words
from evmamba.launch.store.result_schema import Turns
from evmamba.launch.store.results import COST, Result
from evmamba.tasks import TASKS
from evmamba.tasks.per_image import PerImage

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
OTHER_DATA = "other data"
OTHER_SCHEDULE = "other schedule"
# The table shows models at this size; what else was measured is in the curves.
CLASSIFIER_SIZE = [3, 224, 224]

# Columns whose header says the batch they were measured with.
BATCHES = {"images_per_s": "batch_size", "train_images_per_s": "train_batch_size"}


def build_table(results: Iterable[Result], models: Sequence[str] | None = None) -> Table:
    """Put results into the one table.

    Args:
        results: any number of runs, finished or failed. Runs that differ in the seed alone are one cell; of several
            runs of the same thing and seed the newest one counts. Ablated networks get a table of their own, beside
            the network they come from, where that was run too.
        models: order of the rows; by default the models follow their number of parameters.
    """
    results = _without_evaluated(list(results))
    # Nor have trials, beside what they chose.
    trials = [result for result in results if is_trial(result)]
    results = _named_apart([r for r in results if not is_trial(r)] or best_trials(trials))
    whole = [result for result in results if not split_tags(result.model)[1]]
    ablated = {split_tags(result.model)[0] for result in results if split_tags(result.model)[1]}
    plain = [model for model in models if not split_tags(model)[1]] if models and whole else models
    table = _table(whole or results, plain, trials)
    if whole and ablated:
        kinds = {(r.task, r.head) for r in results if split_tags(r.model)[1]}
        table.ablations = _table(
            [r for r in results if split_tags(r.model)[0] in ablated and (r.task, r.head) in kinds],
            [model for model in models if split_tags(model)[0] in ablated] if models else None,
            trials,
        )
    return table


def _without_evaluated(results: list[Result]) -> list[Result]:
    """Results without trainings that another run evaluates, which has their numbers."""
    evaluated = {(r.task, r.head, r.provenance.get("init_from")) for r in results if r.finished}
    return [
        r
        for r in results
        if not r.finished or ((r.task, r.head, r.run) not in evaluated and r.protocol.get("stage") != "fit")
    ]


def _named_apart(results: list[Result]) -> list[Result]:
    """Results whose run has the name of another one (the same on another machine, say) bear their folder's name too."""
    counts = Counter(result.run for result in results)
    return [
        dataclasses.replace(result, run=f"{result.run} in {result.folder}")
        if result.folder and counts[result.run] > 1
        else result
        for result in results
    ]


def _table(results: list[Result], models: Sequence[str] | None, trials: Sequence[Result]) -> Table:
    groups = _groups(results)
    rows: list[Row] = []
    notes = Notes()
    used: list[Result] = []
    members: dict[tuple[str, ...], list[Result]] = {key: [] for key, _ in groups}
    images: list[dict[str, PerImage]] = [{} for _ in groups]
    older = 0
    for model in list(models) if models else _by_size(results):
        label = label_of(model)
        measured: list[list[Cell]] = []
        for g, (key, group) in enumerate(groups):
            same = [r for r in results if (r.model, r.task, r.head) == (model, group.task, group.head)]
            # A failed run may not know its data: it counts where nothing else does.
            own = [r for r in same if _group_key(r) == key] or [
                r
                for r in same
                if not r.finished and (group.task == COST or str(r.provenance.get("trials", 0)) == key[6])
            ]
            runs, left_out = repetitions(own)
            older += left_out
            single = over_images.kept(runs.finished[0]) if len(runs.finished) == 1 else None
            if single:
                images[g][label] = single
            measured.append(_measured_cells(runs, group, label, notes, single))
            used += [run for run in runs.all if run not in used]
            members[key] += runs.all
        rows.append(Row(model, label, "measured", measured))
        cells = [_published_cells(model, group, part) for (_, group), part in zip(groups, measured, strict=True)]
        if any(cell.state != "blank" for part in cells for cell in part):
            rows.append(Row(model, "published", "published", cells))

    plain_groups = [group for _, group in groups]
    mark_best(rows, plain_groups, images)
    lines = notes.lines() + verdict_notes(rows, plain_groups, images)
    for key, group in groups:
        lines += trial_notes(group.title, members[key], trials)
        lines += budgets(group.title, members[key])
        lines += commits(group.title, members[key])
        lines += sizes(group.title, members[key])
        lines += [f"{group.title}: {line}" for line in other_trainings(group.task, group.head, members[key])]
        if group.task != COST and (said := at_equal_time(members[key], group.columns[0])):
            lines.append(f"{group.title}: {said}")
    if elsewhere := [
        group.task
        for g, group in enumerate(plain_groups)
        if any(cell.text == OTHER_DATA for row in rows for cell in row.cells[g])
    ]:
        names = ", ".join(dict.fromkeys(paper()["data"][task]["name"] for task in elsewhere))
        lines.append(f"published metrics are on {names}, not on this table's data, and are left out")
    shown = {
        group.task
        for g, group in enumerate(plain_groups)
        for row in rows
        for c in row.cells[g]
        if c.state == "published"
    }
    lines += [
        f"{task}: the paper's recipes here differ from {differs['than']}: {differs['what']} ({differs['more']})"
        for task, differs in paper()["differs"].items()
        if task in shown
    ]
    lines += memory(used)
    if older:
        lines.append(f"{older} older run{'s' if older > 1 else ''} of the same things not shown")
    return Table(caption(used), plain_groups, rows, lines, used)


def _group_key(result: Result) -> tuple[str, ...]:
    if result.task == "cost":
        # Throughput and memory depend on the batch.
        where = tuple(str(result.provenance.get(key)) for key in ("device", "precision"))
        where += tuple(str(result.cost.get(key)) for key in ("batch_size", "train_batch_size"))
        where += (str(_cost_size(result)),)
    else:
        data = result.data or {}
        where = (str(data.get("name")), str(data.get("fingerprint")), str(_schedule(result)))
        where += (str(data.get("split", "val")), str(result.provenance.get("trials", 0)))
    return (result.task, result.head or "", *where)


def _cost_size(result: Result) -> list[int]:
    return list(result.protocol.get("input_size") or CLASSIFIER_SIZE)


def _schedule(result: Result) -> str | None:
    """The paper's name of the schedule, on the paper's data, where a head has several."""
    head = head_of(result.task, result.head)
    if head is None or not comparable(result.task, result.data or {}):
        return None
    return head.schedule_of(result.training.get("epochs"))


def _groups(results: list[Result]) -> list[tuple[tuple[str, ...], Group]]:
    """The groups in the table's order; a failed run opens one only where no finished run of its kind did."""
    members: dict[tuple[str, ...], list[Result]] = {}
    for result in sorted(results, key=lambda r: not r.finished):
        kind = (result.task, result.head or "")
        if not result.finished and any(key[:2] == kind for key in members):
            continue
        members.setdefault(_group_key(result), []).append(result)
    # The cost of whole detectors and segmentors comes last: what they reach matters more.
    heads = ["", *(head.key for task in TASKS.values() for head in task.heads)]
    tasks = [COST, *TASKS]
    keys = sorted(
        members,
        key=lambda k: (
            len(tasks) if k[0] == COST and k[1] else tasks.index(k[0]),
            heads.index(k[1]),
            k,
        ),
    )
    apart = {key: _apart(key, [other for other in keys if other[:2] == key[:2]]) for key in keys}
    return [(key, _group(members[key], apart[key])) for key in keys]


def _apart(key: tuple[str, ...], kind: Sequence[tuple[str, ...]]) -> list[str]:
    """What the title of a group has to say so that no other group of its kind has the same: the first parts of its key
    that do."""
    cost = key[0] == "cost"
    # See `_group_key`; the input's size and the schedule always stand in the title.
    shown = 6 if cost else 4
    order = (2, 3, 4, 5) if cost else (2, 3, 5, 6)
    chosen = [shown]
    for part in order:
        alone = len({tuple(other[c] for c in chosen) for other in kind}) == len(kind)
        if not alone and len({other[part] for other in kind}) > 1:
            chosen.append(part)
    words: dict[int, str] = {3: in_words(key[3]), 4: f"batch {key[4]}"} if cost else {3: f"data {key[3][:8]}"}
    if cost:
        words[5] = f"training batch {key[5]}"
    else:
        words[6] = "same recipe" if key[6] == "0" else f"own best of {key[6]} trials"
    return [words.get(part, key[part]) for part in chosen[1:]]


def _group(results: list[Result], apart: Sequence[str] = ()) -> Group:
    first = results[0]
    data = first.data or {}
    schedule = _schedule(first)
    title = title_of(first.task, first.head)
    if first.task == "cost":
        if (size := _cost_size(first)) != CLASSIFIER_SIZE:
            title += f" at {size[-1]} x {size[-2]}"
    elif schedule:
        title += f" · {schedule}"
    title = " · ".join([title, *apart, *(["best trial"] if is_trial(first) else [])])
    same_data = comparable(first.task, data)
    batches = {column: first.cost.get(key) for column, key in BATCHES.items()} if first.task == "cost" else {}
    columns = []
    for column in columns_of(first.task, first.head):
        if column.key == "elsewhere":
            shown = first.head is None and any(claims(result.model) for result in results)
        else:
            # Of whole detectors and segmentors often only the size is counted.
            optional = column.optional or (first.task == "cost" and first.head is not None)
            shown = not optional or same_data or any(column.key in _numbers(result) for result in results)
        if shown and (batch := batches.get(column.key)):
            column = dataclasses.replace(column, header=f"{column.header} (b{batch})")
        if shown:
            columns.append(column)
    exported = exported_columns(first.task, first.head)
    columns += [c for c in exported if any(c.key in (r.cost if c.cost else r.metrics) for r in results)]
    return Group(first.task, first.head, title, columns, first.data, same_data or first.task == "cost", schedule)


def _numbers(result: Result) -> dict[str, Any]:
    return result.cost if result.task == "cost" else result.metrics


def _measured_cells(runs: Repetitions, group: Group, label: str, notes: Notes, single: PerImage | None) -> list[Cell]:
    names = [run.run for run in runs.all]
    reasons: dict[str, list[str]] = {}
    for failed in runs.failed:
        reasons.setdefault(str(failed.reason), []).append(str(failed.provenance.get("seed")))
    for reason, seeds in reasons.items():
        which = f" (seed {', '.join(seeds)})" if len(names) > 1 else ""
        notes.failed.append(f"{label}, {group.title}{which}: failed: {reason}")
    if not runs.finished:
        state: State = "failed" if runs.failed else "missing"
        if state == "missing":
            notes.missing.setdefault(group.title, []).append(label)
        return [
            Cell("", "blank") if column.key == "elsewhere" else Cell(state if i == 0 else DASH, state, runs=names)
            for i, column in enumerate(group.columns)
        ]
    cells = []
    undefined = []
    for column in group.columns:
        number = runs.number(column.key, cost=column.cost or group.task == "cost")
        if column.key == "elsewhere":
            cells.append(Cell("", "blank"))
        elif number is None:
            cells.append(Cell(DASH, "undefined", runs=names))
            undefined.append(column)
        else:
            number = Estimate(tuple(value * column.scale for value in number.values))
            half_width = number.half_width
            if single is not None and (over := over_images.half_width(single, column.key)) is not None:
                half_width = over * column.scale
            text = _with_interval(number, half_width, column, counted=group.task == "cost")
            cell = Cell(text, "measured", number.mean, half_width, list(number.values), runs=names)
            if group.task == COST:
                _add_turns(cell, runs.finished[-1], column)
            cells.append(cell)
    if undefined:
        columns = ", ".join(column.header.split(" (")[0] for column in undefined)
        # A task leaves out what its data does not define, e.g. APs without small objects.
        unmeasured = group.task == "cost" or any(column.optional for column in undefined)
        why = "not measured" if unmeasured else "undefined on this data"
        notes.undefined.setdefault(f"{group.title}: {columns} {why}", []).append(label)
    return cells


def _add_turns(cell: Cell, result: Result, column: Column) -> None:
    """What tells whether a cost differs from another one by more than the machine's moods."""
    memory = column.key.endswith("memory_mb") and result.cost.get("peak_memory_kind") == "CUDA tensors"
    cell.exact = column.key in COUNTED or memory
    turns = result.provenance.get("turns") or Turns()
    if len(runs := turns.get("runs", [])) > 1:
        cell.turns = f"{runs[0]} {turns.get('start')}"
        rounds = [value * column.scale for value in (result.details.get("rounds") or {}).get(column.key, ())]
        cell.rounds = rounds if all(value > 0 for value in rounds) else []


def _with_interval(number: Estimate, half_width: float | None, column: Column, counted: bool) -> str:
    """A mean, half of its 95 % interval and the number of seeds. An interval too narrow to be printed is no zero."""
    text = column.show(number.mean)
    if half_width is None or (counted and not half_width):
        return text  # parameters and MACs are the same for every seed
    if half_width:
        shown = column.show(half_width)
        text += f" ± {shown}" if float(shown) else f" ± <{column.show(0.0)[:-1]}1"
    return f"{text} ({number.count})"


def _published_cells(model: str, group: Group, measured: Sequence[Cell]) -> list[Cell]:
    """The paper's numbers with the difference to the measured ones; where the paper's data is another, that is said in
    their place: side by side they would be taken for a comparison."""
    blank = [Cell("", "blank") for _ in group.columns]
    found = published(model, group.task, group.head, group.schedule)
    others = claims(model)
    if found and not group.comparable:
        name = paper()["data"][group.task]["name"]
        blank[0] = Cell(OTHER_DATA, "elsewhere", source=f"published on {name}: {found.source}")
        return blank
    if found and group.schedules and group.schedule is None:
        epochs = " or ".join(map(str, group.schedules.values()))
        source = f"{found.source}: after {epochs} epochs, which this run does not say it had"
        blank[0] = Cell(OTHER_SCHEDULE, "elsewhere", source=source)
        return blank
    cells = blank
    for c, column in enumerate(group.columns):
        number = found.numbers.get(column.key) if found else None
        if found and number is not None:
            own = measured[c].value
            cells[c] = Cell(str(number), "published", float(number), source=found.explanation)
            if own is not None:
                cells[c].difference = _signed(own - number, column)
        elif column.key == "elsewhere" and others:
            text = ", ".join(f"{claim.images_per_s} {claim.hardware}" for claim in others)
            batches = [f"batch {claim.batch_size}" if claim.batch_size else "batch not stated" for claim in others]
            sources = "; ".join(
                f"{claim.images_per_s} images/s on {claim.hardware}, {batch}: {claim.source}"
                for claim, batch in zip(others, batches, strict=True)
            )
            cells[c] = Cell(text, "elsewhere", source=sources)
    return cells


def _signed(difference: float, column: Column) -> str:
    text = column.show(abs(difference))
    sign = "" if float(text) == 0 else "+" if difference > 0 else MINUS
    return sign + text


def _by_size(results: list[Result]) -> list[str]:
    sizes: dict[str, float] = {}
    for result in results:
        size = result.cost.get("parameters", math.inf) if result.task == "cost" else math.inf
        sizes[result.model] = min(size, sizes.get(result.model, math.inf))
    return sorted(sizes, key=lambda model: (sizes[model], model))

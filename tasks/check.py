"""`evmamba data check`: everything that would stop a training, or spoil it, found before the job is submitted.

A task's own part is a `Check` (``tasks/<task>/check.py``); this module finds the task and has what the parts share.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evmamba.errors import UserError
from evmamba.processor import usable_cores
from evmamba.tasks import TASKS
from evmamba.tasks.data import TEST, Split
from evmamba.tasks.findings import Findings, count_of
from evmamba.tasks.inspection import Look, Place, look_at, look_at_all, workers
from evmamba.tasks.record import Task


class Looker:
    """Looks at files with several processes, and shows how far it is."""

    def __init__(self, pool: Executor | None, bar: Progress) -> None:
        self.pool = pool
        self.bar = bar

    def __call__(self, look: Any, items: Sequence[Any], what: str) -> list[Any]:
        row = self.bar.add_task(what, total=len(items))
        return look_at_all(self.pool, look, items, lambda count: self.bar.advance(row, count))


@dataclass(frozen=True)
class Check:
    """A task's part.

    Attributes:
        has_layout: whether a folder looks like this task's data.
        look: ``function(findings, looker, **options)`` looks at every file; the options are the record's.
    """

    has_layout: Callable[[Path], bool]
    look: Callable[..., None]


def check_data(
    root: Path, task: str | None, jobs: int | None, console: Console, options: Mapping[str, Any] = MappingProxyType({})
) -> Findings:
    """Look at every file of a data set.

    Args:
        root: the folder.
        task: which task it is for; None: the layout tells.
        jobs: processes; None: one a core.
        console: where the progress bar goes.
        options: of the task's own check.

    Raises:
        UserError: no such folder, a layout of no task or of several, an option of another task.
    """
    if not root.is_dir():
        raise UserError(f"data folder not found: {root}")
    record = TASKS[task] if task else recognise(root)
    for name in options.keys() - {option.name for option in record.check_options}:
        raise UserError(f"--{name.replace('_', '-')} says nothing about {record.name}, for which {root} is checked")
    check: Check = record.load("check")
    findings = Findings(root, record.name)
    began = time.monotonic()
    with _looking(jobs or usable_cores(), console) as looker:
        check.look(findings, looker, **options)
    findings.problems.sort(key=lambda problem: problem.level)
    findings.seconds = time.monotonic() - began
    return findings


def recognise(root: Path) -> Task:
    """Tell the task by the layout.

    Raises:
        UserError: a layout of no task or of several; says what is there.
    """
    tasks = [task for task in TASKS.values() if task.check and task.load("check").has_layout(root)]
    if len(tasks) > 1:
        names = " and ".join(task.name for task in tasks)
        raise UserError(f"{root} has the layouts of {names}; say which one with --task")
    if not tasks:
        inside = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        shown = f"it has {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else "it is empty"
        raise UserError(f"{root} has the layout of no task ({shown}); the layouts are in docs/data.md")
    return tasks[0]


@contextmanager
def _looking(jobs: int, console: Console) -> Iterator[Looker]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with workers(jobs) as pool, bar:
        yield Looker(pool, bar)


def count_classes(findings: Findings, counts: dict[Split, Counter[str]]) -> None:
    """Put the classes' counts into the findings."""
    names = list(dict.fromkeys(name for split in counts.values() for name in split))
    findings.per_class = {name: {split: counts[split][name] for split in counts} for name in names}
    for split in counts:
        findings.splits[split]["classes"] = len(counts[split])


def warn_unlearnt(findings: Findings, what: str) -> None:
    """Warn of classes that val or test has and train has not; `what` there is of them, e.g. "boxes"."""
    for split in findings.evaluated:
        unlearnt = [name for name, count in findings.per_class.items() if count.get(split) and not count["train"]]
        if unlearnt:
            findings.warn(f"{count_of(unlearnt, 'class')} with {what} in {split} and none in train", unlearnt)


def look_at_images(
    findings: Findings, looker: Looker, places: dict[Split, list[Place]]
) -> dict[Split, list[tuple[Place, Look]]]:
    """Decode all images; unreadable ones are errors, the same file in two splits is a warning."""
    looks: dict[Split, list[tuple[Place, Look]]] = {}
    for split in places:
        found: list[Look] = looker(look_at, places[split], f"{split} images")
        looks[split] = list(zip(places[split], found, strict=True))
        findings.images += len(found)
        good = [look for look in found if look.error is None]
        facts: dict[str, Any] = {"images": len(found)}
        if good:
            facts["short side"] = spread(min(look.width, look.height) for look in good)
            facts["MB"] = round(sum(look.size for look in found) / 1e6, 1)
        findings.splits[split] = facts | findings.splits[split]
        bad = [look.error for look in found if look.error]
        if bad:
            findings.error(f"{count_of(bad, 'image')} of {split} cannot be read", bad)
    pairs: tuple[tuple[Split, Split], ...] = (("val", "train"), (TEST, "train"), (TEST, "val"))
    for split, seen in pairs:
        known = {look.digest: place.name for place, look in looks.get(seen, ()) if look.error is None}
        both = [f"{place.name} is {known[look.digest]}" for place, look in looks.get(split, ()) if look.digest in known]
        if both:
            findings.warn(f"{count_of(both, 'image')} of {split} in {seen} too, byte for byte", both)
    return looks


def spread(values: Iterable[int]) -> str:
    """Least, median and most."""
    ordered = sorted(values)
    return " / ".join(str(value) for value in (ordered[0], statistics.median_low(ordered), ordered[-1]))

"""What `evmamba data check` found, for people and for programs."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evmamba.errors import printable
from evmamba.tasks.data import SPLITS, Split

Level = Literal["error", "warning"]
EXAMPLES = 5
SPREADS = ("images a class", "short side")


@dataclass
class Problem:
    """Something found: an error stops training, a warning is worth a look.

    Attributes:
        level: "error" or "warning".
        text: what, with a count.
        examples: the first few offenders.
    """

    level: Level
    text: str
    examples: list[str]


@dataclass
class Findings:
    """What a data set is, and what is wrong with it.

    Attributes:
        root: the folder.
        task: its name.
        layout: in a word or two.
        splits: facts about train, val and a labelled test split by name, for the table.
        per_class: class -> how often it is there (images, boxes, images that show it) in each split.
        problems: errors first.
        images: images looked at.
        seconds: how long that took.
    """

    root: Path
    task: str
    layout: str = ""
    splits: dict[Split, dict[str, Any]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0

    @property
    def evaluated(self) -> list[Split]:
        """The splits that nothing is trained on."""
        return [split for split in self.splits if split != "train"]

    @property
    def errors(self) -> int:
        return sum(problem.level == "error" for problem in self.problems)

    def error(self, text: str, offenders: Iterable[str] = ()) -> None:
        self._add("error", text, offenders)

    def warn(self, text: str, offenders: Iterable[str] = ()) -> None:
        self._add("warning", text, offenders)

    def _add(self, level: Level, text: str, offenders: Iterable[str]) -> None:
        examples = [printable(offender) for offender in itertools.islice(offenders, EXAMPLES)]
        self.problems.append(Problem(level, printable(text), examples))

    def as_json(self) -> dict[str, Any]:
        return {
            "root": printable(str(self.root)),
            "task": self.task,
            "layout": self.layout,
            "ready": not self.errors,
            "splits": self.splits,
            "per_class": self.per_class,
            "problems": [vars(problem) for problem in self.problems],
            "images": self.images,
            "seconds": round(self.seconds, 3),
        }


def count_of(things: Sequence[Any] | int, word: str) -> str:
    """'1 box', '3 boxes', '2 classes'."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith(('s', 'x')) else 's'}"


def print_findings(findings: Findings, console: Console) -> None:
    """The table, the problems, and a last line that says whether to submit."""
    console.print(
        printable(f"{findings.task}, {findings.layout}, in {findings.root}"), style="bold", markup=False, soft_wrap=True
    )
    table = Table(box=None)
    columns = list(dict.fromkeys(name for facts in findings.splits.values() for name in facts))
    table.add_column("")
    for name in columns:
        table.add_column(f"{name}\nmin / median / max" if name in SPREADS else name, justify="right", vertical="bottom")
    for split, facts in findings.splits.items():
        table.add_row(split, *(str(facts.get(name, "")) for name in columns))
    console.print(table)
    for problem in findings.problems:
        style = "bold red" if problem.level == "error" else "yellow"
        console.print(f"[{style}]{problem.level}[/]: {escape(problem.text)}", highlight=False, soft_wrap=True)
        short = all(len(example) <= 30 for example in problem.examples)
        for example in [", ".join(problem.examples)] if short and problem.examples else problem.examples:
            console.print(f"    {escape(example)}", style="dim", highlight=False, soft_wrap=True)
    seconds = findings.seconds
    speed = f"{findings.images} images in {seconds:.1f} s, {findings.images / max(seconds, 1e-9):.0f} a second"
    warnings = len(findings.problems) - findings.errors
    found = ", ".join(
        count_of(number, word) for number, word in ((findings.errors, "error"), (warnings, "warning")) if number
    )
    verdict = "[bold red]not ready[/]" if findings.errors else "[bold green]ready[/]"
    console.print(f"{verdict}: {found or 'nothing found'} ({speed})", highlight=False, soft_wrap=True)

"""The records of a table: groups of columns, rows and cells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evmamba.launch.report.columns import Column, head_of
from evmamba.launch.store.result_schema import Data
from evmamba.launch.store.results import COST, Result

State = Literal["measured", "published", "failed", "missing", "undefined", "blank", "elsewhere"]


@dataclass
class Group:
    """Columns that come from one kind of run: a cost, or one task with one head on one data set."""

    task: str
    head: str | None
    title: str
    columns: list[Column]
    data: Data | None = None
    comparable: bool = False
    """Whether the paper's numbers are on the same data: as many classes and validation images as its set has."""
    schedule: str | None = None
    """The paper's name of the training schedule, where it has several."""

    @property
    def schedules(self) -> Mapping[str, int]:
        """The paper's schedules of a training of this kind, where it has several."""
        head = None if self.task == COST else head_of(self.task, self.head)
        return head.schedules if head else {}


@dataclass
class Cell:
    """One number.

    Attributes:
        text: as printed.
        value: the mean over seeds in the printed unit.
        half_width: half of the 95 % interval of the mean over the seeds; of a single run that over the test images,
            None where it kept nothing of them.
        values: one a seed, in the printed unit.
        best: better than every other measured number of its column. Of what is trained that is a verdict
            (`significance`); what is counted or timed is compared as it is.
        tied: one of those that cannot be told apart from the highest mean of its column.
        like: names of all the models that cannot be told apart from this one, where enough seeds ran to try.
        apart: of a single run, names of the models with single runs too whose weights the test images tell from these.
        exact: counted, or memory of tensors: the same whenever it is measured.
        turns: of what is timed, in which turns with other networks; None: alone.
        rounds: the number in each of these turns, in the printed unit.
        difference: of a published number: measured - published, as printed.
        runs: names of the runs behind it.
        source: of what was not measured here: who says so.
    """

    text: str
    state: State
    value: float | None = None
    half_width: float | None = None
    values: list[float] = field(default_factory=list)
    best: bool = False
    tied: bool = False
    like: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    exact: bool = False
    turns: str | None = None
    rounds: list[float] = field(default_factory=list)
    difference: str | None = None
    runs: list[str] = field(default_factory=list)
    source: str | None = None

    @property
    def count(self) -> int:
        """How many seeds stand behind the number."""
        return len(self.values)

    @property
    def full_text(self) -> str:
        """With the difference, for people."""
        return f"{self.text} ({self.difference})" if self.difference else self.text


@dataclass
class Row:
    """One line: `cells` holds one list a group, one cell a column."""

    model: str
    label: str
    kind: Literal["measured", "published"]
    cells: list[list[Cell]]


@dataclass
class Table:
    caption: str
    groups: list[Group]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    """The results behind the cells, in the table's order."""
    ablations: "Table | None" = None
    """The same for variants of a model, beside the model itself."""

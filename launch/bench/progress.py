"""Progress of a benchmark: bars in a terminal, plain lines elsewhere."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evmamba.launch.report.columns import columns_of, title_of
from evmamba.launch.report.paper import label_of
from evmamba.launch.store.progress import read_progress
from evmamba.launch.store.results import Result
from evmamba.launch.store.spec import Spec

LINE_SECONDS = 20.0


@dataclass
class _AtWork:
    began: float
    last_line: float
    bar: TaskID | None


class RunProgress:
    """Shows how far runs are, several at once if they are at work side by side; use it as a context manager.

    Args:
        console: where to print.
        total: number of runs.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.done = 0
        self._at_work: dict[str, _AtWork] = {}
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._all = self._bars.add_task("all runs", total=total, note="")

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, spec: Spec) -> None:
        began = time.monotonic()
        bar = self._bars.add_task(name_of(spec), total=None, note="starting") if self._bars else None
        self._at_work[spec.name] = _AtWork(began, began, bar)
        if bar is None:
            self._print(f"{name_of(spec)}: started")

    def update(self, spec: Spec, folder: Path) -> None:
        """Look at the progress file of a run at work; from any thread."""
        state = read_progress(folder)
        if state is None:
            return
        loss = "" if state.loss is None else f", loss {state.loss:.3f}"
        run = self._at_work[spec.name]
        with self._lock:
            if self._bars and run.bar is not None:
                task = next(task for task in self._bars.tasks if task.id == run.bar)
                if task.fields["note"].split(",")[0] != state.phase:
                    # Another phase has another speed: its time left is estimated anew.
                    self._bars.reset(run.bar)
                self._bars.update(run.bar, completed=state.done, total=state.total or None, note=f"{state.phase}{loss}")
            elif time.monotonic() - run.last_line > LINE_SECONDS:
                run.last_line = time.monotonic()
                count = f" {state.done}/{state.total}" if state.total else ""
                self._print(f"{name_of(spec)}: {state.phase}{count}{loss}")

    def skip(self, spec: Spec, why: str = "finished before") -> None:
        """Say why a finished run is not started."""
        self._advance(f"{name_of(spec)}: {why}")

    def finish(self, spec: Spec, result: Result) -> None:
        run = self._at_work.pop(spec.name, None)
        if run and run.bar is not None and self._bars:
            self._bars.remove_task(run.bar)
        seconds = time.monotonic() - run.began if run else 0.0
        said = headline(result) if result.finished else f"failed: {result.reason}"
        self._advance(f"{name_of(spec)}: {said} ({seconds:.0f} s)")

    def remark(self, text: str) -> None:
        """Print a line about all runs."""
        self.console.print(text, markup=False, highlight=False)

    def _advance(self, line: str) -> None:
        self.done += 1
        self._print(line)
        if self._bars:
            self._bars.update(self._all, completed=self.done)

    def _print(self, line: str) -> None:
        self.console.print(f"[{self.done}/{self.total}] {line}", markup=False, highlight=False)


def name_of(spec: Spec) -> str:
    """A run in words: EfficientVMamba-T, detection · RetinaNet, seed 1."""
    return f"{label_of(spec.model)}, {title_of(spec.task, spec.head)}{f', seed {spec.seed}' if spec.seed else ''}"


def headline(result: Result) -> str:
    """The first number of a result, as its column prints it."""
    columns = columns_of(result.task, result.head)
    numbers, column = (result.cost, columns[2]) if result.task == "cost" else (result.metrics, columns[0])
    value = numbers.get(column.key)
    return f"{column.header} {column.show(value * column.scale)}" if value is not None else "finished"

"""``metrics.csv`` and TensorBoard events of a training, one continuous log however often it was interrupted."""

import csv
import functools
import os
import threading
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from evmamba.files import replacing, write_errors
from evmamba.tasks.training.lease import guard

FILE_NAME = "metrics.csv"
EVENTS = "tensorboard"
_BUFFERED_ROWS = 50


class MetricsLog(Logger):
    """Rows of (step, metrics...) in ``save_dir/metrics.csv``, the same in ``save_dir/tensorboard``.

    Lightning's CSV logger deletes the earlier file and its TensorBoard logger repeats the steps between checkpoint and
    interruption. Here a checkpoint knows how many rows there were, and a continued training keeps so many
    (`LastCheckpoint` does both); TensorBoard's events are written again from them.

    Args:
        save_dir: folder.
        tensorboard: also write events for TensorBoard.

    Attributes:
        rows: rows written so far (rank 0; 0 elsewhere).
    """

    def __init__(self, save_dir: str, tensorboard: bool = True) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._tensorboard = tensorboard
        self._columns = ["epoch", "step"]
        self._written_columns: list[str] | None = None  # of the file; None: there is no file of this training yet
        self._waiting: list[dict[str, str]] = []
        self._events: Any = None
        self.rows = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step)} | {name: _text(name, value) for name, value in metrics.items()}
        self._columns += [name for name in row if name not in self._columns]
        self._waiting.append(row)
        self.rows += 1
        self._add_events(row)
        if len(self._waiting) >= _BUFFERED_ROWS:
            self.save()

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Keep the first `rows` rows of an earlier process's log and drop the rest; call it before anything is logged.

        With 0 a log is begun anew.
        """
        guard(self._folder)
        path = self._folder / FILE_NAME
        kept: list[dict[str, str]] = []
        if rows and path.is_file():
            with path.open(newline="") as file:
                kept = [{k: v for k, v in row.items() if v} for row in islice(csv.DictReader(file), rows)]
        self._columns, self._written_columns = ["epoch", "step"], None
        self._waiting, self.rows = [], 0
        self._close_events()
        with write_errors(self._folder / EVENTS):
            for old in (self._folder / EVENTS).glob("events.*"):
                old.unlink()
        self._rewrite(path)
        for row in kept:
            self.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what is waiting.

        Raises:
            UserError: it cannot be written; the rows before it are there.
        """
        if not self._waiting:
            return  # Lightning calls this before a training has said what to keep
        guard(self._folder)
        path = self._folder / FILE_NAME
        if self._written_columns == self._columns:
            self._append(path)
        else:
            self._rewrite(path)
        self._waiting = []
        if self._events is not None:
            with write_errors(self._folder / EVENTS):
                self._events.flush()

    def finalize(self, status: str) -> None:
        self.save()
        self._close_events()

    def _append(self, path: Path) -> None:
        with write_errors(path):
            size = path.stat().st_size
            try:
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerows(self._waiting)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)  # no half row
                raise

    def _rewrite(self, path: Path) -> None:
        """New columns need a new head."""
        earlier: list[dict[str, str]] = []
        with write_errors(path):
            if self._written_columns is not None:
                with path.open(newline="") as file:
                    earlier = list(csv.DictReader(file))
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows([*earlier, *self._waiting])
        self._written_columns = list(self._columns)

    def _add_events(self, row: Mapping[str, str]) -> None:
        if not self._tensorboard:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            _leave_errors_to_the_next_write()
            with write_errors(self._folder / EVENTS):
                self._events = SummaryWriter(str(self._folder / EVENTS))
        with write_errors(self._folder / EVENTS):
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, float(value), int(row["step"]))

    def _close_events(self) -> None:
        if self._events is not None:
            with write_errors(self._folder / EVENTS):
                self._events.close()
            self._events = None


@functools.cache
def _leave_errors_to_the_next_write() -> None:
    """Keep TensorBoard's thread from printing a traceback of what it cannot write: the next call of ours raises it."""
    told = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            told(args)

    threading.excepthook = hook


def _text(name: str, value: float) -> str:
    return str(int(value)) if name == "epoch" else repr(float(value))

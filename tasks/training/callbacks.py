"""Trainer callbacks that the recipes share: averaged weights and checkpoints."""

import copy
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from evmamba.errors import UserError
from evmamba.files import remove_unfinished, replacing, write_errors
from evmamba.tasks.training.checkpoint_files import LAST, RUN_KEY, replace_last, unfinished_last
from evmamba.tasks.training.checkpoint_safety import load_plain
from evmamba.tasks.training.interruption import SIGNALS, Agreement, requeue_job, stop
from evmamba.tasks.training.lease import guard, held
from evmamba.tasks.training.loops import StepCallback
from evmamba.tasks.training.metrics_log import MetricsLog

CHECKPOINTS = "checkpoints"


class WeightEMA(WeightAveraging):
    """Exponential moving average of weights and BatchNorm statistics, by Lightning's own averaging callback.

    Validation runs on the averaged weights, and the module holds them when training has ended. A checkpoint has both:
    ``state_dict`` is the average (what evaluation and other projects read), ``current_model_state`` the raw weights and
    ``averaging_state`` the counter, from which training goes on.

    Args:
        decay: weight of the old average at every optimizer step.
        warmup: start with min(decay, (1 + n) / (10 + n)) at step n, so that short trainings are not dominated by the
            first weights. The published networks were trained without.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.warmup = warmup
        super().__init__(multi_avg_fn=self._average)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        decay = self.decay
        if self.warmup:
            n = int(steps)
            decay = min(decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(averaged, current, steps)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if _is_partitioned(trainer):
            # The callback would copy empty tensors: every rank holds only a part of each parameter.
            raise UserError(
                "averaged weights (EMA) do not work with partitioned parameters; use ZeRO stage 1 or 2, or DDP"
            )
        # TaskModule.configure_model does nothing under the strategies that are left.
        warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights in the module: LastCheckpoint may save them in its own ``on_train_end``, after this."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)


def _is_partitioned(trainer: L.Trainer) -> bool:
    strategy = trainer.strategy
    return getattr(strategy, "zero_stage_3", False) or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning writes to the system's temporary folder first and then moves; between file systems that is a copy, and a
    job killed during it leaves half a file under the checkpoint's name. Here the temporary file is in the same folder,
    and is on the disk before it gets its name.

    Attributes:
        background: write in a thread, from a copy on the CPU, while the training goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.background = False
        self._writer: ThreadPoolExecutor | None = None
        self._waiting: list[Future[None]] = []
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        if self.background:
            self.wait()  # one copy in memory at a time
            copies: dict[int, Any] = {}
            apply_to_collection(checkpoint, Tensor, lambda t: copies.setdefault(id(t), t.detach().to("cpu", copy=True)))
            checkpoint = copy.deepcopy(checkpoint, copies)
        self.then(lambda: self._write(checkpoint, Path(path)))

    def then(self, task: Callable[[], None]) -> None:
        """Do something after what is being written, at once where that is not done in a thread.

        Raises:
            UserError, OSError: of the task, or of one before it that has failed meanwhile.
        """
        if not self.background:
            task()
            return
        for done in [future for future in self._waiting if future.done()]:
            self._waiting.remove(done)
            done.result()
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._waiting.append(self._writer.submit(self._attempt, task))

    def _attempt(self, task: Callable[[], None]) -> None:
        if self._failed:
            return  # what is not whole must not take the place of what is
        self._failed = True
        task()
        self._failed = False

    def wait(self) -> None:
        """Return when all is on the disk.

        Raises:
            UserError, OSError: something could not be written.
        """
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.result()

    def teardown(self) -> None:
        self.wait()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            guard(target)
            with replacing(target) as partial:
                with partial.open("wb") as file:
                    _save(checkpoint, file)
                guard(target)  # writing took its time


class _Noting:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write a checkpoint.

    Raises:
        OSError: it cannot be written; torch itself tells of its archive then, not of the full disk.
    """
    noting = _Noting(file)
    try:
        torch.save(checkpoint, noting)  # type: ignore[arg-type]
    except RuntimeError:
        if noting.error is not None:
            raise noting.error from None
        raise


def _prepare(trainer: L.Trainer, dirpath: str | os.PathLike | None) -> Path:
    """Have checkpoints written atomically; return their folder."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return Path(dirpath or Path(trainer.default_root_dir, CHECKPOINTS)).absolute()


def _writer(trainer: L.Trainer) -> AtomicCheckpointIO:
    """What writes a trainer's checkpoints.

    Raises:
        UserError: its strategy does that itself.
    """
    writer = trainer.strategy.checkpoint_io
    if not isinstance(writer, AtomicCheckpointIO) or isinstance(
        trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy
    ):
        raise UserError(
            "asynchronous checkpoints are files: use --strategy ddp, or leave out LastCheckpoint.asynchronous"
        )
    return writer


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the validation with the highest metric.

    Put it before LastCheckpoint in the list of callbacks: ``ckpt_path="best"`` asks the first one.

    Args:
        monitor: logged name, e.g. ``val/top1``, ``val/AP``, ``val/mIoU``.
        mode: "max" or "min".
        dirpath: folder; by default ``checkpoints`` in the trainer's default_root_dir.
        restore: leave these weights in the module when training has ended, in place of the last ones. Put it after
            WeightEMA then.

    Raises:
        UserError: `restore` under a strategy that writes checkpoints as folders.
    """

    def __init__(self, monitor: str, mode: str = "max", dirpath: str | None = None, restore: bool = False) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # but after the validation, a moment that a training can continue from
        )
        self.restore = restore

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.restore and (_is_partitioned(trainer) or hasattr(trainer.strategy, "zero_stage_3")):
            raise UserError("BestCheckpoint(restore) reads one file, and DeepSpeed and FSDP write folders; use DDP")
        self.dirpath = str(_prepare(trainer, self.dirpath))
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a validation there is no best one; a training that was interrupted goes on.
        if self.restore and self.best_model_path and not trainer.interrupted:
            pl_module.load_state_dict(load_plain(Path(self.best_model_path))["state_dict"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score also where the run's folder was moved; Lightning would forget it."""
        moved = dict(state_dict, dirpath=self.dirpath)
        if state_dict["best_model_path"]:
            path = str(Path(str(self.dirpath), Path(state_dict["best_model_path"]).name))
            score = state_dict["best_model_score"]
            moved |= {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}
        super().load_state_dict(moved)
        self.current_score = state_dict["current_score"]


class LastCheckpoint(Checkpoint, StepCallback):
    """``last.ckpt``, from which an interrupted training continues, and ``previous.ckpt``, should that be damaged.

    Written before every validation, every so many minutes or steps, when a signal stops the training (SIGUSR1, SIGTERM,
    Ctrl-C; all processes stop after the same step), and at the end. Only complete optimizer steps are saved: within
    accumulated batches the next one is waited for.

    Args:
        dirpath: folder; by default ``checkpoints`` in the trainer's default_root_dir.
        every_n_train_steps: also save every so many optimizer steps.
        every_n_minutes: also save when so many minutes have passed since the last time; what a crash can cost.
        asynchronous: go on training while a checkpoint is written from a copy in the memory of rank 0's machine. When
            a training stops or ends, the last one is waited for. Sharded strategies write theirs on all processes at
            once and do without.

    Attributes:
        seconds: how long the last one took, until it was on the disk; None before that.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int | None = None,
        every_n_minutes: float = 10.0,
        asynchronous: bool = False,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"every_n_train_steps must be at least 1, not {every_n_train_steps}")
        if every_n_minutes <= 0:
            raise UserError(f"every_n_minutes must be positive, not {every_n_minutes}")
        self.dirpath = dirpath
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.asynchronous = asynchronous
        self.seconds: float | None = None
        self._folder = Path()
        self._agreement = Agreement(wishes=1 + len(SIGNALS))
        self._saved_at = 0.0
        self._log_rows: int | None = None
        # The moment after the last step, from which a longer training would continue.
        self._last_loops: dict[str, Any] | None = None
        self._first_step = 0  # of this start
        self._ended = False
        self._requeued = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.strategy.broadcast(str(_prepare(trainer, self.dirpath))))
        self._agreement = Agreement(wishes=1 + len(SIGNALS))
        self._log_rows, self._last_loops, self._ended = 0, None, False
        if self.asynchronous:
            _writer(trainer).background = True
        if trainer.is_global_zero and held(self._folder) is not None:
            remove_unfinished(self._folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at, self._first_step = time.monotonic(), trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.keep(self._log_rows or 0)

    def on_step_complete(self, trainer: L.Trainer, validation_follows: bool, last: bool) -> None:
        self._log_rows = sum(logger.rows for logger in trainer.loggers if isinstance(logger, MetricsLog))
        noted = _noted(trainer)
        overdue = trainer.is_global_zero and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        overdue, *stopping = self._agreement.exchange([overdue, *(noted == number for number in SIGNALS)])
        due = self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0
        if last:
            self._last_loops = trainer.fit_loop.state_dict()
        if validation_follows or due or overdue or any(stopping):
            self._save(trainer)
        for number, wanted in zip(SIGNALS, stopping, strict=True):
            if wanted:
                self._wait(trainer)
                trainer.strategy.barrier("stopping")  # nobody leaves before rank 0 has named the file
                stop(trainer, number, f"saved as {self._folder / LAST}")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        # A validation may take longer than the grace; the step before it is saved.
        noted = _noted(trainer)
        if noted is None:
            return
        if trainer.world_size == 1:
            self._wait(trainer)
            stop(trainer, noted, "the validation will be repeated")
        # Several processes may not leave one by one: they stop after the next step, if they live to see it.
        if noted == signal.SIGUSR1 and trainer.is_global_zero and not self._requeued:
            self._wait(trainer)  # SLURM may end the job at once
            self._requeued = requeue_job()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True
        self._save(trainer)
        self._wait(trainer)
        if self.asynchronous:
            trainer.strategy.barrier("written")  # others read the best one in `on_fit_end`

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what a continuation needs to know besides Lightning's own entries, to any checkpoint."""
        limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        checkpoint[RUN_KEY] = {
            "log_rows": self._log_rows,
            "ended": limits if self._ended else None,
            "batch": _images_per_batch(trainer),
        }
        if self._ended and self._last_loops is not None:
            checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": self._last_loops}
            checkpoint["epoch"] = self._last_loops["epoch_progress"]["current"]["completed"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        run = checkpoint.get(RUN_KEY, {})
        self._log_rows = run.get("log_rows", 0)
        _recount_batches(checkpoint["loops"]["fit_loop"], run.get("batch"), _images_per_batch(trainer))
        self._last_loops = copy.deepcopy(checkpoint["loops"]["fit_loop"])

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # a log that is behind its checkpoint would have a gap
        partial, begun, step = unfinished_last(self._folder), time.monotonic(), trainer.global_step

        def replace() -> None:
            guard(self._folder)
            replace_last(partial, self._folder)
            self.seconds = time.monotonic() - begun
            if (lease := held(self._folder)) is not None and step > self._first_step:
                lease.advance()

        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            _writer(trainer).then(replace) if self.asynchronous else replace()
        self._saved_at = time.monotonic()

    def _wait(self, trainer: L.Trainer) -> None:
        if self.asynchronous:
            _writer(trainer).wait()


def _images_per_batch(trainer: L.Trainer) -> int | None:
    """Training images of all processes together between two optimizer steps or parts of one; None if not known."""
    batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    return None if batch_size is None else batch_size * trainer.world_size


def _recount_batches(fit_loop: dict[str, Any], then: int | None, now: int | None) -> None:
    """Say in batches of now how far a training is in its epoch that went on in batches of then (other processes).

    The order of the images does not depend on the number of processes, so each is still seen once in this epoch.
    """
    if then is None or now is None or then == now:
        return
    rank_zero_warn(f"a batch had {then} images over all processes and has {now}: the same images, rounded differently")
    progress = fit_loop["epoch_loop.batch_progress"]
    done = progress["current"]["ready"] * then // now
    for count in ("ready", "started", "processed", "completed"):
        progress["total"][count] += done - progress["current"][count]
        progress["current"][count] = done


def _noted(trainer: L.Trainer) -> signal.Signals | None:
    return getattr(trainer._signal_connector, "noted", None)

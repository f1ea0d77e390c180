"""Trainer callbacks that the recipes share: averaged weights, checkpoints, a progress bar."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from evmamba.errors import UserError


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
        strategy = trainer.strategy
        if getattr(strategy, "zero_stage_3", False) or type(strategy).__name__ == "FSDPStrategy":
            # The callback would copy empty tensors: every rank holds only a part of each parameter.
            raise UserError(
                "averaged weights (EMA) do not work with partitioned parameters; use ZeRO stage 1 or 2, or DDP"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights in the module: LastCheckpoint may save them in its own ``on_train_end``, after this."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning writes to the system's temporary folder first and then moves; between file systems that is a copy, and a
    job killed during it leaves half a file under the checkpoint's name. Here the temporary file is in the same folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, partial)
            partial.replace(target)
        except OSError as error:
            raise UserError(f"cannot write checkpoint {target}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):  # no such folder, or a file in its place
                partial.unlink()


class _Checkpoint(ModelCheckpoint):
    """One file that is replaced atomically."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)


class BestCheckpoint(_Checkpoint):
    """``best.ckpt``: the epoch with the highest validation metric.

    Put it before LastCheckpoint in the list of callbacks: ``ckpt_path="best"`` asks the first one.

    Args:
        monitor: logged name, e.g. ``val/top1``, ``val/AP``, ``val/mIoU``.
        mode: "max" or "min".
        dirpath: folder; by default Lightning's ``checkpoints`` beside the logs.
    """

    def __init__(self, monitor: str, mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)


class LastCheckpoint(_Checkpoint):
    """``last.ckpt``: the newest epoch and the end of training, to continue from.

    (ModelCheckpoint's ``save_last`` only follows improvements, and without validation at the end saves nothing there.)

    Args:
        dirpath: folder; by default Lightning's ``checkpoints`` beside the logs.
        every_n_train_steps: also save between epochs, every so many optimizer steps.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath, filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # with max_steps the last steps may follow no validation
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def progress_bar() -> ProgressBar:
    """Return rich bars in a terminal, and plain lines where the output goes to a file."""
    return RichProgressBar(leave=False) if sys.stdout.isatty() else TQDMProgressBar(refresh_rate=50)

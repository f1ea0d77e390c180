"""Tells a run's heartbeat how far a training is, sets its time-out, and keeps what NCCL did last."""

import importlib
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from evmamba.tasks.training.heartbeat import FOLDER, Heartbeat
from evmamba.tasks.training.interruption import requeue_job
from evmamba.tasks.training.lease import held

# Of the flight recorder's files, which torchfrtrace reads; the rank follows.
TRACE_FILE = "nccl_trace_rank_"


class ProgressWatch(Callback):
    """Tells a heartbeat how far the training is, and sets the time-out.

    Args:
        folder: the run's; without a lease on it nothing happens.
        timeout: see `Heartbeat`; 0 or less: never.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout if timeout > 0 else None
        self._batch = 0
        self._heartbeat: Heartbeat | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        lease = held(self._folder)
        self._heartbeat = lease.heartbeat if lease is not None else None

    def _note(self, phase: str, part: int = 0) -> None:
        if self._heartbeat is not None:
            self._heartbeat.note(phase, self._batch, part)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        heartbeat = self._heartbeat
        if heartbeat is not None and trainer.world_size > 1:
            heartbeat.before_end = lambda: write_collectives(heartbeat.folder)
            heartbeat.requeue = requeue_job
            heartbeat.timeout = self._timeout
        self._note("loading")

    def on_train_batch_start(self, *args: Any) -> None:
        self._batch += 1
        self._note("forward")

    def on_before_backward(self, *args: Any) -> None:
        self._note("backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._note("optimizer step")

    def on_train_batch_end(self, *args: Any) -> None:
        self._note("loading")

    def on_save_checkpoint(self, *args: Any) -> None:
        self._note("saving")

    def on_validation_start(self, *args: Any) -> None:
        self._note("validating")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._note("validating", part=args[3] + 1)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self._note("metrics")

    def on_validation_end(self, *args: Any) -> None:
        self._note("validated")

    def on_train_end(self, *args: Any) -> None:
        self._note("ending")

    def on_test_start(self, *args: Any) -> None:
        self._note("testing")

    def on_test_batch_start(self, *args: Any) -> None:
        self._note("testing", part=args[3] + 1)

    def on_test_end(self, *args: Any) -> None:
        self._note("tested")


def record_collectives(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's flight recorder leave the last collective operations of every process in the run's folder.

    It is read with ``torchfrtrace`` (of torch). Variables that are set already are kept. Call it before the processes
    meet.
    """
    target = str((folder / FOLDER / TRACE_FILE).resolve())
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", target),
    ):
        environment.setdefault(name, value)


def write_collectives(folder: Path) -> None:
    """Write this process's collective operations of late, as the flight recorder itself does at NCCL's time-out, which
    is later than ours; nothing where NCCL is not at work."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
        trace: bytes = importlib.import_module("torch._C._distributed_c10d")._dump_nccl_trace()
        (folder / FOLDER / f"{TRACE_FILE}{dist.get_rank()}").write_bytes(trace)

"""What a run leaves behind: its result after the test, its progress for whoever waits, its training curve."""

import datetime
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging

from evmamba.launch.fit.exported import Exported
from evmamba.launch.fit.settings import beyond_defaults
from evmamba.launch.store.progress import write_progress
from evmamba.launch.store.result_schema import Data, Provenance, Training
from evmamba.launch.store.results import Result, device_name, file_hash, git_state, now, provenance, write_result
from evmamba.launch.store.sweeps import Point
from evmamba.tasks import TASKS
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.module import TaskModule
from evmamba.tasks.training.callbacks import BestCheckpoint, LastCheckpoint

CURVE_POINTS = 200
NOT_EVALUATED = Evaluation()


@dataclass(frozen=True)
class Background:
    """What a result says besides what its test found; make it when the run begins.

    Attributes:
        run: name of the run.
        config: the run's configuration as plain lists and mappings.
        weights: which weights are tested; None says it from the trainer ("checkpoint FILE" or what memory holds).
        origin: more for the result's provenance.
        suite: see `Result.suite`.
        training: see `Result.training`.
        sweeps: see `Result.sweeps`.
        exported: what was found of the network as ONNX files.
        start: when the run began.
    """

    run: str
    config: Mapping[str, Any]
    weights: str | None = None
    origin: Provenance = field(default_factory=Provenance)
    suite: str | None = None
    training: Training = field(default_factory=Training)
    sweeps: dict[str, list[Point]] = field(default_factory=dict)
    exported: Exported | None = None
    start: datetime.datetime = field(default_factory=now)

    def __post_init__(self) -> None:
        git_state()  # of the code that was loaded, not of what is checked out when a long run ends


class ResultWriter(Callback):
    """Writes ``result.json`` when the test stage ends (rank 0 only).

    Args:
        folder: where the file goes, and the evaluation's own files and pictures.
        background: what it says besides.
    """

    def __init__(self, folder: Path, background: Background) -> None:
        self.folder = Path(folder)
        self.background = background

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            data: TaskDataModule = trainer.datamodule  # type: ignore[attr-defined]
            evaluation: Evaluation = pl_module.evaluation  # type: ignore[assignment]
            result = result_of(trainer, pl_module, data, self.background, evaluation)  # type: ignore[arg-type]
            result.gallery = evaluation.write(self.folder)
            if evaluation.files:
                result.details["sha256"] = {name: file_hash(self.folder / name) for name in evaluation.files}
            write_result(result, self.folder)


def result_of(
    trainer: L.Trainer,
    module: TaskModule,
    data: TaskDataModule,
    background: Background,
    evaluation: Evaluation = NOT_EVALUATED,
) -> Result:
    """Collect the result of a run as it stands, without pictures.

    Args:
        trainer, module, data: of the run.
        background: what the result says besides.
        evaluation: of the test that just ended.
    """
    config = background.config
    task = TASKS[module.task]
    arguments = config["data"].get("init_args", {}) | config["model"].get("init_args", {})
    tested = f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "untrained"
    files = {"files": list(evaluation.files)} if evaluation.files else {}
    exported = background.exported or Exported()
    return Result(
        run=background.run,
        task=task.name,
        model=arguments["backbone"],
        head=task.head_in(arguments).key,
        data=cast("Data", data.description()),
        metrics={**evaluation.metrics, **exported.metrics},  # type: ignore[dict-item]
        cost={"parameters": sum(p.numel() for p in module.parameters()), **exported.cost},
        protocol={
            "weights": background.weights or tested,
            "test_time_augmentation": "none",
            "eval_batch_size": data.eval_batch_size,
            **{name: arguments[name] for name in task.protocol_options if name in arguments},
            **evaluation.protocol,
        },
        training=background.training,
        details={**evaluation.details, **files, **({"exported": exported.details} if exported.details else {})},
        provenance=provenance(
            config=config,
            seed=config.get("seed_everything"),
            device=device_name(trainer.strategy.root_device.type),
            precision=str(trainer.precision),
            start=background.start,
            nodes=trainer.num_nodes,
            processes=trainer.world_size,
        )
        | Provenance(settings=beyond_defaults(config), threads=torch.get_num_threads())
        | background.origin,
        suite=background.suite,
        sweeps=background.sweeps,
    )


def weights_in_memory(trainer: L.Trainer) -> str:
    """Which weights the module holds after training."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
    best = [callback.monitor for callback in callbacks if isinstance(callback, BestCheckpoint) and callback.restore]
    return f"{'EMA of the ' if averaged else ''}{f'best epoch by {best[0]}' if best else 'last epoch'}"


def add_callbacks(trainer: L.Trainer, *callbacks: Callback) -> None:
    """Append callbacks to a trainer that exists already."""
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole training; 0 when it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else 0


class TrainingRecord(Callback):
    """Collects the loss curve and the speed of a training, for the result's ``training``."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.validation: list[tuple[int, dict[str, float]]] = []
        self.seconds: list[float] = []
        self.images = 0  # of one batch
        self.loss: float | None = None
        self._last: float | None = None
        self._start = time.monotonic()
        self._before = 0.0  # seconds of the training ahead of an interruption, as far as they were saved
        self._starts = 1  # of those whose work is in the weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "curve": self.curve,
            "validation": self.validation,
            "seconds": self._elapsed(),
            "images": self.images,
            "starts": self._starts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.validation = list(state_dict["curve"]), list(state_dict["validation"])
        self._before = state_dict["seconds"]
        self.images = state_dict.get("images", 0)
        self._starts = state_dict.get("starts", 1) + 1

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = None  # a step's time must not contain a validation

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        self.images = len(batch["path"])
        step, total = trainer.global_step, total_steps(trainer)
        # Reading the loss waits for the device; as often as the curve has points is enough.
        if step % max(1, total // CURVE_POINTS) == 0:
            self.loss = float(outputs["loss"])
            self.curve.append((step, round(self.loss, 5)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            # A continued training may repeat the validation at which it stopped.
            self.validation = [entry for entry in self.validation if entry[0] != trainer.global_step]
            self.validation.append((trainer.global_step, dict(pl_module.evaluation.metrics)))  # type: ignore[union-attr, arg-type]

    def summary(self, trainer: L.Trainer) -> Training:
        """Steps, epochs, images seen, seconds, images/s over whole steps (loading included), curves of the loss and of
        the metrics in validation.

        Of an interrupted training also how many starts it took. Its seconds are theirs together, without what a killed
        one did after its last checkpoint; images/s are the last one's.
        """
        summary = Training(
            steps=trainer.global_step,
            epochs=trainer.current_epoch,
            images=trainer.global_step * trainer.accumulate_grad_batches * self.images * trainer.world_size,
            seconds=round(self._elapsed(), 1),
        )
        if self.seconds:
            median = statistics.median(self.seconds)
            summary["images_per_s"] = round(self.images * trainer.world_size / median, 2)
        if self._starts > 1:
            summary["starts"] = self._starts
        if (saving := last_checkpoint_seconds(trainer)) is not None:
            summary["checkpoint_seconds"] = saving
        return summary | Training(curve=self.curve, validation=self.validation)  # type: ignore[typeddict-item]


class ProgressWriter(Callback):
    """Keeps ``progress.json`` current (rank 0 only, twice a second at most): phase, done, total, loss.

    A file rather than a pipe: it can be read from another node, and by somebody who comes later.
    """

    def __init__(self, folder: Path, record: TrainingRecord) -> None:
        self.folder = folder
        self.record = record
        self._written = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self._write(trainer, "training", trainer.global_step, total_steps(trainer))

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._write(trainer, "validating", args[3] + 1, _number(trainer.num_val_batches))

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self._write(trainer, "testing", args[3] + 1, _number(trainer.num_test_batches))

    def _write(self, trainer: L.Trainer, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._written < 0.5:
            return
        self._written = now
        write_progress(self.folder, phase, done, total, self.record.loss, last_checkpoint_seconds(trainer))


def last_checkpoint_seconds(trainer: L.Trainer) -> float | None:
    """How long the last checkpoint of a training took; None where none was written yet."""
    seconds = [c.seconds for c in trainer.callbacks if isinstance(c, LastCheckpoint)]  # type: ignore[attr-defined]
    return round(seconds[0], 2) if seconds and seconds[0] is not None else None


def _number(batches: Any) -> int:
    return int(sum(batches)) if isinstance(batches, list) else int(batches)

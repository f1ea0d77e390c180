"""What the tasks' modules share: the LightningModule's steps, optimizers and results."""

import heapq
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from evmamba.errors import UserError, first_few
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_scheduler, scaled_lr
from evmamba.tasks.training.randomness import seed_step
from evmamba.tasks.training.resume import make_resumable
from evmamba.tasks.training.sharding import is_finite, shard, share_buffers

WORST_CASES = 4


class TaskModule(L.LightningModule):
    """A network, its loss and its metrics.

    A task implements :meth:`training_loss`, :meth:`evaluation_step` and :meth:`evaluation_end`; this class logs,
    ignores the batches that only keep ranks in step, and stops with the files' names when the loss is not finite.

    Attributes:
        output_dir: where the test stage writes its files (gallery, detections); nothing is written while it is None.
        gallery_size: at most so many pictures of predictions in ``output_dir/gallery``, and `WORST_CASES` more.
        details: JSON-able extras of the last evaluation (per class, confusion matrix, counts).
        exact_metrics: metrics of the last evaluation by name, without the stage, as computed; Lightning rounds what is
            logged to float32.
    """

    task: ClassVar[str]
    # Methods of the network, besides forward, by which training_loss computes.
    entry_points: ClassVar[tuple[str, ...]] = ()
    # What checkpoints from before an option existed were trained with, where the default is another.
    earlier_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.output_dir: Path | None = None
        self.gallery_size = 8
        self.details: dict[str, Any] = {}
        self.exact_metrics: dict[str, float] = {}
        self._tested = 0
        self._pictures = 0
        self._offered = 0
        self._worst: list[tuple[float, int, Image.Image]] = []
        self._seed = 0

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and its parts by name (logged as ``train/<name>``)."""
        raise NotImplementedError

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Predict a batch and update the metric objects; `stage` is "val" or "test". Nothing collective here."""
        raise NotImplementedError

    def evaluation_end(self, stage: str) -> dict[str, Tensor | float]:
        """Reduce the metric objects over all ranks, reset them, fill ``details``; return metrics in [0, 1] by name."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Split the parameters among the processes where the strategy wants that (FSDP2: it has made a mesh)."""
        if self.device_mesh is not None:
            for child in self.children():
                if next(child.parameters(), None) is not None:
                    shard(child, self.device_mesh["data_parallel"], self.entry_points)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            make_resumable(self.trainer)
            # Of seed_everything; processes that Lightning starts inherit it.
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        # evaluation_end returns values that are reduced already; Lightning's advice to average them would change them.
        warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seed_step(self._seed, self.current_epoch, batch_idx, self.global_rank)
        loss, parts = self.training_loss(batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at optimizer step {self.global_step} (epoch {self.current_epoch}, batch "
                f"{batch_idx}; images {first_few(batch['path'], 8)}); checkpoints written before are kept: lower "
                "optimizer.lr, lengthen the warm-up, set trainer.gradient_clip_val or use trainer.precision=32-true"
            )
        size = len(batch["path"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=size)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch.get("ignore", False):
            self.evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch.get("ignore", False):
            self.evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_validation_epoch_start(self) -> None:
        share_buffers(self)
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        share_buffers(self)
        self._reset_metrics()
        self._tested = self._pictures = self._offered = 0
        self._worst = []

    def _reset_metrics(self) -> None:
        """Reset at the start too: states left by validate() are inference tensors, which fit() could not add to."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")
        for n, (_, _, picture) in enumerate(sorted(self._worst, reverse=True)):
            self._write_picture(picture, f"worst_{n:03d}")
        self._worst = []

    def _log_metrics(self, stage: str) -> None:
        self.exact_metrics = {name: float(value) for name, value in self.evaluation_end(stage).items()}
        self.log_dict({f"{stage}/{name}": value for name, value in self.exact_metrics.items()}, prog_bar=stage == "val")

    def wants_picture(self) -> bool:
        """Whether to draw this test image for the gallery; ask once for every image, in order.

        The pictures are spread over the images of this process: neighbours in a data set are often alike.
        """
        index = self._tested
        self._tested += 1
        if self.output_dir is None or not self.trainer.is_global_zero or self._pictures >= self.gallery_size:
            return False
        loader: Any = self.trainer.test_dataloaders
        images = min(len(loader.sampler), int(sum(self.trainer.num_test_batches)) * loader.batch_size)
        return index % max(images // self.gallery_size, 1) == 0

    def add_picture(self, picture: Image.Image) -> None:
        """Write a picture to ``output_dir/gallery/NNN.jpg``; for an image that :meth:`wants_picture`."""
        self._write_picture(picture, f"{self._pictures:03d}")
        self._pictures += 1

    def offer_worst(self, badness: float, draw: Callable[[], Image.Image]) -> None:
        """Keep a test image for ``output_dir/gallery/worst_NNN.jpg`` while none of this process are worse; the first of
        equally bad ones stays. It is drawn at once: few ever are, and a picture is smaller than what it shows.

        Args:
            badness: how wrong the prediction is, in the task's own measure; nan and 0 are no case.
            draw: makes the picture.
        """
        if self.output_dir is None or not self.trainer.is_global_zero or not badness > 0:
            return
        place = (badness, -self._offered)
        self._offered += 1
        if len(self._worst) < min(WORST_CASES, self.gallery_size):
            heapq.heappush(self._worst, (*place, draw()))
        elif self._worst and place > self._worst[0][:2]:
            heapq.heapreplace(self._worst, (*place, draw()))

    def _write_picture(self, picture: Image.Image, name: str) -> None:
        assert self.output_dir is not None
        folder = self.output_dir / "gallery"
        folder.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(folder / f"{name}.jpg", quality=88)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A finite loss can still give infinite gradients; such weights must not replace the last good checkpoint.
        weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
        broken = [name for name, value in weights.items() if not is_finite(value)]
        if broken:
            raise UserError(
                f"weights are no longer finite at optimizer step {self.global_step} ({first_few(broken, 8)}); they are "
                "not saved, checkpoints written before are kept: lower optimizer.lr or set trainer.gradient_clip_val"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total_steps = float(self.trainer.estimated_stepping_batches)
        accumulation = self.trainer.accumulate_grad_batches
        # With trainer.max_steps alone the line above does not look at the data, and the batches are not counted yet.
        self.trainer.fit_loop.setup_data()
        steps_per_epoch = max(1, math.ceil(self.trainer.num_training_batches / accumulation))
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        global_batch = None if batch_size is None else batch_size * accumulation * self.trainer.world_size
        optimizer = build_optimizer(self, self.optimizer_config, global_batch)
        lr_scale = scaled_lr(self.optimizer_config, global_batch or 1) / self.optimizer_config.lr
        scheduler = build_scheduler(optimizer, self.schedule_config, steps_per_epoch, total_steps, lr_scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

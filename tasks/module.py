"""What the tasks' modules share: the LightningModule's steps, optimizers and results."""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from evmamba.checkpoints import check_fit
from evmamba.errors import UserError, first_few
from evmamba.tasks import TASKS
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.gallery import Gallery
from evmamba.tasks.training.depth import classifier_of, freeze_stages, lr_factors
from evmamba.tasks.training.distributed import (
    fix_bucket_order,
    fix_gradient_strides,
    gather_to_first,
    is_finite,
    shard,
    share_buffers,
)
from evmamba.tasks.training.loops import make_resumable
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_scheduler, scaled_lr
from evmamba.tasks.training.randomness import seed_step


class TaskModule(L.LightningModule):
    """A network, its loss and its metrics.

    A task implements :meth:`training_loss`, :meth:`evaluation_step` and :meth:`evaluation_end`; this class logs,
    ignores the batches that only keep ranks in step, and stops with the files' names when the loss is not finite.

    Attributes:
        evaluation: the last one; all that an evaluation leaves.
        gallery: takes the test's images; see `Gallery.offer`.
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
        self.evaluation = Evaluation()
        self.gallery = Gallery()
        self._kept: dict[str, Any] = {}
        self._seed = 0
        self._frozen: list[nn.Module] = []

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, those of a checkpoint say.

        Raises:
            UserError: they are of another network (with `strict`).
        """
        if strict:
            check_fit(
                state_dict, self.state_dict(), "the checkpoint, perhaps of another backbone, head or number of classes,"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and its parts by name (logged as ``train/<name>``)."""
        raise NotImplementedError

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Predict a batch and update the metric objects; `stage` is "val" or "test". Nothing collective here."""
        raise NotImplementedError

    def evaluation_end(self, stage: str) -> Evaluation:
        """Reduce the metric objects over all ranks, reset them, and return what they say (without pictures)."""
        raise NotImplementedError

    def keep(self, path: str, found: Any) -> None:
        """Remember what a test found on an image, until `kept`."""
        data: Any = getattr(self._trainer, "datamodule", None)
        self._kept[path if data is None else data.image_name(path)] = found

    def kept(self) -> dict[str, Any] | None:
        """Return what all processes have kept, by image, and forget it; None but on rank 0. Collective."""
        found, self._kept = gather_to_first(self._kept), {}
        return found

    def configure_model(self) -> None:
        """Split the parameters among the processes where the strategy wants that (FSDP2: it has made a mesh)."""
        if self.device_mesh is not None:
            for child in self.children():
                if next(child.parameters(), None) is not None:
                    shard(child, self.device_mesh["data_parallel"], self.entry_points)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if self.optimizer_config.frozen_stages is not None:  # before a strategy wraps the module
                self._frozen = freeze_stages(self._backbone, self.optimizer_config.frozen_stages)
            make_resumable(self.trainer)
            # Of seed_everything; processes that Lightning starts inherit it.
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        # evaluation_end returns values that are reduced already; Lightning's advice to average them would change them.
        warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")

    @property
    def _backbone(self) -> nn.Module:
        return self.get_submodule(TASKS[self.task].backbone_at)

    def on_train_epoch_start(self) -> None:
        for module in self._frozen:
            module.eval()

    def on_train_start(self) -> None:
        assert self.trainer.strategy.model is not None
        fix_bucket_order(self.trainer.strategy.model)
        fix_gradient_strides(self.trainer.strategy.model)

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
        self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups), batch_size=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch.get("ignore", False):
            self.evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not batch.get("ignore", False):
            self.evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._evaluated("val")

    def on_validation_epoch_start(self) -> None:
        share_buffers(self)
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        share_buffers(self)
        self._reset_metrics()
        self._kept = {}
        loader: Any = self.trainer.test_dataloaders
        images = min(len(loader.sampler), int(sum(self.trainer.num_test_batches)) * loader.batch_size)
        self.gallery.start(images if self.trainer.is_global_zero else 0)

    def _reset_metrics(self) -> None:
        """Reset at the start too: states left by validate() are inference tensors, which fit() could not add to."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def on_test_epoch_end(self) -> None:
        self._evaluated("test", self.gallery.pictures())

    def _evaluated(self, stage: str, pictures: Mapping[str, Image.Image] = MappingProxyType({})) -> None:
        found = self.evaluation_end(stage)
        metrics = {name: float(value) for name, value in found.metrics.items()}
        self.evaluation = dataclasses.replace(found, metrics=metrics, pictures=pictures)
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, prog_bar=stage == "val")

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
        optimizer = build_optimizer(self, self.optimizer_config, global_batch, self._lr_factors())
        lr_scale = scaled_lr(self.optimizer_config, global_batch or 1) / self.optimizer_config.lr
        scheduler = build_scheduler(optimizer, self.schedule_config, steps_per_epoch, total_steps, lr_scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factors(self) -> dict[str, float]:
        config = self.optimizer_config
        if config.backbone_lr is None and config.layer_decay == 1:
            return {}
        backbone, at = self._backbone, TASKS[self.task].backbone_at
        own = 1.0 if config.backbone_lr is None else config.backbone_lr / config.lr
        head = classifier_of(backbone)
        factors = lr_factors(backbone, config.layer_decay)
        return {f"{at}.{name}": factor * (1.0 if name in head else own) for name, factor in factors.items()}

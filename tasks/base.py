"""What the three tasks share: the LightningModule's steps, optimizers and results, and the data module's loaders."""

import hashlib
import heapq
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from evmamba.errors import UserError
from evmamba.tasks.images import BadImagePolicy, find_unreadable, handle_unreadable
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_scheduler, scaled_lr
from evmamba.tasks.training.randomness import SeededSamples, seed_step
from evmamba.tasks.training.resume import make_resumable
from evmamba.tasks.training.samplers import EvaluationSampler, TrainingLoader, TrainingSampler
from evmamba.tasks.training.sharding import is_finite, shard, share_buffers

EMBEDDED = "embedded"
WORST_CASES = 4
MAX_HASHED_BYTES = 64 * 2**20


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
                f"{batch_idx}; images {_named(batch['path'])}); checkpoints written before are kept: lower "
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
                f"weights are no longer finite at optimizer step {self.global_step} ({_named(broken)}); they are not "
                "saved, checkpoints written before are kept: lower optimizer.lr or set trainer.gradient_clip_val"
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


def _named(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class TaskDataModule(L.LightningDataModule):
    """Folders of images in one of the documented layouts, and loaders that are exact for any number of processes.

    A task's constructor does the cheap checks and sets ``num_classes`` and ``class_names`` (the command line links them
    to the model); its ``setup`` sets ``train_set`` and ``val_set``, map-style data sets of samples for :meth:`collate`.
    The test stage and predict use the validation split: there is no other.

    Args:
        data_dir: the data set's root, or "embedded" for the drawn one that is made on first use.
        batch_size: training images per process and step.
        eval_batch_size: evaluation images per process and step; None takes batch_size.
        num_workers: loading processes per loader.
        on_bad_image: "stop" with an error before training, or "skip" unreadable images with a counted warning.
        seed: of the training order.

    Raises:
        UserError: missing data folder, or options out of range.
    """

    task: ClassVar[str]
    num_classes: int
    class_names: list[str]
    train_set: Dataset
    val_set: Dataset

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        on_bad_image: BadImagePolicy,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"data.{name} must be at least {least}, not {value}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.on_bad_image: BadImagePolicy = on_bad_image
        self.seed = seed
        self.embedded = data_dir == EMBEDDED
        self.root = self._embedded_root() if self.embedded else Path(data_dir).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data folder not found: {self.root} (data.data_dir)")

    def _embedded_root(self) -> Path:
        from evmamba.tasks.embedded import ensure_embedded  # draws pictures: not needed for real data

        return ensure_embedded(self.task)

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Turn a list of samples into a batch with at least ``path``, the files' names."""
        raise NotImplementedError

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        """Return the training and the validation image files (known from the constructor on)."""
        raise NotImplementedError

    def label_paths(self) -> list[Path]:
        """Return the files with labels, where images have such."""
        return []

    def description(self) -> dict[str, Any]:
        """Say which data this is: name, root, number of images and classes, and a fingerprint (see `fingerprint`)."""
        train, val = self.image_paths()
        return {
            "name": EMBEDDED if self.embedded else self.root.resolve().name,
            "root": str(self.root),
            "train_images": len(train),
            "val_images": len(val),
            "num_classes": self.num_classes,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        train, val = self.image_paths()
        return fingerprint(self.root, [*train, *val], self.class_names, self.label_paths())

    def readable(
        self,
        paths: Sequence[Path],
        where: str,
        find: Callable[[Sequence[Path], BadImagePolicy], dict[Path, str]] = find_unreadable,
    ) -> list[Path]:
        """Return the readable ones of these images, by the policy `on_bad_image`; rank 0 looks, all ranks agree.

        Args:
            paths: the images.
            where: which part of the data, for messages.
            find: looks at them; for images that are not files of their own.

        Raises:
            UserError: see :func:`evmamba.tasks.images.handle_unreadable`.
        """
        bad: dict[Path, str] | None = None
        if self._rank == 0:
            bad = find(paths, self.on_bad_image)
        if self.trainer is not None and self.trainer.world_size > 1:
            bad = self.trainer.strategy.broadcast(bad)
        assert bad is not None
        handle_unreadable(bad, len(paths), self.on_bad_image, where)
        return [path for path in paths if path not in bad]

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def train_dataloader(self) -> DataLoader:
        sampler = TrainingSampler(len(self.train_set), self._rank, self._world, self.seed)  # type: ignore[arg-type]
        return TrainingLoader(
            SeededSamples(self.train_set, self.seed),
            sampler,
            self._batches_done,
            batch_size=self.batch_size,
            # A last small batch makes BatchNorm's statistics noisy; it is kept only where it is all there is.
            drop_last=len(sampler) >= self.batch_size,
            persistent_workers=self.num_workers > 0,
            **self._loading(self.collate),
        )

    def _batches_done(self) -> int:
        """Batches of the current epoch that are trained already: not 0 where a training is continued."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader()

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader()

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader()

    def _evaluation_loader(self) -> DataLoader:
        sampler = EvaluationSampler(len(self.val_set), self._rank, self._world)  # type: ignore[arg-type]
        collate = _Ignored(self.collate) if sampler.ignored else self.collate
        return DataLoader(self.val_set, batch_size=self.eval_batch_size, sampler=sampler, **self._loading(collate))

    def _loading(self, collate: Callable) -> dict[str, Any]:
        """The options of every loader."""
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }


class _Ignored:
    """A collate function whose batches say that they do not count (see EvaluationSampler)."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return self.collate(samples) | {"ignore": True}


def fingerprint(root: Path, paths: Iterable[Path], class_names: Sequence[str], labels: Sequence[Path] = ()) -> str:
    """Return 16 hex digits over the class names, every file's name (relative to root) and size, and the labels.

    Label files can change without changing their size: their contents count up to 64 MiB in all, beyond that their
    times of modification.
    """
    # Names also of files outside root.
    sized = ((Path(os.path.relpath(path, root)).as_posix(), path.stat().st_size) for path in (*paths, *labels))
    digest = files_digest(class_names, sized)
    small = sum(path.stat().st_size for path in labels) <= MAX_HASHED_BYTES
    for path in labels:
        digest.update(hashlib.sha256(path.read_bytes()).digest() if small else str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def files_digest(class_names: Sequence[str], sized: Iterable[tuple[str, int]]) -> "hashlib._Hash":
    """SHA-256 so far over class names and (file name, bytes) pairs: the start of every fingerprint."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for name, size in sized:
        digest.update(f"\n{name}\0{size}".encode())
    return digest

"""Images in class folders, with timm's augmentation for training and the field's centre crop for evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import Dataset

from evmamba.errors import UserError
from evmamba.tasks.base import TaskDataModule
from evmamba.tasks.classification.folders import list_dataset
from evmamba.tasks.images import BadImagePolicy, read_image

Sample = tuple[Tensor, int, str]


class ImageList(Dataset[Sample]):
    """(image [3, H, W] normalised, label, file name) for a list of (file, label)."""

    def __init__(self, items: list[tuple[Path, int]], transform: Callable[..., Tensor]) -> None:
        self.items = items
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.items[index]
        return self.transform(read_image(path)), label, str(path)


class ClassificationData(TaskDataModule):
    """``train/<class>/<image>`` and ``val/<class>/<image>``.

    Batches: dict of ``image`` [B, 3, image_size, image_size] float32 with ImageNet mean and deviation, ``label`` [B]
    int64, ``path`` list of B file names. Class k is the k-th folder name in sorted order.

    Evaluation resizes the short side to floor(image_size / crop_ratio), bicubic, and crops the centre: 256 and 224.

    Args:
        data_dir: the folder with train/ and val/, or "embedded".
        image_size: input size in pixels.
        crop_ratio: part of the resized short side that evaluation crops.
        batch_size: training images per process and step; even if the model mixes images.
        eval_batch_size: evaluation images per process and step; None takes batch_size.
        num_workers: loading processes.
        on_bad_image: "stop" before training, or "skip" unreadable images with a counted warning.
        min_scale: smallest area of the random resized crop, as a part of the image.
        flip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation; only without auto_augment.
        auto_augment: timm's description of a policy, e.g. "rand-m9-mstd0.5-inc1", or None.
        random_erasing: probability of erasing a rectangle with noise per pixel.
        seed: of the training order.

    Raises:
        UserError: what :mod:`evmamba.tasks.classification.folders` finds wrong, or options that timm refuses.
    """

    task: ClassVar[str] = "classification"

    def __init__(
        self,
        data_dir: str = "embedded",
        image_size: int = 224,
        crop_ratio: float = 0.875,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        on_bad_image: BadImagePolicy = "stop",
        min_scale: float = 0.08,
        flip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, on_bad_image, seed)
        if image_size < 32:
            raise UserError(f"data.image_size must be at least 32, not {image_size}")
        if not 0 < crop_ratio <= 1:
            raise UserError(f"data.crop_ratio must be in (0, 1], not {crop_ratio}")
        self.image_size = image_size
        train, val = list_dataset(self.root)
        self.class_names = list(train)
        self.num_classes = len(train)
        self._train_items, self._val_items = _labelled(train), _labelled(val)
        normalise = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        try:
            self.train_transform = create_transform(
                image_size,
                is_training=True,
                scale=(min_scale, 1.0),
                hflip=flip,
                color_jitter=color_jitter or None,
                auto_augment=auto_augment,
                interpolation="bicubic",
                re_prob=random_erasing,
                re_mode="pixel",
                **normalise,
            )
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"timm refuses the augmentation (auto_augment={auto_augment}): {error or 'invalid'}"
            ) from error
        self.eval_transform = create_transform(
            image_size, is_training=False, interpolation="bicubic", crop_pct=crop_ratio, **normalise
        )

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        return [path for path, _ in self._train_items], [path for path, _ in self._val_items]

    def setup(self, stage: str) -> None:
        if hasattr(self, "val_set"):
            return  # fit and test share one data module
        parts = {}
        for split, items in (("train", self._train_items), ("val", self._val_items)):
            readable = set(self.readable([path for path, _ in items], split))
            parts[split] = [item for item in items if item[0] in readable]
        self.train_set = ImageList(parts["train"], self.train_transform)
        self.val_set = ImageList(parts["val"], self.eval_transform)

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        images, labels, paths = zip(*samples, strict=True)
        return {"image": torch.stack(images), "label": torch.tensor(labels), "path": list(paths)}


def _labelled(images: dict[str, list[Path]]) -> list[tuple[Path, int]]:
    return [(path, label) for label, paths in enumerate(images.values()) for path in paths]

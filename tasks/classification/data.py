"""Images in class folders or tar shards, timm's augmentation for training, the field's centre crop for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from evmamba.errors import UserError
from evmamba.tasks.classification import staging
from evmamba.tasks.classification.augment import (
    NORMALISE,
    Begun,
    Patch,
    TrainingAugmentation,
    gather,
    normalise,
)
from evmamba.tasks.classification.folders import FolderImages, read_folders
from evmamba.tasks.classification.on_device import (
    DrawnAugmentation,
    EncodedImages,
    EncodedSample,
    decode_and_augment,
    encoded,
)
from evmamba.tasks.classification.shards import ShardImages, list_shards, read_shards
from evmamba.tasks.data import SPLITS, TEST, TaskDataModule, files_digest, stage
from evmamba.tasks.images import BadImagePolicy, check_decoder
from evmamba.tasks.training.randomness import InTwoParts

Sample = tuple[Tensor, int, str]
TrainingSample = tuple[Tensor, int, str, list[Patch]]
BegunSample = tuple[Begun, int, str]


class ImageList(Dataset[Sample]):
    """(image [3, H, W] normalised, label, file name) for images of folders or shards, for evaluation."""

    def __init__(self, images: FolderImages | ShardImages, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images.read(index)
        return self.transform(image), int(self.images.labels[index]), str(self.images.path(index))


class TrainingImages(InTwoParts):
    """(uint8 [3, H, W], label, file name, what to write over the normalised image) for images of folders or shards."""

    def __init__(self, images: FolderImages | ShardImages, augment: TrainingAugmentation) -> None:
        self.images = images
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def begin(self, index: int) -> BegunSample:
        """Decode and crop, and draw what is to be done."""
        with stage("read and decode"):
            region = self.images.read_region(index, self.augment.draw_region)
        return self.augment.begin(region), int(self.images.labels[index]), str(self.images.path(index))

    def finish(self, begun: Sequence[BegunSample]) -> list[TrainingSample]:
        """Do what was drawn."""
        crops = self.augment.finish([crop for crop, *_ in begun])
        return [
            (pixels, label, path, patches) for (pixels, patches), (_, label, path) in zip(crops, begun, strict=True)
        ]


class ClassificationData(TaskDataModule):
    """``train/<class>/<image>`` and ``val/<class>/<image>``, or tar shards ``train/*.tar`` and ``val/*.tar``.

    Batches: dict of ``image`` [B, 3, image_size, image_size] float32 with ImageNet mean and deviation, ``label`` [B]
    int64, ``path`` list of B file names. Training's loader hands out ``image`` as uint8 and ``erased`` beside it; the
    trainer makes the normalised image of both on the device (`on_after_batch_transfer`), or, with ``augment_on`` told
    so, of ``encoded`` and ``erased``. Class k is the k-th folder name in sorted order; shards number it themselves.

    Shards made of folders by `evmamba data shard` give the same batches in the same order, and the same fingerprint.

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
        auto_augment: timm's description of a policy, e.g. "rand-m9-mstd0.5-inc1", or None; "rand19-..." instead of
            "rand-..." draws from the nineteen operations behind the published logs (see `randaugment`).
        random_erasing: probability of erasing a rectangle with noise per pixel.
        augment_on: where training images are decoded and augmented: "cpu" (the loading processes do it) or "device"
            (the trainer's, a GPU with CUDA; the loading processes then read and draw). See `on_device`.
        seed: of the training order.
        held_out: share of the training images to evaluate on in place of the validation split, see `TaskDataModule`.
        staging_dir: folder on each node's own disk to copy shards to first, see `staging.stage`; None reads in place.

    Raises:
        UserError: what :mod:`evmamba.tasks.classification.folders` or `.shards` finds wrong, or options that timm
            refuses.
    """

    task: ClassVar[str] = "classification"
    train_set: TrainingImages | EncodedImages
    val_set: ImageList
    test_set: ImageList | None = None

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
        staging_dir: str | None = None,
        held_out: float = 0.0,
        augment_on: Literal["cpu", "device"] = "cpu",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, on_bad_image, seed, held_out)
        if image_size < 32:
            raise UserError(f"data.image_size must be at least 32, not {image_size}")
        if not 0 < crop_ratio <= 1:
            raise UserError(f"data.crop_ratio must be in (0, 1], not {crop_ratio}")
        if not 0 < min_scale <= 1:
            raise UserError(f"data.min_scale must be in (0, 1], not {min_scale}")
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip must be in [0, 1], not {flip}")
        self.image_size = image_size
        self.crop_ratio = crop_ratio
        self.sharded = any(list_shards(self.root, split) for split in SPLITS)
        if staging_dir is not None and not self.sharded:
            raise UserError(
                f"data.staging_dir copies tar shards, but {self.root} holds folders; make shards of them with "
                "`evmamba data shard`, or leave the option out"
            )
        self.staging_dir = staging_dir
        self._rows: dict[str, int] = {}
        self._images: dict[str, FolderImages] | dict[str, ShardImages]
        self._images, self.class_names = read_shards(self.root) if self.sharded else read_folders(self.root)
        self.has_test = TEST in self._images
        self.num_classes = len(self.class_names)
        self.works_on_device = augment_on == "device"
        augmentation = DrawnAugmentation if self.works_on_device else TrainingAugmentation
        self.augment = augmentation(image_size, min_scale, flip, color_jitter, auto_augment, random_erasing)
        self.eval_transform = evaluation_transform(image_size, crop_ratio)

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        """Training and validation images; those in shards have the names that unpacking would give them."""
        train, val = (self._paths(split) for split in SPLITS)
        return train, val

    def test_paths(self) -> list[Path]:
        return self._paths(TEST) if self.has_test else []

    def _paths(self, split: str) -> list[Path]:
        images = self._images[split]
        return [images.path(k) for k in range(len(images))]

    def fingerprint(self) -> str:
        """Of shards as of the folders that they were made from."""
        if not self.sharded:
            return super().fingerprint()
        sized = (
            (f"{split}/{images.name(k)}", images.size_of(k))
            for split, images in self._images.items()
            for k in range(len(images))
        )
        return files_digest(self.class_names, sized).hexdigest()[:16]

    def prepare_data(self) -> None:
        """Stage the shards; Lightning calls this in one process of every node, before `setup`."""
        self._staged()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None:
            self.check_device(self.trainer.strategy.root_device)
        if hasattr(self, "val_set"):
            return  # fit and test share one data module
        images = self._staged()  # finds the copies there, except where nobody called prepare_data
        train = self._readable(images["train"], "train")
        if self.held_out:
            names = [train.name(k) for k in range(len(train))]
            stay, held = self.held_out_rows(names, [int(label) for label in train.labels])
            train, val = train.select(stay), train.select(held)
        else:
            val = self._readable(images["val"], "val")
        if isinstance(self.augment, DrawnAugmentation):
            self.train_set = EncodedImages(train, self.augment)
        else:
            self.train_set = TrainingImages(train, self.augment)
        self.val_set = ImageList(val, self.eval_transform)
        if TEST in images and not self.held_out:
            self.test_set = ImageList(self._readable(images[TEST], TEST), self.eval_transform)

    def check_device(self, device: torch.device) -> None:
        if self.works_on_device:
            check_decoder(device, "data.augment_on=device")

    def read_image(self, path: str) -> Image.Image:
        """A tested image by the name that its batch gave it."""
        images = self._tested.images
        if not self._rows:
            self._rows = {str(images.path(k)): k for k in range(len(images))}
        return images.read(self._rows[path])

    @contextmanager
    def evaluated_at(self, side: int) -> Iterator[None]:
        tested = self._tested
        own = tested.transform
        tested.transform = evaluation_transform(side, self.crop_ratio)
        try:
            yield
        finally:
            tested.transform = own

    @property
    def _tested(self) -> ImageList:
        return self.val_set if self.test_set is None else self.test_set

    def collate(self, samples: list[Sample] | list[TrainingSample] | list[EncodedSample]) -> dict[str, Any]:
        images, labels, paths, *drawn = zip(*samples, strict=True)
        batch: dict[str, Any] = {"label": torch.tensor(labels), "path": list(paths)}
        if drawn:
            batch["erased"] = gather(drawn[0])
        return batch | ({"encoded": encoded(images, drawn[1])} if len(drawn) > 1 else {"image": _stacked(images)})

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        here = {"encoded": batch["encoded"]} if "encoded" in batch else {}  # decoders take bytes from main memory
        rest = {key: value for key, value in batch.items() if key not in here}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | here

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if "erased" not in batch:
            return batch
        erased = batch.pop("erased")
        if "encoded" in batch:
            images, device = self.train_set.images, batch["label"].device
            batch["image"] = decode_and_augment(batch.pop("encoded"), images, self.image_size, device)
        return batch | {"image": normalise(batch["image"], erased)}

    def _staged(self) -> dict[str, FolderImages] | dict[str, ShardImages]:
        """The images, with shards copied to this node's disk if that is asked for."""
        if self.staging_dir is None:
            return self._images
        shards = {split: images for split, images in self._images.items() if isinstance(images, ShardImages)}
        copies = iter(staging.stage([file for images in shards.values() for file in images.files], self.staging_dir))
        return {split: images.with_files([next(copies) for _ in images.files]) for split, images in shards.items()}

    def _readable(self, images: FolderImages | ShardImages, split: str) -> FolderImages | ShardImages:
        paths = [images.path(k) for k in range(len(images))]
        readable = set(self.readable(paths, split, lambda _, policy: images.find_unreadable(policy)))
        if len(readable) == len(paths):
            return images
        return images.select([k for k, path in enumerate(paths) if path in readable])


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """[B, 3, H, W]; a pixel's colours stay side by side where they are: turning is left to the device."""
    if images[0].dtype != torch.uint8:
        return torch.stack(list(images))
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def evaluation_transform(image_size: int, crop_ratio: float) -> Callable[[Image.Image], Tensor]:
    """From an RGB image to a normalised [3, image_size, image_size]: short side resized, bicubic, then the centre."""
    return create_transform(image_size, is_training=False, interpolation="bicubic", crop_pct=crop_ratio, **NORMALISE)

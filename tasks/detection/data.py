"""Detection data in COCO's layouts, and in YOLO's."""

import hashlib
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from evmamba.errors import UserError, first_few
from evmamba.tasks.data import TEST, Split, TaskDataModule, fingerprint, stage
from evmamba.tasks.detection.annotations import (
    CocoAnnotations,
    ImageRecord,
    categories,
    load_coco_json,
    read_annotations,
    to_rle,
)
from evmamba.tasks.detection.yolo import find_yolo, has_test, yolo_split
from evmamba.tasks.images import FORMATS, BadImagePolicy, is_turned, read_pixels
from evmamba.tasks.module import TaskModule
from evmamba.tasks.plain_files import is_file
from evmamba.tasks.training.samplers import OrientedTrainingSampler, TrainingSampler


class DetectionData(TaskDataModule):
    """Images with boxes, and masks where the module wants them.

    Layouts: ``train2017/ val2017/ annotations/instances_{train,val}2017.json`` as COCO comes, or ``images/{train,val}``
    with ``annotations/instances_{train,val}.json``; or, without these, a ``data.yaml`` as YOLO has it.

    Evaluation is at one image a batch: EfficientVMamba's squeeze-and-excitation pools over the whole map, so the
    padding of a larger batch would change the predictions.

    Args:
        data_dir: the data set's root, or "embedded".
        batch_size: training images per process and step.
        num_workers: loading processes.
        on_bad_image: "stop" or "skip".
        seed: of the training order.
        horizontal_flip: probability.
        vertical_flip: probability; for pictures without an up, such as cells or aerial views.
        photometric_distortion: random brightness, contrast, saturation and hue.
        random_crop: probability of a `RangeCrop` before the detector resizes; 0.5 in DETR's and Swin's long schedules.
        group_by_orientation: training batches are all landscape or all portrait, so that little of them is padding.
        train_without_boxes: keep training images without boxes (they teach what background is).
        masks: read masks; None leaves it to the module (Mask R-CNN wants them).
        held_out: share of the training images to evaluate on in place of the validation split, see `TaskDataModule`.

    Raises:
        UserError: no such layout, or a broken annotation file (training's is read in `setup`).
    """

    task = "detection"

    def __init__(
        self,
        data_dir: str = "embedded",
        batch_size: int = 2,
        num_workers: int = 2,
        on_bad_image: BadImagePolicy = "stop",
        seed: int = 0,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        photometric_distortion: bool = False,
        random_crop: float = 0.0,
        group_by_orientation: bool = True,
        train_without_boxes: bool = True,
        masks: bool | None = None,
        held_out: float = 0.0,
    ) -> None:
        super().__init__(data_dir, batch_size, 1, num_workers, on_bad_image, seed, held_out)
        self.splits: dict[Split, tuple[Path, Path]] = {
            "train": find_split(self.root, "train", on_bad_image),
            "val": find_split(self.root, "val", on_bad_image),
        }
        if test := find_test_split(self.root, on_bad_image):
            self.splits[TEST] = test
        self.has_test = TEST in self.splits
        self.category_ids, names = categories(load_coco_json(self.annotation_file))
        self.class_names = list(names)
        self.num_classes = len(names)
        self.group_by_orientation = group_by_orientation
        self.train_without_boxes = train_without_boxes
        self.masks = masks
        self.counts: dict[str, dict[str, int]] = {}
        self._train_transform = _transform(horizontal_flip, vertical_flip, photometric_distortion, random_crop)
        self._sets: dict[Split, CocoDataset] = {}

    @property
    def annotation_file(self) -> Path:
        """The one that decides the evaluation: of the validation split, or of the training images that are held out."""
        return self.splits["train" if self.held_out else "val"][1]

    @property
    def test_file(self) -> Path:
        """The one that decides a test."""
        return self.splits[TEST][1] if self.tested_on == TEST else self.annotation_file

    @property
    def train_set(self) -> Dataset:  # type: ignore[override]
        return self._sets["train"]

    @property
    def val_set(self) -> Dataset:  # type: ignore[override]
        return self._sets["val"]

    @property
    def test_set(self) -> Dataset | None:  # type: ignore[override]
        return self._sets.get(TEST)

    def fit_to(self, module: TaskModule) -> None:
        if self.masks is None:
            self.masks = getattr(module, "wants_masks", False)

    def setup(self, stage: str) -> None:
        """Read and check the annotations and look at every image's header.

        Raises:
            UserError: broken annotations, categories that differ between the splits, missing or unreadable images,
                images of another size than annotated, nothing to train on or to evaluate against, masks wanted and
                missing.
        """
        if self.trainer is not None:
            self.fit_to(self.trainer.lightning_module)  # type: ignore[arg-type]
        masks = bool(self.masks)
        wanted: tuple[Split, ...] = ("train", "val") if stage == "fit" else ("val",)
        if stage == "test" and self.tested_on == TEST:
            wanted = (TEST,)
        for split in wanted:
            if split not in self._sets:
                self._sets[split] = self._read(split, masks)

    def training_sampler(self) -> TrainingSampler:
        if not self.group_by_orientation:
            return super().training_sampler()
        portrait = self._sets["train"].portrait
        return OrientedTrainingSampler(portrait, self.batch_size, self._rank, self._world, self.seed)

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        """The files of both splits that are there.

        Raises:
            UserError: some are not, and unreadable images are not to be skipped.
        """
        return self._listed_images("train"), self._listed_images("val")

    def test_paths(self) -> list[Path]:
        return self._listed_images(TEST) if self.has_test else []

    def description(self) -> dict[str, Any]:
        described = super().description()
        described["fingerprint"] = fingerprint(self.root, [], [described["fingerprint"], *self._annotation_digests])
        return described

    @cached_property
    def _annotation_digests(self) -> list[str]:
        """Of the files' bytes: a corrected box seldom changes a file's size."""
        digests = []
        for _, path in self.splits.values():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests

    def collate(self, samples: list[tuple[Tensor, dict[str, Any], str]]) -> dict[str, Any]:
        """Images stay lists: they differ in size and the detector resizes and pads them."""
        images, targets, paths = (list(column) for column in zip(*samples, strict=True))
        return {"images": images, "targets": targets, "path": paths}

    def _listed_images(self, split: Split) -> list[Path]:
        folder, file = self.splits[split]
        paths = [folder / image["file_name"] for image in load_coco_json(file)["images"]]
        missing = [path.name for path in paths if not is_file(path)]
        if missing and self.on_bad_image == "stop":
            raise UserError(
                f"{file} names {len(missing)} images that are not in {folder} ({first_few(missing, 3)}); add them, or "
                "leave them out with data.on_bad_image=skip"
            )
        return [path for path in paths if is_file(path)] if missing else paths

    def _read(self, split: Split, masks: bool) -> "CocoDataset":
        place: Split = "train" if self.held_out else split
        folder, file = self.splits[place]
        annotations = read_annotations(file, masks=masks)
        self._check_categories(annotations)
        self.counts[split] = annotations.counts
        rank_zero_info(annotations.summary())
        if not annotations.counts["boxes"]:
            raise UserError(
                f"{file} has no usable box: nothing to {'train on' if split == 'train' else 'evaluate with'}"
            )
        records = annotations.images
        if self.held_out:
            stay, held = self.held_out_rows([record.file_name for record in records])
            records = [records[k] for k in (stay if split == "train" else held)]
        if split == "train" and not self.train_without_boxes:
            records = [record for record in records if len(record.boxes)]
        self._listed_images(place)
        readable = set(self.readable([folder / record.file_name for record in records], file.name))
        records = [record for record in records if folder / record.file_name in readable]
        check_sizes(folder, records, file)
        training = split == "train"
        return CocoDataset(folder, records, masks, self._train_transform if training else _transform(), training)

    def _check_categories(self, annotations: CocoAnnotations) -> None:
        ours = dict(zip(self.category_ids, self.class_names, strict=True)).items()
        theirs = dict(zip(annotations.category_ids, annotations.class_names, strict=True)).items()
        if ours != theirs:
            odd = first_few(f"{name} (id {identity})" for identity, name in sorted(ours ^ theirs))
            raise UserError(
                f"the categories of {annotations.path} and {self.annotation_file} differ: {odd}; "
                "write the same list into both"
            )


def find_test_split(root: Path, on_bad_image: BadImagePolicy = "stop") -> tuple[Path, Path] | None:
    """Image folder and annotation file of a labelled test split, where there is one."""
    if description := yolo_of(root):
        return yolo_split(description, TEST, on_bad_image) if has_test(description) else None
    layouts = _layouts(root, TEST)
    return next(((folder, file) for folder, file in layouts if is_file(file) and folder.is_dir()), None)


class CocoDataset(Dataset):
    """Images as float [3, H, W] in 0..1 with their targets, in the annotation file's order.

    A target holds boxes [n, 4] float32 (x1 y1 x2 y2, pixels), labels [n] int64 (0..C-1), image_id as in the file, and
    masks [n, H, W] uint8 if asked for.

    Attributes:
        portrait: for every image whether it is higher than wide.
    """

    def __init__(
        self, folder: Path, records: Sequence[ImageRecord], masks: bool, transform: v2.Transform, training: bool = False
    ) -> None:
        self.folder = folder
        self.training = training
        self.masks = masks
        self.transform = transform
        self.portrait = [record.width < record.height for record in records]
        # Bytes, because loading processes would copy a million small Python objects by touching their reference counts.
        self._records = [pickle.dumps(record) for record in records]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any], str]:
        record: ImageRecord = pickle.loads(self._records[index])
        path = self.folder / record.file_name
        with stage("read and decode"):
            image = read_annotated_image(path, record.width, record.height, exact=not self.training).contiguous()
        with stage("targets"):
            target = self._target(record)
        with stage("augment"):
            image, target = self.transform(image, target)
        return image, target | {"image_id": record.image_id}, str(path)

    def _target(self, record: ImageRecord) -> dict[str, Any]:
        size = (record.height, record.width)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(record.labels),
        }
        if self.masks:
            masks = [mask_utils.decode(to_rle(segmentation, *size)) for segmentation in record.segmentations]
            target["masks"] = tv_tensors.Mask(np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8))
        return target


def _layouts(root: Path, split: Split) -> tuple[tuple[Path, Path], ...]:
    return (
        (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"),
        (root / "images" / split, root / "annotations" / f"instances_{split}.json"),
    )


def yolo_of(root: Path) -> Path | None:
    """The file that describes a data set in YOLO's layout; where there are COCO's annotations, they are meant."""
    annotated = any(is_file(file) for _, file in _layouts(root, "train"))
    return None if annotated else find_yolo(root)


def find_split(root: Path, split: Split, on_bad_image: BadImagePolicy = "stop") -> tuple[Path, Path]:
    """Image folder and annotation file of a split, in any of the layouts.

    Args:
        root: of the data set.
        split: which one.
        on_bad_image: see `yolo_split`; COCO's annotations say how large an image is without reading it.

    Raises:
        UserError: none is there, or its images are not; what `yolo_split` finds wrong.
    """
    if description := yolo_of(root):
        return yolo_split(description, split, on_bad_image)
    layouts = _layouts(root, split)
    for folder, file in layouts:
        if is_file(file):
            if not folder.is_dir():
                raise UserError(f"{file} is there, but its image folder {folder} is not")
            return folder, file
    raise UserError(
        f"no detection data in {root}: there is neither {layouts[0][1]} nor {layouts[1][1]} (COCO) nor data.yaml (YOLO)"
    )


def read_annotated_image(path: Path, width: int, height: int, exact: bool = True) -> Tensor:
    """Read an image so that its pixels are those that were annotated.

    Annotation tools show a picture upright, as its EXIF orientation says; COCO's own tools ignore EXIF. Where a quarter
    turn makes the two differ in size, the annotated size tells which was used; otherwise upright wins.

    Returns:
        uint8 [3, height, width]; `exact` as in :func:`evmamba.tasks.images.read_pixels`.

    Raises:
        UserError: unreadable, or of another size either way.
    """
    for upright in (True, False):
        pixels = read_pixels(path, upright=upright, exact=exact)
        if pixels.shape[1:] == (height, width):
            return pixels
    raise UserError(f"{path} is {pixels.shape[2]}x{pixels.shape[1]}, but annotated as {width}x{height}")


def check_sizes(folder: Path, records: Sequence[ImageRecord], file: Path) -> None:
    """Compare the images' headers with the annotated sizes.

    Raises:
        UserError: some differ, so their boxes would be wrong; names the first ones.
    """

    def wrong(record: ImageRecord) -> str | None:
        with Image.open(folder / record.file_name, formats=FORMATS) as image:
            width, height = image.size
            turned = is_turned(image)
        annotated = (record.width, record.height)
        if annotated == (width, height) or (turned and annotated == (height, width)):
            return None
        return f"{record.file_name} is {width}x{height}, not {record.width}x{record.height}"

    with ThreadPoolExecutor() as pool:
        offenders = [text for text in pool.map(wrong, records) if text]
    if offenders:
        raise UserError(f"{len(offenders)} images differ in size from {file}: {first_few(offenders, 3)}")


class RangeCrop(v2.Transform):
    """A random part of an image, as DETR's and Swin's multi-scale training crops: scaled until the short side is one of
    `short_sides`, a part whose sides lie between `smallest` and `largest` pixels (at most the image's own), at a random
    place. The part is cut from the unscaled image, so that it is resampled once, by the detector. Boxes are clipped;
    those (with labels and masks) of which less than a pixel is left are dropped.
    """

    def __init__(
        self, short_sides: Sequence[int] = (400, 500, 600), smallest: int = 384, largest: int = 600, longest: int = 1333
    ) -> None:
        super().__init__()
        self.short_sides = tuple(short_sides)
        self.smallest, self.largest, self.longest = smallest, largest, longest
        self._drop_empty = v2.SanitizeBoundingBoxes(min_size=1)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        sides = v2.functional.get_size(flat_inputs[0])
        short = self.short_sides[_uniform(0, len(self.short_sides) - 1)]
        scale = min(short / min(sides), self.longest / max(sides))
        lengths = []
        for side in sides:
            scaled = max(1, round(side * scale))
            length = _uniform(min(self.smallest, scaled), min(self.largest, scaled))
            lengths.append(min(side, max(1, round(length / scale))))
        top, left = (_uniform(0, side - length) for side, length in zip(sides, lengths, strict=True))
        return {"top": top, "left": left, "height": lengths[0], "width": lengths[1]}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)

    def forward(self, *inputs: Any) -> Any:
        return self._drop_empty(super().forward(*inputs))


def _uniform(low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def _transform(
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
    photometric_distortion: bool = False,
    random_crop: float = 0.0,
) -> v2.Transform:
    steps: list[v2.Transform] = [v2.ToImage()]
    if photometric_distortion:
        steps.append(v2.RandomPhotometricDistort())
    if random_crop:
        steps.append(v2.RandomApply([RangeCrop()], p=random_crop))
    steps += [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose(
        [*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]
    )

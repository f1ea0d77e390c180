"""Images with a label file of the same name, in ADE20K's layout."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from evmamba.errors import UserError, first_few, printable
from evmamba.tasks.data import TEST, Split, TaskDataModule, stage
from evmamba.tasks.images import BadImagePolicy, handle_unreadable, is_image_file, read_pixels
from evmamba.tasks.plain_files import is_file, read_text
from evmamba.tasks.segmentation.augment import TrainingAugmentation, normalise
from evmamba.tasks.segmentation.label_index import Pair, index_labels
from evmamba.tasks.segmentation.labels import LabelMap, read_label

SPLITS: dict[Split, str] = {"train": "training", "val": "validation"}

Sample = tuple[Tensor, Tensor, str]


class PairList(Dataset[Sample]):
    """(image [3, H, W] normalised, label [H, W] uint8 class indices, file name) for a list of pairs."""

    def __init__(
        self,
        pairs: list[Pair],
        label_map: LabelMap,
        augment: Callable[[Tensor, np.ndarray], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.pairs = pairs
        self.label_map = label_map
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        with stage("read and decode"):
            pixels, label = read_pair(pair, exact=self.augment is None)
            label = self.label_map.to_index(label)
        if self.augment is None:
            return normalise(pixels), torch.from_numpy(label), str(pair.image)
        with stage("augment"):
            return *self.augment(pixels, label), str(pair.image)


def read_pair(pair: Pair, exact: bool = True) -> tuple[Tensor, np.ndarray]:
    """Read an image (uint8 ``[3, h, w]``) and its label file (uint8 ``[h, w]``, numbers as in the file).

    The image stands upright as its EXIF data say, unless only the pixels as stored have the label's size; `exact` as in
    :func:`evmamba.tasks.images.read_pixels`.

    Raises:
        UserError: unreadable files, or sizes that differ.
    """
    label = read_label(pair.label)
    for upright in (True, False):
        pixels = read_pixels(pair.image, upright=upright, exact=exact)
        if pixels.shape[1:] == label.shape:
            return pixels, label
    height, width = label.shape
    raise UserError(f"label {pair.label} is {width}x{height} but its image is {pixels.shape[2]}x{pixels.shape[1]}")


class SegmentationData(TaskDataModule):
    """``images/{training,validation}/NAME.jpg`` with ``annotations/{training,validation}/NAME.png``.

    Batches: dict of ``image`` [B, 3, H, W] float32 with ImageNet mean and deviation, ``label`` [B, H, W] uint8 with
    class indices 0..C-1 or 255 where nothing counts, ``path`` list of B file names. Evaluation takes one image at a
    time at its own size: padding would change what the network's squeeze-excitation sees (the model's `inference`
    option resizes).

    Class names come from ``classes.txt`` (line k names label k, or label k - 1 without `reduce_zero_label`), else from
    ADE20K's own ``objectInfo150.txt``. Without both, `num_classes` counts, and without that the highest label in the
    files.

    Before training every label file is read once, in parallel, and the result is kept in the cache folder for the next
    start.

    Args:
        data_dir: the folder with images/ and annotations/, or "embedded".
        num_classes: number of classes C, where no file names them.
        reduce_zero_label: True: labels 1..C are classes and 0 counts nowhere; False: labels 0..C-1 are classes; None:
            True unless `ignore_label` is set to another number than 0.
        ignore_label: label in the files that counts nowhere, e.g. 255.
        crop_size: side of the training crops in pixels.
        scale: range of the random training scale.
        short_side: scale 1 gives the image's short side so many pixels; None: its own size.
        max_class_share: training crops of which one class fills more are drawn again.
        flip: probability of a horizontal flip.
        photometric_distortion: random brightness, contrast, saturation and hue.
        antialias: smooth training images ahead of reducing them; mmsegmentation does not.
        batch_size: training images per process and step.
        num_workers: loading processes.
        on_bad_image: "stop" before training, or "skip" unreadable images and labels with a counted warning.
        seed: of the training order.
        held_out: share of the training images to evaluate on in place of the validation split, see `TaskDataModule`.

    Raises:
        UserError: missing folders, images without label and labels without image, contradicting class counts; in
            `setup` unreadable files, labels of another size than their image, labels out of range.
    """

    task: ClassVar[str] = "segmentation"

    def __init__(
        self,
        data_dir: str = "embedded",
        num_classes: int | None = None,
        reduce_zero_label: bool | None = None,
        ignore_label: int | None = None,
        crop_size: int = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        max_class_share: float = 0.75,
        flip: float = 0.5,
        photometric_distortion: bool = True,
        antialias: bool = True,
        batch_size: int = 16,
        num_workers: int = 2,
        on_bad_image: BadImagePolicy = "stop",
        seed: int = 0,
        held_out: float = 0.0,
    ) -> None:
        super().__init__(data_dir, batch_size, 1, num_workers, on_bad_image, seed, held_out)
        self.augment = TrainingAugmentation(
            crop_size, scale, short_side, max_class_share, flip, photometric_distortion, antialias
        )
        self._pairs = {split: find_pairs(self.root, folder) for split, folder in folders_of(self.root).items()}
        self.has_test = TEST in self._pairs
        names = read_class_names(self.root)
        if names and num_classes not in (None, len(names)):
            raise UserError(f"data.num_classes={num_classes}, but {self.root} names {len(names)} classes; leave it out")
        if not names:
            # Only to know where labels begin: the number of classes does not matter for that.
            first = LabelMap(1, reduce_zero_label, ignore_label).first
            count = num_classes or self._highest_label(first, ignore_label) + 1 - first
            names = [f"class {k + first}" for k in range(count)]
        self.class_names = names
        self.num_classes = len(names)
        self.label_map = LabelMap(self.num_classes, reduce_zero_label, ignore_label)

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        return [pair.image for pair in self._pairs["train"]], [pair.image for pair in self._pairs["val"]]

    def test_paths(self) -> list[Path]:
        return [pair.image for pair in self._pairs.get(TEST, [])]

    def label_paths(self) -> list[Path]:
        return [pair.label for pairs in self._pairs.values() for pair in pairs]

    def setup(self, stage: str) -> None:
        if hasattr(self, "val_set"):
            return  # fit and test share one data module
        train = self._checked("train")
        if self.held_out:
            stay, held = self.held_out_rows([pair.image.stem for pair in train])
            train, val = [train[k] for k in stay], [train[k] for k in held]
        else:
            val = self._checked("val")
        self.train_set = PairList(train, self.label_map, self.augment)
        self.val_set = PairList(val, self.label_map)
        if TEST in self._pairs and not self.held_out:
            self.test_set = PairList(self._checked(TEST), self.label_map)

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        images, labels, paths = zip(*samples, strict=True)
        return {"image": torch.stack(images), "label": torch.stack(labels), "path": list(paths)}

    def _checked(self, split: Split) -> list[Pair]:
        """The readable pairs of a split, all with labels that fit; rank 0 looks, all ranks agree."""
        readable = set(self.readable([pair.image for pair in self._pairs[split]], SPLITS.get(split, split)))
        pairs = [pair for pair in self._pairs[split] if pair.image in readable]
        index = index_labels(pairs) if self._rank == 0 else None
        if self._world > 1:
            assert self.trainer is not None
            index = self.trainer.strategy.broadcast(index)
        assert index is not None
        unreadable = {Path(name): reason for name, reason in index.unreadable.items()}
        handle_unreadable(unreadable, len(pairs), self.on_bad_image, f"{SPLITS.get(split, split)} label")
        index.check(self.label_map, len(pairs))
        return [pair for pair in pairs if pair.label not in unreadable]

    def _highest_label(self, first: int, ignore_label: int | None) -> int:
        """The number of the last class, told from the label files themselves."""
        found = index_labels([pair for pairs in self._pairs.values() for pair in pairs]).first_file
        classes = sorted(value for value in found if value >= first and value != ignore_label)
        # Labels that leave out more than they use are colours, marks or masks, not numbered classes.
        if not classes or 2 * len(classes) < classes[-1] + 1 - first:
            labels = first_few(sorted(found), 8)
            raise UserError(
                f"the number of classes is not known: {self.root} has no classes.txt and its labels ({labels}) "
                f"are not numbered from {first} on; write classes.txt (one name a line) or set data.num_classes"
            )
        rank_zero_info(f"{self.root} has no classes.txt; the highest label in it is {classes[-1]}")
        return classes[-1]


def folders_of(root: Path) -> dict[Split, str]:
    """The folder of each split below images/ and annotations/; of a test split where it has label files."""
    return SPLITS | ({TEST: TEST} if (root / "annotations" / TEST).is_dir() else {})


def find_pairs(root: Path, split: str) -> list[Pair]:
    """Images and label files of one split, by name without suffix, in sorted order.

    Raises:
        UserError: a missing or empty folder, an image without label, a label without image, two images of one name.
    """
    images = _by_stem(root / "images" / split, "images", is_image_file)
    labels = _by_stem(root / "annotations" / split, "PNG labels", lambda path: path.suffix.lower() == ".png")
    for ours, theirs, kind, other, place in (
        (images, labels, "image", "label", root / "annotations" / split),
        (labels, images, "label", "image", root / "images" / split),
    ):
        alone = [ours[stem] for stem in ours if stem not in theirs]
        if alone:
            found = first_few(alone, 3)
            raise UserError(f"{kind} without {other} of the same name in {place}: {found}; add or remove it")
    return [Pair(images[stem], labels[stem]) for stem in images]


def _by_stem(folder: Path, what: str, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(
            f"folder not found: {folder}; segmentation data has images/{{training,validation}} and "
            "annotations/{training,validation}"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not wanted(path):
            continue
        if not is_file(path):
            raise UserError(f"{path} has the name of one of the {what}, but is no file, or a link that leads nowhere")
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path.name} have the same name, so their label is not clear")
        found[path.stem] = path
    if not found:
        raise UserError(f"no {what} in {folder}")
    return found


def read_class_names(root: Path) -> list[str]:
    """Names from ``classes.txt`` or ADE20K's ``objectInfo150.txt``; empty if the folder has neither.

    Raises:
        UserError: an empty file, an empty line between names, a name that stands twice, or a file that is not UTF-8.
    """
    if os.path.lexists(file := root / "classes.txt"):
        names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    elif os.path.lexists(file := root / "objectInfo150.txt"):  # columns: Idx, Ratio, Train, Val, Name
        rows = read_text(file).strip().splitlines()[1:]
        names = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    else:
        return []
    names = [printable(name) for name in names]
    if not any(names):
        raise UserError(f"{file} is empty; write one class name a line, line k for label k")
    if "" in names:
        raise UserError(f"{file} has an empty line {names.index('') + 1}; line k names label k, so give it a name")
    # ADE20K itself has two classes called "screen"; a table needs to tell them apart.
    return [f"{name} ({k + 1})" if names.count(name) > 1 else name for k, name in enumerate(names)]

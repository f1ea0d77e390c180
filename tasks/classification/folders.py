"""The ImageFolder layout, ``train/<class>/*`` and ``val/<class>/*``, and what can be wrong with it."""

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor

from evmamba.errors import UserError, first_few, printable
from evmamba.tasks.data import SPLITS, TEST
from evmamba.tasks.images import (
    BadImagePolicy,
    Jpeg,
    Region,
    find_unreadable,
    is_image_file,
    read_image,
    read_jpeg,
    read_pixels,
    read_region,
)
from evmamba.tasks.plain_files import is_file


@dataclass(frozen=True)
class FolderImages:
    """The images of one split, sorted by class and name.

    Arrays, because loading processes would copy a million small Python objects by touching their reference counts.

    Attributes:
        folder: what the names are relative to.
        names: [n] bytes, ``<class>/<image>``.
        labels: [n] int32.
    """

    folder: Path
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    def size_of(self, index: int) -> int:
        """Bytes of the image file."""
        return self.path(index).stat().st_size

    def read(self, index: int) -> Image.Image:
        """The image as RGB, see :func:`evmamba.tasks.images.read_image`."""
        return read_image(self.path(index))

    def read_pixels(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W], see :func:`evmamba.tasks.images.read_pixels`."""
        return read_pixels(self.path(index))

    def read_region(self, index: int, choose: Callable[[int, int], Region]) -> Tensor:
        """A region of the image, see :func:`evmamba.tasks.images.read_region`."""
        return read_region(self.path(index), choose)

    def read_jpeg(self, index: int) -> Jpeg | None:
        """The image before it is decoded, see :func:`evmamba.tasks.images.read_jpeg`."""
        return read_jpeg(self.path(index))

    def select(self, rows: Sequence[int]) -> Self:
        """Only these images."""
        return replace(self, names=self.names[rows], labels=self.labels[rows])

    def find_unreadable(self, policy: BadImagePolicy) -> dict[Path, str]:
        """Why images cannot be read, by path; see :func:`evmamba.tasks.images.find_unreadable`."""
        return find_unreadable([self.path(index) for index in range(len(self))], policy)


def read_folders(root: Path) -> tuple[dict[str, FolderImages], list[str]]:
    """Images of both splits, and of a test split with class folders where there is one; the class names, printable.

    Raises:
        UserError: see :func:`list_dataset`; or the test split has other classes.
    """
    listed = dict(zip(SPLITS, list_dataset(root), strict=True))
    if has_test(root, listed["train"]):
        listed[TEST] = list_split(root, TEST)
        if listed[TEST].keys() != listed["train"].keys():
            odd = first_few(sorted(listed[TEST].keys() ^ listed["train"].keys()))
            raise UserError(f"the class folders of train and test differ in {root}: {odd}")
    splits: dict[str, FolderImages] = {}
    for split, classes in listed.items():
        found = [(f"{name}/{path.name}", label) for label, name in enumerate(classes) for path in classes[name]]
        names = np.array([os.fsencode(name) for name, _ in found])
        splits[split] = FolderImages(root / split, names, np.array([label for _, label in found], dtype=np.int32))
    return splits, [printable(name) for name in listed["train"]]


def has_test(root: Path, classes: Container[str]) -> bool:
    """Whether there is a test split with class folders, which is a labelled one."""
    return (root / TEST).is_dir() and any(path.name in classes for path in (root / TEST).iterdir())


def list_split(root: Path, split: str) -> dict[str, list[Path]]:
    """List the images of one split.

    Only files directly in a class folder count; hidden files and folders, and files that are not images, are ignored.

    Returns:
        {class: sorted image files}, classes sorted by name as torchvision's ImageFolder does.

    Raises:
        UserError: no such folder, no class folders, or a class without images; says which.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(_wrong_level(root))
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        if not path.exists():
            raise UserError(f"{path} is a link that leads nowhere")
    classes = [path.name for path in entries if path.is_dir()]
    if not classes:
        loose = sum(is_image_file(path) for path in folder.iterdir())
        found = f"{loose} images lie directly in it" if loose else "it is empty"
        raise UserError(f"no class folders in {folder} ({found}); expected {folder}/<class>/<image>")
    images = {name: _images_in(folder / name) for name in classes}
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        nested = any(is_image_file(path) for path in (folder / empty[0]).rglob("*"))
        hint = "; images in folders below a class folder do not count" if nested else ""
        raise UserError(f"class folders without images in {folder}: {first_few(empty)}{hint}")
    return images


def list_dataset(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """List training and validation images by class, the same classes in both.

    Raises:
        UserError: see :func:`list_split`; or the splits' classes differ (named), or there is only one class.
    """
    train, val = (list_split(root, split) for split in SPLITS)
    if train.keys() != val.keys():
        parts = []
        for split, only in (("train", train.keys() - val.keys()), ("val", val.keys() - train.keys())):
            if only:
                parts.append(f"only in {split}: {first_few(sorted(only))}")
        raise UserError(f"the class folders of train and val differ in {root}: {'; '.join(parts)}")
    if len(train) < 2:
        raise UserError(f"only one class folder, {next(iter(train))}, in {root / 'train'}; at least two are needed")
    return train, val


def _images_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        # What the folder itself says of an entry costs nothing; only links have to be followed.
        found = {Path(e.path): e.is_file(follow_symlinks=False) or is_file(e.path) for e in entries}
    images = sorted(path for path in found if is_image_file(path))
    for path in images:
        if not found[path]:
            raise UserError(f"{path} has the name of an image, but is no file, or a link that leads nowhere")
    return images


def _wrong_level(root: Path) -> str:
    """Say that a split is missing, and where the data seems to be instead."""
    missing = " and ".join(f"{split}/" for split in SPLITS if not (root / split).is_dir())
    wrong = f"no {missing} in data folder {root}"
    for other in (root.parent, root.parent.parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        if all((other / split).is_dir() for split in SPLITS):
            return f"{wrong}; did you mean {other}?"
    found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    inside = f"it has {first_few(found)}" if found else "it is empty"
    return f"{wrong} ({inside}); expected train/<class>/ and val/<class>/"

"""The ImageFolder layout, ``train/<class>/*`` and ``val/<class>/*``, and what can be wrong with it."""

import os
from pathlib import Path

from evmamba.errors import UserError
from evmamba.tasks.images import is_image_file

SPLITS = ("train", "val")


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
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        loose = sum(is_image_file(path) for path in folder.iterdir())
        found = f"{loose} images lie directly in it" if loose else "it is empty"
        raise UserError(f"no class folders in {folder} ({found}); expected {folder}/<class>/<image>")
    images = {name: _images_in(folder / name) for name in classes}
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        nested = any(is_image_file(path) for path in (folder / empty[0]).rglob("*"))
        hint = "; images in folders below a class folder do not count" if nested else ""
        raise UserError(f"class folders without images in {folder}: {_some(empty)}{hint}")
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
                parts.append(f"only in {split}: {_some(sorted(only))}")
        raise UserError(f"the class folders of train and val differ in {root}: {'; '.join(parts)}")
    if len(train) < 2:
        raise UserError(f"only one class folder, {next(iter(train))}, in {root / 'train'}; at least two are needed")
    return train, val


def _images_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.is_file()]
    return sorted(path for path in paths if is_image_file(path))


def _wrong_level(root: Path) -> str:
    """Say that a split is missing, and where the data seems to be instead."""
    missing = " and ".join(f"{split}/" for split in SPLITS if not (root / split).is_dir())
    wrong = f"no {missing} in data folder {root}"
    for other in (root.parent, root.parent.parent, *sorted(path for path in root.iterdir() if path.is_dir())):
        if all((other / split).is_dir() for split in SPLITS):
            return f"{wrong}; did you mean {other}?"
    found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    return f"{wrong} ({'it has ' + _some(found) if found else 'it is empty'}); expected train/<class>/ and val/<class>/"


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""YOLO's layout: a ``data.yaml`` beside images and text files of boxes or polygons; read once, kept as COCO's JSON.

A line of a text file is ``class x y width height`` (the middle of a box) or ``class x1 y1 x2 y2 x3 y3 ...`` (a
polygon), as fractions of the upright image. The text file of ``.../images/a.jpg`` is ``.../labels/a.txt``; an image
without one has no objects. Source: docs.ultralytics.com/datasets/detect and /segment.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from evmamba.errors import UserError, first_line, printable
from evmamba.files import write_text
from evmamba.tasks.cache import cache_folder
from evmamba.tasks.data import TEST, Split
from evmamba.tasks.images import FORMATS, BadImagePolicy, handle_unreadable, is_image_file, is_turned
from evmamba.tasks.plain_files import is_file, read_text, read_yaml

NAMES = ("data.yaml", "dataset.yaml")
KEYS = ("train", "val", "names")
BOX = 5  # numbers of a line that is a box
# How far outside the image a fraction may be: annotation tools round.
ROUNDING = 1e-3


def find_yolo(root: Path) -> Path | None:
    """The file that describes a data set in this layout, if `root` has one."""
    return next((path for name in NAMES if is_file(path := root / name)), None)


def is_description(path: Path) -> bool:
    """Whether a file of that name is one of this layout: it says where train and val are, and the classes' names."""
    try:
        content = read_yaml(path)
    except UserError:
        return False
    return isinstance(content, dict) and all(key in content for key in KEYS)


def has_test(description: Path) -> bool:
    """Whether the description names a test split whose images have labels."""
    content = _read_description(description)
    try:
        return bool(content.get(TEST)) and any(is_file(_label_file(i)) for i in _images(content, description, TEST))
    except UserError:  # many descriptions name test images that nobody has
        return False


def yolo_split(description: Path, split: Split, on_bad_image: BadImagePolicy = "stop") -> tuple[Path, Path]:
    """Write a split's annotations as COCO's JSON into the cache folder, unless the same are there.

    Args:
        description: what `find_yolo` returns.
        split: "train", "val" or "test".
        on_bad_image: "stop" with an error, or "skip" images without a readable size with a counted warning.

    Returns:
        The folder that the images' names are relative to, and the JSON file. Category ids are YOLO's classes.

    Raises:
        UserError: a broken description, missing or unreadable images, a line that is no annotation; names file and
            line.
    """
    content = _read_description(description)
    images = list(_images(content, description, split))
    # A description may name folders elsewhere (`path`), a COCO file may not.
    here = os.path.normpath(description.parent.absolute())
    root = Path(os.path.commonpath([here, *(image.parent for image in images)]))
    classes = len(content["names"])
    sizes: dict[Path, tuple[int, int]] = {}
    bad: dict[Path, str] = {}
    with ThreadPoolExecutor() as pool:
        for image, size in zip(images, pool.map(_size, images), strict=True):
            if isinstance(size, str):
                bad[image] = size
            else:
                sizes[image] = size
        handle_unreadable(bad, len(images), on_bad_image, split)
        labels = list(pool.map(lambda image: _read_labels(_label_file(image), *sizes[image], classes), sizes))
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in content["names"].items()],
    }
    for number, ((image, (width, height)), annotations) in enumerate(zip(sizes.items(), labels, strict=True), start=1):
        name = Path(os.path.relpath(image, root)).as_posix()
        if name != printable(name):
            raise UserError(f"{image}: its name has characters that JSON cannot hold or nobody can read; rename it")
        document["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for annotation in annotations:
            numbered = {"id": len(document["annotations"]) + 1, "image_id": number, "iscrowd": 0}
            document["annotations"].append(numbered | annotation)
    text = json.dumps(document)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = cache_folder() / "yolo" / digest / f"instances_{split}.json"
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {file.parent} ({error.strerror}); set EVMAMBA_CACHE") from error
        write_text(file, text)
    return root, file


def _read_description(path: Path) -> dict[str, Any]:
    """The description, with ``names`` as class -> name from 0 on."""
    content = read_yaml(path)
    if not isinstance(content, dict) or any(key not in content for key in KEYS):
        raise UserError(f"{path}: a YOLO data set has train, val and names there")
    if content.get("kpt_shape"):
        raise UserError(f"{path}: a data set of keypoints (kpt_shape); boxes and polygons are read")
    names = content["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names or set(names) != set(range(len(names))):
        raise UserError(f"{path}: names must be a list, or number the classes from 0 on without gaps")
    return content | {"names": {k: printable(str(names[k])) for k in sorted(names)}}


def _images(content: dict[str, Any], description: Path, split: Split) -> Iterator[Path]:
    """The images of a split, sorted: of folders, or of text files that list them."""
    bases = [description.parent / str(content.get("path") or "."), description.parent]
    places = content[split] if isinstance(content[split], list) else [content[split]]
    found: dict[Path, None] = {}
    for place in places:
        path = _existing(bases, str(place), f"{description}: {split}")
        if path.is_dir():
            listed = [file for file in path.rglob("*") if is_image_file(file)]
        else:
            names = read_text(path).split("\n")
            listed = [_existing([path.parent, *bases], name.strip(), str(path)) for name in names if name.strip()]
        for file in listed:
            if not is_file(file):
                raise UserError(f"{file} has the name of an image, but is no file, or a link that leads nowhere")
            found[Path(os.path.normpath(file.absolute()))] = None
    if not found:
        raise UserError(f"{description}: no image under {', '.join(map(str, places))} ({split})")
    yield from sorted(found)


def _existing(bases: list[Path], place: str, where: str) -> Path:
    # Roboflow writes ../train/images for a folder beside the description.
    for name in dict.fromkeys((place, place.removeprefix("../"))):
        for base in bases:
            if os.path.exists(base / name):  # noqa: PTH110 (Path.exists raises for names that are too long)
                return base / name
    raise UserError(f"{where} names {place}, which is not there (looked in {bases[0]})")


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _size(path: Path) -> tuple[int, int] | str:
    """Width and height of the upright image, or why its header cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if is_turned(image) else (width, height)
    except Exception as error:  # whatever a decoder raises on a damaged file
        return f"{path}: {first_line(error)}"


def _read_labels(path: Path, width: int, height: int, classes: int) -> list[dict[str, Any]]:
    """An image's annotations without ids."""
    if not os.path.lexists(path):
        return []
    return [
        _read_line(line, f"{path}, line {number}", width, height, classes)
        for number, line in enumerate(read_text(path).splitlines(), start=1)
        if line.strip()
    ]


def _read_line(line: str, where: str, width: int, height: int, classes: int) -> dict[str, Any]:
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        raise UserError(f"{where}: '{line.strip()[:60]}' is not a class and its numbers") from None
    polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
    if not polygon and len(numbers) != BOX - 1:
        raise UserError(f"{where}: {1 + len(numbers)} numbers are neither a box (5) nor a polygon (odd, from 7 on)")
    if not (label.is_integer() and 0 <= label < classes):
        raise UserError(f"{where}: class {label:g} is not one of 0 to {classes - 1}")
    if not all(-ROUNDING <= number <= 1 + ROUNDING for number in numbers):
        raise UserError(f"{where}: coordinates are fractions of the image, from 0 to 1")
    scaled = [round(number * (width, height)[k % 2], 4) for k, number in enumerate(numbers)]
    if not polygon:
        x, y, w, h = scaled
        box = [round(x - w / 2, 4), round(y - h / 2, 4), w, h]
        return {"category_id": int(label), "bbox": box, "area": w * h}
    xs, ys = scaled[::2], scaled[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    area = abs(sum(xs[k - 1] * ys[k] - xs[k] * ys[k - 1] for k in range(len(xs)))) / 2
    return {"category_id": int(label), "bbox": box, "area": area, "segmentation": [scaled]}

"""COCO annotation files: read and checked before training starts.

The evaluation (`metrics.py`) uses the checked content as it stands; what `read_annotations` leaves out is left out of
training only.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from evmamba.errors import UserError, first_few, printable
from evmamba.tasks.plain_files import is_file, read_json

logger = logging.getLogger(__name__)

# Pixels. A box thinner than this counts as one of no area: after resizing in float32 its sides could coincide, which
# torchvision refuses in the middle of training.
MIN_SIDE = 0.1
# Pixels. Anything beyond, infinity included, is a mistake; float32 keeps whole pixels up to here.
MAX_COORDINATE = 2**24
# Ids are kept in 64 bits.
MAX_ID, MAX_FLOAT_ID = 2**63 - 1, 2**53
REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class NoMasksError(UserError):
    """Masks are wanted, and the file has not a single one."""


@dataclass(frozen=True)
class ImageRecord:
    """What one image teaches: no crowds, no boxes of no area, boxes clipped to the image.

    Attributes:
        image_id: the file's own id.
        file_name: relative to the image folder.
        width: pixels, as the file says.
        height: pixels, as the file says.
        boxes: [n, 4] float32, x1 y1 x2 y2 in pixels.
        labels: [n] int64, 0..C-1 in the order of the category ids.
        segmentations: n polygon lists or RLEs; empty unless masks were asked for.
    """

    image_id: int | str
    file_name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list[Any]


@dataclass(frozen=True)
class CocoAnnotations:
    """One checked annotation file.

    Attributes:
        path: the JSON file.
        category_ids: ascending, with their gaps; position k is label k.
        class_names: one name per category, made unique.
        images: one record per image, in the file's order.
        counts: boxes, crowds, no_area, clipped, without_mask (annotations) and without_boxes (images).
    """

    path: Path
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    images: list[ImageRecord]
    counts: dict[str, int]

    def summary(self) -> str:
        """One line about what was read and what training leaves out."""
        notes = {
            "crowds": "crowd regions not trained on",
            "no_area": "boxes of no area ignored",
            "without_mask": "annotations without a mask ignored",
            "clipped": "boxes clipped to their image",
            "without_boxes": "images without boxes",
        }
        said = [f"{self.counts[key]} {text}" for key, text in notes.items() if self.counts[key]]
        return f"{self.path.name}: {len(self.images)} images, {self.counts['boxes']} boxes" + "".join(
            f", {text}" for text in said
        )


def load_coco_json(path: Path, *, masks: bool = False) -> dict[str, Any]:
    """Read an annotation file and check it, so that neither training nor pycocotools meets a value of the wrong kind.

    Args:
        path: the JSON file.
        masks: check the segmentations as well, and bring them into pycocotools' form: a list of polygons (empty for
            none) or an RLE. Where nobody wants masks they may be anything.

    Returns:
        The content as pycocotools takes it: `info`, `iscrowd` and `area` (box area) are filled in where they are left
        out or null; nothing else is changed.

    Raises:
        UserError: the file is missing, broken, or not a COCO instance file; names the first faulty entry.
    """
    if not is_file(path):
        raise UserError(f"no annotation file {path}; see the COCO layouts in docs/data.md")
    content = read_json(path, allow_nan=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a COCO object with images and annotations")
    for section, keys in REQUIRED.items():
        _check_section(content, section, keys, path)
    if content.get("info") is None:
        content["info"] = {}
    _check_values(content, path, masks)
    return content


def categories(content: dict[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Category ids in ascending order and their names, printable; a name used twice gets its id added."""
    entries = sorted(content["categories"], key=lambda entry: entry["id"])
    uses = Counter(entry["name"] for entry in entries)
    names = [f"{entry['name']} ({entry['id']})" if uses[entry["name"]] > 1 else str(entry["name"]) for entry in entries]
    return tuple(entry["id"] for entry in entries), tuple(map(printable, names))


def read_annotations(path: Path, *, masks: bool = False) -> CocoAnnotations:
    """Read an annotation file for training.

    Args:
        path: the JSON file.
        masks: keep the segmentations; annotations without one are then no training targets.

    Raises:
        UserError: see `load_coco_json`; also when masks are wanted and there is none.
    """
    content = load_coco_json(path, masks=masks)
    category_ids, class_names = categories(content)
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    if masks and not any(has_mask(annotation) for annotation in content["annotations"]):
        raise NoMasksError(f"{path} holds no masks, which maskrcnn needs; use detector fasterrcnn or retinanet")
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)

    counts = dict.fromkeys(("boxes", "crowds", "no_area", "clipped", "without_mask", "without_boxes"), 0)
    records = []
    for image in content["images"]:
        width, height = image["width"], image["height"]
        boxes, labels, segmentations = [], [], []
        for annotation in by_image[image["id"]]:
            x, y, w, h = annotation["bbox"]
            box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
            if annotation["iscrowd"]:
                counts["crowds"] += 1
            elif min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
                counts["no_area"] += 1
            elif masks and not has_mask(annotation):
                counts["without_mask"] += 1
            else:
                # Annotation tools round: less than a pixel outside is not worth a word.
                counts["clipped"] += min(x, y, width - x - w, height - y - h) <= -1
                boxes.append(box)
                labels.append(label_of[annotation["category_id"]])
                if masks:
                    segmentations.append(annotation["segmentation"])
        counts["boxes"] += len(boxes)
        counts["without_boxes"] += not boxes
        records.append(
            ImageRecord(
                image["id"],
                image["file_name"],
                width,
                height,
                np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
                np.asarray(labels, dtype=np.int64),
                segmentations,
            )
        )
    return CocoAnnotations(path, category_ids, class_names, records, counts)


def has_mask(annotation: dict[str, Any]) -> bool:
    """Whether an annotation read with masks has an RLE or at least one polygon."""
    return bool(annotation["segmentation"])


def to_rle(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of polygons (several parts are one mask) or of either kind of RLE; sizes in pixels."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_utils.frPyObjects(segmentation, height, width)
        return segmentation
    return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))


def _check_section(content: dict[str, Any], section: str, keys: tuple[str, ...], path: Path) -> None:
    """The section is a list of objects with these keys."""
    entries = content.get(section)
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list '{section}'; it is not a COCO instance file")
    for position, entry in enumerate(entries):
        lacking = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if lacking:
            raise UserError(f"{path}: entry {position} of '{section}' lacks {', '.join(lacking)}")
    if not entries and section != "annotations":
        raise UserError(f"{path}: '{section}' is empty")


def _check_values(content: dict[str, Any], path: Path, masks: bool) -> None:
    """Every value that training or pycocotools reads is of the right kind, and ids are unique and known."""

    def refuse(kind: str, faults: list[tuple[Any, str | None]]) -> None:
        found = [f"{kind} {_shortened(identity)}: {fault}" for identity, fault in faults if fault]
        if found:
            raise UserError(f"{path}: {first_few(found, 1, '; ')}")

    def refuse_repeated(section: str) -> None:
        repeated = [identity for identity, count in Counter(e["id"] for e in content[section]).items() if count > 1]
        if repeated:
            raise UserError(f"{path}: {len(repeated)} ids occur twice in '{section}' ({first_few(repeated)})")

    images, annotations = content["images"], content["annotations"]
    refuse("category", [(category["id"], _category_fault(category)) for category in content["categories"]])
    refuse_repeated("categories")
    refuse("image", [(image["id"], _image_fault(image)) for image in images])
    refuse_repeated("images")
    if len({isinstance(image["id"], str) for image in images}) > 1:
        raise UserError(f"{path}: some image ids are numbers and some are strings; use one kind")
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    category_ids = {category["id"] for category in content["categories"]}
    refuse("annotation", [(entry["id"], _annotation_fault(entry, sizes, category_ids)) for entry in annotations])
    refuse_repeated("annotations")
    if masks:
        refuse("annotation", [(a["id"], _segmentation_fault(a, sizes[a["image_id"]])) for a in annotations])
    if any(annotation["id"] == 0 for annotation in annotations):
        logger.warning("%s: pycocotools takes annotation id 0 for 'not found'; number annotations from 1", path)


def _category_fault(category: dict[str, Any]) -> str | None:
    if not _is_whole(category["id"]):
        return "id is not a whole number"
    if not isinstance(category["name"], str | int):
        return f"name is not text: {_shortened(category['name'])}"
    return None


def _image_fault(image: dict[str, Any]) -> str | None:
    if not (_is_whole(image["id"]) or isinstance(image["id"], str)):
        return "id is neither a whole number nor a string"
    if not (isinstance(image["file_name"], str) and image["file_name"]):
        return f"file_name is not a name: {_shortened(image['file_name'])}"
    name = PurePath(image["file_name"])
    if name.is_absolute() or ".." in name.parts:
        return f"file_name leads out of the image folder: {_shortened(image['file_name'])}"
    for key in ("width", "height"):
        if not (type(image[key]) is int and 0 < image[key] <= MAX_COORDINATE):
            return f"{key} of {image['file_name']} is not a positive whole number: {_shortened(image[key])}"
    return None


def _annotation_fault(annotation: dict[str, Any], image_ids: Container[Any], category_ids: set[int]) -> str | None:
    """The fault of an annotation, if any; fills in `iscrowd` and `area`. Called a million times: keep it quick."""
    if not _is_whole(annotation["id"]):
        return "id is not a whole number"
    image_id, category_id, box = annotation["image_id"], annotation["category_id"], annotation["bbox"]
    if not isinstance(image_id, int | float | str) or image_id not in image_ids:
        return f"image_id {_shortened(image_id)} is not in the file"
    if not isinstance(category_id, int | float) or category_id not in category_ids:
        return f"category_id {_shortened(category_id)} is not in the file"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        return f"bbox is not four numbers x, y, width, height: {_shortened(box)}"
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
    elif annotation["iscrowd"] not in (0, 1):
        return f"iscrowd is not 0 or 1: {_shortened(annotation['iscrowd'])}"
    area = annotation.get("area")
    if area is None:
        annotation["area"] = box[2] * box[3]
    elif not (isinstance(area, int | float) and abs(area) <= MAX_COORDINATE**2):
        return f"area is not a number: {_shortened(area)}"
    return None


def _segmentation_fault(annotation: dict[str, Any], size: tuple[int, int]) -> str | None:
    """The fault of a segmentation, if any; brings it into pycocotools' form. `size` is height, width."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, size)
    if segmentation is None:
        segmentation = []
    if not isinstance(segmentation, list):
        return f"segmentation is neither polygons nor an RLE: {_shortened(segmentation)}"
    parts = [segmentation] if segmentation and not isinstance(segmentation[0], list) else segmentation
    reach = 2 * max(size)
    for part in parts:
        try:
            usable = isinstance(part, list) and abs(sum(part)) < math.inf
        except TypeError:
            usable = False
        if not usable:
            return f"a polygon is not a list of numbers x, y, x, y, ...: {_shortened(part)}"
        if part and not -reach <= min(part) <= max(part) <= reach:
            # pycocotools walks along every pixel of its sides.
            return f"a polygon reaches far beyond its image of {size[1]}x{size[0]}: {_shortened(part)}"
    # pycocotools takes four numbers for a box and fails on odd or fewer ones.
    annotation["segmentation"] = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0]
    return None


def _rle_fault(rle: dict[str, Any], size: tuple[int, int]) -> str | None:
    lacking = [key for key in ("counts", "size") if key not in rle]
    if lacking:
        return f"the RLE lacks {' and '.join(lacking)}"
    if rle["size"] != list(size):
        return f"the RLE is for size {_shortened(rle['size'])}, but the image is {list(size)} (height, width)"
    counts = rle["counts"]
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            return f"the RLE's counts do not add up to the image's {size[0] * size[1]} pixels"
    elif not (isinstance(counts, str) and counts):
        return f"the RLE's counts are neither numbers nor a string: {_shortened(counts)}"
    elif not _is_rle_of(counts, size[0] * size[1]):
        return f"the RLE's counts are damaged: they do not make the image's {size[0] * size[1]} pixels"
    return None


def _is_rle_of(text: str, pixels: int) -> bool:
    """Whether pycocotools' compressed counts add up to so many pixels: it trusts them with its memory.

    A count is written in groups of 5 bits, the low ones first, as characters from 48 on; a further bit says that
    another group follows, and the last group's high bit is the sign. From the fourth on, it is the difference to the
    count before the last.
    """
    if not text.isascii():
        return False
    groups = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return False
    last = np.flatnonzero(groups & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits
        return False
    shifts = 5 * (np.arange(len(groups)) - np.repeat(first, lengths))
    counts = np.add.reduceat((groups & 31) << shifts, first)
    counts -= np.where(groups[last] & 16 > 0, 1 << (5 * lengths), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return bool(counts.min() >= 0 and counts.sum() == pixels)


def _is_whole(value: Any) -> bool:
    """Also one that is written 7.0, as far as floats count in ones."""
    if type(value) is int:
        return -MAX_ID <= value <= MAX_ID
    return isinstance(value, float) and value.is_integer() and abs(value) <= MAX_FLOAT_ID


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and -MAX_COORDINATE < value < MAX_COORDINATE


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

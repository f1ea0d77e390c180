"""COCO annotation files: read and checked before training starts.

The evaluation (`metrics.py`) uses the file itself, as pycocotools reads it; what is left out here is left out of
training only.
"""

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from evmamba.errors import UserError

logger = logging.getLogger(__name__)

# Pixels. A box thinner than this counts as one of no area: after resizing in float32 its sides could coincide, which
# torchvision refuses in the middle of training.
MIN_SIDE = 0.1


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


def load_coco_json(path: Path) -> dict[str, Any]:
    """Read an annotation file and check its form: lists, required keys, ids that exist and do not repeat.

    Returns:
        The content as pycocotools takes it: `info`, `iscrowd` and `area` (box area) are filled in where a tool left
        them out; nothing else is changed.

    Raises:
        UserError: the file is missing, broken, or not a COCO instance file.
    """
    if not path.is_file():
        raise UserError(f"no annotation file {path}; see the COCO layouts in docs/data.md")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); download or export it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a COCO object with images and annotations")
    required = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for section, keys in required.items():
        _check_section(content, section, keys, path)
    _check_references(content, path)
    content.setdefault("info", {})
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return content


def categories(content: dict[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Category ids in ascending order and their names; a name used twice gets its id added."""
    entries = sorted(content["categories"], key=lambda entry: entry["id"])
    uses = Counter(entry["name"] for entry in entries)
    names = [f"{entry['name']} ({entry['id']})" if uses[entry["name"]] > 1 else str(entry["name"]) for entry in entries]
    return tuple(entry["id"] for entry in entries), tuple(names)


def read_annotations(path: Path, *, masks: bool = False) -> CocoAnnotations:
    """Read an annotation file for training.

    Args:
        path: the JSON file.
        masks: keep the segmentations; annotations without one are then no training targets.

    Raises:
        UserError: see `load_coco_json`; also when masks are wanted and there is none.
    """
    content = load_coco_json(path)
    category_ids, class_names = categories(content)
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    if masks and not any(has_mask(annotation) for annotation in content["annotations"]):
        raise UserError(f"{path} holds no masks, which maskrcnn needs; use detector fasterrcnn or retinanet")
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
                    segmentations.append(_checked_segmentation(annotation, image, path))
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
    """Whether the annotation has an RLE or at least one polygon with three corners."""
    segmentation = annotation.get("segmentation")
    return isinstance(segmentation, dict) or bool(_polygons(segmentation))


def to_rle(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of polygons (several parts are one mask) or of either kind of RLE; sizes in pixels."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_utils.frPyObjects(segmentation, height, width)
        return segmentation
    return mask_utils.merge(mask_utils.frPyObjects(_polygons(segmentation), height, width))


def first_few(items: Iterable[Any], most: int = 3) -> str:
    """'a, b, c, ...' for messages about many offenders."""
    found = list(items)
    return ", ".join(str(item) for item in found[:most]) + (", ..." if len(found) > most else "")


def _polygons(segmentation: Any) -> list[list[float]]:
    """The parts that are polygons: pycocotools takes four numbers for a box and fails on odd or fewer ones."""
    if not isinstance(segmentation, list):
        return []
    parts = [segmentation] if segmentation and isinstance(segmentation[0], int | float) else segmentation
    return [part for part in parts if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]


def _checked_segmentation(annotation: dict[str, Any], image: dict[str, Any], path: Path) -> list[Any] | dict[str, Any]:
    segmentation = annotation["segmentation"]
    size = [image["height"], image["width"]]
    if isinstance(segmentation, dict) and list(segmentation.get("size", ())) != size:
        raise UserError(
            f"{path}: the RLE of annotation {annotation['id']} is for size {segmentation.get('size')}, but image "
            f"{image['file_name']} is {size} (height, width)"
        )
    return segmentation


def _check_section(content: dict[str, Any], section: str, keys: tuple[str, ...], path: Path) -> None:
    entries = content.get(section)
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list '{section}'; it is not a COCO instance file")
    for position, entry in enumerate(entries):
        lacking = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if lacking:
            raise UserError(f"{path}: entry {position} of '{section}' lacks {', '.join(lacking)}")
    repeated = [identity for identity, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: {len(repeated)} ids occur twice in '{section}' ({first_few(repeated)})")
    if not entries and section != "annotations":
        raise UserError(f"{path}: '{section}' is empty")


def _check_references(content: dict[str, Any], path: Path) -> None:
    """Sizes and boxes are numbers, and annotations name images and categories that exist."""
    image_ids = {image["id"] for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    annotations = content["annotations"]

    def refuse(offenders: list[str], what: str) -> None:
        if offenders:
            raise UserError(f"{path}: {len(offenders)} {what} ({first_few(offenders)})")

    refuse(
        [str(i["file_name"]) for i in content["images"] if not (_is_size(i["width"]) and _is_size(i["height"]))],
        "images whose width or height is not a positive whole number",
    )
    refuse(
        [f"annotation {a['id']}: image {a['image_id']}" for a in annotations if a["image_id"] not in image_ids],
        "annotations name an image that is not in the file",
    )
    refuse(
        [
            f"annotation {a['id']}: category {a['category_id']}"
            for a in annotations
            if a["category_id"] not in category_ids
        ],
        "annotations name a category that is not in the file",
    )
    refuse(
        [f"annotation {a['id']}: {a['bbox']}" for a in annotations if not _is_box(a["bbox"])],
        "annotations whose bbox is not four numbers x, y, width, height",
    )
    if any(annotation["id"] == 0 for annotation in annotations):
        logger.warning("%s: pycocotools takes annotation id 0 for 'not found'; number annotations from 1", path)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    )

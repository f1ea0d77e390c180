"""Small COCO data sets made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 90, "name": "bar"}]


def box(identity: int, image_id: Any, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    """An annotation as COCO writes it, with the box as its polygon."""
    x, y, w, h = bbox
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    whole = {
        "id": identity,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": w * h,
        "iscrowd": 0,
    }
    return whole | {"segmentation": [polygon]} | more


def coco_images(n: int, first: int = 1, width: int = 96, height: int = 64) -> list[dict[str, Any]]:
    return [{"id": first + k, "file_name": f"{first + k:04d}.jpg", "width": width, "height": height} for k in range(n)]


def write_coco(
    root: Path,
    split: str,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a split in the images/annotations layout, with noise for pictures; returns the annotation file."""
    folder = root / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 255, (image["height"], image["width"], 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / image["file_name"])
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}
    file.write_text(json.dumps(content))
    return file

"""Data for the detection tests, made by hand."""

from pathlib import Path

import pytest

from .handmade import CATEGORIES, box, coco_images, write_coco


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Four training and five validation images with boxes of three classes, one image each without any."""
    for split, first, n in (("train", 1, 4), ("val", 101, 5)):
        images = coco_images(n, first)
        annotations = [
            box(
                10 * image["id"] + k,
                image["id"],
                CATEGORIES[(image["id"] + k) % 3]["id"],
                [5 + 30 * k, 8, 24, 30 + 5 * k],
            )
            for image in images[:-1]
            for k in range(3)
        ]
        write_coco(tmp_path, split, images, annotations)
    return tmp_path

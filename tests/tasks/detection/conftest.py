"""Data sets for the detection tests: one made by hand, and the real ones where they are at hand."""

import os
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("EVMAMBA_DATA", Path(__file__).parents[4] / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no {name} in {root} (set EVMAMBA_DATA)")
        return root / name

    return find

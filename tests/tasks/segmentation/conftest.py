"""Data for the segmentation tests, made by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = np.array([[128, 128, 128], [220, 40, 40], [40, 200, 60], [40, 60, 220]], np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Six training and five validation images of several sizes: three classes by colour, label 0 in a corner."""
    rng = np.random.default_rng(0)
    root = tmp_path / "scenes"
    for split, count in (("training", 6), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for k in range(count):
            label = rng.integers(1, 4, size=(5, 6)).repeat(8 + k, 0).repeat(9, 1).astype(np.uint8)
            label[:4, :4] = 0
            noise = rng.integers(-20, 20, size=(*label.shape, 3))
            image = (COLOURS[label].astype(int) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"scene{k}.jpg", quality=95)
            Image.fromarray(label).save(root / "annotations" / split / f"scene{k}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root

"""The embedded segmentation set."""

from pathlib import Path

import numpy as np
from PIL import Image

from evmamba.tasks.embedded import (
    SEGMENTATION_CLASSES,
    write_segmentation,
)


def test_segmentation_labels_fit_their_images_and_name_every_class(tmp_path: Path) -> None:
    write_segmentation(tmp_path, train=24, val=12, size=112)
    assert (tmp_path / "classes.txt").read_text().split() == list(SEGMENTATION_CLASSES)
    for split, count in (("training", 24), ("validation", 12)):
        images = sorted((tmp_path / "images" / split).glob("*.jpg"))
        labels = sorted((tmp_path / "annotations" / split).glob("*.png"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        pixels = np.zeros(256, dtype=int)
        for image, label in zip(images, labels, strict=True):
            opened = Image.open(label)
            assert opened.mode == "L"
            assert opened.size == Image.open(image).size == (112, 84)
            pixels += np.bincount(np.asarray(opened).ravel(), minlength=256)
        share = pixels / pixels.sum()
        assert pixels[len(SEGMENTATION_CLASSES) + 1 :].sum() == 0
        assert (share[1 : len(SEGMENTATION_CLASSES) + 1] > 0.002).all(), share
        assert 0.01 < share[0] < 0.12, "the unlabelled lines should be thin"

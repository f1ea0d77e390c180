"""The embedded classification set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.embedded import (
    CLASSIFICATION_CLASSES,
    write_classification,
)


def test_classification_folders_hold_the_counts_asked_for(tmp_path: Path) -> None:
    write_classification(tmp_path, train=23, val=10, size=48)
    for split, count in (("train", 23), ("val", 10)):
        folders = sorted(p.name for p in (tmp_path / split).iterdir())
        assert folders == sorted(CLASSIFICATION_CLASSES)
        images = list((tmp_path / split).glob("*/*.jpg"))
        assert len(images) == count
        assert {Image.open(p).size for p in images} == {(48, 48)}
        assert {len(list(p.iterdir())) for p in (tmp_path / split).iterdir()} <= {count // 10, count // 10 + 1}


def test_classification_can_be_limited_to_some_classes(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", train=4, val=2, size=32, classes=("ring", "star"))
    assert sorted(p.name for p in (tmp_path / "a" / "val").iterdir()) == ["ring", "star"]
    with pytest.raises(ValueError, match="10 classes need as many images"):
        write_classification(tmp_path / "b", train=20, val=9)
    with pytest.raises(UserError, match="did you mean star"):
        write_classification(tmp_path / "c", train=2, val=2, classes=("strar",))
    assert not (tmp_path / "b").exists()


def test_colour_alone_does_not_give_the_class_away(tmp_path: Path) -> None:
    write_classification(tmp_path, train=300, val=200, size=32)
    features, labels = {}, {}
    for split in ("train", "val"):
        paths = sorted((tmp_path / split).glob("*/*.jpg"))
        features[split] = np.stack([np.asarray(Image.open(p), dtype=float).mean(axis=(0, 1)) for p in paths])
        labels[split] = np.array([CLASSIFICATION_CLASSES.index(p.parent.name) for p in paths])
    centres = np.stack([features["train"][labels["train"] == k].mean(axis=0) for k in range(10)])
    distances = np.linalg.norm(features["val"][:, None] - centres, axis=2)
    accuracy = (distances.argmin(axis=1) == labels["val"]).mean()
    assert accuracy < 0.2, f"nearest mean colour reaches {accuracy:.2f}, chance is 0.10"

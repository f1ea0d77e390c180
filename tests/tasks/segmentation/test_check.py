"""A check of label files finds what a training would stumble over."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..damage import add_test, check, found, the_problem


def test_labels_out_of_range_and_of_the_wrong_size(copy: Callable[[str], Path]):
    root = copy("segmentation")
    labels = sorted((root / "annotations" / "training").iterdir())
    pixels = np.array(Image.open(labels[0]))
    pixels[:2] = 200
    Image.fromarray(pixels).save(labels[0])
    Image.fromarray(pixels[:, :-1] % 2).save(labels[1])
    labels[2].write_bytes(b"no label")
    lines = found(root)
    assert lines[0].startswith("error: 1 label file of train cannot be read: ")
    assert lines[1].startswith(f"error: 1 label file of train of another size than the image: label {labels[1]} is")
    assert lines[2].startswith("error: 1 label out of range")
    assert f"200 in {labels[0]}" in lines[2]
    assert len(lines) == 3
    assert len(found(root, reduce_zero_label=True, ignore_label=200)) == 2


def test_labels_of_a_test_split(copy: Callable[[str], Path]):
    root = copy("segmentation")
    add_test(root)
    label = sorted((root / "annotations" / "test").iterdir())[0]
    Image.fromarray(np.full_like(np.array(Image.open(label)), 200)).save(label)
    assert found(root)[0].startswith("error: 1 label out of range")
    assert f"200 in {label}" in found(root)[0]


def test_classes_without_names_are_counted_from_the_labels(copy: Callable[[str], Path]):
    root = copy("segmentation")
    named = check(root).splits["train"]["classes"]
    (root / "classes.txt").unlink()
    assert (
        the_problem(root)
        == f"warning: no classes.txt; the highest label is {named}, so there would be {named} classes: "
    )
    assert found(root, num_classes=named) == []


def test_a_label_without_image(copy: Callable[[str], Path]):
    root = copy("segmentation")
    next((root / "images" / "validation").iterdir()).unlink()
    assert any("label without image of the same name" in line for line in found(root))

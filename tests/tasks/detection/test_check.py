"""A check of COCO annotations finds what a training would stumble over."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..damage import add_test, edit, found, images_of, the_problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "error: .*ids occur twice in 'annotations'"),
        (lambda c: c["images"].append(c["images"][0]), "error: .*ids occur twice in 'images'"),
        (lambda c: c["annotations"][2].update(image_id=99999), "error: .*image_id 99999 is not in the file"),
        (lambda c: c["annotations"][2].update(category_id=99999), "error: .*category_id 99999 is not in the file"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), "error: .*bbox is not four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 9]), "warning: 1 box of no area in .*; not trained on"),
        (lambda c: c["annotations"][0].update(bbox=[-9, 3, 30, 30]), "warning: 1 box reaching outside the image"),
        (lambda c: c["annotations"][0].update(segmentation=[["x"]]), "warning: masks that cannot be used.*polygon"),
        (lambda c: c["images"][1].update(width=33), "error: 1 image of train of another size than annotated: .*33x"),
        (lambda c: c["images"][1].update(file_name="no.jpg"), "error: 1 image named in .* and not in .*no.jpg"),
        (lambda c: c["categories"][0].update(name="kraken"), "error: the categories of train and val differ: .*kraken"),
    ],
)
def test_faulty_annotations(copy: Callable[[str], Path], change: Callable[[dict], None], expected: str):
    root = copy("detection")
    edit(root, lambda content: content["annotations"].sort(key=lambda annotation: annotation["iscrowd"]))
    edit(root, change)
    lines = found(root)
    assert any(re.match(expected, line) for line in lines), lines


def test_classes_that_are_evaluated_and_never_trained(copy: Callable[[str], Path]):
    root = copy("detection")

    def drop(content: dict) -> None:
        category = content["categories"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != category]

    edit(root, drop)
    assert the_problem(root).startswith("warning: 1 class with boxes in val and none in train: ")


def test_categories_and_images_of_a_test_split(copy: Callable[[str], Path]):
    root = copy("detection")
    add_test(root)
    edit(root, lambda content: content["categories"][0].update(name="kraken"), "test")
    images_of(root, "test")[0].unlink()
    lines = found(root)
    assert [line.split(":")[1].strip() for line in lines[:2]] == [
        f"1 image named in {root / 'annotations' / 'instances_test.json'} and not in {root / 'images' / 'test'}",
        "the categories of train and test differ",
    ]


def test_images_without_annotations_are_counted(copy: Callable[[str], Path]):
    root = copy("detection")
    folder = images_of(root, "val")[0].parent
    shutil.copy(images_of(root, "val")[0], folder / "extra.jpg")
    assert the_problem(root) == f"warning: 1 image in {folder} and not named in instances_val.json: extra.jpg"

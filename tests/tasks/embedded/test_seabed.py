"""The embedded detection set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from evmamba.tasks.embedded import (
    DETECTION_CATEGORIES,
    write_detection,
)


@pytest.fixture(scope="module")
def detection_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detection")
    write_detection(root, train=32, val=16, size=128)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_areas_and_masks_of_the_detection_set_agree(split: str, detection_set: Path) -> None:
    coco = COCO(detection_set / "annotations" / f"instances_{split}.json")
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == DETECTION_CATEGORIES
    assert {p.name for p in (detection_set / "images" / split).iterdir()} == {
        i["file_name"] for i in coco.imgs.values()
    }
    for image_id, image in coco.imgs.items():
        assert Image.open(detection_set / "images" / split / image["file_name"]).size == (
            image["width"],
            image["height"],
        )
        covered = np.zeros((image["height"], image["width"]), dtype=int)
        for instance in coco.imgToAnns[image_id]:
            mask = coco.annToMask(instance)
            covered += mask
            assert mask.sum() == instance["area"] > 0
            rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
            assert instance["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert covered.max(initial=0) <= 1, "two objects own the same visible pixel"


def test_the_detection_set_holds_what_makes_coco_hard(detection_set: Path) -> None:
    coco = COCO(detection_set / "annotations" / "instances_train.json")
    counts = [len(coco.imgToAnns[i]) for i in coco.imgs]
    assert 0 in counts
    assert max(counts) >= 4
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert crowds
    assert all(isinstance(a["segmentation"], dict) for a in crowds)
    assert {a["category_id"] for a in coco.anns.values()} == set(DETECTION_CATEGORIES)
    assert any(len(a["segmentation"]) > 1 for a in coco.anns.values() if not a["iscrowd"]), "no occluded object"
    assert len({(i["width"], i["height"]) for i in coco.imgs.values()}) > 4

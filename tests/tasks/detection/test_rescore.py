"""Kept detections give the test's numbers again, and others do not."""

import json
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.detection import DetectionData
from evmamba.tasks.detection.metrics import evaluate_coco, write_detections
from evmamba.tasks.detection.module import BOX_FILE, MASK_FILE
from evmamba.tasks.detection.per_image import Matches
from evmamba.tasks.detection.rescore import rescore

from .handmade import CATEGORIES, box, coco_images, write_coco


def test_boxes_and_masks_are_evaluated_on_the_images_that_counted(coco: Path, tmp_path: Path):
    data = DetectionData(str(coco), num_workers=0)
    content = json.loads(data.annotation_file.read_text())
    ids = [image["id"] for image in content["images"]][:-1]  # one was unreadable, say
    boxes = []
    for k, annotation in enumerate(content["annotations"]):
        x, y, w, h = annotation["bbox"]
        entry = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": 1 / (k + 1)}
        boxes.append(entry | {"bbox": [x + k % 3, y, w, h]})
    boxes = [box for box in boxes if box["image_id"] in ids]
    write_detections(tmp_path / BOX_FILE, boxes)
    score = evaluate_coco(data.annotation_file, boxes, ids, "bbox", keep=True)
    images = Matches.of(ids, {"": score.matches})
    assert rescore(tmp_path, data, images) == {name: float(value) for name, value in score.metrics().items()}
    assert 0 < rescore(tmp_path, data, images)["AP"] < 1
    write_detections(tmp_path / MASK_FILE, [])
    assert rescore(tmp_path, data, images)["mask_AP"] == 0
    write_detections(tmp_path / BOX_FILE, boxes[1:])
    assert rescore(tmp_path, data, images)["AP"] != score.metrics()["AP"]
    (tmp_path / BOX_FILE).write_text('[{"image_id": 5}]')
    with pytest.raises(UserError, match="no detections of these images"):
        rescore(tmp_path, data, images)
    (tmp_path / BOX_FILE).unlink()
    with pytest.raises(UserError, match=BOX_FILE):
        rescore(tmp_path, data, images)


def test_detections_of_a_labelled_test_split_are_evaluated_on_that(coco: Path, tmp_path: Path):
    images = coco_images(2, 201)
    annotations = [box(k, image["id"], CATEGORIES[0]["id"], [5, 8, 24, 30]) for k, image in enumerate(images, 1)]
    write_coco(coco, "test", images, annotations)
    data = DetectionData(str(coco), num_workers=0)
    found = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in annotations]
    write_detections(tmp_path / BOX_FILE, found)
    score = evaluate_coco(data.test_file, found, [201, 202], "bbox", keep=True)
    assert rescore(tmp_path, data, Matches.of([201, 202], {"": score.matches}))["AP"] == pytest.approx(1)

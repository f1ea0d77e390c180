"""Detections as pycocotools reads them."""

import json
from pathlib import Path

from evmamba.tasks.embedded import ensure_embedded

from ..embedded_predictions import predict


def test_boxes_and_masks_name_images_and_categories_of_the_annotations(tmp_path: Path):
    options = ["--model.init_args.score_threshold=0.0", "--model.init_args.detector=maskrcnn"]
    predict("detection", tmp_path, *options, "--trainer.limit_predict_batches=1")
    truth = json.loads((ensure_embedded("detection") / "annotations" / "instances_val.json").read_text())
    for name, key in (("detections.json", "bbox"), ("detections_masks.json", "segmentation")):
        found = json.loads((tmp_path / name).read_text())
        assert {entry["image_id"] for entry in found} <= {image["id"] for image in truth["images"]}
        assert {entry["category_id"] for entry in found} <= {category["id"] for category in truth["categories"]}
        assert found
        assert all(key in entry for entry in found)
    assert not list(tmp_path.glob(".*"))

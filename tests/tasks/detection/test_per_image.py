"""Average precision from kept matches equals COCOeval's; of all images: test_metrics.py."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evmamba.tasks.detection.annotations import load_coco_json, read_annotations
from evmamba.tasks.detection.metrics import evaluate_coco
from evmamba.tasks.detection.per_image import Matches

from .test_metrics import noisy_predictions


def test_a_sample_is_the_data_set_with_images_repeated(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    file = real_data("det_bccd") / "annotations" / "instances_val.json"
    gathered = noisy_predictions(file, False).gather(read_annotations(file).category_ids)
    assert gathered is not None
    image_ids, entries, _ = gathered
    kept = Matches.of(image_ids, {"": evaluate_coco(file, entries, image_ids, "bbox", keep=True).matches})
    times = np.random.default_rng(1).integers(0, 3, len(image_ids))

    content = load_coco_json(file)
    repeated: dict = {"images": [], "annotations": [], "categories": content["categories"]}
    found = []
    number = {image: dict.fromkeys(range(times[i])) for i, image in enumerate(image_ids)}
    new = {(image, n): i + 1 for i, (image, n) in enumerate((image, n) for image in number for n in number[image])}
    for (image, n), fresh in new.items():
        (whole,) = (entry for entry in content["images"] if entry["id"] == image)
        repeated["images"].append(whole | {"id": fresh})
        for entry in content["annotations"]:
            if entry["image_id"] == image:
                repeated["annotations"].append(entry | {"image_id": fresh, "id": len(repeated["annotations"]) + 1})
        found += [copy.deepcopy(entry) | {"image_id": fresh} for entry in entries if entry["image_id"] == image]
        assert n < 3
    (tmp_path / "repeated.json").write_text(json.dumps(repeated))
    expected = evaluate_coco(tmp_path / "repeated.json", found, list(new.values()), "bbox").metrics()
    # Images by the text of their id. Copies share scores: COCOeval puts one behind the other, weights both at once.
    order = np.argsort([str(image) for image in image_ids])
    for metric, value in expected.items():
        assert kept.metric(metric, times[order][None].astype(float))[0] == pytest.approx(value, abs=1e-3)


def test_no_detection_scores_zero_and_no_object_is_undefined() -> None:
    empty = {
        "detection": np.empty((0, 2), np.int32),
        "score": np.empty(0),
        "matched": np.empty((0, 4), np.uint16),
        "ignored": np.empty((0, 4), np.uint16),
    }
    kept = Matches.of([7, 11], {"": empty | {"object": np.array([[0, 0, 1, 0, 1, 0]], np.int32)}})
    assert kept.images == ["11", "7"]
    assert kept.metric("AP", np.array([[1.0, 1.0]])).tolist() == [0.0]
    with np.errstate(all="raise"):
        assert np.isnan(kept.metric("APs", np.array([[1.0, 1.0]])))[0]
    assert np.isnan(kept.metric("AP", np.array([[1.0, 0.0]])))[0]  # without the only image that has an object

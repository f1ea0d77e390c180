"""COCO AP equals pycocotools run by hand on the dumped file, to the last digit."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import v2

from evmamba.tasks.detection.annotations import load_coco_json, read_annotations
from evmamba.tasks.detection.data import CocoDataset, find_split
from evmamba.tasks.detection.metrics import CocoDetections, evaluate_coco, write_detections
from evmamba.tasks.detection.per_image import Matches

from .handmade import box, coco_images, write_coco


def plain_coco_stats(annotation_file: Path, detection_file: Path, iou_type: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        run = COCOeval(truth, truth.loadRes(str(detection_file)), iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def noisy_predictions(annotation_file: Path, masks: bool) -> CocoDetections:
    """The truth with shifted boxes, doubtful labels, doublets and misses."""
    read = read_annotations(annotation_file, masks=masks)
    rng = np.random.default_rng(3)
    detections = CocoDetections()
    plain = v2.Compose([v2.ToImage(), v2.ToPureTensor()])
    dataset = CocoDataset(find_split(annotation_file.parent.parent, "val")[0], read.images, masks, plain)
    for index in range(len(dataset)):
        _, target, _ = dataset[index]
        keep = np.flatnonzero(rng.random(len(target["boxes"])) < 0.8).repeat(2)
        boxes = target["boxes"][keep]
        sides = boxes[:, 2:] - boxes[:, :2]
        boxes = boxes + torch.from_numpy(rng.normal(0, 0.08, (len(keep), 4)).astype(np.float32)) * sides.repeat(1, 2)
        labels = target["labels"][keep]
        labels[rng.random(len(keep)) < 0.1] = 0
        prediction = {
            "boxes": boxes,
            "labels": labels,
            "scores": torch.from_numpy(rng.random(len(keep)).astype(np.float32)),
        }
        if masks:
            shift = int(rng.integers(0, 6))
            prediction["masks"] = target["masks"][keep][:, None].float().roll(shift, dims=-1) * 0.9
        detections.add(target["image_id"], prediction)
    return detections


@pytest.mark.parametrize(("name", "masks"), [("det_bccd", False), ("det_coco", True)])
def test_ap_equals_pycocotools_on_the_dumped_file(
    real_data: Callable[[str], Path], tmp_path: Path, name: str, masks: bool
) -> None:
    file = real_data(name) / "annotations" / "instances_val.json"
    category_ids = read_annotations(file).category_ids
    gathered = noisy_predictions(file, masks).gather(category_ids)
    assert gathered is not None
    image_ids, boxes, with_masks = gathered
    for entries, iou_type in ((boxes, "bbox"), (with_masks, "segm"))[: 1 + masks]:
        write_detections(tmp_path / f"{iou_type}.json", entries)
        ours = evaluate_coco(file, entries, image_ids, iou_type, keep=True)
        assert ours.stats == plain_coco_stats(file, tmp_path / f"{iou_type}.json", iou_type)
        assert 0.1 < ours.metrics()["AP"] < 0.9
        defined = [value["AP"] for value in ours.per_class.values() if value["AP"] is not None]
        assert np.mean(defined) == pytest.approx(ours.stats[0], abs=1e-12)
        kept = Matches.of(image_ids, {"": ours.matches})
        for metric, expected in zip(kept.metrics, ours.stats, strict=False):
            found = kept.metric(metric, np.ones((1, len(image_ids))))[0]
            assert (np.isnan(found) and expected == -1) or found == pytest.approx(expected, abs=1e-12)


def test_perfect_predictions_reach_what_the_data_allows(real_data: Callable[[str], Path]) -> None:
    """One BCCD box has no area; nobody can find it."""
    file = real_data("det_bccd") / "annotations" / "instances_val.json"
    content = load_coco_json(file)
    entries = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in content["annotations"]
    ]
    score = evaluate_coco(file, entries, [image["id"] for image in content["images"]], "bbox")
    assert score.metrics()["AP"] == pytest.approx(0.9966, abs=5e-5)


def test_no_detection_at_all_scores_zero(coco: Path) -> None:
    file = coco / "annotations" / "instances_val.json"
    for iou_type in ("bbox", "segm"):
        score = evaluate_coco(file, [], [101, 102, 103, 104, 105], iou_type)
        assert score.metrics()["AP"] == score.metrics()["AP50"] == 0.0
        assert score.per_class["disc"] == {"AP": 0.0, "AP50": 0.0}


def test_sizes_that_do_not_occur_are_left_out(tmp_path: Path) -> None:
    file = write_coco(tmp_path, "val", coco_images(1), [box(1, 1, 3, [5, 5, 40, 40])])
    entry = {"image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 40], "score": 0.5}
    score = evaluate_coco(file, [entry], [1], "bbox")
    assert score.metrics() == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1, "APm": 1})
    assert score.per_class["bar"] == {"AP": None, "AP50": None}
    assert entry == {"image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 40], "score": 0.5}


def test_objects_without_a_mask_count_as_never_found(tmp_path: Path) -> None:
    with_mask, without = box(1, 1, 3, [5, 5, 40, 40]), box(2, 1, 3, [50, 5, 40, 40], segmentation=[])
    file = write_coco(tmp_path, "val", coco_images(1), [with_mask, without])
    mask = torch.zeros(2, 1, 64, 96)
    mask[0, 0, 5:45, 5:45] = 1
    mask[1, 0, 5:45, 50:90] = 1
    detections = CocoDetections()
    boxes = torch.tensor([[5.0, 5, 45, 45], [50, 5, 90, 45]])
    detections.add(
        1, {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0]), "masks": mask}
    )
    image_ids, _, entries = detections.gather((3, 7, 90)) or ([], [], [])
    assert evaluate_coco(file, entries, image_ids, "segm").metrics()["AP50"] == pytest.approx(51 / 101)


def test_crowds_are_neither_missed_nor_wrong(tmp_path: Path) -> None:
    crowd = box(2, 1, 3, [50, 5, 40, 40], iscrowd=1, segmentation={"size": [64, 96], "counts": [64 * 96]})
    file = write_coco(tmp_path, "val", coco_images(1), [box(1, 1, 3, [5, 5, 40, 40]), crowd])
    inside = {"image_id": 1, "category_id": 3, "bbox": [55, 10, 20, 20], "score": 0.9}
    found = {"image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 40], "score": 0.5}
    assert evaluate_coco(file, [inside, found], [1], "bbox").metrics()["AP"] == pytest.approx(1.0)


def test_detections_keep_the_hundred_best_and_the_original_ids() -> None:
    detections = CocoDetections()
    scores = torch.linspace(0, 1, 150)
    detections.add("b", {"boxes": torch.rand(150, 4), "scores": scores, "labels": torch.full((150,), 2)})
    image_ids, boxes, masks = detections.gather((3, 7, 90)) or ([], [], [])
    assert image_ids == ["b"]
    assert masks == []
    assert len(boxes) == 100
    assert boxes[0]["score"] == 1.0
    assert {entry["category_id"] for entry in boxes} == {90}
    assert json.loads(json.dumps(boxes)) == boxes
    assert detections.gather((3, 7, 90)) == ([], [], [])


def synthetic(folder: Path, images: int, seed: int, masks: bool = False) -> tuple[Path, list[dict]]:
    """Ground truth with crowds, gaps in the ids and classes without objects, and detections with equal scores."""
    rng = np.random.default_rng(seed)
    side, classes = (240, 320), [3, 7, 8, 20, 90]
    document: dict = {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in classes]}
    found: list[dict] = []

    def shape(x: float, y: float, w: float, h: float) -> dict:
        if not masks:
            return {"bbox": [x, y, w, h]}
        drawn = np.zeros(side, dtype=np.uint8, order="F")
        drawn[int(max(y, 0)) : int(y + h) + 1, int(max(x, 0)) : int(x + w) + 1] = 1
        code = mask_utils.encode(drawn)
        return {"segmentation": {"size": code["size"], "counts": code["counts"].decode()}}

    for image in rng.permutation(images).tolist():
        document["images"].append(
            {"id": 5 * image + 2, "file_name": f"{image}.jpg", "width": side[1], "height": side[0]}
        )
        for _ in range(rng.poisson(5)):
            w, h = np.exp(rng.uniform(1.5, 5, 2))
            x, y = rng.uniform(0, side[1] - w), rng.uniform(0, side[0] - h)
            label = int(rng.choice(classes[:-1]))
            entry = {"id": len(document["annotations"]) + 1, "image_id": 5 * image + 2, "category_id": label}
            entry |= {"bbox": [x, y, w, h], "area": w * h * 0.7, "iscrowd": int(rng.random() < 0.05)}
            document["annotations"].append(entry | shape(x, y, w, h))
            for _ in range(rng.integers(0, 4)):
                jitter = rng.normal(0, 0.12, 4)
                moved = [x + jitter[0] * w, y + jitter[1] * h, w * np.exp(jitter[2]), h * np.exp(jitter[3])]
                guess = label if rng.random() < 0.8 else int(rng.choice(classes))
                score = float(np.round(rng.random(), 2))
                found.append({"image_id": 5 * image + 2, "category_id": guess, "score": score} | shape(*moved))
    file = folder / "instances_val.json"
    file.write_text(json.dumps(document))
    return file, found


def same_by_both(file: Path, found: list[dict], ids: list, kind: str) -> None:
    ours, theirs = (evaluate_coco(file, found, ids, kind, True, name) for name in ("pycocotools", "hotcoco"))
    assert ours.stats == theirs.stats
    assert ours.per_class == theirs.per_class
    assert ours.images == theirs.images
    for name, values in ours.matches.items():
        assert np.array_equal(values, theirs.matches[name]), name


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_hotcoco_gives_pycocotools_numbers_to_the_last_bit(tmp_path: Path, masks: bool):
    pytest.importorskip("hotcoco")
    for seed in range(3):
        file, found = synthetic(tmp_path, 40, seed, masks)
        ids = sorted({image["id"] for image in json.loads(file.read_text())["images"]})
        same_by_both(file, found, ids, "segm" if masks else "bbox")
        same_by_both(file, found, ids[:7], "segm" if masks else "bbox")
    same_by_both(file, [], ids, "segm" if masks else "bbox")


@pytest.mark.slow
@pytest.mark.skipif("EVMAMBA_ATTACKS" not in os.environ, reason="a minute; EVMAMBA_ATTACKS=1 runs it")
def test_hotcoco_gives_pycocotools_numbers_on_as_many_images_as_coco_has(tmp_path: Path):
    pytest.importorskip("hotcoco")
    file, found = synthetic(tmp_path, 5000, 0)
    same_by_both(file, found, sorted({entry["image_id"] for entry in found}), "bbox")


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_hotcoco_agrees_on_images_whose_ids_are_text(tmp_path: Path, masks: bool):
    pytest.importorskip("hotcoco")
    file, found = synthetic(tmp_path, 20, 1, masks)
    document = json.loads(file.read_text())
    for image in document["images"]:
        image["id"] = f"n{image['id']}"
    for entry in [*document["annotations"], *found]:
        entry["image_id"] = f"n{entry['image_id']}"
    file.write_text(json.dumps(document))
    same_by_both(file, found, sorted(image["id"] for image in document["images"]), "segm" if masks else "bbox")

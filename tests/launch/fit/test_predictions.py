"""`evmamba predict`: every prediction is on the disk afterwards, in a form that other tools read."""

import csv
import json
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.tasks.embedded import ensure_embedded

pytestmark = pytest.mark.usefixtures("elsewhere")


def predict(task: str, *options: str) -> None:
    always = ["--trainer.limit_predict_batches=3", "--data.init_args.num_workers=0"]
    assert cli.main(["predict", "--config", f"conf/{task}/tiny.yaml", *always, *options]) == 0


def test_classification_leaves_a_row_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    predict("classification", "--data.init_args.image_size=32", "--data.init_args.eval_batch_size=2")
    assert "predictions: runs/classification-tiny/predictions.csv\n" in capsys.readouterr().out
    with Path("runs/classification-tiny/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    classes = {folder.name for folder in (ensure_embedded("classification") / "val").iterdir()}
    assert all(Path(row["path"]).is_file() and row["label"] in classes and 0 < float(row["score"]) <= 1 for row in rows)


def test_detection_leaves_what_pycocotools_reads(tmp_path: Path):
    options = ["--model.init_args.score_threshold=0.0", "--model.init_args.detector=maskrcnn"]
    predict("detection", *options, "--model.init_args.backbone=resnet18", "--trainer.limit_predict_batches=1")
    truth = json.loads((ensure_embedded("detection") / "annotations" / "instances_val.json").read_text())
    folder = Path("runs/detection-tiny")
    for name, key in (("detections.json", "bbox"), ("detections_masks.json", "segmentation")):
        found = json.loads((folder / name).read_text())
        assert {entry["image_id"] for entry in found} <= {image["id"] for image in truth["images"]}
        assert {entry["category_id"] for entry in found} <= {category["id"] for category in truth["categories"]}
        assert found
        assert all(key in entry for entry in found)
    assert not list(folder.glob(".*"))


def test_segmentation_leaves_a_png_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    predict("segmentation")
    assert "predictions: runs/segmentation-tiny/predictions/*.png\n" in capsys.readouterr().out
    assert len(list(Path("runs/segmentation-tiny/predictions").glob("*.png"))) == 3

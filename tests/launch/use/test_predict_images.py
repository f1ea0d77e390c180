"""`evmamba predict IMAGES --checkpoint FILE`: a checkpoint alone is enough, and what it writes is what it predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.launch import cli
from evmamba.launch.fit.checkpoint_metadata import CheckpointMetadata, load_trained_network
from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.use.predict_images import find_images
from evmamba.tasks.module import TaskModule

from .conftest import NAMES, checkpoint

# Arguments of the module, and of the data.
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classification": ({"label_smoothing": 0.0}, {"image_size": 64, "crop_ratio": 0.875}),
    "detection": ({"min_size": [96], "max_size": 128, "channels": 32, "score_threshold": 0.0}, {}),
    "segmentation": ({"decoder_channels": 16, "aux_channels": 0}, {}),
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for place, size in (("a", (70, 50)), ("b", (64, 96))):
        (folder / place).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / place / "same.png")
    return folder


def small(task: str, folder: Path) -> tuple[Path, TaskModule]:
    arguments, data = SMALL[task]
    return checkpoint(task, folder, "resnet18", data, **arguments)


@pytest.mark.parametrize("task", SMALL)
def test_a_checkpoint_alone_rebuilds_its_network(task: str, tmp_path: Path):
    path, module = small(task, tmp_path)
    described = load_trained_network(path)
    assert type(described.module) is type(module)
    assert not described.module.training
    assert described.class_names == NAMES
    weights = described.module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("task", SMALL)
def test_every_image_gets_a_picture_and_an_entry(task: str, tmp_path: Path, pictures: Path):
    path, _ = small(task, tmp_path)
    output = tmp_path / "out"
    arguments = [str(pictures), "--checkpoint", str(path), "--output", str(output), "--min-score", "0"]
    assert cli.main(["predict", *arguments, "--device", "cpu"]) == 0
    content = json.loads((output / "predictions.json").read_text())
    assert content["class_names"] == NAMES
    assert [Path(entry["image"]).parent.name for entry in content["images"]] == ["a", "b"]
    for entry in content["images"]:
        with Image.open(output / entry["picture"]) as picture:
            assert min(picture.size) > 50
        if task == "classification":
            assert sum(c["score"] for c in entry["classes"]) == pytest.approx(1, abs=1e-5)
        elif task == "segmentation":
            with Image.open(output / entry["label"]) as label:
                assert label.size == (entry["width"], entry["height"])
                shares = np.bincount(np.asarray(label).ravel(), minlength=3) / (entry["width"] * entry["height"])
            assert {name: share for name, share in zip(NAMES, shares, strict=True) if share} == pytest.approx(
                entry["classes"], abs=1e-6
            )
        else:
            assert entry["objects"]
            assert {found["name"] for found in entry["objects"]} <= set(NAMES)


def test_images_of_one_name_stay_apart(pictures: Path):
    one, two = pictures / "a" / "same.png", pictures / "b" / "same.png"
    assert find_images([one, two]) == {"same": one, "same.png": two}
    assert list(find_images([pictures])) == ["a/same", "b/same"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "weights.ckpt").write_bytes(b""), "torn"),
        (lambda folder: torch.save({"state_dict": {}}, folder / "weights.ckpt"), "does not say which network"),
        (lambda folder: None, "no checkpoint file"),
    ],
)
def test_a_checkpoint_that_is_none_is_told(make: Any, message: str, tmp_path: Path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load_trained_network(tmp_path / "weights.ckpt")


def test_a_training_describes_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = EvmambaCLI(["--config", "conf/classification/tiny.yaml"], run=False)
    built.trainer.strategy.connect(built.model)
    built.trainer.datamodule = built.datamodule  # as fit() does
    found = [callback for callback in built.trainer.callbacks if isinstance(callback, CheckpointMetadata)]
    assert len(found) == 1
    content: dict[str, Any] = {"state_dict": built.model.state_dict()}
    found[0].on_save_checkpoint(built.trainer, built.model, content)
    torch.save(content, tmp_path / "last.ckpt")
    described = load_trained_network(tmp_path / "last.ckpt")
    assert described.task == "classification"
    assert described.class_names == built.datamodule.class_names
    assert described.data["image_size"] == 64

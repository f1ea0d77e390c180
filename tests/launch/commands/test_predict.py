"""`evmamba predict` with images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from evmamba.launch import cli
from evmamba.launch.commands.predict import shows_images

from ..use.conftest import checkpoint


def test_a_broken_image_is_told_and_the_others_are_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (70, 50), "teal").save(pictures / name)
    (pictures / "broken.jpg").write_text("no image")
    path, _ = checkpoint("classification", tmp_path, "resnet10t", {"image_size": 64, "crop_ratio": 0.875})
    arguments = ["predict", str(pictures), "--checkpoint", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "broken.jpg" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        ("a.png --checkpoint best.ckpt", True),
        ("--checkpoint best.ckpt a.png", True),
        ("--checkpoint=best.ckpt", True),
        ("--config conf/detection/tiny.yaml", False),
        ("--help", False),
        ("", False),
    ],
)
def test_images_are_told_from_a_recipe(arguments: str, images: bool):
    assert shows_images(arguments.split()) == images

"""`evmamba explain`: the pictures are there, and mistakes are one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("backbone", "pictures"),
    [
        ("efficientvmamba_t", {"scan", "steps", "receptive_field", "activation"}),
        ("resnet18", {"receptive_field", "activation"}),
        ("swin_tiny_patch4_window7_224", {"receptive_field", "activation"}),
    ],
)
def test_every_picture_is_there(backbone: str, pictures: set[str], tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    output = tmp_path / "out"
    size = "224" if backbone.startswith("swin") else "64"
    arguments = ["explain", str(tmp_path / "noise.png"), "--backbone", backbone, "--output", str(output)]
    assert cli.main([*arguments, "--size", size]) == 0
    assert {path.stem for path in output.iterdir()} == pictures
    for path in output.iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, f"{path.name} is blank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain a.png", "name one network"),
        ("explain a.png --backbone resnet18 --checkpoint b.ckpt", "name one network"),
        ("explain a.png --backbone resnet18", "a.png: no such image"),
        ("explain a.png --backbone resnet18 --class ant", "unknown class 'ant'"),
        ("explain a.png --backbone resnet18 --class 1000", "the network has 1000 classes, counted from 0"),
        ("explain a.png --backbone deit_tiny_patch16_224", "no maps"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]

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

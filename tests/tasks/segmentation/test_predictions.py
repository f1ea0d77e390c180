"""A palette PNG an image."""

from pathlib import Path

import pytest
from PIL import Image

from ..embedded_predictions import predict


def test_a_png_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    predict("segmentation", tmp_path)
    assert f"predictions: {tmp_path}/predictions/*.png\n" in capsys.readouterr().out
    files = list((tmp_path / "predictions").glob("*.png"))
    assert len(files) == 3
    for file in files:
        with Image.open(file) as picture:
            assert picture.mode == "P"

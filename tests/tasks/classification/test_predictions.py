"""`predictions.csv`."""

import csv
from pathlib import Path

import pytest

from evmamba.tasks.embedded import ensure_embedded

from ..embedded_predictions import predict


def test_a_row_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    predict("classification", tmp_path, "--data.init_args.image_size=32", "--data.init_args.eval_batch_size=2")
    assert f"predictions: {tmp_path}/predictions.csv\n" in capsys.readouterr().out
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    classes = {folder.name for folder in (ensure_embedded("classification") / "val").iterdir()}
    assert all(Path(row["path"]).is_file() and row["label"] in classes and 0 < float(row["score"]) <= 1 for row in rows)

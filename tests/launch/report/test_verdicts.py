"""What is called better: over seeds a verdict, over images of single runs what their weights tell."""

from pathlib import Path

import numpy as np
import pytest

from evmamba.launch.report.over_images import RULE
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import Result, file_hash
from evmamba.tasks.classification.per_image import Right
from evmamba.tasks.per_image import PER_IMAGE_FILE

from ..handmade import made_result, origin


def run(folder: Path, model: str, right: int, seed: int = 0) -> Result:
    """A classification that was right on the first `right` of 100 images, and kept that."""
    folder = folder / f"{model}-{seed}"
    folder.mkdir()
    share = np.arange(100) < right
    Right([f"{i:03d}" for i in range(100)], {"top1": share, "top5": np.ones(100, dtype=bool)}).write(
        folder / PER_IMAGE_FILE
    )
    return made_result(
        "classification",
        model,
        run=folder.name,
        folder=folder,
        metrics={"top1": right / 100, "top5": 1.0},
        details={"sha256": {PER_IMAGE_FILE: file_hash(folder / PER_IMAGE_FILE)}},
        provenance=origin() | {"seed": seed},
    )


def test_one_seed_shows_the_interval_over_images_and_is_never_bold(tmp_path: Path):
    results = [
        run(tmp_path, model, right) for model, right in (("resnet18", 90), ("resnet50", 88), ("efficientvmamba_t", 40))
    ]
    table = build_table(results)
    cells = {row.model: row.cells[0] for row in table.rows if row.kind == "measured"}
    assert cells["resnet18"][0].text == "90.0 ± 6.0 (1)"
    assert cells["resnet18"][1].text == "100.0 ± 1.8 (1)"
    assert not any(cell.best for part in cells.values() for cell in part)
    assert cells["resnet18"][0].apart == ["EfficientVMamba-T"]
    assert set(cells["efficientvmamba_t"][0].apart) == {"resnet18", "resnet50"}
    assert RULE in table.notes
    assert "classification, these weights on 100 test images: resnet18 differs from EfficientVMamba-T" in table.notes


def test_three_seeds_are_judged_by_their_means_alone(tmp_path: Path):
    results = [
        run(tmp_path, model, right + k, k) for model, right in (("resnet18", 90), ("resnet50", 40)) for k in range(3)
    ]
    table = build_table(results)
    cells = {row.model: row.cells[0][0] for row in table.rows if row.kind == "measured"}
    assert cells["resnet18"].best
    assert cells["resnet18"].text == "91.0 ± 2.5 (3)"
    assert cells["resnet18"].half_width == pytest.approx(2.48, abs=0.01)
    assert cells["resnet18"].apart == []
    assert RULE not in table.notes

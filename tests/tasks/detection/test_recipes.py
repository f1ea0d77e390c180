"""What the COCO recipes must agree on."""

from pathlib import Path

import lightning as L
import pytest
import yaml

import evmamba.conf

RECIPES = sorted((Path(evmamba.conf.__path__[0]) / "detection").glob("coco_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_coco_recipes_synchronise_batch_statistics(recipe: Path) -> None:
    """Two images a process are too few for BatchNorm."""
    content = yaml.safe_load(recipe.read_text())
    trainer = content["trainer"]
    assert content["data"]["init_args"]["batch_size"] == 2
    assert trainer["sync_batchnorm"] is True
    options = {key: trainer[key] for key in ("accelerator", "devices", "sync_batchnorm", "max_epochs")}
    L.Trainer(**options, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_there_are_eleven() -> None:
    assert len(RECIPES) == 11

"""The search for the largest batch ends at the device's memory, and says so where there is none."""

from pathlib import Path

import pytest
import torch

from evmamba.errors import UserError
from evmamba.launch.fit.batch_size import largest_batch
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
from evmamba.tasks.classification import ClassificationModule

from ..tiny import write_images, write_recipe


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_images("classification", tmp_path / "data")
    return [f"--config={write_recipe('classification', tmp_path / 'data', tmp_path / 'recipe.yaml')}"]


def with_memory_for(images: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that cannot hold more than so many images a step; returns the batches that were tried."""
    tried: list[int] = []
    own = ClassificationModule.training_loss

    def loss(self, batch):
        tried.append(len(batch["path"]))
        if tried[-1] > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return own(self, batch)

    monkeypatch.setattr(ClassificationModule, "training_loss", loss)
    return tried


@pytest.mark.parametrize(("images", "largest"), [(5, 4), (1000, 8)])
def test_the_largest_power_of_two_that_fits(arguments, monkeypatch, images: int, largest: int):
    """There are twelve training images: with memory for all, 8 is the last power of two."""
    quiet_warnings()
    quiet_logs()
    tried = with_memory_for(images, monkeypatch)
    assert largest_batch(arguments) == largest
    assert max(tried) <= 8
    assert {2, 4} <= set(tried)


def test_no_memory_for_anything_is_one_line(arguments, monkeypatch):
    with_memory_for(0, monkeypatch)
    with pytest.raises(UserError, match="not even memory"):
        largest_batch(arguments)

"""Checkpoints that describe themselves, also those from before an option existed."""

from pathlib import Path

import pytest
import torch

from evmamba.launch.fit.checkpoint_metadata import KEY, load_trained_network
from evmamba.tasks.detection import DetectionModule


@pytest.mark.parametrize(("stored", "expected"), [({}, "torchvision"), ({"rules": "mmdetection"}, "mmdetection")])
def test_an_option_that_a_checkpoint_does_not_know_has_the_value_of_its_time(
    tmp_path: Path, stored: dict[str, str], expected: str
) -> None:
    arguments = {"backbone": "resnet10t", "min_size": [64], "max_size": 96, "channels": 8}
    module = DetectionModule(2, **arguments)
    description = {
        "task": "detection",
        "model": {"class_path": "evmamba.tasks.detection.DetectionModule", "init_args": arguments | stored},
        "data": {},
        "class_names": ["a", "b"],
    }
    torch.save({KEY: description, "state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    described = load_trained_network(tmp_path / "last.ckpt")
    assert isinstance(described.module, DetectionModule)
    assert described.module.rules == expected

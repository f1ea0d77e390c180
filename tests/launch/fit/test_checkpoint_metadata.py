"""Checkpoints that describe themselves, also those from before an option existed."""

from pathlib import Path

import pytest
import torch

from evmamba.errors import UserError
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"class_names": "ab"}, "damaged"),
        ({"class_names": []}, "damaged"),
        ({"model": {"class_path": 3}}, "damaged"),
        ({"task": "segmentation"}, "it is of segmentation, but its network is of detection"),
        ({"init_args": {"channels": "many"}}, "cannot be built"),
        ({"init_args": {"channels": 10**6}}, "does not fit the model: 34 of another shape"),
        ({"init_args": {"backbone": "hf-hub:somebody/net"}}, "importing that would run it"),
    ],
)
def test_a_description_that_is_damaged_or_asks_for_too_much_is_one_line(tmp_path: Path, change: dict, complaint: str):
    arguments = {"backbone": "resnet10t", "min_size": [64], "max_size": 96, "channels": 8}
    module = DetectionModule(2, **arguments)
    model = {"class_path": "evmamba.tasks.detection.DetectionModule"}
    model["init_args"] = arguments | change.pop("init_args", {})  # type: ignore[assignment]
    description = {"task": "detection", "model": model, "data": {}, "class_names": ["a", "b"]} | change
    torch.save({KEY: description, "state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=complaint) as caught:
        load_trained_network(tmp_path / "last.ckpt")
    assert "last.ckpt" in str(caught.value)

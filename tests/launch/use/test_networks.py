"""The network that a checkpoint or a name stands for."""

from pathlib import Path

import pytest
import torch

from evmamba.launch import cli
from evmamba.launch.use.networks import find_network

from .conftest import KINDS, checkpoint


@pytest.mark.parametrize("task", KINDS)
def test_the_backbone_of_every_task_has_the_trained_weights(task: str, tmp_path: Path):
    path, module = checkpoint(task, tmp_path)
    found = find_network(str(path), backbone_only=True)
    trained = module.state_dict()
    prefix = {"classification": "network.", "detection": "detector.backbone.body.", "segmentation": "network.backbone."}
    shared = [name for name in found.model.state_dict() if name.startswith("stages.")]
    assert len(shared) > 50
    assert all(torch.equal(found.model.state_dict()[name], trained[prefix[task] + name]) for name in shared)
    assert found.trained
    assert not found.class_names


def test_a_whole_detector_is_refused_with_what_can_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = checkpoint("detection", tmp_path)
    assert cli.main(["export", str(path), "-o", str(tmp_path / "d.onnx")]) == 2
    assert "--backbone" in capsys.readouterr().err

"""Publishing and fetching a network."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import evmamba
from evmamba.launch import cli

from .conftest import NAMES, checkpoint


def test_pushed_and_pulled_it_is_the_same(tmp_path: Path, image: torch.Tensor, capsys: pytest.CaptureFixture[str]):
    path, module = checkpoint("classification", tmp_path)
    folder, target = tmp_path / "hub", tmp_path / "back.safetensors"
    assert cli.main(["push", str(path), str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["class_names"] == NAMES
    assert cli.main(["pull", str(folder), "-o", str(target)]) == 0
    assert "3 classes" in capsys.readouterr().out
    weights = safetensors.torch.load_file(target)
    assert all(
        torch.equal(weights[n.removeprefix("network.")], v) for n, v in module.state_dict().items() if "net" in n
    )
    again = evmamba.EfficientVMamba.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(image), module(image))

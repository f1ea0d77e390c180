"""`evmamba export`: what is written is the network that was trained."""

import json
from pathlib import Path

import pytest
import torch

import evmamba
from evmamba.launch import cli

from .conftest import NAMES, checkpoint


def test_a_program_of_a_checkpoint_is_its_network(tmp_path: Path, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "torch")  # a program has PyTorch's operators where the CPU has kernels
    path, module = checkpoint("classification", tmp_path)
    assert cli.main(["export", str(path), "-o", str(tmp_path / "model.pt2")]) == 0
    names = {"class_names": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=names)
    with torch.no_grad():
        assert torch.equal(program.module()(image), module(image))
    assert json.loads(names["class_names"]) == NAMES
    assert {file.name for file in tmp_path.iterdir()} == {"best.ckpt", "model.pt2"}


def test_exported_weights_load_again(tmp_path: Path, image: torch.Tensor):
    path, module = checkpoint("classification", tmp_path)
    target = tmp_path / "weights.safetensors"
    assert cli.main(["export", str(path), "-o", str(target)]) == 0
    assert target.stat().st_mode & 0o044, "others on a cluster could not read it"
    again = evmamba.create_model("efficientvmamba_t", num_classes=len(NAMES), checkpoint_path=target).eval()
    with torch.no_grad():
        assert torch.equal(again(image), module(image))


def test_weights_of_other_networks_are_readable_for_others_too(tmp_path: Path):
    target = tmp_path / "weights.safetensors"
    assert cli.main(["export", "resnet18", "-o", str(target)]) == 0
    assert target.stat().st_mode & 0o044
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export efficientvmamba_x -o a.onnx", "did you mean efficientvmamba_"),
        ("export gone.ckpt -o a.onnx", "no checkpoint file at gone.ckpt"),
        ("export efficientvmamba_t -o a.txt", "unknown file format '.txt'"),
        ("export efficientvmamba_t -o nowhere/a.pt2", "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())

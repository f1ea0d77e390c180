"""`evmamba export`, `push` and `pull`: what is written is the network that was trained."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import evmamba
from evmamba.launch import cli
from evmamba.launch.fit.described import KEY
from evmamba.launch.use.networks import find_network
from evmamba.tasks.classification import ClassificationModule
from evmamba.tasks.detection import DetectionModule
from evmamba.tasks.module import TaskModule
from evmamba.tasks.segmentation import SegmentationModule

NAMES = ["ant", "bee", "cat"]
KINDS: dict[str, type[TaskModule]] = {
    "classification": ClassificationModule,
    "detection": DetectionModule,
    "segmentation": SegmentationModule,
}


def checkpoint(task: str, folder: Path, backbone: str = "efficientvmamba_t") -> tuple[Path, TaskModule]:
    torch.manual_seed(0)
    kind = KINDS[task]
    module = kind(num_classes=len(NAMES), backbone=backbone).eval()
    description = {
        "task": task,
        "model": {"class_path": f"evmamba.tasks.{task}.{kind.__name__}", "init_args": {"backbone": backbone}},
        "data": {},
        "class_names": NAMES,
    }
    torch.save({"state_dict": module.state_dict(), KEY: description}, folder / "best.ckpt")
    return folder / "best.ckpt", module


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))


def test_a_program_of_a_checkpoint_is_its_network(tmp_path: Path, image: torch.Tensor):
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export efficientvmamba_x -o a.onnx", "did you mean efficientvmamba_"),
        ("export gone.ckpt -o a.onnx", "no checkpoint file at gone.ckpt"),
        ("export efficientvmamba_t -o a.txt", "unknown file format '.txt'"),
        ("export efficientvmamba_t -o nowhere/a.pt2", "there is no folder nowhere"),
        ("push resnet18 ./folder", "not a ResNet"),
        ("pull ./folder -o a.safetensors", "nothing was pushed there"),
        ("pull a/b/c -o a.safetensors", "cannot fetch a/b/c from the hub"),
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


def test_a_whole_detector_is_refused_with_what_can_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = checkpoint("detection", tmp_path)
    assert cli.main(["export", str(path), "-o", str(tmp_path / "d.onnx")]) == 2
    assert "--backbone" in capsys.readouterr().err

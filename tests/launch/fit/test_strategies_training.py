"""ZeRO 1, 2, 3 and FSDP2 in two real processes on a CPU: what DDP computes, saved, continued, made one file.

A longer set, every task under every strategy: pytest -m slow_strategies tests/launch/fit.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import evmamba
from evmamba.launch.fit.checkpoint_folders import consolidate, folder_kind
from evmamba.launch.fit.cli import train
from evmamba.tasks.backbones import build_backbone

from ..tiny import TASKS, loopback, write_images, write_recipe

PROGRAM = Path(__file__).with_name("sharded_run.py")
ZERO = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
# Three epochs of one optimizer step; 5 images to validate are unequal numbers of batches on two processes.
TRAINER = {
    "devices": 2,
    "max_epochs": 3,
    "max_steps": -1,
    "limit_train_batches": 2,
    "gradient_clip_val": 0.5,
    "logger": False,
    "num_sanity_val_steps": 0,
}
EMA = "--trainer.callbacks+=evmamba.tasks.training.callbacks.WeightEMA"
# With its usual epsilon AdamW makes rounding of the smallest gradients as large as a step.
SMOOTH = "--model.init_args.optimizer={lr: 1.0e-3, eps: 1.0e-2}"
ACCUMULATED = [
    SMOOTH,
    "--trainer.accumulate_grad_batches=2",
    "--model.init_args.schedule={kind: constant, warmup_steps: 2}",
]
CONSTANT = "--model.init_args.schedule={kind: constant}"
VMAMBA = "--model.init_args.backbone=efficientvmamba_t"


def missing() -> str | None:
    """Why DeepSpeed cannot run here."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (pip install '.[deepspeed]')"
    return None


needs_deepspeed = pytest.mark.skipif(missing() is not None, reason=str(missing()))
# One of the whole parameters and all of the split ones: continuing costs three trainings.
CONTINUED = ["deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"]
every_strategy = [*(pytest.param(name, marks=needs_deepspeed) for name in ZERO), "fsdp2"]
continued_strategies = [*(pytest.param(name, marks=needs_deepspeed) for name in CONTINUED[:2]), "fsdp2"]


def last(folder: Path) -> str:
    return str(folder / "checkpoints" / "last.ckpt")


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"told{rank}.json").read_text())


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights{rank}.pt")


def parameters_of(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """Without BatchNorm's statistics, of which each process has its own."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in weights(folder, rank).items() if not name.endswith(buffers)}


class Jobs:
    """Trainings and tests for `sharded_run.py`, in folders of their names below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[dict[str, Any]] = []
        self.recipes: dict[str, Path] = {}

    def add(self, name: str, strategy: str, *options: str, task: str = "classification", **more: Any) -> None:
        if task not in self.recipes:
            write_images(task, self.root / f"{task} data")
            self.recipes[task] = write_recipe(task, self.root / f"{task} data", self.root / f"{task}.yaml", **TRAINER)
        arguments = [f"--config={self.recipes[task]}", f"--strategy={strategy}", *options]
        job = {"name": name, "folder": str(self.root / name), "options": arguments, "fit": True, "checkpoint": None}
        self.jobs.append(job | more)

    def add_interrupted(self, strategy: str, task: str, *options: str) -> None:
        """A training, the same ended within its epoch and continued there with a validation, and a test of it."""
        name = f"{strategy} {task} whole"
        options = (*options, CONSTANT, "--trainer.max_epochs=1", "--trainer.val_check_interval=1")
        self.add(name, strategy, *options, task=task)
        self.add(f"{name} short", strategy, *options, "--trainer.max_steps=1", task=task)
        self.add(f"{name} continued", strategy, *options, task=task, checkpoint=last(self.root / f"{name} short"))
        self.add(f"{name} tested", strategy, *options, task=task, fit=False, checkpoint=last(self.root / name))

    def run(self, **environment: str) -> Path:
        """Run all in one pair of processes, since starting those takes longest; return their folder."""
        (self.root / "jobs.json").write_text(json.dumps(self.jobs))
        command = [sys.executable, PROGRAM, self.root / "jobs.json"]
        environment = loopback() | {"DS_ACCELERATOR": "cpu"} | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return self.root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one of every job's name."""
    jobs = Jobs(tmp_path_factory.mktemp("runs"))
    for name in ["ddp", "fsdp2", *(ZERO if missing() is None else [])]:
        jobs.add(name, name, *ACCUMULATED)
        if name in CONTINUED:
            jobs.add(f"{name} short", name, *ACCUMULATED, "--trainer.max_epochs=2")
            jobs.add(f"{name} continued", name, *ACCUMULATED, checkpoint=last(jobs.root / f"{name} short"))
            jobs.add(f"{name} tested", name, fit=False, checkpoint=last(jobs.root / name))
        if name in ("ddp", "deepspeed_stage_2"):
            jobs.add(f"{name} averaged", name, SMOOTH, EMA)
            jobs.add(f"{name} averaged tested", name, fit=False, checkpoint=last(jobs.root / f"{name} averaged"))
        if name in ("ddp", "fsdp2", "deepspeed_stage_3"):
            for task in ("detection", "segmentation"):
                short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0")
                jobs.add(f"{name} {task}", name, VMAMBA, *short, task=task)
        if name == "deepspeed_stage_3":
            jobs.add_interrupted(name, "detection")
    return jobs.run()


def check_interrupted(root: Path, strategy: str, task: str) -> None:
    """Compare what `Jobs.add_interrupted` left."""
    name = f"{strategy} {task} whole"
    whole, continued = told(root / name), told(root / f"{name} continued")
    assert len(whole["losses"]) == 2
    assert continued["losses"] == whole["losses"][1:]
    expected = weights(root / name)
    assert all(torch.equal(value, expected[key]) for key, value in weights(root / f"{name} continued").items())
    assert told(root / f"{name} tested")["test"] == whole["test"]


@pytest.mark.slow
@needs_deepspeed
def test_detection_continues_within_an_epoch_under_zero_3_and_its_folder_is_tested(runs: Path):
    check_interrupted(runs, "deepspeed_stage_3", "detection")


@pytest.mark.slow_strategies
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", every_strategy)
def test_every_task_continues_within_an_epoch_under_every_strategy(tmp_path: Path, strategy: str, task: str):
    jobs = Jobs(tmp_path)
    jobs.add_interrupted(strategy, task, VMAMBA)
    check_interrupted(jobs.run(), strategy, task)


@pytest.mark.slow_strategies
@pytest.mark.parametrize("strategy", [pytest.param("deepspeed_stage_3", marks=needs_deepspeed), "fsdp2"])
def test_the_operators_of_gpus_train_with_split_parameters(tmp_path: Path, strategy: str):
    """They take a layer's weight without calling the layer, which is what gathers it."""
    pytest.importorskip("triton")
    jobs = Jobs(tmp_path)
    for name in ("ddp", strategy):
        limits = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0")
        jobs.add(name, name, VMAMBA, SMOOTH, CONSTANT, *limits, "--trainer.limit_test_batches=1")
    runs = jobs.run(TRITON_INTERPRET="1", EVMAMBA_BACKEND="triton")
    assert told(runs / strategy)["losses"] == pytest.approx(told(runs / "ddp")["losses"], rel=1e-6)
    for name, value in parameters_of(runs / strategy).items():
        torch.testing.assert_close(value, parameters_of(runs / "ddp")[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", every_strategy)
def test_losses_weights_and_metrics_are_those_of_ddp(runs: Path, strategy: str):
    """With accumulation, clipping and a warm-up that moves once an optimizer step."""
    expected, found = told(runs / "ddp"), told(runs / strategy)
    assert found["rates"] == expected["rates"]
    assert len(set(found["rates"])) == 3
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["parameters"] == expected["parameters"]
    assert found["test"] == pytest.approx(expected["test"], rel=1e-5)
    for rank in range(2):
        for name, value in parameters_of(runs / strategy, rank).items():
            torch.testing.assert_close(value, parameters_of(runs / "ddp")[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", every_strategy)
def test_all_ranks_hold_the_same_weights_and_metrics(runs: Path, strategy: str):
    first, second = parameters_of(runs / strategy), parameters_of(runs / strategy, rank=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert told(runs / strategy)["val"] == told(runs / strategy, 1)["val"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", continued_strategies)
def test_a_training_continues_from_its_folder(runs: Path, strategy: str):
    whole, continued = told(runs / strategy), told(runs / f"{strategy} continued")
    assert folder_kind(Path(last(runs / f"{strategy} short"))) == ("fsdp2" if strategy == "fsdp2" else "deepspeed")
    assert continued["losses"] == whole["losses"][4:]
    assert continued["rates"] == whole["rates"][4:]
    expected = weights(runs / strategy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(runs / f"{strategy} continued").items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", continued_strategies)
def test_a_folder_is_tested_by_as_many_processes(runs: Path, strategy: str):
    assert told(runs / f"{strategy} tested")["test"] == told(runs / strategy)["test"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", every_strategy)
def test_a_consolidated_file_has_the_trained_weights_bit_for_bit(runs: Path, strategy: str, tmp_path: Path):
    trained = weights(runs / strategy)
    file = consolidate(Path(last(runs / strategy)), tmp_path / "weights.safetensors")
    found = safetensors.torch.load_file(file)
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    build_backbone("resnet10t", features_only=False, num_classes=2, checkpoint=str(file))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("deepspeed_stage_3", marks=needs_deepspeed), "fsdp2"])
def test_one_process_tests_a_consolidated_file_with_the_same_metrics(runs: Path, strategy: str, tmp_path: Path):
    file = consolidate(Path(last(runs / strategy)), tmp_path / "whole.ckpt")
    options = ["--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={file}"]
    train(["test", f"--config={runs / 'classification.yaml'}", *options])
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics == pytest.approx(told(runs / strategy)["test"], rel=1e-5)


@pytest.mark.slow
@needs_deepspeed
def test_zero_2_keeps_the_averaged_weights_beside_the_raw_ones(runs: Path, tmp_path: Path):
    by_ddp = torch.load(last(runs / "ddp averaged"), weights_only=True)
    file = consolidate(Path(last(runs / "deepspeed_stage_2 averaged")), tmp_path / "whole.ckpt")
    found = torch.load(file, weights_only=True)
    for slot in ("state_dict", "current_model_state"):
        for name, value in by_ddp[slot].items():
            torch.testing.assert_close(found[slot][name], value, rtol=1e-5, atol=1e-5)  # six steps of 1e-3
    tested = told(runs / "deepspeed_stage_2 averaged tested")["test"]
    assert tested == pytest.approx(told(runs / "ddp averaged tested")["test"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("strategy", [pytest.param("deepspeed_stage_3", marks=needs_deepspeed), "fsdp2"])
def test_split_parameters_train_and_test_the_other_tasks(runs: Path, strategy: str, task: str, tmp_path: Path):
    by_ddp, by_strategy = told(runs / f"ddp {task}"), told(runs / f"{strategy} {task}")
    assert by_strategy["losses"] == pytest.approx(by_ddp["losses"], rel=1e-4)
    assert by_strategy["test"] == pytest.approx(by_ddp["test"], rel=1e-4)
    file = consolidate(Path(last(runs / f"{strategy} {task}")), tmp_path / "whole.ckpt")
    pyramid = evmamba.create_model("efficientvmamba_t", features_only=True)
    evmamba.load_checkpoint(pyramid, file)
    trained = weights(runs / f"{strategy} {task}")
    (prefix,) = {name.removesuffix("stem.conv.weight") for name in trained if name.endswith("stem.conv.weight")}
    found = {prefix + name: value for name, value in pyramid.state_dict().items()}
    assert len(found.keys() & trained.keys()) >= len(found) - 2  # a detector has no use for the first map's norm
    assert all(torch.equal(found[name], trained[name]) for name in found.keys() & trained.keys())

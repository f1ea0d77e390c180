"""`evmamba fit` killed or warned at arbitrary moments and started again: the same end, bit for bit."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

Fit = Callable[..., list[int]]

CALLBACKS = {
    "WeightEMA": {"decay": 0.9},
    "LastCheckpoint": {"every_n_train_steps": 1},
}
TRAINER: dict[str, Any] = {
    "max_epochs": 3,
    "accelerator": "cpu",
    "devices": 1,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
CLASSIFICATION: dict[str, Any] = {
    "trainer": TRAINER | {"accumulate_grad_batches": 2},
    "model": {
        "class_path": "evmamba.tasks.classification.ClassificationModule",
        "init_args": {
            "backbone": "test_efficientnet",
            "drop_path_rate": 0.2,
            "mixup": 0.2,
            "cutmix": 1.0,
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
    },
    "data": {
        "class_path": "evmamba.tasks.classification.ClassificationData",
        "init_args": {
            "image_size": 32,
            "batch_size": 4,
            "num_workers": 2,
            "auto_augment": "rand-m9-mstd0.5",
            "random_erasing": 0.5,
        },
    },
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fit]:
    """Start a training, end it as told (see resume_run.py), return the exit statuses of its ranks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
    environment |= {"OMP_NUM_THREADS": "1", "EVMAMBA_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    program = Path(__file__).with_name("resume_run.py")
    server = subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def fit(recipe: Path, folder: Path, *arguments: str, ranks: int = 1, **ending: Any) -> list[int]:
        job = {
            "ranks": ranks,
            "rows": None,
            "delay": 0.0,
            "signal": "SIGKILL",
            "rank": None,
            "group": False,
            "environment": {},
        } | ending
        options = [f"--trainer.default_root_dir={folder}", f"--trainer.devices={ranks}", *arguments]
        job["arguments"] = ["fit", f"--config={recipe}", *options]
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(job | {"folder": str(folder)}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield fit
    server.stdin.close()  # type: ignore[union-attr]
    server.wait(60)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes: 24 training images are 6 batches and 3 optimizer steps an epoch."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for k in range(count):
            path = root / split / "ab"[k % 2] / f"{k:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return root


def recipe(folder: Path, base: dict[str, Any], monitor: str, **data: Any) -> Path:
    """Write a recipe with the callbacks of the published ones."""
    names = {**CALLBACKS, "BestCheckpoint": {"monitor": monitor}}
    callbacks = [{"class_path": f"evmamba.tasks.training.callbacks.{name}", "init_args": names[name]} for name in names]
    config = json.loads(json.dumps(base))
    config["trainer"]["callbacks"] = callbacks
    config["data"]["init_args"] |= data
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def log_of(folder: Path, rank: int = 0) -> str:
    return (folder / f"log{rank}.txt").read_text()


def assert_same_training(folder: Path, expected: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(root / "checkpoints" / name) for root in (expected, folder))
        assert one["global_step"] == other["global_step"]
        for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert_same(one[key], other[key], f"{name}[{key}]")
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{k}]")
    else:
        assert one == other, where


@pytest.mark.slow
def test_classification_killed_at_random_moments(tmp_path: Path, fit: Fit, images: Path):
    """Mixup, cutmix, RandAugment, erasing, drop path, averaged weights, accumulation, two loading processes.

    The one that is killed writes its checkpoints while it trains on.
    """
    path = recipe(tmp_path, CLASSIFICATION, "val/top1", data_dir=str(images))
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert fit(path, whole) == [0]
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"][1]["init_args"]["asynchronous"] = True
    path.write_text(yaml.safe_dump(config))
    draw = random.Random(0)
    for rows in (1, 3, 4, 6, 9, 10):  # of 12; among them before and after a validation
        assert fit(path, folder, rows=rows, delay=draw.choice([0.0, draw.uniform(0.0, 0.1)])) == [-9]
    assert fit(path, folder) == [0]
    assert log_of(folder).count("continuing the training") >= 5
    assert_same_training(folder, whole)
    assert fit(path, folder) == [0]
    assert log_of(folder).count("is finished (9 steps); --fresh begins anew") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path: Path, fit: Fit, images: Path, name: str, status: int
):
    """The loading processes get it too, as from a scheduler or a terminal."""
    path = recipe(tmp_path, CLASSIFICATION, "val/top1", data_dir=str(images), num_workers=2)
    assert fit(path, tmp_path / "a", rows=2, signal=name, group=True) == [status]
    assert f"stopped by {name} at step" in log_of(tmp_path / "a")
    assert "Traceback" not in log_of(tmp_path / "a")
    stopped = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt")["global_step"]
    assert 2 <= stopped < 9
    assert fit(path, tmp_path / "a") == [0]
    assert fit(path, tmp_path / "b") == [0]
    assert f"from last.ckpt, step {stopped}" in log_of(tmp_path / "a")
    assert_same_training(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_continue(tmp_path: Path, fit: Fit, images: Path):
    """SIGTERM reaches one of them only; later both are killed."""
    path = recipe(tmp_path, CLASSIFICATION, "val/top1", data_dir=str(images), num_workers=0)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert fit(path, whole, ranks=2) == [0, 0]
    assert fit(path, folder, ranks=2, rows=1, signal="SIGTERM", rank=1) == [75, 75]
    assert fit(path, folder, ranks=2, rows=6) == [-9, -9]
    assert fit(path, folder, ranks=2) == [0, 0]
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_three_processes_add_their_gradients_in_one_order_from_the_first_step_of_every_start(
    tmp_path: Path, fit: Fit, images: Path
):
    """DDP sorts its buckets anew after the first step; with three summands the order of adding then shows."""
    base = CLASSIFICATION | {"trainer": TRAINER}
    path = recipe(tmp_path, base, "val/top1", data_dir=str(images), num_workers=0)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert fit(path, whole, ranks=3) == [0, 0, 0]
    # One of them is stopped, as on a node that hangs: the others name it, and all end.
    assert fit(path, folder, "--timeout=6", ranks=3, rows=2, signal="SIGSTOP", rank=1) == [75, -9, 75]
    said = log_of(folder) + log_of(folder, 2)
    assert said.count("gives no sign of life") == said.count("evmamba: rank 1 on ") == 1
    assert "the training ends here; the same command continues" in said
    assert list((folder / "heartbeats").glob("rank-*.stack"))
    assert fit(path, folder, ranks=3) == [0, 0, 0]
    assert "continuing the training" in log_of(folder)
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_a_second_training_in_the_folder_of_one_at_work_is_refused(tmp_path: Path, fit: Fit, images: Path):
    path = recipe(tmp_path, CLASSIFICATION, "val/top1", data_dir=str(images), num_workers=0)
    folder = tmp_path / "run"
    assert fit(path, folder, rows=1, signal="SECOND") == [0, 2]
    (line,) = [line for line in log_of(folder / "second").splitlines() if line.startswith("evmamba: ")]
    assert "run is at work already: process" in line
    assert torch.load(folder / "checkpoints" / "last.ckpt")["global_step"] == 9
    assert not (folder / "earlier-1").exists()


@pytest.mark.slow
def test_fresh_begins_anew_but_not_in_a_job_that_is_started_again(tmp_path: Path, fit: Fit, images: Path):
    path = recipe(tmp_path, CLASSIFICATION, "val/top1", data_dir=str(images), num_workers=0)
    folder = tmp_path / "run"
    assert fit(path, folder, rows=2) == [-9]
    assert fit(path, folder, "--fresh", rows=6, environment={"SLURM_RESTART_COUNT": "1"}) == [-9]
    assert "continuing the training" in log_of(folder)
    assert fit(path, folder, "--fresh") == [0]
    assert (folder / "earlier-1" / "checkpoints" / "last.ckpt").is_file()
    assert torch.load(folder / "checkpoints" / "last.ckpt")["global_step"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_detection_and_segmentation_killed_between_two_steps(tmp_path: Path, fit: Fit, task: str):
    """Multi-scale training sizes and flips; random scale, crop, colours and dropout. On a few embedded images."""
    module = {"detection": "Detection", "segmentation": "Segmentation"}[task]
    models = {
        "detection": {"min_size": [64, 80, 96], "max_size": 128, "channels": 16, "group_norm": True},
        "segmentation": {"decoder_channels": 16, "aux_channels": 8},
    }
    data = {"detection": {"photometric_distortion": True}, "segmentation": {"crop_size": 64}}
    base = {
        "trainer": TRAINER | {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1},
        "model": {
            "class_path": f"evmamba.tasks.{task}.{module}Module",
            "init_args": {"backbone": "resnet10t", "schedule": {"kind": "cosine"}} | models[task],
        },
        "data": {
            "class_path": f"evmamba.tasks.{task}.{module}Data",
            "init_args": {"batch_size": 2, "num_workers": 1} | data[task],
        },
    }
    path = recipe(tmp_path, base, {"detection": "val/AP", "segmentation": "val/mIoU"}[task])
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert fit(path, whole) == [0], log_of(whole)
    assert fit(path, folder, rows=5) == [-9]
    assert fit(path, folder) == [0]
    assert_same_training(folder, whole)

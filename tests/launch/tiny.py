"""Trainings of a few seconds, for tests that start processes: images made of noise, and recipes for them."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

BIN = Path(sys.executable).parent
EVMAMBA = [BIN / "evmamba"]
TASKS = ("classification", "detection", "segmentation")
TRAIN_IMAGES, VAL_IMAGES, SIZE = 12, 5, 48
MODELS: dict[str, dict[str, Any]] = {
    "classification": {"backbone": "resnet10t"},
    "detection": {"backbone": "resnet10t", "min_size": [64], "max_size": 64, "channels": 16},
    "segmentation": {"backbone": "resnet10t", "decoder_channels": 8, "aux_channels": 8},
}
DATA: dict[str, dict[str, Any]] = {
    "classification": {"image_size": 32},
    "detection": {},
    "segmentation": {"crop_size": 32},
}


def write_images(task: str, root: Path) -> None:
    """Write a data set of two classes in the task's layout."""
    rng = np.random.default_rng(0)
    folders = {"train": "training", "val": "validation"} if task == "segmentation" else {"train": "train", "val": "val"}
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        names = [f"{k:02d}.png" for k in range(count)]
        parents = [("ant", "bee")[k % 2] if task == "classification" else folders[split] for k in range(count)]
        base = root / (split if task == "classification" else "images")
        for name, parent in zip(names, parents, strict=True):
            _write(base / parent / name, rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
            if task == "segmentation":
                _write(root / "annotations" / parent / name, rng.integers(1, 3, (SIZE, SIZE), dtype=np.uint8))
        if task == "detection":
            file = root / "annotations" / f"instances_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(_boxes(names)))
    if task == "segmentation":
        (root / "classes.txt").write_text("ant\nbee\n")


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _boxes(names: Sequence[str]) -> dict[str, Any]:
    """Two boxes an image, as COCO writes them."""
    images = [{"id": k, "file_name": name, "width": SIZE, "height": SIZE} for k, name in enumerate(names, 1)]
    boxes = [
        {"id": 2 * k + n, "image_id": k, "category_id": n, "bbox": [4 + 20 * n, 6, 16, 16], "area": 256, "iscrowd": 0}
        for k in range(1, len(names) + 1)
        for n in (1, 2)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]}


def write_recipe(task: str, data: Path, path: Path, **trainer: Any) -> Path:
    """Write a recipe of two steps for such a data set; `trainer` are more of the Trainer's options."""
    package = f"evmamba.tasks.{task}.{task.title()}"
    document = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "evmamba.tasks.training.callbacks.LastCheckpoint"}],
            **trainer,
        },
        "model": {"class_path": f"{package}Module", "init_args": MODELS[task]},
        "data": {
            "class_path": f"{package}Data",
            "init_args": {"data_dir": str(data), "batch_size": 2, "num_workers": 0, **DATA[task]},
        },
    }
    path.write_text(yaml.safe_dump(document))
    return path


def loopback() -> dict[str, str]:
    """This process's environment, without what a scheduler put into it, for processes that meet on this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    here = str(Path(__file__).parent)  # misbehaviour.py is there
    return kept | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}


def run(
    command: Sequence[Any], timeout: float = 200, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that may start processes, by default in `loopback`; after `timeout` seconds all are killed."""
    with subprocess.Popen(
        list(map(str, command)),
        env=environment or loopback(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

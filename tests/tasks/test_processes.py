"""The same checkpoint gives the same metrics with 1, 2 and 3 processes, even with fewer images than processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evmamba.tasks.classification import ClassificationModule
from evmamba.tasks.classification.per_image import Right
from evmamba.tasks.per_image import PER_IMAGE_FILE

from .evaluation_run import BACKBONE, data_module

CLASSES = ("ant", "bee")
VAL_IMAGES = {"thirteen": 13, "two": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = ClassificationModule(BACKBONE, num_classes=len(CLASSES))
    with torch.no_grad():
        module.network.get_classifier().weight.mul_(30)  # opinions, not ties
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(module.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise of many colours, so that a random network does not put all of it into one class."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for name, val_images in VAL_IMAGES.items():
        for split, count in (("train", 6), ("val", val_images)):
            for k in range(count):
                path = folder / name / split / CLASSES[k % 2] / f"{k:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.uniform(0, 255, (1, 1, 3)) + rng.normal(0, 60, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return [folder / name for name in VAL_IMAGES]


def by_hand(root: Path, checkpoint: Path) -> tuple[float, float, list[list[int]]]:
    """Top-1, loss and confusion by a plain loop over the files."""
    data = data_module(root)
    data.setup("validate")
    module = ClassificationModule(BACKBONE, num_classes=len(CLASSES)).eval()
    module.load_state_dict(torch.load(checkpoint))
    confusion, losses = np.zeros((2, 2), dtype=int), []
    for image, label, _ in (data.val_set[k] for k in range(len(data.val_set))):
        with torch.no_grad():
            logits = module(image[None])
        confusion[label, int(logits.argmax())] += 1
        losses.append(float(F.cross_entropy(logits, torch.tensor([label]))))
    return confusion.trace() / confusion.sum(), float(np.mean(losses)), confusion.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_metrics_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, checkpoint: Path, roots: list[Path], processes: int
):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("evaluation_run.py")
    command = [sys.executable, program, str(processes), checkpoint, tmp_path, *roots]  # Lightning starts other ranks
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]

    for root in roots:
        top1, loss, confusion = by_hand(root, checkpoint)
        assert all(sum(column) > 0 for column in zip(*confusion, strict=True)) or root.name == "two"
        for held in (rank[root.name] for rank in ranks):
            for stage in ("val", "test"):
                assert held[f"{stage}/top1"] == np.float32(top1)
                assert held[f"{stage}/top5"] == 1.0
                assert held[f"{stage}/loss"] == pytest.approx(loss, rel=1e-6)
            assert held["confusion"] == confusion
        kept = Right.read(tmp_path / root.name / PER_IMAGE_FILE)
        assert len(kept.images) == VAL_IMAGES[root.name]
        assert kept.images[0] == "val/ant/00.png"
        assert kept.metric("top1", np.ones((1, len(kept.images))))[0] == pytest.approx(top1)
        for held in (rank[root.name] for rank in ranks):
            assert held["after training"] == ranks[0][root.name]["after training"]

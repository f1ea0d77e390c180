"""A checkpoint of every task, and an image."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evmamba.launch.fit.checkpoint_metadata import KEY
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


def checkpoint(
    task: str,
    folder: Path,
    backbone: str = "efficientvmamba_t",
    data: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Path, TaskModule]:
    """As a training writes it: weights and description."""
    torch.manual_seed(0)
    kind = KINDS[task]
    arguments["backbone"] = backbone
    module = kind(num_classes=len(NAMES), **arguments).eval()
    description = {
        "task": task,
        "model": {"class_path": f"evmamba.tasks.{task}.{kind.__name__}", "init_args": arguments},
        "data": {"init_args": data or {}},
        "class_names": NAMES,
    }
    torch.save({"state_dict": module.state_dict(), KEY: description}, folder / "best.ckpt")
    return folder / "best.ckpt", module


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))

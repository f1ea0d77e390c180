"""A linear task on numbers, small enough to follow by hand, for tests of what the tasks share."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.module import TaskModule
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig

CONSTANT = ScheduleConfig("constant")


class ToyModule(TaskModule):
    """One weight; loss (w - 1)^2 times a factor that comes with the batch; the metric is the weight itself."""

    task = "classification"

    def __init__(self, optimizer: OptimizerConfig | None = None, schedule: ScheduleConfig = CONSTANT) -> None:
        super().__init__(optimizer or OptimizerConfig(lr=0.1, weight_decay=0.0), schedule)
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.counted: list[str] = []
        self.rates: list[float] = []

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return ((self.weight - 1) ** 2 * batch["factor"]).mean(), {}

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        self.counted += batch["path"]

    def evaluation_end(self, stage: str) -> Evaluation:
        return Evaluation({"weight": self.weight.item()})


class ToyData(TaskDataModule):
    """Samples are factors of the loss; their file names are file0, file1, ..."""

    task = "classification"

    def __init__(self, root: Path, factors: list[float], batch_size: int = 2, num_workers: int = 0) -> None:
        super().__init__(str(root), batch_size, None, num_workers, "stop", seed=0)
        self.num_classes, self.class_names = 2, ["a", "b"]
        self.factors = factors

    def image_paths(self) -> tuple[list[Path], list[Path]]:
        files = sorted(self.root.glob("*.png"))
        return files, files

    def setup(self, stage: str) -> None:
        self.train_set = self.val_set = list(enumerate(self.factors))  # type: ignore[assignment]

    def collate(self, samples: list[tuple[int, float]]) -> dict[str, Any]:
        return {"factor": torch.tensor([f for _, f in samples]), "path": [f"file{k}" for k, _ in samples]}


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    """A CPU trainer that writes checkpoints under `folder` and nothing else."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **(quiet | options))

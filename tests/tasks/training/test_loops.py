"""A training that is interrupted anywhere ends exactly like one that is not: weights, averages, optimizer, logs."""

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.module import TaskModule
from evmamba.tasks.training import callbacks
from evmamba.tasks.training.callbacks import BestCheckpoint, LastCheckpoint, WeightEMA
from evmamba.tasks.training.checkpoint_files import candidates, newest_whole
from evmamba.tasks.training.metrics_log import MetricsLog
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig

from ..toy import quiet_trainer


class NoisyModule(TaskModule):
    """Everything that has a state or draws random numbers, in a network of a hundred weights."""

    task = "classification"

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(lr=0.05), ScheduleConfig("cosine", warmup_steps=3))
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 1))
        self.total = 0.0

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        mixed = batch["x"] * float(np.random.beta(1, 1)) + random.gauss(0, 0.1)
        loss = (self.network(mixed) - 1).square().mean()
        return loss, {"mixed": mixed.mean()}

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.total = 0.0

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        self.total += self.network(batch["x"]).double().sum().item()

    def evaluation_end(self, stage: str) -> Evaluation:
        return Evaluation({"score": self.total})


class NoisySet(Dataset):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        noise = [random.random(), float(np.random.rand()), random.gauss(0, 1)]
        return index, torch.tensor([index / 22, *noise]) + torch.randn(4)


class PlainSet(NoisySet):
    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.full((4,), index / 22)


class NoisyData(TaskDataModule):
    task = "classification"

    def __init__(self, root: Path, num_workers: int = 0) -> None:
        super().__init__(str(root), 2, 6, num_workers, "stop", seed=3)
        self.num_classes, self.class_names = 2, ["a", "b"]

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set = NoisySet(), PlainSet()

    def collate(self, samples: list[tuple[int, Tensor]]) -> dict[str, Any]:
        return {"x": torch.stack([x for _, x in samples]), "path": [f"file{k}" for k, _ in samples]}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be written after it."""


class Killer(L.Callback):
    """Ends the process's part at the n-th of the moments below, counted over the whole training."""

    def __init__(self, moment: int | None) -> None:
        self.moment = moment
        self.moments = 0

    def count(self, *args: Any) -> None:
        self.moments += 1
        if self.moments == self.moment:
            raise Killed

    on_sanity_check_end = on_train_start = on_train_epoch_start = on_train_batch_start = count
    on_before_optimizer_step = on_before_zero_grad = on_train_batch_end = count
    on_validation_start = on_validation_batch_start = on_validation_batch_end = on_validation_epoch_end = count
    on_validation_end = on_train_epoch_end = on_train_end = count


class KilledLog(MetricsLog):
    """What a killed process has not written yet is lost."""

    def finalize(self, status: str) -> None:
        if status == "success":
            super().finalize(status)


SETUPS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3, "num_sanity_val_steps": 1},
    "steps": {"max_steps": 14, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 6},
    "within epochs": {"max_epochs": 2, "val_check_interval": 0.5},
    "without validation": {"max_epochs": 2, "limit_val_batches": 0},
    "rarely validated": {"max_epochs": 3, "check_val_every_n_epoch": 2},
}


def train(
    folder: Path, setup: str, moment: int | None = None, workers: int = 0, extra: L.Callback | None = None
) -> int | None:
    """Train, or go on where a training in `folder` stands; return the number of moments, None when it was killed."""
    L.seed_everything(7, verbose=False)
    killer = Killer(moment)
    parts = [WeightEMA(0.8, warmup=True), killer, *([extra] if extra else [])]
    if SETUPS[setup].get("limit_val_batches") != 0:
        parts.append(BestCheckpoint("val/score"))
    parts.append(LastCheckpoint(every_n_train_steps=2))
    trainer = quiet_trainer(
        folder,
        callbacks=parts,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=KilledLog(str(folder), tensorboard=False),
        **SETUPS[setup],
    )
    checkpoint, torn = newest_whole(candidates(folder))
    assert not torn
    try:
        trainer.fit(NoisyModule(), NoisyData(folder.parent, workers), ckpt_path=checkpoint and str(checkpoint.path))
    except Killed:
        return None
    assert trainer.lightning_module is not None
    torch.save(trainer.lightning_module.state_dict(), folder / "final.pt")
    return killer.moments


def assert_same(one: Any, other: Any, folders: tuple[Path, Path], where: str = "checkpoint") -> None:
    """Bit by bit, through lists and dicts; the two folders' names may differ."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        translated = {_translate(key, folders): value for key, value in other.items()}
        assert list(one) == list(translated), where
        for key in one:
            assert_same(one[key], translated[key], folders, f"{where}[{key}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, folders, f"{where}[{k}]")
    else:
        assert one == _translate(other, folders), where


def _translate(text: Any, folders: tuple[Path, Path]) -> Any:
    return text.replace(str(folders[1]), str(folders[0])) if isinstance(text, str) else text


def assert_same_training(folder: Path, expected: Path) -> None:
    names = ["final.pt", "checkpoints/last.ckpt"]
    names += ["checkpoints/best.ckpt"] if (expected / "checkpoints/best.ckpt").exists() else []
    for name in names:
        one, other = (torch.load(root / name) for root in (expected, folder))
        assert_same(one, other, (expected, folder), name)
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_at_any_moment_and_continued_it_ends_the_same(tmp_path: Path, setup: str):
    expected = tmp_path / "whole"
    moments = train(expected, setup)
    assert moments is not None
    chosen = random.Random(setup).sample(range(1, moments + 1), 8)
    for moment in [*chosen, moments]:
        folder = tmp_path / f"killed{moment}"
        assert train(folder, setup, moment) is None
        train(folder, setup)
        assert_same_training(folder, expected)


@pytest.mark.parametrize("where", ["half a file", "before the renames", "between the renames"])
def test_killed_while_a_checkpoint_is_written_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    expected, folder = tmp_path / "whole", tmp_path / "killed"
    train(expected, "within epochs")
    save, replace, replace_last = torch.save, Path.replace, callbacks.replace_last
    writes = 0

    def half(content: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half")
        raise Killed

    def dying(partial: Path, target: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == 4 and where == "before the renames":
            raise Killed
        if writes == 4 and where == "between the renames":
            replace(target / "last.ckpt", target / "previous.ckpt")
            raise Killed
        replace_last(partial, target)
        if writes == 3 and where == "half a file":
            monkeypatch.setattr(torch, "save", half)

    monkeypatch.setattr(callbacks, "replace_last", dying)
    assert train(folder, "within epochs") is None
    monkeypatch.undo()
    assert torch.save is save
    train(folder, "within epochs")
    assert_same_training(folder, expected)


def test_loading_processes_do_not_change_a_training(tmp_path: Path):
    train(tmp_path / "alone", "epochs")
    train(tmp_path / "workers", "epochs", moment=70, workers=2)
    train(tmp_path / "workers", "epochs", workers=1)
    assert_same_training(tmp_path / "workers", tmp_path / "alone")

"""A training is logged by others' loggers too, and its own log is there all the same."""

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger

from evmamba.errors import UserError
from evmamba.launch.fit import loggers
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.loggers import LOGGERS, check_logger, logger_settings
from evmamba.launch.fit.training import fit_and_test
from evmamba.launch.store.spec import TrainingSpec

from ..handmade import made_spec
from ..tiny import write_images, write_recipe


class FakeTrackio(ModuleType):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> "FakeTrackio":
        self.begun.append(options)
        return self

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("kind", [WandbLogger, MLFlowLogger, CometLogger])
def test_lightnings_loggers_take_what_they_are_given(kind: type):
    """Their libraries are not needed for that; a typing error would show in the night."""
    from jsonargparse import ArgumentParser

    name = {WandbLogger: "wandb", MLFlowLogger: "mlflow", CometLogger: "comet"}[kind]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "logger")
    parser.parse_object({"logger": LOGGERS[name].arguments("bench", "run-1", "/out/bench/runs/run-1")})


def test_a_training_is_logged_twice_and_its_hash_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    write_images("classification", tmp_path / "data")
    recipe = write_recipe("classification", tmp_path / "data", tmp_path / "recipe.yaml")
    spec = made_spec("classification", "resnet10t", settings=settings_of(recipe), loggers=("trackio",))
    assert isinstance(spec, TrainingSpec)
    assert spec.hash == made_spec("classification", "resnet10t", settings=settings_of(recipe)).hash
    folder = tmp_path / "bench" / "runs" / spec.name
    folder.mkdir(parents=True)
    fit_and_test(spec, folder)
    assert fake.begun[0] == {"project": "bench", "name": spec.name, "resume": "allow"}
    logged = {name for _, row in fake.rows for name in row}
    assert {"train/loss", "train/lr"} <= logged
    with (folder / "metrics.csv").open() as file:
        own = list(csv.DictReader(file))
    losses = [row["train/loss"] for _, row in fake.rows if "train/loss" in row]
    assert losses == pytest.approx([float(row["train/loss"]) for row in own if row["train/loss"]], rel=1e-4)
    assert fake.finished >= 1


def test_unknown_and_missing_loggers_are_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="unknown logger 'wandbb'; did you mean wandb"):
        check_logger("wandbb")
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--logger comet needs a library that is not installed: pip install comet_ml"):
        check_logger("comet")


def test_without_any_there_is_the_trainings_own():
    (only,) = logger_settings(Path("bench/runs/a"), ())
    assert only["class_path"].endswith("MetricsLog")
    assert only["init_args"] == {"save_dir": "bench/runs/a"}

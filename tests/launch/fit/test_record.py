"""What a run leaves behind: its result, its progress, and its training's curve, which an interruption does not cut."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evmamba.launch.fit import record
from evmamba.launch.fit.record import CURVE_POINTS, ProgressWriter, TrainingRecord, total_steps, weights_in_memory
from evmamba.tasks.training.callbacks import WeightEMA


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(record.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def trainer(**changes: Any) -> Any:
    usual = {
        "global_step": 0,
        "current_epoch": 0,
        "estimated_stepping_batches": 10,
        "accumulate_grad_batches": 2,
        "world_size": 3,
        "is_global_zero": True,
        "sanity_checking": False,
        "callbacks": [],
    }
    return SimpleNamespace(**(usual | changes))


def step(training: TrainingRecord, number: int, loss: float = 1.0, total: float = 10) -> None:
    running = trainer(global_step=number, estimated_stepping_batches=total)
    training.on_train_batch_end(running, None, {"loss": loss}, {"path": ["a", "b"]}, number)  # type: ignore[arg-type]


def test_speed_is_the_median_step_without_validations(clock: Clock):
    training = TrainingRecord()
    training.on_train_start(None, None)  # type: ignore[arg-type]
    for number, seconds in enumerate((5.0, 0.5, 0.5, 4.0, 0.5), 1):
        clock.now += seconds
        if number == 4:
            training.on_train_epoch_start(None, None)  # type: ignore[arg-type]  # after a validation of 4 s
        step(training, number)
    summary = training.summary(trainer(global_step=5))
    assert summary["images_per_s"] == 2 * 3 / 0.5
    assert summary["images"] == 5 * 2 * 2 * 3
    assert summary["seconds"] == 10.5


def test_a_long_training_has_as_many_points_as_a_curve_shows(clock: Clock):
    training = TrainingRecord()
    for number in range(1, 2001):
        step(training, number, loss=1 / number, total=2000)
    assert len(training.curve) == CURVE_POINTS
    assert training.curve[-1] == (2000, 0.0005)


def test_a_continued_training_goes_on_with_its_curve_and_its_time(clock: Clock):
    first = TrainingRecord()
    first.on_train_start(None, None)  # type: ignore[arg-type]
    clock.now += 7
    step(first, 1)
    module: Any = SimpleNamespace(evaluation=SimpleNamespace(metrics={"top1": 0.5}))
    first.on_validation_end(trainer(global_step=1), module)
    saved = json.loads(json.dumps(first.state_dict()))

    clock.now += 1000  # the job waits
    second = TrainingRecord()
    second.load_state_dict(saved)
    second.on_train_start(None, None)  # type: ignore[arg-type]
    module.evaluation.metrics = {"top1": 0.75}
    second.on_validation_end(trainer(global_step=1), module)  # the validation at which it stopped is done again
    clock.now += 3
    summary = second.summary(trainer(global_step=1))
    assert summary["seconds"] == 10
    assert summary["starts"] == 2
    assert "starts" not in first.summary(trainer(global_step=1))
    third = TrainingRecord()
    third.load_state_dict(second.state_dict())
    assert third.summary(trainer(global_step=1))["starts"] == 3
    assert summary["validation"] == [(1, {"top1": 0.75})]
    assert [list(point) for point in summary["curve"]] == [[1, 1.0]]
    assert summary["images"] == 12  # even if no step was left


def test_progress_is_written_twice_a_second_and_at_the_end(clock: Clock, tmp_path: Path):
    writer = ProgressWriter(tmp_path, TrainingRecord())

    def written() -> int:
        return json.loads((tmp_path / "progress.json").read_text())["done"]

    seen = []
    for number in range(1, 11):
        clock.now += 0.2
        writer.on_train_batch_end(trainer(global_step=number))
        seen.append(written())
    assert seen == [1, 1, 1, 4, 4, 4, 7, 7, 7, 10]
    writer.on_train_batch_end(trainer(global_step=99, is_global_zero=False))
    assert written() == 10


def test_an_endless_training_has_no_number_of_steps():
    assert total_steps(trainer(estimated_stepping_batches=float("inf"))) == 0
    assert total_steps(trainer(estimated_stepping_batches=7.0)) == 7


def test_averaged_weights_are_called_so():
    assert weights_in_memory(trainer()) == "last epoch"
    assert weights_in_memory(trainer(callbacks=[WeightEMA()])) == "EMA of the last epoch"

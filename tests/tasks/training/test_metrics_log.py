"""One log however often a training is interrupted."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evmamba.errors import UserError
from evmamba.tasks.training.metrics_log import MetricsLog

from ...full_disk import full_disk


def test_a_continued_log_drops_what_came_after_the_checkpoint(tmp_path: Path):
    first = MetricsLog(str(tmp_path))
    first.keep(0)
    for step in range(4):
        first.log_metrics({"loss": 1 / (step + 3), "epoch": 0}, step)
    first.log_metrics({"val/top1": 0.5, "epoch": 0}, 3)
    first.save()  # killed without finalize

    second = MetricsLog(str(tmp_path))
    second.save()  # Lightning does, before anything else
    second.keep(2)
    assert second.rows == 2
    for step in (2, 3):
        second.log_metrics({"loss": 1 / (step + 3), "epoch": 0}, step)
    second.finalize("success")

    rows = [f"0,{step},{1 / (step + 3)!r}" for step in range(4)]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step,loss", *rows]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    assert "val/top1" not in events.Tags()["scalars"]


def test_a_training_from_the_beginning_replaces_an_earlier_log(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,0,1.0\n")
    log = MetricsLog(str(tmp_path), tensorboard=False)
    log.keep(0)
    log.log_metrics({"loss": 2.0, "epoch": 0}, 0)
    log.log_metrics({"val/top1": 0.5, "epoch": 0}, 0)
    log.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step,loss,val/top1", "0,0,2.0,", "0,0,,0.5"]


def test_a_full_disk_is_one_line_and_leaves_whole_rows_which_go_on_when_there_is_room(tmp_path: Path):
    log = MetricsLog(str(tmp_path), tensorboard=False)
    log.keep(0)
    for step in range(2):
        log.log_metrics({"loss": 2.0, "epoch": 0}, step)
        log.save()
    before = (tmp_path / "metrics.csv").read_text()
    log.log_metrics({"loss": 2.0, "epoch": 0}, 2)
    with full_disk(len(before) + 3), pytest.raises(UserError, match=r"cannot write .*metrics\.csv: File too large"):
        log.save()
    assert (tmp_path / "metrics.csv").read_text() == before
    log.save()
    assert (tmp_path / "metrics.csv").read_text() == f"{before}0,2,2.0\n"


def test_events_that_find_no_room_are_one_line_and_no_traceback_of_a_thread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = MetricsLog(str(tmp_path))
    log.keep(0)

    def train() -> None:
        for step in range(50):
            log.log_metrics({"loss": 2.0, "epoch": 0}, step)
            log.save()

    with full_disk(100), pytest.raises(UserError, match=r"cannot write .*tensorboard: File too large"):
        train()
    assert capsys.readouterr().err == ""

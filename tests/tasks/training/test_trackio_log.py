"""What Lightning logs goes to Trackio's run; nothing begins before the first row."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evmamba.tasks.training.trackio_log import TrackioLogger

from ..toy import ToyData, ToyModule, quiet_trainer


def test_rows_reach_the_run_and_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", (step, sorted(metrics)))),
        finish=lambda: calls.append(("finish", None)),
    )

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    logger = TrackioLogger("bench", "one", str(tmp_path))
    assert (logger.name, logger.version, logger.save_dir) == ("bench", "one", str(tmp_path))
    assert calls == []
    trainer = quiet_trainer(tmp_path, max_steps=2, logger=logger, log_every_n_steps=1)
    trainer.fit(ToyModule(), ToyData(tmp_path, [1.0] * 4))
    assert calls[0] == ("init", {"project": "bench", "name": "one", "resume": "allow"})
    steps = [step for kind, row in calls if kind == "log" for step, names in [row] if "train/loss" in names]
    assert steps == [0, 1]
    assert calls[-1] == ("finish", None)

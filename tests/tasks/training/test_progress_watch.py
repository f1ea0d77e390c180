"""A training tells its heartbeat how far it is, and NCCL where to leave its record."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evmamba.tasks.training.callbacks import LastCheckpoint
from evmamba.tasks.training.heartbeat import Beat, Heartbeat
from evmamba.tasks.training.lease import claim, release
from evmamba.tasks.training.progress_watch import ProgressWatch, record_collectives

from ..toy import ToyData, ToyModule, quiet_trainer


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release()


def test_every_part_of_a_training_is_a_step_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    noted: list[Beat] = []
    note = Heartbeat.note

    def keep(self: Heartbeat, *args: object, **options: object) -> None:
        note(self, *args, **options)  # type: ignore[arg-type]
        noted.append(self._beat)

    monkeypatch.setattr(Heartbeat, "note", keep)
    claim(tmp_path)
    callbacks = [LastCheckpoint(str(tmp_path)), ProgressWatch(tmp_path, 120)]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    trainer.fit(ToyModule(), ToyData(tmp_path, [1.0] * 4))
    positions = [beat.position for beat in noted]
    assert positions == sorted(positions)
    phases = [beat.phase for beat in noted if beat.batch == 1]
    assert phases[:4] == ["forward", "backward", "optimizer step", "loading"]
    assert {"saving", "validating", "validated"} <= {beat.phase for beat in noted}


def test_nccl_leaves_its_record_in_the_runs_folder_unless_told_otherwise(tmp_path: Path):
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    record_collectives(tmp_path, environment)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "7"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "heartbeats" / "nccl_trace_rank_")
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"

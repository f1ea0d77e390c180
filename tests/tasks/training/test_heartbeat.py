"""Which process is named when a run has fallen silent."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from evmamba.files import write_text
from evmamba.tasks.training import heartbeat
from evmamba.tasks.training.heartbeat import Beat, Heartbeat, beat_file, beats, behind, describe, silence

MINE = Beat("token", 0, "n1", "machine", os.getpid(), batch=5, phase="backward", order=22)


def written(folder: Path, *found: Beat, ages: tuple[float, ...] = ()) -> None:
    for beat, age in zip(found, ages or [0.0] * len(found), strict=True):
        path = beat_file(folder, beat.rank)
        write_text(path, json.dumps(dataclasses.asdict(beat)), durable=False)
        os.utime(path, (time.time() - age, time.time() - age))


def test_a_beat_says_how_far_the_training_is_and_where_its_thread_stands(tmp_path: Path):
    beating = Heartbeat(tmp_path, "token", 3, "n1", "machine")
    beating.start()
    beating.note("forward", batch=4)
    beating._write()
    beat = beats(tmp_path)[3]
    assert (beat.batch, beat.phase, beat.host, beat.pid) == (4, "forward", "n1", os.getpid())
    assert "_where" in beat.where or ".py:" in beat.where
    beating.stop()
    assert beats(tmp_path, "another start") == {}


def test_the_process_that_came_less_far_is_named_and_nobody_where_all_stand_together():
    loading = dataclasses.replace(MINE, rank=1, host="n2", batch=4, phase="loading", order=20, where="loader.py:7 get")
    third = dataclasses.replace(MINE, rank=2)
    found = {0: MINE, 1: loading, 2: third}
    assert behind(found) == [loading]
    said = describe([loading], False, found, 120)
    assert said.startswith("no progress for 120 s because of rank 1 on n2 in batch 4, loading (loader.py:7 get)")
    assert behind({0: MINE, 2: third}) == []
    gone = dataclasses.replace(MINE, rank=3, phase="ended", order=99)
    assert behind(found | {3: gone}) == [gone]  # and the others wait for it


@pytest.mark.parametrize(
    ("order", "alive", "batch", "ended"),
    [
        (1, None, 1, None),  # it has ended, and this one still writes its results
        (1, False, 2, "rank 1 on n2 gives no sign of life"),
        (1, False, 1, "rank 1 on n2 gives no sign of life"),  # also in the first step
        (0, True, 2, "because of rank 1 on n2"),
        (1, True, 2, "all processes stand at the same place"),
        (0, True, 1, None),  # it may compile, or index its images
    ],
)
def test_the_watch_ends_a_training_that_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int, alive: bool | None, batch: int, ended: str | None
):
    """Rank 0's own thread, and what it reads of rank 1."""
    said: list[str] = []
    counts = iter(range(1000))

    def read(folder: Path, token: str | None = None) -> dict[int, Beat]:
        phase, count = "ended" if alive is None else "backward", next(counts) if alive else 0
        return {1: dataclasses.replace(MINE, rank=1, host="n2", order=order, phase=phase, count=count)}

    def end(self: Heartbeat, silent: float, found: dict[int, Beat], stopped: list[Beat]) -> None:
        said.append(describe(stopped or behind(found), bool(stopped), found, silent))
        self._ended.set()

    monkeypatch.setattr(heartbeat, "beats", read)
    monkeypatch.setattr(Heartbeat, "_end", end)
    beating = Heartbeat(tmp_path, "token", 0, "n1", "machine")
    beating.timeout = 0.2
    beating.note("backward", batch)
    beating.start()
    beating._thread.join(0.8)
    beating.stop()
    if ended is None:
        assert said == []
    else:
        assert ended in said[0]
        assert ("rank 0 on n1 waits in batch" in said[0]) == ("(threading.py:" in said[0])  # this test's own join


def test_status_says_who_is_silent_and_for_how_long(tmp_path: Path):
    assert silence(tmp_path) is None
    waits = dataclasses.replace(MINE, idle=12 * 60.0)
    stopped = dataclasses.replace(MINE, rank=1, host="n2")
    written(tmp_path, waits, stopped, ages=(1.0, 12 * 60.0))
    assert silence(tmp_path) == "silent for 12 min, rank 1 on n2"
    late = dataclasses.replace(stopped, order=21, idle=12 * 60.0)
    written(tmp_path, waits, late)
    assert silence(tmp_path) == "silent for 12 min, rank 1 on n2"
    written(tmp_path, waits, late, ages=(-3600.0, -3600.0))  # before the clock was set back
    assert silence(tmp_path) == "silent for 12 min, rank 1 on n2"
    written(tmp_path, MINE, late)
    assert silence(tmp_path) is None


def test_only_the_first_to_notice_tells(tmp_path: Path):
    first, second = (Heartbeat(tmp_path, "token", rank, "n1", "machine") for rank in range(2))
    first.start()
    assert [first._is_first("why"), second._is_first("why")] == [True, False]
    again = Heartbeat(tmp_path, "the next start", 0, "n1", "machine")
    assert again._is_first("why")
    first.stop()


@pytest.mark.parametrize("left", [None, "[]", '{"reason": "another shape"}', '{"token": "an earlier start"}'])
def test_one_process_is_the_first_to_tell_whatever_an_earlier_start_left(tmp_path: Path, left: str | None):
    beating = Heartbeat(tmp_path, "token", 0, "n1", "machine")
    (tmp_path / heartbeat.FOLDER).mkdir()
    if left is not None:
        (tmp_path / heartbeat.FOLDER / heartbeat.HANG_FILE).write_text(left)
    assert [beating._is_first("silent") for _ in range(2)] == [True, False]

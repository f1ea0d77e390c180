"""A run's folder has one owner: who may take it over, who is refused, and who must not write any more."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evmamba.errors import UserError
from evmamba.files import write_text
from evmamba.tasks.training import lease
from evmamba.tasks.training.heartbeat import beat_file
from evmamba.tasks.training.lease import (
    MAX_IDLE_STARTS,
    OWNER_FILE,
    LeaseLost,
    Owner,
    adopt,
    claim,
    guard,
    is_hopeless,
    is_ours,
    read_owner,
    release,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", lease.TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    yield
    release()


@pytest.fixture
def other() -> Iterator[int]:
    """A process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def owned(folder: Path, **changes: object) -> Owner:
    """Make a folder that of another start."""
    born = lease._born(os.getppid()) or 0.0
    owner = Owner("another", "n2", lease.machine(), os.getppid(), born, None, "2026-01-01T00:00:00+00:00")
    owner = dataclasses.replace(owner, **changes)  # type: ignore[arg-type]
    write_text(folder / OWNER_FILE, json.dumps(dataclasses.asdict(owner)))
    return owner


def test_the_second_start_is_refused_and_told_who_holds_the_folder_and_how_to_free_it(tmp_path: Path, other: int):
    born = lease._born(other)
    owned(tmp_path, pid=other, born=born)
    with pytest.raises(UserError, match=rf"process {other} on n2, since 2026.*\(kill {other}\).*rm .*{OWNER_FILE}"):
        claim(tmp_path)
    owned(tmp_path, pid=other, born=born, start="12.0")
    with pytest.raises(UserError, match=r"\(job 12\).*\(scancel 12\)"):
        claim(tmp_path)
    assert read_owner(tmp_path).token == "another"


def test_who_has_ended_or_died_gives_way_at_once(tmp_path: Path, other: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 1e9)
    owned(tmp_path, released=True)
    claim(tmp_path)
    release()
    owned(tmp_path, pid=other, born=1.0)  # its number is another process's by now
    claim(tmp_path)
    release()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owned(tmp_path, start="7.0")  # alive, on a node that SLURM took for lost when it started the job again
    assert claim(tmp_path) is claim(tmp_path)
    release()
    assert read_owner(tmp_path).released


def test_an_owner_elsewhere_lives_as_long_as_its_heart_beats(tmp_path: Path):
    owner = owned(tmp_path, machine="elsewhere")
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            told = {"token": owner.token, "rank": 0, "host": "n2", "machine": "elsewhere", "pid": 1, "count": count}
            write_text(beat_file(tmp_path, 0), json.dumps(told), durable=False)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="at work already"):
        claim(tmp_path)
    stop.set()
    thread.join()
    assert claim(tmp_path).token == read_owner(tmp_path).token  # silent now


def test_who_lost_the_folder_writes_nothing_more_there(tmp_path: Path):
    claim(tmp_path)
    guard(tmp_path / "result.json")
    owned(tmp_path)
    for path in (tmp_path / "result.json", tmp_path / "checkpoints" / "last.ckpt"):
        with pytest.raises(LeaseLost, match="taken over from this process"):
            guard(path)
    guard(tmp_path.parent / "elsewhere")
    beat = beat_file(tmp_path, 0)
    beat.write_text("the other's")
    release()
    assert beat.read_text() == "the other's"
    assert not read_owner(tmp_path).released  # it is the other's


def test_an_owner_that_cannot_be_read_for_a_moment_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "SECONDS_BETWEEN", 0.05)
    claim(tmp_path)
    file, aside = tmp_path / OWNER_FILE, tmp_path / "aside"
    file.rename(aside)
    threading.Timer(0.1, aside.rename, (file,)).start()
    guard(tmp_path)
    file.unlink()  # by somebody who frees the folder
    with pytest.raises(LeaseLost, match="is nobody's now"):
        guard(tmp_path)


def test_of_two_starts_at_the_same_moment_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = lease._write

    def write_and_be_late(folder: Path, owner: Owner) -> None:
        write(folder, owner)
        owned(folder)

    monkeypatch.setattr(lease, "_write", write_and_be_late)
    with pytest.raises(UserError, match="at work already"):
        claim(tmp_path)


@pytest.mark.parametrize(
    ("owner", "mine", "expected"),
    [
        ("7.1", ("7", "0"), False),  # a rank on the lost node, of before the requeue
        ("7.0", ("7", "0"), True),
        ("7.0", ("7", "1"), True),  # its rank 0 has not claimed the folder yet
        ("12.0", ("7", "0"), False),  # submitted again meanwhile
        ("7.0", ("12", "0"), True),
    ],
)
def test_a_rank_tells_its_failure_only_in_its_own_starts_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, mine: tuple[str, str], expected: bool
):
    owned(tmp_path, start=owner)
    monkeypatch.setenv("SLURM_JOB_ID", mine[0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", mine[1])
    assert is_ours(tmp_path) == expected
    adopt(tmp_path, "another", rank=1)  # told by rank 0: then the token counts
    assert is_ours(tmp_path)
    owned(tmp_path, token="a third", start="99.0")
    assert not is_ours(tmp_path)


def test_starts_in_a_row_without_a_new_step_are_counted(tmp_path: Path):
    for start in range(MAX_IDLE_STARTS):
        assert not is_hopeless()
        held = claim(tmp_path)
        assert is_hopeless() == (start == MAX_IDLE_STARTS - 1)
        if start < MAX_IDLE_STARTS - 1:
            release()
    held.advance()
    assert not is_hopeless()
    release()
    claim(tmp_path)
    assert read_owner(tmp_path).idle_starts == 0


def test_files_that_killed_processes_had_begun_are_gone_when_the_folder_is_claimed(tmp_path: Path):
    """Checkpoints' are seen to by `LastCheckpoint`, which knows their folder."""
    begun = [tmp_path / ".metrics.csv.partial-1a2b3c4d.csv", tmp_path / "heartbeats" / ".rank-0.json.partial-0.json"]
    for path in begun:
        write_text(path, "half")
    write_text(tmp_path / "metrics.csv", "whole")
    claim(tmp_path)
    assert [path for path in begun if path.exists()] == []
    assert (tmp_path / "metrics.csv").read_text() == "whole"


def test_an_owner_lives_also_after_the_clock_was_set(tmp_path: Path, other: int, monkeypatch: pytest.MonkeyPatch):
    owned(tmp_path, pid=other, born=lease._born(other))
    told = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: told(self) - 3600)  # which counts from 1970
    with pytest.raises(UserError, match="is at work already"):
        claim(tmp_path)

"""The embedded sets are drawn once, whole, whoever asks first."""

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks import TASKS
from evmamba.tasks.embedded import (
    cache,
    ensure_embedded,
    write_segmentation,
)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


VERSION = TASKS["segmentation"].embedded.version


def _few(root: Path, **numbers: int) -> None:
    write_segmentation(root, train=6, val=2, size=64)


def _ensure(root: Path, barrier: object) -> None:
    cache.load = lambda reference: _few
    barrier.wait()  # type: ignore[attr-defined]
    ensure_embedded("segmentation", root)


def _ensure_and_hang(root: Path, started: object) -> None:
    def write(folder: Path, **numbers: int) -> None:
        _few(folder)
        started.set()  # type: ignore[attr-defined]
        time.sleep(60)

    cache.load = lambda reference: write
    ensure_embedded("segmentation", root)


def test_the_set_is_made_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cache, "load", lambda reference: lambda root, **numbers: (calls.append(numbers), _few(root)))
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "chosen"))
    folder = ensure_embedded("segmentation")
    assert folder.parent == tmp_path / "chosen"
    assert ensure_embedded("segmentation") == folder
    assert calls == [{"train": 200, "val": 50}]
    task = TASKS["segmentation"]
    newer = dataclasses.replace(task, embedded=dataclasses.replace(task.embedded, version=VERSION + 1))
    monkeypatch.setitem(TASKS._tasks, "segmentation", newer)
    assert ensure_embedded("segmentation") != folder
    assert len(calls) == 2


def test_processes_that_start_together_share_one_complete_set(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_ensure, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    _few(tmp_path / "expected")
    assert _files(tmp_path / f"segmentation-v{VERSION}") == _files(tmp_path / "expected")
    assert not list(tmp_path.glob(".*partial*"))


def test_a_killed_generation_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_ensure_and_hang, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not (tmp_path / f"segmentation-v{VERSION}").exists()
    monkeypatch.setattr(cache, "load", lambda reference: _few)
    folder = ensure_embedded("segmentation", tmp_path)
    assert (folder / "classes.txt").is_file()
    assert not list(tmp_path.glob(".*partial*")), "the killed process's files are still there"


def test_an_interrupted_generation_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, **numbers: int) -> None:
        _few(root)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "load", lambda reference: interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_embedded("segmentation", tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_an_unwritable_cache_says_how_to_choose_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set EVMAMBA_CACHE") as caught:
        ensure_embedded("detection")
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_offers_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean detection"):
        ensure_embedded("detecton")

"""Running a benchmark here: it goes on after a failure, and nothing finished is repeated."""

import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.launch.bench import local
from evmamba.launch.bench.local import run_here
from evmamba.launch.bench.progress import RunProgress
from evmamba.launch.store.results import Result, read_result, write_result
from evmamba.launch.store.spec import Spec
from evmamba.tasks.training import lease
from evmamba.tasks.training.lease import OWNER_FILE, Owner, machine

from ..handmade import made_result, made_spec


def quiet(total: int) -> RunProgress:
    return RunProgress(Console(quiet=True), total)


def finished(spec: Spec) -> Result:
    result = made_result(spec.task, spec.model, run=spec.name)
    result.provenance["spec_hash"] = spec.hash
    return result


def test_a_failing_run_does_not_stop_the_others_and_finished_ones_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    specs = [made_spec("cost"), made_spec("classification"), made_spec("segmentation")]
    ran: list[str] = []

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        ran.append(spec.task)
        result = finished(spec)
        if spec.task == "classification" and ran.count("classification") == 1:
            result.status, result.reason = "failed", "no luck"
        write_result(result, folder)
        return result

    monkeypatch.setattr(local, "run_one", run_one)
    results, interrupted = run_here(specs, tmp_path, quiet(3))
    assert [result.status for result in results] == ["finished", "failed", "finished"]
    assert not interrupted

    results, _ = run_here(specs, tmp_path, quiet(3))
    assert [result.status for result in results] == ["finished"] * 3
    assert ran == ["cost", "classification", "segmentation", "classification"]

    run_here([*specs[:1], made_spec("cost", seed=1)], tmp_path, quiet(2))  # another seed is another run
    run_here(specs[:1], tmp_path, quiet(1), force=True)
    assert ran[4:] == ["cost", "cost"]


def test_networks_that_another_run_measured_in_turns_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = made_spec("cost", together={"resnet18": {}, "efficientvmamba_t": {}})
    specs = first.members
    ran: list[str] = []

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        ran.append(spec.model)
        for member in specs if spec.leads else [spec]:
            result = finished(member)
            if member.model == "efficientvmamba_t":
                result.status, result.reason = "failed", "no such network"
            write_result(result, folder.parent / member.name)
        return read_result(folder / "result.json")

    monkeypatch.setattr(local, "run_one", run_one)
    results, _ = run_here(specs, tmp_path, quiet(2))
    assert [result.status for result in results] == ["finished", "failed"]
    assert ran == ["resnet18"]
    run_here(specs, tmp_path, quiet(2))
    assert ran == ["resnet18", "efficientvmamba_t"]  # what failed is tried again, by itself
    run_here(specs, tmp_path, quiet(2), force=True)
    assert ran == ["resnet18", "efficientvmamba_t", "resnet18"]


def test_trainings_run_side_by_side_with_their_share_of_the_cores_and_what_is_timed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tasks = ("cost", "classification", "detection", "segmentation", "cost")
    specs = [made_spec(task, seed=k) for k, task in enumerate(tasks)]
    all_at_work, at_work, seen = threading.Barrier(3), set(), {}

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        at_work.add(spec.name)
        if spec.task != "cost":
            all_at_work.wait(20)  # fails unless three are at work
        seen[spec.name] = len(at_work), threads
        if spec.task != "cost":
            all_at_work.wait(20)  # nobody leaves before all have counted
        result = finished(spec)
        if spec.task == "detection":
            result.status, result.reason = "failed", "no luck"
        write_result(result, folder)
        at_work.remove(spec.name)
        return result

    monkeypatch.setattr(local, "run_one", run_one)
    monkeypatch.setattr(local, "usable_cores", lambda: 6)
    results, interrupted = run_here(specs, tmp_path, quiet(5), jobs=3)
    assert [result.status for result in results] == ["finished", "finished", "failed", "finished", "finished"]
    assert not interrupted
    assert [seen[spec.name] for spec in specs] == [(1, None), (3, 2), (3, 2), (3, 2), (1, None)]


def test_all_that_run_side_by_side_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_python(tmp_path, monkeypatch, f"echo $$ >> {tmp_path}/pids; exec sleep 60")
    specs = [made_spec(task) for task in ("classification", "detection", "segmentation")]
    began = time.monotonic()

    def press() -> None:
        while not (tmp_path / "pids").exists() or (tmp_path / "pids").read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press).start()
    results, interrupted = run_here(specs, tmp_path, quiet(3), jobs=2)
    assert interrupted
    assert time.monotonic() - began < 40
    assert [result.reason for result in results] == ["interrupted"] * 3
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_side_by_side_a_run_waits_for_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = made_spec("classification")
    specs = [first, made_spec("segmentation"), made_spec("detection", needs=(first.name,))]
    both = threading.Barrier(2)

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        assert not spec.needs  # what it needs has failed
        both.wait(20)
        result = finished(spec)
        if spec is first:
            time.sleep(0.2)  # a moment in which another could have started
            result.status, result.reason = "failed", "no luck"
        write_result(result, folder)
        return result

    monkeypatch.setattr(local, "run_one", run_one)
    results, _ = run_here(specs, tmp_path, quiet(3), jobs=3)
    assert [result.status for result in results] == ["failed", "finished", "failed"]
    assert results[2].blocked_by == first.name


def test_side_by_side_an_error_of_the_programs_own_ends_the_others_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    specs = [made_spec("classification"), made_spec("segmentation")]
    stopped = []

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        if spec.task == "classification":
            raise RuntimeError("a bug")
        try:
            for _ in range(2000):
                while_waiting()
                time.sleep(0.01)
        except KeyboardInterrupt:
            stopped.append(spec.task)
            raise

    monkeypatch.setattr(local, "run_one", run_one)
    with pytest.raises(RuntimeError, match="a bug"):
        run_here(specs, tmp_path, quiet(2), jobs=2)
    assert stopped == ["segmentation"]


def test_ctrl_c_keeps_what_is_finished_and_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [made_spec("cost"), made_spec("classification"), made_spec("segmentation")]
    write_result(finished(specs[2]), tmp_path / "runs" / specs[2].name)

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        if spec.task == "classification":
            raise KeyboardInterrupt
        result = finished(spec)
        write_result(result, folder)
        return result

    monkeypatch.setattr(local, "run_one", run_one)
    results, interrupted = run_here(specs, tmp_path, quiet(3))
    assert interrupted
    assert [result.reason for result in results] == [None, "interrupted", None]
    assert not (tmp_path / "runs" / specs[1].name / "result.json").exists()


def test_ctrl_c_while_runs_are_repeated_gives_no_old_result_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    specs = [made_spec("classification"), made_spec("segmentation")]
    for spec in specs:
        write_result(finished(spec), tmp_path / "runs" / spec.name)

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run_one", run_one)
    results, interrupted = run_here(specs, tmp_path, quiet(2), force=True)
    assert interrupted
    assert [result.reason for result in results] == ["interrupted", "interrupted"]


def replace_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo bad luck >&2; kill -9 $$", r"killed by signal 9 \(out of memory\?\); last words: bad luck"),
        ("exit 7", "exit status 7; last words: no output"),
    ],
)  # fmt: skip
def test_a_run_that_dies_silently_leaves_a_result_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
):
    replace_python(tmp_path, monkeypatch, script)
    local.run_one(made_spec("cost"), tmp_path / "run", lambda: None)
    result = read_result(tmp_path / "run" / "result.json")
    assert result.status == "failed"
    assert result.reason
    assert re.match(reason, result.reason)


def test_a_folder_in_which_another_process_works_is_left_as_it_is(tmp_path: Path):
    folder = tmp_path / "run"
    born = lease._born(os.getppid()) or 0.0
    owner = Owner("token", "n1", machine(), os.getppid(), born, None, "2026-01-01T00:00:00+00:00")
    folder.mkdir()
    (folder / OWNER_FILE).write_text(json.dumps(dataclasses.asdict(owner)))
    (folder / "run.log").write_text("its log")
    result = local.run_one(made_spec("cost"), folder, lambda: None)
    assert result.reason is not None
    assert f"is at work already: process {os.getppid()} on n1" in result.reason
    assert sorted(path.name for path in folder.iterdir()) == [OWNER_FILE, "run.log"]
    assert (folder / "run.log").read_text() == "its log"


def test_the_checkpoints_of_a_run_that_did_not_finish_are_kept_when_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replace_python(tmp_path, monkeypatch, "mkdir $(dirname $3)/checkpoints; echo $$ > $(dirname $3)/checkpoints/a.ckpt")
    folder = tmp_path / "run"
    for _ in range(3):
        local.run_one(made_spec("cost"), folder, lambda: None)
    kept = sorted(tmp_path.glob("run*/checkpoints/a.ckpt"))
    assert [file.parent.parent.name for file in kept] == ["run", "run.failed-1", "run.failed-2"]
    assert len({file.read_text() for file in kept}) == 3

    write_result(finished(made_spec("cost")), folder)  # a finished run that is repeated by --force is not kept
    local.run_one(made_spec("cost"), folder, lambda: None)
    assert len(list(tmp_path.glob("run*"))) == 3


def test_runs_of_another_commit_are_taken_over_and_mentioned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [made_spec("cost"), made_spec("classification")]
    for spec in specs:
        result = finished(spec)
        result.provenance["git_commit"] = "a" * 40
        write_result(result, tmp_path / "runs" / spec.name)
    for now, said in (("b" * 40, 1), ("a" * 40, 0), (None, 0)):
        monkeypatch.setattr(local, "git_state", lambda now=now: {"git_commit": now})
        console = Console(file=io.StringIO(), width=200)
        results, _ = run_here(specs, tmp_path, RunProgress(console, 2))
        assert len(results) == 2
        assert console.file.getvalue().count("another commit were taken over (aaaaaaaaaaaa, now bbbbbbbbbbbb)") == said


def test_a_benchmark_that_is_terminated_takes_its_run_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_python(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    results, interrupted = run_here([made_spec("cost")], tmp_path, quiet(1))
    assert interrupted
    assert results[0].reason == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_run_that_was_killed_goes_on_from_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "cd $(dirname $3); mkdir -p checkpoints; echo once >> checkpoints/a.ckpt; kill -9 $$"
    replace_python(tmp_path, monkeypatch, script)
    for _ in range(2):
        result = local.run_one(made_spec("cost"), tmp_path / "run", lambda: None)
        assert result.provenance["interrupted"] is True
    assert (tmp_path / "run/checkpoints/a.ckpt").read_text() == "once\nonce\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]

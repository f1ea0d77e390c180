"""The processes of a cluster's check, started by hand as srun would start them, on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evmamba.launch.cluster import check_job
from evmamba.launch.cluster.check import read_answers
from evmamba.launch.cluster.check_job import Answers

from ..tiny import free_port, loopback

COMMAND = [sys.executable, "-m", "evmamba.launch.cluster.check_job"]


def step(rank: int, port: int, **more: str) -> dict[str, str]:
    """The environment of one of two processes of a step."""
    return loopback() | {
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURMD_NODENAME": f"n{rank + 1}",
        "PATH": "/nowhere",
        **more,
    }


def test_two_processes_meet_share_a_folder_and_a_lock_and_note_the_signal(tmp_path: Path):
    (tmp_path / "answers").mkdir()
    port, asked = free_port(), tmp_path / "asked"
    processes = [
        subprocess.Popen([*COMMAND, str(tmp_path)], env=step(rank, port, EVMAMBA_REQUEUE_FILE=str(asked)))
        for rank in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 120
        while not all(answers.meetings for answers in read_answers(tmp_path)) or len(read_answers(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for process in processes:
            process.send_signal(signal.SIGUSR1)
        assert [process.wait(60) for process in processes] == [os.EX_TEMPFAIL] * 2
    finally:
        for process in processes:
            process.kill()
    first, second = read_answers(tmp_path)
    assert [(answers.node, answers.processes, answers.nodes) for answers in (first, second)] == [
        ("n1", 2, 2),
        ("n2", 2, 2),
    ]
    assert (first.locked, second.locked) == (None, True)
    assert first.meetings[0].error == ""
    assert first.meetings[0].gb_per_s > 0
    assert first.signal_s is not None
    assert first.requeue is True  # of the script, as there is no scontrol
    assert asked.exists()


def test_what_was_found_and_the_signal_stay_when_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def tried(answers: Answers, folder: Path) -> None:
        answers.shared_s = 0.4
        signal.raise_signal(signal.SIGUSR1)
        raise OSError("no route to host")

    monkeypatch.setattr(check_job, "try_everything", tried)
    monkeypatch.setattr(check_job.time, "sleep", lambda seconds: None)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert check_job.main([str(tmp_path)]) == os.EX_TEMPFAIL
    finally:
        signal.signal(signal.SIGUSR1, before)
    (found,) = read_answers(tmp_path)
    assert (found.shared_s, found.error) == (0.4, "no route to host")
    assert found.signal_s is not None


def test_interfaces_of_containers_are_left_out_and_fast_ones_tried_first(monkeypatch: pytest.MonkeyPatch):
    names = ["lo", "eno1", "eno2", "eno3", "ib0", "docker0", "virbr0", "veth12ab", "br-12ab"]
    address = SimpleNamespace(family=socket.AF_INET, address="10.0.0.1")
    monkeypatch.setattr(check_job.psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in names})
    monkeypatch.setattr(check_job.psutil, "net_if_addrs", lambda: {name: [address] for name in names[1:]})
    found = check_job._interfaces()
    assert found == ["eno1", "eno2", "eno3", "ib0"]
    assert check_job._to_try(found) == ["ib0", "eno1", "eno2"]


def test_the_second_start_notes_that_the_job_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert check_job.main([str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "requeued.json").is_file()

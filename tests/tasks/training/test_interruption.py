"""What a training that is stopped asks of SLURM."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evmamba.tasks.training.interruption import is_preempted, requeue_job

Calls = Callable[[], list[str]]
RUNNING = "JobId=7 JobState=RUNNING PreemptEligibleTime=2026-01-01T00:00:00"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Install a scontrol with these last words and status; what it is called with is returned by the result."""

    def install(said: str = "", complaint: str = "", status: int = 0) -> Calls:
        calls, program = tmp_path / "calls", tmp_path / "scontrol"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\n'
            f"echo {shlex.quote(said)}\necho {shlex.quote(complaint)} >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    return install


def test_the_job_or_the_task_of_an_array_is_requeued(scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch):
    calls = scontrol()
    assert requeue_job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue_job()
    assert calls() == ["requeue 7", "requeue 5_2"]


def test_a_refusal_and_a_missing_scontrol_are_told(
    scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    scontrol(complaint="Requested operation is presently disabled", status=1)
    assert not requeue_job()
    assert "scontrol requeue 7: Requested operation is presently disabled" in caplog.text
    monkeypatch.setenv("PATH", "/nowhere")
    assert not requeue_job()
    assert "scontrol requeue 7: [Errno 2]" in caplog.text
    assert not is_preempted()


def test_outside_slurm_nobody_is_asked(scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch):
    calls = scontrol(f"{RUNNING} PreemptTime=2026-01-01T00:00:09")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue_job()
    assert not is_preempted()
    assert calls() == []


class Requeued(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return int(requeue_job())


def test_loading_processes_which_share_the_signal_do_not_ask_again(scontrol: Callable[..., Calls]):
    calls = scontrol()
    assert [int(batch) for batch in torch.utils.data.DataLoader(Requeued(), num_workers=2)] == [0, 0]
    assert calls() == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (f"{RUNNING} PreemptTime=2026-01-01T00:00:09", True),
        (f"{RUNNING} PreemptTime=None", False),  # a SIGTERM from somebody
        ("JobId=7 JobState=COMPLETING PreemptTime=None", False),  # scancel
        ("JobId=7 JobState=PENDING PreemptTime=2026-01-01T00:00:09", False),  # requeued already
        ("", False),
    ],
    ids=["grace", "by hand", "cancelled", "no grace", "silent"],
)
def test_a_job_in_its_time_of_grace_is_told_from_a_cancelled_one(
    scontrol: Callable[..., Calls], said: str, expected: bool
):
    scontrol(said)
    assert is_preempted() == expected

"""What a process learns of its job, and asks of SLURM when it is stopped."""

import ast
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import evmamba.launch
from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.slurm_job import is_preempted, requeue

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
    assert requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue()
    assert calls() == ["requeue 7", "requeue 5_2"]


def test_a_refusal_and_a_missing_scontrol_are_told(
    scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    scontrol(complaint="Requested operation is presently disabled", status=1)
    assert not requeue()
    assert "scontrol requeue 7: Requested operation is presently disabled" in caplog.text
    monkeypatch.setenv("PATH", "/nowhere")
    assert not requeue()
    assert "scontrol requeue 7: [Errno 2]" in caplog.text
    assert not is_preempted()


def test_without_scontrol_the_jobs_script_is_asked(
    scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", "/nowhere")
    file = tmp_path / "run" / ".requeue-7"
    monkeypatch.setenv("EVMAMBA_REQUEUE_FILE", str(file))
    assert is_preempted()  # perhaps; the script looks
    assert not file.exists()
    assert requeue()
    assert file.exists()
    file.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    calls = scontrol()
    assert requeue()
    assert calls() == ["requeue 7"]
    assert not file.exists()


def test_outside_slurm_nobody_is_asked(scontrol: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch):
    calls = scontrol(f"{RUNNING} PreemptTime=2026-01-01T00:00:09")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue()
    assert not is_preempted()
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


def test_no_two_steps_of_a_node_meet_at_one_port():
    """Lightning's rule, 15000 + the job number's last four digits, gives all of these the same."""
    jobs = [{"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} for job in ("4711", "14711", "94711") for step in "012"]
    ports = [slurm_job.port(job) for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)  # above, Linux gives them to whoever asks
    assert [slurm_job.port(job) for job in jobs] == ports  # every process finds the same


WORDS = re.compile(r"^(SLURM|SLURMD|SRUN|SBATCH)_[A-Z_]+$|^(sbatch|squeue|scontrol|sacct|scancel|sinfo)$")


def test_slurms_words_are_spoken_in_two_files():
    root = Path(evmamba.launch.__file__).parents[1]
    speaking = {
        path.relative_to(root).as_posix()
        for floor in ("tasks", "launch")
        for path in (root / floor).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and WORDS.match(node.value)
    }
    # An option of `evmamba submit`, and a key of its YAML, is called sbatch.
    assert speaking - {"launch/cluster/settings.py", "launch/commands/shared.py"} == {
        "tasks/training/slurm_job.py",
        "launch/cluster/slurm.py",
    }

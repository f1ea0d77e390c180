"""`evmamba status`: what became of every run, from SLURM where it knows, from files where it does not."""

import dataclasses
import datetime
import json
import os
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.cluster import jobs
from evmamba.launch.cluster.jobs import JobBook, RunState, record_failures, states
from evmamba.launch.store.results import read_result, write_result
from evmamba.launch.store.spec import failed_result
from evmamba.tasks.training.heartbeat import Beat, beat_file

from .chain import CHAIN, FIRST, SECOND, THIRD, finish, folder_of, say_progress, submitted
from .fake_slurm import FakeSlurm, install


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return submitted(tmp_path / "out")


def by_run(output: Path) -> list[RunState]:
    found = {state.run: state for state in states(output)}
    return [found[spec.name] for spec in CHAIN]


def said(output: Path) -> list[tuple[str, str]]:
    return [(state.state, state.said) for state in by_run(output)]


def test_a_chain_at_work_says_how_far_it_is_and_who_waits_for_whom(output: Path, fake: FakeSlurm):
    fake.set(1, JobState="RUNNING", Reason="None", NodeList="n[1-2]", RunTime="01:02:03", Restarts="2")
    fake.set(2, JobState="PENDING", Reason="Dependency")
    fake.set(3, JobState="PENDING", Reason="Dependency")
    say_progress(output, FIRST)
    assert said(output) == [
        ("running", "training 43 % (43/100), loss 1.234, requeued 2 times"),
        ("waiting", f"for {FIRST.name}"),
        ("waiting", f"for {SECOND.name}"),
    ]
    first = by_run(output)[0]
    assert (first.job, first.nodes, first.elapsed, first.restarts) == (1, "n[1-2]", "01:02:03", 2)


def test_a_run_that_is_silent_says_who_holds_it_up(output: Path, fake: FakeSlurm):
    fake.set(1, JobState="RUNNING", Reason="None", NodeList="n[1-2]", RunTime="01:02:03")
    say_progress(output, FIRST)
    for rank in range(2):
        beat = Beat("token", rank, f"n{rank + 1}", "machine", 1, order=8 - rank, idle=12 * 60.0)
        path = beat_file(output / "runs" / FIRST.name, rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(beat)))
    assert said(output)[0] == ("running", "training 43 % (43/100), loss 1.234, silent for 12 min, rank 1 on n2")


def test_a_finished_run_shows_its_first_number_and_the_next_one_queues(output: Path, fake: FakeSlurm):
    finish(output, FIRST)
    fake.set(2, JobState="PENDING", Reason="Resources")
    fake.set(3, JobState="PENDING", Reason="Dependency")
    assert said(output) == [
        ("finished", "top-1 (%) 81.3"),
        ("queued", "Resources"),
        ("waiting", f"for {SECOND.name}"),
    ]


def test_a_requeued_job_says_so_while_it_waits(output: Path, fake: FakeSlurm):
    fake.set(1, JobState="PENDING", Reason="BeginTime", Restarts="1")
    say_progress(output, FIRST)
    assert said(output)[0] == ("queued", "requeued once")


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"JobState": "TIMEOUT", "TimeLimit": "1-00:00:00"}, "time limit of 1-00:00:00 reached; --resume goes on from"),
        ({"JobState": "OUT_OF_MEMORY"}, "out of memory on the node"),
        ({"JobState": "NODE_FAIL", "NodeList": "n2"}, "node n2 failed; --resume goes on from the last checkpoint"),
        ({"JobState": "PREEMPTED"}, "preempted and not requeued"),
        ({"JobState": "CANCELLED"}, "cancelled"),
        ({"JobState": "FAILED", "ExitCode": "137:0"}, "ended with exit status 137 and without a result; last words: "
                                                      "srun: error: n1: task 0: Killed (see "),
        ({"JobState": "COMPLETED", "ExitCode": "0:0"}, "ended without a result; last words: srun: error"),
        ({"JobState": "DEADLINE"}, "the job's deadline passed"),
        ({"JobState": "REVOKED"}, "ended as REVOKED; last words: srun: error"),
    ],
)  # fmt: skip
def test_what_slurm_ended_has_its_reason_and_takes_along_what_needs_it(
    output: Path, fake: FakeSlurm, job: dict[str, str], reason: str
):
    (folder_of(output, FIRST) / "run.log").write_text("epoch 3\nsrun: error: n1: task 0: Killed\n\n")
    fake.set(1, **job)
    fake.set(2, JobState="CANCELLED", Reason="DependencyNeverSatisfied")
    first, second, third = said(output)
    assert first[0] == "failed"
    assert first[1].startswith(reason)
    assert second == ("failed", f"not started: needs {FIRST.name}, which failed: {first[1]}")
    assert third == second  # no chain of "needs"


def test_a_run_that_saved_and_left_is_stopped_not_failed(
    output: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    fake.set(1, JobState="FAILED", ExitCode="75:0")
    fake.set(2, JobState="CANCELLED", Reason="DependencyNeverSatisfied")
    first, second, third = said(output)
    assert first == ("stopped", "saved; --resume goes on")
    assert second == ("stopped", f"not started: needs {FIRST.name}, which was stopped; --resume goes on")
    assert third[0] == "stopped"
    assert record_failures(output) == []
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # the report's job: the table says it
    assert len(record_failures(output)) == 3
    assert read_result(folder_of(output, FIRST) / "result.json").reason == "saved; --resume goes on"
    assert said(output)[0][0] == "stopped"


def test_accounting_answers_for_what_the_controller_forgot(output: Path, fake: FakeSlurm):
    fake.account("1|TIMEOUT|None|n1|01:00:01|0:0|01:00:00")
    assert said(output)[0][1].startswith("time limit of 01:00:00 reached")
    assert by_run(output)[0].elapsed == "01:00:01"


def test_a_job_that_nobody_remembers_has_its_last_words(output: Path, fake: FakeSlurm):
    (folder_of(output, FIRST) / "run.log").write_text("bad luck\n")
    log = folder_of(output, FIRST) / "run.log"
    reason = f"job 1 is no longer known to SLURM and left no result; last words: bad luck (see {log})"
    assert said(output)[0] == ("failed", reason)


def test_a_run_that_told_its_reason_keeps_it_and_a_new_job_makes_it_live_again(output: Path, fake: FakeSlurm):
    write_result(failed_result(FIRST, "no luck", datetime.datetime.now(datetime.UTC)), folder_of(output, FIRST))
    fake.set(1, JobState="FAILED", ExitCode="1:0")
    assert said(output)[0] == ("failed", "no luck")
    JobBook.read(output).add(FIRST.name, 4)
    fake.set(4, JobState="PENDING", Reason="Priority")
    assert said(output)[0] == ("queued", "Priority")


def test_a_result_of_another_run_does_not_count(output: Path, fake: FakeSlurm):
    finish(output, FIRST)
    path = folder_of(output, FIRST) / "result.json"
    path.write_text(path.read_text().replace(FIRST.name, "classification-resnet18-000000"))
    fake.set(1, JobState="RUNNING")
    assert said(output)[0][0] == "running"


def test_settling_writes_the_reasons_of_what_slurm_ended_and_nothing_else(output: Path, fake: FakeSlurm):
    for job, state in enumerate(("RUNNING", "PENDING", "PENDING"), 1):
        fake.set(job, JobState=state, Reason="Dependency")
    assert record_failures(output) == []
    fake.set(1, JobState="TIMEOUT", TimeLimit="10:00")
    fake.set(2, JobState="CANCELLED", Reason="DependencyNeverSatisfied")
    fake.set(3, JobState="CANCELLED", Reason="DependencyNeverSatisfied")
    assert cli.main(["status", str(output), "--record-failures"]) == 0
    results = [read_result(folder_of(output, spec) / "result.json") for spec in CHAIN]
    assert [result.status for result in results] == ["failed"] * 3
    assert results[0].reason.startswith("time limit of 10:00 reached")
    assert results[2].reason.startswith(f"not started: needs {FIRST.name}, which failed: time limit")
    assert (results[2].task, results[2].run) == ("segmentation", THIRD.name)
    assert record_failures(output) == []
    # The table's reader finds them all.
    assert cli.main(["report", str(output / "runs")]) == 0


def test_a_folder_without_jobs_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "out"
    for spec in CHAIN:
        spec.write(folder_of(output, spec))
    FIRST.write(output / "runs" / f"{FIRST.name}.failed-1")
    finish(output, FIRST)
    say_progress(output, SECOND)
    assert said(output) == [
        ("finished", "top-1 (%) 81.3"),
        ("running", "training 43 % (43/100), loss 1.234"),
        ("not submitted", ""),
    ]
    old = datetime.datetime.now().timestamp() - 7200
    os.utime(folder_of(output, SECOND) / "progress.json", (old, old))
    state, text = said(output)[1]
    assert (state, text[:-2]) == ("stopped", "training 43 % (43/100), loss 1.234, silent for 02:00:")
    assert cli.main(["status", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == [FIRST.name, "finished"]
    assert printed[2].strip() == "top-1 (%) 81.3"
    assert len(printed) == 6


def test_the_report_is_a_line_too(output: Path, fake: FakeSlurm):
    JobBook.read(output).add(jobs.REPORT, 9)
    fake.set(9, JobState="PENDING", Reason="Dependency")
    assert (states(output)[-1].state, states(output)[-1].said) == ("waiting", "for all runs")
    fake.forget(9)
    assert (states(output)[-1].state, states(output)[-1].said) == ("failed", f"see {output / 'report.log'}")
    (output / "report.md").touch()
    assert states(output)[-1].state == "finished"


def test_a_report_of_which_a_silent_slurm_says_nothing_has_not_failed(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    JobBook.read(output).add(jobs.REPORT, 9)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (states(output)[-1].state, states(output)[-1].said) == ("unknown", "SLURM does not answer here")


def test_a_silent_slurm_is_no_proof_of_an_end_except_in_the_report_job(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [state for state, _ in said(output)] == ["unknown"] * 3
    assert record_failures(output) == []
    say_progress(output, FIRST)  # a moment ago
    assert [state for state, _ in said(output)] == ["running", "unknown", "unknown"]
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # a container without squeue, say
    assert len(record_failures(output)) == 3
    first = read_result(folder_of(output, FIRST) / "result.json")
    assert first.reason.startswith("ended without a result; last words: no log at")


def test_in_the_reports_job_a_run_that_slurm_forgot_is_over_and_one_that_it_knows_is_not(
    output: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    for spec in CHAIN:
        say_progress(output, spec)
    fake.set(1, JobState="RUNNING")
    fake.set(2, JobState="PENDING", Reason="Dependency")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert record_failures(output) == [THIRD.name]
    assert "job 3 is no longer known" in read_result(folder_of(output, THIRD) / "result.json").reason


@pytest.mark.parametrize("name", [None, "CORP\\alice", "two words"])
def test_a_user_without_a_plain_name_submits_and_reads_all_the_same(
    output: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, name: str | None
):
    def getuser() -> str:
        if name is None:
            raise KeyError("getpwuid(): uid not found: 4711")
        return name

    monkeypatch.setattr(jobs.getpass, "getuser", getuser)
    JobBook.read(output).add(FIRST.name, 4)
    book = JobBook.read(output)
    assert (book.user, book.is_anothers) == ("", False)

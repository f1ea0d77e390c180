"""`evmamba status`: what became of every run, from SLURM where it knows, from files where it does not."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.cluster import jobs
from evmamba.launch.cluster.jobs import JobBook, RunState, record_failures, states
from evmamba.launch.store.results import read_result, write_result
from evmamba.launch.store.spec import EvaluationSpec, Spec, Start, failed_result

from ..handmade import made_result, made_spec
from .fake_slurm import FakeSlurm, install

FIRST = made_spec("classification")
SECOND = made_spec("segmentation", test=False).after(FIRST)
THIRD = EvaluationSpec(
    task="segmentation",
    model="resnet18",
    head="upernet",
    seed=0,
    device="cpu",
    settings={},
    start=Start.of(SECOND),
    needs=(SECOND.name,),
)
CHAIN = (FIRST, SECOND, THIRD)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Three runs in a row, submitted as jobs 1, 2, 3."""
    folder = tmp_path / "out"
    for spec in CHAIN:
        spec.write(folder / "runs" / spec.name)
    book = JobBook(folder, order=[spec.name for spec in CHAIN])
    for job, spec in enumerate(CHAIN, 1):
        book.add(spec.name, job)
    return folder


def folder_of(output: Path, spec: Spec) -> Path:
    return output / "runs" / spec.name


def say_progress(output: Path, spec: Spec, **fields) -> None:
    text = json.dumps({"phase": "training", "done": 43, "total": 100, "loss": 1.2345} | fields)
    (folder_of(output, spec) / "progress.json").write_text(text)


def finish(output: Path, spec: Spec) -> None:
    result = made_result(spec.task, "resnet18", run=spec.name)
    write_result(result, folder_of(output, spec))


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


def test_json_is_for_programs(output: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    finish(output, FIRST)
    assert cli.main(["status", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in document] == [spec.name for spec in CHAIN]
    assert document[0]["metrics"]["top1"] == 0.81337
    assert document[0]["state"] == "finished"


def test_the_report_is_a_line_too(output: Path, fake: FakeSlurm):
    JobBook.read(output).add(jobs.REPORT, 9)
    fake.set(9, JobState="PENDING", Reason="Dependency")
    assert (states(output)[-1].state, states(output)[-1].said) == ("waiting", "for all runs")
    fake.forget(9)
    assert (states(output)[-1].state, states(output)[-1].said) == ("failed", f"see {output / 'report.log'}")
    (output / "report.md").touch()
    assert states(output)[-1].state == "finished"


@pytest.mark.parametrize(("text", "complaint"), [("{", "no valid JSON"), ("{}", "not a list of jobs")])
def test_a_damaged_list_of_jobs_is_named(output: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]):
    (output / "jobs.json").write_text(text)
    assert cli.main(["status", str(output)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert str(output / "jobs.json") in error


def test_an_empty_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no runs here" in capsys.readouterr().err


def test_a_silent_slurm_is_no_proof_of_an_end_except_in_the_report_job(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [state for state, _ in said(output)] == ["unknown"] * 3
    assert record_failures(output) == []
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # a container without squeue, say
    assert len(record_failures(output)) == 3
    assert "there is no result; last words: no log at" in read_result(folder_of(output, FIRST) / "result.json").reason


def test_status_does_not_wait_for_torch(output: Path, fake: FakeSlurm):
    fake.set(1, JobState="RUNNING", Reason="None", NodeList="n1", RunTime="00:01:03")
    finish(output, FIRST)
    program = (
        "import sys\n"
        "from evmamba.launch.cli import main\n"
        "assert main(['status', sys.argv[1]]) == 0\n"
        "print({'torch', 'timm', 'lightning'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert FIRST.name[:20] in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"

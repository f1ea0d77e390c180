"""What the answers of a cluster's check mean, and which settings follow; the job itself is tried on SLURM."""

from pathlib import Path

import pytest
import yaml

from evmamba.launch import cli
from evmamba.launch.cluster import check
from evmamba.launch.cluster.check import Finding, best_interface, findings_of, read_answers, settings_that_fit
from evmamba.launch.cluster.check_job import Answers, Meeting
from evmamba.launch.cluster.settings import JobConfig
from evmamba.launch.cluster.slurm import Node

from .fake_slurm import install

JOB = JobConfig(nodes=2, gpus_per_node=0)


def answers(**changes: object) -> list[Answers]:
    """Of two processes that found everything in order."""
    found = []
    for rank in (0, 1):
        good = {
            "shared_s": 0.4,
            "locked": True if rank else None,
            "meetings": [Meeting("", gb_per_s=1.0), Meeting("eth0", gb_per_s=1.1), Meeting("ib0", gb_per_s=9.0)],
            "signal_s": 61.0,
            "has_scontrol": True,
        }
        found.append(Answers(rank, f"n{rank + 1}", 8, processes=2, nodes=2, **(good | changes)))
    return found


def told(found: list[Answers], requeued: bool = True, job: JobConfig = JOB) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings_of(found, requeued, job)}


def test_a_cluster_in_order_is_found_so():
    found = told(answers())
    assert all(finding.good for finding in found.values())
    assert found["rendezvous"].said == "gloo, 16 MB all-reduce: left open 1.00 GB/s, eth0 1.10 GB/s, ib0 9.00 GB/s"
    assert found["signal"].said == "reached every process, 61.0 s after its start"
    assert found["requeue"].said == "works, by the run itself"
    assert told(answers(has_scontrol=False))["requeue"].said.startswith("works, by the job's script")


@pytest.mark.parametrize(
    ("changes", "what", "good", "said"),
    [
        ({"shared_s": None, "error": "does not see"}, "shared folder", False, "rank 0 on n1: does not see; rank 1"),
        ({"locked": False}, "file locks", False, "do not hold between nodes"),
        ({"locked": None}, "file locks", None, "not tried"),
        (
            {"meetings": [Meeting("", "timed out")]},
            "rendezvous",
            False,
            "do not find each other (left open): timed out",
        ),
        ({"meetings": []}, "rendezvous", False, "nothing was tried"),
        ({"signal_s": None}, "signal", False, "did not reach rank 0, 1"),
    ],
)
def test_what_fails_is_named(changes: dict, what: str, good: bool | None, said: str):
    finding = told(answers(**changes))[what]
    assert finding.good is good
    assert said in finding.said


def test_missing_processes_and_gpus_are_named():
    assert not told(answers()[:1])["processes"].good
    with_gpus = JobConfig(nodes=2, gpus_per_node=1)
    assert not told(answers(), job=with_gpus)["processes"].good
    assert told(answers(gpus=1), job=with_gpus)["processes"].good


def test_the_fastest_interface_is_named_and_left_open_where_that_is_as_good():
    assert best_interface(answers()) == "ib0"
    assert best_interface(answers(meetings=[Meeting("", gb_per_s=1.0), Meeting("eth0", gb_per_s=1.1)])) == ""
    assert best_interface(answers(meetings=[Meeting("", "refused"), Meeting("eth0", gb_per_s=0.1)])) == "eth0"
    one, other = answers()
    other.meetings[2] = Meeting("ib0", "no route")
    assert best_interface([one, other]) == ""  # an interface that one node cannot use is none
    assert best_interface(answers(meetings=[Meeting("", "refused")])) is None


def test_settings_follow_from_what_was_found_and_never_replace_what_was_given():
    found = findings_of(answers(), False, JOB)
    given = {"partition": "gpu", "time": "24:00:00", "nodes": "2", "runs": {}}
    fitting = settings_that_fit(given, JOB, answers(), found, Node(cpus=96, gpus=8))
    assert fitting == {
        "partition": "gpu",
        "time": "24:00:00",
        "nodes": 2,
        "gpus_per_node": 8,
        "cpus_per_task": 12,
        "interface": "ib0",
        "chain": 3,
    }
    asked = answers(meetings=[Meeting("eth0", gb_per_s=1.0)])  # by a variable in `environment`
    assert "interface" not in settings_that_fit(given, JOB, asked, found, None)
    mine = {"gpus_per_node": "4", "cpus_per_task": "6", "chain": "5"}
    job = JobConfig(nodes=2, gpus_per_node=4, interface="eth0")
    assert settings_that_fit(mine, job, answers(), found, Node(96, 8)) == {key: int(mine[key]) for key in mine}


def test_the_job_is_submitted_once_and_its_answers_told_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake = install(tmp_path / "slurm", monkeypatch)
    folder = tmp_path / "check"
    monkeypatch.setattr(check, "POLL_SECONDS", 0.0)
    for found in answers():
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        found.write(folder)
    assert read_answers(folder) == answers()
    # SLURM ends the job while it is looked at.
    scontrol = fake.folder / "bin" / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\ncase "$*" in *node*) echo "NodeName=n1 CPUTot=64 Gres=gpu:a100:4(S:0-1)" ;;'
        " *) echo JobId=100 JobState=COMPLETED Restarts=1 ;; esac\n"
    )
    command = ["cluster", "check", f"--output={folder}", "--partition=gpu", "--gpus-per-node=0"]
    assert cli.main(command) == 0
    script = fake.script(100)
    assert "#SBATCH --time=3:00\n" in script
    assert "#SBATCH --signal=SIGUSR1@90\n" in script
    assert "#SBATCH --nodes=2\n" in script
    assert 'evmamba.launch.cluster.check_job "$folder"/)' in script
    printed = capsys.readouterr().out
    fitting = yaml.safe_load(printed.partition("cluster.yaml")[2])
    assert fitting["partition"] == "gpu"
    assert fitting["cpus_per_task"] == 64
    assert fitting["chain"] == 3  # no second start left its note
    assert cli.main(command) == 0
    assert len(fake.calls("sbatch")) == 1
    # Other settings: the old answers are not theirs.
    (folder / "done-0").touch()
    assert cli.main([*command, "--mem=8G"]) == 2
    assert "job 101 ended as COMPLETED and left no answers" in capsys.readouterr().err
    assert len(fake.calls("sbatch")) == 2
    assert not (folder / "done-0").exists()
    scontrol.write_text("#!/bin/sh\necho JobId=101 JobState=RUNNING\n")
    assert cli.main(command) == 2
    assert f"job 101 of {folder} tries other settings and has not ended" in capsys.readouterr().err
    assert len(fake.calls("sbatch")) == 2


def test_a_job_without_answers_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake = install(tmp_path / "slurm", monkeypatch)
    scontrol = fake.folder / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho JobId=100 JobState=FAILED\n")
    assert cli.main(["cluster", "check", f"--output={tmp_path / 'check'}"]) == 2
    assert "job 100 ended as FAILED and left no answers; see" in capsys.readouterr().err

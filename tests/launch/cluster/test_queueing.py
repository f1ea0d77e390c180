"""Chains, arrays of seeds, and no more jobs than a site takes: what sbatch is called with."""

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.bench.plan import BenchOptions
from evmamba.launch.cluster import submission
from evmamba.launch.cluster.jobs import JobBook, read_specs, states
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import recipe_of
from evmamba.launch.store.results import write_result
from evmamba.launch.store.spec import RUNS_FOLDER, Settings, Spec

from ..handmade import made_result, made_spec
from .fake_slurm import FakeSlurm, install

NO_GPUS = "--gpus-per-node=0"


@functools.cache
def settings(task: str) -> Settings:
    return settings_of(recipe_of(task, "tiny", "", "resnet18"))


def planned(options: BenchOptions) -> list[Spec]:
    """A classification and a segmentation that starts from it, for every seed; without data."""
    return [
        made_spec(task, seed=seed, device=options.device, settings=settings(task))
        for seed in options.seeds
        for task in ("classification", "segmentation")
    ]


def finish(output: Path, name: str) -> None:
    spec = read_specs(output)[name]
    result = made_result(spec.task, "resnet18", run=name)
    result.provenance["spec_hash"] = spec.hash
    write_result(result, output / RUNS_FOLDER / name)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(submission, "plan", planned)
    return install(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def submit(output: Path, *options: str) -> int:
    return cli.main(["submit", f"--output={output}", NO_GPUS, *options])


def dependencies(fake: FakeSlurm, start: int = 0) -> list[str]:
    """What every submitted job waits for."""
    found = [re.search(r"--dependency=(\S+)", call) for call in fake.calls("sbatch")[start:]]
    return [match[1] if match else "" for match in found]


def names(output: Path) -> dict[str, str]:
    """Kind of run and seed -> name."""
    found = {}
    for path in (output / RUNS_FOLDER).glob("*/spec.json"):
        found[f"{path.parent.name.split('-')[0]} {json.loads(path.read_text())['seed']}"] = path.parent.name
    return found


def test_a_chain_goes_on_while_a_job_does_not_end_well_and_one_that_does_is_enough_for_others(
    output: Path, fake: FakeSlurm
):
    assert submit(output, "--chain=classification=3") == 0
    assert dependencies(fake) == [
        "",
        "afternotok:100",
        "afternotok:100:101",
        "afterok:100?afterok:101?afterok:102",
        "afterok:103",
        "afterany:100:101:102:103:104",
    ]
    assert all("--no-requeue" in fake.script(job) and "--requeue\n" not in fake.script(job) for job in (100, 102))
    assert "#SBATCH --requeue\n" in fake.script(103)


def test_the_job_of_a_chain_that_is_at_work_says_how_the_run_is(output: Path, fake: FakeSlurm):
    submit(output, "--chain=classification=3")
    name = names(output)["classification 0"]

    def said() -> tuple:
        state = next(state for state in states(output) if state.run == name)
        return state.state, state.job, state.said

    fake.set(100, JobState="TIMEOUT", TimeLimit="10:00")
    fake.set(101, JobState="RUNNING", Reason="None", NodeList="n1")
    assert said()[:2] == ("running", 101)
    fake.set(101, JobState="TIMEOUT", TimeLimit="20:00")
    fake.set(102, JobState="CANCELLED", Reason="None")
    assert said() == ("failed", 101, "time limit of 20:00 reached; --resume goes on from the last checkpoint")
    # The others wait for what is left of a chain.
    fake.set(101, JobState="RUNNING")
    fake.set(102, JobState="PENDING", Reason="Dependency")
    for job in (103, 104, 105):
        fake.forget(job)
    assert submit(output, "--resume") == 0
    assert dependencies(fake, 6)[0] == "afterok:101?afterok:102"


def test_seeds_are_tasks_of_one_array_each_after_its_own(output: Path, fake: FakeSlurm):
    assert submit(output, "--seeds=0,2,5", "--array=2") == 0
    assert dependencies(fake) == [
        "",
        "aftercorr:100",
        "afterok:101_0",
        "afterok:101_2",
        "afterok:101_5",
        dependencies(fake)[-1],
    ]
    assert "#SBATCH --array=0,2,5%2\n" in fake.script(100)
    jobs = json.loads((output / "jobs.json").read_text())["jobs"]
    runs = names(output)
    assert [jobs[runs[f"classification {seed}"]] for seed in (0, 2, 5)] == [["100_0"], ["100_2"], ["100_5"]]
    assert dependencies(fake)[-1] == "afterany:100_0:100_2:100_5:101_0:101_2:101_5:102:103:104"
    # The script finds its run by its own number, and writes into that one's log.
    log = re.search("--output=(.*)", fake.script(100))[1]
    assert Path(log.replace("%a", "2")).parent.resolve() == (output / RUNS_FOLDER / runs["classification 2"]).resolve()
    line = next(line for line in fake.script(100).splitlines() if line.startswith("folder="))
    said = subprocess.run(
        ["bash", "-c", f"{line}; echo $folder"],
        env={"SLURM_ARRAY_TASK_ID": "5", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(said.stdout.strip()) == (output / RUNS_FOLDER / runs["classification 5"]).resolve()
    fake.set("100_2", JobState="RUNNING", Reason="None", NodeList="n1", RunTime="00:01:00")
    told = {state.run: (state.state, state.job) for state in states(output)}
    assert told[runs["classification 2"]] == ("running", "100_2")
    assert told[runs["classification 5"]][0] == "queued"


def test_what_is_left_of_an_array_goes_on_after_its_own_tasks(output: Path, fake: FakeSlurm):
    submit(output, "--seeds=0,1,2", "--array=2")
    runs = names(output)
    for seed in (0, 1):
        finish(output, runs[f"classification {seed}"])
        fake.forget(f"100_{seed}")
    for seed in (0, 1, 2):
        fake.forget(f"101_{seed}")
    for job in (102, 103, 104):
        fake.forget(job)
    assert submit(output, "--resume") == 0
    # Two need nothing any more, one still needs a task: no array goes after all three.
    assert dependencies(fake, 6)[::2][:3] == ["", "", "afterok:100_2"]


def test_not_more_jobs_are_submitted_than_a_site_takes(
    output: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert submit(output, "--max-jobs=3") == 0
    runs = names(output)
    second = output / RUNS_FOLDER / runs["segmentation_training 0"] / "job.sbatch"
    assert fake.calls("sbatch")[1:] == [
        f"--parsable --dependency=afterok:100 --kill-on-invalid-dep=yes {second}",
        f"--parsable --dependency=afterany:100?afterany:101 {output}/report.sbatch rest",
    ]
    assert "held back by max_jobs" in " ".join(capsys.readouterr().out.split())
    told = {state.run: state.state for state in states(output)}
    assert told[runs["segmentation_evaluation 0"]] == "not submitted"

    # The first has ended; the job that waited for that is one of the three itself, and leaves its place to its like.
    finish(output, runs["classification 0"])
    fake.forget(100)
    fake.set(101, JobState="RUNNING")
    fake.set(102, JobState="RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    rest = ["submit", "--rest", f"--output={output}"]
    assert cli.main(rest) == 0
    assert fake.calls("sbatch")[3:] == [f"--parsable --dependency=afterany:101 {output}/report.sbatch rest"]
    assert fake.calls("scancel") == []

    # The second has ended too: there is room.
    finish(output, runs["segmentation_training 0"])
    for job in (101, 102):
        fake.forget(job)
    fake.set(103, JobState="RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "103")
    assert cli.main(rest) == 0
    assert fake.calls("sbatch")[4:] == [
        f"--parsable {output}/runs/{runs['segmentation_evaluation 0']}/job.sbatch",
        f"--parsable --dependency=afterany:104 {output}/report.sbatch",
    ]


def test_what_was_held_back_is_left_alone_when_what_it_needs_has_failed(
    output: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    submit(output, "--max-jobs=3")
    fake.set(100, JobState="FAILED", ExitCode="1:0")
    fake.set(101, JobState="CANCELLED")
    fake.set(102, JobState="RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    assert cli.main(["submit", "--rest", f"--output={output}"]) == 0
    assert fake.calls("sbatch")[3:] == [f"--parsable {output}/report.sbatch"]  # nothing is repeated
    reason = next(state.said for state in states(output) if state.run == names(output)["segmentation_evaluation 0"])
    assert reason.startswith("not started: needs classification-resnet18")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--max-jobs=2",), "max_jobs must be at least 3"),
        (("--max-jobs=4", "--chain=3"), "max_jobs 4 is too small for 3 jobs of one run or array"),
    ],
)
def test_what_can_never_be_submitted_is_refused(
    output: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
):
    assert submit(output, *options) == 2
    assert complaint in capsys.readouterr().err
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--chain=classification=3", "submit as 3 jobs, each if none before it ends well"),
        ("--array=2", "submit, as one array with other seeds of it, 2 at once"),
        ("--max-jobs=4", "no more than 4 jobs at once"),
    ],
)
def test_a_dry_run_says_what_becomes_more_than_a_job(
    output: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], option: str, said: str
):
    assert submit(output, "--seeds=0,1", "--dry-run", option) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert fake.calls("sbatch") == []


def test_jobs_of_somebody_else_are_not_called_failed(output: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch):
    submit(output)
    book = JobBook.read(output)
    book.user = "ada"
    book.write()
    assert {state.state for state in states(output)} == {"queued", "waiting"}
    assert "--user=ada" in fake.calls("squeue")[-1]
    for job in range(100, 104):
        fake.forget(job)  # SLURM hides it, or has forgotten it
    first = states(output)[0]
    assert first.state == "unknown"
    assert first.said.startswith(
        "job 100 is ada's, and SLURM does not show it to you; there is no result; last words: "
    )

"""`evmamba submit`: every run once, in order, and only what is missing when it is called again."""

import datetime
import functools
import json
import re
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch import cli
from evmamba.launch.bench import local
from evmamba.launch.bench.plan import BenchOptions
from evmamba.launch.bench.search import searched
from evmamba.launch.cluster import jobs, submission
from evmamba.launch.cluster.settings import read_cluster
from evmamba.launch.cluster.submission import graph_of
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe, recipe_of
from evmamba.launch.fit.settings import setting
from evmamba.launch.store.estimates import read_estimate
from evmamba.launch.store.progress import write_progress
from evmamba.launch.store.results import Result, write_result
from evmamba.launch.store.spec import Spec, failed_result

from ..handmade import made_result, made_spec
from .fake_slurm import FakeSlurm, install

QUICK = (
    "--backbones=resnet18",
    "--set=trainer.max_steps=2",
    "--set=trainer.limit_test_batches=2",
    "--set=classification.data.init_args.image_size=32",
    "--set=segmentation.data.init_args.crop_size=64",
    "--set=cost.timed_steps=1",
    "--set=cost.warmup_steps=0",
    "--set=cost.batch_size=1",
)
NO_GPUS = "--gpus-per-node=0"


def planned(options: BenchOptions) -> list[Spec]:
    """What `plan` would return, without looking at models and data."""

    def trained(task: str) -> Spec:
        settings = recipe_settings(recipe_of(task, "tiny", "", "resnet18"))
        return made_spec(task, settings=settings, seed=options.seeds[0], device=options.device)

    cost = made_spec("cost", seed=options.seeds[0], device=options.device)
    specs = [cost, *map(trained, options.tasks or ("classification", "detection", "segmentation"))]
    return searched(specs, options.search, options.output) if options.search else specs


recipe_settings = functools.cache(settings_of)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(submission, "plan", planned)
    return install(tmp_path / "slurm", monkeypatch)


def submit(output: Path, *options: str) -> int:
    return cli.main(["submit", f"--output={output}", *options])


def specs_of(output: Path) -> dict[str, Spec]:
    """Kind of run (as its name starts) -> spec."""
    return {name.split("-")[0]: spec for name, spec in jobs.read_specs(output).items()}


def finish(output: Path, spec: Spec, **metrics: float) -> None:
    result = made_result(spec.task, "resnet18", run=spec.name, cost={"latency_ms_median": 3.0}, metrics=metrics)
    result.provenance["spec_hash"] = spec.hash
    write_result(result, output / "runs" / spec.name)


def test_every_run_becomes_a_job_after_those_it_needs_and_the_report_comes_last(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    assert submit(output, NO_GPUS, "--partition=main", "--nodes=classification=2") == 0
    runs = output / "runs"
    names = {kind: spec.name for kind, spec in specs_of(output).items()}
    after = "--kill-on-invalid-dep=yes"
    assert fake.calls("sbatch") == [
        f"--parsable {runs / names['cost'] / 'job.sbatch'}",
        f"--parsable {runs / names['classification'] / 'job.sbatch'}",
        f"--parsable --dependency=afterok:101 {after} {runs / names['detection'] / 'job.sbatch'}",
        f"--parsable --dependency=afterok:101 {after} {runs / names['segmentation_training'] / 'job.sbatch'}",
        f"--parsable --dependency=afterok:103 {after} {runs / names['segmentation_evaluation'] / 'job.sbatch'}",
        f"--parsable --dependency=afterany:100:101:102:103:104 {output / 'report.sbatch'}",
    ]
    assert "#SBATCH --nodes=2\n" in fake.script(101)
    assert f"folder={runs / names['classification']}\n" in fake.script(101)
    book = json.loads((output / "jobs.json").read_text())
    assert book["jobs"] == {name: [100 + i] for i, name in enumerate([*names.values(), "report"])}
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{names['classification']} submitted as job 101" in printed
    assert "2 nodes x 1 process; 16 images a step = 8 x 2 processes, the recipe's; lr 0.002" in printed


def test_an_edit_of_the_recipe_after_the_submission_changes_no_job(tmp_path: Path, fake: FakeSlurm):
    output = tmp_path / "out"
    submit(output, NO_GPUS, "--tasks=classification")
    spec = specs_of(output)["classification"]
    # What the recipe said is in the spec.
    assert spec.settings == settings_of(find_recipe("classification/tiny"))
    assert spec.settings["model"]["class_path"].endswith("ClassificationModule")


def test_a_dry_run_shows_scripts_and_graph_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fake = install(tmp_path / "slurm", monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        submit(
            tmp_path / "out",
            "--backbones=resnet18",
            "--gpus-per-node=8",
            "--account=proj",
            "--preset=paper",
            "--dry-run",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --account=proj") == 6
    assert printed.count("#SBATCH --gpus-per-node=8") == 4
    found = re.search(
        r"sbatch --parsable --dependency=afterok:<job of (classification-resnet18-\w+)> --kill-on", printed
    )
    assert found
    assert f"{found[1]}  submit  1 node x 8 processes; 2048 images a step = 256 x 8 processes" in printed
    assert "    └── segmentation_evaluation-resnet18" in printed
    # Trainings alone are estimated, by a figure that is named.
    assert len(re.findall(r"^\S+-resnet18-\w+ +[\d.]+ (?:h|min) +[\d.]+ +--time ", printed, re.MULTILINE)) == 3
    assert "2904 images/s of T on one A100, training a third (assumed)" in printed
    assert fake.calls("sbatch") == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("option", ["--speed=0", "--speed=nowhere", "--loading=-1"])
def test_a_wrong_speed_is_said_before_anything_is_submitted(tmp_path: Path, fake: FakeSlurm, option: str):
    assert submit(tmp_path / "out", NO_GPUS, option) == 2
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize("plan_all", [submission.plan_graph, submission.plan_here])
def test_trials_are_refused_for_what_starts_from_a_training_of_the_graph(tmp_path: Path, plan_all):
    with pytest.raises(UserError, match="detection would start from the trained classification"):
        plan_all(BenchOptions(tmp_path, search=2, device="cpu"), read_cluster(None, {}))


def test_an_estimate_by_a_given_speed_is_kept_for_the_report(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    submit(tmp_path / "a", NO_GPUS)
    assert "GPU-hours" not in capsys.readouterr().out  # nothing is known of a CPU
    submit(tmp_path / "b", NO_GPUS, "--speed=12.5")
    assert "12.5 images/s of T in training (given)" in " ".join(capsys.readouterr().out.split())
    kept = {path.parent.name.split("-")[0] for path in (tmp_path / "b").glob("runs/*/estimate.json")}
    assert kept == {"classification", "detection", "segmentation_training"}
    assert read_estimate(next((tmp_path / "b").glob("runs/classification-*"))).seconds > 0


def test_resume_submits_what_failed_and_leaves_what_is_finished_or_on_its_way(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    submit(output, NO_GPUS, "--partition=main", "--time=10:00")
    specs = specs_of(output)
    finish(output, specs["cost"])
    finish(output, specs["classification"])
    fake.forget(100)
    fake.forget(101)
    failed = output / "runs" / specs["detection"].name
    write_result(failed_result(specs["detection"], "no luck", datetime.datetime.now(datetime.UTC)), failed)
    (failed / "last.ckpt").touch()
    fake.forget(102)  # ended
    fake.set(103, JobState="RUNNING", Reason="None")
    capsys.readouterr()
    assert submit(output, "--resume", "--time=detection=20:00") == 0
    assert fake.calls("sbatch")[6:] == [
        f"--parsable {failed / 'job.sbatch'}",
        f"--parsable --dependency=afterany:103:104:106 {output / 'report.sbatch'}",
    ]
    assert fake.calls("scancel") == ["105"]
    assert "#SBATCH --time=20:00\n" in fake.script(106)
    assert "#SBATCH --partition=main\n" in fake.script(106)  # from the first time
    assert not (failed / "result.json").exists()
    assert (failed / "last.ckpt").exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{specs['classification'].name} finished" in printed
    assert f"{specs['segmentation_training'].name} running as job 103" in printed

    assert submit(output, "--resume") == 0
    assert len(fake.calls("sbatch")) == 8  # all on their way


def test_a_search_submits_its_trials_and_then_what_they_chose(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    command = (NO_GPUS, "--tasks=classification", "--search=3")

    def again(*options: str) -> list[str]:
        """Submit with --resume; return what sbatch was given besides the report."""
        before = len(fake.calls("sbatch"))
        assert submit(output, *options, "--resume") == 0
        return [Path(call.split()[-1]).parent.name for call in fake.calls("sbatch")[before:] if "runs" in call]

    assert submit(output, *command) == 0
    first, second, third = tried = list(jobs.read_specs(output).values())
    said = " ".join(capsys.readouterr().out.split())
    assert f"{first.name} submitted as job 100 trial; 1 node x 1 process;" in said
    assert "the same command with --resume submits the benchmark and what they chose" in said
    assert again(*command) == []  # none has ended

    for number, spec in enumerate(tried):
        fake.forget(100 + number)
        finish(output, spec, top1=0.1 * number)
    no_luck = failed_result(third, "no luck", datetime.datetime.now(datetime.UTC))
    write_result(no_luck, output / "runs" / third.name)
    assert again() == [third.name]  # by itself: what failed
    fake.forget(next(iter(jobs.JobBook.read(output).submitted[third.name][-1:])))
    write_result(no_luck, output / "runs" / third.name)

    *_, cost, same, own = submission_order = again(*command)
    assert len(submission_order) == 3
    assert cost.startswith("cost-")
    specs = jobs.read_specs(output)
    assert list(specs) == [first.name, second.name, cost, same, own]
    lr = "model.init_args.optimizer.lr"
    assert setting(specs[own].settings, lr) == setting(second.settings, lr) != setting(specs[same].settings, lr)
    assert (specs[same].trials, specs[own].trials) == (0, 3)
    assert f"{own} submitted as job" in " ".join(capsys.readouterr().out.split())
    assert again() == again(*command) == []
    assert submit(output, *command, "--seed=1", "--resume") == 2  # another benchmark
    assert "these options make other runs" in capsys.readouterr().err


def test_networks_that_take_turns_are_one_job(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "out"

    def members(options: BenchOptions) -> list[Spec]:
        together: dict[str, dict] = {"resnet18": {}, "resnet50": {}}
        return made_spec("cost", seed=options.seeds[0], device=options.device, together=together).members

    monkeypatch.setattr(submission, "plan", members)
    assert submit(output, NO_GPUS) == 0
    first, second = jobs.read_specs(output).values()
    assert len(fake.calls("sbatch")) == 2  # and the report
    assert fake.calls("sbatch")[1].startswith("--parsable --dependency=afterany:100 ")
    assert jobs.JobBook.read(output).submitted[second.name] == [100]
    finish(output, first)
    fake.forget(100)
    fake.forget(101)
    assert submit(output, "--resume") == 0  # the second failed: it is measured by itself
    assert fake.calls("sbatch")[2] == f"--parsable {output / 'runs' / second.name / 'job.sbatch'}"


@pytest.mark.parametrize("told_by", ["progress", "result"])
def test_a_run_that_took_long_to_save_is_warned_earlier_when_it_is_resumed(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], told_by: str
):
    output = tmp_path / "out"
    submit(output, NO_GPUS, "--tasks=classification", "--time=20:00")
    assert "--signal=SIGUSR1@90\n" in fake.script(101)
    spec = specs_of(output)["classification"]
    folder = output / "runs" / spec.name
    if told_by == "progress":
        write_progress(folder, "training", 5, 10, checkpoint_seconds=70.4)
    else:
        result = failed_result(spec, "no luck", datetime.datetime.now(datetime.UTC))
        result.training["checkpoint_seconds"] = 70.4
        write_result(result, folder)
    fake.set(101, JobState="TIMEOUT", TimeLimit="20:00")
    job = len(fake.calls("sbatch")) + 100
    assert submit(output, "--resume", "--time=classification=7:00") == 0
    assert "--signal=SIGUSR1@272\n" in fake.script(job)  # a minute, and three times as long

    write_progress(folder, "training", 6, 10, checkpoint_seconds=200.0)
    fake.set(job, JobState="TIMEOUT", TimeLimit="7:00")
    capsys.readouterr()
    assert submit(output, "--resume") == 2
    assert "time 7:00 of classification is too short: the warning comes 660 s before" in capsys.readouterr().err


def test_resume_waits_for_a_need_that_is_on_its_way(tmp_path: Path, fake: FakeSlurm):
    output = tmp_path / "out"
    submit(output, NO_GPUS)
    for job in (100, 102, 103, 104, 105):
        fake.forget(job)
    fake.set(101, JobState="RUNNING")
    submit(output, "--resume")
    assert [call.split()[1] for call in fake.calls("sbatch")[7:]] == [
        "--dependency=afterok:101",
        "--dependency=afterok:101",
        "--dependency=afterok:108",
        "--dependency=afterany:101:106:107:108:109",
    ]


def test_resume_replaces_jobs_that_still_wait_for_one_that_failed(tmp_path: Path, fake: FakeSlurm):
    output = tmp_path / "out"
    submit(output, NO_GPUS)
    fake.forget(101)  # the classification; those after it are pending still
    assert submit(output, "--resume") == 0
    assert fake.calls("scancel") == ["102", "103", "104", "105"]
    assert [call.split()[1] for call in fake.calls("sbatch")[7:]] == [
        "--dependency=afterok:106",
        "--dependency=afterok:106",
        "--dependency=afterok:108",
        "--dependency=afterany:100:106:107:108:109",
    ]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((NO_GPUS,), "jobs were submitted to .*; --resume submits what is missing"),
        (("--resume", "--seed=3"), "these options make other runs than those in"),
        (("--resume", "--nodes=classification=3"), "16 images a step in its recipe, which 3 processes cannot share"),
    ],
)
def test_what_would_repeat_or_change_runs_is_refused(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
):
    output = tmp_path / "out"
    submit(output, NO_GPUS)
    count = len(fake.calls("sbatch"))
    assert submit(output, *options) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert len(fake.calls("sbatch")) == count


def test_jobs_that_were_submitted_before_sbatch_refused_are_noted(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    fake.refuse_from(102)
    assert submit(output, NO_GPUS) == 2
    said = capsys.readouterr().err
    assert "invalid partition specified: gpu; 2 jobs were submitted before that, --resume goes on" in said
    assert list(json.loads((output / "jobs.json").read_text())["jobs"].values()) == [[100], [101]]
    (fake.folder / "refuse").unlink()
    assert submit(output, "--resume") == 0
    assert fake.calls("sbatch")[3].startswith("--parsable --dependency=afterok:101 ")


@pytest.mark.parametrize("accepted", range(6))
def test_wherever_sbatch_refuses_no_run_is_lost(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], accepted: int
):
    output = tmp_path / "out"
    fake.refuse_from(100 + accepted)
    assert submit(output, NO_GPUS) == 2
    known = set(jobs.read_specs(output))
    assert len(known) == 5
    assert all((output / "runs" / name / "job.sbatch").is_file() for name in known)
    capsys.readouterr()
    assert cli.main(["status", str(output), "--json"]) == 0
    told = {run["run"]: run["state"] for run in json.loads(capsys.readouterr().out)}
    assert set(told) == known
    assert sum(state == "not submitted" for state in told.values()) == 5 - min(accepted, 5)
    (fake.folder / "refuse").unlink()
    assert submit(output, "--resume") == 0
    submitted = json.loads((output / "jobs.json").read_text())["jobs"]
    assert set(submitted) == known | {"report"}
    assert all(len(numbers) == 1 for numbers in submitted.values())


def test_nothing_is_submitted_twice_because_squeue_was_silent(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    submit(tmp_path / "out", NO_GPUS)
    count = len(fake.calls("sbatch"))
    (fake.folder / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert submit(tmp_path / "out", "--resume") == 2
    assert "squeue does not answer" in capsys.readouterr().err
    assert len(fake.calls("sbatch")) == count


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--node=2", "did you mean --nodes"),
        ("--cluster=/nowhere.yaml", "/nowhere.yaml: cannot be read"),
        ("--strategy=deepspeed_stage1", "unknown strategy 'deepspeed_stage1'; did you mean deepspeed_stage_"),
        ("--nodes=classification=0", "nodes must be at least 1, not 0"),
        ("--local --resume", "--local goes on by itself"),
        ("--resume", "nothing was submitted to .* yet"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], option: str, complaint: str
):
    assert submit(tmp_path / "out", *option.split()) == 2
    said = capsys.readouterr().err
    assert re.search(complaint, said)
    assert said.count("\n") == 1
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize("option", ["--strategy=deepspeed_stage_3", "--strategy=classification=fsdp2"])
def test_a_strategy_that_does_not_go_with_a_recipe_is_refused_before_it_waits_for_nodes(
    tmp_path: Path,
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
):
    monkeypatch.setattr(f"{__name__}.recipe_of", lambda task, *_: find_recipe(f"{task}/small"))  # it averages weights
    output = tmp_path / "out"
    assert submit(output, "--gpus-per-node=2", option) == 2
    name = option.rpartition("=")[2]
    said = " ".join(capsys.readouterr().err.split())
    assert f"classification: averaged weights (EMA) do not work with the split parameters of --strategy {name}" in said
    assert "--strategy classification=NAME" in said
    assert fake.calls("sbatch") == []
    assert submit(output, "--gpus-per-node=2", "--strategy=deepspeed_stage_2") == 0
    capsys.readouterr()
    assert submit(output, "--resume", option) == 2
    assert "averaged weights" in capsys.readouterr().err


def test_the_graph_does_not_run_here_while_its_jobs_are_on_their_way(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    submit(output, NO_GPUS)
    assert submit(output, "--local") == 2
    assert "jobs are on their way in" in capsys.readouterr().err


def test_here_too_a_run_is_not_started_when_what_it_needs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started = []

    def run_one(spec: Spec, folder: Path, while_waiting, threads=None) -> Result:
        started.append(spec.task)
        spec.write(folder)
        if spec.task == "classification":
            result = failed_result(spec, "no luck", datetime.datetime.now(datetime.UTC))
        else:
            result = made_result(spec.task, "resnet18", run=spec.name)
        write_result(result, folder)
        return result

    monkeypatch.setattr(submission, "plan", planned)
    monkeypatch.setattr(local, "run_one", run_one)
    assert submit(tmp_path / "out", "--local") == 1
    assert started == ["cost", "classification"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    why = f"not started: needs {specs_of(tmp_path / 'out')['classification'].name}, which failed: no luck"
    assert sum(why in note for note in report["notes"]) == 2  # the evaluation says what its training says


@pytest.mark.slow
def test_the_graph_runs_here_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    assert submit(output, "--local", "--tasks=classification,segmentation", *QUICK) == 0
    capsys.readouterr()
    results = {
        kind: json.loads((output / "runs" / spec.name / "result.json").read_text())
        for kind, spec in specs_of(output).items()
    }
    assert set(results) == {"cost", "classification", "segmentation_training", "segmentation_evaluation"}
    assert "mIoU_ms" in results["segmentation_evaluation"]["metrics"]
    assert results["segmentation_training"]["provenance"]["init_from"] == results["classification"]["run"]
    report = json.loads((output / "report.json").read_text())
    assert [part[0]["state"] for part in report["rows"][0]["cells"]] == ["measured"] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"class_path": "evil.Module"}},
        {"model": {"init_args": {"backbone": "evil:net"}}},
        {"model": "evil:net"},
    ],
)
def test_a_folder_of_somebody_else_is_not_resumed_with_classes_that_nobody_named(tmp_path: Path, settings: dict):
    more = {"model": settings["model"]} if isinstance(settings["model"], str) else {"settings": settings}
    spec = made_spec("classification", **more)
    spec.write(tmp_path / "runs" / spec.name)
    jobs.JobBook(tmp_path, order=[spec.name]).write()
    with pytest.raises(UserError, match=r"spec\.json names 'evil.*--import evil"):
        graph_of(tmp_path, read_cluster(None, {}))

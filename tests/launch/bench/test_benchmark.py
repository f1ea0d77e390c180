"""The bench: which runs it plans, that it goes on after a failure, and that nothing finished is repeated."""

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch import cli
from evmamba.launch.bench import benchmark
from evmamba.launch.bench.benchmark import BenchOptions, plan, run_here
from evmamba.launch.bench.progress import RunProgress
from evmamba.launch.bench.run import RunSpec
from evmamba.launch.store.results import Result, read_result, write_result

from ..handmade import made_result

QUICK_COST = ("cost.timed_steps=1", "cost.warmup_steps=0", "cost.batch_size=1", "cost.training_batch=0")


def spec_of(task: str, seed: int = 0) -> RunSpec:
    return RunSpec(task, "resnet18", None, seed=seed, device="cpu", precision=None)


def quiet(total: int) -> RunProgress:
    return RunProgress(Console(quiet=True), total)


def finished(spec: RunSpec) -> Result:
    result = made_result(spec.task, spec.model, run=spec.name)
    result.provenance["spec_hash"] = spec.hash
    return result


def test_the_plan_has_a_cost_and_every_task_for_every_backbone(tmp_path: Path):
    specs = plan(
        BenchOptions(
            tmp_path,
            backbones=["efficientvmamba_t", "resnet18"],
            detectors=["retinanet", "fasterrcnn"],
            overrides=["trainer.max_steps=2", "segmentation.trainer.max_steps=1", *QUICK_COST],
        )
    )
    kinds = ["cost", "classification", "detection", "detection", "segmentation"]
    assert [(spec.model, spec.task) for spec in specs] == [
        (model, task) for model in ("efficientvmamba_t", "resnet18") for task in kinds
    ]
    assert len({spec.hash for spec in specs}) == len({spec.name for spec in specs}) == 10
    assert specs[0].timing == {
        **{"timed_steps": 1, "warmup_steps": 0, "batch_size": 1},
        **{"training_batch": 0, "max_batch": 0, "input_sizes": []},
    }
    assert "--model.init_args.backbone=resnet18" in specs[6].arguments
    assert "--model.init_args.detector=fasterrcnn" in specs[8].arguments
    assert specs[6].arguments[-1] == "--trainer.max_steps=2"
    assert specs[9].arguments[-1] == "--trainer.max_steps=1"


def test_a_data_folder_limits_the_bench_to_its_task_and_takes_the_small_recipe(tmp_path: Path):
    from evmamba.tasks.embedded import ensure_embedded

    folder = ensure_embedded("segmentation")
    specs = plan(BenchOptions(tmp_path, data={"segmentation": str(folder)}))
    assert [spec.task for spec in specs] == ["cost", "segmentation"]
    assert specs[1].recipe
    assert specs[1].recipe.endswith("conf/segmentation/small.yaml")
    assert f"--data.init_args.data_dir={folder.resolve()}" in specs[1].arguments


@pytest.mark.parametrize(
    ("task", "head", "model", "name"),
    [
        ("classification", "linear", "efficientvmamba_s", "imagenet_efficientvmamba_s.yaml"),
        ("classification", "linear", "resnet18", "imagenet_efficientvmamba_s.yaml"),  # 11.7 M parameters, as S
        ("classification", "linear", "pvt_v2_b0", "imagenet_efficientvmamba_t.yaml"),
        ("classification", "linear", "efficientvmamba_b-ss2d", "imagenet_efficientvmamba_b.yaml"),
        ("detection", "maskrcnn", "efficientvmamba_b", "coco_maskrcnn_1x_efficientvmamba_b.yaml"),
        ("detection", "retinanet", "vim_tiny", "coco_retinanet_efficientvmamba_t.yaml"),
        ("segmentation", "upernet", "efficientvmamba_t", "ade20k_upernet_efficientvmamba_t.yaml"),
    ],
)
def test_the_paper_preset_is_the_variants_own_recipe(task: str, head: str, model: str, name: str):
    assert benchmark.recipe_of(task, "paper", head, model).name == name


def test_mask_rcnn_has_two_schedules():
    for schedule in ("1x", "3x"):
        recipe = benchmark.recipe_of("detection", "paper", "maskrcnn", "efficientvmamba_t", schedule)
        assert recipe.name == f"coco_maskrcnn_{schedule}_efficientvmamba_t.yaml"


def test_a_detector_without_paper_recipe_is_refused():
    with pytest.raises(UserError, match="no paper recipe for detection with fasterrcnn"):
        benchmark.recipe_of("detection", "paper", "fasterrcnn", "resnet18")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backbones": ["efficientvmamba_q"]}, "unknown backbone 'efficientvmamba_q'; did you mean efficientvmamba_"),
        ({"backbones": ["vit_tiny_patch16_224"]}, "vit_tiny_patch16_224"),
        ({"data": {"classification": "/nowhere"}}, "data folder not found: /nowhere"),
        ({"overrides": ["trainer.max_step=2"]}, "did you mean --trainer.max_steps"),
        ({"overrides": ["cost.timed_steps=none"]}, "write a positive whole number"),
        ({"overrides": ["cost.input_sizes=224,"]}, "write a positive whole number"),
        ({"suite": "ablation"}, "unknown suite 'ablation'; did you mean ablations"),
        ({"suite": "paper", "backbones": ["convnext_atto"]}, "the paper's tables have nothing on convnext_atto"),
        ({"backbones": ["efficientvmamba_t-ss3d"]}, "unknown tag of efficientvmamba_t 'ss3d'; did you mean ss2d"),
        ({"seeds": []}, "no seed"),
        ({"precision": "64-true"}, "--precision 64-true: a benchmark runs and measures 32-true, bf16-mixed, 16-mixed"),
        (
            {"preset": "paper", "tasks": ["detection"]},
            "paper's detection starts from a classifier .*--set detection.model",
        ),
    ],
)
def test_what_cannot_work_is_told_before_the_first_run(tmp_path: Path, changes: dict, complaint: str):
    with pytest.raises(UserError, match=complaint) as raised:
        plan(BenchOptions(tmp_path, **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("task", "detector", "damage", "complaint"),
    [
        ("classification", "retinanet", "train/*/*", "cannot be read"),
        ("segmentation", "retinanet", "annotations/training/*.png", "cannot be read"),
        ("detection", "maskrcnn", "annotations/instances_train.json", "mask"),
    ],
)
def test_every_file_is_looked_at_before_the_first_run(
    tmp_path: Path, task: str, detector: str, damage: str, complaint: str
):
    from evmamba.tasks.embedded import ensure_embedded

    folder = tmp_path / "data"
    shutil.copytree(ensure_embedded(task), folder)
    file = min(folder.glob(damage))
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation.pop("segmentation")
        file.write_text(json.dumps(content))
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=complaint) as raised:
        plan(BenchOptions(tmp_path / "out", data={task: str(folder)}, detectors=[detector], preset="tiny"))
    assert "\n" not in str(raised.value)
    assert file.name in str(raised.value)


def test_the_hash_of_a_spec_follows_what_decides_the_run_and_not_where_the_recipe_lies():
    spec = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe="/a/tiny.yaml")
    moved = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe="/b/tiny.yaml")
    edited = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe_hash="1")
    assert spec.hash == moved.hash
    assert len({spec.hash, edited.hash, spec_of("cost", seed=1).hash}) == 3


def test_a_failing_run_does_not_stop_the_others_and_finished_ones_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    specs = [spec_of("cost"), spec_of("classification"), spec_of("segmentation")]
    ran: list[str] = []

    def run_one(spec: RunSpec, folder: Path, while_waiting) -> Result:
        ran.append(spec.task)
        result = finished(spec)
        if spec.task == "classification" and ran.count("classification") == 1:
            result.status, result.reason = "failed", "no luck"
        write_result(result, folder)
        return result

    monkeypatch.setattr(benchmark, "run_one", run_one)
    results, interrupted = run_here(specs, tmp_path, quiet(3))
    assert [result.status for result in results] == ["finished", "failed", "finished"]
    assert not interrupted

    results, _ = run_here(specs, tmp_path, quiet(3))
    assert [result.status for result in results] == ["finished"] * 3
    assert ran == ["cost", "classification", "segmentation", "classification"]

    run_here([*specs[:1], spec_of("cost", seed=1)], tmp_path, quiet(2))  # another seed is another run
    run_here(specs[:1], tmp_path, quiet(1), force=True)
    assert ran[4:] == ["cost", "cost"]


def test_ctrl_c_keeps_what_is_finished_and_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [spec_of("cost"), spec_of("classification"), spec_of("segmentation")]
    write_result(finished(specs[2]), tmp_path / "runs" / specs[2].name)

    def run_one(spec: RunSpec, folder: Path, while_waiting) -> Result:
        if spec.task == "classification":
            raise KeyboardInterrupt
        result = finished(spec)
        write_result(result, folder)
        return result

    monkeypatch.setattr(benchmark, "run_one", run_one)
    results, interrupted = run_here(specs, tmp_path, quiet(3))
    assert interrupted
    assert [result.reason for result in results] == [None, "interrupted", None]
    assert not (tmp_path / "runs" / specs[1].name / "result.json").exists()


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
    benchmark.run_one(spec_of("cost"), tmp_path / "run", lambda: None)
    result = read_result(tmp_path / "run" / "result.json")
    assert result.status == "failed"
    assert result.reason
    assert re.match(reason, result.reason)


def test_the_checkpoints_of_a_run_that_did_not_finish_are_kept_when_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replace_python(tmp_path, monkeypatch, "mkdir $(dirname $3)/checkpoints; echo $$ > $(dirname $3)/checkpoints/a.ckpt")
    folder = tmp_path / "run"
    for _ in range(3):
        benchmark.run_one(spec_of("cost"), folder, lambda: None)
    kept = sorted(tmp_path.glob("run*/checkpoints/a.ckpt"))
    assert [file.parent.parent.name for file in kept] == ["run", "run.failed-1", "run.failed-2"]
    assert len({file.read_text() for file in kept}) == 3

    write_result(finished(spec_of("cost")), folder)  # a finished run that is repeated by --force is not kept
    benchmark.run_one(spec_of("cost"), folder, lambda: None)
    assert len(list(tmp_path.glob("run*"))) == 3


def test_runs_of_another_commit_are_taken_over_and_mentioned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [spec_of("cost"), spec_of("classification")]
    for spec in specs:
        result = finished(spec)
        result.provenance["git_commit"] = "a" * 40
        write_result(result, tmp_path / "runs" / spec.name)
    for now, said in (("b" * 40, 1), ("a" * 40, 0), (None, 0)):
        monkeypatch.setattr(benchmark, "git_state", lambda now=now: {"git_commit": now})
        console = Console(file=io.StringIO(), width=200)
        results, _ = run_here(specs, tmp_path, RunProgress(console, 2))
        assert len(results) == 2
        assert console.file.getvalue().count("another commit were taken over (aaaaaaaaaaaa, now bbbbbbbbbbbb)") == said


def test_a_new_version_repeats_every_run(monkeypatch: pytest.MonkeyPatch):
    before = spec_of("cost").hash
    monkeypatch.setattr("evmamba.launch.bench.run.metadata.version", lambda name: "99.0")
    assert spec_of("cost").hash != before


def test_a_benchmark_that_is_terminated_takes_its_run_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_python(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    results, interrupted = run_here([spec_of("cost")], tmp_path, quiet(1))
    assert interrupted
    assert results[0].reason == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_a_small_bench_from_command_line_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [
        f"--output={tmp_path / 'out'}",
        "--tasks=classification,segmentation",
        "--set=trainer.max_steps=3",
        "--set=trainer.limit_test_batches=1",
        "--set=classification.data.init_args.image_size=32",
        "--set=segmentation.model.init_args.optimizer.lr=1.0e+30",  # no loss is finite after such a step
        "--set=segmentation.model.init_args.schedule.warmup_steps=0",
        *(f"--set={override}" for override in QUICK_COST),
    ]
    assert cli.main(["bench", *options]) == 1
    printed = capsys.readouterr().out
    assert "failed" in printed

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cells = report["rows"][0]["cells"]
    assert [part[0]["state"] for part in cells] == ["measured", "measured", "failed"]
    assert cells[0][0]["text"] == "6.49"
    assert cells[0][1]["text"] == "0.81"
    assert any("the loss is" in note or "no longer finite" in note for note in report["notes"])

    results = {path.parent.name.split("-")[0]: read_result(path) for path in tmp_path.rglob("result.json")}
    trained = results["classification"]
    assert trained.training["steps"] == 3
    assert trained.training["curve"]
    assert trained.protocol["weights"] == "last epoch"
    assert trained.provenance["spec_hash"]
    assert results["segmentation"].status == "failed"


def test_a_run_that_was_killed_goes_on_from_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "cd $(dirname $3); mkdir -p checkpoints; echo once >> checkpoints/a.ckpt; kill -9 $$"
    replace_python(tmp_path, monkeypatch, script)
    for _ in range(2):
        result = benchmark.run_one(spec_of("cost"), tmp_path / "run", lambda: None)
        assert result.provenance["interrupted"] is True
    assert (tmp_path / "run/checkpoints/a.ckpt").read_text() == "once\nonce\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]

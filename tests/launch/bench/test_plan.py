"""Which runs make a benchmark, and what is refused before the first of them."""

import json
import shutil
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.store.spec import RunSpec

QUICK_COST = ("cost.timed_steps=1", "cost.warmup_steps=0", "cost.batch_size=1", "cost.training_batch=0")


def spec_of(task: str, seed: int = 0) -> RunSpec:
    return RunSpec(task, "resnet18", None, seed=seed, device="cpu", precision=None)


def test_the_plan_has_a_cost_and_every_task_for_every_backbone(tmp_path: Path):
    specs = plan(
        BenchOptions(
            tmp_path,
            backbones=["efficientvmamba_t", "resnet18"],
            heads={"detection": ["retinanet", "fasterrcnn"]},
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
            "paper's detection starts from its classification: add --classification .*--set detection.model",
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
        plan(BenchOptions(tmp_path / "out", data={task: str(folder)}, heads={"detection": [detector]}, preset="tiny"))
    assert "\n" not in str(raised.value)
    assert file.name in str(raised.value)


def test_the_hash_of_a_spec_follows_what_decides_the_run_and_not_where_the_recipe_lies():
    spec = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe="/a/tiny.yaml")
    moved = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe="/b/tiny.yaml")
    edited = RunSpec("cost", "resnet18", None, seed=0, device="cpu", precision=None, recipe_hash="1")
    assert spec.hash == moved.hash
    assert len({spec.hash, edited.hash, spec_of("cost", seed=1).hash}) == 3


def test_a_new_version_repeats_every_run(monkeypatch: pytest.MonkeyPatch):
    before = spec_of("cost").hash
    monkeypatch.setattr("evmamba.launch.store.spec.metadata.version", lambda name: "99.0")
    assert spec_of("cost").hash != before

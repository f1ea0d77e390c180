"""Which runs make a benchmark, and what is refused before the first of them."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
from huggingface_hub import constants

from evmamba.errors import UserError
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.fit.settings import setting
from evmamba.launch.store.spec import Timing

from ...evmamba import hub_server

QUICK_COST = ("cost.timed_steps=1", "cost.warmup_steps=0", "cost.batch_size=1", "cost.training_batch=0")


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
    assert specs[0].timing == Timing(timed_steps=1, warmup_steps=0, batch_size=1, training_batch=0)
    assert [specs[k].needs for k in (0, 5)] == [(), (specs[0].name,)]  # one run measures both, in turns
    assert list(specs[5].together) == ["efficientvmamba_t", "resnet18"]
    assert setting(specs[6].settings, "model.init_args.backbone") == "resnet18"
    assert setting(specs[8].settings, "model.init_args.detector") == "fasterrcnn"
    assert [setting(specs[k].settings, "trainer.max_steps") for k in (6, 9)] == [2, 1]


def test_a_data_folder_limits_the_bench_to_its_task_and_takes_the_small_recipe(tmp_path: Path):
    from evmamba.tasks.embedded import ensure_embedded

    folder = ensure_embedded("segmentation")
    specs = plan(BenchOptions(tmp_path, data={"segmentation": str(folder)}))
    assert [spec.task for spec in specs] == ["cost", "segmentation"]
    assert specs[1].recipe
    assert specs[1].recipe.endswith("conf/segmentation/small.yaml")
    assert setting(specs[1].settings, "data.init_args.data_dir") == str(folder.resolve())


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
        ({"loggers": ["wandbb"]}, "unknown logger 'wandbb'; did you mean wandb"),
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


def test_options_of_the_user_win_over_the_benchs_own(tmp_path: Path):
    overrides = ["data.init_args.seed=7", "trainer.precision=bf16-mixed", "trainer.limit_test_batches=1"]
    options = BenchOptions(tmp_path, backbones=["resnet18"], tasks=["classification"], precision="32-true")
    options.overrides = overrides
    _, spec = plan(options)
    assert setting(spec.settings, "data.init_args.seed") == 7
    assert spec.precision == "bf16-mixed"
    batches = setting(spec.settings, "trainer.limit_test_batches")
    assert (batches, type(batches)) == (1, int)  # 1.0 would be all of them


def test_a_batch_of_the_users_is_noted_as_such(tmp_path: Path):
    options = BenchOptions(tmp_path, backbones=["resnet18"], tasks=["classification"])
    assert not plan(options)[1].own_batch
    options.overrides = ["classification.data.init_args.batch_size=4"]
    assert plan(options)[1].own_batch


def test_every_training_starts_from_its_backbones_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = timm.create_model("resnet10t")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    own = "classification.model.init_args.checkpoint=null"
    options = BenchOptions(tmp_path / "out", backbones=["resnet10t"], tasks=["classification", "segmentation"])
    options.pretrained, options.overrides = True, [own]
    with hub_server.serving() as hub:
        hub_server.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        with pytest.raises(UserError, match="cannot fetch the published weights of 'resnet10t'"):
            plan(options)  # before anything runs, where there may still be a network
        content = (tmp_path / "w.safetensors").read_bytes()
        hub.add(network.pretrained_cfg["hf_hub_id"], "main", "model.safetensors", content)
        cost, classification, segmentation = plan(options)
        with pytest.raises(UserError, match="no published weights are known for vmamba_tiny"):
            plan(BenchOptions(tmp_path / "out", backbones=["vmamba_tiny"], pretrained=True))
    checkpoint = "model.init_args.checkpoint"
    assert setting(segmentation.settings, checkpoint) == "pretrained"
    assert setting(classification.settings, checkpoint) is None
    assert cost.hash == plan(BenchOptions(tmp_path / "out", backbones=["resnet10t"], tasks=["classification"]))[0].hash

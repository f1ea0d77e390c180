"""Suites: what each is made of, that all its networks get the same budget, and that every one of them can be built."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import evmamba
from evmamba.errors import UserError
from evmamba.launch.bench.graph import ACCUMULATE_OPTION, BATCH_OPTION
from evmamba.launch.bench.plan import DROP_PATH_OPTION, BenchOptions, plan, preset_of
from evmamba.launch.bench.suites import ABLATED, PEERS, SUITES, WITHOUT_PYRAMID, entries_of, paper_entries
from evmamba.launch.fit import recipes
from evmamba.launch.fit.settings import setting
from evmamba.launch.report.paper import OURS
from evmamba.launch.store.spec import Spec
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.detection.detectors import build_detector
from evmamba.tasks.segmentation.upernet import UPerNet
from evmamba.variants import ABLATIONS, split_name

CHECKPOINT = "segmentation.model.init_args.checkpoint=null"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without building networks and looking at data, which other tests do."""
    monkeypatch.setattr("evmamba.launch.bench.plan._check_backbone", lambda *arguments: None)
    monkeypatch.setattr("evmamba.launch.bench.plan._check_training", lambda *arguments: "fingerprint")
    monkeypatch.setattr("evmamba.launch.bench.plan.has_drop_path", lambda model: True)
    monkeypatch.setattr(recipes, "_nearest", lambda model, variants: variants[0])


def planned(tmp_path: Path, suite: str, **options: Any) -> list[Spec]:
    return plan(BenchOptions(tmp_path, suite=suite, **options))


def test_every_name_of_a_suite_exists():
    for suite in SUITES.values():
        assert len(set(suite.models)) == len(suite.models)
        for name in suite.models:
            assert split_name(name)[0] in evmamba.list_models() or timm.is_model(name), name


def test_the_ablations_have_every_value_of_every_switch_alone():
    switches = [split_name(name)[1] for name in ABLATED]
    for switch, values in ABLATIONS.items():
        for value in values[1:]:
            assert {switch: value} in switches
    assert {} in switches


@pytest.mark.usefixtures("unchecked")
def test_main_is_three_variants_on_three_tasks_with_the_cost_of_backbones_and_whole_networks(tmp_path: Path):
    specs = planned(tmp_path, "main")
    kinds = [("cost", None), ("cost", "retinanet"), ("cost", "upernet")]
    kinds += [("classification", "linear"), ("detection", "retinanet"), ("segmentation", "upernet")]
    assert [(spec.model, spec.task, spec.head) for spec in specs] == [(m, t, h) for m in OURS for t, h in kinds]
    assert {spec.suite for spec in specs} == {"main"}
    assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.usefixtures("unchecked")
def test_among_peers_upernet_has_one_width_for_all_by_the_papers_recipes_too(tmp_path: Path):
    def widths(suite: str) -> set[int]:
        specs = planned(tmp_path, suite, preset="paper", tasks=["segmentation"], overrides=[CHECKPOINT])
        whole = [spec.head_options["decoder_channels"] for spec in specs if spec.task == "cost" and spec.head]
        trained = [setting(s.settings, "model.init_args.decoder_channels") for s in specs if s.task == "segmentation"]
        assert whole == trained
        return set(trained)

    assert widths("peers") == {512}
    assert widths("main") == {256, 384, 512}


@pytest.mark.usefixtures("unchecked")
def test_networks_of_three_stages_are_compared_as_classifiers(tmp_path: Path):
    specs = planned(tmp_path, "peers", backbones=["efficientvim_m1", "repvit_m0_9"])
    assert [spec.task for spec in specs if spec.model == "efficientvim_m1"] == ["cost", "classification"]
    assert {spec.task for spec in specs if spec.model == "repvit_m0_9"} == {"cost", *TASKS}
    for name in WITHOUT_PYRAMID:
        build_backbone(name, features_only=False)
        with pytest.raises(UserError, match=r"strides \[16, 32, 64\]"):
            build_backbone(name, features_only=True)


@pytest.mark.usefixtures("unchecked")
def test_seeds_repeat_the_trainings_and_not_the_cost(tmp_path: Path):
    specs = planned(tmp_path, "ablations", seeds=(0, 1, 2), backbones=["efficientvmamba_t-ss2d"])
    assert [(spec.task, spec.seed) for spec in specs] == [
        ("cost", 0), ("classification", 0), ("classification", 1), ("classification", 2),
    ]  # fmt: skip
    assert setting(specs[-1].settings, "data.init_args.seed") == 2
    assert len({spec.hash for spec in specs}) == 4


@pytest.mark.usefixtures("unchecked")
def test_the_same_run_in_two_suites_is_run_once(tmp_path: Path):
    options = {"backbones": ["efficientvmamba_t"], "tasks": ["segmentation"]}
    main, peers = planned(tmp_path, "main", **options), planned(tmp_path, "peers", **options)
    assert [spec.hash for spec in main] == [spec.hash for spec in peers]
    assert [spec.suite for spec in main] != [spec.suite for spec in peers]


BUDGET = ["trainer.max_epochs", "trainer.max_steps", "trainer.precision"]
# May differ between the paper's recipes for T, S and B.
OWN = ("backbone", "drop_path_rate", "decoder_channels")


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", ["main", "peers", "ablations", "paper"])
@pytest.mark.usefixtures("unchecked")
def test_all_networks_of_a_suite_have_the_same_budget(tmp_path: Path, name: str, preset: str):
    budgets: dict[tuple, list] = {}
    for spec in planned(tmp_path, name, preset=preset):
        if spec.task == "cost":
            continue
        model = {k: v for k, v in spec.settings["model"]["init_args"].items() if k not in (*OWN, "detector")}
        data = dict(spec.settings["data"]["init_args"])
        images_per_step = setting(spec.settings, BATCH_OPTION) * setting(spec.settings, ACCUMULATE_OPTION)
        data.pop("batch_size", None)
        if preset == "paper" and spec.task == "classification":  # B had half of the others', as published
            model["optimizer"] = dict(model["optimizer"])
            assert model["optimizer"].pop("scale_lr_to_batch") == 8 * images_per_step
            assert images_per_step == (128 if "efficientvmamba_b" in str(spec.recipe) else 256)
            images_per_step = None
        budget = [setting(spec.settings, option) for option in BUDGET] + [images_per_step, model, data]
        epochs = setting(spec.settings, "trainer.max_epochs") if spec.head == "maskrcnn" and preset == "paper" else None
        budgets.setdefault((spec.task, spec.head, epochs), []).append(budget)
    assert budgets
    for (task, head, _), found in budgets.items():
        assert all(budget == found[0] for budget in found), (task, head)


@pytest.mark.usefixtures("unchecked")
def test_the_papers_suite_has_its_tables(tmp_path: Path):
    specs = planned(tmp_path, "paper", preset="paper")
    trained = [spec for spec in specs if spec.task != "cost"]
    mask = [spec for spec in trained if spec.head == "maskrcnn" and spec.model == "efficientvmamba_t"]
    assert sorted(setting(spec.settings, "trainer.max_epochs") for spec in mask) == [12, 36]
    assert any(spec.model == "efficientvmamba_b-eeee" for spec in trained)  # tables 5 and 8
    assert any(spec.model == "efficientvmamba_t-iiee" for spec in trained)  # table 6
    assert all(setting(spec.settings, "model.init_args.multi_scale") for spec in trained if spec.task == "segmentation")
    # Detectors and segmentors start from a classifier of the same network.
    classified = {spec.model for spec in trained if spec.task == "classification"}
    assert {spec.model for spec in trained} == classified
    # Recipes below the paper's have one schedule only.
    tiny = planned(tmp_path, "paper", preset="tiny", backbones=["efficientvmamba_t"])
    assert [spec.head for spec in tiny if spec.task == "detection"] == ["retinanet", "maskrcnn"]


def test_the_papers_recipes_are_the_default_on_real_data_in_its_suite_only():
    data = {"classification": "/data"}
    assert preset_of(BenchOptions(suite="paper", data=data), "classification") == "paper"
    assert preset_of(BenchOptions(suite="paper", data=data), "detection") == "tiny"
    assert preset_of(BenchOptions(suite="main", data=data), "classification") == "small"
    assert preset_of(BenchOptions(suite="paper", data=data, preset="small"), "classification") == "small"


@pytest.mark.usefixtures("unchecked")
def test_resolution_measures_all_and_trains_one(tmp_path: Path):
    specs = planned(tmp_path, "resolution", overrides=["cost.input_sizes=224,512"])
    assert [spec.timing.input_sizes for spec in specs if spec.task == "cost"] == [(224, 512)] * 8
    (training,) = [spec for spec in specs if spec.task != "cost"]
    assert training.model == "efficientvmamba_t"
    assert max(training.test_scales) > 1 > min(training.test_scales)
    # Backbones named by hand are all trained.
    named = planned(tmp_path, "resolution", backbones=["resnet18", "resnet50"])
    assert [spec.model for spec in named if spec.task == "classification"] == ["resnet18", "resnet50"]


@pytest.mark.usefixtures("unchecked")
def test_a_recipes_stochastic_depth_is_switched_off_only_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("evmamba.launch.bench.plan.has_drop_path", lambda model: model != "efficientvit_b0")
    for preset, expected in (("paper", [True, False]), ("tiny", [False, False])):
        specs = planned(tmp_path, "peers", backbones=["resnet18", "efficientvit_b0"], preset=preset)
        rates = [setting(s.settings, DROP_PATH_OPTION) for s in specs if s.task == "classification"]
        assert [rate > 0 for rate in rates] == expected


def test_without_a_suite_every_model_meets_every_head():
    entries = entries_of(None, ["a", "b"], ("classification", "detection"), {"detection": ["maskrcnn", "retinanet"]})
    assert [(e.model, e.head) for e in entries] == [
        (model, head) for model in "ab" for head in ("linear", "maskrcnn", "retinanet")
    ]


def built_under_every_head(name: str) -> None:
    """A classifier, a detector of each kind and a segmentor take a small image."""
    image = torch.rand(1, 3, 96, 80)
    with torch.no_grad():
        assert build_backbone(name, features_only=False, num_classes=4).eval()(image).shape == (1, 4)
        for head in ("retinanet", "maskrcnn"):
            detector: Any = build_detector(head, name, 3, min_size=(96,), max_size=128, channels=16).eval()
            assert set(detector(list(image))[0]) >= {"boxes", "scores", "labels"}
        segmentor = UPerNet(build_backbone(name, features_only=True), 5, channels=16, aux_channels=8).eval()
        assert segmentor(image).shape == (1, 5, 24, 20)


@pytest.mark.parametrize("name", ["efficientvmamba_t-ss2d", "vim_tiny", "mobilenetv4_conv_small", "efficientvit_b0"])
def test_a_peer_stands_under_every_head(name: str):
    built_under_every_head(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*OURS, *PEERS, *ABLATED, *SUITES["resolution"].models} - {*WITHOUT_PYRAMID}))
def test_every_peer_stands_under_every_head(name: str):
    built_under_every_head(name)


@pytest.mark.slow
def test_the_papers_networks_have_what_its_tables_need():
    for entry in paper_entries():
        build_backbone(entry.model, features_only=entry.task != "classification")

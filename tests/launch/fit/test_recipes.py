"""Recipes are found by the names that people type, in the repository and out of it, and do what their headers say."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from evmamba.errors import UserError
from evmamba.launch.fit.recipes import find_recipe, folder_of, has_drop_path, recipe_of, recipes
from evmamba.tasks import TASKS


@pytest.mark.parametrize(
    "name", ["conf/detection/tiny.yaml", "./conf/detection/tiny.yaml", "detection/tiny.yaml", "detection/tiny"]
)
def test_a_packaged_recipe_has_one_file_under_all_its_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == folder_of(TASKS["detection"]) / "tiny.yaml"


def test_a_file_on_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "detection").mkdir(parents=True)
    own = tmp_path / "conf" / "detection" / "tiny.yaml"
    own.write_text("trainer: {}\n")
    assert find_recipe("conf/detection/tiny.yaml").resolve() == own


def test_the_names_that_are_listed_are_found():
    assert recipes()
    assert all(find_recipe(name).is_file() for name in recipes())


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean conf/segmentation/small\.yaml"):
        find_recipe("conf/segmentation/smal.yaml")


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
    assert recipe_of(task, "paper", head, model).name == name


def test_mask_rcnn_has_two_schedules():
    for schedule in ("1x", "3x"):
        recipe = recipe_of("detection", "paper", "maskrcnn", "efficientvmamba_t", schedule)
        assert recipe.name == f"coco_maskrcnn_{schedule}_efficientvmamba_t.yaml"


def test_a_detector_without_paper_recipe_is_refused():
    with pytest.raises(UserError, match="no paper recipe for detection with fasterrcnn"):
        recipe_of("detection", "paper", "fasterrcnn", "resnet18")


def test_networks_without_stochastic_depth_are_trained_without_it():
    assert has_drop_path("resnet18")
    assert has_drop_path("efficientvmamba_t-ss2d")
    assert not has_drop_path("efficientvit_b0")


def test_a_network_that_cannot_be_built_is_not_taken_for_one_without_stochastic_depth():
    with pytest.raises(UserError, match="unknown backbone 'resnet0'"):
        has_drop_path("resnet0")


PAPERS = [path for task in TASKS.values() for path in sorted(folder_of(task).glob("*_efficientvmamba_?.yaml"))]


def said_here(recipe: Path) -> dict[str, set[float]]:
    """The numbers that the table at a recipe's head says are used here, by its first column."""
    rows = [
        [cell.strip() for cell in line[1:].split("|")]
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ") and line.count("|") >= 2
    ]
    return {
        setting: {float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", source if here == "the same" else here)}
        for setting, source, here, *_ in rows
    }


def used(recipe: dict[str, Any]) -> dict[str, list[Any]]:
    """The same of the recipe itself."""
    trainer, model, data = (recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"])
    optimizer, schedule = model["optimizer"], model["schedule"]
    decay, clip = optimizer["weight_decay"], trainer.get("gradient_clip_val")
    ema = [c["init_args"]["decay"] for c in trainer["callbacks"] if c["class_path"].endswith("WeightEMA")]
    return {
        "learning rate": [optimizer["lr"], *([optimizer["backbone_lr"]] if "backbone_lr" in optimizer else [])],
        "batch": [data["batch_size"]],
        "images": [data["batch_size"]],
        "weight decay": [decay],
        "decay, clip, EMA": [decay, clip, *ema],
        "gradient clip": [clip],
        "weights": ema,
        "schedule": [trainer.get("max_epochs"), schedule.get("warmup_steps")],
        "drops at epochs": schedule.get("milestones", []),
        "warm-up": [schedule.get("warmup_steps") or schedule.get("warmup_epochs")],
        "decline": [schedule.get("min_lr")],
        "drop path": [model.get("drop_path_rate")],
        "drop path, mixup": [model.get("drop_path_rate"), model.get("mixup")],
        "cutmix, erasing": [model.get("cutmix"), data.get("random_erasing")],
        "label smoothing": [model.get("label_smoothing")],
        "multi-scale": [data.get("short_side")],
    }


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.stem)
def test_a_recipe_does_what_the_table_at_its_head_says(recipe: Path):
    said, body = said_here(recipe), used(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    wrong = {
        setting: (said[setting], body[setting])
        for setting in said.keys() & body
        if not {*body[setting]} <= said[setting]
    }
    assert not wrong
    assert len(said.keys() & body) >= 5 or "Why these values: see imagenet_efficientvmamba_t.yaml" in recipe.read_text()


@pytest.mark.parametrize("recipe", [path for path in PAPERS if path.stem[-1] in "sb"], ids=lambda recipe: recipe.stem)
def test_recipes_of_one_head_differ_only_in_what_belongs_to_the_network(recipe: Path):
    own, first = (path.read_text(encoding="utf-8") for path in (recipe, recipe.with_stem(f"{recipe.stem[:-1]}t")))
    if "classification" not in recipe.parts:
        assert [line for line in own.splitlines() if line.startswith("#")] == [
            line for line in first.splitlines() if line.startswith("#")
        ]
    bodies = [yaml.safe_load(text) for text in (own, first)]
    for body in bodies:
        model, data = body["model"]["init_args"], body["data"]["init_args"]
        del model["backbone"]
        model.pop("decoder_channels", None)
        if recipe.stem == "imagenet_efficientvmamba_b":  # half the images at the same learning rate
            del model["optimizer"]["scale_lr_to_batch"], data["batch_size"]
    assert bodies[0] == bodies[1]

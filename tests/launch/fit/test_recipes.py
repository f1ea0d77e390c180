"""Recipes are found by the names that people type, in the repository and out of it."""

from pathlib import Path

import pytest

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

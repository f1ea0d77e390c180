"""Checkpoints of the original in all their shapes, ours, and broken ones."""

import argparse
import logging
from collections import OrderedDict

import pytest
import safetensors
import torch

from evmamba import EfficientVMamba, FeaturePyramid, UserError, load_checkpoint, save_checkpoint

TINY = {"dims": (8, 16, 24, 32), "depths": (2, 1, 2, 1)}


def tiny(num_classes=5, **options) -> EfficientVMamba:
    return EfficientVMamba(**TINY, num_classes=num_classes, **options)


@pytest.fixture
def weights(original_weights):
    """Original names and values for the tiny classifier."""
    return original_weights(tiny())


def assert_loaded(model, weights, original_weights):
    for ours, theirs in model.original_names().items():
        assert torch.equal(model.state_dict()[ours], weights[theirs]), ours


def negated(weights):
    return {name: -value for name, value in weights.items()}


def older(weights):
    """Names of the original's first versions."""
    replaced = {}
    for name, value in weights.items():
        for present, old in (
            ("patch_embed.0.", "patch_embed.proj."),
            ("patch_embed.2.", "patch_embed.norm."),
            (".op.", ".self_attention."),
            ("classifier.norm.", "norm."),
            ("classifier.head.", "head."),
        ):
            name = name.replace(present, old)
        if ".blocks." in name and name.split(".")[4] == "norm":
            name = name.replace(".norm.", ".ln_1.")
        replaced[name] = value
    assert len(replaced) == len(weights)
    return replaced


FORMATS = {
    "top level": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": []}},
    "averaged beside raw": lambda w: {"model": negated(w), "model_ema": w},
    "averaged first": lambda w: {"ema_model": w, "model": negated(w)},
    "averaged and state_dict": lambda w: {"state_dict": negated(w), "model_ema": w},
    "timm's averaged": lambda w: {"state_dict": negated(w), "state_dict_ema": w},
    "empty slots": lambda w: {"state_dict": None, "ema_model": {}, "model_ema": OrderedDict(), "model": w},
    "module.": lambda w: {"model": {f"module.{name}": value for name, value in w.items()}},
    "module.module.": lambda w: {"model_ema": {f"module.module.{name}": value for name, value in w.items()}},
    "older names": lambda w: {"model": older(w)},
    "older names in a wrapper": lambda w: {"model": {f"module.{n}": v for n, v in older(w).items()}},
}


@pytest.mark.parametrize("shape", FORMATS)
def test_formats_of_the_original(tmp_path, weights, original_weights, shape):
    content = FORMATS[shape](weights)
    torch.save(content, tmp_path / "file.pth")
    for source in (content, tmp_path / "file.pth", str(tmp_path / "file.pth")):
        model = tiny()
        load_checkpoint(model, source)
        assert_loaded(model, weights, original_weights)


def test_raw_weights_on_request(weights, original_weights):
    model = tiny()
    loaded = load_checkpoint(model, {"model": weights, "model_ema": negated(weights)}, use_ema=False)
    assert loaded.slot == "model"
    assert_loaded(model, weights, original_weights)
    with pytest.raises(UserError, match=r"averaged weights only.*use_ema=True"):
        load_checkpoint(model, {"model_ema": weights}, use_ema=False)


@pytest.mark.parametrize("original_names", [False, True])
@pytest.mark.parametrize("make", [tiny, lambda: FeaturePyramid(**TINY)], ids=["classifier", "pyramid"])
def test_what_is_saved_loads_again(tmp_path, filled, make, original_names):
    model = filled(make())
    save_checkpoint(model, tmp_path / "w.safetensors", original_names=original_names)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"], "no unfinished file left"
    other = make()
    load_checkpoint(other, tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert '"dims": [8, 16, 24, 32]' in file.metadata()["evmamba"]
        assert any(name.startswith("patch_embed") for name in file.keys()) == original_names  # noqa: SIM118


def test_classifier_into_pyramid_leaves_the_classifier_and_keeps_the_norms(weights, caplog):
    model = FeaturePyramid(**TINY)
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(model, {"model": weights})
    assert {name.split(".")[0] for name in loaded.left_out} == {"head"}
    assert {name.split(".")[0] for name in loaded.kept} == {f"outnorm{i}" for i in range(4)}
    assert len([r for r in caplog.records if "left out" in r.message]) == 1
    assert torch.equal(model.stem.conv.weight, weights["patch_embed.0.weight"])
    assert torch.equal(model.outnorm2.weight, torch.ones(24))


def test_pyramid_of_fewer_levels_takes_what_it_has(weights, original_weights):
    full = original_weights(FeaturePyramid(**TINY))
    model = FeaturePyramid(**TINY, out_indices=(1, 2))
    for source in (weights, full):
        load_checkpoint(model, source)
        assert torch.equal(model.stages[2].blocks[1].project.weight, weights["layers.2.2.conv_pw2.0.weight"])
    assert torch.equal(model.outnorm1.weight, full["outnorm1.weight"])


def test_another_number_of_classes_leaves_the_classifier_once(weights, caplog):
    model = tiny(num_classes=9)
    before = model.head.fc.weight.clone()
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(model, weights)
    assert loaded.left_out == ["head.fc.weight", "head.fc.bias"]
    assert len(caplog.records) == 1
    assert torch.equal(model.head.fc.weight, before)
    assert torch.equal(model.head.norm.weight, weights["classifier.norm.weight"])
    assert load_checkpoint(tiny(num_classes=0), weights).left_out == loaded.left_out


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "detector.backbone.body."])
def test_backbone_inside_a_lightning_checkpoint(tmp_path, filled, prefix):
    pyramid = filled(FeaturePyramid(**TINY))
    state = {prefix + name: value for name, value in pyramid.state_dict().items()}
    state["head.classes.weight"] = torch.zeros(3)
    content = {"state_dict": state, "pytorch-lightning_version": "2.6", "epoch": 1, "hyper_parameters": {"lr": 0.1}}
    torch.save(content, tmp_path / "last.ckpt")
    other = FeaturePyramid(**TINY)
    load_checkpoint(other, tmp_path / "last.ckpt")
    for name, value in pyramid.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_averaged_copy_inside_a_lightning_checkpoint(weights, original_weights):
    state = {f"model.{name}": -value for name, value in weights.items()}
    state |= {f"ema_model.module.{name}": value for name, value in weights.items()}
    model = tiny()
    load_checkpoint(model, {"state_dict": state})
    assert_loaded(model, weights, original_weights)
    load_checkpoint(model, {"state_dict": state}, use_ema=False)
    assert torch.equal(model.stem.conv.weight, -weights["patch_embed.0.weight"])


@pytest.mark.parametrize(("use_ema", "slot"), [(True, "state_dict"), (False, "current_model_state")])
def test_raw_and_averaged_weights_of_lightnings_averaging(weights, original_weights, use_ema, slot):
    content = {name: negated(weights) for name in ("state_dict", "current_model_state")} | {"averaging_state": {}}
    content[slot] = weights
    model = tiny()
    assert load_checkpoint(model, content, use_ema=use_ema).slot == slot
    assert_loaded(model, weights, original_weights)


def test_mismatch_lists_a_few_names_of_each_kind(weights):
    del weights["patch_embed.0.bias"]
    weights["layers.0.blocks.0.surprise.weight"] = torch.zeros(1)
    weights["patch_embed.2.weight"] = torch.zeros(3)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tiny(), weights)
    message = str(caught.value)
    assert "1 missing: stem.conv.bias" in message
    assert "1 unexpected: layers.0.blocks.0.surprise.weight" in message
    assert "1 of another shape: stem.norm.weight [3] (model: [8])" in message


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(weights, number):
    weights["patch_embed.0.bias"] = torch.full_like(weights["patch_embed.0.bias"], number)
    with pytest.raises(UserError, match=r"numbers that are not finite, in 1 tensors: stem\.conv\.bias"):
        load_checkpoint(tiny(), weights)


def test_checkpoint_of_another_size_is_refused_in_one_short_line(weights):
    model = EfficientVMamba(dims=(16, 24, 32, 40), depths=(2, 1, 2, 1), num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_checkpoint(model, weights)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert "of another shape" in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_pyramid_weights_do_not_fit_a_classifier(original_weights):
    with pytest.raises(UserError, match=r"missing: head\.norm\.weight.*unexpected: outnorm0\.weight"):
        load_checkpoint(tiny(), original_weights(FeaturePyramid(**TINY)))


@pytest.mark.parametrize("content", [{}, {"model": None}, {"epoch": 3, "optimizer": {"state": {}}}], ids=str)
def test_no_weights_at_all(content):
    with pytest.raises(UserError, match="has no weights"):
        load_checkpoint(tiny(), content)


def test_foreign_objects_need_trust(tmp_path, weights, original_weights):
    path = tmp_path / "file.pth"
    torch.save({"model": weights, "config": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match="Python objects besides tensors") as caught:
        load_checkpoint(tiny(), path)
    assert "weights_only" not in str(caught.value)  # nobody is told to run what a stranger wrote
    model = tiny()
    load_checkpoint(model, path, weights_only=False)
    assert_loaded(model, weights, original_weights)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_torn_files_are_named_in_one_line(tmp_path, weights, name, part):
    path = tmp_path / name
    if name == "w.safetensors":
        save_checkpoint(tiny(), path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name == "w.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=name) as caught:
        load_checkpoint(tiny(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html></html>", b"version https://git-lfs", b"{}"], ids=str)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*w\.pth") as caught:
        load_checkpoint(tiny(), path)
    assert "weights_only" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path, complaint in ((tmp_path / "none.pth", "no checkpoint file at"), (tmp_path, "evmamba consolidate")):
        with pytest.raises(UserError, match=complaint):
            load_checkpoint(tiny(), path)
    with pytest.raises(UserError, match=r"cannot write .*folder\.safetensors: No such file"):
        save_checkpoint(tiny(), tmp_path / "no" / "folder.safetensors")


def test_file_that_holds_no_mapping(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tiny(), tmp_path / "list.pth")

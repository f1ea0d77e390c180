"""Our networks by name through timm."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from evmamba import UserError, create_model, list_models

NAMES = ["efficientvmamba_b", "efficientvmamba_s", "efficientvmamba_t"]
PEERS = ["vim_tiny", "vmamba_narrow", "vmamba_tiny"]


def test_timm_lists_our_models():
    assert list_models() == [*NAMES, *PEERS]
    assert timm.list_models("efficientvmamba*") == NAMES
    assert set(PEERS) <= set(timm.list_models())


def test_timm_creates_a_classifier():
    model = timm.create_model("efficientvmamba_t", num_classes=7, in_chans=1, drop_path_rate=0.2, drop_rate=0.1)
    assert model(torch.randn(2, 1, 40, 40)).shape == (2, 7)
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.head.drop_rate == 0.1


def test_timm_creates_a_pyramid():
    model = timm.create_model("efficientvmamba_t", features_only=True, out_indices=(1, 3), in_chans=4)
    assert model.feature_info.channels() == [96, 384]
    assert model.feature_info.reduction() == [8, 32]
    assert [tuple(m.shape) for m in model(torch.randn(1, 4, 64, 64))] == [(1, 96, 8, 8), (1, 384, 2, 2)]


def test_timm_knows_the_input():
    config = resolve_model_data_config(timm.create_model("efficientvmamba_s"))
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"
    overlaid = timm.create_model("efficientvmamba_t", pretrained_cfg_overlay={"crop_pct": 1.0})
    assert resolve_model_data_config(overlaid)["crop_pct"] == 1.0


def test_a_network_without_published_weights_says_so():
    with pytest.raises(UserError, match=r"no published weights are known for vmamba_tiny, only for efficientvmamba_t"):
        timm.create_model("vmamba_tiny", pretrained=True)


def test_unknown_options_through_timm_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean drop_path_rate"):
        timm.create_model("efficientvmamba_t", drop_path=0.1)


def test_timm_creates_vmamba_and_its_pyramid():
    model = timm.create_model("vmamba_tiny", num_classes=7, drop_path_rate=0.2)
    assert {block.global_branch.scan for stage in model.stages for block in stage.blocks} == {"ss2d"}
    assert model.get_classifier().out_features == 7
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    pyramid = timm.create_model("vmamba_tiny", features_only=True)
    assert pyramid.feature_info.channels() == [96, 192, 384, 768]


@pytest.mark.parametrize("name", [*NAMES, *PEERS])
def test_timm_finds_the_first_convolution_and_the_classifier_by_their_names(name: str):
    """It needs them for other channels and other classes."""
    model = create_model(name)
    described = get_pretrained_cfg(name)
    assert described.classifier == model.CLASSIFIER
    assert described.first_conv == model.STEMS[0]
    assert isinstance(model.get_submodule(described.classifier), nn.Linear)
    assert model.get_submodule(described.first_conv).in_channels == 3

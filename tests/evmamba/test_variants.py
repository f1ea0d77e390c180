"""Named networks: ours and through timm."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

from evmamba import UserError, create_model, list_models
from evmamba.variants import ABLATIONS, TAGS, split_name

NAMES = ["efficientvmamba_b", "efficientvmamba_s", "efficientvmamba_t"]
PEERS = ["vim_tiny", "vmamba_tiny"]


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


def test_timm_groups_all_parameters_by_depth():
    model = create_model("efficientvmamba_t")
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.stem.conv.weight)] < scale[id(model.stages[0].blocks[0].norm.weight)]
    assert scale[id(model.stages[1].blocks[1].norm.weight)] < scale[id(model.stages[3].blocks[1].expand.weight)]
    assert scale[id(model.head.fc.weight)] == 1.0


def test_pretrained_weights_are_said_to_be_absent():
    with pytest.raises(UserError, match=r"no weights are hosted.*checkpoint_path"):
        timm.create_model("efficientvmamba_t", pretrained=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientvmamba_tt", {}, "unknown model 'efficientvmamba_tt'; did you mean efficientvmamba_t"),
        ("efficientvmamba_t", {"num_clases": 5}, "unknown model option 'num_clases'; did you mean num_classes"),
        ("efficientvmamba_t", {"scan": "esd2d"}, "unknown scan 'esd2d'; did you mean es2d"),
        ("efficientvmamba_t", {"layout": "EIII"}, "unknown layout 'EIII'"),
        ("efficientvmamba_t", {"fusion": "no"}, "unknown fusion 'no'"),
        ("efficientvmamba_t", {"step": 3}, "unknown step '3'"),
        ("efficientvmamba_t-sd2d", {}, "unknown tag of efficientvmamba_t 'sd2d'; did you mean ss2d"),
        ("efficientvmamba_t-eeee-iiee", {}, "sets layout twice"),
        ("efficientvmamba_t-ss2d", {"scan": "ss2d"}, "sets scan already"),
        ("vmamba_tiny-ss2d", {}, "unknown model 'vmamba_tiny-ss2d'; did you mean vmamba_tiny"),
    ],
)
def test_unknown_names_offer_the_nearest(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **options)


def test_unknown_options_through_timm_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean drop_path_rate"):
        timm.create_model("efficientvmamba_t", drop_path=0.1)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"scan": "ss2d"}, 6_493_660), ({"fusion": False}, None), ({"layout": "EEEE"}, None), ({"layout": "IIII"}, None)],
    ids=str,
)
def test_ablations_are_switches_of_the_named_networks(options, parameters):
    model = create_model("efficientvmamba_t", **options)
    count = sum(p.numel() for p in model.parameters())
    assert (count == 6_493_660) == (parameters is not None)


def test_every_switch_that_differs_has_a_tag():
    for switch, (published, *others) in ABLATIONS.items():
        assert [value for name, value in TAGS.values() if name == switch] == others
        assert published not in others
    assert split_name("efficientvmamba_s-nofusion-eeee") == ("efficientvmamba_s", {"fusion": False, "layout": "EEEE"})
    assert split_name("resnet18") == ("resnet18", {})
    assert split_name("some-timm-model") == ("some-timm-model", {})


def test_a_tag_is_the_switch():
    tagged = create_model("efficientvmamba_t-step4-iiee", num_classes=5)
    assert tagged.layout == "IIEE"
    assert {block.global_branch.step for block in tagged.stages[2].blocks} == {4}
    switched = create_model("efficientvmamba_t", num_classes=5, step=4, layout="IIEE")
    assert {k: v.shape for k, v in tagged.state_dict().items()} == {
        k: v.shape for k, v in switched.state_dict().items()
    }
    assert tagged(torch.randn(1, 3, 40, 52)).shape == (1, 5)
    assert tagged.variant == switched.variant == "efficientvmamba_t-iiee-step4"
    assert create_model("efficientvmamba_t").variant == "efficientvmamba_t"
    assert create_model("vim_tiny").variant == "vim_tiny"

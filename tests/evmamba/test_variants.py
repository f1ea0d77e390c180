"""Named networks: ours and through timm."""

import json

import numpy as np
import pytest
import torch
from timm.optim import param_groups_layer_decay

from evmamba import EfficientVMamba, FeaturePyramid, UserError, create_model, load_checkpoint
from evmamba.cost import count_macs
from evmamba.variants import ABLATIONS, TAGS, split_name

NAMES = ["efficientvmamba_b", "efficientvmamba_s", "efficientvmamba_t"]
PEERS = ["vim_tiny", "vmamba_narrow", "vmamba_tiny"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}


def test_timm_groups_all_parameters_by_depth():
    model = create_model("efficientvmamba_t")
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.stem.conv.weight)] < scale[id(model.stages[0].blocks[0].norm.weight)]
    assert scale[id(model.stages[1].blocks[1].norm.weight)] < scale[id(model.stages[3].blocks[1].expand.weight)]
    assert scale[id(model.head.fc.weight)] == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientvmamba_tt", {}, "unknown model 'efficientvmamba_tt'; did you mean efficientvmamba_t"),
        (
            "efficientvmamba_t",
            {"num_clases": 5},
            "unknown option of efficientvmamba_t 'num_clases'; did you mean",
        ),
        ("efficientvmamba_t", {"scan": "esd2d"}, "unknown scan 'esd2d'; did you mean es2d"),
        ("efficientvmamba_t", {"layout": "EIII"}, "unknown layout 'EIII'"),
        ("efficientvmamba_t", {"fusion": "no"}, "unknown fusion 'no'"),
        ("efficientvmamba_t", {"step": 3}, "unknown step '3'"),
        ("efficientvmamba_t-sd2d", {}, "unknown tag of efficientvmamba_t 'sd2d'; did you mean ss2d"),
        ("efficientvmamba_t-eeee-iiee", {}, "sets layout twice"),
        ("efficientvmamba_t-ss2d", {"scan": "ss2d"}, "sets scan already"),
        ("efficientvmamba_t", {"dims": (8, 16)}, "efficientvmamba_t has no dims to choose"),
        ("vmamba_tiny", {"fusion": True}, "vmamba_tiny has no fusion to choose, it is False"),
        ("vmamba_tiny-ss2d", {}, "vmamba_tiny has no scan to choose, it is ss2d"),
        ("vim_tiny-ss2d", {}, "unknown option of vim_tiny 'scan'"),
    ],
)
def test_unknown_names_offer_the_nearest(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **options)


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
    assert tagged.options.layout == "IIEE"
    assert {block.global_branch.step for block in tagged.stages[2].blocks} == {4}
    switched = create_model("efficientvmamba_t", num_classes=5, step=4, layout="IIEE")
    assert {k: v.shape for k, v in tagged.state_dict().items()} == {
        k: v.shape for k, v in switched.state_dict().items()
    }
    assert tagged(torch.randn(1, 3, 40, 52)).shape == (1, 5)
    assert tagged.variant == switched.variant == "efficientvmamba_t-iiee-step4"
    assert create_model("efficientvmamba_t").variant == "efficientvmamba_t"
    assert {name: create_model(name).variant for name in PEERS} == {name: name for name in PEERS}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vmambas_logits_equal_the_original(golden, filled, dtype):
    arrays = golden("logits_vmamba_t_224")
    model = filled(create_model("vmamba_tiny")).eval().to(dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["x"]).to(dtype)).double().numpy()
    assert np.abs(logits - arrays["logits_f64"]).max() <= TOLERANCE[dtype]


def test_vmambas_counts_equal_the_original(golden_folder):
    expected = json.loads((golden_folder / "macs_vmamba_t.json").read_text())
    model = create_model("vmamba_tiny")
    macs = count_macs(model)
    assert macs.paper == expected["exact_total"] == 5_626_902_528
    assert macs.by_op["scan"] == expected["exact_by_op"]["scan"]
    assert sum(p.numel() for p in model.parameters()) == 22_893_448


def test_the_narrowed_vmamba_has_the_counts_that_its_author_told():
    model = create_model("vmamba_narrow")
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_398_920  # 2.399 M
    assert count_macs(model).paper == 868_576_768  # 0.869 G


def test_vmambas_names_and_shapes_equal_the_original(golden_folder):
    schema = json.loads((golden_folder / "schema_vmamba_t.json").read_text())["state_dict"]
    model = create_model("vmamba_tiny")
    names = model.original_names()
    shapes = {names[name]: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {row["key"]: row["shape"] for row in schema}


def test_vmambas_pyramid_reads_a_classifiers_weights(original_weights):
    sizes = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "scan": "ss2d", "fusion": False, "layout": "EEEE"}
    weights = original_weights(EfficientVMamba(**sizes))
    pyramid = FeaturePyramid(**sizes, out_indices=(1, 3))
    loaded = load_checkpoint(pyramid, {"model": weights})
    assert all(name.startswith("head.") for name in loaded.left_out)
    assert all(name.startswith("outnorm") for name in loaded.kept)
    assert [tuple(m.shape) for m in pyramid(torch.randn(1, 3, 72, 40))] == [(1, 16, 9, 5), (1, 32, 3, 2)]
    assert pyramid.feature_info.channels() == [16, 32]


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet"])
def test_segmentation_models_pytorch_builds_on_our_backbone(architecture: str):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = getattr(smp, architecture)("tu-efficientvmamba_t", encoder_weights=None, classes=4)
    assert isinstance(network.encoder.model, FeaturePyramid)
    image = torch.randn(2, 3, 64, 96)
    scores = network(image)
    assert scores.shape == (2, 4, 64, 96)
    scores.square().mean().backward()
    gradients = [p.grad for name, p in network.encoder.named_parameters() if name.endswith("A_logs")]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)

"""The whole network against the original's values, and what its users rely on."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import evmamba
from evmamba import EfficientVMamba, FeaturePyramid, UserError, create_model
from evmamba.checkpoints import original_key_names

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}
TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}


def tiny(**options) -> EfficientVMamba:
    return EfficientVMamba(**TINY, num_classes=5, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["logits_t_224", "logits_t_212x148"])
def test_logits_equal_the_original(golden, filled, case, dtype):
    arrays = golden(case)
    model = filled(create_model("efficientvmamba_t")).eval().to(dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["x"]).to(dtype)).double().numpy()
    assert np.abs(logits - arrays["logits_f64"]).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pyramid_equals_the_original(golden, filled, dtype):
    arrays = golden("backbone_t_224")
    model = filled(create_model("efficientvmamba_t", features_only=True)).eval().to(dtype)
    with torch.no_grad():
        maps = [m.double().numpy() for m in model(torch.from_numpy(arrays["x"]).to(dtype))]
    assert len(maps) == 4
    tolerance = TOLERANCE[dtype]
    for i, level in enumerate(maps):
        assert level.shape == tuple(arrays[f"map{i}_shape"])
        assert np.abs(level.ravel()[:64] - arrays[f"map{i}_first64"]).max() <= tolerance
        assert abs(level.mean() - arrays[f"map{i}_mean"]) <= tolerance
        assert abs(level.std() - arrays[f"map{i}_std"]) <= tolerance
    for i in (2, 3):  # stored in float32
        assert np.abs(maps[i] - arrays[f"map{i}"]).max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "classifier", "pyramid"),
    [
        ("efficientvmamba_t", 6_493_660, 6_109_332),
        ("efficientvmamba_s", 11_273_688, 10_761_584),
        ("efficientvmamba_b", 33_717_136, 32_949_480),
    ],
)
def test_parameters_and_names_equal_the_original(golden_folder, name, classifier, pyramid):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == classifier
    assert sum(p.numel() for p in create_model(name, features_only=True).parameters()) == pyramid
    assert_schema(model, golden_folder / f"schema_{name[-1]}.json")


def test_pyramid_has_the_parameters_of_the_original(golden_folder):
    assert_schema(create_model("efficientvmamba_t", features_only=True), golden_folder / "schema_backbone_t.json")


def assert_schema(model, path):
    expected = {
        row["key"]: (row["shape"], row["dtype"], row["kind"]) for row in json.loads(path.read_text())["state_dict"]
    }
    parameters = dict(model.named_parameters())
    names = original_key_names(model)
    actual = {
        names[name]: (
            list(value.shape),
            str(value.dtype).removeprefix("torch."),
            "parameter" if name in parameters else "buffer",
        )
        for name, value in model.state_dict().items()
    }
    assert actual == expected


def test_float32_gradients_of_the_whole_network_agree_with_float64(filled):
    single = filled(create_model("efficientvmamba_t", num_classes=10, layout="EEII"))
    double = copy.deepcopy(single).double()
    image = torch.randn(2, 3, 76, 68)
    for model in (single, double):
        model.eval()
        model(image.to(next(model.parameters()).dtype)).pow(2).sum().backward()
    for (name, p), q in zip(single.named_parameters(), double.parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (61, 32), (50, 70)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_any_size_from_32(size, training):
    height, width = size
    image = torch.randn(2, 3, height, width, requires_grad=True)
    classifier = tiny().train(training)
    logits = classifier(image)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert torch.isfinite(image.grad).all()
    h, w = height // 4, width // 4
    for level, dim in zip(FeaturePyramid(**TINY).train(training)(image), TINY["dims"], strict=True):
        assert level.shape == (2, dim, h, w)
        h, w = -(-h // 2), -(-w // 2)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (8, 8)], ids=str)
def test_too_small_images_are_refused(size):
    with pytest.raises(UserError, match=r"at least 32x32 pixels, not \d+x\d+"):
        tiny()(torch.randn(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64), (1, 64, 64, 3)], ids=str)
def test_wrong_channels_are_refused(shape):
    with pytest.raises(UserError, match=r"\[B, 3, H, W\].*not a tensor of shape"):
        tiny()(torch.randn(shape))


def test_other_channels_and_no_classifier():
    model = tiny(in_chans=5)
    assert model(torch.randn(2, 5, 40, 40)).shape == (2, 5)
    headless = EfficientVMamba(**TINY, num_classes=0)
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert headless(torch.randn(2, 3, 40, 40)).shape == (2, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"dims": (8, 16)},
        {"depths": (1, 0, 1, 1)},
        {"dims": (4, 8, 16, 32)},
        {"layout": "EEI"},
        {"layout": "EEIX"},
        {"drop_path_rate": 1.0},
        {"in_chans": 0},
        {"num_classes": -1},
        {"global_pool": "max"},
        {"num_classes": 5, "global_pool": ""},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(UserError):
        EfficientVMamba(**{**TINY, **options})


def test_head_takes_the_features_it_is_given():
    model = tiny().eval()
    image = torch.randn(2, 3, 48, 40)
    features = model.forward_features(image)
    assert features.shape == (2, 32, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, model.head.norm(features.permute(0, 2, 3, 1)).mean((1, 2)))
    torch.testing.assert_close(model.forward_head(features), model(image))
    torch.testing.assert_close(model.get_classifier()(pooled), model(image))


def test_classifier_can_be_replaced():
    model = tiny().double()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(torch.randn(1, 3, 40, 40, dtype=torch.float64)).shape == (1, 7)
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 64, 40, dtype=torch.float64)).shape == (1, 32, 2, 2)
    model.reset_classifier(3, "avg")
    assert model(torch.randn(1, 3, 40, 40, dtype=torch.float64)).shape == (1, 3)


def test_intermediates_are_the_stage_outputs():
    model = tiny().eval()
    image = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(image)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4), (2, 32, 2, 2)]
    torch.testing.assert_close(final, model.forward_features(image))
    last_two = model.forward_intermediates(image, 2, intermediates_only=True, output_fmt="NHWC", norm=True)
    torch.testing.assert_close(last_two[0], maps[2].permute(0, 2, 3, 1))
    torch.testing.assert_close(last_two[1], model.head.norm(maps[3].permute(0, 2, 3, 1)))
    early = []
    model.stages[2].register_forward_hook(lambda *_: early.append(1))
    (only,) = model.forward_intermediates(image, [-3], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(only, maps[1])
    assert not early
    with pytest.raises(UserError, match="output_fmt"):
        model.forward_intermediates(image, output_fmt="NLC")


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2, 3), (0, 2), (1,), (-1,), 2], ids=str)
def test_pyramid_returns_the_stages_asked_for(out_indices):
    taken = {2: (2, 3), (-1,): (3,)}.get(out_indices, out_indices)
    model = FeaturePyramid(**TINY, out_indices=out_indices)
    assert model.feature_info.channels() == [TINY["dims"][i] for i in taken]
    assert model.feature_info.reduction() == [4 * 2**i for i in taken]
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()
    sum(m.square().mean() for m in maps).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused, "parameters without gradient stop distributed training"


@pytest.mark.parametrize("out_indices", [(), (0, 4), (1, 1), (-5,)], ids=str)
def test_impossible_levels_are_refused(out_indices):
    with pytest.raises(UserError, match="out_indices"):
        FeaturePyramid(**TINY, out_indices=out_indices)


@pytest.mark.parametrize("layout", ["EEII", "EEEE", "IIEE", "IIII"])
@pytest.mark.parametrize("options", [{}, {"scan": "ss2d"}, {"fusion": False}], ids=str)
def test_ablations_train(layout, options):
    model = tiny(layout=layout, **options)
    kinds = "".join(type(stage.blocks[0]).__name__[0] for stage in model.stages)
    assert kinds == layout
    model(torch.randn(2, 3, 40, 36)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_grows_over_all_blocks():
    model = create_model("efficientvmamba_t", drop_path_rate=0.1)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 10), atol=1e-7)


def test_initialisation_of_linear_layers():
    torch.manual_seed(0)
    linear = create_model("efficientvmamba_t").stages[1].merge.reduction
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not create_model("efficientvmamba_t").head.fc.bias.any()


def test_bfloat16_autocast_stays_near_float32(filled):
    model = filled(create_model("efficientvmamba_t")).eval()
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(image)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 0.02


def test_bfloat16_autocast_trains():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 48, 40)).float().square().sum()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all(), name


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = create_model("efficientvmamba_t", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 48)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), atol=1e-5, rtol=1e-5)


def test_compiled_gradients_agree():
    torch.compiler.reset()
    model = tiny()
    twin = copy.deepcopy(model)
    image = torch.randn(2, 3, 40, 48)
    torch.compile(twin, backend="aot_eager", fullgraph=True)(image).square().sum().backward()
    model(image).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_exports_with_any_batch_size(tmp_path):
    model = create_model("efficientvmamba_t", num_classes=10).eval()
    image = torch.randn(2, 3, 64, 48)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (image,), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "t.pt2")
    loaded = torch.export.load(tmp_path / "t.pt2").module()
    for images in (image, torch.randn(5, 3, 64, 48)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny, lambda: FeaturePyramid(**TINY)], ids=["classifier", "pyramid"])
def test_copies_and_pickles_compute_the_same(make):
    model = make().eval()
    image = torch.randn(1, 3, 40, 40)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        for a, b in zip(other(image), model(image), strict=True):
            assert torch.equal(a, b)


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain = tiny(drop_path_rate=0.3).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    image = torch.randn(4, 3, 64, 64)
    results = []
    for model in (plain, saving):
        torch.manual_seed(3)
        loss = model(image).square().sum()
        loss.backward()
        results.append(loss.item())
    assert results[0] == results[1]
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), f"{name}: statistics must not be updated twice"
    momenta = {m.momentum for m in saving.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_weight_decay_exceptions_are_parameters_of_the_scan():
    model = tiny()
    names = model.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in names} == {"A_logs", "Ds"}
    assert names <= {name for name, _ in model.named_parameters()}


def test_import_is_the_public_surface():
    assert evmamba.__all__ == sorted(evmamba.__all__)
    assert all(hasattr(evmamba, name) for name in evmamba.__all__)

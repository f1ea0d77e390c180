"""The whole network against the original's values, and what its users rely on."""

import copy
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from evmamba import EfficientVMamba, FeaturePyramid, UserError, create_model

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
    names = model.original_names()
    actual = {
        names[name]: (
            list(value.shape),
            str(value.dtype).removeprefix("torch."),
            "parameter" if name in parameters else "buffer",
        )
        for name, value in model.state_dict().items()
    }
    assert actual == expected


def test_float32_gradients_of_the_whole_network_agree_with_float64(filled, monkeypatch):
    # Whether ReLU's gradient at a number next to zero is 0 or 1 hangs on its last bit, which differs among processors.
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
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


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_inductor_trains_and_infers_as_eager_does():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = EfficientVMamba(dims=(8, 16), depths=(1, 1), layout="EI", num_classes=5).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    image, labels = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 3])
    for step in (model, compiled):
        torch.nn.functional.cross_entropy(step(image), labels).backward()
    for (name, expected), parameter in zip(model.named_parameters(), other.parameters(), strict=True):
        error, size = (parameter.grad - expected.grad).abs().max(), expected.grad.abs().max()
        # A bias before BatchNorm has no gradient, only what rounding leaves of it.
        assert error <= 1e-3 * size + 1e-6, (name, error, size)
    for (name, expected), buffer in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda m, n=name: f"{n}: {m}")
    model.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EfficientVMamba, {"num_classes": 5, "layout": "EIIE", "scan": "ss2d", "drop_path_rate": 0.1}),
        (FeaturePyramid, {"out_indices": (1, 3), "fusion": False, "in_chans": 1}),
    ],
)
def test_what_is_saved_comes_back(kind: type, options: dict, tmp_path: Path):
    torch.manual_seed(0)
    model = kind(**TINY, **options).eval()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    again = kind.from_pretrained(tmp_path)
    image = torch.randn(1, options.get("in_chans", 3), 40, 56)
    with torch.no_grad():
        wanted, got = model(image), again(image)
    for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (wanted, got)), strict=True):
        assert torch.equal(a, b)
    assert not again.training
    assert [type(stage.blocks[0]) for stage in again.stages] == [type(stage.blocks[0]) for stage in model.stages]


def test_a_new_classifier_is_saved_as_it_is(tmp_path: Path):
    model = create_model("efficientvmamba_t", num_classes=1000)
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 7
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    again = EfficientVMamba.from_pretrained(tmp_path)
    assert torch.equal(again.head.fc.weight, weights["head.fc.weight"])
    assert len(again.head.fc.weight) == 7


def test_weights_of_another_network_are_refused(tmp_path: Path):
    EfficientVMamba(**TINY, num_classes=5).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        EfficientVMamba.from_pretrained(tmp_path, num_classes=6)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
        EfficientVMamba.from_pretrained(tmp_path, dims=(16, 16, 24, 32), strict=True)

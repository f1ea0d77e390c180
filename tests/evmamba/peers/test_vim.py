"""Vim against its published formulas written plainly, its counts and its names."""

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from evmamba import UserError, create_model, load_checkpoint, save_checkpoint
from evmamba.cost import count_macs
from evmamba.peers.vim import Vim, VimPyramid

TINY = {"dim": 32, "depth": 3, "image_size": 64}


def weights_by_rule(fill, model) -> dict[str, Tensor]:
    return {name: torch.from_numpy(fill.value(name, tuple(v.shape))) for name, v in model.state_dict().items()}


@pytest.fixture
def tiny(fill) -> Vim:
    model = Vim(**TINY, num_classes=5)
    model.load_state_dict(weights_by_rule(fill, model))
    return model.eval()


def one_direction(signal: Tensor, w: dict[str, Tensor], suffix: str) -> Tensor:
    """Mamba's inner function on `[B, D, L]`, first token to last, one token after the other."""
    D, _, taps = w[f"conv1d{suffix}.weight"].shape
    length = signal.shape[2]
    x = F.conv1d(signal, w[f"conv1d{suffix}.weight"], w[f"conv1d{suffix}.bias"], groups=D, padding=taps - 1)
    x = F.silu(x[..., :length])
    A = -torch.exp(w["A_b_log" if suffix else "A_log"])
    N = A.shape[1]
    projected = torch.einsum("bdl,sd->bls", x, w[f"x_proj{suffix}.weight"])
    dt, Bt, Ct = projected.split([projected.shape[2] - 2 * N, N, N], dim=2)
    delta = F.softplus(F.linear(dt, w[f"dt_proj{suffix}.weight"], w[f"dt_proj{suffix}.bias"]))  # [B, L, D]
    h = torch.zeros(len(x), D, N, dtype=x.dtype)
    outputs = []
    for t in range(length):
        u = x[:, :, t]
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u)[:, :, None] * Bt[:, t, None]
        outputs.append((h * Ct[:, t, None]).sum(2) + w[f"D{suffix}"] * u)
    return torch.stack(outputs, dim=2)


def defined(weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """Vim's logits in float64, in the order of the published code: flips, two scans, each with the gate, average."""
    w = {name: value.double() for name, value in weights.items()}
    patches = F.conv2d(image.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    patches = patches.flatten(2).transpose(1, 2)
    middle = patches.shape[1] // 2
    token = w["cls_token"].expand(len(image), -1, -1)
    hidden = torch.cat([patches[:, :middle], token, patches[:, middle:]], 1) + w["pos_embed"]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    for i in range(TINY["depth"]):
        prefix = f"layers.{i}.mixer."
        mixer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        xz = F.linear(rms(hidden, w[f"layers.{i}.norm.weight"]), mixer["in_proj.weight"]).transpose(1, 2)
        x, z = xz.chunk(2, dim=1)
        out = one_direction(x, mixer, "") * F.silu(z)
        back = one_direction(x.flip(2), mixer, "_b") * F.silu(z.flip(2))
        hidden = hidden + F.linear(((out + back.flip(2)) / 2).transpose(1, 2), mixer["out_proj.weight"])
    feature = rms(hidden, w["norm_f.weight"])[:, middle]
    return F.linear(feature, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=str)
def test_logits_equal_the_published_formulas(fill, tiny, dtype, tolerance):
    image = torch.from_numpy(fill.image(31, (2, 3, 64, 64)))
    with torch.no_grad():
        logits = tiny.to(dtype)(image.to(dtype)).double()
        expected = defined(weights_by_rule(fill, tiny), image)
    assert (logits - expected).abs().max() <= tolerance


def test_gradients_reach_every_parameter_and_agree_with_float64(fill, tiny):
    image = torch.from_numpy(fill.image(32, (2, 3, 64, 64)))
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = tiny.to(dtype)
        gradients.append(torch.autograd.grad(model(image.to(dtype)).pow(2).sum(), list(model.parameters())))
    for (name, _), exact, single in zip(tiny.named_parameters(), *gradients, strict=True):
        assert exact.abs().max() > 0, name
        assert (single - exact).norm() / exact.norm() < 1e-4, name


def test_names_and_parameters_equal_the_original(golden_folder):
    schema = json.loads((golden_folder / "schema_vim_ti.json").read_text())
    model = create_model("vim_tiny")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {row["key"]: row["shape"] for row in schema["state_dict"]}
    assert sum(p.numel() for p in model.parameters()) == schema["num_parameters"] == 7_148_008


def test_counts_equal_the_hand_count():
    tokens, dim, inner, state, rank, layers = 197, 192, 384, 16, 12, 24
    expected = {
        "conv_patch": 196 * dim * 3 * 16 * 16,
        "linear": layers * tokens * (dim * 2 * inner + inner * dim) + dim * 1000,
        "conv_depthwise": layers * 2 * tokens * inner * 4,
        "x_proj": layers * 2 * tokens * inner * (rank + 2 * state),
        "dt_proj": layers * 2 * tokens * rank * inner,
        "scan": layers * 2 * (9 * tokens * inner * state + tokens * inner),
    }
    macs = count_macs(create_model("vim_tiny"))
    assert macs.by_op == expected
    assert macs.paper == 1_819_227_648


def test_checkpoints_of_the_original_are_read(fill, tiny, tmp_path):
    weights = weights_by_rule(fill, tiny)
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "vim.pth")
    model = Vim(**TINY, num_classes=5)
    load_checkpoint(model, tmp_path / "vim.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    other_classes = Vim(**TINY, num_classes=9)
    assert load_checkpoint(other_classes, weights).left_out == ["head.weight", "head.bias"]
    pyramid = VimPyramid(**TINY)
    loaded = load_checkpoint(pyramid, weights)
    assert loaded.left_out == ["head.weight", "head.bias"]
    assert loaded.kept
    assert all(name.startswith("up.") for name in loaded.kept)
    with pytest.raises(UserError, match=r"missing: layers\.2\.mixer"):
        load_checkpoint(model, {k: v for k, v in weights.items() if not k.startswith("layers.2.mixer.A_log")})

    save_checkpoint(model, tmp_path / "vim.safetensors", original_names=True)
    again = Vim(**TINY, num_classes=5)
    load_checkpoint(again, tmp_path / "vim.safetensors")
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (70, 45), (33, 100)], ids=str)
def test_the_pyramid_covers_the_image_at_four_strides(size):
    pyramid = VimPyramid(**TINY)
    image = torch.randn(2, 3, *size, requires_grad=True)
    maps = pyramid(image)
    assert [m.shape[1] for m in maps] == pyramid.feature_info.channels() == [8, 16, 32, 32]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    for m, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert m.shape[2:] == tuple(math.ceil(side / stride) for side in size)
    sum(m.pow(2).sum() for m in maps).backward()
    assert torch.isfinite(image.grad).all()


def test_each_map_lies_where_its_part_of_the_image_does(tiny):
    """A change at one end of the image changes the stride-16 map there most, with odd sizes too."""
    pyramid = VimPyramid(**TINY, out_indices=(2,)).eval()
    load_checkpoint(pyramid, tiny.state_dict())
    image = torch.zeros(1, 3, 80, 48)
    changed = image.clone()
    changed[:, :, 64:, 32:] = 1.0
    with torch.no_grad():
        difference = (pyramid(changed)[0] - pyramid(image)[0]).abs().sum(1)[0]
    assert difference.argmax() == difference.numel() - 1


def test_the_position_embedding_is_its_own_at_its_size_and_smooth_elsewhere(tiny):
    with torch.no_grad():
        tiny.pos_embed.copy_(torch.arange(17.0)[None, :, None].expand_as(tiny.pos_embed))
        assert torch.equal(tiny._positions(4, 4), tiny.pos_embed)
        larger = tiny._positions(8, 4)
    assert larger.shape == (1, 33, 32)
    assert torch.equal(larger[:, 16], tiny.pos_embed[:, 8])  # the class token's moves to the new middle
    rows = torch.cat([larger[0, :16, 0], larger[0, 17:, 0]]).view(8, 4).mean(1)
    assert (rows.diff() > 0).all()


def test_recomputed_layers_give_the_same_gradients(tiny):
    image = torch.randn(2, 3, 64, 64)
    tiny.train()
    plain = torch.autograd.grad(tiny(image).sum(), list(tiny.parameters()))
    tiny.set_grad_checkpointing()
    again = torch.autograd.grad(tiny(image).sum(), list(tiny.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_the_sum_of_the_layers_stays_in_float32_under_autocast(tiny):
    kept = []
    for layer in tiny.layers:
        layer.register_forward_hook(lambda module, args, output: kept.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        tiny(torch.randn(1, 3, 64, 64))
    assert set(kept) == {(torch.float32, torch.float32)}


def test_initialisation_follows_mamba():
    torch.manual_seed(0)
    mixer = Vim(**TINY).layers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand_as(mixer.A_log))
    for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):
        steps = F.softplus(dt_proj.bias)
        assert steps.min() >= 1e-3 * 0.999
        assert steps.max() <= 1e-1 * 1.001
    assert not torch.equal(mixer.dt_proj.bias, mixer.dt_proj_b.bias)


def test_timm_creates_it_and_its_pyramid():
    model = timm.create_model("vim_tiny", num_classes=7, drop_path_rate=0.2, drop_rate=0.1)
    assert model.head.out_features == 7
    assert model.layers[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token", "layers.0.mixer.A_b_log"}
    pyramid = timm.create_model("vim_tiny", features_only=True, out_indices=(1, 2))
    assert pyramid.feature_info.channels() == [96, 192]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "ss2d"}, "unknown option of vim_tiny 'scan'"),
        ({"global_pool": ""}, "unknown option of vim_tiny 'global_pool'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"features_only": True, "out_indices": (3, 1)}, "out_indices"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_model("vim_tiny", **options)

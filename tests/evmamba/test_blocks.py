"""Blocks against the original implementation's values and gradients, and what its text promises."""

import math

import pytest
import torch
from torch import nn

from evmamba import blocks
from evmamba.blocks import ES2D, ConvBranch, EVSSBlock, InvertedResidual, PatchMerging, TokenSqueezeExcite
from evmamba.errors import UserError
from evmamba.kernels import Norm
from evmamba.kernels.reference import gather_tokens, merge_tokens
from evmamba.original_names import from_original

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}

EVSS_PREFIX = ("layers.0.blocks.0.", "stages.0.blocks.0.")
INRES_PREFIX = ("layers.2.1.", "stages.2.blocks.0.")
MERGE_PREFIX = ("layers.0.downsample.", "stages.0.merge.")

# Golden file, module, and the place in a network where the original's names of its parameters are translated.
CASES = {
    "ss2d": (lambda: ES2D(24), (EVSS_PREFIX[0] + "op.", EVSS_PREFIX[1] + "global_branch.")),
    "evss_block": (lambda: EVSSBlock(24), EVSS_PREFIX),
    "biattn": (lambda: TokenSqueezeExcite(24), (EVSS_PREFIX[0] + "se.", EVSS_PREFIX[1] + "se.")),
    "inverted_residual": (lambda: InvertedResidual(8), INRES_PREFIX),
    "patch_merging_even": (lambda: PatchMerging(6, 10), MERGE_PREFIX),
}
WITH_BATCH_NORM = ("evss_block", "inverted_residual")
RUNS = [(case, "eval") for case in CASES] + [(case, "train") for case in WITH_BATCH_NORM]


def translated(arrays, kind, prefixes):
    theirs, ours = prefixes
    return {
        from_original(theirs + name.removeprefix(kind)).removeprefix(ours): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(kind)
    }


def assert_near(actual, expected, dtype, what):
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert error <= TOLERANCE[dtype] * scale, f"{what}: {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "mode"), RUNS, ids=lambda value: value)
def test_block_equals_the_original(golden, case, mode, dtype):
    make, prefixes = CASES[case]
    arrays = golden(case)
    module = make().to(dtype).train(mode == "train")
    module.load_state_dict(translated(arrays, "sd_", prefixes))
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    y = module(x)
    loss = (y * torch.from_numpy(arrays["loss_weight"])).sum()
    loss.backward()

    assert y.dtype == dtype
    assert_near(y, torch.from_numpy(arrays[f"{mode}_y"]), dtype, "output")
    assert_near(x.grad, torch.from_numpy(arrays.pop(f"{mode}_grad_x")), dtype, "gradient of x")
    gradients = translated(arrays, f"{mode}_grad_", prefixes)
    parameters = dict(module.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert_near(parameters[name].grad, gradient, dtype, f"gradient of {name}")
    for name, buffer in translated(arrays, f"{mode}_after_", prefixes).items():
        assert_near(module.get_buffer(name), buffer, dtype, f"{name} afterwards")


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7), (1, 1), (3, 3)])
def test_merging_pads_odd_maps_at_the_bottom_and_right(height, width):
    module = PatchMerging(3, 5)
    x = torch.randn(2, height, width, 3)
    padded = torch.zeros(2, height + height % 2, width + width % 2, 3)
    padded[:, :height, :width] = x
    torch.testing.assert_close(module(x), module(padded))
    assert module(x).shape == (2, math.ceil(height / 2), math.ceil(width / 2), 5)


def test_merging_concatenates_the_phases_column_by_column():
    module = PatchMerging(1, 4)
    module.norm = nn.Identity()
    module.reduction = nn.Identity()
    x = torch.arange(4.0).view(1, 2, 2, 1)  # rows (0, 1), (2, 3)
    assert module(x).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]


@pytest.mark.parametrize("scan", ["es2d", "ss2d"])
def test_scan_parameters_start_as_published(scan):
    module = ES2D(48, scan=scan)
    step_size = nn.functional.softplus(module.dt_projs_bias)
    assert step_size.min() >= 1e-3 * 0.999
    assert step_size.max() <= 1e-1 * 1.001
    assert step_size.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.3)
    assert torch.equal(module.A_logs.exp().round(), torch.arange(1.0, 17.0).expand(4 * 96, 16))
    assert torch.equal(module.Ds, torch.ones(4 * 96))
    assert module.x_proj_weight.abs().max().item() == pytest.approx(96**-0.5, rel=1e-2)
    assert module.dt_projs_weight.abs().max().item() == pytest.approx(3**-0.5, rel=1e-2)


def test_fusion_off_leaves_the_scan_alone():
    block = EVSSBlock(16, fusion=False)
    x = torch.randn(2, 5, 6, 16)
    torch.testing.assert_close(block(x), x + block.global_branch(block.norm(x)))
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"norm", "global_branch"}


def test_one_squeeze_excitation_serves_both_branches():
    block = EVSSBlock(16)
    calls = []
    block.se.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(1, 4, 4, 16))
    assert len(calls) == 2


@pytest.mark.parametrize("make", [EVSSBlock, InvertedResidual])
def test_drop_path_drops_whole_samples_and_rescales_the_kept(make):
    block = make(8, drop_path=0.5).eval()
    shape = (64, 4, 4, 8) if make is EVSSBlock else (64, 8, 4, 4)
    x = torch.randn(shape)
    whole = block(x) - x
    block.drop_path.train()
    change = block(x) - x
    kept = change.flatten(1).abs().sum(1) > 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(change[kept], 2 * whole[kept], atol=1e-5, rtol=1e-5)


def test_scan_normalises_in_float32_and_answers_in_the_type_of_its_input():
    module = ES2D(16)
    seen = []
    module.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 6, 6, 16))
    assert seen == [torch.bfloat16]
    half = ES2D(16).to(torch.bfloat16)
    assert half(torch.randn(1, 6, 6, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_unknown_scan_names_the_nearest():
    with pytest.raises(UserError, match="unknown scan 'es2'; did you mean es2d"):
        ES2D(16, scan="es2")


def test_undefined_step_is_refused():
    with pytest.raises(UserError, match="step must be 1 or even, not 3"):
        ES2D(16, step=3)
    with pytest.raises(UserError, match="'ss2d' has no step"):
        ES2D(16, scan="ss2d", step=4)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_steps_differ_in_what_they_compute(step):
    torch.manual_seed(0)
    block, other = ES2D(16, step=step), ES2D(16, step=6)
    assert (block.A_logs.shape == other.A_logs.shape) == (step > 1)
    x = torch.randn(1, 9, 7, 16)
    if step > 1:
        other.load_state_dict(block.state_dict())
        assert not torch.allclose(block(x), other(x), atol=1e-4)
    assert block(x).shape == x.shape


@pytest.mark.parametrize(("scan", "step", "groups"), [("es2d", 1, 1), ("es2d", 2, 4), ("es2d", 4, 16), ("ss2d", 2, 4)])
@pytest.mark.parametrize("size", [(4, 8), (5, 7)], ids=str)
def test_every_pixel_is_in_one_group_or_in_all_four_directions(scan, step, groups, size):
    order = ES2D(8, scan=scan, step=step).token_order(*size)
    assert len(order) == groups
    visits = 4 if scan == "ss2d" else 1
    assert sorted(order[order >= 0].tolist()) == sorted(list(range(size[0] * size[1])) * visits)


@pytest.mark.parametrize(("scan", "step"), [("es2d", 1), ("es2d", 2), ("es2d", 4), ("ss2d", 2)])
@pytest.mark.parametrize("size", [(4, 8), (5, 7)], ids=str)
def test_order_and_step_sizes_are_those_that_the_layer_scans_with(scan, step, size):
    """The recurrence, written over `token_order` and `step_sizes`, gives what the layer's own scan gives."""
    layer = ES2D(16, state_dim=3, scan=scan, step=step).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    signal, _ = layer.signal_and_gate(x)
    order, delta = layer.token_order(*size), layer.step_sizes(signal)
    sets, _, rank = layer.dt_projs_weight.shape
    of_set = torch.arange(len(order)) % sets
    u = gather_tokens(signal, order)
    Bt, Ct = torch.einsum("bkld,ksd->bkls", u, layer.x_proj_weight[of_set, rank:]).chunk(2, dim=-1)
    A = -layer.A_logs.exp().unflatten(0, (sets, -1))[of_set]
    h = torch.zeros(2, *A.shape, dtype=torch.float64)
    outputs = []
    for t in range(order.shape[1]):
        h = (delta[:, :, t, :, None] * A).exp() * h + (delta * u)[:, :, t, :, None] * Bt[:, :, t, None]
        outputs.append((h * Ct[:, :, t, None]).sum(-1))
    y = torch.stack(outputs, 2) + layer.Ds.unflatten(0, (sets, -1))[of_set][:, None] * u
    torch.testing.assert_close(merge_tokens(y, order, *size), layer._scan(signal), rtol=1e-10, atol=1e-10)


@pytest.fixture
def norms_of_kernels(monkeypatch):
    """How a pass does its BatchNorms without PyTorch's: a list that grows of the functions that are given one."""
    pytest.importorskip("numba")
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    found = []

    def watch(name):
        real = getattr(blocks, name)

        def watched(*inputs):
            found.extend([name] * any(isinstance(value, Norm) for value in inputs))
            return real(*inputs)

        monkeypatch.setattr(blocks, name, watched)

    for name in ("depthwise_conv", "folded", "normalise"):
        watch(name)
    return found


@pytest.mark.parametrize("side", [4, 14])
def test_norms_are_part_of_convolutions_whose_weight_is_no_larger_than_the_map(side, norms_of_kernels):
    torch.manual_seed(0)
    block = InvertedResidual(192).eval()
    for norm in (block.expand_norm, block.depthwise_norm, block.project_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 192, side, side).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = block(x)
    # Of 16 or 196 pixels; numbers of a channel's weight: 192 before the expansion, and 768 behind it.
    assert norms_of_kernels == ["normalise" if side == 4 else "folded", "depthwise_conv", "normalise"]
    torch.testing.assert_close(got, block(x).detach(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "becomes", ["as it was", "training", "no statistics", "no parameters", "another norm", "watched", "another type"]
)
@pytest.mark.parametrize("local", [True, False])
def test_norms_that_depend_on_the_batch_or_are_waited_for_stay(becomes, local, norms_of_kernels):
    torch.manual_seed(0)
    block, calls = (ConvBranch(16) if local else InvertedResidual(16)).eval(), []
    name, channels = ("norm", 16) if local else ("depthwise_norm", 64)
    norm = getattr(block, name)
    if becomes == "training":
        norm.train()
    elif becomes == "another norm":
        setattr(block, name, torch.nn.GroupNorm(4, channels))
    elif becomes == "no statistics":
        setattr(block, name, torch.nn.BatchNorm2d(channels, track_running_stats=False).eval())
    elif becomes == "no parameters":
        setattr(block, name, torch.nn.BatchNorm2d(channels, affine=False).eval())
    elif becomes == "watched":
        norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 16, 9, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        if becomes == "another type":
            norm.double()
            with pytest.raises(RuntimeError, match="mixed dtype"):
                block(x)
            return
        got = block(x)
    assert ("depthwise_conv" in norms_of_kernels) == (becomes == "as it was")
    assert len(calls) == (becomes == "watched")
    torch.testing.assert_close(got, block(x).detach(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("becomes", ["watched", "another pool"])
def test_a_pool_that_is_waited_for_or_another_one_is_called(becomes, monkeypatch):
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    block, calls = InvertedResidual(16).eval(), []
    if becomes == "watched":
        block.se.pool.register_forward_hook(lambda *_: calls.append(1))
    else:
        block.se.pool = nn.AdaptiveMaxPool2d(1)
    x = torch.randn(2, 16, 9, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = block(x)
    assert len(calls) == (becomes == "watched")
    torch.testing.assert_close(got, block(x).detach(), atol=2e-6, rtol=0)


def test_a_convolution_of_another_type_is_refused_with_kernels_as_without():
    block, x = InvertedResidual(192).eval(), torch.randn(1, 192, 14, 14)
    block.expand.double()
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises(RuntimeError, match="type"):
            block(x)


def test_a_relu_behind_a_norm_is_not_written_through_a_view():
    y = blocks.normalised(nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 3, 8, requires_grad=True), relu=True)
    assert type(y.grad_fn).__name__ == "PermuteBackward0"


def test_a_linear_layer_put_in_is_taken_as_well(monkeypatch):
    block, calls, real = ES2D(32).eval(), [], blocks.norm_linear
    block.out_proj = nn.Linear(64, 32, bias=False)
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)
    monkeypatch.setattr(blocks, "has_kernels", lambda *_: True)
    monkeypatch.setattr(blocks, "convolved_scan", lambda signal, *_: signal)
    monkeypatch.setattr(blocks, "norm_linear", lambda *given: calls.append(1) or real(*given))
    block(torch.randn(1, 4, 4, 32))
    assert calls == [1]

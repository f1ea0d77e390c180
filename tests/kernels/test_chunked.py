"""The PyTorch backend against the float64 definition: every shape class, type and gradient."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import chunked, reference

NAMES = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
SHAPES = {  # B, H, W, D, N, R
    "even": (2, 8, 6, 6, 16, 2),
    "odd": (2, 7, 5, 8, 4, 1),
    "odd columns": (1, 6, 13, 3, 5, 2),
    "one row": (2, 1, 37, 4, 8, 1),
    "one column": (1, 34, 1, 4, 1, 3),
    "one pixel": (3, 1, 1, 5, 3, 1),
    "one channel": (1, 5, 4, 1, 64, 1),
    "prime": (1, 11, 17, 7, 16, 3),
    "one chunk": (1, 8, 8, 4, 2, 1),
    "one token over": (1, 2, 34, 4, 2, 1),
    "empty batch": (0, 4, 5, 4, 2, 1),
}


def run(inputs, pattern):
    """The backend's map, and its gradients for a gradient of the map drawn from a fixed seed."""
    y, states = chunked.forward(*inputs, pattern, save=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, dy, chunked.backward(dy, *inputs, states, pattern)


def define(inputs, dy, pattern):
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    y = reference.scan(*inputs, pattern)
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_map_and_gradients_equal_the_definition(
    make_inputs, assert_close, map_tolerance, gradient_tolerance, shape, pattern, dtype
):
    inputs = make_inputs(*shape, dtype)
    y, dy, gradients = run(inputs, pattern)
    y_defined, gradients_defined = define(inputs, dy, pattern)

    assert_close(y, y_defined, map_tolerance[dtype])
    for gradient, defined in zip(gradients, gradients_defined, strict=True):
        assert_close(gradient, defined, gradient_tolerance[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_half_types_lose_only_the_rounding_of_their_gradients(
    make_inputs, assert_close, map_tolerance, gradient_tolerance, pattern, dtype
):
    inputs = make_inputs(2, 7, 10, 16, 16, 2, dtype)
    y, dy, gradients = run(inputs, pattern)
    y_defined, gradients_defined = define(inputs, dy, pattern)

    assert y.dtype == torch.float32
    assert_close(y, y_defined, map_tolerance[dtype])
    for gradient, defined in zip(gradients, gradients_defined, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, defined, gradient_tolerance[dtype])


@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_blocks_of_the_batch_do_not_change_the_result(make_inputs, monkeypatch, assert_close, pattern):
    inputs = make_inputs(5, 5, 6, 6, 4, 2, torch.float64)
    y, _, gradients = run(inputs, pattern)
    monkeypatch.setattr(chunked, "BLOCK", 2 * 4 * 6 * 4)  # two of five batch elements
    y_blocks, _, gradients_blocks = run(inputs, pattern)

    assert_close(y_blocks, y, 1e-14)
    for gradient, expected in zip(gradients_blocks, gradients, strict=True):
        assert_close(gradient, expected, 1e-13)


def test_non_contiguous_inputs_give_the_same_result(make_inputs, assert_close):
    inputs = make_inputs(2, 5, 6, 8, 4, 2, torch.float64)
    strided = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs]
    strided[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y, dy, gradients = run(inputs, "es2d")
    y_strided, states = chunked.forward(*strided, "es2d", save=True)
    dy_strided = dy.transpose(1, 2).contiguous().transpose(1, 2)

    assert_close(y_strided, y, 1e-14)
    for gradient, expected in zip(chunked.backward(dy_strided, *strided, states, "es2d"), gradients, strict=True):
        assert_close(gradient, expected, 1e-14)


def test_repeats_bit_for_bit(make_inputs):
    inputs = make_inputs(3, 9, 9, 16, 16, 2)
    y, _, gradients = run(inputs, "ss2d")
    y_again, _, gradients_again = run(inputs, "ss2d")
    assert torch.equal(y, y_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize(("bias", "A_log"), [(60.0, 4.0), (-120.0, 0.0), (3.0, -30.0)], ids=["forget", "skip", "keep"])
def test_extreme_decays_neither_overflow_nor_drift(make_inputs, assert_close, bias, A_log):
    inputs = make_inputs(1, 10, 10, 4, 4, 1)
    inputs[3].fill_(bias)
    inputs[4].fill_(A_log)
    y, dy, gradients = run(inputs, "es2d")
    y_defined, gradients_defined = define(inputs, dy, "es2d")

    assert_close(y, y_defined, 1e-5)
    for gradient, defined in zip(gradients, gradients_defined, strict=True):
        assert gradient.isfinite().all()
        scale = max(defined.abs().max().item(), 1e-30)  # gradients that vanish in float32 may
        assert (gradient.double() - defined).abs().max().item() <= 1e-5 * scale + 1e-30


@pytest.mark.parametrize("i", range(6), ids=NAMES)
def test_a_gradient_alone_is_the_same_and_the_others_are_left_out(make_inputs, i):
    inputs = make_inputs(2, 5, 6, 6, 4, 2)
    y, states = chunked.forward(*inputs, "es2d", save=True)
    every = chunked.backward(y, *inputs, states, "es2d")
    only = chunked.backward(y, *inputs, states, "es2d", [j == i for j in range(6)])
    assert torch.equal(only[i], every[i])
    assert [j for j, gradient in enumerate(only) if gradient is not None] == [i]


def test_without_save_the_map_is_the_same_and_nothing_is_kept(make_inputs):
    inputs = make_inputs(2, 6, 7, 8, 4, 2)
    y, _ = chunked.forward(*inputs, "es2d", save=True)
    y_inference, states = chunked.forward(*inputs, "es2d", save=False)
    assert torch.equal(y, y_inference)
    assert states.numel() == 0


def test_saves_one_state_every_16_tokens_at_most(make_inputs):
    inputs = make_inputs(2, 20, 31, 8, 4, 2)
    _, states = chunked.forward(*inputs, "es2d", save=True)
    tokens = 10 * 16
    assert states.shape == chunked.states_shape(2, 20, 31, 8, 4, "es2d")
    assert states.numel() == tokens // 16 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=str)
def test_softplus_is_exact_for_steps_of_any_size(dtype, tolerance):
    v = torch.linspace(-80, 80, 10_001, dtype=dtype)
    exact = F.softplus(v.double(), threshold=100)
    torch.testing.assert_close(chunked._softplus(v).double(), exact, rtol=100 * tolerance, atol=0)
    near = v.abs() < 15
    torch.testing.assert_close(chunked._softplus(v)[near].double(), exact[near], rtol=tolerance, atol=0)

"""The PyTorch backend against the float64 definition: every shape class, type and gradient."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import chunked

from .backend_checks import EXTREMES, SHAPES, check, check_alone, check_extreme, check_strided, run


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_map_and_gradients_equal_the_definition(make_inputs, shape, pattern, dtype):
    check(chunked, make_inputs(*shape, dtype), pattern)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_half_types_lose_only_the_rounding_of_their_gradients(make_inputs, pattern, dtype):
    check(chunked, make_inputs(2, 7, 10, 16, 16, 2, dtype), pattern)


@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_blocks_of_the_batch_do_not_change_the_result(make_inputs, monkeypatch, assert_close, pattern):
    inputs = make_inputs(5, 5, 6, 6, 4, 2, torch.float64)
    y, _, gradients = run(chunked, inputs, pattern)
    monkeypatch.setattr(chunked, "BLOCK", 2 * 4 * 6 * 4)  # two of five batch elements
    y_blocks, _, gradients_blocks = run(chunked, inputs, pattern)

    assert_close(y_blocks, y, 1e-14)
    for gradient, expected in zip(gradients_blocks, gradients, strict=True):
        assert_close(gradient, expected, 1e-13)


def test_non_contiguous_inputs_give_the_same_result(make_inputs):
    check_strided(chunked, make_inputs(2, 5, 6, 8, 4, 2, torch.float64), 1e-14)


def test_repeats_bit_for_bit(make_inputs):
    inputs = make_inputs(3, 9, 9, 16, 16, 2)
    y, _, gradients = run(chunked, inputs, "ss2d")
    y_again, _, gradients_again = run(chunked, inputs, "ss2d")
    assert torch.equal(y, y_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize(("bias", "A_log"), EXTREMES.values(), ids=EXTREMES)
def test_extreme_decays_neither_overflow_nor_drift(make_inputs, bias, A_log):
    check_extreme(chunked, make_inputs(1, 10, 10, 4, 4, 1), bias, A_log)


@pytest.mark.parametrize("i", range(6))
def test_a_gradient_alone_is_the_same_and_the_others_are_left_out(make_inputs, i):
    check_alone(chunked, make_inputs(2, 5, 6, 6, 4, 2), i)


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

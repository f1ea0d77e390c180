"""The compiled CPU backend against the float64 definition: every shape class, order, type and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evmamba.kernels import chunked, reference
from evmamba.kernels.paths import PATTERNS

numba_es2d = pytest.importorskip("evmamba.kernels.numba_es2d", reason="needs numba")

SHAPES = {  # B, H, W, D, N, R
    "even": (2, 8, 6, 16, 16, 2),
    "odd": (2, 7, 5, 8, 4, 1),
    "odd columns": (1, 6, 13, 3, 5, 2),
    "one row": (2, 1, 37, 4, 8, 1),
    "one column": (1, 34, 1, 4, 1, 3),
    "one pixel": (3, 1, 1, 5, 3, 1),
    "one channel": (1, 5, 4, 1, 64, 1),
    "prime": (1, 11, 17, 7, 16, 3),
    "channels beyond a vector": (1, 5, 4, 17, 16, 3),
    "several blocks of channels": (1, 6, 5, 96, 16, 6),
    "states and rank beyond a vector": (1, 5, 4, 8, 33, 18),
    "one chunk": (1, 8, 8, 4, 2, 1),
    "one token over": (1, 2, 34, 4, 2, 1),
    "empty batch": (0, 4, 5, 4, 2, 1),
}


def fit(inputs, pattern):
    """The inputs, with as many sets of parameters as the pattern has."""
    x, x_proj, dt_proj, bias, A_logs, Ds = inputs
    K, D = PATTERNS[pattern].sets, x.shape[3]
    return [x, x_proj[:K], dt_proj[:K], bias[:K], A_logs[: K * D], Ds[: K * D]]


def run(inputs, pattern):
    """The backend's map, and its gradients for a gradient of the map drawn from a fixed seed."""
    y, states = numba_es2d.forward(*inputs, pattern, save=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, dy, numba_es2d.backward(dy, *inputs, states, pattern)


def define(inputs, dy, pattern):
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    y = reference.scan(*inputs, pattern)
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_map_and_gradients_equal_the_definition(
    make_inputs, assert_close, map_tolerance, gradient_tolerance, shape, pattern, dtype
):
    inputs = fit(make_inputs(*shape, dtype), pattern)
    y, dy, gradients = run(inputs, pattern)
    y_defined, gradients_defined = define(inputs, dy, pattern)

    assert_close(y, y_defined, map_tolerance[dtype])
    for tensor, gradient, defined in zip(inputs, gradients, gradients_defined, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.is_contiguous()
        assert_close(gradient, defined, gradient_tolerance[dtype])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 12),
    W=st.integers(1, 12),
    D=st.integers(1, 50),
    N=st.integers(1, 20),
    R=st.integers(1, 20),
    pattern=st.sampled_from(sorted(PATTERNS)),
    bias=st.floats(-6, 3),
    scale=st.floats(0.1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_definition(B, H, W, D, N, R, pattern, bias, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    K = PATTERNS[pattern].sets

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [
        scale * normal(B, H, W, D),
        normal(K, R + 2 * N, D) / D**0.5,
        normal(K, D, R) / R**0.5 / scale,  # beyond 20 the definition's own softplus is rounded
        normal(K, D) + bias,
        normal(K * D, N),
        normal(K * D),
    ]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        typed = [tensor.to(dtype) for tensor in inputs]
        y, dy, gradients = run(typed, pattern)
        y_defined, gradients_defined = define(typed, dy, pattern)
        for actual, defined in zip((y, *gradients), (y_defined, *gradients_defined), strict=True):
            error = (actual.double() - defined).abs().max().item()
            assert error <= tolerance * max(defined.abs().max().item(), scale)


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


@pytest.mark.parametrize("shape", [(1, 20, 21, 40, 16, 3), (5, 9, 9, 96, 16, 6)], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_any_number_of_threads_gives_the_same_bits(make_inputs, pattern, shape):
    inputs = make_inputs(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            y, _, gradients = run(inputs, pattern)
            results.append((y, *gradients))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("D", [16, 12])
def test_strided_inputs_give_the_same_bits(make_inputs, D):
    inputs = make_inputs(2, 5, 6, D, 4, 2)
    strided = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs]
    strided[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y, dy, gradients = run(inputs, "es2d")
    y_strided, states = numba_es2d.forward(*strided, "es2d", save=True)
    dy_strided = dy.transpose(1, 2).contiguous().transpose(1, 2)

    assert torch.equal(y_strided, y)
    for gradient, expected in zip(numba_es2d.backward(dy_strided, *strided, states, "es2d"), gradients, strict=True):
        assert torch.equal(gradient, expected)


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


@pytest.mark.parametrize("argument", range(6))
def test_what_is_not_a_number_shows(make_inputs, argument):
    inputs = make_inputs(1, 4, 4, 8, 4, 2)
    inputs[argument].view(-1)[0] = float("nan")
    assert numba_es2d.forward(*inputs, "es2d", save=False)[0].isnan().any()


def test_states_are_those_of_the_pytorch_backend(make_inputs, assert_close):
    for D in (16, 6):
        inputs = make_inputs(2, 9, 12, D, 4, 2, torch.float64)
        y, states = numba_es2d.forward(*inputs, "es2d", save=True)
        y_inference, nothing = numba_es2d.forward(*inputs, "es2d", save=False)
        _, expected = chunked.forward(*inputs, "es2d", save=True)
        assert torch.equal(y, y_inference)
        assert nothing.numel() == 0
        assert_close(states, expected, 1e-13)


def test_states_of_another_map_are_refused(make_inputs):
    inputs = make_inputs(1, 8, 8, 16, 4, 2)
    y, states = numba_es2d.forward(*inputs, "es2d", save=True)
    with pytest.raises(ValueError, match="states must be"):
        numba_es2d.backward(y, *inputs, states[:, :, :1], "es2d")


@pytest.mark.parametrize("i", range(6))
def test_a_gradient_alone_is_the_same_and_the_others_are_left_out(make_inputs, i):
    inputs = make_inputs(2, 5, 6, 6, 4, 2)
    y, states = numba_es2d.forward(*inputs, "es2d", save=True)
    every = numba_es2d.backward(y, *inputs, states, "es2d")
    only = numba_es2d.backward(y, *inputs, states, "es2d", [j == i for j in range(6)])
    assert torch.equal(only[i], every[i])
    assert [j for j, gradient in enumerate(only) if gradient is not None] == [i]

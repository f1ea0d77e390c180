"""The compiled CPU backend against the float64 definition: every shape class, order, type and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evmamba.kernels import pattern_scan
from evmamba.kernels.paths import PATTERNS

from .backend_checks import SHAPES, check, check_strided, define, run

numba_es2d = pytest.importorskip("evmamba.kernels.numba_es2d", reason="needs numba")

CASES = SHAPES | {
    "whole vectors": (2, 8, 6, 16, 16, 2),
    "channels beyond a vector": (1, 5, 4, 17, 16, 3),
    "several blocks of channels": (1, 6, 5, 96, 16, 6),
    "states and rank beyond a vector": (1, 5, 4, 8, 33, 18),
}


def fit(inputs, pattern):
    """The inputs, with as many sets of parameters as the pattern has."""
    x, x_proj, dt_proj, bias, A_logs, Ds = inputs
    K, D = PATTERNS[pattern].sets, x.shape[3]
    return [x, x_proj[:K], dt_proj[:K], bias[:K], A_logs[: K * D], Ds[: K * D]]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_map_and_gradients_equal_the_definition(make_inputs, shape, pattern, dtype):
    check(numba_es2d, fit(make_inputs(*shape, dtype), pattern), pattern)


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
        y, dy, gradients = run(numba_es2d, typed, pattern)
        y_defined, gradients_defined = define(typed, dy, pattern)
        for actual, defined in zip((y, *gradients), (y_defined, *gradients_defined), strict=True):
            error = (actual.double() - defined).abs().max().item()
            assert error <= tolerance * max(defined.abs().max().item(), scale)


@pytest.mark.parametrize("shape", [(1, 20, 21, 40, 16, 3), (5, 9, 9, 96, 16, 6)], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_any_number_of_threads_gives_the_same_bits(make_inputs, pattern, shape):
    inputs = make_inputs(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            y, _, gradients = run(numba_es2d, inputs, pattern)
            results.append((y, *gradients))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("D", [16, 12])
def test_strided_inputs_give_the_same_bits(make_inputs, D):
    check_strided(numba_es2d, make_inputs(2, 5, 6, D, 4, 2), 0.0)


@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
@torch.no_grad()
def test_a_scan_is_memory_of_its_own_that_can_be_changed_in_place(pattern, make_inputs):
    y = pattern_scan(*make_inputs(1, 6, 8, 16, 4, 2), pattern)
    assert y.untyped_storage().nbytes() == 4 * y.numel()
    with torch.enable_grad():
        y.mul_(torch.ones(16, requires_grad=True))

"""The Triton scans against the float64 definition, over shapes, types and all gradients.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import os

import numpy as np
import pytest
import torch

from evmamba.kernels import reference
from evmamba.kernels.paths import PATTERNS, scan_paths

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
if INTERPRETED or torch.cuda.is_available():
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from evmamba.kernels import triton_backward, triton_es2d
    from evmamba.kernels.tuning import Tuning

    from . import scan_cases
    from .scan_cases import relative_error

# Error relative to the definition's norm. dx is rounded twice to x's type, and the interpreter truncates to bfloat16.
Y_TOLERANCE = {torch.float32: 1e-6 if INTERPRETED else 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_TOLERANCE = {
    torch.float32: 1e-6 if INTERPRETED else 1e-5,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-10,
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def on_test_device(tensor):
    return tensor.to(DEVICE)


def make_inputs(*size_and_pattern, dtype=torch.float32):
    *size, pattern = size_and_pattern
    return [t.to(DEVICE) for t in scan_cases.make_inputs(tuple(size), pattern, dtype)]


def check(size, pattern, dtype=torch.float32, steps="ordinary", tuning=None):
    errors = scan_cases.errors(size, pattern, dtype, steps, on_test_device, tuning)
    assert errors.pop("y") < Y_TOLERANCE[dtype]
    assert all(error < GRADIENT_TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize(
    "shape",
    # B, H, W, D, N, R
    [
        pytest.param((1, 1, 1, 8, 16, 1), id="one pixel"),
        pytest.param((2, 1, 9, 8, 2, 2), id="one row"),
        pytest.param((1, 5, 1, 8, 2, 2), id="one column"),
        pytest.param((1, 4, 4, 8, 2, 1), id="even"),
        pytest.param((1, 7, 5, 8, 4, 3), id="prime"),
        pytest.param((1, 3, 3, 40, 4, 3), id="D not a multiple of a warp"),
        pytest.param((1, 3, 3, 64, 4, 4), id="two channel blocks"),
        pytest.param((1, 3, 2, 96, 4, 3), id="three channel blocks"),
        pytest.param((1, 3, 3, 8, 2, 18), id="rank beyond the registers"),
    ],
)
def test_es2d_equals_the_definition(shape):
    check(shape, "es2d")


@pytest.mark.parametrize("N", [1, 5, 8, 32, 64])
def test_any_number_of_states(N):
    check((1, 1, 3, 8, N, 2), "forward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_lose_no_more_than_rounding(dtype):
    check((1, 3, 5, 8, 2, 2), "es2d", dtype)


@pytest.mark.parametrize("pattern", ["ss2d", "forward", "reverse"])
def test_other_patterns_equal_the_definition(pattern):
    check((1, 3, 5, 8, 2, 2), pattern)


def matrix_product_of_a_warp(even, odd, select_even, select_odd, sums):
    """mma.sync.m16n8k8 for the interpreter, by the PTX manual's layout of its operands over the lanes."""
    values = [t.handle.data for t in (*even, *odd, select_even, select_odd, *sums)]
    lane = np.arange(32)
    row, column = lane // 4, lane % 4
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    a[row, column], a[row + 8, column], a[row, column + 4], a[row + 8, column + 4] = values[:4]
    b[column, row], b[column + 4, row] = values[4:6]
    places = [(row, 2 * column), (row, 2 * column + 1), (row + 8, 2 * column), (row + 8, 2 * column + 1)]
    for place, value in zip(places, values[6:], strict=True):
        c[place] = value
    d = (a @ b + c).astype(np.float32)
    return tl.tuple([tl.tensor(TensorHandle(d[p], tl.float32), sums[0].type) for p in places])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the instruction itself")
@pytest.mark.parametrize("shape", [(1, 7, 5, 8, 4, 3), (1, 3, 3, 40, 4, 1)], ids=str)
def test_sums_over_channels_on_tensor_cores_equal_the_definition(shape, monkeypatch):
    monkeypatch.setattr(triton_backward, "add_lanes", matrix_product_of_a_warp)
    check(shape, "es2d", tuning=Tuning(tensor_cores=True))


@pytest.mark.parametrize("pattern", ["forward", "reverse"])
def test_segments_equal_one_long_scan(pattern):
    short = Tuning(shortest_segment=16)
    assert triton_es2d.plan(1, 8, 39, 1, short).segments == 3
    check((1, 1, 39, 8, 2, 1), pattern, tuning=short)


def test_weight_gradient_of_few_splits():
    check((1, 1, 150, 8, 2, 1), "forward", tuning=Tuning(weight_gradient_splits=1))


@pytest.mark.parametrize("steps", ["small", "large"])
def test_step_sizes_as_networks_have_them(steps):
    check((1, 3, 5, 8, 4, 2), "es2d", steps=steps)


def test_projection_weights_are_rounded_to_the_maps_type():
    # float16: the interpreter truncates to bfloat16, which would be another weight.
    check((1, 3, 5, 8, 2, 2), "es2d", torch.float16, steps="unrounded")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7), (6, 4)], ids=str)
def test_table_holds_the_paths_and_padding_to_read_ahead(size, pattern):
    paths = scan_paths(*size, pattern)
    table = triton_es2d.path_table(*size, pattern, torch.device(DEVICE), 48).cpu()
    assert torch.equal(table[:-1, : paths.shape[1]], paths)
    assert (table[:-1, paths.shape[1] :] == -1).all()
    assert (table[-1] == -1).all()


def test_plan_cuts_long_and_few_sequences_only():
    # T stage 1: 768 programs of a batch of 64 fill a GPU, as the simulation of its schedulers says.
    assert triton_es2d.plan(64, 96, 784, 4, Tuning()).segments == 1
    assert triton_es2d.plan(32, 96, 784, 4, Tuning()).segments > 1
    assert triton_es2d.plan(128, 96, 784, 4, Tuning()).segments == 1
    detection = triton_es2d.plan(2, 96, 100 * 167, 4, Tuning())
    assert detection.tokens % triton_es2d.CHECKPOINT == 0
    assert 1000 <= 2 * 4 * 3 * detection.segments <= 3000


@pytest.mark.skipif(not INTERPRETED, reason="tensor cores round too: tf32")
def test_dx_comes_from_the_weights_that_the_forward_multiplied_by():
    dtype = torch.float16  # the interpreter truncates to bfloat16
    x, *parameters = scan_cases.make_inputs((1, 3, 5, 8, 2, 2), "es2d", dtype, "small")
    call = triton_es2d._prepare(x, *parameters, "es2d", Tuning())
    K, M, N, R = 4, call.product.M, 2, 2
    dproj = torch.randn(1, K, M, 8, generator=torch.Generator().manual_seed(1))
    dx = triton_es2d._input_gradient(call, dproj.view(1, K * M, 8), torch.zeros(1, *x.shape))
    # Columns of dproj: B and C in pairs, then the rank.
    d_bc, d_low = dproj[0, ..., : 2 * N].unflatten(-1, (N, 2)), dproj[0, ..., 2 * N : 2 * N + R]
    columns = torch.cat([d_low, d_bc[..., 0], d_bc[..., 1]], dim=-1)
    rounded = parameters[0].to(dtype).float()
    paths = scan_paths(3, 5, "es2d")
    L = paths.shape[1]
    expected = reference.merge_tokens((columns[:, :L] @ rounded)[None], paths, 3, 5)
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=1e-6)


def test_state_survives_a_long_sequence():
    inputs = make_inputs(1, 1, 150, 8, 2, 1, "forward")
    expected = reference.scan(*(t.double().cpu() for t in inputs), "forward")
    y, _ = triton_es2d.forward(*inputs, "forward", save=False)
    assert relative_error(y, expected) < Y_TOLERANCE[torch.float32]


def test_non_contiguous_map_and_gradient():
    x, *parameters = make_inputs(1, 4, 3, 8, 2, 2, "es2d")
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    y, states = triton_es2d.forward(x, *parameters, "es2d", save=True)
    assert torch.equal(triton_es2d.forward(strided, *parameters, "es2d", save=False)[0], y)
    dy = torch.randn_like(strided)
    gradients = triton_es2d.backward(dy, strided, *parameters, states, "es2d")
    for got, wanted in zip(
        gradients, triton_es2d.backward(dy.contiguous(), x, *parameters, states, "es2d"), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("chosen", [(0,), (1,), (2, 4), (3, 5)], ids=str)
def test_some_gradients_alone_are_the_same(chosen):
    inputs = make_inputs(1, 3, 3, 8, 2, 2, "es2d")
    y, states = triton_es2d.forward(*inputs, "es2d", save=True)
    every = triton_es2d.backward(y, *inputs, states, "es2d")
    some = triton_es2d.backward(y, *inputs, states, "es2d", [i in chosen for i in range(6)])
    assert [i for i, gradient in enumerate(some) if gradient is not None] == list(chosen)
    assert all(torch.equal(some[i], every[i]) for i in chosen)


def test_empty_batch_has_zero_gradients():
    inputs = make_inputs(0, 4, 4, 8, 4, 2, "es2d")
    y, states = triton_es2d.forward(*inputs, "es2d", save=True)
    assert y.shape == (0, 4, 4, 8)
    gradients = triton_es2d.backward(y, *inputs, states, "es2d")
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    assert all((g == 0).all() for g in gradients)


def test_float64_is_refused():
    inputs = make_inputs(1, 2, 2, 8, 4, 2, "es2d")
    with pytest.raises(TypeError, match="float32"):
        triton_es2d.forward(inputs[0].double(), *inputs[1:], "es2d", save=False)


def test_large_step_sizes_do_not_overflow():
    inputs = make_inputs(1, 3, 3, 8, 4, 2, "es2d")
    inputs[3] = inputs[3] + 90  # softplus(90) = 90, exp(90) is beyond float32
    expected = reference.scan(*(t.double().cpu() for t in inputs), "es2d")
    assert relative_error(triton_es2d.forward(*inputs, "es2d", save=False)[0], expected) < 1e-5


def test_autograd_through_the_public_op(monkeypatch):
    from evmamba.kernels import es2d_scan

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    inputs = [t.requires_grad_() for t in make_inputs(1, 3, 3, 8, 4, 2, "es2d")]
    es2d_scan(*inputs).square().sum().backward()
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    reference.scan(*exact, "es2d").square().sum().backward()
    assert all(relative_error(t.grad, e.grad) < 1e-5 for t, e in zip(inputs, exact, strict=True))


@pytest.mark.parametrize("pattern", ["es2d", "forward"])
def test_gradients_lie_as_torch_compile_expects_them(pattern):
    inputs = make_inputs(1, 3, 3, 8, 4, 2, pattern)
    y, states = triton_es2d.forward(*inputs, pattern, save=True)
    gradients = triton_es2d.backward(torch.ones_like(y), *inputs, states, pattern)
    assert [g.stride() for g in gradients] == [t.stride() for t in inputs]
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


@pytest.mark.parametrize("pattern", ["es2d", "forward"])
def test_operators_keep_the_rules_of_torch_library(monkeypatch, pattern):
    from evmamba.kernels import ops

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    inputs = make_inputs(1, 3, 2, 8, 2, 1, pattern)
    torch.library.opcheck(ops.scan2d, (*inputs, pattern))
    torch.library.opcheck(ops.scan2d_train, (*(t.requires_grad_() for t in inputs), pattern))


def test_autocast_leaves_the_scan_in_float32_and_gradients_in_their_types(monkeypatch):
    from evmamba.kernels import es2d_scan

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    inputs = [t.requires_grad_() for t in make_inputs(1, 3, 3, 8, 4, 2, "es2d", dtype=torch.float16)]
    inputs[1:] = [t.detach().float().requires_grad_() for t in inputs[1:]]
    with torch.autocast(DEVICE, torch.float16):
        y = es2d_scan(*inputs)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    expected = reference.scan(*exact, "es2d")
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < Y_TOLERANCE[torch.float16]
    assert [g.dtype for g in gradients] == [torch.float16, *[torch.float32] * 5]
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    errors = [relative_error(g, w) for g, w in zip(gradients, wanted, strict=True)]
    assert all(error < GRADIENT_TOLERANCE[torch.float16] for error in errors), errors

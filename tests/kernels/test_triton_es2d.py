"""The Triton scans against the float64 definition, over shapes, types and all gradients."""

import pytest
import torch

from evmamba.kernels import reference

from .triton_runs import DEVICE, GRADIENT_TOLERANCE, MARKS, RUNNABLE, Y_TOLERANCE, check, make_inputs

if RUNNABLE:
    from evmamba.kernels import triton_es2d
    from evmamba.kernels.tuning import Tuning

    from .scan_cases import relative_error

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_lose_no_more_than_rounding(dtype):
    check((1, 3, 5, 8, 2, 2), "es2d", dtype)


@pytest.mark.parametrize("pattern", ["ss2d", "forward", "reverse"])
def test_other_patterns_equal_the_definition(pattern):
    check((1, 3, 5, 8, 2, 2), pattern)


def test_plan_cuts_long_and_few_sequences_only():
    # T stage 1: 768 programs of a batch of 64 fill a GPU, as the simulation of its schedulers says.
    assert triton_es2d.plan(64, 96, 784, 4, Tuning()).segments == 1
    assert triton_es2d.plan(32, 96, 784, 4, Tuning()).segments > 1
    assert triton_es2d.plan(128, 96, 784, 4, Tuning()).segments == 1
    detection = triton_es2d.plan(2, 96, 100 * 167, 4, Tuning())
    assert detection.tokens % triton_es2d.CHECKPOINT == 0
    assert 1000 <= 2 * 4 * 3 * detection.segments <= 3000


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

"""BatchNorm, its activation and the layer behind them against PyTorch in float64.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch
import torch.nn.functional as F

from .triton_runs import DEVICE, INTERPRETED, MARKS, on_test_device

pytestmark = MARKS
# The interpreter truncates to bfloat16 where hardware rounds.
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(poisoned_memory, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")


def check(size, dtype, activation, *, gated, mean=1.0, limit=3e-6):
    from .batch_norm_cases import ROUNDED, errors

    found = errors(size, dtype, activation, on_test_device, gated=gated, mean=mean)
    limits = {name: LIMIT[dtype] if name in ROUNDED else limit for name in found}
    assert {name: error for name, error in found.items() if not error < limits[name]} == {}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norm_and_activation_equal_pytorch(activation, dtype):
    check((3, 3, 5, 12), dtype, activation, gated=activation == "relu")


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((3, 1, 2, 8), id="one row"),
        pytest.param((1, 2, 3, 96), id="three blocks of channels"),
        pytest.param((2, 17, 16, 40), id="several programs an image"),
    ],
)
def test_any_size(size):
    check(size, torch.float32, "relu", gated=True)


def test_programs_walk_over_several_tiles_and_their_statistics_are_weighted(monkeypatch):
    from evmamba.kernels import triton_batch_norm
    from evmamba.kernels.tuning import Tuning

    monkeypatch.setattr(triton_batch_norm, "tuning_of", lambda device: Tuning(row_programs=3))
    monkeypatch.setattr(triton_batch_norm, "PARTS", 2)
    check((3, 11, 9, 16), torch.float32, "gelu", gated=False)  # five tiles, the last with 41 of 64 rows


def test_a_mean_far_from_zero_costs_the_variance_no_digits():
    from .batch_norm_cases import errors

    found = errors((4, 9, 9, 8), torch.float32, "gelu", on_test_device, gated=False, mean=1000.0)
    assert found["rstd"] < 1e-5  # the mean of the squares less the square of the mean: 1e-2


def layers(C, squeezed, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((2, 3, 4, C), (C,), (C,), (5, C), (5,), (squeezed, C), (squeezed,), (C, squeezed), (C,))
    x, *rest = (torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes)
    return [t.requires_grad_() for t in (x.to(dtype), *rest)]


def through(x, function, *arguments):
    from evmamba.kernels import batch_statistics

    moving = torch.zeros(x.shape[-1], device=DEVICE), torch.ones(x.shape[-1], device=DEVICE)
    return function(x, batch_statistics(x.detach(), *moving, 0.1, 1e-5), *arguments)


@pytest.mark.parametrize("squeezed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_layer_behind_it_equals_pytorch_and_the_input_alone_is_kept(squeezed, dtype):
    from evmamba.kernels import batch_norm_linear

    from .batch_norm_cases import normalised
    from .scan_cases import relative_error

    x, weight, bias, projection, shift, *squeeze = inputs = layers(8, 3, dtype)
    if not squeezed:
        inputs, squeeze = inputs[:5], None
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = through(x, batch_norm_linear, weight, bias, "gelu", projection, shift, squeeze and tuple(squeeze))
    saved = [t for t in out.grad_fn.saved_tensors if t is not None and t.dim() == 4]
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    dout = torch.randn(out.shape, device=DEVICE).to(dtype)
    gradients = torch.autograd.grad(out, inputs, dout)

    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    a = normalised(*exact[:3], "gelu")
    if squeezed:
        w1, b1, w2, b2 = exact[5:]
        a = a * F.linear(F.relu(F.linear(a.mean((1, 2), keepdim=True), w1, b1)), w2, b2).sigmoid()
    expected = F.linear(a, *exact[3:5])
    wanted = torch.autograd.grad(expected, exact, dout.double().cpu())
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in inputs]
    errors = [
        relative_error(d, e) for d, e in zip((out.detach(), *gradients), (expected.detach(), *wanted), strict=True)
    ]
    assert max(errors) < {torch.float32: 3e-6, torch.float16: 2**-8}[dtype], errors


def test_depthwise_convolution_behind_it_equals_pytorch_and_the_input_alone_is_kept():
    from evmamba.kernels import batch_norm_depthwise

    from .batch_norm_cases import normalised
    from .scan_cases import relative_error

    x, weight, bias, *_ = layers(8, 3, torch.float32)
    kernel = torch.randn(8, 1, 3, 3, device=DEVICE).requires_grad_()
    inputs = (x, weight, bias, kernel)
    out = through(x, batch_norm_depthwise, weight, bias, "relu", kernel)
    saved = [t for t in out.grad_fn.saved_tensors if t.shape == x.shape]
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    active = normalised(*exact[:3], "relu").permute(0, 3, 1, 2)
    expected = F.conv2d(active, exact[3], padding=1, groups=8).permute(0, 2, 3, 1)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    errors = [
        relative_error(d, e) for d, e in zip((out.detach(), *gradients), (expected.detach(), *wanted), strict=True)
    ]
    assert max(errors) < 3e-6, errors


def test_operators_follow_the_library_rules():
    from evmamba.kernels import batch_norm

    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    x, weight, bias, projection, shift, *squeeze = layers(8, 3, torch.float32)
    stats = torch.stack((torch.zeros(8), torch.ones(8))).to(DEVICE)
    norm, nothing = (x, stats, weight, bias), (None,) * 4
    plain = [t.detach() for t in norm]
    kernel = torch.randn(8, 1, 3, 3, device=DEVICE, requires_grad=True)
    means = torch.randn(2, 8, device=DEVICE)
    check = torch.library.opcheck
    check(
        batch_norm.batch_statistics, (plain[0], torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE), 0.1, 1e-5)
    )
    check(batch_norm.fused_batch_norm_linear, (*norm, *squeeze, projection, None, "relu"))
    check(batch_norm.fused_batch_norm_linear, (*norm, *nothing, projection, shift, "gelu"))
    check(batch_norm.fused_batch_norm_depthwise, (*norm, kernel, "relu"))
    without_gradient = (
        (batch_norm.batch_norm_act, (*plain, "relu")),
        (batch_norm.gate_gradient, (plain[0], *plain, "relu")),
        (batch_norm.batch_norm_act_backward, (plain[0], *plain, means, means, "relu", True)),
        (batch_norm.batch_norm_act_backward, (plain[0], *plain, None, None, "relu", False)),
    )
    for operator, arguments in without_gradient:
        check(operator, arguments, test_utils=("test_schema", "test_faketensor"))

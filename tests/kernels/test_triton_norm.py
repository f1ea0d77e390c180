"""The fused LayerNorm and gate against PyTorch in float64.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch
import torch.nn.functional as F

from .triton_runs import DEVICE, INTERPRETED, MARKS

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]
# The interpreter truncates to bfloat16 where hardware rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 96), (1, 1, 1, 8), (700, 40)], ids=str)
def test_norm_and_gate_equal_pytorch(shape, dtype, monkeypatch):
    from evmamba.kernels.gated_norm import norm_gate

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    torch.manual_seed(0)
    D = shape[-1]
    y = (3 + 2 * torch.randn(shape, device=DEVICE)).requires_grad_()
    projected = torch.randn(*shape[:-1], 2 * D, device=DEVICE).to(dtype).requires_grad_()
    z = projected.chunk(2, dim=-1)[1]
    weight, bias = (torch.randn(D, device=DEVICE).requires_grad_() for _ in range(2))
    out = norm_gate(y, z, weight, bias)
    dout = torch.randn(shape, device=DEVICE).to(dtype)
    out.backward(dout)

    exact = [t.detach().double().cpu().requires_grad_() for t in (y, projected, weight, bias)]
    expected = F.layer_norm(exact[0], (D,), exact[2], exact[3]) * F.silu(exact[1].chunk(2, dim=-1)[1])
    expected.backward(dout.double().cpu())

    def error(value, wanted):
        return ((value.double().cpu() - wanted).norm() / wanted.norm()).item()

    assert out.dtype == dtype
    assert error(out, expected) < TOLERANCE[dtype]
    for got, wanted in zip((y, projected, weight, bias), exact, strict=True):
        assert error(got.grad, wanted.grad) < TOLERANCE[got.dtype], got.shape


@pytest.mark.parametrize(("given", "wanted"), [("float32", "float16"), ("float16", "float32")])
def test_layer_norm_alone_equals_pytorch(given, wanted, monkeypatch):
    from evmamba.kernels import layer_norm

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(7, 40, device=DEVICE)).to(getattr(torch, given)).requires_grad_()
    weight, bias = (torch.randn(40, device=DEVICE).requires_grad_() for _ in range(2))
    out = layer_norm(x, weight, bias, dtype=getattr(torch, wanted))
    dout = torch.randn(7, 40, device=DEVICE).to(out.dtype)
    out.backward(dout)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(exact[0], (40,), exact[1], exact[2])
    expected.backward(dout.double().cpu())
    assert (out.dtype, x.grad.dtype) == (getattr(torch, wanted), getattr(torch, given))
    for got, want in zip((out, x.grad, weight.grad, bias.grad), (expected, *(e.grad for e in exact)), strict=True):
        assert ((got.double().cpu() - want).norm() / want.norm()).item() < TOLERANCE[got.dtype], got.shape


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norm_and_linear_layer_equal_pytorch_and_keep_no_normalised_map(gated, dtype, monkeypatch):
    from evmamba.kernels import norm_linear

    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")
    torch.manual_seed(0)
    y = (3 + 2 * torch.randn(2, 3, 5, 24, device=DEVICE)).requires_grad_()
    z = torch.randn(2, 3, 5, 48, device=DEVICE).to(dtype).chunk(2, dim=-1)[1].requires_grad_() if gated else None
    weight, bias, projection = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((24,), (24,), (7, 24)))
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = norm_linear(y, z, weight, bias, projection)
    saved = [t for t in out.grad_fn.saved_tensors if t is not None and t.dim() == 4]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (y, z) if t is not None]
    dout = torch.randn(2, 3, 5, 7, device=DEVICE).to(dtype)
    inputs = [t for t in (y, z, weight, bias, projection) if t is not None]
    gradients = torch.autograd.grad(out, inputs, dout)

    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    n = F.layer_norm(exact[0], (24,), *exact[-3:-1]) * (F.silu(exact[1]) if gated else 1)
    expected = F.linear(n, exact[-1])
    expected.backward(dout.double().cpu())
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in inputs]
    limit = {torch.float32: 2e-6, torch.float16: 2**-9}[dtype]
    for got, wanted in zip((out.detach(), *gradients), (expected.detach(), *(e.grad for e in exact)), strict=True):
        assert ((got.double().cpu() - wanted).norm() / wanted.norm()).item() < limit, got.shape


def test_programs_of_the_backward_walk_over_several_tiles(monkeypatch):
    from evmamba.kernels import triton_norm
    from evmamba.kernels.tuning import Tuning

    monkeypatch.setattr(triton_norm, "tuning_of", lambda device: Tuning(row_programs=2))
    test_norm_and_gate_equal_pytorch((700, 40), torch.float32, monkeypatch)


def test_operator_follows_the_library_rules():
    from evmamba.kernels.gated_norm import fused_layer_norm, fused_norm_gate, fused_norm_linear

    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    y, z = (torch.randn(2, 3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.library.opcheck(fused_norm_gate, (y, z, weight, bias, 1e-5))
    projection = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(fused_norm_linear, (y, z, weight, bias, projection, 1e-5))
    torch.library.opcheck(fused_norm_linear, (y, None, weight, bias, projection, 1e-5))
    torch.library.opcheck(fused_layer_norm, (y, weight, bias, 1e-5, torch.float16))


def test_empty_map():
    from evmamba.kernels import triton_norm

    y = torch.empty(0, 4, 4, 8, device=DEVICE)
    weight = torch.ones(8, device=DEVICE)
    assert triton_norm.forward(y, y, weight, weight, 1e-5).shape == y.shape
    assert all((t == 0).all() for t in triton_norm.backward(y, y, y, weight, weight, 1e-5)[2:])

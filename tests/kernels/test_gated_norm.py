"""LayerNorm and gate on any device, and the scan of sequences: the public functions without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import layer_norm, norm_gate, norm_linear, reference, selective_scan_1d


def test_norm_gate_is_layer_norm_times_silu():
    y, projected = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    z = projected[..., 8:]
    inputs = [t.requires_grad_() for t in (y, z, weight, bias)]
    torch.testing.assert_close(norm_gate(*inputs), F.layer_norm(y, (8,), weight, bias) * F.silu(z))
    assert torch.autograd.gradcheck(norm_gate, inputs)


def test_norm_gate_normalises_in_float32_and_returns_the_gates_type():
    y = 100 + torch.randn(4, 8)
    z, weight, bias = torch.randn(4, 8).bfloat16(), torch.randn(8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm_gate(y, z, weight, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.layer_norm(y, (8,), weight, bias).bfloat16() * F.silu(z))


def test_layer_norm_normalises_in_float32_and_returns_the_wanted_type():
    x, weight, bias = (100 + torch.randn(4, 8)).bfloat16(), torch.randn(8), torch.randn(8)
    expected = F.layer_norm(x.float(), (8,), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_norm(x, weight, bias, dtype=torch.float32), expected)
        assert torch.equal(layer_norm(x, weight, bias), expected.bfloat16())


def test_norm_linear_is_a_norm_and_a_linear_layer():
    y, z, weight, bias, projection = inputs = [torch.randn(shape) for shape in ((4, 8), (4, 8), (8,), (8,), (3, 8))]
    assert torch.equal(norm_linear(*inputs), F.linear(norm_gate(y, z, weight, bias), projection))
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(layer_norm(y, weight, bias).bfloat16(), projection.bfloat16())
        assert torch.equal(norm_linear(y, None, weight, bias, projection), expected)


def test_norm_gate_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        norm_gate(torch.ones(2, 8), torch.ones(2, 4), torch.ones(8), torch.ones(8))


@pytest.mark.parametrize("reverse", [False, True])
def test_sequence_scan_equals_a_loop(reverse):
    generator = torch.Generator().manual_seed(0)
    B, L, D, N, R = 2, 7, 4, 3, 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, x_proj, dt_proj, bias, A_log, skip = inputs = [
        t.requires_grad_()
        for t in (normal(B, L, D), normal(R + 2 * N, D), normal(D, R), normal(D), 0.3 * normal(D, N), normal(D))
    ]
    y = selective_scan_1d(*inputs, reverse=reverse)
    low, Bt, Ct = (x @ x_proj.T).split([R, N, N], dim=-1)
    delta = F.softplus(low @ dt_proj.T + bias)
    h, outputs = x.new_zeros(B, D, N), [x.new_zeros(B, D)] * L
    for t in reversed(range(L)) if reverse else range(L):
        h = torch.exp(-delta[:, t, :, None] * A_log.exp()) * h + (delta[:, t] * x[:, t])[..., None] * Bt[:, t, None]
        outputs[t] = (h * Ct[:, t, None]).sum(-1) + skip * x[:, t]
    expected = torch.stack(outputs, dim=1)
    torch.testing.assert_close(y, expected)
    assert y.dtype == reference.scan_type(x)
    dy = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(got, wanted)


def test_sequence_scan_refuses_maps():
    with pytest.raises(ValueError, match=r"x must be \[B, L, D\]"):
        selective_scan_1d(torch.ones(1, 2, 2, 4), *[torch.ones(1)] * 5)

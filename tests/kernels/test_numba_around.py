"""When the compiled CPU backend takes what is around a scan, and that it is handed it right."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")

from torch.utils.flop_counter import FlopCounterMode

from evmamba import create_model, fuse
from evmamba.kernels import depthwise_conv, has_kernels, layer_norm, norm_gate, numba_around


@pytest.fixture(autouse=True)
def chosen_freely(monkeypatch):
    monkeypatch.delenv("EVMAMBA_BACKEND", raising=False)


def test_only_float32_without_gradients_outside_autocast_and_of_fitting_channels_is_taken(monkeypatch):
    x = torch.ones(1, 2, 2, 16)
    assert not has_kernels(x)
    with torch.no_grad():
        assert has_kernels(x)
        assert has_kernels(x, 32)
        assert not has_kernels(x, 24)
        assert not has_kernels(x.double())
        assert not has_kernels(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not has_kernels(x)
        with FlopCounterMode(display=False):
            assert not has_kernels(x)
        monkeypatch.setenv("EVMAMBA_BACKEND", "torch")
        assert not has_kernels(x)


@torch.no_grad()
def test_maps_of_any_strides_and_widths_are_those_of_pytorch():
    x, weight, bias = torch.randn(2, 24, 5, 6).permute(0, 2, 3, 1), torch.randn(24, 1, 3, 3), torch.randn(24)
    wide = torch.randn(2, 5, 6, 64)
    layouts = [
        x,
        x[..., :16],
        wide[..., 16:48],
        wide[:, ::2, :, :32],
        wide[:, :, 1:3, :32],
        wide[..., ::2],
    ]
    for t in layouts:
        C = t.shape[-1]
        w, b = weight[:1].repeat(C, 1, 1, 1), bias[:1].repeat(C)
        convolved = F.conv2d(t.permute(0, 3, 1, 2), w, b, padding=1, groups=C).permute(0, 2, 3, 1)
        normed = F.layer_norm(t, (C,), b, b)
        torch.testing.assert_close(depthwise_conv(t, w, b, "gelu"), F.gelu(convolved), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer_norm(t, b, b), normed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm_gate(t, t, b, b), normed * F.silu(t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_network_computes_what_its_modules_do_whatever_the_threads(fused, monkeypatch):
    torch.manual_seed(0)
    model, image = create_model("efficientvmamba_t", num_classes=10).eval(), torch.rand(2, 3, 52, 68)
    network, threads, logits, calls = fuse(model) if fused else model, torch.get_num_threads(), [], []
    real = numba_around.norm
    monkeypatch.setattr(numba_around, "norm", lambda *inputs: calls.append(1) or real(*inputs))
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        logits.append(network(image))
    torch.set_num_threads(threads)
    assert len(calls) == 3 * (1 + 2 * 4 + 3 + 1)  # stem, blocks and their scans, mergings, head
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with torch.enable_grad():
        expected = model(image)
    assert len(calls) == 39
    torch.testing.assert_close(logits[0], expected.detach(), atol=5e-6, rtol=0)


@torch.no_grad()
def test_gates_and_branches_of_a_half_type_are_read_as_what_they_are():
    y, z, weight, bias = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(16), torch.randn(16)
    out = norm_gate(y, z, weight, bias)
    assert out.dtype == torch.bfloat16
    expected = F.layer_norm(y, (16,), weight, bias) * F.silu(z.float())
    torch.testing.assert_close(out, expected.bfloat16(), atol=0, rtol=2**-7)
    gate = (weight, bias, torch.randn(4, 16), torch.randn(4), torch.randn(16, 4), torch.randn(16), None, 1e-5)
    got, wanted = (numba_around.squeeze_excite_add(y, t, t, *gate) for t in (z, z.float()))
    assert all(map(torch.equal, got, wanted))

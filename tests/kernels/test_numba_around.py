"""When the compiled CPU backend takes what is around a scan, and that it is handed it right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("numba")

from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import FlopCounterMode

from evmamba import create_model, fuse
from evmamba.blocks import EVSSBlock
from evmamba.kernels import (
    depthwise,
    depthwise_conv,
    es2d_scan,
    gated_norm,
    has_kernels,
    layer_norm,
    norm_gate,
    numba_around,
    ops,
    squeeze_and_excite,
    squeeze_excite,
)
from evmamba.kernels.ops import cpu_kernels


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


@torch.no_grad()
def test_a_gate_that_is_one_pixel_for_all_counts():
    y, weight, bias = torch.randn(1, 4, 4, 16), torch.randn(16), torch.randn(16)
    gate = torch.randn(16).expand(1, 4, 4, 16)
    assert torch.equal(norm_gate(y, gate, weight, bias), norm_gate(y, gate.contiguous(), weight, bias))


def operators_seen(function):
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("evmamba::")}


@torch.no_grad()
def test_operators_are_left_out_unless_somebody_watches(monkeypatch):
    torch.manual_seed(0)
    block, x, called = EVSSBlock(16).eval(), torch.randn(1, 6, 6, 16), []
    names = ["scan2d", "depthwise_conv", "norm_gate", "layer_norm", "squeeze_excite_add"]
    seen = operators_seen(lambda: block(x))
    assert seen == {f"evmamba::{name}" for name in names}

    for module, name in (
        (ops, "scan2d"),
        (depthwise, "fused_depthwise_conv"),
        (gated_norm, "fused_norm_gate"),
        (gated_norm, "fused_layer_norm"),
        (squeeze_excite, "fused_squeeze_excite_add"),
    ):
        operator = getattr(module, name)
        watched = lambda *inputs, operator=operator, name=name: called.append(name) or operator(*inputs)  # noqa: E731
        monkeypatch.setattr(module, name, watched)
    expected, fused = block(x), fuse(block)
    expected_fused = fused(x)
    assert called == []
    with DeviceContext(torch.device("cpu")):  # a mode that sees functions of PyTorch
        watched = block(x)
        assert len(called) == 6  # both branches convolve
        assert torch.equal(fused(x), expected_fused)
    # A BatchNorm that the kernel does is in the weight of the operator's convolution.
    torch.testing.assert_close(watched, expected, atol=1e-6, rtol=0)


def test_tangents_pass_a_layer_without_gradients():
    x, tangent, weight, bias = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(16), torch.randn(16)
    expected = torch.func.jvp(lambda v: F.layer_norm(v, (16,), weight, bias), (x,), (tangent,))[1]
    with torch.no_grad():
        got = torch.func.jvp(lambda v: layer_norm(v, weight, bias), (x,), (tangent,))[1]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [torch._neg_view, lambda t: t.as_subclass(Labelled)])
@torch.no_grad()
def test_a_scan_of_other_tensors_is_that_of_their_numbers(kind, make_inputs):
    inputs = make_inputs(1, 6, 5, 16, 4, 2)
    for i, value in enumerate(inputs):
        given = kind(value)
        y = es2d_scan(*inputs[:i], given, *inputs[i + 1 :])
        numbers = given.as_subclass(torch.Tensor).resolve_neg()
        assert torch.equal(y.as_subclass(torch.Tensor), es2d_scan(*inputs[:i], numbers, *inputs[i + 1 :]))


@torch.no_grad()
def test_wrong_shapes_are_refused_before_memory_is_read():
    x, weight, short = torch.randn(1, 4, 4, 16), torch.randn(16), torch.randn(8)
    for given in ((short, weight), (weight, short)):
        with pytest.raises(ValueError, match=r"weight and bias must be \[16\]"):
            layer_norm(x, *given)
    with pytest.raises(ValueError, match=r"bias must be \[16\]"):
        depthwise_conv(x, torch.randn(16, 1, 3, 3), short)
    for wrong in range(4):
        squeeze = [torch.randn(4, 16, 1, 1), torch.randn(4), torch.randn(16, 4, 1, 1), torch.randn(16)]
        squeeze[wrong] = squeeze[wrong][:, :3] if wrong % 2 == 0 else squeeze[wrong][:3]
        with pytest.raises(ValueError, match=r"w1, b1, w2 and b2 must be \[S, 16, 1, 1\], \[S\]"):
            squeeze_and_excite(x, *squeeze)
    gate = [weight, weight, torch.randn(4, 16), torch.randn(4), torch.randn(16, 4), weight]
    squeeze_excite.squeeze_excite_add(x, x, x, *gate)
    with pytest.raises(ValueError, match="one shape"):
        squeeze_excite.squeeze_excite_add(x, x, x[:, :2], *gate)
    for i in range(len(gate)):
        with pytest.raises(ValueError, match="16 channels"):
            squeeze_excite.squeeze_excite_add(x, x, x, *gate[:i], torch.randn(3), *gate[i + 1 :])


class Labelled(torch.Tensor):
    """A tensor with something of its own, as torchvision's images are."""


@torch.no_grad()
def test_what_is_no_plain_tensor_of_the_cpu_never_reaches_the_kernels():
    x, weight = torch.randn(1, 4, 4, 16), torch.randn(16)
    assert cpu_kernels(x, 16, weight, None) is numba_around
    assert cpu_kernels(x, 16, nn.Parameter(weight)) is numba_around
    assert cpu_kernels(x, 8, weight) is None
    assert cpu_kernels(x.double(), 16, weight) is None
    for other in (weight.to("meta"), weight.to_sparse(), weight.as_subclass(Labelled)):
        assert cpu_kernels(x, 16, other) is None
    for other in (torch._neg_view(weight), torch._efficientzerotensor(16)):
        assert cpu_kernels(x, 16, other) is None
    assert cpu_kernels(torch._neg_view(x), 16, weight) is None
    with torch.enable_grad():
        assert cpu_kernels(x, 16, weight) is None
    with forward_ad.dual_level():
        assert cpu_kernels(x, 16, weight) is None
    assert torch.vmap(lambda v: torch.tensor(cpu_kernels(v, 16, weight) is None))(x).all()

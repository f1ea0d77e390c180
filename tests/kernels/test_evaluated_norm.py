"""BatchNorm in evaluation on any device: folded, behind a depthwise convolution, alone."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import Norm, depthwise_conv, folded, normalise


def make_norm(channels: int, dtype: torch.dtype = torch.float32) -> Norm:
    generator = torch.Generator().manual_seed(0)
    mean, weight, bias = torch.randn(3, channels, generator=generator, dtype=dtype)
    return Norm(mean, torch.rand(channels, generator=generator, dtype=dtype) + 0.1, weight, bias, 1e-3)


def maps(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_convolution_is_the_two_after_another(bias):
    norm, x, weight = make_norm(6, torch.float64), torch.randn(2, 3, 7, 5).double(), torch.randn(6, 3, 3, 3).double()
    given = torch.randn(6).double() if bias else None
    expected = F.batch_norm(F.conv2d(x, weight, given), *norm[:4], eps=norm.eps)
    torch.testing.assert_close(F.conv2d(x, *folded(weight, given, norm)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("channels", [16, 10])
@torch.no_grad()
def test_it_is_pytorchs(backend, channels, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", backend)
    norm, x, weight = make_norm(channels), torch.randn(2, 3, 5, channels), torch.randn(channels, 1, 3, 3)
    expected = F.batch_norm(maps(x), *norm[:4], eps=norm.eps)
    torch.testing.assert_close(maps(normalise(x, norm)), expected, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(maps(normalise(x, norm, relu=True)), expected.relu(), atol=5e-6, rtol=1e-6)
    convolved = F.conv2d(maps(x), weight, padding=1, groups=channels)
    expected = F.gelu(F.batch_norm(convolved, *norm[:4], eps=norm.eps))
    got = depthwise_conv(x, weight, None, "gelu", norm)
    torch.testing.assert_close(maps(got), expected, atol=2e-5, rtol=1e-6)


@torch.no_grad()
def test_a_norm_of_float32_fits_a_map_of_half_the_width():
    norm, x, weight = make_norm(16), torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(16, 1, 3, 3).bfloat16()
    got = depthwise_conv(x, weight, None, "none", norm)
    assert got.dtype == torch.bfloat16
    expected = depthwise_conv(x.float(), weight.float(), None, "none", norm)
    torch.testing.assert_close(got.float(), expected, atol=0.2, rtol=0.05)


def test_a_norm_of_other_channels_is_refused():
    x, weight = torch.randn(1, 3, 3, 16), torch.randn(16, 1, 3, 3)
    for call in (lambda norm: normalise(x, norm), lambda norm: depthwise_conv(x, weight, None, "none", norm)):
        with pytest.raises(ValueError, match=r"norm's tensors must be \[16\], got \[8\], \[16\]"):
            call(make_norm(16)._replace(mean=torch.zeros(8)))

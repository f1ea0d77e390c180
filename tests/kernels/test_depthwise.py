"""The depthwise convolution on any device: the public function without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import depthwise_conv


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
def test_it_is_pytorchs_convolution_and_activation(activation):
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(8, 1, 3, 3), torch.randn(8)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=8).permute(0, 2, 3, 1)
    expected = convolved if activation == "none" else getattr(F, activation)(convolved)
    assert torch.equal(depthwise_conv(x, weight, bias, activation), expected)


def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(1, 3, 3, 8), torch.randn(8, 1, 3, 3)
    with pytest.raises(ValueError, match=r"activation is 'tanh', expected one of none, relu, silu, gelu"):
        depthwise_conv(x, weight, None, "tanh")
    with pytest.raises(ValueError, match=r"weight must be \[8, 1, 3, 3\]"):
        depthwise_conv(x, weight[:, :, :2], None)

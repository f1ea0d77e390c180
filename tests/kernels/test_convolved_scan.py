"""The scan of a convolved map on any device: the public function without a GPU."""

import pytest
import torch

from evmamba.kernels import convolved_scan, depthwise_conv, pattern_scan


def test_it_is_convolution_silu_and_scan(make_inputs):
    x, *parameters = make_inputs(1, 3, 5, 6, 4, 2)
    weight, bias = torch.randn(6, 1, 3, 3), torch.randn(6)
    inputs = [t.requires_grad_() for t in (x, weight, bias, *parameters)]
    found = convolved_scan(*inputs, "es2d")
    expected = pattern_scan(depthwise_conv(x, weight, bias, "silu"), *parameters, "es2d")
    assert torch.equal(found, expected)
    of_both = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(*of_both, strict=True))


def test_what_does_not_fit_is_refused(make_inputs):
    x, *parameters = make_inputs(1, 3, 3, 6, 4, 2)
    with pytest.raises(ValueError, match=r"weight must be \[6, 1, 3, 3\]"):
        convolved_scan(x, torch.randn(6, 1, 3, 2), None, *parameters, "es2d")
    with pytest.raises(ValueError, match=r"Ds must be \[24\]"):
        convolved_scan(x, torch.randn(6, 1, 3, 3), None, *parameters[:4], torch.ones(6), "es2d")

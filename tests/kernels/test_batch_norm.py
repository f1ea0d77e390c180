"""Blocks that train with kernels ask for BatchNorm's operators, and mean by them what their modules do.

PyTorch stands in for the kernels: what is tested is what surrounds them, gradients of gates included.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evmamba.blocks import ConvBranch, InvertedResidual, statistics_of_batch
from evmamba.kernels import batch_norm, depthwise

from .batch_norm_cases import ACTIVATIONS


class Definition:
    """The launches of triton_batch_norm.py in PyTorch."""

    @staticmethod
    def statistics(x, running_mean, running_var, momentum, eps):
        rows = x.flatten(0, 2)
        running_mean.lerp_(rows.mean(0), momentum)
        running_var.lerp_(rows.var(0), momentum)
        return torch.stack((rows.mean(0), (rows.var(0, correction=0) + eps).rsqrt()))

    @staticmethod
    def forward(x, stats, weight, bias, gate, activation):
        y = ACTIVATIONS[activation]((x - stats[0]) * stats[1] * weight + bias)
        return y if gate is None else y * gate[:, None, None]

    @classmethod
    def pool(cls, x, *norm_and_factor_and_activation):
        *norm, factor, activation = norm_and_factor_and_activation
        return (cls.forward(x, *norm, None, activation) * (1 if factor is None else factor)).sum((1, 2))

    @classmethod
    def backward(cls, dout, x, stats, weight, bias, gate, d_sum, activation, out):
        n = (x - stats[0]) * stats[1]
        pre = n * weight + bias
        d = dout if gate is None else dout * gate[:, None, None] + d_sum[:, None, None]
        d = torch.ops.aten.gelu_backward(d, pre) if activation == "gelu" else d * (pre > 0)
        d_weight, d_bias, rows = (d * n).sum((0, 1, 2)), d.sum((0, 1, 2)), n[..., 0].numel()
        dx = weight * stats[1] * (d - d_bias / rows - n * d_weight / rows)
        if out is not None:
            out.copy_(cls.forward(x, stats, weight, bias, gate, activation))
        return dx, d_weight, d_bias


class Convolution:
    """Those of triton_depthwise.py."""

    @staticmethod
    def forward(x, weight, bias, activation):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
        return depthwise.ACTIVATIONS[activation](y).contiguous()

    @staticmethod
    def backward(dout, x, weight, bias, activation):
        assert activation == "none"
        d, seen = (t.permute(0, 3, 1, 2) for t in (dout, x))
        ones, groups = (1, 1), len(weight)
        dx, d_weight, d_bias = torch.ops.aten.convolution_backward(
            d, seen, weight, [groups], ones, ones, ones, False, (0, 0), groups, (True, True, True)
        )
        return dx.permute(0, 2, 3, 1).contiguous(), d_weight, d_bias


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(batch_norm, "_kernels", lambda: Definition)
    monkeypatch.setattr(depthwise, "_kernels", lambda: Convolution)

    def switch(on: bool):
        for module in ("evmamba.blocks", "evmamba.kernels.depthwise"):
            monkeypatch.setattr(f"{module}.has_kernels", lambda x, channels=0: on)

    return switch


def trained(block, x):
    """Result, gradients and running statistics of a step."""
    block = copy.deepcopy(block)
    out = block(x.requires_grad_())
    # Not the squares' sum: of normalised numbers it is constant, and its gradients are what rounding leaves.
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * seed).sum(), (x, *block.parameters()))
    return [out.detach(), *gradients, *block.buffers()]


@pytest.mark.parametrize("kind", [ConvBranch, InvertedResidual])
def test_a_block_trains_as_its_modules_do(kind, without_gpu):
    torch.manual_seed(0)
    block, x = kind(8), torch.randn(3, 8, 4, 5)
    results = []
    for on in (True, False):
        without_gpu(on)
        results.append(trained(block, x))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_left_to_norms_that_have_no_kernel(without_gpu):
    without_gpu(True)
    x = torch.randn(2, 3, 4, 8)
    norm = nn.BatchNorm2d(8)
    assert statistics_of_batch(norm, x).shape == (2, 8)
    assert norm.num_batches_tracked == 1
    others = (
        nn.BatchNorm2d(8).eval(),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.SyncBatchNorm(8),
        nn.Identity(),
    )
    assert [statistics_of_batch(other, x) for other in others] == [None] * len(others)
    assert statistics_of_batch(norm, x[:1, :1, :1]) is None  # its own forward says what is wrong with one pixel
    with torch.no_grad():
        assert statistics_of_batch(norm, x) is None
    assert norm.num_batches_tracked == 1

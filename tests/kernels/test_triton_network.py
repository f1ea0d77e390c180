"""A whole network with kernels around its scans against the same network of PyTorch's modules.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import copy

import pytest
import torch

from evmamba import fuse
from evmamba.blocks import InvertedResidual
from evmamba.model import EfficientVMamba

from .triton_runs import DEVICE, MARKS

pytestmark = MARKS


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = EfficientVMamba((8, 8), (1, 1), layout="EI", num_classes=2, drop_path_rate=0.4, state_dim=1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.to(DEVICE)


def outputs_and_gradients(model, images, backend, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", backend)
    torch.manual_seed(1)  # of stochastic depth
    model = copy.deepcopy(model)  # whose running statistics move
    out = model(images)
    if not torch.is_grad_enabled():
        return [out]
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters()), *(b.float() for b in model.buffers())]


def without_depthwise_norms(model):
    """As where a norm behind a depthwise convolution is folded into it, and that in front of it is not."""
    for block in model.modules():
        if isinstance(block, InvertedResidual):
            block.depthwise_norm = torch.nn.Identity()
            block.depthwise.bias = torch.nn.Parameter(torch.randn(len(block.depthwise.weight), device=DEVICE))


@pytest.mark.parametrize("mode", ["training", "fused", "half fused, training"])
def test_a_network_with_kernels_computes_what_its_modules_do(model, mode, monkeypatch):
    model.train(mode != "fused")
    if mode == "half fused, training":
        without_depthwise_norms(model)
    images = torch.randn(2, 3, 32, 36, device=DEVICE)
    with torch.set_grad_enabled(mode != "fused"):
        expected = outputs_and_gradients(model, images, "torch", monkeypatch)
        network = fuse(model) if mode == "fused" else model
        found = outputs_and_gradients(network, images, "triton", monkeypatch)
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).norm() <= 2e-5 * wanted.norm() + 1e-7, value.shape

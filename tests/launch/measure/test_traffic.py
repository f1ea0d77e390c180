"""What is counted of a step without a GPU: bytes and kernels of known operators, the peak, and what needs less."""

import pytest
import torch
from torch import nn

from evmamba.launch.measure.traffic import count_inference, count_training, count_ways
from evmamba.model import EfficientVMamba

pytest.importorskip("triton")
KIBIBYTE = 1024


class Elementwise(nn.Module):
    """One parameter of 64 KiB, multiplied and added to the images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 4, 64, 64))

    def forward(self, x):
        view = x.flatten().view_as(x)
        return (view * self.weight).sin()


def test_bytes_are_those_of_all_tensors_an_operator_touches():
    traffic = count_inference(Elementwise(), (2, 4, 64, 64))
    assert traffic.by_kind == {"mul": (1, (128 + 64 + 128) * KIBIBYTE), "sin": (1, 256 * KIBIBYTE)}
    assert (traffic.kernels, traffic.bytes) == (2, 576 * KIBIBYTE)
    assert traffic.peak == (64 + 128 + 128 + 128) * KIBIBYTE  # weight, images, product, result


def test_training_holds_what_the_backward_needs_and_the_optimizers_state():
    traffic = count_training(Elementwise(), (2, 4, 64, 64))
    assert traffic.saved == 128 * KIBIBYTE + 512  # the product, for the sine's gradient, and the loss; views are free
    assert traffic.peak > 3 * 64 * KIBIBYTE + 2 * 128 * KIBIBYTE


def test_a_bias_and_a_strided_map_cost_a_convolution_passes_of_their_own():
    with_bias, without = (
        count_inference(nn.Conv2d(4, 4, 1, bias=bias), (2, 4, 64, 64)).by_kind["convolution"] for bias in (True, False)
    )
    assert with_bias == (2, without[1] + 16 + 2 * 128 * KIBIBYTE)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 1, bias=False)

        def forward(self, x):
            return self.conv(x[:, ::2])

    assert count_inference(Half(), (2, 4, 64, 64)).by_kind["convolution"][0] == 2


def test_autocast_follows_cudas_rules():
    seen = []

    class Watched(nn.LayerNorm):
        def forward(self, x):
            out = super().forward(x)
            seen.append((x.dtype, out.dtype))
            return out

    model = nn.Sequential(nn.Linear(8, 8), Watched(8))
    count_inference(model, (2, 3, 8, 8), torch.bfloat16)
    count_inference(model, (2, 3, 8, 8))
    assert seen == [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]


def test_networks_launch_our_kernels_and_checkpointing_needs_less_memory():
    model = EfficientVMamba((16, 16), (1, 1), layout="EI", num_classes=2)
    ways = dict(count_ways(model, (2, 3, 64, 64), torch.bfloat16))
    assert ways["inference"].by_kind["scan_forward_kernel"][0] == 1
    assert ways["training"].by_kind["scan_backward_kernel"][0] == 1
    assert "scan_forward_kernel" not in ways["training, published scan"].by_kind
    assert ways["training, checkpointing"].saved < ways["training"].saved
    assert 2 * ways["training"].saved < ways["training, published scan"].saved
    assert ways["training, checkpointing"].by_kind["scan_forward_kernel"][0] == 2


def test_the_model_is_left_as_it_was():
    model = EfficientVMamba((16,), (1,), layout="E", num_classes=2).eval()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    count_training(model, (2, 3, 32, 32))
    assert not model.training
    assert all(torch.equal(value, before[name][0]) and value.grad is None for name, value in model.named_parameters())

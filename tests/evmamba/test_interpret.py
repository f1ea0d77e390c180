"""What is drawn of a network is what it computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evmamba import EfficientVMamba
from evmamba.blocks import ES2D
from evmamba.interpret import class_activation, receptive_field, step_maps


def test_step_sizes_are_those_of_the_definition():
    torch.manual_seed(0)
    layer = ES2D(8, state_dim=4)
    model = nn.Sequential(layer)
    tokens = torch.randn(1, 3, 5, 8)
    (found,) = step_maps(model, tokens)
    signal = layer.signal_and_gate(tokens)[0][0]
    wanted = torch.empty(3, 5)
    for k, (first_row, first_column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        low = signal[first_row::2, first_column::2] @ layer.x_proj_weight[k, :1].T
        delta = F.softplus(low @ layer.dt_projs_weight[k].T + layer.dt_projs_bias[k]).mean(-1)
        wanted[first_row::2, first_column::2] = delta / delta.mean()
    torch.testing.assert_close(found.steps, wanted.detach())
    assert found.name == "0"


def test_the_field_of_a_convolution_is_its_kernel():
    convolution = nn.Conv2d(3, 2, 5, padding=2)
    nn.init.ones_(convolution.weight)
    field, areas = receptive_field(convolution, [torch.rand(1, 3, 21, 21)])
    assert torch.equal(field > 0, F.pad(torch.ones(5, 5), (8,) * 4) > 0)
    assert areas[0.99] == pytest.approx(25 / 441)
    assert areas[0.2] == pytest.approx(9 / 441)


def test_the_field_of_the_scan_is_the_whole_image():
    torch.manual_seed(0)
    model = EfficientVMamba((8, 16, 24, 32), (1, 1, 1, 1)).eval()
    field, areas = receptive_field(model.forward_features, [torch.randn(1, 3, 128, 128)])
    assert (field > 0).float().mean() > 0.95
    assert 0 < areas[0.2] < areas[0.5] < areas[0.99] <= 1


def test_activation_lies_where_the_class_is_seen():
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, 2:4, 5] = 1.0  # class 0 looks at red, class 1 at green

    def classify(features: torch.Tensor) -> torch.Tensor:
        return features.mean(dim=(2, 3)) @ torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]])

    activation, label, probability = class_activation(lambda x: x.clone(), classify, image, None)
    assert label == 0
    assert 0.5 < probability < 1
    assert torch.equal(activation.nonzero(), torch.tensor([[2, 5], [3, 5]]))
    other, label, _ = class_activation(lambda x: x.clone(), classify, image, 1)
    assert label == 1
    assert not other.any()

"""Whole detectors are counted as published."""

import pytest

from evmamba.cost import count_parameters
from evmamba.launch.measure.cost import count
from evmamba.tasks.detection.whole import whole_network


@pytest.mark.parametrize(
    ("model", "head", "parameters", "macs"),
    [  # millions and G of the Swin paper's and of this paper's table 7
        ("swin_tiny_patch4_window7_224", "maskrcnn", 48, 267),
        ("resnet50", "maskrcnn", 44, 260),
        ("vmamba_tiny", "maskrcnn", 42, 286),
        ("efficientvmamba_b", "maskrcnn", 53, 252),
        ("resnet50", "retinanet", 38, 239),
    ],
)
def test_detectors_count_as_published(model: str, head: str, parameters: float, macs: float):
    network = whole_network(head, model)
    assert round(count_parameters(network.model) / 1e6) == parameters
    assert network.size == (800, 1280)
    assert round(count(network.counted, network.size).paper / 1e9) == macs
    assert network.protocol["rules"] == "mmdetection"

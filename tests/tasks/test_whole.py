"""What every task's whole network promises to who counts it and measures it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from evmamba.tasks import TASKS

HEADS = [head.key for task in TASKS.values() if task.whole for head in task.heads]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_counted_takes_one_image_of_its_size_and_holds_the_networks_own_parameters(head: str):
    network = TASKS.of_head(head).load("whole")(head, "resnet10t")
    own = {id(parameter) for parameter in network.model.parameters()}
    for counted in (network.counted, *network.also_counted.values()):
        assert {id(parameter) for parameter in counted.parameters()} <= own
        with FakeTensorMode(allow_non_fake_inputs=True):
            counted.eval()(torch.empty(1, 3, *network.size))
    (image,) = network.inputs(torch.zeros(3, 8, 8))  # a batch, or a list of images
    assert len(image) == 1

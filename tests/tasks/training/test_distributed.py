"""A group of one process: parameters that FSDP2 splits, gradients that DDP takes without a warning."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from evmamba.tasks.training import distributed
from evmamba.tasks.training.distributed import fix_gradient_strides, shard, unsharded


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_after_an_evaluation_every_unit_is_split_again_and_frees_its_parameters_after_forward(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "MIN_UNIT", 1)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shard(network, mesh)
    x = torch.ones(2, 4)
    expected = network(x)
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    assert len(units) == 4

    with unsharded(network):
        assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
        assert torch.equal(network(x), expected)
        assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert torch.equal(network(x), expected)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())


def test_gradients_have_the_strides_of_their_parameters_so_that_ddp_has_nothing_to_warn_of(
    mesh: DeviceMesh, recwarn: pytest.WarningsRecorder
):
    """Depthwise and 1x1 weights have axes of size one, to which channels_last maps give other strides."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 3))
    image = torch.rand(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    network(image).sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    assert network[0].weight.grad.stride() != network[0].weight.stride()  # without the hook
    network.zero_grad()

    wrapped = nn.parallel.DistributedDataParallel(network)
    fix_gradient_strides(wrapped)
    wrapped(image).sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, gradient)
    assert not [str(warning.message) for warning in recwarn if "strides" in str(warning.message)]

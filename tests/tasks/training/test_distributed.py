"""Parameters that FSDP2 splits, in a group of one process: whole during an evaluation, split again after it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from evmamba.tasks.training import distributed
from evmamba.tasks.training.distributed import shard, unsharded


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

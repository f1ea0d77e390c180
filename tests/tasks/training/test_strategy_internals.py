"""What Lightning's sharded strategies leave out, and ZeRO's hooks."""

import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from evmamba.tasks.training.strategy_internals import (
    split_over_all_processes,
    synchronise_batch_norm,
    without_gathering,
)


@pytest.mark.parametrize("asked", [True, False])
def test_batch_norm_is_synchronised_where_that_was_asked_for(asked: bool):
    strategy = ModelParallelStrategy()
    strategy._layer_sync = TorchSyncBatchNorm() if asked else None
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert synchronise_batch_norm(strategy, network) is network
    assert isinstance(network[1], nn.SyncBatchNorm) == asked


def test_parameters_are_split_over_the_processes_of_all_nodes():
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    strategy.num_nodes = 3
    strategy.parallel_devices = [torch.device("cpu")] * 2
    split_over_all_processes(strategy)
    assert strategy._data_parallel_size == 6


def test_only_the_hooks_of_zero_are_off_for_a_while():
    called = []

    def hook(name: str, module: str):
        def call(*_):
            called.append(name)

        call.__module__ = module
        return call

    network = nn.Linear(1, 1)
    network.register_forward_pre_hook(hook("gather", "deepspeed.runtime.zero.parameter_offload"))
    network.register_forward_pre_hook(hook("wrapped", "deepspeed.utils.nvtx"))
    network.register_forward_pre_hook(hook("before", "evmamba.cost"))
    network.register_forward_hook(hook("free", "deepspeed.runtime.zero.parameter_offload"))
    network.register_forward_hook(hook("after", "evmamba.cost"))

    def evaluate():
        with without_gathering(network.modules()):
            network(torch.ones(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate()
    assert called == ["before", "after"]
    called.clear()
    network(torch.ones(1))
    assert called == ["gather", "wrapped", "before", "free", "after"]

"""What sharded strategies need of the private parts of Lightning, DeepSpeed and torch."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy
from torch import nn

# Modules whose functions ZeRO hangs on a network (the second wraps those of the first).
ZERO_HOOKS = ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx")
Module = TypeVar("Module", bound=nn.Module)


def synchronise_batch_norm(strategy: ParallelStrategy, module: Module) -> Module:
    """Do what ``trainer.sync_batchnorm`` asks for; Lightning's sharded strategies leave it out.

    Args:
        strategy: that a trainer was made with.
        module: changed in place, but for itself where it is a BatchNorm.
    """
    return strategy._layer_sync.apply(module) if strategy._layer_sync else module  # type: ignore[return-value]


def split_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Split parameters over all processes; Lightning does so over those of one node. Before its set-up."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def load_split_parameters(strategy: DeepSpeedStrategy, checkpoint: Mapping[str, Any]) -> None:
    """Load the whole ``state_dict`` of a checkpoint into parameters that ZeRO 3 has split."""
    strategy._restore_zero_state(checkpoint, strict=True)


@contextlib.contextmanager
def without_gathering(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take off ZeRO's hooks, which gather a module's parameters before its forward and free them after it."""
    all_hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    kept = [dict(hooks) for hooks in all_hooks]
    for hooks in all_hooks:
        for key in [key for key, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(ZERO_HOOKS)]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in zip(all_hooks, kept, strict=True):
            hooks.clear()
            hooks.update(before)

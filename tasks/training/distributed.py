"""What several processes ask of a module: one set of buffers, and parameters that FSDP2 splits among them.

Everything here is collective: all processes call it, in the same order.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

K = TypeVar("K")
V = TypeVar("V")
# Elements. A unit is gathered by one collective; below this size that costs more time in latency than in transfer.
MIN_UNIT = 2**18


def share_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers, in place.

    Each process has its own BatchNorm statistics (unless they are synchronised): an evaluation that is split among
    processes must be of one network, the one that is saved.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_to_first(found: Mapping[K, V]) -> dict[K, V] | None:
    """All processes' entries together, on rank 0; None on the others."""
    parts: list[Mapping[K, V]] | None = [found]
    if dist.is_available() and dist.is_initialized():
        parts = [{} for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather_object(found, parts, dst=0)
    return None if parts is None else {key: value for part in parts for key, value in part.items()}


def fix_bucket_order(wrapped: nn.Module) -> None:
    """Let DDP add gradients in one order from the first step of every start; anything but DDP is left alone.

    DDP puts gradients into buckets in the reverse order of the parameters, and after its first step anew in the order
    in which they became ready. With three and more processes an element's place in its bucket decides in which order
    its summands are added, so the first step after a restart would round differently from the same step of a training
    that was never stopped. One backward pass of zeros, before any step, has the buckets sorted for good: in the reverse
    order of the parameters, which is about the order in which they become ready.
    """
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.find_unused_parameters or wrapped.static_graph:
        return
    wrapped.reducer.prepare_for_backward([])
    zero = sum((parameter.sum() * 0 for parameter in wrapped.parameters() if parameter.requires_grad), torch.zeros(()))
    zero.backward()
    wrapped.zero_grad(set_to_none=True)


def fix_gradient_strides(wrapped: nn.Module) -> None:
    """Let gradients have the strides of their parameters under DDP, which compares them; else do nothing.

    The weight of a depthwise convolution, `[C, 1, k, k]`, and that of a 1x1 convolution have axes of size one, whose
    strides mean nothing: a backward pass through channels_last maps gives them others than the parameter has. The
    memory is the same, so the gradient is only viewed anew; DDP would warn that the two do not match.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    for parameter in wrapped.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_with_strides, parameter.stride()))


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor | None:
    """The gradient with these strides; None, for as it is, where that would need a copy or nothing is to be done."""
    own = gradient.stride()
    if own == strides or any(size > 1 and a != b for size, a, b in zip(gradient.shape, own, strides, strict=True)):
        return None
    return gradient.as_strided(gradient.shape, strides)


def shard(module: nn.Module, mesh: DeviceMesh, entry_points: Iterable[str] = ()) -> None:
    """Split the parameters of `module` over a one-dimensional mesh with FSDP2, in place; a second call does nothing.

    Units are the large elements of its lists and sequences (blocks, heads), and the module itself for the rest. An
    element that has a list in it is no unit: what is in lists is often called from outside (a stage's merging, say).

    Args:
        module: whose forward is called by the loss.
        mesh: of the data-parallel processes.
        entry_points: other methods by which the module computes, which then gather the parameters as forward does.
    """
    if isinstance(module, FSDPModule):
        return
    for unit in list(_units(module)):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in entry_points:
        register_fsdp_forward_method(module, name)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList)
        if _size(child) < MIN_UNIT:
            continue
        if listed and not any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield child
        else:
            yield from _units(child)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Hold whole parameters on every process, so that forward has nothing collective in it.

    Processes may then run it different numbers of times, as in an evaluation, and each has the whole state_dict. The
    parameters must not be changed.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    parts = list(module.modules())
    hooks = [part._state_dict_pre_hooks for part in parts]  # which would split the parameters again
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    for part in parts:
        part._state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        for part, before in zip(parts, hooks, strict=True):
            part._state_dict_pre_hooks = before
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def is_finite(value: Tensor) -> bool:
    """Whether all of a tensor is finite; the same answer on all processes that share a sharded one."""
    if not isinstance(value, DTensor):
        return bool(torch.isfinite(value).all())
    broken = (~torch.isfinite(value.to_local())).any().to(value.device_mesh.device_type, torch.int32)
    dist.all_reduce(broken, dist.ReduceOp.MAX, group=value.device_mesh.get_group())
    return not bool(broken)

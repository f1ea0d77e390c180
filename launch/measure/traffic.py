"""Bytes, kernels and peak memory of a step on a GPU, counted from shapes on any machine: nothing is computed.

The step runs on fake tensors under the autocast rules of CUDA, with the Triton backend's own launch code. Bytes are
those of the tensors that an operator or a kernel is given and returns, each once: what a perfect cache would leave. A
kernel is a launch of ours, or an operator of PyTorch that is no view; `_cost` knows those that launch several. Peak
memory is that of all tensors alive at once, rounded as CUDA's allocator does, without its fragmentation and cuDNN's
workspaces. None of it was measured.
"""

import copy
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from evmamba.backbone import Backbone
from evmamba.blocks import ES2D
from evmamba.fusion import fuse
from evmamba.kernels.dry_run import dry_run
from evmamba.launch.measure.original import counted_es2d

WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "as_strided_")
# Operators that CUDA's autocast runs in float32 and that of CPUs does not.
IN_FLOAT32 = ("layer_norm", "group_norm", "cross_entropy", "softmax", "log_softmax")
SMALLEST_ALLOCATION = 512


@dataclass
class Traffic:
    """A step's sums, and the part of each kind of operator or kernel: (kernels, bytes).

    Attributes:
        kernels: launched.
        bytes: read and written.
        peak: bytes of the tensors alive at once, with weights, gradients and the optimizer's state.
        saved: bytes of them that were alive between forward and backward, beside weights and state.
    """

    peak: int = 0
    saved: int = 0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=lambda: defaultdict(lambda: (0, 0)))

    @property
    def kernels(self) -> int:
        return sum(kernels for kernels, _ in self.by_kind.values())

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.by_kind.values())

    def add(self, kind: str, kernels: int, moved: int) -> None:
        before = self.by_kind[kind]
        self.by_kind[kind] = before[0] + kernels, before[1] + moved


def count_inference(model: nn.Module, image: Sequence[int], amp: torch.dtype | None = None) -> Traffic:
    """One forward pass of images `[B, C, H, W]` without gradients, in evaluation mode, under autocast to `amp`.

    The model is copied as it is into fake memory and left alone.
    """
    with _fake(model, image) as (network, images, counter):
        network.eval()
        with torch.no_grad(), counter, _autocast(amp):
            network(images)
    return counter.traffic


def count_training(model: nn.Module, image: Sequence[int], amp: torch.dtype | None = None) -> Traffic:
    """Forward and backward in training mode; arguments as in `count_inference`.

    AdamW's two moments and the gradients count in the peak; its update is not counted in bytes and kernels.
    """
    with _fake(model, image) as (network, images, counter):
        network.train()
        with counter:
            moments = [torch.empty_like(p) for p in network.parameters() if p.requires_grad for _ in range(2)]
            persistent = counter.alive
            with _autocast(amp):
                loss = network(images).float().mean()
            counter.traffic.saved = counter.alive - persistent
            loss.backward()
            del moments
    return counter.traffic


def count_ways(model: nn.Module, image: Sequence[int], amp: torch.dtype | None = None) -> Iterator[tuple[str, Traffic]]:
    """A network's steps by what they are; a network of ours also fused, checkpointing and as published."""
    blocks = [module for module in model.modules() if isinstance(module, ES2D)]
    yield "inference", count_inference(model, image, amp)
    if blocks:
        yield "inference, fused", count_inference(fuse(model.eval(), amp), image)
    yield "training", count_training(model, image, amp)
    published = bool(blocks) and all(block.scan == "es2d" and block.step == 2 for block in blocks)
    if published:
        with original_scan():
            yield "training, published scan", count_training(model, image, amp)
    if not isinstance(model, Backbone):
        return
    model.set_grad_checkpointing()
    yield "training, checkpointing", count_training(model, image, amp)
    if published:
        with original_scan():
            yield "training, checkpointing, published scan", count_training(model, image, amp)


@contextmanager
def original_scan() -> Iterator[None]:
    """Within this context networks scan as the published code does, and nothing takes kernels of ours."""

    def scan(self: ES2D, x: Tensor) -> Tensor:
        return counted_es2d(x, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    with mock.patch.object(ES2D, "_scan", scan), mock.patch(f"{__name__}.dry_run", return_value=nullcontext()):
        yield


@contextmanager
def _fake(model: nn.Module, image: Sequence[int]) -> Iterator[tuple[nn.Module, Tensor, "_Counter"]]:
    """A copy of the model and images without memory, counted as alive, and what counts all that follows."""
    counter = _Counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, dry_run(counter.launch), _autocast_of_cuda():
        tensors = {id(tensor): mode.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())}
        network = copy.deepcopy(model, dict(tensors))
        images = torch.empty(*image, dtype=next(network.parameters()).dtype)
        for tensor in (*tensors.values(), images):
            counter.watch(tensor)
        yield network, images, counter


def _autocast(amp: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None)


@contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """CUDA's rules in the autocast of CPUs. By name: modes do not see what a checkpoint computes again."""

    def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name in IN_FLOAT32:
            patches.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        yield


class _Counter(TorchDispatchMode):
    """Counts what passes, and which storages are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.alive = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            if own := _maybe_get_opdef(func):  # our launch code, whose every operator comes here
                return own._init_fn(*args, **kwargs)
            parts = NotImplemented if func is torch.ops.prim.device.default else func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if outputs and name not in WITHOUT_KERNEL and not _is_view(func, inputs, outputs):
            self.traffic.add(name, *_cost(name, args, inputs, outputs))
        for tensor in outputs:
            self.watch(tensor)
        return out

    def launch(self, kernel: str, tensors: list[Tensor]) -> None:
        """A Triton kernel; what it reads and writes is told apart by nobody, and need not be."""
        unlike = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        self.traffic.add(kernel, 1, sum(_touched(tensor) for tensor in unlike.values()))

    def watch(self, tensor: Tensor) -> None:
        """Count the tensor's memory from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = math.ceil(storage.nbytes() / SMALLEST_ALLOCATION) * SMALLEST_ALLOCATION

        def freed(_: Any) -> None:
            self.alive -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.alive += size
        self.traffic.peak = max(self.traffic.peak, self.alive)


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in given for tensor in outputs)


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor's memory, what an expansion repeats counted once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()


def _cost(name: str, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    """Kernels and bytes of an operator of PyTorch."""
    moved = sum(map(_touched, (*inputs, *outputs)))
    kernels = 1
    if name == "convolution":
        x, _, bias = args[:3]
        if bias is not None:  # cuDNN has none: PyTorch adds it to what cuDNN wrote
            kernels, moved = kernels + 1, moved + 2 * _touched(outputs[0])
        if not _is_dense(x):  # cuDNN takes a copy
            kernels, moved = kernels + 1, moved + 2 * _touched(x)
    elif name == "convolution_backward":
        kernels = len(outputs)
    elif name in ("native_batch_norm", "native_batch_norm_backward", "native_layer_norm_backward"):
        kernels = 2 if name.endswith("backward") or args[5] else 1
    return kernels, moved


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)

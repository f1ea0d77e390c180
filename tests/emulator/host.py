"""Sends a project's own Triton launches through the real JIT, without a GPU, to the emulator.

Inside `emulated()` a kernel that is launched on `on_device(tensor)` is specialised from its real arguments, compiled
for the wanted GPU up to PTX, and executed by machine.py on the tensors' own CPU memory.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import machine, ptx
from . import tensor_cores as tensor_cores  # registers its instructions
from .memory import GlobalMemory

LARGEST_GRID = (2**31 - 1, 65535, 65535)


class DeviceTensor(torch.Tensor):
    """A CPU tensor that says it is on an NVIDIA GPU, so that launch code takes that path."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a `DeviceTensor`."""
    return tensor.as_subclass(DeviceTensor)


class _Driver:
    """What the JIT asks a driver when it compiles."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # the JIT keeps compiled kernels by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type: str) -> str:
        return type


@dataclass
class Launched:
    """One launch: the kernel's name, grid and arguments by name, and what Triton compiled for it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    compiled: Any = field(repr=False)


@dataclass
class Emulation:
    """The launches so far, and the PTX of the kernels they ran, by a hash Triton gives a compiled kernel."""

    launches: list[Launched] = field(default_factory=list)
    kernels: dict[str, ptx.Kernel] = field(default_factory=dict)

    def compilations(self, kernel: str) -> int:
        """How many different binaries of a kernel ran."""
        return sum(k.name == kernel for k in self.kernels.values())


@contextmanager
def emulated(
    cache: Path, capability: int = 90, order: int | None = None, *, execute: bool = True, machine_code: bool = False
) -> Iterator[Emulation]:
    """Emulate launches. `order` seeds the order of CTAs and of warps between barriers; None is first to last.

    Without `execute` kernels are compiled only, up to PTX or with `machine_code` further. Compiled kernels are kept in
    `cache`; one with and one without machine code must not be the same, nor that of a real GPU.

    What is executed for compute capability 10 has its matrix products by `mma.sync`, which such GPUs have too: not by
    their fifth generation of tensor cores (tcgen05), as `project_kernel` and `input_gradient_kernel` have on one.
    """
    emulation = Emulation()
    compiled_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compiled_run(self, *args, grid=grid, warmup=True, **options)
        sizes = tuple(grid(options) if callable(grid) else grid)
        sizes += (1,) * (3 - len(sizes))
        if any(not 1 <= size <= largest for size, largest in zip(sizes, LARGEST_GRID, strict=True)):
            raise ValueError(f"{self.__name__}: no GPU takes the grid {sizes}")
        arguments = dict(zip(self.arg_names, args, strict=False)) | {
            n: v for n, v in options.items() if n in self.arg_names
        }
        emulation.launches.append(Launched(self.__name__, sizes, arguments, compiled))
        kernel = emulation.kernels.get(compiled.hash)
        if kernel is None:
            kernel = emulation.kernels[compiled.hash] = ptx.parse(compiled.asm["ptx"])
        if execute:
            _execute(emulation.launches[-1], kernel, order)
        return compiled

    device = mock.patch.object(driver, "_active", _Driver(capability))
    # Making machine code takes more than half of the time.
    without = nullcontext() if machine_code else mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
    older_products = execute and capability >= 100
    environment = mock.patch.dict(os.environ, {"DISABLE_MMA_V5": "1"} if older_products else {})
    own_cache = mock.patch.object(triton.knobs.cache, "dir", str(cache))
    with mock.patch.object(JITFunction, "run", run), device, without, own_cache, environment:
        yield emulation


def _execute(launch: Launched, kernel: ptx.Kernel, order: int | None) -> None:
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    signature = launch.compiled.src.signature
    values = []
    for name in launch.compiled.src.fn.arg_names:
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            values.append(value.data_ptr())
        elif signature[name] != "constexpr":
            values.append(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value))
    values += [0] * (len(kernel.parameters) - len(values))  # pointers to scratch memory, which these kernels lack
    chance = None if order is None else random.Random(order)
    memory = GlobalMemory(tensors)
    machine.Launch(kernel, launch.grid, values, memory, launch.compiled.metadata.shared, chance).run()

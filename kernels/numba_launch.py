"""From tensors to the compiled CPU kernels: what a call hands them, how they are compiled and kept, and their threads.

Every kernel takes one record of sizes and addresses and does tasks until none is left, taking their numbers from a
counter that all threads share. So any thread of any runtime can help: those of PyTorch's own OpenMP, which are awake
and hold the cores anyway, or a pool of Python's where PyTorch has another runtime.
"""

import ctypes
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, types
from numba.core import event
from torch import Tensor

from .numba_backward import input_gradient_kernel, scan_backward_kernel, sum_kernel, weight_gradient_kernel
from .numba_forward import project_kernel, scan_kernel
from .numba_map import depthwise_kernel, excite_kernel, gated_sum_kernel, norm_kernel, squeeze_kernel
from .numba_vector import COMPILED, fetch_add

logger = logging.getLogger(__name__)

SIZES = (
    "B", "HW", "K", "L", "Lp", "D", "N", "Np", "R", "S", "visits", "save", "slabs", "piece", "pieces",
    "H", "W", "stride", "activation",
)  # fmt: skip
TENSORS = (
    "paths", "visit_of", "x", "x_proj", "dt_proj", "bias", "A", "skip", "proj", "y", "states",
    "x_proj_rows", "dy", "dx_scan", "dproj", "partial", "weight_partial",
    "weight", "gate", "u", "v", "w1", "b1", "w2", "b2", "mean", "gates",
)  # fmt: skip
_INTEGERS = ("counter", "taken", "kernel", "tasks", *SIZES, *TENSORS)
RECORD = np.dtype([(name, np.int64) for name in _INTEGERS] + [("eps", np.float64)])
_PACK = Struct(f"={len(_INTEGERS)}qd").pack_into
_TAKEN = 8 * _INTEGERS.index("taken")
_NOTHING = dict.fromkeys((*_INTEGERS, "eps"), 0)
_POINTER = types.CPointer(from_dtype(RECORD))
PROJECT, SCAN = range(2)
SCAN_BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, SUM = range(4)
DEPTHWISE, NORM, SQUEEZE, EXCITE, GATED_SUM = range(5)


class Call:
    """Sizes and tensors that the kernels of one call work on; `run` may add tensors that later kernels need."""

    def __init__(self, **sizes: float) -> None:
        self._values: dict[str, float] = _NOTHING | sizes
        self._record = ctypes.create_string_buffer(RECORD.itemsize)
        self._values["counter"] = ctypes.addressof(self._record) + _TAKEN
        self.tensors: dict[str, Tensor] = {}  # alive as long as their addresses are

    def __getitem__(self, size: str) -> int:
        return int(self._values[size])

    def set(self, **sizes: float) -> None:
        """Put sizes under their names in place."""
        self._values |= sizes

    def bind(self, **tensors: Tensor) -> None:
        """Put contiguous tensors under their names in place."""
        self.tensors |= tensors
        self._values |= {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def run(self, part: str, kernel: int, tasks: int) -> None:
        """Do all tasks of a kernel."""
        real = np.float64 if self.tensors["x"].dtype == torch.float64 else np.float32
        entry = compiled(part, real)
        self._values |= {"kernel": kernel, "tasks": tasks}
        _PACK(self._record, 0, *self._values.values())
        run_in_threads(entry, ctypes.addressof(self._record), min(torch.get_num_threads(), tasks))


def _forward_entry(real: Any, sources: int) -> Callable[[Any], None]:
    def forward_tasks(pointer):
        call = carray(pointer, 1)[0]
        zero = real(sources * 0)
        while True:
            task = fetch_add(call.counter)
            if task >= call.tasks:
                return
            if call.kernel == PROJECT:
                project_kernel(call, task, zero)
            else:
                scan_kernel(call, task, zero)

    return forward_tasks


def _backward_entry(real: Any, sources: int) -> Callable[[Any], None]:
    def backward_tasks(pointer):
        call = carray(pointer, 1)[0]
        zero = real(sources * 0)
        while True:
            task = fetch_add(call.counter)
            if task >= call.tasks:
                return
            if call.kernel == SCAN_BACKWARD:
                scan_backward_kernel(call, task, zero)
            elif call.kernel == INPUT_GRADIENT:
                input_gradient_kernel(call, task, zero)
            elif call.kernel == WEIGHT_GRADIENT:
                weight_gradient_kernel(call, task, zero)
            else:
                sum_kernel(call, task, zero)

    return backward_tasks


def _around_entry(real: Any, sources: int) -> Callable[[Any], None]:
    def around_tasks(pointer):
        call = carray(pointer, 1)[0]
        zero = real(sources * 0)
        while True:
            task = fetch_add(call.counter)
            if task >= call.tasks:
                return
            if call.kernel == DEPTHWISE:
                depthwise_kernel(call, task, zero)
            elif call.kernel == NORM:
                norm_kernel(call, task, zero)
            elif call.kernel == SQUEEZE:
                squeeze_kernel(call, task, zero)
            elif call.kernel == EXCITE:
                excite_kernel(call, task, zero)
            else:
                gated_sum_kernel(call, task, zero)

    return around_tasks


_ENTRIES = {"forward": _forward_entry, "backward": _backward_entry, "around": _around_entry}
_compiling = threading.Lock()


def compiled(part: str, real: type) -> int:
    """Address of the compiled kernels, from this process, from the disk, or from the compiler."""
    with _compiling:
        return _compiled(part, real).address


@cache
def _compiled(part: str, real: type) -> Any:
    _keep_freed_memory()
    entry = _ENTRIES[part](real, _fingerprint())
    signature = types.void(_POINTER)
    options = {key: value for key, value in COMPILED.items() if key != "no_cpython_wrapper"}
    with event.install_listener("numba:compile", _Announcement(part, real)):
        try:
            return cfunc(signature, cache=True, **options)(entry)
        except (RuntimeError, OSError) as error:
            logger.info("compiled kernels cannot be kept on disk (%s)", error)
            return cfunc(signature, **options)(entry)


@cache
def _keep_freed_memory() -> None:
    """Free something large once, as networks of larger maps do.

    glibc returns what a network's pass frees to the operating system, which clears it page by page when the next pass
    asks for it: a fifth of EfficientVMamba-T's time for one image. What it keeps is twice the largest piece that it
    has ever mapped and freed, of those below 32 MiB. Nothing is written to this one, so it takes no memory.
    """
    np.empty(31 * 2**20, np.uint8)


class _Announcement(event.Listener):
    """Says once that something is being compiled: it takes seconds."""

    def __init__(self, part: str, real: type) -> None:
        self.what = f"{part} kernels for {real.__name__}"
        self.said = False

    def on_start(self, event: Any) -> None:
        if not self.said:
            self.said = True
            logger.info("compiling the CPU's %s", self.what)

    def on_end(self, event: Any) -> None:
        pass


@lru_cache(maxsize=1)
def _fingerprint() -> int:
    # numba's cache looks at one file only, the entry's; the number makes all of them part of its key.
    folder = Path(__file__).parent
    sources = (path.read_bytes() for path in (folder / "chunked.py", *sorted(folder.glob("numba_*.py"))))
    return int.from_bytes(sha256(b"".join(sources)).digest()[:4])


def run_in_threads(entry: int, record: int, threads: int) -> None:
    """Call a compiled entry from so many threads, and return when all are done."""
    if threads <= 1:
        _FUNCTION(entry)(record)
    elif (parallel := _openmp_parallel()) is not None:
        parallel(entry, record, threads, 0)
    else:
        pool = _pool(threads - 1)
        others = [pool.submit(_FUNCTION(entry), record) for _ in range(threads - 1)]
        _FUNCTION(entry)(record)
        wait(others)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _openmp_parallel() -> Any:
    """GOMP_parallel of the OpenMP that PyTorch runs on, by which compiled programs start a parallel region; or None.

    Its threads go on looking for work for milliseconds after PyTorch's last operation: others beside them would share
    their cores.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="evmamba-scan")

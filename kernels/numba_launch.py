"""From tensors to the compiled CPU kernels: what a call hands them, how they are compiled and kept, and their threads.

Every kernel takes one record of sizes and addresses and does tasks until none is left. So any thread of any runtime can
help: those of PyTorch's own OpenMP, which are awake and hold the cores anyway, or a pool of Python's where PyTorch has
another runtime. One of OpenMP's begins with its own share of the tasks and goes on with what the others have left:
where tasks are pixels, that is about the part of a map that PyTorch's operators left in its core's cache.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import event
from torch import Tensor

from .numba_backward import input_gradient_kernel, scan_backward_kernel, sum_kernel, weight_gradient_kernel
from .numba_forward import arrange_kernel, project_kernel, scan_kernel
from .numba_map import (
    batch_norm_kernel,
    channel_sums_kernel,
    depthwise_kernel,
    excite_kernel,
    excited_kernel,
    gated_sum_kernel,
    hidden_kernel,
    norm_kernel,
    squeeze_kernel,
)
from .numba_vector import COMPILED, call_for_number, fetch_add

logger = logging.getLogger(__name__)

SIZES = (
    "B", "HW", "K", "L", "Lp", "D", "N", "Np", "R", "S", "channels", "visits", "save", "slabs", "piece", "pieces",
    "H", "W", "stride", "activation",
)  # fmt: skip
TENSORS = (
    "x_proj_weight", "dt_weight", "minus_A",
    "paths", "visit_of", "x", "x_proj", "dt_proj", "bias", "A", "skip", "proj", "y", "states",
    "x_proj_rows", "dy", "dx_scan", "dproj", "partial", "weight_partial",
    "weight", "gate", "u", "v", "w1", "b1", "w2", "b2", "mean", "gates",
    "norm_mean", "norm_var", "norm_weight", "norm_bias",
)  # fmt: skip
_OF_A_RUN = ("counters", "threads", "thread_number", "kernel", "tasks")
_INTEGERS = (*_OF_A_RUN, *SIZES, *TENSORS)
RECORD = np.dtype([(name, np.int64) for name in _INTEGERS] + [("eps", np.float64)])
_PACK = Struct(f"={len(_INTEGERS)}qd").pack_into
_LINE = 64  # bytes from counter to counter: threads that write to one line of a cache wait for each other
_COUNTERS = -(-RECORD.itemsize // _LINE) * _LINE  # where they begin, behind the record
_PLACE = {name: place for place, name in enumerate((*_INTEGERS, "eps"))}
_POINTER = types.CPointer(from_dtype(RECORD))
ARRANGE, PROJECT, SCAN = range(3)
SCAN_BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, SUM = range(4)
DEPTHWISE, BATCH_NORM, NORM, SQUEEZE, EXCITE, GATED_SUM, CHANNEL_SUMS, HIDDEN, EXCITED = range(9)


class Call:
    """Sizes and tensors that the kernels of one call work on; `run` may add tensors that later kernels need."""

    def __init__(self, **sizes: float) -> None:
        self._values: list[float] = [0] * len(_PLACE)
        self.tensors: dict[str, Tensor] = {}  # alive as long as their addresses are
        self.set(**sizes)

    def __getitem__(self, size: str) -> int:
        return int(self._values[_PLACE[size]])

    def set(self, **sizes: float) -> None:
        """Put sizes under their names in place."""
        for name, size in sizes.items():
            self._values[_PLACE[name]] = size

    def bind(self, **tensors: Tensor) -> None:
        """Put contiguous tensors under their names in place."""
        self.tensors |= tensors
        for name, tensor in tensors.items():
            self._values[_PLACE[name]] = tensor.data_ptr()

    def run(self, part: str, kernel: int, tasks: int) -> None:
        """Do all tasks of a kernel."""
        real = np.float64 if self.tensors["x"].dtype == torch.float64 else np.float32
        entry = compiled(part, real)
        threads = min(torch.get_num_threads(), tasks)
        record = ctypes.create_string_buffer(_COUNTERS + _LINE * threads)
        address = ctypes.addressof(record)
        self._values[: len(_OF_A_RUN)] = address + _COUNTERS, threads, _openmp().thread_number, kernel, tasks
        _PACK(record, 0, *self._values)
        run_in_threads(entry, address, threads)


@njit(**COMPILED)
def tasks_of(call):
    """The tasks that a thread does: those of its share that nobody has taken, then those of the other shares."""
    own = call_for_number(call.thread_number) if call.thread_number else 0
    for turn in range(call.threads):
        share = (own + turn) % call.threads
        first, last = share * call.tasks // call.threads, (share + 1) * call.tasks // call.threads
        task = first + fetch_add(call.counters + _LINE * share)
        while task < last:
            yield task
            task = first + fetch_add(call.counters + _LINE * share)


def _forward_entry(real: Any, sources: int) -> Callable[[Any], None]:
    def forward_tasks(pointer):
        call = carray(pointer, 1)[0]
        zero = real(sources * 0)
        for task in tasks_of(call):
            if call.kernel == ARRANGE:
                arrange_kernel(call, task, zero)
            elif call.kernel == PROJECT:
                project_kernel(call, task, zero)
            else:
                scan_kernel(call, task, zero)

    return forward_tasks


def _backward_entry(real: Any, sources: int) -> Callable[[Any], None]:
    def backward_tasks(pointer):
        call = carray(pointer, 1)[0]
        zero = real(sources * 0)
        for task in tasks_of(call):
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
        for task in tasks_of(call):
            if call.kernel == DEPTHWISE:
                depthwise_kernel(call, task, zero)
            elif call.kernel == BATCH_NORM:
                batch_norm_kernel(call, task, zero)
            elif call.kernel == NORM:
                norm_kernel(call, task, zero)
            elif call.kernel == SQUEEZE:
                squeeze_kernel(call, task, zero)
            elif call.kernel == EXCITE:
                excite_kernel(call, task, zero)
            elif call.kernel == GATED_SUM:
                gated_sum_kernel(call, task, zero)
            elif call.kernel == CHANNEL_SUMS:
                channel_sums_kernel(call, task, zero)
            elif call.kernel == HIDDEN:
                hidden_kernel(call, task, zero)
            else:
                excited_kernel(call, task, zero)

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
    elif (parallel := _openmp().parallel) is not None:
        parallel(entry, record, threads, 0)
    else:
        pool = _pool(threads - 1)
        others = [pool.submit(_FUNCTION(entry), record) for _ in range(threads - 1)]
        _FUNCTION(entry)(record)
        wait(others)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMP(NamedTuple):
    parallel: Any  # GOMP_parallel, by which compiled programs start a parallel region; or None
    thread_number: int  # address of omp_get_thread_num, or 0


@cache
def _openmp() -> _OpenMP:
    """The OpenMP that PyTorch runs on.

    Its threads go on looking for work for milliseconds after PyTorch's last operation: others beside them would share
    their cores.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel, number = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return _OpenMP(None, 0)
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return _OpenMP(parallel, ctypes.cast(number, ctypes.c_void_p).value or 0)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="evmamba-scan")

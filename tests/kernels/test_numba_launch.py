"""Compiling, keeping and starting the CPU kernels: caches, processes, threads, and what torch does around them."""

import ctypes
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from numba import njit

from evmamba.kernels import es2d_scan, numba_es2d, numba_launch

SCAN = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from evmamba.kernels import es2d_scan
torch.manual_seed(0)
K, D, N, R = 4, 16, 4, 2
shapes = [(2, 6, 5, D), (K, R + 2 * N, D), (K, D, R), (K, D), (K * D, N), (K * D,)]
inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
y = es2d_scan(*inputs)
"""


@pytest.fixture
def inputs(make_inputs):
    return make_inputs(2, 20, 20, 32, 8, 2)


def run_python(code, **environment):
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_compiling_is_announced_once_and_kept_on_disk(tmp_path):
    code = SCAN + "y.sum().backward()\n"
    announced = [
        "compiling the CPU's forward kernels for float32",
        "compiling the CPU's backward kernels for float32",
    ]
    first = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert [line for line in first if line.startswith("compiling")] == announced
    assert [path.suffix for path in tmp_path.rglob("*.nbi")] == [".nbi"] * 2
    again = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert not any(line.startswith("compiling") for line in again)


def test_a_cache_that_cannot_be_written_costs_only_the_compilation(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    only_there = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": str(tmp_path / "file")}
    lines = run_python(SCAN + "print(y.isfinite().all().item())", **only_there)
    assert lines[-1] == "True"
    assert any(line.startswith("compiled kernels cannot be kept on disk") for line in lines)


def test_without_its_compiler_the_pytorch_backend_scans_and_the_log_says_why():
    lines = run_python(SCAN + "es2d_scan(*inputs); print(y.isfinite().all().item())", NUMBA_DISABLE_JIT="1")
    assert lines == [
        "scan backend for torch.float32 on cpu: torch, because NUMBA_DISABLE_JIT switches its compiler off",
        "True",
    ]


def test_without_numba_the_pytorch_backend_scans_and_the_log_says_how_to_get_it():
    hidden = "import sys; sys.modules['numba'] = None\n"
    lines = run_python(hidden + SCAN)
    assert len(lines) == 1
    assert lines[0].startswith("scan backend for torch.float32 on cpu: torch, because numba cannot be imported")
    assert "pip install 'evmamba[cpu]'" in lines[0]


def test_importing_the_library_does_not_import_numba():
    assert run_python("import sys, evmamba.kernels; print('numba' in sys.modules)") == ["False"]


def test_threads_that_call_at_once_get_what_one_gets(inputs):
    expected, _ = numba_es2d.forward(*inputs, "es2d", save=False)
    different = []

    def scan():
        for _ in range(20):
            y, _ = numba_es2d.forward(*inputs, "es2d", save=False)
            if not torch.equal(y, expected):
                different.append(y)

    threads = [threading.Thread(target=scan) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not different


def test_the_compiler_is_asked_once_by_threads_that_come_together(monkeypatch):
    asked = []

    class Entry:
        address = 1

    def slow(signature, **options):
        asked.append(options)
        time.sleep(0.1)
        return lambda function: Entry

    monkeypatch.setattr(numba_launch, "cfunc", slow)
    numba_launch._compiled.cache_clear()
    try:
        threads = [threading.Thread(target=numba_launch.compiled, args=("forward", float)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        numba_launch._compiled.cache_clear()
    assert len(asked) == 1


def send_scan(inputs, queue):
    torch.set_num_threads(1)  # as the workers of a DataLoader do: a fork of OpenMP's threads would wait forever
    queue.put(numba_es2d.forward(*inputs, "es2d", save=False)[0].numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_are_started_after_a_scan_can_scan(inputs, method):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected, _ = numba_es2d.forward(*inputs, "es2d", save=False)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=send_scan, args=(inputs, queue))
        process.start()
        y = torch.from_numpy(queue.get(timeout=120))
        process.join(60)
    finally:
        torch.set_num_threads(before)
    assert process.exitcode == 0
    assert torch.equal(y, expected)


def test_python_threads_do_what_openmp_does(inputs, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected, _ = numba_es2d.forward(*inputs, "es2d", save=False)
        monkeypatch.setattr(numba_launch, "_openmp", lambda: numba_launch._OpenMP(None, 0))
        y, _ = numba_es2d.forward(*inputs, "es2d", save=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch has another runtime")
def test_on_linux_the_threads_are_those_of_pytorch():
    openmp = numba_launch._openmp()
    assert openmp.parallel is not None
    assert openmp.thread_number != 0


@pytest.mark.parametrize(("thread", "expected"), [(0, [0, 1, 2, 3, 4, 5, 6]), (1, [2, 3, 4, 5, 6, 0, 1])])
def test_a_thread_does_its_own_share_first_and_then_what_the_others_left(thread, expected):
    number = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: thread)
    record = np.zeros(1, numba_launch.RECORD)
    counters = np.zeros(8 * 3, np.int64)
    record["threads"], record["tasks"], record["counters"] = 3, 7, counters.ctypes.data
    record["thread_number"] = ctypes.cast(number, ctypes.c_void_p).value
    assert done(record) == expected
    assert done(record) == []

    counters[:] = 0
    counters[8] = 2  # of share 1, tasks 2 and 3: somebody has both
    assert done(record) == [task for task in expected if task not in (2, 3)]


@njit
def tasks_done(records):
    tasks = [-1]
    for task in numba_launch.tasks_of(records[0]):
        tasks.append(task)
    return tasks[1:]


def done(record):
    return list(tasks_done(record))


def test_scans_in_inference_mode_are_kept_for_training_afterwards(make_inputs):
    inputs = make_inputs(1, 9, 7, 16, 4, 2)
    with torch.inference_mode():
        inside = es2d_scan(*inputs)
    leaf = inputs[0].clone().requires_grad_()
    y = es2d_scan(leaf, *inputs[1:])
    y.sum().backward()
    assert torch.equal(y, inside)


def test_the_announcement_names_what_is_compiled_once(caplog):
    announcement = numba_launch._Announcement("forward", float)
    with caplog.at_level(logging.INFO, logger="evmamba.kernels.numba_launch"):
        announcement.on_start(None)
        announcement.on_start(None)
    assert [record.getMessage() for record in caplog.records] == ["compiling the CPU's forward kernels for float"]


FAULTS = """
import resource, torch
from evmamba import create_model
model, image = create_model("efficientvmamba_t").eval(), torch.rand(1, 3, 224, 224)
with torch.inference_mode():
    for _ in range(5):
        model(image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        model(image)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_passes_do_not_ask_the_operating_system_for_their_memory_again():
    told = ("MALLOC_", "EVMAMBA_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 200  # pages; without it 2500

"""Errors of one process among several, told by the process that has them, and those that are the machine's."""

import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from evmamba.errors import UserError
from evmamba.launch.fit import failures
from evmamba.launch.fit.failures import lost_process, machine_error, reported_once


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19358. This is ...",
        "[../gloo/transport/tcp/pair.cc:544] Read error [127.0.0.1]:1: Connection reset by peer",
        "recvValue failed on SocketImpl(fd=64): Connection reset by peer",
    ],
)
def test_a_lost_connection_is_one_line_that_points_to_the_other_process(said: str):
    error = lost_process(RuntimeError(said))
    assert str(error).startswith("rank 0 on ")
    assert "\n" not in str(error)
    assert "gloo" not in str(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ConnectionResetError("Connection reset by peer")]
)
def test_other_errors_are_not_taken_for_a_lost_process(error: Exception):
    assert lost_process(error) is None
    with pytest.raises(type(error), match=str(error)), reported_once():
        raise error


class Fatal(Dataset):
    """Images whose loading ends as `how` says."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.how == "python":
            raise MemoryError
        if self.how == "torch":
            return torch.empty(1 << 45)
        os.kill(os.getpid(), getattr(signal, self.how))
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("SIGKILL", r"a process that loads images \(pid \d+\) was killed by signal: Killed; .*num_workers"),
        ("SIGBUS", r"no room in /dev/shm.*--shm-size.*num_workers"),
        ("python", r"no memory left on this machine \(MemoryError\).*num_workers"),
        ("torch", r"no memory left on this machine \(can't allocate memory\).*num_workers"),
    ],
)
def test_a_loading_process_without_memory_is_one_line_with_the_way_out(how: str, line: str):
    loading = iter(DataLoader(Fatal(how), num_workers=1))
    with pytest.raises(UserError, match=rf"^{line}[^\n]*$"), reported_once():
        next(loading)
    assert multiprocessing.active_children() == []  # as they outlive signals, the training would wait for them


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),  # of a fork
        RuntimeError("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 256. TiB for an array"),
        BrokenProcessPool("A process in the process pool was terminated abruptly while the future was running"),
    ],
)
def test_other_ways_to_say_that_memory_is_lacking(error: Exception):
    assert "memory" in str(machine_error(error))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)",
            "no room in /dev",
        ),
        ("unable to resize file </torch_1_2_0> to the right size: File too large (27)", "no room in /dev/shm"),
        (
            "unable to open shared memory object </torch_1_2_0> in read-write mode: Too many open files (24)",
            "ulimit -n",
        ),
    ],
)
def test_shared_memory_that_is_full_or_cannot_be_opened(said: str, line: str):
    assert line in str(machine_error(RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{said}\n")))


def test_a_mistake_that_only_another_rank_has_says_which(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(UserError, match=r"^rank 3 on n7: no such folder$"), reported_once():
        raise UserError("no such folder")
    assert waited == [failures.PATIENCE_SECONDS]  # so that rank 0 can tell it first, if it has it too


def test_rank_0_speaks_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: pytest.fail("rank 0 waits"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^no such folder$"), reported_once():
        raise UserError("no such folder")

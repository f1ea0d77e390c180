"""What a cluster does, tried by a job: ``srun python -m evmamba.launch.cluster.check_job FOLDER``, one process per GPU.

Every process writes what it found into ``FOLDER/answers``. They share a folder, a lock, a meeting point, and the
signal before the time limit; then the job has itself queued again, and its second start notes that it was.
`evmamba.launch.cluster.check` reads the answers.
"""

import contextlib
import datetime
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from evmamba.errors import UserError, first_line
from evmamba.files import write_text
from evmamba.launch.fit.launchers import find_launch, node_name, process_rank, set_topology
from evmamba.processor import usable_cores
from evmamba.tasks.training import slurm_job

ANSWERS_FOLDER = "answers"
REQUEUED_FILE = "requeued.json"
# How long processes wait for what another of them does; file systems may show a new file half a minute late.
SHARED_SECONDS = 60
MEETING_SECONDS = 20
# The time limit of `check` minus what came before; SLURM ends the job if its signal does not come.
SIGNAL_SECONDS = 150
# Of a message whose transfer is timed: float32, 16 MB.
ELEMENTS = 4 * 2**20
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# Beginnings of names of interfaces that lead to no other node (containers, virtual machines), and of fast networks'.
INWARD = ("docker", "virbr", "veth", "br-", "cni", "podman", "lxc", "lxd", "tun", "tap")
FAST = ("ib", "hsn", "roce")
# Interfaces that are tried by name; one that leads nowhere takes MEETING_SECONDS of the job's.
MOST_INTERFACES = 3


@dataclass
class Meeting:
    """How processes found each other through one interface.

    Attributes:
        interface: its name; "" for the one that gloo finds.
        error: why they did not; "" if they did.
        gb_per_s: bytes of a 16 MB all-reduce per second.
    """

    interface: str
    error: str = ""
    gb_per_s: float = 0.0


@dataclass
class Answers:
    """What one process found.

    Attributes:
        rank, node, cpus: its number, its machine, the cores that it may use.
        gpus: that it sees.
        processes, per_node, nodes: how many were started.
        has_scontrol: whether a run could have its job queued again by itself; else the job's script does.
        shared_s: until it saw a file of every other process in the folder; None: it did not.
        locked: whether a lock that rank 0 holds kept it out; None for rank 0, or where nothing could be tried.
        interfaces: of this machine, with an address, besides loopback and those of containers and virtual machines.
        meetings: see `Meeting`.
        signal_s: from its start to SLURM's signal; None: it did not come.
        requeue: rank 0: what the request was answered.
        error: what ended it early.
    """

    rank: int
    node: str
    cpus: int
    gpus: int = 0
    processes: int = 1
    per_node: int = 1
    nodes: int = 1
    has_scontrol: bool = False
    shared_s: float | None = None
    locked: bool | None = None
    interfaces: list[str] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    signal_s: float | None = None
    requeue: bool | None = None
    error: str = ""

    def write(self, folder: Path) -> None:
        write_text(folder / ANSWERS_FOLDER / f"{self.rank}.json", json.dumps(asdict(self)))


def try_everything(answers: Answers, folder: Path) -> None:
    """Fill in the answers, as far as it comes.

    Raises:
        UserError, OSError: of what cannot be tried.
    """
    import torch

    launch = find_launch()
    answers.gpus = torch.cuda.device_count()
    answers.has_scontrol = slurm_job.has_scontrol()
    if launch is not None:
        answers.nodes, answers.per_node = launch.nodes, launch.per_node
        answers.processes = launch.nodes * launch.per_node
    answers.interfaces = _interfaces()
    answers.write(folder)
    started = time.monotonic()
    others = [folder / ANSWERS_FOLDER / f"{rank}.json" for rank in range(answers.processes)]
    if not _wait(lambda: all(path.exists() for path in others), SHARED_SECONDS):
        answers.error = "does not see the files of all others in the folder"
        return
    answers.shared_s = round(time.monotonic() - started, 1)
    answers.locked = _is_locked_out(folder, answers.rank, answers.processes)
    answers.write(folder)
    set_topology(SimpleNamespace(devices="auto", num_nodes=1, accelerator="auto", strategy="auto", precision=None))
    common = set.intersection(*(set(json.loads(path.read_text())["interfaces"]) for path in others))
    given = os.environ.get(INTERFACES[0])
    for number, interface in enumerate([given] if given else ["", *_to_try(common)]):
        if answers.signal_s is not None:
            break  # the job's time is over
        answers.meetings.append(_meet(interface, int(os.environ.get("MASTER_PORT", "29500")) + number, answers))
        answers.write(folder)
    _wait(lambda: answers.signal_s is not None, SIGNAL_SECONDS)


def _interfaces() -> list[str]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addressed = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.family == socket.AF_INET and not address.address.startswith("127.") for address in addresses)
    }
    return sorted(name for name in up & addressed if not name.startswith(INWARD))


def _to_try(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.startswith(FAST), name))[:MOST_INTERFACES]


def _wait(reached: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _is_locked_out(folder: Path, rank: int, processes: int) -> bool | None:
    """Whether the lock that rank 0 takes on a file holds for this process."""
    import fcntl  # not where jobs are submitted from, which may be no Linux

    taken = folder / "lock-taken"
    tried = [folder / f"lock-tried-{other}" for other in range(1, processes)]
    with (folder / "lock").open("a") as file:
        if rank == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
            taken.touch()
            _wait(lambda: all(path.exists() for path in tried), SHARED_SECONDS)
            return None
        if not _wait(taken.exists, SHARED_SECONDS):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        else:
            return False
        finally:
            tried[rank - 1].touch()


def _meet(interface: str, port: int, answers: Answers) -> Meeting:
    """Let all processes meet through an interface and time what they send each other."""
    import torch
    import torch.distributed as dist

    with _environment({name: interface for name in INTERFACES if interface} | {"MASTER_PORT": str(port)}):
        try:
            dist.init_process_group(
                "gloo",
                rank=answers.rank,
                world_size=answers.processes,
                timeout=datetime.timedelta(seconds=MEETING_SECONDS),
            )
            message = torch.ones(ELEMENTS)
            dist.all_reduce(message)
            started = time.monotonic()
            dist.all_reduce(message)
            seconds = time.monotonic() - started
            if message[0] != answers.processes**2:
                return Meeting(interface, "the sum of all processes was wrong")
            return Meeting(interface, gb_per_s=round(4 * ELEMENTS / seconds / 1e9, 2))
        except (RuntimeError, ValueError) as error:
            return Meeting(interface, first_line(error)[:200])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    rank = process_rank()
    answers = Answers(rank, node_name(), usable_cores())

    def note(*_: Any) -> None:
        if answers.signal_s is None:
            answers.signal_s = round(time.monotonic() - began, 1)

    signal.signal(signal.SIGUSR1, note)
    if slurm_job.restarts() > 0:
        if rank == 0:
            write_text(folder / REQUEUED_FILE, json.dumps({"restarts": slurm_job.restarts()}))
        return 0
    try:
        try_everything(answers, folder)
    except (UserError, OSError) as error:
        answers.error = " ".join(str(error).split())
    answers.write(folder)
    done = [folder / f"done-{other}" for other in range(answers.processes)]
    done[rank if rank < len(done) else 0].touch()
    _wait(lambda: all(path.exists() for path in done), SHARED_SECONDS)  # as soon as one has left, srun ends the others
    if rank == 0:
        answers.requeue = slurm_job.requeue()
        answers.write(folder)
    time.sleep(2)
    return os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())

"""A run's folder has one owner: the start that claimed it last. Results, checkpoints and logs are written by it alone.

The owner is named in ``owner.json``: a token, who it is, since when. Rank 0 claims the folder before it reads anything
there. An owner that lives is left alone and the second start refused; one that has ended, has died, or is an earlier
start of the same SLURM job gives way. Whoever lost the folder meanwhile (a process on a node that the scheduler took
for lost, say) finds another token there before its next write, and ends.

File locks are no help here: over network file systems they are unreliable, and they die with the machine, not with the
job. This needs no more than a rename that replaces a file at once, and a file that is read anew when it is opened.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from evmamba.errors import UserError, printable
from evmamba.files import remove_unfinished, write_text
from evmamba.tasks.plain_files import read_json
from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.heartbeat import FOLDER, Heartbeat, beats

OWNER_FILE = "owner.json"
# Processes that Lightning starts from this one inherit it, and are of the same start.
TOKEN_VARIABLE = "EVMAMBA_LEASE"
# An owner on another machine without a sign of life for so long is dead.
SILENT_SECONDS = 60.0
# How often, and how many seconds apart, an owner that cannot be read is looked for again.
LOOKS, SECONDS_BETWEEN = 5, 0.5
# So many starts in a row without a new step, and the job is not queued again.
MAX_IDLE_STARTS = 3


class LeaseLost(UserError):
    """The folder belongs to another start by now; this process must not write there."""


@dataclass(frozen=True)
class Owner:
    """Who writes in a folder.

    Attributes:
        token: of its own, for every start.
        host: its machine, as people call it.
        machine: where `pid` means something: the machine's boot and the container.
        pid: rank 0's process.
        born: when that process began [s since the machine did], which tells it from a later one of the same number.
        start: what started it, see `start_of`.
        since: when it claimed the folder, ISO 8601.
        idle_starts: how many starts before it, in a row, saved no new step.
        advanced: it has saved one.
        released: it has ended in order.
    """

    token: str
    host: str
    machine: str
    pid: int
    born: float
    start: str | None
    since: str
    idle_starts: int = 0
    advanced: bool = False
    released: bool = False

    def __str__(self) -> str:
        job = f" (job {_job(self.start)})" if self.start else ""
        return printable(f"process {self.pid} on {self.host}{job}, since {self.since}")


@dataclass
class Lease:
    """What a process of the owner holds.

    Attributes:
        folder: the run's.
        token: the owner's.
        heartbeat: its sign of life.
    """

    folder: Path
    token: str
    heartbeat: Heartbeat
    _advanced: bool = False

    def check(self) -> None:
        """See that the folder is still this start's.

        Raises:
            LeaseLost: it is not.
        """
        owner = read_owner(self.folder)
        for _ in range(LOOKS):
            if owner is not None:
                break
            time.sleep(SECONDS_BETWEEN)  # a network file system has its moments
            owner = read_owner(self.folder)
        if owner is None or owner.token != self.token:
            now = "nobody's" if owner is None else f"that of {owner}"
            raise LeaseLost(
                f"{self.folder} was taken over from this process (pid {os.getpid()}) and is {now} now; this process "
                "ends and writes nothing more there"
            )

    def advance(self) -> None:
        """Note that this start has saved a new step, or has something to do that has no steps."""
        owner = None if self._advanced else read_owner(self.folder)
        if owner is not None and owner.token == self.token:
            self._advanced = True
            _write(self.folder, dataclasses.replace(owner, advanced=True))


# The folders that this process holds.
_held: dict[Path, Lease] = {}


def claim(folder: Path, rank: int = 0) -> Lease:
    """Become the owner of a folder, which is made if need be; a second call in the same process returns the first's.

    Files that killed processes had begun there are removed.

    An owner on this machine is looked for among its processes. One elsewhere is watched for a minute at most: nothing
    but a change of its heartbeat tells that it lives, so no clocks are compared.

    Raises:
        UserError: it has one that lives.
    """
    folder = folder.resolve()
    if folder in _held:
        return _held[folder]
    before = check_free(folder)
    token = secrets.token_hex(8)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    idle = 0 if before is None or before.advanced else before.idle_starts + 1
    mine = Owner(token, host_name(), machine(), os.getpid(), _born(os.getpid()) or 0.0, start_of(), now, idle)
    _write(folder, mine)
    after = read_owner(folder)
    if after is None or after.token != token:  # two starts at the same moment: the last one stays
        raise UserError(_refusal(folder, after or mine))
    remove_unfinished(folder, keep=folder / OWNER_FILE)  # a third start may be claiming it
    remove_unfinished(folder / FOLDER)
    os.environ[TOKEN_VARIABLE] = token
    return _hold(folder, token, rank)


def check_free(folder: Path) -> Owner | None:
    """See that nobody is at work in a folder; return who was.

    Raises:
        UserError: somebody is.
    """
    owner = read_owner(folder)
    if owner is not None and _is_alive(folder, owner):
        raise UserError(_refusal(folder, owner))
    return owner


def adopt(folder: Path, token: str, rank: int) -> Lease:
    """Take part, as another process of the start that owns the folder."""
    folder = folder.resolve()
    return _held.get(folder) or _hold(folder, token, rank)


def _hold(folder: Path, token: str, rank: int) -> Lease:
    def is_ours() -> bool:
        owner = read_owner(folder)
        return owner is None or owner.token == token

    heartbeat = Heartbeat(folder, token, rank, host_name(), machine(), is_ours)
    _held[folder] = Lease(folder, token, heartbeat)
    heartbeat.start()
    return _held[folder]


def release() -> None:
    """Give back all that this process holds: the next start need not wait to see whether it lives."""
    for folder, lease in list(_held.items()):
        lease.heartbeat.stop()
        owner = read_owner(folder)
        if lease.heartbeat.rank == 0 and owner is not None and owner.token == lease.token:
            with contextlib.suppress(UserError):  # a full disk; the next start then looks for the process
                _write(folder, dataclasses.replace(owner, released=True))
        del _held[folder]
    os.environ.pop(TOKEN_VARIABLE, None)


def held(path: Path) -> Lease | None:
    """The lease of this process on a folder, or on one that a path lies in."""
    if not _held:
        return None
    path = path.resolve()
    return next((_held[folder] for folder in (path, *path.parents) if folder in _held), None)


def guard(path: Path) -> None:
    """To be called before a file in a run's folder is written or replaced; without a lease on it nothing happens.

    Raises:
        LeaseLost: this process has lost the folder.
    """
    lease = held(path)
    if lease is not None:
        lease.check()


def is_ours(folder: Path) -> bool:
    """Whether a process that fails may say so in the folder: it is of the start that owns it, or of a later one."""
    owner, lease, mine = read_owner(folder), held(folder), start_of()
    token = lease.token if lease is not None else os.environ.get(TOKEN_VARIABLE)
    if owner is None or token is not None:
        return owner is None or owner.token == token
    if owner.start is None or mine is None:
        return owner.released
    return mine == owner.start or _is_later(mine, owner.start)


def is_hopeless() -> bool:
    """Whether this run was started so often without saving a new step that another start would do no better."""
    owners = [read_owner(lease.folder) for lease in _held.values()]
    return any(o is not None and o.idle_starts >= MAX_IDLE_STARTS - 1 and not o.advanced for o in owners)


def read_owner(folder: Path) -> Owner | None:
    """The owner of a folder; None where there is none, or none that can be read."""
    try:
        return msgspec.convert(read_json(folder / OWNER_FILE), Owner)
    except (UserError, msgspec.ValidationError):
        return None


def start_of(environment: Mapping[str, str] = os.environ) -> str | None:
    """What tells one start of a run's processes from the next: SLURM's job and its number of restarts, or torchrun's;
    None where nothing but this process knows."""
    if job := slurm_job.job_id(environment):
        return f"{job}.{slurm_job.restarts(environment)}"
    if run := environment.get("TORCHELASTIC_RUN_ID"):
        meeting = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
        return f"{run}@{meeting}.{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return None


def host_name() -> str:
    """This machine as SLURM calls it, else as it calls itself."""
    return slurm_job.node() or socket.gethostname()


def _job(start: str) -> str:
    return start.rpartition(".")[0]


def _is_later(start: str, other: str) -> bool:
    """Whether a start is a later one of the same job, or of a job that SLURM numbered later."""
    (job, _, count), (other_job, _, other_count) = start.rpartition("."), other.rpartition(".")
    if job == other_job:
        return int(count) > int(other_count)
    return job.isdecimal() and other_job.isdecimal() and int(job) > int(other_job)


def _is_alive(folder: Path, owner: Owner) -> bool:
    if owner.released or (owner.machine == machine() and owner.pid == os.getpid()):
        return False
    mine = start_of()
    if mine and owner.start and _job(mine) == _job(owner.start) and _is_later(mine, owner.start):
        return False  # the scheduler has ended that start, whatever is left of it
    if owner.machine == machine():
        born = _born(owner.pid)
        return born is not None and abs(born - owner.born) < 10
    first = beats(folder, owner.token)
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        now = read_owner(folder)
        if now is None or now.released:
            return False
        if now.token != owner.token or beats(folder, owner.token) != first:
            return True
    return False


def _refusal(folder: Path, owner: Owner) -> str:
    number = _job(owner.start) if owner.start else ""
    end = f"scancel {number}" if number.isdecimal() else f"kill {owner.pid}"
    return (
        f"{folder} is at work already: {owner}; wait for it, end it there ({end}), or use another folder "
        f"(--trainer.default_root_dir, --output); if it is dead for certain: rm {folder / OWNER_FILE}"
    )


def _write(folder: Path, owner: Owner) -> None:
    write_text(folder / OWNER_FILE, json.dumps(asdict(owner), indent=1) + "\n")


def _born(pid: int) -> float | None:
    """When a process began [s]; None for one that has ended.

    Counted from the start of the machine, where that is known: what counts from 1970 changes when the clock is set.
    """
    import psutil  # not needed to read who the owner is

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except psutil.Error:
        return None
    except (FileNotFoundError, ProcessLookupError):  # no Linux, or it has just ended
        return process.create_time()


@functools.cache
def machine() -> str:
    """A name for where process numbers mean something: this boot of this machine, and the container's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return socket.gethostname()

"""What is told of a failure: one line where it is the machine's, and of several processes' once, by the first."""

import contextlib
import errno
import multiprocessing
import re
import time
from collections.abc import Iterator

import psutil

from evmamba.errors import UserError
from evmamba.launch.fit.held_signals import deliver_signals
from evmamba.launch.fit.launchers import node_name, process_rank
from evmamba.tasks.training.helpers import end_helpers

# By then rank 0 has told what went wrong everywhere, and its launcher (srun, torchrun, Lightning) has ended the others.
PATIENCE_SECONDS = 5.0
# How gloo and torch's store say that the other end is gone.
LOST = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection was likely closed")
# A full disk, a quota, a limit of a file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch says that there is no room in /dev/shm, where loading processes leave their batches; writing there to memory
# that the system then cannot give is a bus error.
NO_SHARED_MEMORY = re.compile(r"file </torch_\d[^\n]*(?:No space left|too large|allocate)|killed by signal: Bus error")
TOO_MANY_FILES = "Too many open files"
# numpy, Python, the system, torch.
NO_MEMORY = re.compile(r"Unable to allocate [\d.]+ \wiB|MemoryError|[Cc]an(?:'t|not) allocate memory")
# How torch and Python say that a process that loads or reads images has ended.
HELPER_ENDED = re.compile(
    r"worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*)|exited)|pool was terminated abruptly"
)


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Hold an error of the block until it is this process's turn to tell it; the caller prints it then.

    A mistake in a recipe fails every process alike: rank 0 tells it, the others wait to be ended and speak only if they
    are still there, because the error is their own. Meanwhile their connections stay open, so that nobody complains
    about those. Processes that Lightning started from this one are ended, lest they wait for it, and those that load
    images, which obey no other signal and would keep this one from its end.

    Raises:
        UserError: one of the block, or `machine_error`'s, with the rank if that is not 0; `lost_process`'s in place of
            an error that only says that another process is gone.
    """
    try:
        yield
    except Exception as error:
        deliver_signals()  # of whoever ends the others
        if process_rank() > 0:
            time.sleep(PATIENCE_SECONDS)
        _end_children()
        end_helpers(multiprocessing.active_children())
        if (lost := lost_process(error)) is not None:
            raise lost from error
        known = error if isinstance(error, UserError) else machine_error(error)
        if known is not None and process_rank() > 0:
            raise UserError(f"rank {process_rank()} on {node_name()}: {known}") from error
        if known is None or known is error:
            raise
        raise known from error


def lost_process(error: BaseException) -> UserError | None:
    """One line for an error that only says that another process is gone; None for any other error."""
    said = LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if said is None:
        return None
    return UserError(
        f"rank {process_rank()} on {node_name()} lost another process of this run ({said[0]}); that one says why, "
        "unless it was killed: by the system for its memory, by the scheduler, or with its node"
    )


def machine_error(error: BaseException) -> UserError | None:
    """One line for an error that is the machine's and nobody's mistake; None for any other.

    It lacks memory, shared memory, open files or room on a disk, or it has ended one of the processes that load images.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return UserError(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
    if not isinstance(error, RuntimeError | MemoryError | OSError):
        return None
    said = _said(error)
    ended = HELPER_ENDED.search(said)
    if NO_SHARED_MEMORY.search(said):
        return UserError(
            "no room in /dev/shm, where loading processes leave their batches: make it larger (docker run "
            "--shm-size=8g), or use fewer of them (data.init_args.num_workers; 0 needs no shared memory)"
        )
    if TOO_MANY_FILES in said:
        return UserError(
            f"{TOO_MANY_FILES}: raise the limit (ulimit -n 65536), or use fewer loading processes "
            "(data.init_args.num_workers)"
        )
    if ended is not None:
        how = f"was killed by signal: {ended[2]}" if ended[2] else "has ended unasked"
        return UserError(
            f"a process that loads images{f' (pid {ended[1]})' if ended[1] else ''} {how}; if by the system for "
            "its memory: give the job more, or use fewer of them (data.init_args.num_workers; with 0 the training "
            "loads them itself)"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(said):
        found = NO_MEMORY.search(said)
        return UserError(
            f"no memory left on this machine ({found[0] if found else 'MemoryError'}): give the job more, or lower the "
            "batch size and the number of loading processes (data.init_args.num_workers)"
        )
    return None


def is_machines(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is the machine's: started again when that is mended, the run goes on."""
    while error is not None:
        if machine_error(error) is not None:
            return True
        error = error.__cause__
    return False


def _said(error: BaseException | None) -> str:
    """What the errors behind an error say, and then itself."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(reversed(texts))


def _end_children() -> None:
    for child in psutil.Process().children():
        try:
            if child.environ().get("LOCAL_RANK", "0") != "0":
                child.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue

"""When one of several processes fails: its own message comes first, once, and the others do not linger."""

import contextlib
import re
import time
from collections.abc import Iterator

import psutil

from evmamba.errors import UserError
from evmamba.launch.fit.held_signals import deliver_signals
from evmamba.launch.fit.launchers import node_name, process_rank

# By then rank 0 has told what went wrong everywhere, and its launcher (srun, torchrun, Lightning) has ended the others.
PATIENCE_SECONDS = 5.0
# How gloo and torch's store say that the other end is gone.
LOST = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection was likely closed")


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Hold an error of the block until it is this process's turn to tell it; the caller prints it then.

    A mistake in a recipe fails every process alike: rank 0 tells it, the others wait to be ended and speak only if they
    are still there, because the error is their own. Meanwhile their connections stay open, so that nobody complains
    about those. Processes that Lightning started from this one are ended, lest they wait for it.

    Raises:
        UserError: one of the block, with the rank if that is not 0, or `lost_process`'s in place of an error that only
            says that another process is gone.
    """
    try:
        yield
    except Exception as error:
        deliver_signals()  # of whoever ends the others
        if process_rank() > 0:
            time.sleep(PATIENCE_SECONDS)
        _end_children()
        if (lost := lost_process(error)) is not None:
            raise lost from error
        if isinstance(error, UserError) and process_rank() > 0:
            raise UserError(f"rank {process_rank()} on {node_name()}: {error}") from error
        raise


def lost_process(error: BaseException) -> UserError | None:
    """One line for an error that only says that another process is gone; None for any other error."""
    said = LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if said is None:
        return None
    return UserError(
        f"rank {process_rank()} on {node_name()} lost another process of this run ({said[0]}); that one says why, "
        "unless it was killed: by the system for its memory, by the scheduler, or with its node"
    )


def _end_children() -> None:
    for child in psutil.Process().children():
        try:
            if child.environ().get("LOCAL_RANK", "0") != "0":
                child.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue

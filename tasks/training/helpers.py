"""Processes that help this one, as those that load images: how they end with it."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

# Seconds in which they may end by themselves when this process does.
PATIENCE = 1.0
# Of what `multiprocessing` does at a process's exit: after its pools have ended (15), before it waits for daemons.
AFTER_POOLS = 0


def end_loaders_at_exit() -> None:
    """Have this process's exit end its loading processes.

    Python's own way is SIGTERM, which they ignore, and waiting: an error that nobody catches keeps a loader and its
    processes until then, and this one would never end.
    """
    _end_loaders_at_exit_of(os.getpid())


@functools.cache
def _end_loaders_at_exit_of(process: int) -> None:
    """Once in each: forked ones inherit the cache, but nothing of what is to be done at the exit."""
    Finalize(None, _end_daemons, exitpriority=AFTER_POOLS)


def _end_daemons() -> None:
    end_helpers([one for one in multiprocessing.active_children() if one.daemon], PATIENCE)


def end_helpers(helpers: Sequence[BaseProcess], patience: float = 0.0) -> None:
    """End what `multiprocessing` has started; torch, which notices when a loading process dies, is not to tell it.

    Args:
        helpers: this process's.
        patience: seconds that they have to end by SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for helper in helpers:
            helper.terminate()
        end = time.monotonic() + patience
        for helper in helpers:
            helper.join(max(end - time.monotonic(), 0))
    finally:
        for helper in helpers:
            helper.kill()
        for helper in helpers:
            helper.join()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if told is None else told)

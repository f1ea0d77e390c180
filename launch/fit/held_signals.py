"""Signals that come while a process is starting wait until somebody there can obey them.

Libraries take seconds to load. A preemption, or the warning of a short time limit, that came meanwhile would kill the
process, and SLURM would take the job for a failed one. This module imports nothing that takes time.
"""

import signal

HELD = {getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name)}


def hold_signals() -> None:
    """Have the signals wait; the first thing that a training's process does."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def deliver_signals() -> None:
    """Let those that wait come, and later ones at once: handlers are in place, and the run's folder is claimed."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)

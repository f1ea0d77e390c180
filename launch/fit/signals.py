"""What a scheduler's signals do to a run while no training handles them, as `tasks/training/interruption.py` does."""

import multiprocessing
import signal
import sys
import time
from types import FrameType

from evmamba.launch.fit.failures import PATIENCE_SECONDS
from evmamba.launch.fit.launchers import process_rank
from evmamba.tasks.training.interruption import EXIT_CONTINUE, TrainingStopped, is_to_requeue, requeue_job


def requeue_on_signals() -> None:
    """Until a training takes over, and after it: when time is up, leave and have the job queued again."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    if process_rank() == 0:
        requeued = is_to_requeue(number) and requeue_job()
        then = "the job is queued again" if requeued else "the same command continues"
        print(f"stopped by {signal.Signals(number).name} outside of the training; {then}", file=sys.stderr, flush=True)
    elif multiprocessing.parent_process() is None:
        time.sleep(PATIENCE_SECONDS)  # as soon as one process has left, srun kills the others
    raise TrainingStopped(EXIT_CONTINUE)


def ignore_time_limit() -> None:
    """For what begins from its beginning however often it is started: queued again it would end no sooner.

    The time limit is then its end, which `evmamba status` tells. Preempted it is queued again.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)

"""Signals that end a training in order: noted when they come, obeyed by all processes after the same step.

SIGUSR1 is SLURM's warning before the time limit, SIGTERM preemption or `scancel`, SIGINT Ctrl-C. Lightning's own
handlers save in the middle of whatever a process is doing, and call a collective there; these here only take a note.
"""

import logging
import multiprocessing
import os
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.lease import MAX_IDLE_STARTS, is_hopeless

log = logging.getLogger("lightning.pytorch.utilities.rank_zero")

# "Try again later" (75): the training was stopped from outside and the same command continues it.
EXIT_CONTINUE = os.EX_TEMPFAIL
EXIT_CTRL_C = 130
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class TrainingStopped(SystemExit):
    """The training was stopped by a signal and can be continued; ends the process with `code` if nobody catches it."""


class StopSignals(_SignalConnector):
    """Takes the place of Lightning's signal handlers while a training runs.

    Attributes:
        noted: the first signal that came, or None.
    """

    noted: signal.Signals | None = None

    def register_signal_handlers(self) -> None:
        self.noted = None
        self.received_sigterm = False
        if self.trainer.state.fn != TrainerFn.FITTING:
            return  # nothing to save: signals do what they do in any program
        self._original_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            self._register_signal(number, self._note)

    def teardown(self) -> None:
        super().teardown()
        noted, self.noted = self.noted, None
        if noted is not None:
            signal.raise_signal(noted)  # came too late for the training; whatever comes next has to know

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted == number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.noted = self.noted or signal.Signals(number)
        launcher = self.trainer.strategy.launcher
        if launcher is not None and number != signal.SIGINT:  # a terminal sends Ctrl-C to every process itself
            launcher.kill(number)


class Agreement:
    """What any process wants, known to all of them after the same step, at no waiting.

    One asynchronous all-reduce of a few bytes between CPUs is started after every step and read after the next one, so
    a wish is granted one step late. (Lightning's own exchange waits for the GPU in every step; this replaces it.) A
    single process agrees with itself at once.
    """

    def __init__(self, wishes: int) -> None:
        self._wishes = torch.zeros(wishes, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._group: Any = None

    def exchange(self, wishes: list[bool]) -> list[bool]:
        """Say what this process wants; return what some process wanted. Every process calls this after every step."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return wishes
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        agreed = [False] * len(wishes)
        if self._work is not None:
            self._work.wait()
            agreed = self._wishes.bool().tolist()
        self._wishes = torch.tensor(wishes, dtype=torch.int32)
        self._work = dist.all_reduce(self._wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed


def outlive_signals(worker: int = 0) -> None:
    """For a loading process: leave the signals to the process that it loads for, and end when that has ended.

    A scheduler sends them to the whole group. A loader that obeyed would take the batches away that its training needs
    to complete the step and save.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop(trainer: L.Trainer, number: signal.Signals, saved: str) -> None:
    """Leave the training, after asking SLURM to run the job again if its time was over or it is preempted.

    Args:
        trainer: whose fit is running.
        number: the signal.
        saved: what the continuation starts from, for the message.

    Raises:
        TrainingStopped: always; with 130 after Ctrl-C, else `EXIT_CONTINUE`.
    """
    connector = trainer._signal_connector
    if isinstance(connector, StopSignals):
        connector.noted = None  # obeyed
    requeued = trainer.is_global_zero and is_to_requeue(number) and requeue_job()
    trainer.strategy.barrier("requeued")  # as soon as one process has left, srun kills the others
    then = "the job is queued again" if requeued else "the same command continues"
    rank_zero_info(f"stopped by {number.name} at step {trainer.global_step}; {saved}; {then}")
    launcher = trainer.strategy.launcher
    is_child = isinstance(launcher, _SubprocessScriptLauncher) and not launcher.procs and trainer.local_rank > 0
    if is_child and not launcher.cluster_environment.creates_processes_externally:  # type: ignore[union-attr]
        # Lightning's main process would take any other status for a crash and kill all, itself included.
        raise TrainingStopped(0)
    raise TrainingStopped(EXIT_CTRL_C if number == signal.SIGINT else EXIT_CONTINUE)


def is_to_requeue(number: int) -> bool:
    """Whether a signal says that the job's time is over: SLURM's warning, or a SIGTERM that makes room for another."""
    return number == signal.SIGUSR1 or (number == signal.SIGTERM and slurm_job.is_preempted())


def requeue_job() -> bool:
    """Have the job queued again, see `slurm_job.requeue`, unless that was of no use several times.

    False in a loading process, which has the signal and its handler from the one that asks.
    """
    if multiprocessing.parent_process() is not None or slurm_job.job_id() is None:
        return False
    if is_hopeless():
        log.warning(
            f"not queued again: {MAX_IDLE_STARTS} starts in a row saved no new step; see what the log says, give the "
            "job more time, and submit it again"
        )
        return False
    return slurm_job.requeue()

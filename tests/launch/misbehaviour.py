"""A callback that makes one process of a training fail; recipes of tests name it by its path."""

import os
import signal
import subprocess
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from evmamba.errors import UserError

FAILED = "failed-here"


class Misbehave(Callback):
    """Fail at the second step, and leave a file of that moment, FAILED, in the run's folder.

    Args:
        rank: of the process that fails.
        how: "error", "user_error", "killed" without a word, "time_limit" (SLURM's warning, at the job's first start),
            "stopped" (at its second start it hangs in its first step), or "slow": it takes a second for every step.
    """

    def __init__(self, rank: int, how: str) -> None:
        self.rank = rank
        self.how = how

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < 1:
            return
        if self.how == "stopped":
            if os.environ.get("SLURM_RESTART_COUNT") == "1":
                os.kill(os.getpid(), signal.SIGSTOP)
            return
        if self.how == "slow":
            time.sleep(1)
        elif trainer.global_step > 1:
            return
        Path(trainer.default_root_dir, FAILED).touch()
        if self.how == "error":
            raise RuntimeError("this rank's own error")
        if self.how == "user_error":
            raise UserError("this rank's own mistake")
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "time_limit" and "SLURM_RESTART_COUNT" not in os.environ:
            subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)

"""How a training begins is decided by rank 0 and told to all: from which checkpoint, at which step, or not at all.

Over a network file system processes may see different files in the same folder for a while. If each looked for itself,
some would continue and others begin anew, and no error would tell.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from evmamba.errors import UserError, first_few
from evmamba.tasks.training.checkpoint_files import candidates, step_of
from evmamba.tasks.training.interruption import TrainingStopped
from evmamba.tasks.training.lease import Lease, adopt, host_name

# How often, and how many seconds apart, a process looks again for the checkpoint that rank 0 sees.
LOOKS, SECONDS_BETWEEN = 30, 2.0


@dataclass(frozen=True)
class Continuation:
    """How a training begins.

    Attributes:
        checkpoint: from where it continues; None: from the beginning.
        finished: it has reached its limits there already.
        step: optimizer steps taken there.
    """

    checkpoint: Path | None = None
    finished: bool = False
    step: int = 0


class AgreedCheckpoint(_CheckpointConnector):
    """Loads what rank 0 has chosen, whatever this process was told.

    Attributes:
        agreed: rank 0's choice.
    """

    agreed: Continuation

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            checkpoint_path = self.agreed.checkpoint
            wait_for_same_view(Path(self.trainer.default_root_dir), self.agreed)
        super().resume_start(checkpoint_path and str(checkpoint_path), weights_only)


class AgreedStart(Callback):
    """Tells all processes of a training what rank 0 has decided; put it first in the list of callbacks.

    Args:
        lease: of the run's folder, on rank 0; None on the others.
        decided: how it begins, or the error that ends it; None leaves the checkpoint to Lightning. On rank 0; what the
            others say does not count.
        told: is called on every process with what was decided, once that is agreed.
    """

    def __init__(
        self,
        lease: Lease | None,
        decided: Continuation | UserError | None,
        told: Callable[[Continuation | None], None] = lambda begun: None,
    ) -> None:
        self._lease = lease
        self._decided = decided
        self._told = told

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        token = self._lease.token if self._lease is not None else ""
        token, decided = trainer.strategy.broadcast((token, self._decided))
        if isinstance(decided, UserError):
            raise decided
        if token and self._lease is None:
            self._lease = adopt(Path(trainer.default_root_dir), token, trainer.global_rank)
        self._told(decided)
        if decided is not None:
            trainer._checkpoint_connector.__class__ = AgreedCheckpoint
            trainer._checkpoint_connector.agreed = decided  # type: ignore[attr-defined]


class TrainingFinished(TrainingStopped):
    """There is nothing left to train."""


def wait_for_same_view(root: Path, begun: Continuation) -> None:
    """See that every process finds in the run's folder what rank 0 went by: the checkpoint that it chose, or none.

    Those that do not, look again for a minute.

    Raises:
        UserError: on all processes; it names those that find something else.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    expected = begun.step if begun.checkpoint is not None else None
    for look in range(LOOKS):
        if look:
            time.sleep(SECONDS_BETWEEN)
        found: list[tuple[str, int | None]] = [("", None)] * dist.get_world_size()
        dist.all_gather_object(found, (host_name(), _seen(root, begun.checkpoint)))
        if all(step == expected for _, step in found):
            return
    others = [
        f"rank {rank} on {host} finds {'none' if step is None else f'step {step}'}"
        for rank, (host, step) in enumerate(found)
        if step != expected
    ]
    choice = "begins anew" if begun.checkpoint is None else f"continues from {begun.checkpoint.name}, step {begun.step}"
    raise UserError(
        f"rank 0 {choice}, but {first_few(others)} in {root}; all nodes must see the run's folder under the same path "
        "and as it is now (a shared file system, mounted everywhere)"
    )


def _seen(root: Path, checkpoint: Path | None) -> int | None:
    """The step of a checkpoint, or where there should be none, of the newest there is."""
    if checkpoint is not None:
        return step_of(checkpoint)
    return max((step for path in candidates(root) if (step := step_of(path)) is not None), default=None)

"""Lightning's training loop, made to continue at the very batch where a checkpoint was written.

Lightning writes checkpoints from many hooks and guesses at the restart what was done by then and what was not; on the
way it leaves out validations, repeats batches and counts steps twice. Here every checkpoint describes the same moment:
a batch is trained and logged, and what may follow (validation, end of the epoch) is still to be done. From there a
restart goes on.
"""

import lightning as L
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from evmamba.tasks.training.interruption import StopSignals


class StepCallback:
    """A callback that wants to know when an optimizer step is complete, and logged."""

    def on_step_complete(self, trainer: L.Trainer, validation_follows: bool, last: bool) -> None:
        """Called on every process; `last`: the epoch or the training ends here."""
        raise NotImplementedError


class ResumableFitLoop(_FitLoop):
    @property
    def done(self) -> bool:
        # Of a training that was stopped after its last step, the validation may be missing.
        return not self.restarting and super().done


class ResumableEpochLoop(_TrainingEpochLoop):
    _continued = False  # whether this iteration continues after a batch that is trained already

    def update_restart_stage(self) -> None:
        """Nothing to guess: see the head of this file."""

    def reset(self) -> None:
        if not self.restarting:
            super().reset()
            return
        self._continued = True
        self.val_loop.restarting = False  # a validation is done as a whole or not at all
        self.val_loop._has_run = False

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if not self._continued:
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if not self._continued and not self._should_accumulate():
            validation = self._should_check_val_fx(data_fetcher)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, StepCallback):
                    callback.on_step_complete(self.trainer, validation, self._is_training_done)
        self._continued = False
        super().on_advance_end(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing: `evmamba.tasks.training.interruption.Agreement` does it without waiting for the device."""


def make_resumable(trainer: L.Trainer) -> None:
    """Give a trainer the loops and the signal handlers of this package; call it in ``setup``."""
    # Lightning has no way to pass one's own loops; new ones would miss the data sources that are attached by now.
    trainer.fit_loop.__class__ = ResumableFitLoop
    trainer.fit_loop.epoch_loop.__class__ = ResumableEpochLoop
    trainer._signal_connector.__class__ = StopSignals

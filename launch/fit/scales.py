"""One trained network at several image sizes: how far its accuracy carries beyond the size it was trained at."""

from collections.abc import Iterable

import lightning as L

from evmamba.launch.store.sweeps import Point, sweep
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.module import TaskModule

MULTIPLE = 16


def accuracy_at_scales(
    trainer: L.Trainer, model: TaskModule, data: TaskDataModule, scales: Iterable[float]
) -> list[Point]:
    """Test a trained network at `scales` times its training size, as its own test does it at that size.

    Returns:
        Rising sizes (multiples of 16 pixels, at least 32), each with the metrics there.
    """
    sizes = sorted({max(32, MULTIPLE * round(scale * data.image_size / MULTIPLE)) for scale in scales})

    def at_size(side: int) -> Point:
        with data.evaluated_at(side):
            trainer.test(model, datamodule=data, verbose=False)
        return dict(model.evaluation.metrics)

    return sweep("input_size", sizes, at_size)

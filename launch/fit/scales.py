"""One classifier at several image sizes: how far its accuracy carries beyond the size that it was trained at."""

from collections.abc import Iterable

import lightning as L

from evmamba.launch.store.sweeps import Point, sweep
from evmamba.tasks.classification import ClassificationData
from evmamba.tasks.classification.data import evaluation_transform
from evmamba.tasks.module import TaskModule

MULTIPLE = 16


def accuracy_at_scales(
    trainer: L.Trainer, model: TaskModule, data: ClassificationData, scales: Iterable[float]
) -> list[Point]:
    """Test a trained classifier at `scales` times its training size, as its own test does it at that size.

    Returns:
        Rising sizes (multiples of 16 pixels, at least 32), each with the metrics there.
    """
    sizes = sorted({max(32, MULTIPLE * round(scale * data.image_size / MULTIPLE)) for scale in scales})
    own = data.val_set.transform

    def at_size(side: int) -> Point:
        data.val_set.transform = evaluation_transform(side, data.crop_ratio)
        trainer.test(model, datamodule=data, verbose=False)
        return dict(model.evaluation.metrics)

    try:
        return sweep("input_size", sizes, at_size)
    finally:
        data.val_set.transform = own

"""``predictions/NAME.png``: the predicted label of every image, a palette PNG numbered as the annotation files are."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from PIL import Image

from evmamba.tasks.segmentation.gallery import palette

PREDICTION_FOLDER = "predictions"


class SegmentationPredictions(Callback):
    """Writes a file an image.

    Args:
        folder: where the folder of files goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PREDICTION_FOLDER

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for found in outputs:
            picture = Image.fromarray(found["label"])
            picture.putpalette(palette().tobytes())
            picture.save(self.folder / f"{Path(found['path']).stem}.png")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            print(f"predictions: {self.folder}/*.png")

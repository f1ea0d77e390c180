"""What `evmamba predict` leaves behind: a file of predictions, written while it predicts."""

import csv
import json
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback

from evmamba.files import replacing, write_errors
from evmamba.tasks.detection.metrics import CocoDetections
from evmamba.tasks.detection.module import BOX_FILE, MASK_FILE

CLASSIFICATION_FILE = "predictions.csv"
SEGMENTATION_FOLDER = "predictions"


class PredictionWriter(Callback):
    """Writes predictions batch by batch and says at the end where they are.

    Classification: ``predictions.csv`` (path, label, score). Detection: ``detections.json``, and from Mask R-CNN
    ``detections_masks.json``, as pycocotools reads results. Segmentation writes its PNG files itself.

    Every process writes lines into a part of its own; at the end the first one joins them, so a folder that all of them
    see is needed.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._parts: dict[str, TextIO] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {"classification": [CLASSIFICATION_FILE], "detection": [BOX_FILE]}.get(pl_module.task, [])  # type: ignore[call-overload]
        if getattr(pl_module, "wants_masks", False):
            names.append(MASK_FILE)
        self._parts = {name: self._part(name, trainer.global_rank).open("w", encoding="utf-8") for name in names}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if CLASSIFICATION_FILE in self._parts:
            rows = csv.writer(self._parts[CLASSIFICATION_FILE], lineterminator="\n")
            rows.writerows(zip(outputs["path"], outputs["label"], outputs["score"], strict=True))
        elif BOX_FILE in self._parts:
            detections = CocoDetections()
            # No output for a batch that only keeps the processes in step.
            for target, found in zip(batch["targets"], outputs, strict=False):
                detections.add(target["image_id"], found)
            entries = detections.take(trainer.datamodule.category_ids)  # type: ignore[attr-defined]
            for name, found in zip((BOX_FILE, MASK_FILE), entries, strict=True):
                if name in self._parts:
                    self._parts[name].writelines(f"{json.dumps(entry)}\n" for entry in found)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions are written")
        if not trainer.is_global_zero:
            return
        for name in self._parts:
            self._join(name, trainer.world_size)
        where = [str(self.folder / name) for name in self._parts] or [f"{self.folder / SEGMENTATION_FOLDER}/*.png"]
        print(f"predictions: {', '.join(where)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for part in self._parts.values():
            part.close()

    def _part(self, name: str, rank: int) -> Path:
        return self.folder / f".{name}.{rank}.part"

    def _join(self, name: str, processes: int) -> None:
        """Put the processes' lines together and remove the parts."""
        as_json = name != CLASSIFICATION_FILE
        path = self.folder / name
        with write_errors(path), replacing(path) as partial, partial.open("w", encoding="utf-8") as out:
            out.write("[" if as_json else "path,label,score\n")
            between = ""
            for rank in range(processes):
                part = self._part(name, rank)
                with part.open(encoding="utf-8") as lines:
                    for line in lines:
                        out.write(between + line.rstrip("\n") if as_json else line)
                        between = ",\n"
                part.unlink()
            if as_json:
                out.write("]\n")

"""``detections.json``, and from Mask R-CNN ``detections_masks.json``, as pycocotools reads results."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L

from evmamba.tasks.detection.metrics import CocoDetections
from evmamba.tasks.detection.module import BOX_FILE, MASK_FILE, DetectionModule
from evmamba.tasks.predictions import PredictionLines


class DetectionPredictions(PredictionLines):
    """One entry a detection."""

    def names(self, module: L.LightningModule) -> list[str]:
        assert isinstance(module, DetectionModule)
        return [BOX_FILE, MASK_FILE] if module.wants_masks else [BOX_FILE]

    def lines(self, trainer: L.Trainer, outputs: Any, batch: Any) -> Mapping[str, Iterable[str]]:
        detections = CocoDetections()
        # No output for a batch that only keeps the processes in step.
        for target, found in zip(batch["targets"], outputs, strict=False):
            detections.add(target["image_id"], found)
        entries = detections.take(trainer.datamodule.category_ids)  # type: ignore[attr-defined]
        return {
            name: map(json.dumps, found)
            for name, found in zip((BOX_FILE, MASK_FILE), entries, strict=True)
            if name in self._parts
        }

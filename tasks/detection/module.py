"""Detection: a detector over any backbone, trained on boxes (and masks), measured by COCO AP."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from evmamba.errors import UserError
from evmamba.tasks.detection.data import DetectionData
from evmamba.tasks.detection.detectors import DetectorName, Rules, build_detector
from evmamba.tasks.detection.detr import Detr
from evmamba.tasks.detection.gallery import draw_comparison, error_share
from evmamba.tasks.detection.metrics import CocoDetections, Evaluator, evaluate_coco, write_detections
from evmamba.tasks.detection.per_image import MASKS, Matches
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.module import TaskModule
from evmamba.tasks.per_image import PER_IMAGE_FILE
from evmamba.tasks.training.optim import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, OptimizerConfig, ScheduleConfig

# Result files; two, because pycocotools mistakes box areas for mask areas where an entry has both.
BOX_FILE = "detections.json"
MASK_FILE = "detections_masks.json"
# In checkpoints; before there was a choice they were torchvision's.
RULES_KEY = "detection_rules"


class DetectionModule(TaskModule):
    """RetinaNet, Faster R-CNN, Mask R-CNN, RT-DETRv2 or D-FINE.

    Metrics: AP, AP50, AP75, APs, APm, APl and, from Mask R-CNN, the same with ``mask_`` before; in [0, 1]. One that the
    data has no objects for (say, no small ones) is left out. Files: ``detections.json`` (boxes) and
    ``detections_masks.json``, as pycocotools reads results.

    Args:
        num_classes: without a background class.
        backbone: one of ours or any timm model with four stages.
        detector: "retinanet", "fasterrcnn", "maskrcnn", which needs data with masks, "rtdetrv2" or "dfine", which need
            `transformers`.
        rules: "mmdetection", by which the published results were made, or "torchvision"; see `build_detector`.
        checkpoint: backbone weights, as of `build_backbone`.
        drop_path_rate: of the backbone.
        min_size: short side in pixels; of several, training draws one per image and evaluation takes the last. Of
            RT-DETRv2 and D-FINE sides of squares, one a batch, rounded up to multiples of 32 (`squares` in a result's
            protocol).
        max_size: longest side in pixels.
        channels: of the feature pyramid and the heads.
        group_norm: GroupNorm in pyramid and heads, for training from scratch.
        anchor_scale: factor for the anchors' sides (32..512 pixels).
        score_threshold: detections below are dropped.
        evaluator: "pycocotools", or "hotcoco" (an extra of its own) for the same numbers in less time.
        optimizer: AdamW options.
        schedule: learning rate.
    """

    task = "detection"
    earlier_options: ClassVar[dict[str, Any]] = {"rules": "torchvision"}

    def __init__(
        self,
        num_classes: int,
        backbone: str = "efficientvmamba_t",
        detector: DetectorName = "retinanet",
        rules: Rules = "mmdetection",
        checkpoint: str | None = None,
        drop_path_rate: float = 0.0,
        min_size: tuple[int, ...] = (800,),
        max_size: int = 1333,
        channels: int = 256,
        group_norm: bool = False,
        anchor_scale: float = 1.0,
        score_threshold: float = 0.05,
        evaluator: Evaluator = "pycocotools",
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.evaluator: Evaluator = evaluator
        self.detector = build_detector(
            detector,
            backbone,
            num_classes,
            rules=rules,
            checkpoint=checkpoint,
            drop_path_rate=drop_path_rate,
            min_size=min_size,
            max_size=max_size,
            channels=channels,
            group_norm=group_norm,
            anchor_scale=anchor_scale,
            score_threshold=score_threshold,
        )
        self.rules = rules
        self.wants_masks = detector == "maskrcnn"
        self._first_label = 1 if detector in ("fasterrcnn", "maskrcnn") else 0  # those keep 0 for the background
        self._detections = CocoDetections()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detect.

        Args:
            images: [3, h, w] each, float in 0..1.

        Returns:
            Per image boxes [n, 4] float32 (x1 y1 x2 y2 in its pixels), labels [n] (0..C-1), scores [n] descending, and
            from Mask R-CNN masks [n, 1, h, w] in 0..1; n <= 100.
        """
        return [found | {"labels": found["labels"] - self._first_label} for found in self.detector(images)]

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        keys = ("boxes", "labels", "masks") if self.wants_masks else ("boxes", "labels")
        targets = [{key: target[key] for key in keys} for target in batch["targets"]]
        for target in targets:
            target["labels"] = target["labels"] + self._first_label
        losses = self.detector(batch["images"], targets)
        return torch.stack(list(losses.values())).sum(), losses

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        for image, target, prediction in zip(batch["images"], batch["targets"], self(batch["images"]), strict=True):
            self._detections.add(target["image_id"], prediction)
            if stage == "test":
                draw = functools.partial(draw_comparison, image, prediction, target, self._data.class_names)
                self.gallery.offer(draw, error_share(prediction, target))

    def evaluation_end(self, stage: str) -> Evaluation:
        gathered = self._detections.gather(self._data.category_ids)
        metrics: dict[str, Tensor | float] = {}
        details: dict[str, Any] = {}
        files: dict[str, Callable[[Path], None]] = {}
        if gathered is not None:
            image_ids, boxes, masks = gathered
            metrics, details, matches = self._evaluate(image_ids, boxes, masks, test=stage == "test")
            if stage == "test":  # a validation's are not kept: they are large
                files[PER_IMAGE_FILE] = Matches.of(image_ids, matches).write
                files[BOX_FILE] = functools.partial(write_detections, detections=boxes)
                if self.wants_masks:
                    files[MASK_FILE] = functools.partial(write_detections, detections=masks)
        metrics, details = self.trainer.strategy.broadcast((metrics, details))
        protocol = {"squares": list(self.detector.sides)} if isinstance(self.detector, Detr) else {}
        return Evaluation(metrics, details, files=files, protocol=protocol)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Per image what `forward` returns, and its path."""
        if batch.get("ignore", False):
            return []
        return [{"path": path} | found for path, found in zip(batch["path"], self(batch["images"]), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[RULES_KEY] = self.rules

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The weights fit either way, and would be measured by rules that they were not trained by.
        trained_by = checkpoint.get(RULES_KEY, self.earlier_options["rules"])
        if trained_by != self.rules:
            raise UserError(
                f"the checkpoint was trained by {trained_by}'s rules, not {self.rules}'s: "
                f"add --model.init_args.rules={trained_by}"
            )

    @property
    def _data(self) -> DetectionData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _evaluate(
        self, image_ids: list[int | str], boxes: list[dict], masks: list[dict], test: bool
    ) -> tuple[dict[str, Tensor | float], dict[str, Any], dict[str, Mapping[str, np.ndarray]]]:
        """Metrics and details, on rank 0, and of a test what `Matches.of` takes."""
        file = self._data.test_file if test else self._data.annotation_file
        score = evaluate_coco(file, boxes, image_ids, "bbox", test, self.evaluator)
        matches = {"": score.matches}
        metrics: dict[str, Tensor | float] = dict(score.metrics())
        per_class = score.per_class
        details: dict[str, Any] = {"coco_stats": score.stats, "images": len(image_ids), "images_in_file": score.images}
        if self.wants_masks:
            mask_score = evaluate_coco(file, masks, image_ids, "segm", test, self.evaluator)
            metrics |= {f"mask_{name}": value for name, value in mask_score.metrics().items()}
            details["coco_mask_stats"] = mask_score.stats
            matches[MASKS] = mask_score.matches
            for name, values in mask_score.per_class.items():
                per_class[name] |= {f"mask_{key}": value for key, value in values.items()}
        details |= {"per_class": per_class, "detections": len(boxes), "annotations": self._data.counts}
        if len(image_ids) < score.images and not self._data.held_out and not self.trainer.sanity_checking:
            rank_zero_warn(f"AP is over {len(image_ids)} of the {score.images} images of {file.name} only")
        return metrics, details, matches

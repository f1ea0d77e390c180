"""Segmentation: cross-entropy of UPerNet and its auxiliary head, mean IoU over the data set."""

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evmamba.errors import UserError
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.images import read_image
from evmamba.tasks.module import TaskModule
from evmamba.tasks.per_image import PER_IMAGE_FILE
from evmamba.tasks.segmentation.gallery import draw_comparison
from evmamba.tasks.segmentation.inference import (
    MULTI_SCALE_RATIOS,
    InferenceConfig,
    predict_labels,
)
from evmamba.tasks.segmentation.metrics import IGNORE_INDEX, SegmentationMetrics
from evmamba.tasks.segmentation.per_image import Overlaps, overlap
from evmamba.tasks.segmentation.upernet import UPerNet, resize
from evmamba.tasks.training.optim import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, OptimizerConfig, ScheduleConfig

DEFAULT_INFERENCE = InferenceConfig()


class SegmentationModule(TaskModule):
    """UPerNet on a backbone.

    The loss averages over all pixels of the batch, ignored ones as 0, as mmsegmentation does.

    Metrics, fractions in [0, 1]: ``mIoU``, ``pixel_acc``, ``mean_acc`` (see `SegmentationMetrics`), and in the test
    stage with `multi_scale` also ``mIoU_ms``. ``details``: ``per_class`` {class: IoU, acc, share of labelled pixels},
    ``confusion`` [true][predicted] pixel counts, ``commonest_class`` (what predicting only that class would score),
    ``protocol``.

    Args:
        backbone: one of our models or any timm model with maps at strides 4, 8, 16, 32, by name.
        num_classes: linked to the data's by the command line.
        checkpoint: backbone weights to start from, as of `build_backbone`: a file, a URL, `hf-hub:USER/REPOSITORY`, or
            `pretrained` for the published ones.
        drop_path_rate: stochastic depth of the backbone.
        decoder_channels: width of UPerNet; the paper's parameters and MACs are those of 256 / 384 / 512 for T / S / B.
        aux_channels: width of the auxiliary head; 0 leaves it out.
        aux_weight: of the auxiliary head's loss.
        dropout: ahead of the classifiers.
        inference: how validation, test and predict turn an image into a prediction.
        multi_scale: test also with the ratios 0.5, 0.75, 1.0, 1.25, 1.5, 1.75 and flip; twelve passes more.
        optimizer: see OptimizerConfig.
        schedule: see ScheduleConfig.

    Raises:
        UserError: options out of range, or what `build_backbone` raises.
    """

    task: ClassVar[str] = "segmentation"
    entry_points: ClassVar[tuple[str, ...]] = ("forward_with_auxiliary",)

    def __init__(
        self,
        backbone: str = "efficientvmamba_t",
        num_classes: int = 150,
        checkpoint: str | None = None,
        drop_path_rate: float = 0.0,
        decoder_channels: int = 256,
        aux_channels: int = 256,
        aux_weight: float = 0.4,
        dropout: float = 0.1,
        inference: InferenceConfig = DEFAULT_INFERENCE,
        multi_scale: bool = False,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
    ) -> None:
        super().__init__(optimizer, schedule)
        if num_classes < 2:
            raise UserError(f"model.num_classes must be at least 2, not {num_classes}")
        if decoder_channels < 1 or aux_channels < 0:
            raise UserError("model.decoder_channels must be positive and model.aux_channels not negative")
        self.num_classes = num_classes
        self.aux_weight = aux_weight
        self.inference = inference
        self.multi_scale = multi_scale
        pyramid = build_backbone(backbone, features_only=True, drop_path_rate=drop_path_rate, checkpoint=checkpoint)
        self.network = UPerNet(pyramid, num_classes, decoder_channels, aux_channels, dropout)
        stages = ("val", "test", "test_ms") if multi_scale else ("val", "test")
        self.metrics = nn.ModuleDict({stage: SegmentationMetrics(num_classes) for stage in stages})

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> class scores at stride 4, [B, C, ~H/4, ~W/4]."""
        return self.network(images)

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if len(images) < 2 and any(isinstance(module, nn.BatchNorm2d) for module in self.network.decoder.modules()):
            raise UserError(
                "UPerNet cannot be trained on one image at a time: it pools to a single value per channel ahead of "
                "BatchNorm; set data.batch_size to 2 or more, or trainer.sync_batchnorm=true with several processes"
            )
        scores, auxiliary_scores = self.network.forward_with_auxiliary(images)
        decoder = pixel_cross_entropy(scores, labels)
        if auxiliary_scores is None:
            return decoder, {}
        auxiliary = pixel_cross_entropy(auxiliary_scores, labels)
        return decoder + self.aux_weight * auxiliary, {"decoder_loss": decoder, "auxiliary_loss": auxiliary}

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        images, labels = batch["image"], batch["label"]
        size = (labels.shape[-2], labels.shape[-1])
        predicted = predict_labels(self, images, size, self.inference)
        metric = self._metric(stage)
        metric.update(predicted, labels)
        if stage == "test":
            found = {"mIoU": predicted}
            if self.multi_scale:
                config = InferenceConfig(**{**vars(self.inference), "scales": MULTI_SCALE_RATIOS, "flip": True})
                found["mIoU_ms"] = predict_labels(self, images, size, config)
                self._metric("test_ms").update(found["mIoU_ms"], labels)
            for i, path in enumerate(batch["path"]):
                self.keep(path, {name: overlap(p[i], labels[i], self.num_classes) for name, p in found.items()})
            draw = functools.partial(self._draw, batch["path"][0], labels[0], predicted[0])
            labelled = labels[0] != IGNORE_INDEX
            self.gallery.offer(draw, (predicted[0] != labels[0])[labelled].float().mean().item())

    def evaluation_end(self, stage: str) -> Evaluation:
        metric = self._metric(stage)
        values = metric.compute()
        details = self._details(values)
        metric.reset()
        protocol = {}
        metrics: dict[str, Tensor | float] = {name: values[name] for name in ("mIoU", "pixel_acc", "mean_acc")}
        if stage == "test" and self.multi_scale:
            metrics["mIoU_ms"] = self._metric("test_ms").compute()["mIoU"]
            self._metric("test_ms").reset()
            protocol = {"test_time_augmentation": "multi-scale and flip for mIoU ms"}
        found = self.kept() if stage == "test" else None
        files = {} if found is None else {PER_IMAGE_FILE: Overlaps.of(found).write}
        return Evaluation(metrics, details, protocol, files)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return ``path`` and ``label`` (uint8 [h, w], numbered as the annotation files are) of every image."""
        if batch.get("ignore", False):
            return []
        labels = batch["label"]
        predicted = predict_labels(self, batch["image"], (labels.shape[-2], labels.shape[-1]), self.inference)
        label_map = getattr(getattr(self.trainer, "datamodule", None), "label_map", None)
        return [
            {"path": path, "label": classes if label_map is None else label_map.to_file(classes)}
            for path, classes in zip(batch["path"], predicted.to(torch.uint8).cpu().numpy(), strict=True)
        ]

    @property
    def class_names(self) -> list[str]:
        """The data's class names, or the numbers where no data module is attached."""
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return names or [str(k) for k in range(self.num_classes)]

    def _metric(self, stage: str) -> SegmentationMetrics:
        metric = self.metrics[stage]
        assert isinstance(metric, SegmentationMetrics)
        return metric

    def _details(self, values: dict[str, Tensor]) -> dict[str, Any]:
        confusion = values["confusion"]
        pixels = confusion.sum(1).cpu()
        total = max(int(pixels.sum()), 1)
        commonest = int(pixels.argmax())
        occurring = int((pixels > 0).sum())
        share = float(pixels[commonest]) / total

        def number(value: Tensor) -> float | None:
            return None if value.isnan() else round(float(value), 6)

        return {
            "protocol": self.inference.describe(),
            "per_class": {
                name: {
                    "IoU": number(values["IoU"][k]),
                    "acc": number(values["acc"][k]),
                    "pixel_share": round(int(pixels[k]) / total, 6),
                }
                for k, name in enumerate(self.class_names)
            },
            # Predicted everywhere, its own IoU is its share of the pixels and the others' IoU is 0.
            "commonest_class": {
                "name": self.class_names[commonest],
                "mIoU": round(share / max(occurring, 1), 6),
                "pixel_acc": round(share, 6),
            },
            "confusion": confusion.tolist(),
        }

    def _draw(self, path: str, label: Tensor, predicted: Tensor) -> Image.Image:
        truth, prediction = (x.to(torch.uint8).cpu().numpy() for x in (label, predicted))
        image = read_image(path)
        if image.size != truth.shape[::-1]:
            image = read_image(path, upright=False)
        own = SegmentationMetrics(self.num_classes, sync_on_compute=False)
        own.update(torch.from_numpy(prediction), torch.from_numpy(truth))
        score = own.compute()["mIoU"].item()
        title = Path(path).name + ("" if np.isnan(score) else f"   mIoU of this image {100 * score:.1f} %")
        return draw_comparison(image, truth, prediction, self.class_names, title)


def pixel_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the pixels that count, summed, by the number of all pixels, ignored ones included.

    Args:
        scores: ``[B, C, h, w]``, resized to the labels' size.
        labels: ``[B, H, W]``, class indices or `IGNORE_INDEX`.
    """
    scores = resize(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels.shape[-2:])
    total = F.cross_entropy(scores, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / labels.numel()

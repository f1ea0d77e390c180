"""RT-DETRv2 and D-FINE of `transformers` on any backbone: detectors without anchors and suppression.

Sources: RT-DETRv2, arXiv 2407.17140; D-FINE, arXiv 2410.13842. Encoder, decoder, matching and losses are the library's;
the backbone, its weights and its stochastic depth are ours, as under the other detectors. Images are stretched to
squares, as in both papers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import box_convert

from evmamba.errors import UserError
from evmamba.tasks.detection.metrics import MAX_DETECTIONS

DetrName = Literal["rtdetrv2", "dfine"]
DETRS = get_args(DetrName)
STRIDES = (8, 16, 32)
QUERIES = 300  # detections of an image before the best are taken
LEAST_SIDE = 128  # the three maps of a smaller image have fewer pixels than there are queries
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Maps(nn.Module):
    """The backbone: images [B, 3, S, S] -> float32 maps at strides 8, 16, 32."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return [m.float() for m in self.body(images)]


class Given(nn.Module):
    """Stands where the library's detector has its backbone, and hands on the maps that it is given for an image."""

    def forward(self, maps: list[Tensor], mask: Tensor) -> list[tuple[Tensor, None]]:
        return [(m, None) for m in maps]


class Detr(nn.Module):
    """A detector, called as torchvision's are: see `forward`.

    Args:
        name: "rtdetrv2" or "dfine".
        body: backbone with `feature_info`, maps at strides 8, 16, 32.
        num_classes: C, without a background.
        sides: of the squares [pixels], each rounded up to a multiple of 32, as the encoder adds maps of twice the
            size to each other; of several, training draws one per batch and evaluation takes the last.
        channels: of encoder and decoder (256 in the papers), a multiple of 8.
        score_threshold: detections below are dropped.

    Raises:
        UserError: `transformers` is not installed, or a side is too small.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        name: DetrName,
        body: nn.Module,
        num_classes: int,
        *,
        sides: Sequence[int],
        channels: int = 256,
        score_threshold: float = 0.05,
    ) -> None:
        super().__init__()
        if min(sides) < LEAST_SIDE:
            raise UserError(f"model.min_size must be at least {LEAST_SIDE} for {name}, not {min(sides)}")
        self.backbone = Maps(body)
        info: Any = body.feature_info
        self.transformer = _transformer(name, list(info.channels()), num_classes, channels)
        self.sides = tuple(math.ceil(side / STRIDES[-1]) * STRIDES[-1] for side in sides)
        self.score_threshold = score_threshold
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Train or detect.

        Args:
            images: [3, h, w] each, float in 0..1.
            targets: in training: boxes [n, 4] (x1 y1 x2 y2 in the image's pixels) and labels [n] (0..C-1) of each.

        Returns:
            In training the losses by name, weighted; else per image boxes [m, 4] float32, labels [m] and scores [m],
            descending, m <= 100.
        """
        side = self.sides[int(torch.randint(len(self.sides), ())) if self.training else -1]
        squares = torch.stack([self._square(image, side) for image in images])
        if self.training:
            assert targets is not None
            return self._losses(squares, [_relative(t, i) for t, i in zip(targets, images, strict=True)])
        logits, boxes = self.predict(squares)
        return [self._best(*found) for found in zip(logits, boxes, images, strict=True)]

    def predict(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, S, S] -> class logits [B, 300, C], boxes [B, 300, 4] (relative centre and size)."""
        found = self._run(squares)
        return found.logits, found.pred_boxes

    def _run(self, squares: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        maps = self.backbone(squares)
        # In float32: under autocast boxes would have three digits.
        with torch.autocast(squares.device.type, enabled=False):
            return self.transformer(_Shaped(maps, squares), labels=labels)

    def _losses(self, squares: Tensor, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses: Counter[str] = Counter()
        for name, value in self._run(squares, labels).loss_dict.items():  # one of each kind for every layer
            losses["_".join(name.split("_")[:2])] += value
        return dict(losses)  # type: ignore[arg-type]

    def _square(self, image: Tensor, side: int) -> Tensor:
        image = (image - self.mean) / self.deviation
        return interpolate(image[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]

    def _best(self, logits: Tensor, boxes: Tensor, image: Tensor) -> dict[str, Tensor]:
        scores, places = logits.sigmoid().flatten().topk(min(MAX_DETECTIONS, logits.numel()))
        kept = scores >= self.score_threshold
        scores, places = scores[kept], places[kept]
        classes = logits.shape[1]
        corners = box_convert(boxes[places // classes].float(), "cxcywh", "xyxy").clamp(0, 1)
        return {"boxes": corners * _extent(image), "labels": places % classes, "scores": scores}


class _Shaped(list):
    """Maps that tell shape, device and type of their images, which is all that the library asks of those."""

    def __init__(self, maps: list[Tensor], images: Tensor) -> None:
        super().__init__(maps)
        self.shape, self.device, self.dtype = images.shape, images.device, images.dtype


def _transformer(name: DetrName, widths: list[int], num_classes: int, channels: int) -> nn.Module:
    try:
        metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise UserError(f"detector {name} needs transformers: pip install 'evmamba[detr]'") from None
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
        TimmBackboneConfig,
    )

    kinds: dict[str, tuple[Any, Any]] = {
        "rtdetrv2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
        "dfine": (DFineConfig, DFineForObjectDetection),
    }
    config_class, detector_class = kinds[name]
    config = config_class(
        # Replaced below: the library would build a network by timm's name, we have one with its weights.
        backbone_config=TimmBackboneConfig(backbone="resnet10t", out_indices=[2, 3, 4]),
        freeze_backbone_batch_norms=False,
        num_labels=num_classes,
        initializer_bias_prior_prob=0.01,  # as published; the library's default depends on the number of classes
        num_queries=QUERIES,
        d_model=channels,
        encoder_hidden_dim=channels,
        encoder_in_channels=widths,
        encoder_ffn_dim=4 * channels,
        decoder_in_channels=[channels] * len(widths),
        decoder_ffn_dim=4 * channels,
        feat_strides=list(STRIDES),
    )
    detector = detector_class(config)
    detector.model.backbone = Given()
    detector.model.encoder_input_proj = nn.ModuleList(
        nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)) for width in widths
    )
    return detector


def _relative(target: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """A target as the library wants it: boxes by centre and size, relative to the image."""
    return {
        "class_labels": target["labels"],
        "boxes": box_convert(target["boxes"].float() / _extent(image), "xyxy", "cxcywh"),
    }


def _extent(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=image.device)

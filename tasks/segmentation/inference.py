"""From images to class scores: whole image or sliding window, one scale or several, with or without flip.

The protocol is the field's (and that of table 4 in arXiv 2403.09977): "single scale" is one pass; "multi-scale"
averages softmax probabilities over the ratios 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, each with and without a horizontal flip.
Scores go to the size of the network's input first and to the label's then, as in mmsegmentation. Two differences stay:
pixels are resized as floating-point numbers and not rounded to whole grey values afterwards; and with `short_side` the
ratios are of that side (mmsegmentation 1.x: of the image's own size, which `short_side` unset gives).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evmamba.errors import UserError
from evmamba.tasks.images import size_within
from evmamba.tasks.segmentation.upernet import resize

MULTI_SCALE_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass
class InferenceConfig:
    """How an image is turned into a prediction.

    Args:
        mode: ``"whole"`` image in one pass, or ``"slide"``: overlapping windows whose scores are averaged.
        crop: side of a window, pixels.
        stride: step between windows, pixels.
        short_side: resize the image so that its short side has this many pixels; None keeps the image's own size.
        long_side: with ``short_side``, the long side gets no longer than this.
        antialias: smooth ahead of reducing, as looks best; mmsegmentation does not.
        scales: ratios of the image size; more than one averages softmax probabilities.
        flip: average with the horizontally flipped image too.
    """

    mode: Literal["whole", "slide"] = "whole"
    crop: int = 512
    stride: int = 341
    short_side: int | None = None
    long_side: int | None = None
    antialias: bool = True
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        self.scales = tuple(self.scales)
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"inference.scales must be positive ratios, not {self.scales}")
        if not 0 < self.stride <= self.crop:
            raise UserError(
                f"inference.stride must be in 1..crop ({self.crop}), not {self.stride}: pixels would be left out"
            )

    def describe(self) -> str:
        """One line for the protocol column of a result."""
        size = "own size" if self.short_side is None else f"short side {self.short_side}"
        window = f", windows of {self.crop} every {self.stride}" if self.mode == "slide" else ""
        scales = "single scale" if self.scales == (1.0,) else "scales " + " ".join(f"{s:g}" for s in self.scales)
        return f"{self.mode} image, {size}{window}, {scales}{', flip' if self.flip else ''}"


def predict_labels(model: nn.Module, image: Tensor, size: tuple[int, int], config: InferenceConfig) -> Tensor:
    """Class index of every pixel.

    Args:
        model: gives class scores ``[B, C, ~H/4, ~W/4]`` for an image.
        image: ``[B, 3, H, W]``, normalised.
        size: height and width of the answer, the label's own; scores are resized to it before the arg-max.

    Returns:
        int64 ``[B, *size]``.
    """
    if config.scales == (1.0,) and not config.flip:  # softmax does not move the arg-max, so it can be left out
        return resize(_pass_scores(model, _resize_image(image, config, 1.0), config), size).argmax(1)
    return predict_probabilities(model, image, size, config).argmax(1)


def predict_probabilities(model: nn.Module, image: Tensor, size: tuple[int, int], config: InferenceConfig) -> Tensor:
    """Softmax probabilities averaged over scales and flips, float32 ``[B, C, *size]``; as `predict_labels`."""
    total: Tensor | None = None
    for scale in config.scales:
        scaled = _resize_image(image, config, scale)
        for flipped in (False, True) if config.flip else (False,):
            scores = _pass_scores(model, scaled.flip(-1) if flipped else scaled, config)
            probability = resize(scores, size).softmax(1)
            probability = probability.flip(-1) if flipped else probability
            total = probability if total is None else total.add_(probability)
    assert total is not None  # InferenceConfig refuses an empty list of scales
    return total / (len(config.scales) * (2 if config.flip else 1))


def _pass_scores(model: nn.Module, image: Tensor, config: InferenceConfig) -> Tensor:
    """Scores of one scaled image at its own size, in float32 or better."""
    if config.mode == "whole":
        return resize(_at_least_float32(model(image)), image.shape[-2:])
    height, width = image.shape[-2:]
    total: Tensor | None = None
    count = image.new_zeros(height, width)
    for rows, columns in sliding_windows(height, width, config.crop, config.stride):
        window = image[..., rows, columns]
        scores = resize(_at_least_float32(model(window)), window.shape[-2:])
        if total is None:
            total = scores.new_zeros(*scores.shape[:2], height, width)
        total[..., rows, columns] += scores
        count[rows, columns] += 1
    assert total is not None  # an image has at least one window
    return total / count


def sliding_windows(height: int, width: int, crop: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Windows that cover the image; the last of a row or column is moved back inside, so that none is padded."""

    def starts(length: int) -> list[int]:
        last = max(length - crop, 0)
        return [*range(0, last, stride), last]

    for top in starts(height):
        for left in starts(width):
            yield slice(top, min(top + crop, height)), slice(left, min(left + crop, width))


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def target_size(size: tuple[int, int], config: InferenceConfig, scale: float) -> tuple[int, int]:
    """Height and width of the network's input, at one of the scales, for an image of this height and width."""
    if config.short_side is not None:
        long = math.inf if config.long_side is None else int(scale * config.long_side)
        return size_within(size, int(scale * config.short_side), long)
    # In two steps, as mmsegmentation has it, the second of which can take back a pixel of the first.
    limits = [int(side * scale + 0.5) for side in size]
    return size_within(size, min(limits), max(limits))


def _resize_image(image: Tensor, config: InferenceConfig, scale: float) -> Tensor:
    height, width = image.shape[-2:]
    size = target_size((height, width), config, scale)
    if (height, width) == size:
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=config.antialias)

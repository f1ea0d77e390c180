"""Training augmentation of segmentation: random scale, crop, flip and colours, the UPerNet recipe for ADE20K."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from evmamba.errors import UserError
from evmamba.tasks.segmentation.metrics import IGNORE_INDEX

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

_CROP_TRIALS = 10


class TrainingAugmentation:
    """Image and label of any size -> a normalised crop of one size.

    Args:
        crop_size: side of the crop; smaller pictures are padded with grey (the mean) and ignored labels.
        scale: range of the random factor.
        short_side: factor 1 means that the image's short side has so many pixels; None: that it keeps its size.
        max_class_share: a crop is drawn again (up to 10 times) unless it has two classes or more, of which none fills
            this share of the labelled pixels.
        flip: probability of a horizontal flip.
        distort: colours as `PhotometricDistortion`.
        antialias: smooth ahead of reducing; mmsegmentation does not.
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        max_class_share: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
        antialias: bool = True,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"data.scale must be two growing positive factors, not {scale}")
        if crop_size < 32:
            raise UserError(f"data.crop_size must be at least 32, not {crop_size}")
        self.crop_size = crop_size
        self.scale = scale
        self.short_side = short_side
        self.max_class_share = max_class_share
        self.flip = v2.RandomHorizontalFlip(flip)
        self.distort = PhotometricDistortion() if distort else v2.Identity()
        self.antialias = antialias

    def __call__(self, pixels: Tensor, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Augment.

        Args:
            pixels: uint8 ``[3, h, w]``.
            label: uint8 ``[h, w]``, class indices or `IGNORE_INDEX`, of the image's size.

        Returns:
            float32 ``[3, crop, crop]`` and uint8 ``[crop, crop]``.
        """
        mask = torch.from_numpy(label)[None]
        factor = self._factor(label.shape)
        # Cutting the window out first and resizing only that gives the same crop as the other way round, much faster.
        height, width = mask.shape[-2:]
        rows, columns = min(round(self.crop_size / factor), height), min(round(self.crop_size / factor), width)
        # Judged by as many pixels as the crop will have.
        top, left = self._choose(mask, rows, columns, every=max(int(1 / factor), 1))
        size = [min(max(round(side * factor), 1), self.crop_size) for side in (rows, columns)]
        bilinear = v2.InterpolationMode.BILINEAR
        pixels = F.resized_crop(pixels, top, left, rows, columns, size, bilinear, antialias=self.antialias)
        mask = F.resized_crop(mask, top, left, rows, columns, size, v2.InterpolationMode.NEAREST)

        pixels, mask = self.flip(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
        normalised = normalise(self.distort(pixels))
        padding = [0, 0, self.crop_size - size[1], self.crop_size - size[0]]
        normalised = F.pad(normalised, padding)
        mask = F.pad(mask, padding, fill=IGNORE_INDEX)
        return normalised.as_subclass(Tensor), mask[0].as_subclass(Tensor)

    def _factor(self, size: tuple[int, ...]) -> float:
        factor = _uniform(*self.scale)
        return factor if self.short_side is None else factor * self.short_side / min(size)

    def _choose(self, mask: Tensor, rows: int, columns: int, every: int) -> tuple[int, int]:
        """Top and left of a window that is not nearly all one class, if such a one turns up soon."""

        def draw() -> tuple[int, int]:
            top, left = (int(torch.randint(n + 1, ())) for n in (mask.shape[-2] - rows, mask.shape[-1] - columns))
            return top, left

        place = draw()
        for _ in range(_CROP_TRIALS):
            top, left = place
            window = mask[0, top : top + rows : every, left : left + columns : every]
            counts = torch.bincount(window.flatten(), minlength=256)[:IGNORE_INDEX]
            labelled = counts.sum().item()
            if (counts > 0).sum() > 1 and counts.max().item() < self.max_class_share * labelled:
                return place
            place = draw()
        return place  # the last one is taken as it is


class PhotometricDistortion(v2.Transform):
    """Colours as mmsegmentation distorts them: each step with probability 0.5, then cut to whole numbers 0..255.

    Brightness adds -32..32; contrast multiplies by 0.5..1.5 about black, second or last by a coin; saturation
    multiplies HSV's S by 0.5..1.5; hue turns by up to a tenth. (torchvision's jitter multiplies brightness and blends
    contrast and saturation with grey.) Saturation and hue are computed as floating-point numbers, not in 8-bit HSV.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, list[tuple[str, float]]]:
        steps = [
            ("brightness", _uniform(-32, 32)),
            ("contrast", _uniform(0.5, 1.5)),
            ("saturation", _uniform(0.5, 1.5)),
            ("hue", int(torch.randint(-18, 18, ())) / 180),
        ]
        if torch.rand(()) < 0.5:
            steps.append(steps.pop(1))
        return {"steps": [step for step in steps if torch.rand(()) < 0.5]}

    def transform(self, inpt: Any, params: dict[str, list[tuple[str, float]]]) -> Any:
        """Distort a uint8 image [3, h, w]."""
        pixels = inpt
        for name, value in params["steps"]:
            if name == "hue":
                pixels = F.adjust_hue(pixels, value)
                continue
            colours = pixels.float()
            if name == "saturation":
                brightest = colours.amax(0, keepdim=True)
                # S = 1 - darkest / brightest grows by the factor, to 1 at most, where brightest and hue stay.
                most = brightest / (brightest - colours.amin(0, keepdim=True)).clamp(min=1)
                colours = brightest - (brightest - colours) * most.clamp(max=value)
            else:
                colours = colours + value if name == "brightness" else colours * value
            pixels = tv_tensors.wrap(colours.clamp(0, 255).to(torch.uint8), like=inpt)
        return pixels


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 ``[3, h, w]`` -> float32 with ImageNet's mean and deviation."""
    return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)

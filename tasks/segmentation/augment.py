"""Training augmentation of segmentation: random scale, crop, flip and colours, the UPerNet recipe for ADE20K."""

import numpy as np
import torch
from PIL import Image
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
        max_class_share: a crop is drawn again (up to 10 times) when one class fills more than this share of it.
        flip: probability of a horizontal flip.
        distort: random brightness, contrast, saturation and hue.
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        max_class_share: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
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
        # v2.RandomPhotometricDistort would also shuffle the colour channels, which this recipe does not.
        steps = [{"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
        jitter = [v2.RandomApply([v2.ColorJitter(**step)], p=0.5) for step in steps]
        self.distort = v2.Compose(jitter) if distort else v2.Identity()

    def __call__(self, image: Image.Image, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Augment.

        Args:
            image: RGB.
            label: uint8 ``[h, w]``, class indices or `IGNORE_INDEX`, of the image's size.

        Returns:
            float32 ``[3, crop, crop]`` and uint8 ``[crop, crop]``.
        """
        pixels, mask = F.pil_to_tensor(image), torch.from_numpy(label)[None]
        factor = self._factor(image.size)
        # Cutting the window out first and resizing only that gives the same crop as the other way round, much faster.
        height, width = mask.shape[-2:]
        rows, columns = min(round(self.crop_size / factor), height), min(round(self.crop_size / factor), width)
        top, left = self._choose(mask, rows, columns)
        size = [min(max(round(side * factor), 1), self.crop_size) for side in (rows, columns)]
        pixels = F.resized_crop(pixels, top, left, rows, columns, size, v2.InterpolationMode.BILINEAR, antialias=True)
        mask = F.resized_crop(mask, top, left, rows, columns, size, v2.InterpolationMode.NEAREST)

        pixels, mask = self.flip(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
        normalised = normalise(self.distort(pixels))
        padding = [0, 0, self.crop_size - size[1], self.crop_size - size[0]]
        normalised = F.pad(normalised, padding)
        mask = F.pad(mask, padding, fill=IGNORE_INDEX)
        return normalised.as_subclass(Tensor), mask[0].as_subclass(Tensor)

    def _factor(self, size: tuple[int, int]) -> float:
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        return factor if self.short_side is None else factor * self.short_side / min(size)

    def _choose(self, mask: Tensor, rows: int, columns: int) -> tuple[int, int]:
        """Top and left of a window that is not nearly all one class, if such a one turns up soon."""
        top = left = 0
        for _ in range(_CROP_TRIALS):
            top = int(torch.randint(mask.shape[-2] - rows + 1, ()))
            left = int(torch.randint(mask.shape[-1] - columns + 1, ()))
            # Every fourth pixel is enough to judge by.
            counts = torch.bincount(mask[0, top : top + rows : 4, left : left + columns : 4].flatten(), minlength=256)
            counts = counts[:IGNORE_INDEX]
            labelled = counts.sum().item()
            if labelled and counts.max().item() <= self.max_class_share * labelled and (counts > 0).sum() > 1:
                break
        return top, left


def normalise(pixels: Tensor) -> Tensor:
    """uint8 ``[3, h, w]`` -> float32 with ImageNet's mean and deviation."""
    return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)

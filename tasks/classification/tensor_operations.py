"""The operations of RandAugment on uint8 tensors, on any device: as timm's do it with Pillow, to one step of 255.

`torchvision.transforms.v2` has most of them, but bicubic ones for Pillow's images only; these also do many images at
once, each by its own amount.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from evmamba.tasks.classification.randaugment import Box, distorted_tiles, skewed, zoomed

# Name and arguments of an operation, as timm draws them, and the colour of what comes from outside of the image.
Operation = tuple[str, tuple[float, ...], tuple[int, ...]]
# For each image the operation's arguments and its colour.
Amounts = Sequence[tuple[tuple[float, ...], tuple[int, ...]]]
BLACK = (0, 0, 0)
BLUR_PASSES = 3
# What a sum of float32 may be short of the whole number that it is; Pillow cuts sums of float64.
WHOLE = 2e-4


def apply(images: Tensor, operations: Sequence[Sequence[Operation]]) -> Tensor:
    """Do to each image of a batch its own operations one after the other.

    Args:
        images: uint8 [B, 3, H, W].
        operations: for each image, of those that `is_known` knows.

    Returns:
        uint8 [B, 3, H, W]; the operations of images that have the same one are done at once.
    """
    images = images.clone()
    for turn in range(max(map(len, operations), default=0)):
        alike: dict[Callable[..., Tensor], list[int]] = {}
        for k, own in enumerate(operations):
            if turn < len(own):
                alike.setdefault(_KINDS[_plain(own[turn][0])], []).append(k)
        for operate, rows in alike.items():
            index = torch.tensor(rows, device=images.device)
            images[index] = operate(images[index], [operations[k][turn] for k in rows])
    return images


def is_known(name: str) -> bool:
    """Whether there is an operation of timm's, or of `randaugment.EXTRA`, here."""
    return _plain(name) in _KINDS


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, uint8 [B, 3, H, W] -> [B, 3, height, width]: along the rows, rounded, then down the
    columns. PyTorch has that for whole numbers on a CPU alone."""
    if images.device.type == "cpu":
        return interpolate(images, (height, width), mode="bicubic", antialias=True)
    for size in ((images.shape[-2], width), (height, width)):
        images = interpolate(images.float(), size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return images.byte()


def _plain(name: str) -> str:
    """Those whose effect grows with the level differ in what is drawn only."""
    return name.removesuffix("Increasing").removesuffix("Original")


def _numbers(images: Tensor, operations: Sequence[Operation], dtype: torch.dtype = torch.float32) -> Tensor:
    """The one argument of each operation, [B, 1, 1, 1]."""
    return torch.tensor([arguments[0] for _, arguments, _ in operations], dtype=dtype, device=images.device)[
        :, None, None, None
    ]


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace every value by that of its image's and colour's table [B, 3, 256]."""
    return table.byte().gather(2, images.flatten(2).long()).view_as(images)


def _auto_contrast(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    low, high = (bound.double()[..., None] for bound in images.flatten(2).aminmax(dim=2))
    scale = 255 / (high - low).clamp(min=1)
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    return _looked_up(images, torch.where(high > low, (values * scale - low * scale).trunc().clamp(0, 255), values))


def _equalize(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    last = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _looked_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


def _invert(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    dropped = (8 - _numbers(images, operations, torch.int32)).clamp(min=0)
    return ((images.int() >> dropped) << dropped).byte()


def _solarize(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return torch.where(images < _numbers(images, operations), images, 255 - images)


def _solarize_add(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    added = (images + _numbers(images, operations, torch.int32)).clamp(max=255).byte()
    return torch.where(images < 128, added, images)


def _blend(images: Tensor, plain: Tensor, operations: Sequence[Operation]) -> Tensor:
    """From `plain` towards the image, by each operation's factor and beyond; cut like Pillow's, not rounded."""
    return (plain + _numbers(images, operations) * (images - plain)).clamp(0, 255).byte()


def _grey(images: Tensor) -> Tensor:
    """Luminance as Pillow computes it, whole numbers in float32 [B, 1, H, W]."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).float()[:, None]


def _color(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return _blend(images, _grey(images), operations)


def _contrast(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _blend(images, mean, operations)


def _brightness(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), operations)


def _sharpness(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    smooth = images.float()
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[..., 1, 1] = 5
    smooth[..., 1:-1, 1:-1] = (conv2d(images.float(), kernel, groups=3) / 13 + 0.5).floor()
    return _blend(images, smooth, operations)


def _blur(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Pillow's Gaussian, of less than 1.4 pixels: three passes of a box that reaches into the next pixel."""
    variance = _numbers(images, operations).square() / BLUR_PASSES
    reach = variance / (2 * (1 - variance))
    near, far = 1 / (2 * reach + 1), reach / (2 * reach + 1)
    blurred = images.float()
    for axis in (-1, -2):
        blurred = blurred.transpose(-1, axis)
        for _ in range(BLUR_PASSES):
            wider = pad(blurred, (1, 1, 0, 0), mode="replicate")
            blurred = (near * blurred + far * (wider[..., :-2] + wider[..., 2:]) + 0.5).floor()
        blurred = blurred.transpose(-1, axis)
    return blurred.byte()


def _zoom(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    height, width = images.shape[-2:]
    zooms = []
    for image, (_, (factor,), _) in zip(images, operations, strict=True):
        scaled, (left, top, right, bottom) = zoomed((width, height), factor)
        part = resize(image[None], scaled[1], scaled[0])
        zooms.append(pad(part, (-left, right - scaled[0], -top, bottom - scaled[1])))
    return torch.cat(zooms)


def _warp(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Show in every pixel what lies where the operation takes it from, bicubic by Pillow's weights."""
    height, width = images.shape[-2:]
    maps = [_SOURCES[name](width, height, *arguments) for name, arguments, _ in operations]
    x, y = torch.stack([_places(source, width, height, images.device) for source in maps], 1)  # [B, H, W] each
    fill = torch.tensor([colour for *_, colour in operations], device=images.device)[..., None, None].byte()
    inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]
    columns, across = _neighbours(x, width)
    rows, down = _neighbours(y, height)
    pixels = images.flatten(2).float()
    value = torch.zeros((), device=images.device)
    for row, below in zip(rows, down, strict=True):
        for column, beside in zip(columns, across, strict=True):
            index = (row * width + column).flatten(1)[:, None].expand_as(pixels)
            value = value + (below * beside)[:, None] * pixels.gather(2, index).view(images.shape)
    return torch.where(inside, (value + WHOLE).clamp(0, 255).byte(), fill)


def _neighbours(place: Tensor, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The four pixels about each place along an axis, those beyond the edge by the one at it, and their weights."""
    start = (place - 0.5).floor()
    d = (place - 0.5 - start).float()
    first = start.long() - 1
    indices = [(first + k).clamp(0, length - 1) for k in range(4)]
    return indices, [((2 - d) * d - 1) * d, (d - 2) * d * d + 1, ((1 - d) * d + 1) * d, (d - 1) * d * d]


# Eight coefficients of a perspective as Pillow has them, or by tiles (left, top, right, bottom) of its quadrilaterals.
Source = tuple[float, ...] | list[tuple[Box, tuple[int, ...]]]


def _places(source: Source, width: int, height: int, device: torch.device) -> Tensor:
    """Where every pixel's middle comes from: x and y, float64 [2, H, W]."""
    y, x = (
        torch.arange(side, dtype=torch.float64, device=device)[shape] + 0.5
        for side, shape in ((height, (slice(None), None)), (width, (None, slice(None))))
    )
    if isinstance(source, tuple):
        a, b, c, d, e, f, g, h = source
        depth = g * x + h * y + 1
        return torch.stack([(a * x + b * y + c) / depth, (d * x + e * y + f) / depth])
    places = torch.empty(2, height, width, dtype=torch.float64, device=device)
    for (left, top, right, bottom), corners in source:
        across, down = (x[:, left:right] - left) / (right - left), (y[top:bottom] - top) / (bottom - top)
        for axis in range(2):
            upper_left, lower_left, lower_right, upper_right = corners[axis::2]
            places[axis, top:bottom, left:right] = (
                upper_left
                + (upper_right - upper_left) * across
                + (lower_left - upper_left) * down
                + (lower_right - lower_left - upper_right + upper_left) * across * down
            )
    return places


def _rotated(width: int, height: int, degrees: float) -> Source:
    """About the middle, counter-clockwise."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y, 0, 0)


_SOURCES: dict[str, Callable[..., Source]] = {
    "Rotate": _rotated,
    "ShearX": lambda width, height, factor: (1, factor, 0, 0, 1, 0, 0, 0),
    "ShearY": lambda width, height, factor: (1, 0, 0, factor, 1, 0, 0, 0),
    "TranslateX": lambda width, height, pixels: (1, 0, pixels, 0, 1, 0, 0, 0),
    "TranslateY": lambda width, height, pixels: (1, 0, 0, 0, 1, pixels, 0, 0),
    "TranslateXRel": lambda width, height, share: (1, 0, share * width, 0, 1, 0, 0, 0),
    "TranslateYRel": lambda width, height, share: (1, 0, 0, 0, 1, share * height, 0, 0),
    "Distort": lambda width, height, amount: distorted_tiles((width, height), int(amount)),
    "Skew": lambda width, height, amount: tuple(skewed((width, height), amount)),
}
_KINDS: dict[str, Any] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Blur": _blur,
    "Zoom": _zoom,
    **dict.fromkeys(_SOURCES, _warp),
}

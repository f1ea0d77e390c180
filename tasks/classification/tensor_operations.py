"""The operations of RandAugment on uint8 tensors, on any device: as timm's do it with Pillow.

`torchvision.transforms.v2` has most of them, but bicubic ones for Pillow's images only; these also do many images at
once, each by its own amount. `QUICK`'s pixels are Pillow's to the bit (on x86; elsewhere its compiler may fuse
products and sums), but for shears by round amounts, as 0.3, at which timm cuts: less than one value of 10,000, which
is a whole number but for its rounding, is a step of 255 off. The others' are to one step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

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


def apply_to_one(name: str, image: Tensor, *arguments: float, fillcolor: tuple[int, ...], **_: Any) -> Tensor:
    """One operation on one image, called as timm calls its own.

    Args:
        name: one that `is_known` knows.
        image: uint8 [3, H, W].
        arguments: as timm draws them.
        fillcolor: the colour of what comes from outside of the image.

    Returns:
        uint8 [3, H, W].
    """
    return _KINDS[_plain(name)](image[None], [(name, arguments, fillcolor)])[0]


def is_known(name: str) -> bool:
    """Whether there is an operation of timm's, or of `randaugment.EXTRA`, here."""
    return _plain(name) in _KINDS


def is_quick(name: str) -> bool:
    """Whether it is one of `QUICK`, which a CPU has done to one image sooner than Pillow."""
    return _plain(name) in QUICK


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
    return images & (255 << dropped).byte()


def _solarize(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return images ^ ~_negative(images - _numbers(images, operations, torch.int16))


def _solarize_add(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    added = torch.minimum(_numbers(images, operations, torch.uint8), 255 - images)
    return images + (added & _negative(images.short() - 128))


def _negative(numbers: Tensor) -> Tensor:
    """uint8, all bits where one of the whole numbers, which it overwrites, is negative, else none.

    A CPU has chosen by bits in a tenth of `torch.where`'s time.
    """
    return numbers.bitwise_right_shift_(torch.iinfo(numbers.dtype).bits - 1).byte()


def _whole(values: Tensor) -> Tensor:
    """uint8 of floating-point numbers, which it overwrites, as Pillow makes it: cut off, not rounded."""
    return values.clamp_(0, 255).int().byte()  # by way of int32 a CPU does many at once


def _blend(images: Tensor, plain: Tensor, operations: Sequence[Operation]) -> Tensor:
    """From `plain`, float32, towards the image, by each operation's factor and beyond."""
    return _whole((images - plain).mul_(_numbers(images, operations)).add_(plain))


def _grey(images: Tensor) -> Tensor:
    """Luminance as Pillow computes it, whole numbers in float32 [B, 1, H, W]; float32 has all of its sums."""
    red, green, blue = images.float().unbind(1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).div_(0x10000).floor_()[:, None]


def _color(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return _blend(images, _grey(images), operations)


def _contrast(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _blend(images, mean, operations)


def _brightness(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), operations)


def _sharpness(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Smooth is, but at the edges, a pixel five times and its eight neighbours once."""
    whole, smooth = images.short(), images.float()
    across = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
    total = (across[..., :-2, :] + across[..., 1:-1, :]).add_(across[..., 2:, :])
    total.add_(whole[..., 1:-1, 1:-1], alpha=4)
    smooth[..., 1:-1, 1:-1] = total.float().div_(13).add_(0.5).floor_()
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


def _shear_rows(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Move each row along itself by a part of how far down its middle is.

    How far is rounded for the row, not for each pixel as by Pillow, which would cost as much as the rest.
    """
    factors = np.array([factor for _, (factor,), _ in operations], dtype=np.float64)[:, None]
    place = factors * (np.arange(images.shape[-2]) + 0.5)
    colours = [colour for *_, colour in operations]
    moved = _slide(images.permute(0, 2, 3, 1), place, (place - np.floor(place))[..., None, None], colours)
    return moved.permute(0, 3, 1, 2)


def _shear_columns(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    moved = _shear_rows(images.transpose(-1, -2), operations).transpose(-1, -2)
    return moved.contiguous(memory_format=torch.channels_last)


def _shift_along_rows(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Move all rows along themselves by pixels, or by a part of their length."""
    place, d = _shifts(images.shape[-1], operations)
    colours = [colour for *_, colour in operations]
    d = d.repeat(3, axis=3)  # a CPU does rows at once, not three colours after three
    moved = _slide(images.permute(0, 2, 3, 1), place.repeat(images.shape[-2], 1), d, colours)
    return moved.permute(0, 3, 1, 2)


def _shift_along_columns(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """The same upwards: an image is one row then, of which a row is a pixel."""
    batch, _, height, width = images.shape
    place, d = _shifts(height, operations)
    rows = images.permute(0, 2, 3, 1).reshape(batch, 1, height, -1)
    moved = _slide(rows, place, d, [colour * width for *_, colour in operations])
    return moved.view(batch, height, width, 3).permute(0, 3, 1, 2)


def _shifts(length: int, operations: Sequence[Operation]) -> tuple[np.ndarray, np.ndarray]:
    """How far, in pixels, float64 [B, 1]; and what that is more than whole ones, float64 [B, 1, length, 1].

    It is rounded pixel by pixel, as Pillow does it.
    """
    place = np.array(
        [amount * (length if name.endswith("Rel") else 1) for name, (amount,), _ in operations], dtype=np.float64
    )[:, None]
    pixel = np.arange(length)
    return place, ((pixel + 0.5 + place - 0.5) - (pixel + np.floor(place)))[:, None, :, None]


def _slide(pixels: Tensor, place: np.ndarray, d: np.ndarray, colours: Sequence[tuple[int, ...]]) -> Tensor:
    """Show in each pixel of a row what lies so far behind it, bicubic by Pillow's formula in its float64.

    Args:
        pixels: uint8 [B, R, L, C], rows of L pixels.
        place: how far, in pixels, float64 [B, R].
        d: what it is more than whole pixels, float64 [B, 1 or R, 1 or L, 1 or C].
        colours: what comes from outside of a row, C values for each image.

    Returns:
        uint8 [B, R, L, C].
    """
    batch, count, length, channels = pixels.shape
    # The rows one behind the other, with copies of the first and the last pixel, two of each.
    long = length + 4
    rows = pixels.new_empty(batch * count * long + 2 * long, channels)  # the ends, a row each, are never shown
    first, last = pixels[:, :, :1], pixels[:, :, -1:]
    torch.cat([first, first, pixels, last, last], 2, out=rows[long:-long].view(batch, count, long, channels))
    begin = np.arange(1, batch * count + 1) * long + 1 + np.floor(place).clip(-length - 2, length + 2).ravel()
    moved = _windows(rows, begin, length + 3).short().view(batch, count, -1, channels)
    v1, v2, v3, v4 = (moved[:, :, k : k + length] for k in range(4))
    part, near, far = torch.from_numpy(d).to(pixels.device), v1 - v2, v3 - v4
    value = (near + far).double().mul_(-part).add_(far.add_(near, alpha=2).double())
    value = value.mul_(part).add_((v3 - v1).double()).mul_(part).add_(v2.double())
    inside, colour = _inside_and_colour(place, length, colours, pixels.device)
    return (_whole(value) & inside.view_as(value)).bitwise_or_(colour.view_as(value))


def _inside_and_colour(
    place: np.ndarray, length: int, colours: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """All bits where a pixel comes from within its row, else none; and its colour where not: uint8 [B R, L C]."""
    around = torch.tensor(colours, dtype=torch.uint8)[:, None, None]  # [B, 1, 1, C]
    bits = torch.zeros(3, length, around.shape[-1], dtype=torch.uint8)
    bits[1] = 255  # a row between two of nothing, out of which each is cut
    begin = length - np.ceil(-0.5 - place).clip(-length, length)
    inside = _windows(bits.to(device), begin.ravel(), length)
    begin = begin + 3 * length * np.arange(len(place))[:, None]
    return inside, _windows((around & ~bits).to(device), begin.ravel(), length)


def _windows(pixels: Tensor, begin: np.ndarray, length: int) -> Tensor:
    """For each place [n] in pixels [..., C], taken as one line, the `length` that begin there: [n, length C]."""
    places, channels = torch.from_numpy(begin.astype(np.int64)).to(pixels.device), pixels.shape[-1]
    return pixels.view(-1).unfold(0, channels * length, channels).index_select(0, places)


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
    "Distort": lambda width, height, amount: distorted_tiles((width, height), int(amount)),
    "Skew": lambda width, height, amount: tuple(skewed((width, height), amount)),
}
_SLIDES: dict[str, Callable[..., Tensor]] = {
    "ShearX": _shear_rows,
    "ShearY": _shear_columns,
    **dict.fromkeys(("TranslateX", "TranslateXRel"), _shift_along_rows),
    **dict.fromkeys(("TranslateY", "TranslateYRel"), _shift_along_columns),
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
    **_SLIDES,
}
QUICK = frozenset({"Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness", "Sharpness", *_SLIDES})

"""Anti-aliased, softly shaded drawing on Pillow, with a map of which thing owns each pixel.

Everything random comes from a numpy generator given by the caller, and pixels are only touched by Pillow's and numpy's
integer arithmetic: a seed gives the same picture on every machine.
"""

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SUPERSAMPLE = 4

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tone:
    """The two ends of a surface's colour; a texture mixes them."""

    dark: Colour
    light: Colour


@dataclass(frozen=True)
class Part:
    """A filled outline: points [P, 2] as (x, y), y downwards; in the object's own units, once placed in pixels."""

    points: np.ndarray
    tone: Tone


def random_for(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one picture, independent of how many others are drawn and in which order."""
    return np.random.default_rng([seed, *key])


def tone(hue: float, saturation: float, value: float, contrast: float = 0.18) -> Tone:
    """Return a tone from hue, saturation and value in 0..1; ``contrast`` is the spread of the value."""
    return Tone(_rgb(hue, saturation, value - contrast), _rgb(hue, saturation * 0.9, value + contrast / 2))


def place(
    parts: Iterable[Part], centre: tuple[float, float], scale: float, angle: float = 0.0, mirror: bool = False
) -> list[Part]:
    """Move an object drawn around the origin to its place in the picture: scale in pixels, angle in radians."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]])
    if mirror:
        matrix = np.array([[-1.0, 0.0], [0.0, 1.0]]) @ matrix
    return [replace(part, points=part.points @ matrix + np.array(centre)) for part in parts]


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, n: int = 40) -> np.ndarray:
    """Return the outline of an ellipse, turned by ``turn`` radians."""
    t = np.arange(n) * (2 * math.pi / n)
    px, py = rx * np.cos(t), ry * np.sin(t)
    return np.stack([x + px * math.cos(turn) - py * math.sin(turn), y + px * math.sin(turn) + py * math.cos(turn)], 1)


def polar(radius: Sequence[float] | np.ndarray, start: float = -math.pi / 2) -> np.ndarray:
    """Return the outline with the given distances from the origin at equal angles, clockwise from the top."""
    t = start + np.arange(len(radius)) * (2 * math.pi / len(radius))
    return np.stack([np.cos(t), np.sin(t)], 1) * np.asarray(radius)[:, None]


def clouds(rng: np.random.Generator, size: tuple[int, int], cell: tuple[int, int]) -> Image.Image:
    """Return soft noise (mode L) whose blobs are about ``cell`` pixels wide and high."""
    layers = []
    for divisor in (1, 2):
        grid = [max(2, math.ceil(side * divisor / c)) for side, c in zip(size, cell, strict=True)]
        values = rng.integers(0, 256, (grid[1], grid[0]), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC), dtype=np.uint16))
    return Image.fromarray(((2 * layers[0] + layers[1]) // 3).astype(np.uint8))


class Picture:
    """A picture being drawn, far things first.

    Attributes:
        image: RGB, the pixels so far.
        owner: uint8 [H, W], the number given to ``paint`` by the last thing that covers at least half of the pixel.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], background: Tone, cell: int = 24) -> None:
        self.rng = rng
        self.size = size
        self.texture = clouds(rng, size, (cell, cell))
        self.image = _mix(background, self.texture)
        self.owner = np.zeros((size[1], size[0]), dtype=np.uint8)

    def fill(self, part: Part, texture: Image.Image | None = None) -> None:
        """Colour one outline; ``texture`` (mode L, the picture's size) replaces the picture's own soft noise."""
        mask, box = _coverage(part.points, self.size)
        self.image.paste(_mix(part.tone, (texture or self.texture).crop(box)), box, mask)

    def paint(
        self,
        parts: Sequence[Part],
        owner: int | None = None,
        *,
        texture: Image.Image | None = None,
        relief: float = 0.0,
        shadow: float = 0.0,
    ) -> None:
        """Draw an object: its shadow, its parts in order, and a lit and a dark rim.

        Args:
            parts: placed parts, in pixels.
            owner: number written to ``self.owner`` under the object; ``None`` leaves the map alone.
            texture: see ``fill``.
            relief: width in pixels of the lit and dark rims, 0 for a flat object.
            shadow: distance in pixels between object and ground, 0 for no shadow.
        """
        whole = self.silhouette(parts)
        box = _grown(whole.getbbox() or (0, 0, 1, 1), math.ceil(3 * max(shadow, relief)), self.size)
        outline = whole.crop(box)
        if shadow:
            offset = max(1, round(shadow))
            cast = _shifted(outline, offset, offset).filter(ImageFilter.GaussianBlur(shadow * 0.6))
            self.image.paste((24, 26, 40), box, cast.point(_SHADOW))
        for part in parts:
            self.fill(part, texture)
        if relief:
            width = max(1, round(relief))
            soft = ImageFilter.GaussianBlur(relief * 0.7)
            for direction, colour in ((-1, (20, 16, 40)), (1, (255, 252, 240))):
                moved = _shifted(outline, direction * width, direction * width)
                rim = ImageChops.multiply(ImageChops.subtract(outline, moved).filter(soft), outline)
                self.image.paste(colour, box, rim.point(_RIM))
        if owner is not None:
            self.owner[np.asarray(whole) >= 128] = owner

    def silhouette(self, parts: Iterable[Part]) -> Image.Image:
        """Return the coverage of all parts together: mode L, the picture's size, 255 is fully covered."""
        whole = Image.new("L", self.size)
        for part in parts:
            mask, box = _coverage(part.points, self.size)
            whole.paste(ImageChops.lighter(whole.crop(box), mask), box)
        return whole

    def save(self, path: Path, grain: int = 3) -> None:
        """Write a JPEG, with a camera's noise of about ``grain`` grey levels."""
        noise = self.rng.integers(-grain, grain + 1, (self.size[1], self.size[0], 1), dtype=np.int16)
        pixels = np.asarray(self.image, dtype=np.int16) + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


_SHADOW = [round(v * 0.42) for v in range(256)]
_RIM = [round(v * 0.45) for v in range(256)]


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _mix(colours: Tone, texture: Image.Image) -> Image.Image:
    dark, light = (Image.new("RGB", texture.size, colour) for colour in (colours.dark, colours.light))
    return Image.composite(light, dark, texture)


def _coverage(points: np.ndarray, size: tuple[int, int]) -> tuple[Image.Image, Box]:
    """Return how much of each pixel an outline covers (mode L), for the box of the picture that it touches."""
    low, high = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0))
    left, top = (int(min(max(v, 0), side - 1)) for v, side in zip(low, size, strict=True))
    right, bottom = (int(min(max(v, start + 1), side)) for v, start, side in zip(high, (left, top), size, strict=True))
    fine = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    corners = np.rint((points - (left, top)) * SUPERSAMPLE).astype(int)
    ImageDraw.Draw(fine).polygon([(int(x), int(y)) for x, y in corners], fill=255)
    return fine.reduce(SUPERSAMPLE), (left, top, right, bottom)


def _grown(box: Box, margin: int, size: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    return max(left - margin, 0), max(top - margin, 0), min(right + margin, size[0]), min(bottom + margin, size[1])


def _shifted(mask: Image.Image, dx: int, dy: int) -> Image.Image:
    """Return the mask moved by whole pixels, empty where it came from."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (dx, dy))
    return moved

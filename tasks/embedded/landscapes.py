"""Segmentation: a road through the country, every pixel labelled but a thin line between things."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from evmamba.tasks.embedded.drawing import Part, Picture, Tone, clouds, ellipse, place, polar, random_for, tone

SEGMENTATION_CLASSES = ("sky", "hill", "grass", "water", "road", "tree", "house", "car")

_SKY, _HILL, _GRASS, _WATER, _ROAD, _TREE, _HOUSE, _CAR = range(1, 9)
_UNLABELLED = 0
_GLASS = Tone((70, 92, 120), (150, 180, 205))
_DARK = Tone((28, 28, 34), (52, 52, 60))


def write_segmentation(root: Path, *, train: int, val: int, size: int = 176, seed: int = 0) -> None:
    """Write ``images/{training,validation}/*.jpg``, ``annotations/{training,validation}/*.png`` and ``classes.txt``.

    Labels are 8-bit: 0 is unlabelled (lines between things, balloons), 1..8 are ``SEGMENTATION_CLASSES`` in order.

    Args:
        root: folder to write to.
        train, val: images in each split.
        size: width of the images in pixels; the height is 3/4 of it.
        seed: another seed gives other pictures.
    """
    for split, (name, count) in enumerate((("training", train), ("validation", val))):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = _draw(random_for(seed, 3, split, i), (size, size * 3 // 4))
            picture.save(root / "images" / name / f"scene_{i:05d}.jpg")
            labels = Image.fromarray(_without_borders(picture.owner))
            labels.save(root / "annotations" / name / f"scene_{i:05d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in SEGMENTATION_CLASSES), encoding="utf-8")


def _without_borders(labels: np.ndarray) -> np.ndarray:
    """Unlabel the pixels whose left or upper neighbour has another label."""
    border = np.zeros(labels.shape, dtype=bool)
    border[1:] |= labels[1:] != labels[:-1]
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return np.where(border, np.uint8(_UNLABELLED), labels)


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    width, height = size
    horizon = height * rng.uniform(0.36, 0.52)
    dusk = rng.random() < 0.3
    picture = Picture(rng, size, tone(0, 0, 0.5), cell=width // 5)
    _sky(picture, horizon, dusk)
    for layer in range(rng.integers(0, 3)):
        _hills(picture, horizon, layer, dusk)
    fine = clouds(rng, size, (5, 3))
    grass = tone(rng.uniform(0.19, 0.31), rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.68) - 0.08 * dusk)
    picture.paint([Part(_rectangle(-1, horizon, width + 1, height + 1), grass)], _GRASS, texture=fine)

    road_x = width * rng.uniform(0.25, 0.75)
    road = _Road(
        road_x, horizon, road_x + width * rng.uniform(-0.35, 0.35), float(height), width * rng.uniform(0.22, 0.34)
    )
    if rng.random() < 0.6:
        _lake(picture, horizon, road)
    has_road = rng.random() < 0.9
    if has_road:
        _paint_road(picture, road)

    if rng.random() < 0.35:
        _balloon(picture, horizon)
    # Far things first; 0 is the horizon and 1 the lower edge.
    things = [
        (float(rng.uniform(0.03, 0.75)), str(rng.choice(["tree", "tree", "house"]))) for _ in range(rng.integers(4, 9))
    ]
    if has_road:
        things += [(float(rng.uniform(0.25, 0.85)), "car") for _ in range(rng.integers(0, 3))]
    for depth, kind in sorted(things):
        y = horizon + depth * (height - horizon)
        scale = height * (0.05 + 0.2 * depth)
        if kind == "car":
            _car(picture, road.centre(y) + road.width(y) * rng.choice([-0.25, 0.25]), y, road.width(y) * 0.21)
        else:
            x = _free_spot(picture, y, scale)
            if x is not None:
                (_tree if kind == "tree" else _house)(picture, x, y, scale)
    return picture


class _Road:
    """A straight road in perspective."""

    def __init__(self, far_x: float, far_y: float, near_x: float, near_y: float, near_half: float) -> None:
        self.far_x, self.far_y, self.near_x, self.near_y, self.near_half = far_x, far_y, near_x, near_y, near_half

    def centre(self, y: float) -> float:
        return self.far_x + (self.near_x - self.far_x) * (y - self.far_y) / (self.near_y - self.far_y)

    def width(self, y: float) -> float:
        return 2 * self.near_half * (0.03 + 0.97 * (y - self.far_y) / (self.near_y - self.far_y))

    def strip(self, y0: float, y1: float, centre: float, half: float) -> np.ndarray:
        """Return the outline of a strip along the road; centre and half width in units of the road's width."""
        corners = [(y0, centre - half), (y0, centre + half), (y1, centre + half), (y1, centre - half)]
        return np.array([(self.centre(y) + u * self.width(y), y) for y, u in corners])


def _sky(picture: Picture, horizon: float, dusk: bool) -> None:
    rng, (width, height) = picture.rng, picture.size
    if dusk:
        air = Tone(tone(rng.uniform(0.6, 0.72), 0.4, 0.62).light, (255, 206, 158))
    else:
        air = Tone(tone(rng.uniform(0.55, 0.61), rng.uniform(0.4, 0.6), 0.85).light, (232, 242, 248))
    ramp = np.linspace(0, 255, height).clip(0, 255)
    fade = Image.fromarray(
        np.minimum(ramp * height / max(horizon, 1), 255).astype(np.uint8)[:, None].repeat(width, axis=1)
    )
    picture.paint([Part(_rectangle(-1, -1, width + 1, height + 1), air)], _SKY, texture=fade)
    if rng.random() < 0.5:
        sun = Tone((255, 214, 140), (255, 244, 214))
        x, y, r = width * rng.uniform(0.1, 0.9), horizon * rng.uniform(0.2, 0.8), width * rng.uniform(0.03, 0.05)
        picture.fill(Part(ellipse(x, y, r, r), sun))
    fluff = Tone((240, 214, 206), (255, 236, 220)) if dusk else Tone((226, 234, 240), (255, 255, 255))
    for _ in range(rng.integers(0, 4)):
        x, y, scale = width * rng.uniform(0, 1), horizon * rng.uniform(0.1, 0.75), width * rng.uniform(0.03, 0.06)
        puffs = [Part(ellipse(dx, -0.35 * r, r * 1.2, r * 0.6), fluff) for dx, r in _PUFFS]
        picture.paint(place(puffs, (x, y), scale))


def _hills(picture: Picture, horizon: float, depth: int, dusk: bool) -> None:
    rng, (width, _) = picture.rng, picture.size
    colour = tone(rng.uniform(0.5, 0.68) - 0.1 * depth, 0.26 + 0.08 * depth, 0.62 - 0.1 * depth - 0.08 * dusk, 0.12)
    x = np.linspace(-0.05, 1.05, 40)
    waves = np.zeros_like(x)
    for k in (1, 2, 3, 5):
        waves += rng.uniform(0.2, 1.0) / k * np.sin(k * 4 * x + rng.uniform(0, 6))
    top = horizon * (1 - (0.16 + 0.1 * (1 - depth)) * (1.2 + waves / 1.6).clip(0.15, 3))
    ridge = np.stack([x * width, top], 1)
    picture.paint(
        [Part(np.concatenate([ridge, [[width * 1.05, horizon + 2], [-width * 0.05, horizon + 2]]]), colour)], _HILL
    )


def _lake(picture: Picture, horizon: float, road: _Road) -> None:
    rng, (width, height) = picture.rng, picture.size
    blue = tone(rng.uniform(0.54, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.62, 0.78), 0.14)
    y = horizon + (height - horizon) * rng.uniform(0.12, 0.5)
    side = -1 if road.near_x > width / 2 else 1
    x = width / 2 + side * width * rng.uniform(0.25, 0.45)
    shore = polar(1 + 0.12 * np.sin(np.arange(48) * (6 * math.pi / 48) + rng.uniform(0, 6)))
    rx, ry = width * rng.uniform(0.22, 0.38), min((y - horizon) * 0.9, height * rng.uniform(0.07, 0.14))
    points = shore * (rx, ry) + (x, y)
    sand = Part((points - (x, y)) * 1.06 + (x, y + 1), Tone((190, 172, 120), (222, 206, 156)))
    picture.paint([sand], _GRASS)
    picture.paint([Part(points, blue)], _WATER, texture=clouds(rng, picture.size, (18, 2)))


def _paint_road(picture: Picture, road: _Road) -> None:
    rng = picture.rng
    grey = tone(0.65, 0.06, rng.uniform(0.42, 0.55), 0.1)
    top, bottom = road.far_y, road.near_y + 2
    picture.paint([Part(road.strip(top, bottom, 0, 0.5), grey)], _ROAD, texture=clouds(rng, picture.size, (3, 3)))
    white = Tone((214, 210, 200), (236, 232, 222))
    for edge in (-0.45, 0.45):
        picture.fill(Part(road.strip(top, bottom, edge, 0.012), white))
    reach = bottom - top
    for near in (1.0, 0.72, 0.51, 0.36, 0.25, 0.17):  # dashes shrink with distance
        picture.fill(Part(road.strip(top + reach * near * 0.84, top + reach * near, 0, 0.015), white))


def _free_spot(picture: Picture, y: float, half: float) -> float | None:
    """Return where a thing can stand on grass at row y, ``None`` where there is hardly room."""
    width, height = picture.size
    ground = picture.owner[min(int(y), height - 1)]
    for _ in range(10):
        x = picture.rng.uniform(0, width)
        if (ground[int(max(x - half, 0)) : int(x + half) + 1] == _GRASS).all():
            return float(x)
    return None


def _tree(picture: Picture, x: float, y: float, scale: float) -> None:
    rng = picture.rng
    leaves = tone(rng.uniform(0.24, 0.38), rng.uniform(0.45, 0.65), rng.uniform(0.36, 0.5), 0.16)
    trunk = Part(np.array([[-0.1, -0.9], [0.1, -0.9], [0.14, 0.0], [-0.14, 0.0]]), tone(0.07, 0.5, 0.36))
    if rng.random() < 0.4:  # a fir
        tiers = ((-0.5, -1.3, 0.68), (-1.0, -1.75, 0.56), (-1.45, -2.2, 0.42))
        crown = [Part(np.array([[-half, low], [0, high], [half, low]]), leaves) for low, high, half in tiers]
    else:
        offsets = rng.uniform(-0.12, 0.12, (len(_CROWN), 2))
        crown = [
            Part(ellipse(a + dx, b + dy, r, r), leaves) for (a, b, r), (dx, dy) in zip(_CROWN, offsets, strict=True)
        ]
    _ground_shadow(picture, x, y, scale * 0.7)
    picture.paint(
        place([trunk, *crown], (x, y), scale), _TREE, texture=clouds(rng, picture.size, (4, 4)), relief=scale / 9
    )


def _house(picture: Picture, x: float, y: float, scale: float) -> None:
    rng = picture.rng
    wall = tone(rng.uniform(0.05, 0.14), rng.uniform(0.08, 0.3), rng.uniform(0.82, 0.95), 0.1)
    roof = tone(rng.uniform(-0.02, 0.06), rng.uniform(0.5, 0.7), rng.uniform(0.5, 0.7))
    half = rng.uniform(0.7, 1.0)
    parts = [
        Part(_rectangle(-half, -0.95, half, 0), wall),
        Part(_rectangle(half * 0.3, -1.75, half * 0.55, -1.0), tone(0.02, 0.4, 0.5)),
        Part(np.array([[-half - 0.16, -0.9], [-half * 0.55, -1.6], [half * 0.55, -1.6], [half + 0.16, -0.9]]), roof),
        Part(_rectangle(-0.14, -0.5, 0.14, 0), tone(0.07, 0.5, 0.42)),
        Part(_rectangle(-half * 0.75, -0.68, -half * 0.75 + 0.3, -0.35), _GLASS),
        Part(_rectangle(half * 0.75 - 0.3, -0.68, half * 0.75, -0.35), _GLASS),
    ]
    _ground_shadow(picture, x, y, scale * half)
    picture.paint(place(parts, (x, y), scale, mirror=bool(rng.integers(2))), _HOUSE, relief=scale / 16)


def _car(picture: Picture, x: float, y: float, scale: float) -> None:
    """Draw a car seen from behind or from the front."""
    rng = picture.rng
    paint = tone(rng.choice([0.0, 0.02, 0.12, 0.58, 0.62, 0.9]), rng.uniform(0.55, 0.85), rng.uniform(0.65, 0.9))
    lamp = Tone((255, 226, 150), (255, 250, 224)) if rng.integers(2) else Tone((150, 20, 24), (220, 50, 44))
    parts = [
        Part(_rectangle(-0.85, -0.3, -0.5, 0.02), _DARK),
        Part(_rectangle(0.5, -0.3, 0.85, 0.02), _DARK),
        Part(np.array([[-0.75, -0.75], [-0.55, -1.3], [0.55, -1.3], [0.75, -0.75]]), paint),
        Part(np.array([[-0.6, -0.78], [-0.46, -1.19], [0.46, -1.19], [0.6, -0.78]]), _GLASS),
        Part(np.array([[-0.95, -0.2], [-0.95, -0.66], [-0.8, -0.8], [0.8, -0.8], [0.95, -0.66], [0.95, -0.2]]), paint),
        Part(_rectangle(-0.86, -0.62, -0.56, -0.44), lamp),
        Part(_rectangle(0.56, -0.62, 0.86, -0.44), lamp),
        Part(_rectangle(-0.24, -0.42, 0.24, -0.28), Tone((200, 200, 196), (240, 240, 236))),
    ]
    _ground_shadow(picture, x, y, scale)
    picture.paint(place(parts, (x, y), scale), _CAR, relief=scale / 14)


def _balloon(picture: Picture, horizon: float) -> None:
    """Draw a hot-air balloon: something that no class names."""
    rng, (width, _) = picture.rng, picture.size
    envelope = tone(rng.random(), 0.7, 0.92)
    stripe = Tone((240, 236, 226), (255, 252, 244))
    parts = [
        Part(np.array([[-0.35, 0.7], [0.35, 0.7], [0.14, 1.35], [-0.14, 1.35]]), tone(0.08, 0.3, 0.5)),
        Part(ellipse(0, 0, 0.85, 0.95), envelope),
        Part(ellipse(0, 0, 0.42, 0.95), stripe),
        Part(ellipse(0, 0, 0.16, 0.95), envelope),
        Part(_rectangle(-0.18, 1.2, 0.18, 1.5), tone(0.07, 0.6, 0.45)),
    ]
    scale = width * rng.uniform(0.035, 0.06)
    where = (width * rng.uniform(0.1, 0.9), horizon * rng.uniform(0.25, 0.6))
    picture.paint(place(parts, where, scale), _UNLABELLED, relief=scale / 7)


def _ground_shadow(picture: Picture, x: float, y: float, half: float) -> None:
    """Darken the ground at a thing's foot; the ground keeps its label."""
    mask = picture.silhouette([Part(ellipse(x + half * 0.25, y, half * 1.15, half * 0.2), _DARK)])
    picture.image.paste(_DARK.dark, (0, 0), mask.point([v * 2 // 5 for v in range(256)]))


def _rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


_PUFFS = ((-1.6, 0.7), (-0.7, 1.1), (0.3, 1.4), (1.2, 1.0), (1.9, 0.6))
_CROWN = ((-0.42, -1.05, 0.5), (0.42, -1.05, 0.5), (-0.25, -1.55, 0.5), (0.28, -1.55, 0.48), (0.0, -1.25, 0.6))

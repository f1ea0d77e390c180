"""Classification: one shape among clutter. The shape decides the class; its colour, size, place and tilt do not."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from evmamba.errors import unknown_name
from evmamba.tasks.embedded.drawing import Part, Picture, Tone, ellipse, place, polar, random_for, tone


def write_classification(
    root: Path, *, train: int, val: int, size: int = 96, seed: int = 0, classes: Sequence[str] | None = None
) -> None:
    """Write ``train/<class>/*.jpg`` and ``val/<class>/*.jpg`` under an existing or new folder.

    Args:
        root: folder to write to.
        train, val: images in each split, over all classes; at least one a class.
        size: side of the square images in pixels.
        seed: another seed gives other pictures.
        classes: some of ``CLASSIFICATION_CLASSES``; all by default.
    """
    classes = CLASSIFICATION_CLASSES if classes is None else classes
    for name in classes:
        if name not in _SHAPES:
            raise unknown_name("class", name, _SHAPES)
    if min(train, val) < len(classes):
        raise ValueError(f"{len(classes)} classes need as many images a split, got train={train}, val={val}")
    for split, (folder, count) in enumerate((("train", train), ("val", val))):
        for name in classes:
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            name = classes[i % len(classes)]
            picture = _draw(random_for(seed, 1, split, i), name, size)
            picture.save(root / folder / name / f"{name}_{i:04d}.jpg")


def _draw(rng: np.random.Generator, name: str, size: int) -> Picture:
    hue = rng.random()
    ground = tone(hue, rng.uniform(0.1, 0.35), rng.uniform(0.78, 0.92), 0.1)
    picture = Picture(rng, (size, size), ground, cell=int(rng.integers(size // 6, size // 2)))
    _pattern(picture, ground)
    for _ in range(rng.integers(1, 5)):
        _clutter(picture, 0.06)

    # Another hue than the ground's, and darker: the shape can always be seen.
    colour = tone(hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 0.8), rng.uniform(0.45, 0.72))
    scale = size * rng.uniform(0.26, 0.4)
    reach = 1.05 * scale
    centre = (rng.uniform(reach, size - reach), rng.uniform(reach, size - reach))
    parts = place([Part(_SHAPES[name](), colour)], centre, scale, rng.uniform(-0.25, 0.25), bool(rng.integers(2)))
    picture.paint(parts, relief=size / 60, shadow=size * rng.uniform(0.015, 0.05))
    for _ in range(rng.integers(0, 3)):
        _clutter(picture, 0.04)
    return picture


def _pattern(picture: Picture, ground: Tone) -> None:
    """Draw faint stripes or dots over the ground."""
    rng, (size, _) = picture.rng, picture.size
    kind = rng.integers(3)
    mark = Tone(ground.light, ground.light) if rng.integers(2) else Tone(ground.dark, ground.dark)
    step = size * rng.uniform(0.1, 0.2)
    if kind == 1:
        angle = rng.uniform(0, math.pi)
        band = np.array([[-2.0, -0.12], [2.0, -0.12], [2.0, 0.12], [-2.0, 0.12]]) * (size, step)
        for i in range(-8, 9):
            offset = (size / 2 - math.sin(angle) * i * step, size / 2 + math.cos(angle) * i * step)
            for part in place([Part(band, mark)], offset, 1.0, angle):
                picture.fill(part)
    elif kind == 2:
        for x in np.arange(step / 2, size, step):
            for y in np.arange(step / 2, size, step):
                picture.fill(Part(ellipse(x, y, step * 0.15, step * 0.15, n=12), mark))


def _clutter(picture: Picture, share: float) -> None:
    """Draw a stick, a pebble or a scrap, small beside the shape."""
    rng, (size, _) = picture.rng, picture.size
    colour = tone(rng.random(), rng.uniform(0.2, 0.7), rng.uniform(0.35, 0.9))
    stick = np.array([[-2.4, -0.18], [2.4, -0.18], [2.4, 0.18], [-2.4, 0.18]])
    outline = (stick, polar(rng.uniform(0.6, 1.0, 14)), polar(rng.uniform(0.5, 1.2, 4)))[rng.integers(3)]
    centre = (rng.uniform(0, size), rng.uniform(0, size))
    parts = place([Part(outline, colour)], centre, size * share * rng.uniform(0.6, 1.1), rng.uniform(0, 2 * math.pi))
    picture.paint(parts, relief=size / 96, shadow=size / 64)


def _arrow() -> np.ndarray:
    return np.array(
        [[0, -1], [0.75, -0.15], [0.28, -0.15], [0.28, 0.95], [-0.28, 0.95], [-0.28, -0.15], [-0.75, -0.15]]
    )


def _cross() -> np.ndarray:
    a, b = 0.3, 0.95
    corners = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return np.array(corners)


def _disk() -> np.ndarray:
    return ellipse(0, 0, 0.9, 0.9, n=64)


def _flower() -> np.ndarray:
    return polar([0.8 + 0.2 * math.cos(2 * math.pi * 6 * i / 96) for i in range(96)])


def _heart() -> np.ndarray:
    t = np.arange(64) * (2 * math.pi / 64)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y], 1)


def _moon() -> np.ndarray:
    outer = ellipse(0, 0, 0.95, 0.95, n=64)
    inner = ellipse(0.42, 0, 0.75, 0.75, n=64)
    # Outer arc the long way round the left, then back along the inner circle inside the outer one.
    outside = outer[np.linalg.norm(outer - (0.42, 0), axis=1) >= 0.75]
    inside = inner[np.linalg.norm(inner, axis=1) <= 0.95]
    first = int(np.argmax(outside[:, 1] > 0))
    return np.concatenate([np.roll(outside, -first, axis=0), inside[np.argsort(inside[:, 1])]])


def _ring() -> np.ndarray:
    outer, inner = ellipse(0, 0, 0.95, 0.95, n=64), ellipse(0, 0, 0.52, 0.52, n=64)
    return np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])  # joined by a cut of no width


def _square() -> np.ndarray:
    return np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]])


def _star() -> np.ndarray:
    return polar([1.0, 0.42] * 5)


def _triangle() -> np.ndarray:
    return np.array([[0, -0.95], [0.95, 0.75], [-0.95, 0.75]])


_SHAPES: dict[str, Callable[[], np.ndarray]] = {
    "arrow": _arrow,
    "cross": _cross,
    "disk": _disk,
    "flower": _flower,
    "heart": _heart,
    "moon": _moon,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASSIFICATION_CLASSES = tuple(_SHAPES)

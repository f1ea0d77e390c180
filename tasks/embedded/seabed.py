"""Detection: sea animals over sand, with boxes and masks of what can be seen of each."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evmamba.tasks.embedded.drawing import Part, Picture, Tone, clouds, ellipse, place, polar, random_for, tone
from evmamba.tasks.embedded.outlines import annotation

# Ids with gaps and not in alphabetical order, as in COCO: readers must map them.
DETECTION_CATEGORIES = {1: "fish", 3: "starfish", 4: "shell", 8: "turtle", 13: "jellyfish"}

_CROWD = 200  # owner number of a shoal; objects count from 1
_MIN_VISIBLE = 0.45


def write_detection(root: Path, *, train: int, val: int, size: int = 160, seed: int = 0) -> None:
    """Write ``images/{train,val}/*.jpg`` and COCO annotations ``annotations/instances_{train,val}.json``.

    Every twelfth image has no object and every eighth has a shoal of small fish annotated as a crowd. Boxes, areas and
    masks are those of the visible pixels.

    Args:
        root: folder to write to.
        train, val: images in each split.
        size: longer side of the images in pixels; the shorter one varies from 3/4 of it.
        seed: another seed gives other pictures.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        folder = root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            picture, objects = _draw(random_for(seed, 2, split, i), size, empty=i % 12 == 5, crowd=i % 8 == 3)
            image_id = 1009 + 7 * i
            file_name = f"{image_id:012d}.jpg"
            picture.save(folder / file_name)
            images.append({"id": image_id, "file_name": file_name, "width": picture.size[0], "height": picture.size[1]})
            for category, shape in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **shape})
        categories = [
            {"id": key, "name": value, "supercategory": "animal"} for key, value in DETECTION_CATEGORIES.items()
        ]
        info = {"description": "evmamba embedded detection data", "version": "1"}
        content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _draw(
    rng: np.random.Generator, longest: int, *, empty: bool, crowd: bool
) -> tuple[Picture, list[tuple[int, dict[str, Any]]]]:
    """Return a picture and its objects as (category id, geometry of the annotation)."""
    shorter = int(rng.integers(longest * 3 // 4, longest + 1))
    picture = _sea(rng, (longest, shorter) if rng.random() < 0.6 else (shorter, longest))
    if crowd:
        _paint_shoal(picture)
    categories: dict[int, int] = {}
    areas: dict[int, int] = {_CROWD: int((picture.owner == _CROWD).sum())}
    for owner in range(1, 1 if empty else 1 + int(rng.integers(1, 6))):
        category = list(DETECTION_CATEGORIES)[rng.integers(len(DETECTION_CATEGORIES))]
        parts = _free_place(picture, category, areas)
        if parts is not None:
            scale = float(np.ptp(parts[0].points, axis=0).max())
            picture.paint(parts, owner, relief=max(1.0, scale / 28), shadow=scale / 9)
            categories[owner] = category
            areas[owner] = int((picture.owner == owner).sum())
    objects = [(category, annotation(picture.owner == owner)) for owner, category in categories.items()]
    if areas[_CROWD]:
        objects.append((1, annotation(picture.owner == _CROWD, crowd=True)))
    return picture, objects


def _free_place(picture: Picture, category: int, areas: dict[int, int]) -> list[Part] | None:
    """Place an animal so that enough of every earlier one stays visible; ``None`` where the picture is too full."""
    rng = picture.rng
    animal = _ANIMALS[category](rng)
    for _ in range(12):
        scale = min(picture.size) * math.exp(rng.uniform(math.log(0.08), math.log(0.27)))
        centre = tuple(rng.uniform(scale * 0.8, side - scale * 0.8) for side in picture.size)
        parts = place(animal, (centre[0], centre[1]), scale, rng.uniform(-0.6, 0.6), bool(rng.integers(2)))
        covered = np.asarray(picture.silhouette(parts)) >= 128
        left = {owner: int(((picture.owner == owner) & ~covered).sum()) for owner in areas}
        if all(left[owner] >= _MIN_VISIBLE * area for owner, area in areas.items()):
            return parts
    return None


def _sea(rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    """Draw rippled sand under blue-green water, with pebbles and weed that are no objects."""
    hue = rng.uniform(0.47, 0.58)
    picture = Picture(rng, size, tone(hue, rng.uniform(0.35, 0.6), rng.uniform(0.55, 0.78), 0.14), cell=max(size) // 4)
    side = min(size)
    ripples = clouds(rng, size, (side // 4, side // 14))
    sand = Tone((206, 190, 150), (240, 226, 188))
    for _ in range(rng.integers(1, 4)):
        bank = _rounded(polar(rng.uniform(0.45, 1.15, 8).repeat(6)) * (1.6, 0.7), 4)
        centre = (rng.uniform(0, size[0]), rng.uniform(0.2, 1) * size[1])
        for part in place([Part(bank, sand)], centre, side * rng.uniform(0.25, 0.6)):
            picture.fill(part, ripples)
    for _ in range(rng.integers(3, 10)):
        pebble = Part(
            _rounded(polar(rng.uniform(0.7, 1.0, 16)), 2), tone(0.08, rng.uniform(0.02, 0.2), rng.uniform(0.4, 0.7))
        )
        centre = (rng.uniform(0, size[0]), rng.uniform(0, size[1]))
        picture.paint(place([pebble], centre, side * rng.uniform(0.012, 0.035)), relief=1, shadow=1.5)
    for _ in range(rng.integers(0, 4)):
        x, y, height = rng.uniform(0, size[0]), rng.uniform(0.5, 1.1) * size[1], side * rng.uniform(0.15, 0.35)
        weed = tone(rng.uniform(0.3, 0.42), 0.5, rng.uniform(0.35, 0.55))
        leaves = [Part(_ribbon(rng.uniform(-0.35, 0.35), 1.0, 0.05, rng.uniform(0, 6)), weed) for _ in range(4)]
        picture.paint(place(leaves, (x, y), height, math.pi), relief=1, shadow=2)
    return picture


def _paint_shoal(picture: Picture) -> None:
    """Draw many small fish close together, too many to annotate one by one."""
    rng, side = picture.rng, min(picture.size)
    centre = [rng.uniform(0.25, 0.75) * s for s in picture.size]
    colour = tone(rng.uniform(0.5, 0.65), rng.uniform(0.2, 0.5), rng.uniform(0.75, 0.95))
    turn, mirror = rng.uniform(-0.3, 0.3), bool(rng.integers(2))
    for _ in range(rng.integers(14, 22)):
        where = (centre[0] + side * rng.uniform(-0.2, 0.2), centre[1] + side * rng.uniform(-0.12, 0.12))
        fish = place(_fish_in(colour, colour), where, side * rng.uniform(0.028, 0.04), turn, mirror)
        picture.paint(fish, _CROWD, relief=1, shadow=2)


def _fish(rng: np.random.Generator) -> list[Part]:
    colour = tone(rng.choice([0.03, 0.08, 0.13, 0.6, 0.92]) + rng.uniform(-0.03, 0.03), rng.uniform(0.6, 0.85), 0.9)
    stripe = Tone((245, 245, 240), (255, 255, 255)) if rng.integers(2) else tone(0.62, 0.5, 0.35)
    return _fish_in(colour, stripe)


def _fish_in(colour: Tone, stripe: Tone) -> list[Part]:
    body = ellipse(0.15, 0, 0.85, 0.5)
    tail = np.array([[-0.5, 0], [-0.8, -0.2], [-1.1, -0.5], [-1.0, 0], [-1.1, 0.5], [-0.8, 0.2]])
    fin = np.array([[-0.2, -0.4], [0.0, -0.72], [0.45, -0.62], [0.5, -0.36]])
    band = np.array([[0.0, -0.48], [0.24, -0.49], [0.3, 0.0], [0.24, 0.49], [0.0, 0.48], [0.08, 0.0]])
    return [
        Part(body, colour),
        Part(tail, colour),
        Part(fin, colour),
        Part(band, stripe),
        Part(ellipse(-0.28, 0, 0.1, 0.38), stripe),
        Part(ellipse(0.66, -0.12, 0.12, 0.12), Tone((250, 250, 250), (255, 255, 255))),
        Part(ellipse(0.69, -0.12, 0.065, 0.065), _INK),
    ]


def _starfish(rng: np.random.Generator) -> list[Part]:
    colour = tone(rng.uniform(0.98, 1.09), rng.uniform(0.6, 0.85), rng.uniform(0.8, 0.95))
    angles = np.arange(100) * (2 * math.pi / 100)
    arms = 0.38 + 0.62 * np.abs(np.cos(angles * 2.5)) ** 2.5
    spots = [
        Part(ellipse(r * math.sin(a), -r * math.cos(a), 0.07, 0.07, n=12), Tone(colour.light, (255, 236, 200)))
        for a in np.arange(5) * (2 * math.pi / 5)
        for r in (0.18, 0.42, 0.66)
    ]
    return [Part(polar(arms), colour), *spots]


def _shell(rng: np.random.Generator) -> list[Part]:
    colour = tone(rng.uniform(0.9, 1.0), rng.uniform(0.1, 0.35), 0.95, 0.12)
    t = np.linspace(-1.15, 1.15, 61)
    radius = 1.55 + 0.07 * np.cos(t / 2.3 * 7 * 2 * math.pi)
    fan = np.stack([radius * np.sin(t) * 0.68, 0.8 - radius * np.cos(t) * 1.02], 1)
    hinge = np.array([[-0.34, 0.62], [0.34, 0.62], [0.26, 0.92], [-0.26, 0.92]])
    rib = tone(0.95, 0.35, 0.7)
    ribs = []
    for a in np.linspace(-0.85, 0.85, 6):
        along, side = np.array([math.sin(a) * 0.68, -math.cos(a) * 1.02]), np.array([math.cos(a), math.sin(a)]) * 0.035
        ribs.append(
            Part(
                np.array([(0, 0.75) + along * 0.2, (0, 0.8) + along * 1.42 - side, (0, 0.8) + along * 1.42 + side]), rib
            )
        )
    return [Part(np.concatenate([fan, [[0.0, 0.85]]]), colour), Part(hinge, colour), *ribs]


def _turtle(rng: np.random.Generator) -> list[Part]:
    skin = tone(rng.uniform(0.2, 0.3), rng.uniform(0.35, 0.6), rng.uniform(0.6, 0.75))
    armour = tone(rng.uniform(0.07, 0.3), rng.uniform(0.5, 0.7), rng.uniform(0.4, 0.6))
    plate = Tone(armour.light, armour.light)
    flippers = [ellipse(x, y, length, 0.17, turn) for x, y, length, turn in _FLIPPERS]
    return [
        *(Part(flipper, skin) for flipper in flippers),
        Part(ellipse(0.88, 0, 0.26, 0.2), skin),
        Part(ellipse(0, 0, 0.72, 0.58), armour),
        Part(polar([0.24] * 6), plate),
        *(
            Part(polar([0.15] * 6) + np.array([0.42 * math.cos(a), 0.36 * math.sin(a)]), plate)
            for a in np.arange(6) * math.pi / 3
        ),
        Part(ellipse(0.98, -0.09, 0.04, 0.04, n=12), _INK),
        Part(ellipse(0.98, 0.09, 0.04, 0.04, n=12), _INK),
    ]


def _jellyfish(rng: np.random.Generator) -> list[Part]:
    colour = tone(rng.uniform(0.72, 0.86), rng.uniform(0.3, 0.5), rng.uniform(0.85, 0.95))
    t = np.linspace(math.pi, 2 * math.pi, 40)
    dome = np.stack([0.75 * np.cos(t), 0.05 + 0.85 * np.sin(t)], 1)
    hem = np.stack([np.linspace(0.75, -0.75, 41), 0.05 + 0.09 * np.abs(np.sin(np.linspace(0, 5 * math.pi, 41)))], 1)
    tentacles = [
        Part(
            _ribbon(0.0, rng.uniform(0.7, 0.9), 0.08, rng.uniform(0, 6)) + np.array([x, 0.05]),
            Tone(colour.dark, colour.light),
        )
        for x in (-0.55, -0.2, 0.2, 0.55)
    ]
    glow = Part(ellipse(-0.2, -0.42, 0.2, 0.14, -0.5), Tone(colour.light, (255, 245, 255)))
    return [Part(np.concatenate([dome, hem]), colour), *tentacles, glow]


def _ribbon(lean: float, length: float, width: float, phase: float) -> np.ndarray:
    """Return a wavy band from the origin downwards."""
    t = np.linspace(0, 1, 20)
    x = lean * t + 0.08 * np.sin(8 * t + phase) * t
    half = width * (1 - 0.75 * t)
    return np.concatenate([np.stack([x - half, length * t], 1), np.stack([x + half, length * t], 1)[::-1]])


def _rounded(outline: np.ndarray, reach: int) -> np.ndarray:
    """Smooth a closed outline by averaging every point with ``reach`` neighbours on each side."""
    return np.mean([np.roll(outline, k, axis=0) for k in range(-reach, reach + 1)], axis=0)


_INK = Tone((20, 20, 30), (40, 40, 55))
_FLIPPERS = ((0.5, -0.58, 0.45, -0.9), (0.5, 0.58, 0.45, 0.9), (-0.58, -0.45, 0.3, 0.8), (-0.58, 0.45, 0.3, -0.8))
_ANIMALS: dict[int, Callable[[np.random.Generator], list[Part]]] = {
    1: _fish,
    3: _starfish,
    4: _shell,
    8: _turtle,
    13: _jellyfish,
}

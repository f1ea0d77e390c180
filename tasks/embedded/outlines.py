"""Instance masks as COCO annotations: polygons that give back exactly the same pixels, and run lengths for crowds."""

from typing import Any

import numpy as np


def annotation(mask: np.ndarray, *, crowd: bool = False) -> dict[str, Any]:
    """Return the geometry of one COCO annotation of a visible mask.

    Args:
        mask: bool [H, W], at least one pixel.
        crowd: write run lengths (COCO's form for ``iscrowd``) instead of polygons.

    Returns:
        ``segmentation``, ``area`` (pixels), ``bbox`` (x, y, width, height in pixels), ``iscrowd``.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "segmentation": run_lengths(mask) if crowd else polygons(mask),
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "iscrowd": int(crowd),
    }


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return COCO's uncompressed run lengths: column by column, beginning with the zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Return outlines [x0, y0, x1, y1, ...] along the pixels' edges, one for each connected piece.

    COCO's polygons know no holes, so a piece with a hole is cut in two along the hole's left edge.
    """
    outer = []
    for loop in _loops(mask):
        if _is_hole(loop):
            cut = min(x for x, _ in loop)
            left, right = mask.copy(), mask.copy()
            left[:, cut:], right[:, :cut] = False, False
            return polygons(left) + polygons(right)
        outer.append([float(v) for corner in _corners(loop) for v in corner])
    return outer


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Chain the pixel edges between inside and outside to closed loops, the inside on the right (y points down)."""
    padded = np.pad(mask, 1).astype(np.int8)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    down = np.diff(padded, axis=0)[:, 1:-1]
    across = np.diff(padded, axis=1)[1:-1, :]
    for y, x in np.argwhere(down):  # a top edge runs right, a bottom edge left
        start, end = (x, x + 1) if down[y, x] > 0 else (x + 1, x)
        steps.setdefault((int(start), int(y)), []).append((int(end), int(y)))
    for y, x in np.argwhere(across):  # a left edge runs up, a right edge down
        start, end = (y + 1, y) if across[y, x] > 0 else (y, y + 1)
        steps.setdefault((int(x), int(start)), []).append((int(x), int(end)))

    loops = []
    while steps:
        here = first = next(iter(steps))
        loop: list[tuple[int, int]] = []
        heading = (0, 0)
        while not loop or here != first:
            ways = steps[here]
            # Where two pixels touch by a corner only, turning right keeps them apart.
            there = max(ways, key=lambda p: heading[0] * (p[1] - here[1]) - heading[1] * (p[0] - here[0]))
            ways.remove(there)
            if not ways:
                del steps[here]
            loop.append(here)
            heading, here = (there[0] - here[0], there[1] - here[1]), there
        loops.append(loop)
    return loops


def _is_hole(loop: list[tuple[int, int]]) -> bool:
    """Say whether a loop runs anticlockwise on the screen, that is around the outside."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True)) < 0


def _corners(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Drop the points in the middle of straight edges."""
    around = zip(loop[-1:] + loop[:-1], loop, loop[1:] + loop[:1], strict=True)
    return [(x, y) for (x0, y0), (x, y), (x1, y1) in around if (x - x0) * (y1 - y) != (x1 - x) * (y - y0)]

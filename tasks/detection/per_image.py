"""How every detection was matched: average precision again, of any sample of the images."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from evmamba.tasks.per_image import PerImage, expect

# COCOeval's area ranges, in its order, and its ten IoU thresholds; metric -> (area range, thresholds).
AREAS, THRESHOLDS = 4, 10
PRECISIONS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "AP": (0, tuple(range(THRESHOLDS))),
    "AP50": (0, (0,)),
    "AP75": (0, (5,)),
    "APs": (1, tuple(range(THRESHOLDS))),
    "APm": (2, tuple(range(THRESHOLDS))),
    "APl": (3, tuple(range(THRESHOLDS))),
}
MASKS = "mask_"
RECALLS = np.linspace(0, 1, 101)
# Numbers in one temporary array.
CHUNK = 2**22
BITS = 2 ** np.arange(THRESHOLDS, dtype=np.uint16)


class Matches(PerImage):
    """Matches of boxes and, with ``mask_`` before the name, of masks. n detections, m pairs of image and class.

    Arrays: ``detection`` int32 [n, 2] image's and class's index, ``score`` float64 [n], ``matched`` and ``ignored``
    uint16 [n, 4], for each area range a bit for each IoU threshold; ``object`` int32 [m, 2 + 4] image's and class's
    index, and how many objects count in each area range.
    """

    kinds: ClassVar[Mapping[str, str]] = {"detection": "i", "score": "f", "matched": "u", "ignored": "u", "object": "i"}

    @staticmethod
    def plain(name: str) -> str:
        return name.removeprefix(MASKS)

    @property
    def metrics(self) -> tuple[str, ...]:
        kinds = ("", MASKS) if f"{MASKS}score" in self.arrays else ("",)
        return tuple(f"{kind}{name}" for kind in kinds for name in PRECISIONS)

    @classmethod
    def of(cls, images: list[Any], found: Mapping[str, Mapping[str, np.ndarray]]) -> Self:
        """Put together what `matches_of` gives.

        Args:
            images: ids as COCOeval sorts them.
            found: arrays of boxes under "", of masks under "mask_".
        """
        arrays = {f"{kind}{name}": array for kind, part in found.items() for name, array in part.items()}
        # By the text of an id: its order is that of any other kind of image.
        names = [str(image) for image in images]
        place = np.empty(len(names), dtype=np.int32)
        place[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names), dtype=np.int32)
        for name, array in arrays.items():
            if cls.plain(name) in ("detection", "object"):
                arrays[name] = np.column_stack([place[array[:, 0]], array[:, 1:]])
        return cls(sorted(names), arrays)

    def check(self) -> None:
        for kind in {name[: len(name) - len(self.plain(name))] for name in self.arrays} | {""}:
            pairs, score, *bits, objects = (self.arrays[f"{kind}{name}"] for name in self.kinds)
            n = len(score)
            expect(score.shape == (n,) and pairs.shape == (n, 2), f"{kind}detection and {kind}score differ in length")
            expect(all(b.shape == (n, AREAS) for b in bits), f"{kind}matched or {kind}ignored has another length")
            expect(objects.ndim == 2 and objects.shape[1] == 2 + AREAS, f"{kind}object has shape {objects.shape}")
            for rows in (pairs, objects):
                expect(
                    bool((rows >= 0).all() and (rows[:, 0] < len(self.images)).all()),
                    f"{kind}detection or {kind}object names images that are not there",
                )

    def metric(self, name: str, weights: np.ndarray) -> np.ndarray:
        kind = MASKS if name.startswith(MASKS) else ""
        area, thresholds = PRECISIONS[name.removeprefix(MASKS)]
        detection, score, matched, ignored, objects = (self.arrays[f"{kind}{part}"] for part in self.kinds)
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for category in np.unique(objects[objects[:, 2 + area] > 0, 1]):
            own = objects[objects[:, 1] == category]
            positives = weights[:, own[:, 0]] @ own[:, 2 + area].astype(np.float64)
            rows = np.flatnonzero(detection[:, 1] == category)
            rows = rows[np.argsort(-score[rows], kind="mergesort")]
            # [thresholds, n]
            hit, out = (((b[rows, area] & BITS[list(thresholds), None]) > 0) for b in (matched, ignored))
            step = max(1, CHUNK // max(1, len(rows)))
            for start in range(0, len(weights), step):
                part = slice(start, start + step)
                precision = _average_precision(weights[part][:, detection[rows, 0]], hit, out, positives[part])
                total[part] += precision
            classes += positives > 0
        with np.errstate(invalid="ignore"):  # no object at all: NaN
            return total / classes


def _average_precision(weights: np.ndarray, hit: np.ndarray, ignored: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """One class's average precision, the mean over thresholds; 0 where a sample has no such object.

    Only detections that hit are looked at: in between, precision falls and recall stays.

    Args:
        weights: [S, n], detections by falling score.
        hit, ignored: [thresholds, n].
        positives: [S].
    """
    found = np.cumsum(weights, axis=1)
    defined = positives > 0
    total = np.zeros(len(weights))
    for matched, left_out in zip(hit, ignored, strict=True):
        hits = np.flatnonzero(matched & ~left_out)
        if not len(hits):
            continue
        true = np.cumsum(weights[:, hits], axis=1)
        counted = found[:, hits]
        if (dropped := np.flatnonzero(left_out)).size:
            before = np.searchsorted(dropped, hits)
            gone = np.cumsum(weights[:, dropped], axis=1)
            counted = counted - np.column_stack([np.zeros(len(gone)), gone])[:, before]
        precision = true / (counted + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = np.divide(true, positives[:, None], out=np.zeros_like(true), where=defined[:, None])
        # How many of the 101 recalls are reached by a hit and not by the one before it.
        reached = np.searchsorted(RECALLS, recall, side="right")
        total += (best * np.diff(reached, axis=1, prepend=0)).sum(1)
    return np.where(defined, total / (len(RECALLS) * len(hit)), 0.0)


def matches_of(run: Any) -> dict[str, np.ndarray]:
    """Collect the arrays of `Matches` from a COCOeval whose `evaluate` has run; images are numbered as in its
    parameters."""
    images, categories = len(run.params.imgIds), len(run.params.catIds)
    largest = run.params.maxDets[-1]
    pairs: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    matched: list[np.ndarray] = []
    ignored: list[np.ndarray] = []
    objects: list[list[int]] = []
    for k in range(categories):
        for i in range(images):
            areas = [run.evalImgs[(k * AREAS + a) * images + i] for a in range(AREAS)]
            if areas[0] is None:  # neither objects nor detections
                continue
            score = np.asarray(areas[0]["dtScores"][:largest], dtype=np.float64)
            pairs.append(np.tile([i, k], (len(score), 1)))
            scores.append(score)
            for into, key in ((matched, "dtMatches"), (ignored, "dtIgnore")):
                bits = [(np.asarray(e[key])[:, :largest] != 0).T @ BITS for e in areas]
                into.append(np.stack(bits, axis=1).astype(np.uint16))
            counts = [int((np.asarray(e["gtIgnore"]) == 0).sum()) for e in areas]
            if any(counts):
                objects.append([i, k, *counts])
    return {
        "detection": np.concatenate([np.empty((0, 2)), *pairs]).astype(np.int32),
        "score": np.concatenate([np.empty(0), *scores]),
        "matched": np.concatenate([np.empty((0, AREAS)), *matched]).astype(np.uint16),
        "ignored": np.concatenate([np.empty((0, AREAS)), *ignored]).astype(np.uint16),
        "object": np.array(objects, dtype=np.int32).reshape(-1, 2 + AREAS),
    }

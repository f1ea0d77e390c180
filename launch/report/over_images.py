"""Differences and intervals over the test images, from what every run keeps of each of them (`PerImage`).

They are of the trained weights at hand: another training of the same network gives others, which only several seeds
can tell (`significance`). Top-1 and top-5 are compared by McNemar's exact test (Psychometrika 12, 1947) and have
Wilson's interval; what is no mean over images (average precision, mIoU) by a paired bootstrap: all networks on the same
samples of the images, a t-test with the standard error over these samples. Holm's correction over a column's pairs.
"""

import functools
import itertools
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from evmamba.errors import UserError
from evmamba.launch.report.significance import LEVEL, Difference, corrected
from evmamba.launch.store.results import Result, file_hash
from evmamba.tasks import TASKS
from evmamba.tasks.per_image import PER_IMAGE_FILE, PerImage

SAMPLES = 1000
RULE = (
    "of one seed (1): ± half of the 95% interval over the test images (Wilson's, or by bootstrap), which tells nothing "
    "of another training. Networks differ on the images by McNemar's test or a paired bootstrap, corrected by Holm"
)


def kept(result: Result) -> PerImage | None:
    """What a run kept of its test images; None where it kept nothing, or was copied without it.

    Raises:
        UserError: the file is not the one that the run wrote.
    """
    digest = (result.details.get("sha256") or {}).get(PER_IMAGE_FILE)
    if digest is None or result.folder is None or result.task not in TASKS or TASKS[result.task].per_image is None:
        return None
    path = result.folder / PER_IMAGE_FILE
    if not path.is_file():
        return None
    if file_hash(path) != digest:
        raise UserError(f"{path}: not the file that its run wrote (another SHA-256 than in its result); repeat the run")
    kind: type[PerImage] = TASKS[result.task].load("per_image")
    return kind.read(path)


def half_width(images: PerImage, metric: str) -> float | None:
    """Half of the 95 % interval of one run's metric over the images, a fraction; None where there is none to tell."""
    n = len(images.images)
    if n < 2 or metric not in images.metrics:
        return None
    right = images.outcomes(metric)
    if right is not None:
        low, high = wilson(right)
        return (high - low) / 2
    return float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * _standard_error(_replicates(images, metric), n) or None


def wilson(right: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of images that are right."""
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(1 - LEVEL, method="wilson")
    return float(found.low), float(found.high)


def differences(networks: Mapping[str, PerImage], metric: str) -> dict[tuple[str, str], Difference]:
    """Compare all pairs of a column; pairs that were tested on other images than each other are left out.

    Returns:
        A difference, in fractions, for each pair in both orders; its interval is not corrected for the number of pairs.
    """
    known = {name: images for name, images in networks.items() if metric in images.metrics and len(images.images) > 1}
    found = {
        (a, b): _difference(known[a], known[b], metric)
        for a, b in itertools.combinations(known, 2)
        if known[a].images == known[b].images
    }
    return corrected(found)


def _difference(one: PerImage, other: PerImage, metric: str) -> Difference:
    n = len(one.images)
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1))
    mine, others = one.outcomes(metric), other.outcomes(metric)
    if mine is not None and others is not None:
        only_one, only_other = int((mine & ~others).sum()), int((others & ~mine).sum())
        mean = (only_one - only_other) / n
        error = math.sqrt(max(0.0, (only_one + only_other) / n - mean**2) / n)
        discordant = only_one + only_other
        p = float(stats.binomtest(only_one, discordant).pvalue) if discordant else 1.0
        return Difference(mean, mean - reach * error, mean + reach * error, p)
    whole = np.ones((1, n))
    mean = float(one.metric(metric, whole)[0] - other.metric(metric, whole)[0])
    error = _standard_error(_replicates(one, metric) - _replicates(other, metric), n)
    same = math.nan if mean else 1.0  # all samples alike: nothing to go by
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else same
    return Difference(mean, mean - reach * error, mean + reach * error, p)


def _standard_error(replicates: np.ndarray, n: int) -> float:
    """From samples of n images, whose variance is too small by (n - 1) / n: of a mean it is then the t-test's."""
    return float(np.nanstd(replicates, ddof=1)) * math.sqrt(n / (n - 1))


@functools.lru_cache(maxsize=256)
def _replicates(images: PerImage, metric: str) -> np.ndarray:
    """The metric of the samples of `_samples`; the same object is asked for once a pair."""
    return images.metric(metric, _samples(len(images.images)))


@functools.lru_cache(maxsize=4)
def _samples(n: int) -> np.ndarray:
    """How often each of n images is in each sample, [SAMPLES, n]: the same samples for every network."""
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=SAMPLES).astype(np.float64)

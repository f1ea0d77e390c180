"""Intervals and differences over the test images: right at their level, and from the run's own file alone."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evmamba.errors import UserError
from evmamba.launch.report.over_images import differences, half_width, kept
from evmamba.launch.report.significance import LEVEL
from evmamba.launch.store.results import file_hash
from evmamba.tasks.classification.per_image import Right
from evmamba.tasks.per_image import PER_IMAGE_FILE
from evmamba.tasks.segmentation.per_image import Overlaps

from ..handmade import made_result


def right(*shares: np.ndarray) -> list[Right]:
    """Networks that are right on the images where their row is true."""
    names = [f"{i:05d}" for i in range(len(shares[0]))]
    return [Right(names, {"top1": share, "top5": np.ones_like(share)}) for share in shares]


def overlaps(random: np.random.Generator, images: int, networks: int, better: float = 0.0) -> list[Overlaps]:
    """Networks of one quality on images of two classes and of unequal difficulty; the first is better by `better`."""
    union = random.integers(50, 200, (images, 2))
    difficulty = random.uniform(0.3, 0.8, (images, 2))
    found = []
    for n in range(networks):
        share = difficulty + random.normal(0, 0.1, (images, 2)) + (better if n == 0 else 0)
        hit = np.round(union * share.clip(0, 1)).astype(np.int64)
        found.append(Overlaps([f"{i:05d}" for i in range(images)], {"mIoU": np.stack([hit, union], axis=1)}))
    return found


def alarms(networks: list, metric: str) -> bool:
    found = differences({str(n): images for n, images in enumerate(networks)}, metric)
    return any(difference.real for difference in found.values())


def test_equal_networks_are_called_different_in_at_most_one_table_of_twenty():
    random, tables = np.random.default_rng(0), 150
    difficulty = random.uniform(0, 1, 200)
    by_mcnemar = [alarms(right(*(random.random((6, 200)) < difficulty)), "top1") for _ in range(tables)]
    by_bootstrap = [alarms(overlaps(random, 60, 6), "mIoU") for _ in range(tables)]
    for found in (by_mcnemar, by_bootstrap):
        assert np.mean(found) <= LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / tables)


def test_a_large_difference_is_found_in_both_orders():
    random = np.random.default_rng(1)
    found = differences({str(n): images for n, images in enumerate(overlaps(random, 60, 4, better=0.1))}, "mIoU")
    assert all(found["0", str(n)].real and found["0", str(n)].low > 0 for n in (1, 2, 3))
    assert found["2", "0"].mean == -found["0", "2"].mean
    assert not found["1", "2"].real
    one, other = right(np.arange(400) < 300, np.arange(400) >= 160)
    difference = differences({"a": one, "b": other}, "top1")["a", "b"]
    assert difference.p == pytest.approx(stats.binomtest(160, 260).pvalue)
    assert difference.mean == pytest.approx(60 / 400)


def test_intervals_are_wilsons_and_the_bootstraps():
    (kept_right,) = right(np.arange(100) < 80)
    expected = stats.binomtest(80, 100).proportion_ci(0.95, method="wilson")
    assert half_width(kept_right, "top1") == pytest.approx((expected.high - expected.low) / 2)
    assert half_width(kept_right, "top5") > 0.01  # all right: no interval of no width
    # Equal unions: the mean over images, whose standard error is known.
    random = np.random.default_rng(2)
    hit = random.integers(20, 80, (80, 1))
    single = Overlaps(
        [f"{i:02d}" for i in range(80)], {"mIoU": np.stack([hit, np.full_like(hit, 100)], axis=1).astype(np.int64)}
    )
    error = float(np.std(hit / 100, ddof=1)) / np.sqrt(80)
    assert half_width(single, "mIoU") == pytest.approx(stats.t.ppf(0.975, 79) * error, rel=0.08)
    assert half_width(single, "AP") is None


def test_other_images_and_equal_networks_give_no_verdict():
    one, other = right(np.arange(40) < 20, np.arange(40) < 20)
    assert differences({"a": one, "b": other}, "top1")["a", "b"].p == 1
    renamed = Right([f"x{name}" for name in other.images], other.arrays)
    assert differences({"a": one, "b": renamed}, "top1") == {}


def test_the_file_is_the_one_that_the_run_wrote(tmp_path: Path):
    (images,) = right(np.arange(10) < 5)
    images.write(tmp_path / PER_IMAGE_FILE)
    digest = {"sha256": {PER_IMAGE_FILE: file_hash(tmp_path / PER_IMAGE_FILE)}}
    result = made_result("classification", "resnet18", details=digest, folder=tmp_path)
    assert kept(result).arrays["top1"].sum() == 5
    assert kept(made_result("classification", "resnet18", folder=tmp_path)) is None  # of before it was kept
    (other,) = right(np.arange(10) < 9)
    other.write(tmp_path / PER_IMAGE_FILE)
    with pytest.raises(UserError, match="another SHA-256"):
        kept(result)
    (tmp_path / PER_IMAGE_FILE).unlink()
    assert kept(result) is None

"""A published number agrees if it may lie in the interval before it was rounded; a given tolerance decides."""

import math

import numpy as np
import pytest

from evmamba.errors import UserError
from evmamba.launch.report.certificate import Comparison, compare, interval, read_published, recomputed
from evmamba.tasks.classification.per_image import Right
from evmamba.tasks.segmentation.per_image import Overlaps

from ..handmade import made_result


def right(hits: int, n: int) -> Right:
    return Right([f"{i:05d}" for i in range(n)], {"top1": np.arange(n) < hits, "top5": np.ones(n, dtype=bool)})


def wilson(p: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The textbook's formula."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_the_interval_of_a_share_is_wilsons():
    assert interval(right(765, 1000), "top1") == pytest.approx(wilson(0.765, 1000))
    assert interval(right(50, 50), "top5")[1] == 1.0


def test_the_interval_of_the_paper_is_seen_whole():
    """50,000 images and 76.5 %: plus and minus 0.37 points."""
    result = made_result("classification", "efficientvmamba_t", metrics={"top1": 0.765, "top5": 1.0})
    for published, agrees in (("76.5", True), ("76.9", True), ("77.0", False), ("76.0", False)):
        (found,) = compare(result, right(38250, 50000), {"top1": published})
        assert found.agrees == agrees, published
        assert found.high - found.low == pytest.approx(0.743, abs=1e-3)
    assert found.difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("published", "tolerance", "agrees"),
    [(76.5, 0.0, True), (76.6, 0.0, False), (76.6, 0.1, True), (70.0, None, False)],
)
def test_a_tolerance_or_rounding_alone_decide_without_an_interval(published, tolerance, agrees):
    assert Comparison("top-1 (%)", 76.54, published, 0.05, None, None, tolerance).agrees == agrees
    if tolerance is not None:
        assert Comparison("top-1 (%)", 76.54, published, 0.05, 50, 90, tolerance).agrees == agrees


def test_a_bootstrap_interval_holds_the_value():
    random = np.random.default_rng(0)
    union = random.integers(50, 200, (40, 2))
    counts = np.stack([(union * random.uniform(0.3, 0.8, (40, 2))).astype(np.int64), union], axis=1)
    images = Overlaps([f"{i:05d}" for i in range(40)], {"mIoU": counts})
    low, high = interval(images, "mIoU")
    assert low < recomputed(images, "mIoU") < high
    expected = (counts[:, 0].sum(0) / counts[:, 1].sum(0)).mean()
    assert recomputed(images, "mIoU") == pytest.approx(expected)


def test_published_numbers_are_read_as_printed():
    assert read_published(["76.5"], "classification", "linear") == {"top1": "76.5"}
    assert read_published(["AP=37.50", "AP50=57.8"], "detection", "retinanet") == {"AP": "37.50", "AP50": "57.8"}
    with pytest.raises(UserError, match="unknown metric 'AP5'"):
        read_published(["AP5=3"], "detection", "retinanet")
    with pytest.raises(UserError, match="write METRIC=NUMBER"):
        read_published(["AP=much"], "detection", "retinanet")


def test_a_published_metric_that_was_not_measured_is_named():
    result = made_result("classification", "resnet18", metrics={"top1": 0.5, "top5": None})
    with pytest.raises(UserError, match="top5 was not measured"):
        compare(result, None, {"top5": "90.0"})


def test_an_optional_number_counts_where_it_was_measured_or_is_asked_for():
    result = made_result("segmentation", "resnet18", metrics={"mIoU": 0.5})
    numbers = {"mIoU": "50.0", "mIoU_ms": "51.0"}
    assert [one.header for one in compare(result, None, numbers, given=False)] == ["mIoU (%)"]
    with pytest.raises(UserError, match="mIoU_ms was not measured"):
        compare(result, None, numbers)
    with pytest.raises(UserError, match="mIoU was not measured"):
        compare(made_result("segmentation", "resnet18", metrics={}), None, numbers, given=False)

"""Differences are called real at the stated level: held by simulation, and against scipy's own tests."""

import numpy as np
import pytest
from scipy import optimize, stats

from evmamba.launch.report.significance import LEVEL, differences, half_width, held, holm

NETWORKS = 24


def rate_of_false_alarms(seeds: int, tables: int, spreads: np.ndarray) -> float:
    """Share of tables of equal networks in which any pair is called different."""
    random = np.random.default_rng(seeds)
    alarms = 0
    for _ in range(tables):
        values = random.normal(50.0, spreads[:, None], (len(spreads), seeds))
        found = differences({str(n): row.tolist() for n, row in enumerate(values)})
        alarms += any(difference.real for difference in found.values())
    return alarms / tables


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("unequal", [False, True], ids=["one spread", "spreads from 0.3 to 3"])
def test_equal_networks_are_called_different_in_at_most_one_table_of_twenty(seeds, unequal):
    tables = 600
    spreads = np.geomspace(0.3, 3.0, NETWORKS) if unequal else np.ones(NETWORKS)
    rate = rate_of_false_alarms(seeds, tables, spreads)
    # Two standard errors of the simulation itself.
    assert rate <= LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / tables)
    assert seeds > 2 or rate == 0


def test_two_equal_networks_alone_are_called_different_about_as_often_as_the_level_says():
    rate = rate_of_false_alarms(5, 2000, np.ones(2))
    assert 0.025 < rate <= LEVEL + 0.01


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 5), (10, 3), (5, 5)])
def test_two_equal_networks_of_any_spreads_are_called_different_as_often_as_the_level_says_at_worst(first, second):
    """Welch's p alone is too small: by up to a factor of 5 here."""
    tables, random = 200_000, np.random.default_rng(0)
    worst = dict.fromkeys((0.05, 0.005), 0.0)
    alone = dict(worst)
    for spread in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        one, other = random.normal(0, spread, (first, tables)), random.normal(0, 1, (second, tables))
        welch = stats.ttest_ind(one, other, equal_var=False).pvalue
        for level in worst:
            # The largest Welch p that is still called different.
            limit = optimize.brentq(lambda p, level=level: held(p, first, second) - level, 1e-9, 1)
            worst[level] = max(worst[level], np.mean(welch <= limit))
            alone[level] = max(alone[level], np.mean(welch <= level))
    for level, rate in worst.items():
        error = np.sqrt(level / tables)
        assert 0.8 * level < rate < 1.02 * level + 3 * error
        assert alone[level] > 1.02 * level + 3 * error


def test_a_large_difference_is_found():
    random = np.random.default_rng(0)
    samples = {str(n): random.normal(50 + 10 * (n == 7), 1, 5).tolist() for n in range(NETWORKS)}
    found = differences(samples)
    assert all(found["7", str(n)].real for n in range(NETWORKS) if n != 7)
    assert not any(found["3", str(n)].real for n in range(NETWORKS) if n not in (3, 7))
    assert found["7", "0"].low < found["7", "0"].mean < found["7", "0"].high
    assert found["0", "7"].mean == -found["7", "0"].mean


def test_interval_and_p_are_those_of_scipy():
    a, b = [70.1, 70.9, 71.3, 70.2], [69.0, 68.1, 69.9]
    found = differences({"a": a, "b": b})["a", "b"]
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(1 - LEVEL)
    assert found.p == held(expected.pvalue, 4, 3)
    assert expected.pvalue < found.p < 2 * expected.pvalue
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    mean = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert half_width(float(np.std(a, ddof=1)), len(a)) == pytest.approx((mean.high - mean.low) / 2, rel=1e-12)


def test_holm_is_the_step_down_procedure():
    # Holm's multipliers 4, 3, 2, 1, never falling, never above 1.
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]).tolist() == [1.0, 1.0]


def test_values_without_spread_give_no_verdict_unless_they_agree():
    found = differences({"a": [50.0] * 3, "b": [51.0] * 3, "c": [50.0] * 3, "d": [49.0, 50.0, 51.0]})
    assert ("a", "b") not in found
    assert found["a", "c"].p == 1
    assert not found["a", "d"].real

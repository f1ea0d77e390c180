"""Which differences between networks are real, by tests that are right at their stated level.

Over seeds: Welch's t-test of the difference of means for every pair of a column (Biometrika 34, 1947), with Holm's
correction over all those pairs (Holm, Scand. J. Statist. 6, 1979), so that among networks that are equal in truth any
difference at all is called real in at most `LEVEL` of the columns. A network takes part from `ENOUGH` seeds on; below
that nothing is said.

Welch's p is an approximation that is too small where few seeds of one network spread much more than the other's, above
all far in the tail, where Holm's correction looks: with 3 and 5 seeds and p = 2e-4 by a factor of 18. `held` replaces
it by the largest probability of a p as small that any two spreads give to equal networks.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL = 0.05
ENOUGH = 3  # values on both sides; two seeds call equal networks different in one case of five
RULE = (
    "mean ± half of the 95% t-interval of the mean (number of seeds); a difference is real at the 5% level by Welch's "
    f"t-test, whatever the two spreads, with Holm's correction over a column's pairs, from {ENOUGH} seeds on"
)


@dataclass(frozen=True)
class Difference:
    """How far apart two networks are: first - second, in the unit of the values.

    Attributes:
        mean: of the difference.
        low, high: its 95 % interval (Welch's over seeds), not corrected for the number of pairs.
        p: corrected by Holm over all pairs that were compared together.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def real(self) -> bool:
        return self.p <= LEVEL


def half_width(spread: float, count: int) -> float:
    """Half of the 95 % t-interval of a mean, from the standard deviation (n - 1) of `count` > 1 values."""
    return float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * spread / math.sqrt(count)


def differences(samples: Mapping[str, Sequence[float]]) -> dict[tuple[str, str], Difference]:
    """Compare all pairs of a column.

    Args:
        samples: the values of each network, one a seed; those with fewer than `ENOUGH` are left out.

    Returns:
        A difference for each pair in both orders. Two networks without any spread are left out unless their means
        agree: with so few different values the test has nothing to go by.
    """
    names = [name for name, values in samples.items() if len(values) >= ENOUGH]
    pairs = list(itertools.combinations(names, 2))
    if not pairs:
        return {}
    mean = {name: float(np.mean(samples[name])) for name in names}
    # Of the mean: the squared standard error.
    error = {name: float(np.var(samples[name], ddof=1)) / len(samples[name]) for name in names}
    free = {name: len(samples[name]) - 1 for name in names}
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    e1, e2, n1, n2 = (np.array([of[name] for name in side]) for of in (error, free) for side in (left, right))
    gap = np.array([mean[a] - mean[b] for a, b in pairs])
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = (e1 + e2) ** 2 / (e1**2 / n1 + e2**2 / n2)
        p = 2 * stats.t.sf(np.abs(gap) / np.sqrt(e1 + e2), degrees)
        reach = stats.t.ppf(1 - LEVEL / 2, degrees) * np.sqrt(e1 + e2)
    same = (e1 + e2 == 0) & (gap == 0)
    p = np.array([held(q, 1 + int(a), 1 + int(b)) for q, a, b in zip(p, n1, n2, strict=True)])
    p, reach = np.where(same, 1.0, p), np.where(same, 0.0, reach)
    return corrected(
        {
            pair: Difference(d, d - r, d + r, q)
            for pair, d, r, q in zip(pairs, gap.tolist(), reach.tolist(), p.tolist(), strict=True)
        }
    )


def held(p: float, first: int, second: int) -> float:
    """How often at most, whatever their two spreads, Welch's p of equal networks is as small as this one.

    Args:
        p: Welch's, of `first` and `second` > 1 values; NaN stays NaN.
        first, second: values of either network.
    """
    known, level = _levels(min(first, second), max(first, second))
    # Below the smallest known p the answer is that of the smallest, which is a larger one.
    return float(np.exp(np.interp(math.log(p) if p > 0 else -math.inf, known, level))) if p == p else p


@functools.cache
def _levels(first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of Welch's p, ascending, and of how often at most equal networks have one as small: of normal values.

    Of the two sample variances the ratio and a chi-squared sum are independent. Given the ratio, the degrees of freedom
    and so the critical value are known and the statistic is Student's t but for a factor: what remains is one integral
    over the ratio, here over the first one's share of the sum, which has a beta distribution.
    """
    v1, v2 = first - 1, second - 1
    share = special.expit(np.linspace(-20, 20, 201))
    weight = stats.beta.pdf(share, v1 / 2, v2 / 2) * share * (1 - share)  # evenly in the logit
    weight /= weight.sum()
    truth = special.expit(np.linspace(-12, 12, 25))[:, None]  # share of the first in the difference's variance
    e1, e2 = truth * share / v1, (1 - truth) * (1 - share) / v2
    degrees = (e1 + e2) ** 2 / (e1**2 / v1 + e2**2 / v2)
    scale = np.sqrt((v1 + v2) * (e1 + e2))
    known = np.geomspace(1e-7, 1, 41)
    level = [
        (weight * 2 * special.stdtr(v1 + v2, special.stdtrit(degrees, p / 2) * scale)).sum(axis=1).max() for p in known
    ]
    return np.log(known), np.log(np.maximum(level, known))


def corrected(pairs: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """Correct the p-values of pairs that were compared together by Holm, leave out those that are NaN, and add each
    pair's other order."""
    told = {pair: difference for pair, difference in pairs.items() if math.isfinite(difference.p)}
    found: dict[tuple[str, str], Difference] = {}
    for ((a, b), d), p in zip(told.items(), holm([d.p for d in told.values()]).tolist(), strict=True):
        found[a, b] = Difference(d.mean, d.low, d.high, p)
        found[b, a] = Difference(-d.mean, -d.high, -d.low, p)
    return found


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values corrected by Holm's step-down procedure, in the order given."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    factors = len(values) - np.arange(len(values))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return corrected

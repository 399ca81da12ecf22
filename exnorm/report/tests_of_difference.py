"""Tests of the mean of paired differences: t-tests, equivalence, Holm's correction, and what a number of seeds detects.

d_1 ... d_n are the differences, s is their standard deviation (n - 1), and t_{q, k} is the q-quantile of Student's t
with k degrees of freedom.
"""

import functools
import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

LEVEL = 0.05
POWER = 0.8
NO_SPREAD = 1e-9  # differences this close are equal up to rounding


def has_spread(differences: Sequence[float]) -> bool:
    """Return whether there are at least two differences, and they are not all equal."""
    return len(differences) > 1 and max(differences) - min(differences) >= NO_SPREAD


def p_value(differences: Sequence[float], threshold: float) -> float | None:
    """Return p = 2 P(T_{n-1} > |mean(d) - threshold| / (s / sqrt(n))). None without spread."""
    if not has_spread(differences):
        return None
    from scipy.stats import t

    distance = abs(mean(differences) - threshold)
    return float(2 * t.sf(distance / _error(differences), len(differences) - 1))


def p_equivalent(differences: Sequence[float], margin: float) -> float | None:
    """Return the p-value of "the mean is not within ± margin", the larger one of two one-sided t-tests.

    None without spread.

    D. J. Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability", 1987.
    """
    if not has_spread(differences):
        return None
    from scipy.stats import t

    nearer = margin - abs(mean(differences))
    return float(t.sf(nearer / _error(differences), len(differences) - 1))


def interval_of(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean, mean(d) ± t_{0.975, n-1} s / sqrt(n). None without spread."""
    if not has_spread(differences):
        return None
    half = _quantile(1 - LEVEL / 2, len(differences)) * _error(differences)
    return mean(differences) - half, mean(differences) + half


def detectable(differences: Sequence[float]) -> float | None:
    """Return the smallest mean difference that so many seeds find in 80 of 100 repetitions. None without spread.

    delta s / sqrt(n), where a noncentral t with n - 1 degrees of freedom and noncentrality delta is above
    t_{0.975, n-1} with a probability of 0.8. It is for one comparison alone, at the measured deviation.
    """
    return _noncentrality(len(differences)) * _error(differences) if has_spread(differences) else None


def highest_share(n: int) -> float:
    """Return 1 - 0.05^(1/n), the largest share of failing runs that n runs without a failure leave possible.

    With a larger share, n independent runs without a failure have a probability below 5 %.
    """
    return 1 - LEVEL ** (1 / n)


@functools.cache
def _noncentrality(n: int) -> float:
    from scipy.optimize import brentq
    from scipy.stats import nct

    critical = _quantile(1 - LEVEL / 2, n)
    found: Any = brentq(lambda delta: nct.sf(critical, n - 1, delta) - POWER, 0, 3 * critical + 3)
    return float(found)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return corrected p-values: for the i-th smallest of m, the largest (m - j + 1) p_j for j up to i, at most 1.

    A comparison without a p-value yet counts in m, so that its later p-value does not take a verdict back.
    S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, (len(values) - rank) * value)
        corrected[index] = min(1.0, largest)
    return corrected


def _error(differences: Sequence[float]) -> float:
    return stdev(differences) / math.sqrt(len(differences))


def _quantile(share: float, n: int) -> float:
    from scipy.stats import t

    return float(t.ppf(share, n - 1))

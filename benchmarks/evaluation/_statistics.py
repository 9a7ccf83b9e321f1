"""Means, their errors, and whether two of them differ.

Times are compared by their logarithms, so that a ratio and its inverse are treated
alike; the ratio is that of the geometric means.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Mean(NamedTuple):
    mean: float
    error: float  # standard error; NaN of a single number
    count: int


class Welch(NamedTuple):
    """The difference of two means, and a confidence interval.

    Welch, The generalization of Student's problem when several different population
    variances are involved, Biometrika, 1947.
    """

    difference: float
    low: float
    high: float
    p: float  # two-sided


def mean(x: Sequence[float]) -> Mean:
    if not x:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(x) / len(x) ** 0.5 if len(x) > 1 else math.nan
    return Mean(statistics.fmean(x), error, len(x))


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Welch:
    """Of mean(a) - mean(b). With a single number on a side only the difference."""
    (mean_a, error_a, n_a), (mean_b, error_b, n_b) = mean(a), mean(b)
    difference = mean_a - mean_b
    if min(n_a, n_b) < 2:
        return Welch(difference, math.nan, math.nan, math.nan)
    error = math.hypot(error_a, error_b)
    if error == 0:
        return Welch(difference, difference, difference, float(difference == 0))
    freedom = error**4 / (error_a**4 / (n_a - 1) + error_b**4 / (n_b - 1))
    margin = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    return Welch(difference, difference - margin, difference + margin, p)


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Welch:
    """Of the geometric means of positive numbers, a to b; `difference` is the ratio."""
    found = welch([math.log(x) for x in a], [math.log(x) for x in b], confidence)
    estimate, low, high = map(math.exp, found[:3])
    return Welch(estimate, low, high, found.p)

"""Slow references, written from the rules and not from the code: plain loops in
rational arithmetic, where nothing overflows, rounds or depends on an order."""

import bisect
import collections
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike


def exact_scores(scores: ArrayLike) -> list[Fraction]:
    """Scores as rationals, read as float32; negative and non-finite ones are zero."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 is an infinity
        floats = np.asarray(scores).astype(np.float32).tolist()
    return [Fraction(s) if 0 < s < math.inf else Fraction(0) for s in floats]


def exact_quotas(scores: ArrayLike, budget: int, low: int, high: int) -> list[int]:
    """Quotas between `low` and `high`, proportional to the scores."""
    shares = exact_shares(exact_scores(scores), budget, low, high)
    quotas = [math.floor(share) for share in shares]
    spare = min(budget, len(shares) * high) - sum(quotas)
    by_remainder = sorted(range(len(shares)), key=lambda u: (quotas[u] - shares[u], u))
    for u in by_remainder[:spare]:
        quotas[u] += 1
    return quotas


def exact_shares(
    scores: Sequence[Fraction], budget: int, low: int, high: int
) -> list[Fraction]:
    """Quotas before rounding: ``clip(rate * score, low, high)``."""
    budget = min(budget, len(scores) * high)
    low = low if budget >= len(scores) * low else 0
    counts = collections.Counter(scores)
    zeros = counts[Fraction(0)]
    positive = len(scores) - zeros
    if positive * high + zeros * low < budget:
        left = Fraction(budget - positive * high, zeros)
        return [Fraction(high) if s else left for s in scores]

    def clip(x: Fraction) -> Fraction:
        return min(max(x, Fraction(low)), Fraction(high))

    def spent(rate: Fraction) -> Fraction:
        return sum((n * clip(rate * s) for s, n in counts.items()), Fraction(0))

    # What is spent grows with the rate, linearly between rates where a unit reaches a
    # bound.
    rates = sorted({bound / s for s in counts if s for bound in (low, high)} | {0})
    rates = [Fraction(rate) for rate in rates]
    i = bisect.bisect_left(rates, budget, key=spent)
    rate = rates[i]
    if i > 0:
        before, excess = rates[i - 1], spent(rates[i]) - budget
        slope = (spent(rate) - spent(before)) / (rate - before)
        rate -= excess / slope
    shares = {s: clip(rate * s) for s in counts}
    return [shares[s] for s in scores]


def exact_schedule(quotas: Sequence[int], recalc_every: int) -> list[list[int]]:
    """Multiplicities: a row for each step, a column for each unit."""
    order = sorted(range(recalc_every), key=radical_inverse)
    rows = []
    for step in range(recalc_every):
        rank = order.index(step)
        rows.append([q // recalc_every + (q % recalc_every > rank) for q in quotas])
    return rows


def radical_inverse(i: int) -> Fraction:
    """The binary digits of `i` mirrored at the point: 6 = 110 becomes 0.011 = 3/8.

    Sorting by it is bit-reversal order, without a width to cut the digits at.
    """
    return sum((Fraction(i >> k & 1, 2 << k) for k in range(i.bit_length())), Fraction())

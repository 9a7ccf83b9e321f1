"""Slow references, written from the rules and not from the code: plain loops in
rational arithmetic, where nothing overflows, rounds or depends on an order."""

import bisect
import collections
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike


def exact_scores(scores: ArrayLike) -> list[float]:
    """Scores read as float32, as Python floats; negative and non-finite ones are 0."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 is an infinity
        floats = np.asarray(scores).astype(np.float32).tolist()
    return [s if 0 < s < math.inf else 0.0 for s in floats]


def exact_quotas(scores: ArrayLike, budget: int, low: int, high: int) -> list[int]:
    """Quotas between `low` and `high`, proportional to the scores."""
    scores = exact_scores(scores)
    shares = exact_shares(collections.Counter(scores), budget, low, high)
    floors = {s: math.floor(share) for s, share in shares.items()}
    quotas = [floors[s] for s in scores]
    spare = min(budget, len(scores) * high) - sum(quotas)
    by_remainder = sorted({share - math.floor(share) for share in shares.values()})
    place = {s: -by_remainder.index(shares[s] - floors[s]) for s in shares}
    # A stable sort: units with equal remainders stay in order.
    for u in sorted(range(len(scores)), key=lambda u: place[scores[u]])[:spare]:
        quotas[u] += 1
    return quotas


def exact_shares(
    counts: Mapping[float, int], budget: int, low: int, high: int
) -> dict[float, Fraction]:
    """Quotas before rounding, ``clip(rate * score, low, high)``, for each score.

    Args:
      counts: the number of units with each score.
      budget: what the quotas add up to, if the bounds allow it.
      low: the lower bound, dropped where the budget is too small for it.
      high: the upper bound.
    """
    units, zeros = sum(counts.values()), counts.get(0.0, 0)
    budget = min(budget, units * high)
    low = low if budget >= units * low else 0
    if (units - zeros) * high + zeros * low < budget:
        left = Fraction(budget - (units - zeros) * high, zeros)
        return {s: Fraction(high) if s else left for s in counts}

    def clip(x: Fraction) -> Fraction:
        return min(max(x, Fraction(low)), Fraction(high))

    def spent(rate: Fraction) -> Fraction:
        return sum((n * clip(rate * s) for s, n in scores), Fraction(0))

    # What is spent grows with the rate, linearly between those at which a score
    # reaches a bound.
    scores = [(Fraction(s), n) for s, n in counts.items()]
    rates = {Fraction(b) / s for s, _ in scores if s for b in (low, high)}
    rates = sorted(rates | {Fraction(0)})
    i = bisect.bisect_left(rates, budget, key=spent)
    rate = rates[i]
    if i > 0:
        slope = (spent(rate) - spent(rates[i - 1])) / (rate - rates[i - 1])
        rate -= (spent(rate) - budget) / slope
    return {s: clip(rate * Fraction(s)) for s in counts}


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
    return sum(
        (Fraction(i >> k & 1, 2 << k) for k in range(i.bit_length())), Fraction()
    )

r"""From scores and a budget to integer quotas: exactly, and the same everywhere.

The quotas are :math:`q_u = \mathrm{clip}(\lambda s_u, min, max)` with the one
:math:`\lambda` that spends the budget, rounded by largest remainder. That
:math:`\lambda` is bracketed by two thresholds: units with a score of at least
``top`` get the maximum, units below ``bottom`` the minimum, and the units in between
share what is left in proportion. Both thresholds are found by bisection over the
breakpoints ``max / s`` and ``min / s``: either the sorted scores (``"argsort"``), or
all float32 numbers, which are ordered like their bit patterns (``"bisect"``). Only
the candidates differ; every decision is made by the same exact integer sums.

Legend: ``bits`` is the bit pattern of a positive float32 score as uint32; the number
it stands for is ``mantissa * 2**exponent``. Scores are summed as integers in units
of 2**-32 of the mantissa's last place at a reference exponent, 56 bits wide.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _exact as exact
from ._checks import check_bounds, check_count, check_name
from ._exact import u32, Words


ALLOCATIONS = ("argsort", "bisect")
_ROW = 256  # a row of 24-bit numbers sums without overflow in 32 bits
_ONE = 0x3F800000  # bits of 1.0
_HUGE = 0x7F000000  # bits of 2.0**127
_BEYOND = 320 << 23  # bits above max * every score: the exponent simply runs on


class Units(NamedTuple):
    """All units as they lie, in one array or many."""

    bits: tuple[jax.Array, ...]  # scores; any shapes, dtype=uint32
    index: tuple[jax.Array, ...]  # place in the unit order; padding from size on
    size: int
    swept: bool  # shapes are (n, _ROW): several sums can share one sweep


def allocate(
    scores: jax.typing.ArrayLike,
    budget: int | jax.typing.ArrayLike,
    min_updates: int | jax.typing.ArrayLike = 1,
    max_updates: int | jax.typing.ArrayLike = 20,
    method: str = "argsort",
) -> jax.Array:
    r"""Hand out a budget of updates in proportion to scores, as exact integers.

    .. math::
      q_u = \mathrm{round}(\mathrm{clip}(\lambda s_u, min, max)), \quad
      \textstyle\sum_u q_u = budget

    with the one :math:`\lambda` that spends the budget, rounded by largest
    remainder, ties by position. The result is that of rational arithmetic on the
    float32 scores, on every backend, and does not change when all scores are scaled
    by a power of two. Equal scores get quotas that differ by at most one. Where the
    positive scores cannot take all of the budget, units with score zero share the
    rest equally.

    Infeasible budgets are no error: below ``size * min_updates`` the lower bound is
    dropped, above ``size * max_updates`` every unit gets the maximum and the rest
    stays unspent.

    Args:
      scores: shape ``(units,)``, any real dtype, read as float32. Negative and
        non-finite scores count as zero.
      budget: number of updates to hand out, an integer scalar in [0, 2**31), may be
        traced.
      min_updates: least quota of a unit, an integer scalar, may be traced.
      max_updates: largest quota of a unit, an integer scalar, may be traced.
      method: ``"argsort"`` bisects over the sorted scores, ``"bisect"`` over float32
        numbers, without a sort. Both give identical quotas.

    Returns:
      Quotas, shape ``(units,)``, dtype int32.

    Raises:
      ValueError: `scores` is not one-dimensional, a number is out of range, or
        `method` is unknown.
      TypeError: a number is no integer, or `scores` are complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import allocate
      >>> print(allocate(jnp.array([4.0, 2.0, 1.0, 0.0]), budget=15))
      [8 4 2 1]
      >>> print(allocate(jnp.array([4.0, 2.0, 1.0, 0.0]), budget=30, max_updates=12))
      [12 11  6  1]

    References:
      Largest remainder: Balinski and Young, *Fair Representation*, 1982.
    """
    check_name("method", method, ALLOCATIONS)
    check_count("budget", budget, least=0)
    check_bounds(min_updates, max_updates)
    scores = jnp.asarray(scores)
    if jnp.iscomplexobj(scores):
        raise TypeError(f"scores must be real, got dtype {scores.dtype}")
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (units,), got {scores.shape}")
    return allocate_vector(scores, budget, min_updates, max_updates, method)


@functools.partial(jax.jit, static_argnames="method")
def allocate_vector(
    scores: jax.Array,
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
    method: str,
) -> jax.Array:
    """`allocate` without the checks."""
    n = scores.size
    if n == 0:
        return jnp.zeros((0,), jnp.int32)
    bits = score_bits(scores)
    # The values of an argsort are all that is needed, and a fifth of its work.
    ordered = jnp.sort(bits) if method == "argsort" else None
    pad = -n % _ROW
    index = lax.iota(jnp.uint32, n + pad).reshape(-1, _ROW)
    rows = jnp.pad(bits, (0, pad)).reshape(-1, _ROW)
    units = Units((rows,), (index,), n, swept=True)
    (quotas,) = _solve(units, ordered, budget, min_updates, max_updates)
    return quotas.reshape(-1)[:n]


def allocate_leaves(
    scores: Sequence[jax.Array],
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """`allocate` by ``"bisect"`` over many arrays, each left where and as it lies.

    Nothing but scalar sums crosses from one array, or one device, to another.
    """
    scores = list(scores)
    offsets = [0, *itertools.accumulate(s.size for s in scores)]
    if offsets[-1] == 0:
        return [jnp.zeros(s.shape, jnp.int32) for s in scores]
    index = map(positions, scores, offsets)
    units = Units(tuple(map(score_bits, scores)), tuple(index), offsets[-1], False)
    return _solve(units, None, budget, min_updates, max_updates)


def score_bits(scores: jax.Array) -> jax.Array:
    """Bit patterns of scores as float32; zero where negative or not finite."""
    bits = lax.bitcast_convert_type(
        lax.stop_gradient(scores).astype(jnp.float32), jnp.uint32
    )
    return jnp.where(bits < 0x7F800000, bits, u32(0))


def positions(x: jax.Array, offset: int) -> jax.Array:
    """Row-major position of every element, built without a reshape."""
    out, stride = jnp.zeros_like(x, jnp.uint32) + u32(offset), 1
    for axis in reversed(range(x.ndim)):
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        out = out + lax.iota(jnp.uint32, x.shape[axis]).reshape(shape) * u32(stride)
        stride *= x.shape[axis]
    return out


def _solve(
    units: Units,
    ordered: jax.Array | None,
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """Quotas of all units; `ordered` are the sorted bits, or None to bisect."""
    budget, low, high = (
        u32(jnp.maximum(jnp.asarray(x), 0)) for x in (budget, min_updates, max_updates)
    )
    n = u32(units.size)
    full = ~exact.less((budget, u32(0)), exact.mul32(n, high))
    high = jnp.minimum(high, budget)  # no unit can get more, and products stay small
    short = exact.less((budget, u32(0)), exact.mul32(n, low))
    low = jnp.where(short, u32(0), jnp.minimum(low, high))
    units, ordered = _lift_zeros(units, ordered, budget, low, high)
    bottom, top, window = _thresholds(units, ordered, budget, low, high)
    quotas = _round(units, budget, low, high, bottom, top, window)
    return [jnp.where(full, high, q).astype(jnp.int32) for q in quotas]


def _lift_zeros(units, ordered, budget, low, high):
    """Where the positive scores cannot take the budget, zeros share the rest."""
    count = _count(units, [b > 0 for b in units.bits])
    most = exact.add(
        exact.mul32(count, high), exact.mul32(u32(units.size) - count, low)
    )
    rest = exact.less(most, (budget, u32(0)))

    def lift(b):
        return jnp.where(rest, jnp.where(b > 0, u32(_HUGE), u32(_ONE)), b)

    units = units._replace(bits=tuple(map(lift, units.bits)))
    return units, None if ordered is None else lift(ordered)


def _thresholds(units, ordered, budget, low, high):
    """The least score that gets the maximum, and the least above the minimum.

    Third, a window: a score that no score between the two exceeds.
    """

    def candidate(i):  # the breakpoints, in order
        if ordered is None:
            return i
        last = ordered.size - 1
        return jnp.where(i <= last, ordered[jnp.minimum(i, last)], u32(_BEYOND))

    def affordable(factor, probe, bottom, top, window):
        """Whether the rate ``factor / probe`` spends no more than the budget."""
        count_low, count_high, share = _tally(units, bottom, top, window)
        bounded = exact.add(exact.mul32(count_high, high), exact.mul32(count_low, low))
        rest = exact.scale(budget - bounded[0], exact.fixed_point(probe, window))
        spent = exact.scale(factor, share)
        over = exact.less((budget, u32(0)), bounded)
        return ~over & ~exact.less((*rest, u32(0)), spent)

    def top_is_affordable(i):
        t = jnp.maximum(candidate(i), 1)
        return affordable(high, t, exact.scale_up(t, low, high), t, t)

    end = u32(_BEYOND if ordered is None else ordered.size)
    first = _bisect(u32(0), end, top_is_affordable)
    top = jnp.maximum(candidate(first), 1)
    window = jnp.maximum(candidate(jnp.maximum(first, 1) - 1), 1)
    # At the rate high / window the budget is overspent, so below this all get low.
    least = jnp.where(first > 0, exact.scale_up(window, low, high), u32(0))

    def bottom_is_affordable(i):
        t = jnp.maximum(candidate(i), 1)
        return (t >= least) & affordable(low, t, t, top, window)

    start, stop = u32(0), first
    if ordered is None:
        start, stop = least, jnp.minimum(exact.scale_up(top, low, high), top)
    stop = jnp.where(low > 0, stop, start)
    found = _bisect(start, stop, bottom_is_affordable)
    bottom = jnp.where(low > 0, jnp.maximum(candidate(found), 1), u32(0))
    return bottom, top, window


def _bisect(start, stop, predicate):
    """The first index in [start, stop) where `predicate` turns true, or stop."""

    def step(bracket):
        left, right = bracket
        middle = left + (right - left) // 2
        true = predicate(middle)
        return jnp.where(true, left, middle + 1), jnp.where(true, middle, right)

    return lax.while_loop(lambda b: b[0] < b[1], step, (start, stop))[0]


def _tally(units: Units, bottom, top, window):
    """Counts below `bottom` and from `top` up, and the sum of the scores between."""

    def terms(bits, index):
        between = (bits >= bottom) & (bits < top) & (index < units.size)
        low, high = exact.fixed_point(jnp.minimum(bits, window), window)
        low, high = jnp.where(between, low, 0), jnp.where(between, high, 0)
        up = (bits >= top) & (index < units.size)
        return low & 0xFFFF, low >> 16, high, u32(up), u32(between)

    values = [terms(b, i) for b, i in zip(units.bits, units.index, strict=True)]
    a, b, c, up, between = _sums(units, values, (16, 16, 24, 1, 1))
    b = (b[0] << 16, b[0] >> 16 | b[1] << 16, b[1] >> 16)
    share = exact.add(exact.add((*a, u32(0)), b), (u32(0), *c))
    return u32(units.size) - up[0] - between[0], up[0], share


def _sums(units: Units, values, widths: tuple[int, ...]) -> list[Words]:
    """Exact sums over all units of several values of so many bits each.

    A float32 sum stops counting at 2**24. Here a value is cut into limbs so narrow
    that the 32-bit sum of all of them cannot overflow.
    """
    totals: list[Words] = [(u32(0), u32(0))] * len(widths)
    for block in values:
        bits = widths
        if units.swept:
            zeros = (jnp.uint32(0),) * len(block)
            block = lax.reduce(block, zeros, _add_each, (1,))
            bits = tuple(w + _ROW.bit_length() - 1 for w in widths)
        sums = map(_sum, block, bits)
        totals = [exact.add(t, s) for t, s in zip(totals, sums, strict=True)]
    return totals


def _add_each(x, y):
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _sum(x: jax.Array, width: int) -> Words:
    limb = 32 - (max(x.size, 1) - 1).bit_length()
    out = (u32(0), u32(0))
    for at in range(0, width, limb):
        part = (x >> at) & u32((1 << min(limb, width - at)) - 1)
        total = jnp.sum(part, dtype=jnp.uint32)
        high = total >> (32 - at) if at else jnp.zeros_like(total)
        out = exact.add(out, (total << at, high)) if at else (total, high)
    return out


def _round(units, budget, low, high, bottom, top, window) -> list[jax.Array]:
    """Floors of the proportional shares, then one more for the largest remainders."""
    count_low, count_high, share = _tally(units, bottom, top, window)
    rest = budget - count_high * high - count_low * low
    nothing = (share[0] | share[1] | share[2]) == 0
    share = (jnp.where(nothing, u32(1), share[0]), share[1], share[2])

    def floor(bits, index):
        fixed = exact.fixed_point(jnp.minimum(bits, window), window)
        quotient, remainder = _divide(exact.scale(rest, fixed), share)
        # Scores too small for the window are told apart by the scores themselves.
        cut = exact.exponent(window) > exact.exponent(bits) + 32
        keys = (*reversed(remainder), jnp.where(cut, bits, 0), ~index)
        between = (bits >= bottom) & (bits < top) & (index < units.size)
        bound = jnp.where(bits >= top, high, low)
        return jnp.where(between, quotient, bound), between, keys

    blocks = [floor(b, i) for b, i in zip(units.bits, units.index, strict=True)]
    quotas, free, keys = zip(*blocks, strict=True)
    halves = [
        tuple(jnp.where(f, part, 0) for part in (q & 0xFFFF, q >> 16))
        for q, f in zip(quotas, free, strict=True)
    ]
    (a, _), (b, _) = _sums(units, halves, (16, 16))
    extra = _largest(units, keys, free, rest - a - (b << 16))
    return [q + u32(e) for q, e in zip(quotas, extra, strict=True)]


def _divide(x: Words, y: Words) -> tuple[jax.Array, Words]:
    """Quotient (below 2**31) and remainder of three words, by guesses from below."""
    inverse = (1.0 - 2.0**-19) / exact.to_float(y)
    q = u32(jnp.floor(exact.to_float(x) * inverse))
    r = exact.sub(x, exact.scale(q, y)[:3])
    step = u32(jnp.floor(exact.to_float(r) * inverse))
    q, r = q + step, exact.sub(r, exact.scale(step, y)[:3])
    more, rest = ~exact.less(r, y), exact.sub(r, y)
    r = tuple(jnp.where(more, a, b) for a, b in zip(rest, r, strict=True))
    return q + u32(more), r


def _largest(units, keys, free, count) -> list[jax.Array]:
    """Marks the `count` of the `free` units with the largest keys.

    Keys are tuples of words, compared in order; no two are equal. For each word in
    turn counting finds the value that separates those in from those still tied.
    """

    # Or XLA recomputes the division in every pass of every search.
    keys, free, count = lax.optimization_barrier((list(keys), list(free), count))
    chosen, tied = [jnp.zeros_like(f) for f in free], free
    for words in zip(*keys, strict=True):
        threshold = _separate(units, words, tied, count)
        above = [t & (w > threshold) for w, t in zip(words, tied, strict=True)]
        chosen = [c | a for c, a in zip(chosen, above, strict=True)]
        tied = [t & (w == threshold) for w, t in zip(words, tied, strict=True)]
        count = count - _count(units, above)
    return chosen


def _count(units: Units, marks: list[jax.Array]) -> jax.Array:
    ((total, _),) = _sums(units, [(u32(m),) for m in marks], (1,))
    return total


def _separate(units, words, tied, count) -> jax.Array:
    """A value with at most `count` of the tied words above it, and all it can have."""

    def step(state):
        left, right, _ = state
        middle = left + (right - left) // 2
        above = [t & (w > middle) for w, t in zip(words, tied, strict=True)]
        total = _count(units, above)
        far = jnp.where(total > count, middle + 1, middle)
        left = jnp.where(total < count, left, far)
        return left, jnp.where(total <= count, middle, right), total

    largest = [
        jnp.max(jnp.where(t, w, 0), initial=0) for w, t in zip(words, tied, strict=True)
    ]
    most = functools.reduce(jnp.maximum, largest)
    state = jnp.where(count == 0, most, u32(0)), most, count + 1
    # Found as soon as one value separates exactly the right number.
    return lax.while_loop(lambda s: (s[0] < s[1]) & (s[2] != count), step, state)[0]

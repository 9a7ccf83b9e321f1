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
import math
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
    # Divided where products of 64 bits would tell the same.
    fair = budget // u32(units.size)
    full = high <= fair
    high = jnp.minimum(high, budget)  # no unit can get more
    low = jnp.where(low > fair, u32(0), jnp.minimum(low, high))
    units, ordered = _lift_zeros(units, ordered, budget, low, high)
    found = _search(units, ordered, budget, low, high)
    quotas = _round(units, budget, low, high, found)
    return [jnp.where(full, high, q).astype(jnp.int32) for q in quotas]


def _lift_zeros(units, ordered, budget, low, high):
    """Where the positive scores cannot take the budget, zeros share the rest."""
    count = _count([b > 0 for b in units.bits])
    spare, step = budget - u32(units.size) * low, jnp.maximum(high - low, 1)
    rest = (count <= spare // step) & (count * step != spare)

    def lift(b):
        return jnp.where(rest, jnp.where(b > 0, u32(_HUGE), u32(_ONE)), b)

    units = units._replace(bits=tuple(map(lift, units.bits)))
    return units, None if ordered is None else lift(ordered)


class _Found(NamedTuple):
    """What a tally found, and between which thresholds."""

    bottom: jax.Array  # the least score above the minimum
    top: jax.Array  # the least score that gets the maximum
    window: jax.Array  # that no score between the two exceeds
    sums: Words  # see `_tally`


def _search(units, ordered, budget, low, high) -> _Found:
    """Both thresholds, in one loop, because it is the tally that takes long to compile.

    Turn 0 is for `top`, turn 1 for `bottom`; in turn 2 both are tallied.
    """

    def candidate(i):  # the breakpoints, in order
        if ordered is None:
            return jnp.maximum(i, 1)
        last = ordered.size - 1
        bits = jnp.where(i <= last, ordered[jnp.minimum(i, last)], u32(_BEYOND))
        return jnp.maximum(bits, 1)

    def step(state):
        turn, bracket, _ = state
        left, right, bottom, top, window, least = bracket
        switch = (turn == 0) & (left >= right)
        if ordered is None:
            start, stop = least, bottom
        else:
            start, stop = u32(0), jnp.where(low > 0, left, 0)
            bottom = jnp.where(switch, jnp.where(low > 0, top, 0), bottom)
        turn = turn + u32(left >= right) + u32(switch & (start >= stop))
        left, right = jnp.where(switch, start, left), jnp.where(switch, stop, right)

        middle = left + (right - left) // 2
        probe, first = candidate(middle), turn == 0
        reach = exact.scale_up(probe, low, high)
        below = jnp.where(first, reach, jnp.where(turn == 1, probe, bottom))
        above, edge = jnp.where(first, probe, top), jnp.where(first, probe, window)
        sums = _tally(units, below, above, edge)
        rest, over, share = _shares(units, sums, budget, low, high)
        # Whether the rate high / probe, or low / probe, spends no more than the rest.
        has = (*exact.scale(rest, exact.fixed_point(probe, edge)), u32(0))
        spent = exact.scale(jnp.where(first, high, low), share)
        fits = ~over & ~exact.less(has, spent) & (probe >= least)
        # One array, or XLA compiles all of this again for each of its entries.
        yes = jnp.stack([left, middle, below, above, window, least])
        least = jnp.where(first, reach, least)
        no = jnp.stack([middle + 1, right, bottom, top, edge, least])
        return turn, jnp.where(fits, yes, no), sums

    zero, end = u32(0), u32(_BEYOND if ordered is None else ordered.size)
    bracket = jnp.stack([zero, end, zero, u32(_BEYOND), candidate(zero), zero])
    none = jnp.zeros((5,), jnp.uint32)
    state = zero, bracket, (none, none)
    _, bracket, sums = lax.while_loop(lambda s: s[0] < 2, step, state)
    return _Found(bracket[2], bracket[3], bracket[4], sums)


def _tally(units: Units, bottom, top, window) -> Words:
    """The sums of the low, middle and high bits of scores in between, and two counts.

    Those are of units from `top` up, and of those in between.
    """

    def terms(bits, index):
        up = (bits >= top) & (index < units.size)
        between = (bits >= bottom) & (bits < top) & (index < units.size)
        low, high = exact.fixed_point(jnp.minimum(bits, window), window)
        low, high = jnp.where(between, low, 0), jnp.where(between, high, 0)
        return low & 0xFFFF, low >> 16, high, u32(up), u32(between)

    values = [terms(b, i) for b, i in zip(units.bits, units.index, strict=True)]
    return _sums(units, values, 24)


def _shares(units: Units, sums: Words, budget, low, high):
    """What a tally leaves of the budget, whether it is too much, and who share it."""
    (a, b, c, up, between), (a1, b1, c1, _, _) = sums
    share = exact.add((a, a1, u32(0)), (b << 16, b >> 16 | b1 << 16, b1 >> 16))
    share = exact.add(share, (u32(0), c, c1))
    down = u32(units.size) - up - between
    rest = budget - up * high
    over = up > budget // jnp.maximum(high, 1)
    over = over | (down > rest // jnp.maximum(low, 1))
    return rest - down * low, over, share


def _sums(units: Units, values, width: int) -> Words:
    """Exact sums over all units of several values of so many bits; as two vectors.

    A float32 sum stops counting at 2**24. Here a value is cut into limbs so narrow
    that the 32-bit sum of all of them cannot overflow.
    """
    totals: Words = u32(0), u32(0)
    for block in values:
        if units.swept:
            zeros = (jnp.uint32(0),) * len(block)
            rows = jnp.stack(lax.reduce(block, zeros, _add_each, (1,)))
            sums = _sum(rows, (1,), 32)
        else:
            each = [_sum(x, tuple(range(x.ndim)), width) for x in block]
            low, high = zip(*each, strict=True)
            sums = jnp.stack(low), jnp.stack(high)
        totals = exact.add(totals, sums)
    return totals


def _add_each(x, y):
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _sum(x: jax.Array, axes: tuple[int, ...], width: int) -> Words:
    n = math.prod(x.shape[a] for a in axes)
    limb = 32 - (max(n, 1) - 1).bit_length()
    if limb >= width:
        total = jnp.sum(x, axes, dtype=jnp.uint32)
        return total, jnp.zeros_like(total)
    out: Words = u32(0), u32(0)
    for at in range(0, width, limb):
        part = (x >> at) & u32((1 << limb) - 1)
        total = jnp.sum(part, axes, dtype=jnp.uint32)
        high = total >> (32 - at) if at else jnp.zeros_like(total)
        out = exact.add(out, (total << at, high))
    return out


def _round(units, budget, low, high, found: _Found) -> list[jax.Array]:
    """Floors of the proportional shares, then one more for the largest remainders."""
    bottom, top, window, sums = found
    rest, _, share = _shares(units, sums, budget, low, high)
    nothing = (share[0] | share[1] | share[2]) == 0
    share = (jnp.where(nothing, u32(1), share[0]), share[1], share[2])

    def floor(bits, index):
        fixed = exact.fixed_point(jnp.minimum(bits, window), window)
        quotient, remainder = _divide(exact.scale(rest, fixed), share)
        # Scores too small for the window are told apart by the scores themselves.
        cut = exact.exponent(window) > exact.exponent(bits) + 32
        keys = jnp.stack([*reversed(remainder), jnp.where(cut, bits, 0), ~index])
        between = (bits >= bottom) & (bits < top) & (index < units.size)
        bound = jnp.where(bits >= top, high, low)
        return jnp.where(between, quotient, bound), between, keys

    blocks = [floor(b, i) for b, i in zip(units.bits, units.index, strict=True)]
    quotas, free, keys = map(list, zip(*blocks, strict=True))
    given = [
        jnp.sum(jnp.where(f, q, 0), dtype=jnp.uint32)  # modulo 2**32 like the rest
        for q, f in zip(quotas, free, strict=True)
    ]
    extra = _largest(keys, free, rest - sum(given))
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


def _largest(keys, free, count) -> list[jax.Array]:
    """Marks the `count` of the `free` units with the largest keys.

    Keys are stacks of words, compared in order; no two are equal. For each word in
    turn counting finds the value that separates those in from those still tied.
    """

    def step(state):
        turn, chosen, tied, count = state
        words = [lax.dynamic_index_in_dim(k, turn, keepdims=False) for k in keys]
        threshold = _separate(words, tied, count)
        above = [t & (w > threshold) for w, t in zip(words, tied, strict=True)]
        chosen = [c | a for c, a in zip(chosen, above, strict=True)]
        tied = [t & (w == threshold) for w, t in zip(words, tied, strict=True)]
        return turn + 1, chosen, tied, count - _count(above)

    # Or XLA recomputes the division in every pass of every search.
    keys, free, count = lax.optimization_barrier((keys, free, count))
    state = u32(0), [jnp.zeros_like(f) for f in free], free, count
    return lax.while_loop(lambda s: (s[0] < 5) & (s[3] > 0), step, state)[1]


def _count(marks: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(m, dtype=jnp.uint32) for m in marks), u32(0))


def _separate(words, tied, count) -> jax.Array:
    """A value with at most `count` of the tied words above it, and all it can have."""

    def step(state):
        left, right, _ = state
        middle = left + (right - left) // 2
        total = _count([t & (w > middle) for w, t in zip(words, tied, strict=True)])
        far = jnp.where(total > count, middle + 1, middle)
        left = jnp.where(total < count, left, far)
        return left, jnp.where(total <= count, middle, right), total

    most = [
        jnp.max(jnp.where(t, w, 0), initial=0) for w, t in zip(words, tied, strict=True)
    ]
    state = u32(0), functools.reduce(jnp.maximum, most), count + 1
    # Found as soon as one value separates exactly the right number.
    return lax.while_loop(lambda s: (s[0] < s[1]) & (s[2] != count), step, state)[0]

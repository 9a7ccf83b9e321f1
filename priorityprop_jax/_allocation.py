r"""From scores and a budget to integer quotas: exactly, and the same everywhere.

The quotas are :math:`q_u = \mathrm{clip}(\lambda s_u, min, max)` with the one
:math:`\lambda` that spends the budget, rounded by largest remainder.

The rate :math:`\lambda` is found by fixing variables. The rate that spends what is left
on the units in between takes some of them above their upper bound and some below the
lower one. If those above get more than they may by more than those below lack, all
those above are at their bound for good, else all those below; the rest goes on to the
others. A few passes over the scores are enough. In rounding, one offset is added to
all shares before their fractions are cut off: the largest that does not overspend,
found bit by bit.

Legend: ``bits`` is the bit pattern of a positive float32 score as uint32; the number
it stands for is ``mantissa * 2**exponent``. Scores are summed as integers in units
of 2**-32 of the mantissa's last place at a reference exponent, 56 bits wide.

References:
  Bitran and Hax, *Disaggregation and resource allocation using convex knapsack
  problems with bounded variables*, Management Science 27, 1981.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _exact as exact
from ._checks import check_bounds, check_count, check_name
from ._exact import u32, Words


ALLOCATIONS = ("argsort", "bisect")
_SHORT = 2**12  # up to this number units lie in one row
_ROW = 256  # the length of a row where there are several
_FEW = 2**16  # quotas below this number are found by a single division of floats
_ONE = 0x3F800000  # bits of 1.0
_HUGE = 0x7F000000  # bits of 2.0**127
_BEYOND = 320 << 23  # bits above those of all scores
_PADDING = 2**32 - 1  # bits of no score, and no bound
_END = 2**32 - 1
_TIES = 2  # words of an offset that decide between ties; those of a remainder follow


class Units(NamedTuple):
    """All units as they lie, in one array or many."""

    bits: tuple[jax.Array, ...]  # scores; any shapes, dtype=uint32
    rank: tuple[jax.Array, ...]  # in case of a tie, the first unit's is the largest
    highest: jax.Array  # bits of the largest score
    size: int
    in_rows: bool  # one array, shape=(rows, units): all its sums share a sweep
    ordered: jax.Array | None  # the same scores, sorted


class Rate(NamedTuple):
    """Who is at which bound, and what the others share. Scalars, dtype=uint32.

    They include what never changes. Anything outside that a loop reads XLA computes
    with ahead, one kernel for each step, and simplifies all of a program again.
    """

    phase: jax.Array  # of the search, see there
    bottom: jax.Array  # bits from which on units are above the minimum
    top: jax.Array  # bits from which on units get the maximum
    window: jax.Array  # bits of the largest score in between
    rest: jax.Array  # the budget of the units in between
    share0: jax.Array  # the sum of their scores, in three words
    share1: jax.Array
    share2: jax.Array
    below: jax.Array  # number of units below `bottom`
    above: jax.Array  # number of units from `top` on
    lift: jax.Array  # whether zeros share what the positive scores cannot take
    budget: jax.Array
    low: jax.Array  # the bounds of a quota
    high: jax.Array
    highest: jax.Array  # bits of the largest score of all

    @property
    def share(self) -> Words:
        """The sum of the scores in between."""
        return self.share0, self.share1, self.share2

    def scores(self, bits: jax.Array) -> jax.Array:
        """The scores to go by: where zeros share what is left, there are but two."""
        positive = jnp.maximum(bits, self.lift * u32(_HUGE))
        return jnp.where(bits >= self.lift, positive, self.lift * u32(_ONE))

    def free(self, bits: jax.Array) -> jax.Array:
        """Which scores lie in between."""
        return (bits >= self.bottom) & (bits < self.top)

    def fixed_point(self, bits: jax.Array) -> Words:
        """Scores as integers, in units that fit the largest in between."""
        return exact.fixed_point(jnp.minimum(bits, self.window), self.window)


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
      method: ``"argsort"`` sorts the scores once and looks up at each step who is the
        next to reach a bound, ``"bisect"`` only counts. Both give identical quotas.

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
      The rate: Bitran and Hax, *Disaggregation and resource allocation using convex
      knapsack problems with bounded variables*, Management Science, 1981. Largest
      remainder: Balinski and Young, *Fair Representation*, 1982.
    """
    check_name("method", method, ALLOCATIONS)
    check_count("budget", budget, least=0)
    check_bounds(min_updates, max_updates)
    scores = jnp.asarray(scores)
    if jnp.iscomplexobj(scores):
        raise TypeError(f"scores must be real, got dtype {scores.dtype}")
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (units,), got {scores.shape}")
    few = are_few(max_updates)
    return allocate_vector(scores, budget, min_updates, max_updates, method, few)


@functools.partial(jax.jit, static_argnames=("method", "few"))
def allocate_vector(
    scores: jax.Array,
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
    method: str,
    few: bool = False,
) -> jax.Array:
    """`allocate` without the checks; `few` as told by `are_few`."""
    n = scores.size
    if n == 0:
        return jnp.zeros((0,), jnp.int32)
    bits = score_bits(scores)
    # The values of an argsort are all that is needed, and a fifth of its work.
    ordered = jnp.sort(bits) if method == "argsort" else None
    highest = jnp.max(bits) if ordered is None else ordered[-1]
    width = n if n <= _SHORT else _ROW
    pad = -n % width
    if pad:
        bits = jnp.pad(bits, (0, pad), constant_values=u32(_PADDING))
    rank = ~lax.iota(jnp.uint32, n + pad)
    bits, rank = bits.reshape(-1, width), rank.reshape(-1, width)
    units = Units((bits,), (rank,), highest, n, True, ordered)
    (quotas,) = _solve(units, budget, min_updates, max_updates, few)
    return quotas.reshape(-1)[:n]


def allocate_leaves(
    scores: Sequence[jax.Array],
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
    few: bool = False,
) -> list[jax.Array]:
    """`allocate` by ``"bisect"`` over many arrays, each left where and as it lies.

    Nothing but scalar sums crosses from one array, or one device, to another.
    """
    scores = list(scores)
    offsets = [0, *itertools.accumulate(s.size for s in scores)]
    if offsets[-1] == 0:
        return [jnp.zeros(s.shape, jnp.int32) for s in scores]
    bits = tuple(map(score_bits, scores))
    rank = tuple(~index for index in map(positions, scores, offsets))
    peaks = [jnp.max(b, initial=0) for b in bits]
    highest = functools.reduce(jnp.maximum, peaks)
    units = Units(bits, rank, highest, offsets[-1], False, None)
    return _solve(units, budget, min_updates, max_updates, few)


def are_few(max_updates: int | jax.typing.ArrayLike) -> bool:
    """Whether all quotas are known to be so small that dividing is short."""
    return isinstance(max_updates, int) and max_updates < _FEW


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
    budget: jax.typing.ArrayLike,
    min_updates: jax.typing.ArrayLike,
    max_updates: jax.typing.ArrayLike,
    few: bool,
) -> list[jax.Array]:
    """Quotas of all units, in arrays like theirs."""
    given, low, high = (
        u32(jnp.maximum(jnp.asarray(x), 0)) for x in (budget, min_updates, max_updates)
    )
    # Divided where products of 64 bits would tell the same.
    fair = given // u32(units.size)
    full = high <= fair
    high = jnp.minimum(high, given)  # no unit can get more
    low = jnp.where(low > fair, u32(0), jnp.minimum(low, high))
    rate = _search(units, _start(units, given, low, high))
    quotas = []
    for bits, share in zip(units.bits, _round(units, rate, few), strict=True):
        bits = rate.scores(bits)
        bound = jnp.where(bits >= rate.top, high, low)
        quota = jnp.where(rate.free(bits), share, bound)
        quotas.append(jnp.where(full, high, quota).astype(jnp.int32))
    return quotas


class _Sorted(NamedTuple):
    """The units of one array, sorted by what a rate would give them."""

    bits: jax.Array
    fixed: Words
    free: jax.Array  # at no bound so far
    up: jax.Array  # beyond the upper bound
    down: jax.Array  # beyond the lower bound


def _start(units: Units, budget: jax.Array, low: jax.Array, high: jax.Array) -> Rate:
    nothing = Rate(*[u32(0)] * len(Rate._fields))
    return nothing._replace(
        bottom=u32(1),
        top=u32(_BEYOND),
        window=units.highest,
        budget=budget,
        low=low,
        high=high,
        highest=units.highest,
    )


def _search(units: Units, start: Rate) -> Rate:
    """The rate that spends the budget: ``rest / share``, for the units in between.

    In phase 0 positive scores are counted and summed, in phase 1 the scores in
    between are summed, and in phase 2 units that the rate takes beyond a bound are
    fixed there; the search ends when there are none.
    """
    size, zero = u32(units.size), u32(0)

    def step(vector):
        at = Rate(*vector)
        low, high = at.low, at.high
        most, least = exact.scale(high, at.share), exact.scale(low, at.share)

        def sort_out(bits):
            bits = at.scores(bits)
            free, fixed = at.free(bits), at.fixed_point(bits)
            due = (*exact.scale(at.rest, fixed), zero)
            up = free & ((at.phase < u32(2)) | exact.less(most, due))
            down = free & (at.phase == u32(2)) & exact.less(due, least)
            return _Sorted(bits, fixed, free, up, down)

        share, up, down, nearest = _tally(units, list(map(sort_out, units.bits)))
        top, window, bottom = nearest or _look_up(units, at, up, down)
        # Zeros share what is left where the positive scores cannot take it all.
        spare, each = at.budget - size * low, jnp.maximum(high - low, u32(1))
        lift = (up <= spare // each) & (up * each != spare)
        zeros = jnp.where(lift, zero, size - up)
        counted = at._replace(
            phase=jnp.where(lift, u32(1), u32(2)),
            rest=at.budget - zeros * low,
            below=zeros,
            lift=u32(lift),
        )
        counted = counted._replace(window=counted.scores(at.highest))
        summed = _choose(at.phase == zero, counted, at._replace(phase=u32(2)))
        summed = summed._replace(share0=share[0], share1=share[1], share2=share[2])
        raised = at._replace(
            phase=u32(1),
            top=top,
            window=window,
            rest=at.rest - high * up,
            above=at.above + up,
        )
        lowered = at._replace(
            phase=u32(1),
            bottom=bottom + u32(1),
            rest=at.rest - low * down,
            below=at.below + down,
        )
        # Of the units beyond a bound: what they would get, against what they may.
        due, allowed = exact.scale(at.rest, share), high * up + low * down
        less = exact.less(due, exact.scale(allowed, at.share))
        fixed = _choose(less, lowered, raised)
        fixed = _choose(up + down == zero, at._replace(phase=u32(3)), fixed)
        return _pack(_choose(at.phase < u32(2), summed, fixed))

    return Rate(*lax.while_loop(lambda vector: vector[0] < u32(3), step, _pack(start)))


def _choose(yes: jax.Array, a: Rate, b: Rate) -> Rate:
    pairs = zip(a, b, strict=True)
    return Rate(*(x if x is y else jnp.where(yes, x, y) for x, y in pairs))


def _pack(numbers: Sequence[jax.Array]) -> jax.Array:
    """A vector of numbers. `jnp.stack` would be compiled to a kernel for each."""
    out = jnp.broadcast_to(numbers[0], (len(numbers),))
    for i, x in enumerate(numbers):
        out = jnp.where(np.arange(len(numbers)) == i, x, out)
    return out


def _look_up(units: Units, at: Rate, up: jax.Array, down: jax.Array) -> list[jax.Array]:
    """What else `_tally` can tell: the scores next to those that are fixed."""
    assert units.ordered is not None
    top = u32(units.size) - at.above - up
    one = u32(1)
    places = top, top - one, at.below + down - one
    last = u32(units.size - 1)
    found = (units.ordered[jnp.minimum(i, last).astype(jnp.int32)] for i in places)
    return [at.scores(bits) for bits in found]


def _tally(
    units: Units, found: Sequence[_Sorted]
) -> tuple[Words, jax.Array, jax.Array, list[jax.Array]]:
    """Sum and numbers of units beyond the bounds, and the scores next to them.

    These are the least above, the largest in between and the largest below. They are
    left out where they can be looked up.
    """

    def terms(x):
        low, high = (jnp.where(x.up | x.down, word, u32(0)) for word in x.fixed)
        return (*exact.halves(low), *exact.halves(high), u32(x.up), u32(x.down))

    def nearest(x):
        if units.ordered is not None:
            return ()
        above = jnp.where(x.up, x.bits, u32(_BEYOND))
        between = jnp.where(x.free & ~x.up, x.bits, u32(0))
        return above, between, jnp.where(x.down, x.bits, u32(0))

    blocks = [(terms(x), nearest(x)) for x in found]
    sums, near = _sweep(*blocks[0]) if units.in_rows else _sums(blocks)
    (a, b, c, d, up, down), (a1, b1, c1, d1, _, _) = sums
    share = exact.add((a, a1, u32(0)), exact.shift((b, b1), 16))
    above = exact.add((c, c1), exact.shift((d, d1), 16)[:2])
    return exact.add(share, (u32(0), *above)), up, down, near


_NEAREST = (jnp.minimum, _BEYOND), (jnp.maximum, 0), (jnp.maximum, 0)


def _sweep(terms: tuple, near: tuple) -> tuple[Words, list[jax.Array]]:
    """Sums of 16-bit numbers in rows, as two vectors of words, and the scores next."""
    kinds = [(jnp.add, 0)] * len(terms) + list(_NEAREST[: len(near)])
    operations, starts = zip(*kinds, strict=True)

    def combine(x, y):
        return tuple(f(a, b) for f, a, b in zip(operations, x, y, strict=True))

    found = lax.reduce((*terms, *near), tuple(map(u32, starts)), combine, (1,))
    sums, near = found[: len(terms)], found[len(terms) :]
    if sums[0].size == 1:
        low = jnp.concatenate(sums)
        return (low, jnp.zeros_like(low)), [x.reshape(()) for x in near]
    rows = jnp.stack(sums)
    totals = lax.reduce((rows, jnp.zeros_like(rows)), (u32(0), u32(0)), _add, (1,))
    return totals, [f.reduce(x) for x, (f, _) in zip(near, _NEAREST, strict=False)]


def _add(x: Words, y: Words) -> Words:
    return exact.add(x, y)


def _sums(blocks: Sequence[tuple]) -> tuple[Words, list[jax.Array]]:
    """The same of many arrays, by sums of a kind that leaves them where they lie."""
    totals: Words = u32(0), u32(0)
    near = [u32(start) for _, start in _NEAREST]
    for terms, nearest in blocks:
        low, high = zip(*(_sum(x, 16) for x in terms), strict=True)
        totals = exact.add(totals, (jnp.stack(low), jnp.stack(high)))
        near = [
            f(a, f.reduce(x, axis=None, initial=u32(start)))
            for a, x, (f, start) in zip(near, nearest, _NEAREST, strict=True)
        ]
    return totals, near


def _sum(x: jax.Array, width: int) -> Words:
    """The exact sum of numbers of so many bits.

    A float32 sum stops counting at 2**24. Here a number is cut into limbs so narrow
    that the 32-bit sum of all of them cannot overflow.
    """
    limb = 32 - (max(x.size, 1) - 1).bit_length()
    out: Words = u32(0), u32(0)
    for at in range(0, width, limb):
        part = x if limb >= width else (x >> u32(at)) & u32((1 << limb) - 1)
        total = jnp.sum(part, dtype=jnp.uint32)
        out = exact.add(out, exact.shift((total,), at))
    return out


def _round(units: Units, rate: Rate, few: bool) -> list[jax.Array]:
    """Whole shares of `rest`: the floor of ``(rest * score + offset) / share``.

    The offset is the largest that does not overspend. Below the words of a remainder
    it has two for ties: of scores too small for the window, and by order. So no two
    units are rounded up by the same offset, and nothing is left over.
    """
    none = (rate.share0 | rate.share1 | rate.share2) == u32(0)
    rate = rate._replace(share0=jnp.where(none, u32(1), rate.share0))
    words = _TIES + len(rate.share)
    nothing = u32(32 * words)  # the number of no bit
    length = u32(32 * _TIES) + exact.length(rate.share)
    constants = length, _inverse(rate.share), *rate

    def shares(at, inverse, offset):
        def share(bits, rank):
            bits = at.scores(bits)
            cut = exact.exponent(at.window) > exact.exponent(bits) + u32(32)
            due = exact.scale(at.rest, at.fixed_point(bits))
            due = exact.add((rank, jnp.where(cut, bits, u32(0)), *due), tuple(offset))
            quotient = _quotient(due[_TIES:], at.share, inverse, few)
            return jnp.where(at.free(bits), quotient, u32(0))

        return [share(b, r) for b, r in zip(units.bits, units.rank, strict=True)]

    def step(state):
        numbers, _ = state
        bit, offset = numbers[0], numbers[1 : 1 + words]
        length, inverse, *at = numbers[1 + words :]
        inverse = lax.bitcast_convert_type(inverse, jnp.float32)
        at, zero, one = Rate(*at), u32(0), u32(1)
        place, mask = bit >> u32(5), one << (bit & u32(31))
        trial = offset | jnp.where(places[:words] == place, mask, zero)
        found = shares(at, inverse, trial)
        total = _total(units, found)
        after = jnp.where(total == at.rest, u32(_END), jnp.minimum(bit, length) - one)
        fits = (places == place + one) & (places <= words) & (total <= at.rest)
        numbers = numbers | jnp.where(fits, mask, zero)
        return jnp.where(places == 0, after, numbers), found

    places = np.arange(1 + words + len(constants), dtype=np.uint32)
    numbers = _pack((nothing, *[u32(0)] * words, *constants))
    state = numbers, [jnp.zeros_like(b) for b in units.bits]
    return lax.while_loop(lambda state: state[0][0] <= nothing, step, state)[1]


def _total(units: Units, quotas: Sequence[jax.Array]) -> jax.Array:
    """The sum of all quotas, below 2**32."""
    if units.in_rows:
        # Two sums at once, or XLA makes three kernels of the reduction.
        (q,), zero = quotas, u32(0)
        quotas = [lax.reduce((q, q), (zero, zero), _add_each, (1,))[0]]
        if quotas[0].size == 1:
            return quotas[0][0]
    return functools.reduce(
        operator.add, [jnp.sum(q, dtype=jnp.uint32) for q in quotas]
    )


def _add_each(x: Words, y: Words) -> Words:
    return x[0] + y[0], x[1] + y[1]


def _inverse(x: Words) -> jax.Array:
    """A float just below the inverse, as bits."""
    inverse = np.float32(1.0 - 2.0**-19) / exact.to_float(x)
    return lax.bitcast_convert_type(inverse, jnp.uint32)


def _quotient(x: Words, y: Words, inverse: jax.Array, few: bool) -> jax.Array:
    """The whole part of a quotient below 2**31, by guesses from below."""
    q = u32(jnp.floor(exact.to_float(x) * inverse))
    product = exact.scale_short(q, y) if few else exact.scale(q, y)[:3]
    r = exact.sub(x, product)
    if not few:
        step = u32(jnp.floor(exact.to_float(r) * inverse))
        q, r = q + step, exact.sub(r, exact.scale(step, y)[:3])
    return q + u32(~exact.less(r, y))

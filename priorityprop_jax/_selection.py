"""A budget in cost: which units to train in how many steps of a cycle.

A step with the active units A costs the forward pass, the weight gradient of each unit
in A, and each piece of the chain that a unit in A needs. The first step of a cycle
trains everything; of the others, unit u is trained in :math:`k_u`, by the nested
schedule the first ones in order of rank. A piece is then computed in as many steps as
the unit that needs it most, so a cycle costs

.. math::
  R \\cdot forward + \\sum_u w_u (1 + k_u) + \\sum_g c_g (1 + \\max_{u \\in g} k_u)

and the gain to be had from it is :math:`\\sum_u s_u k_u`. To find the best k within a
budget is a knapsack problem, and those are hard; but to spend a budget well is not.
To begin with, two sets of units share the steps, in several proportions: the best two
of all subsets, or where units are many of those that fill a depth of truncation (a
set of pieces) by gain per cost. This is where the optimum lies if steps can be
divided. What is left over goes to the best depth for some number of steps, filled
likewise, a few times. The best outcome wins.

All is counted in integers: costs are rounded up and budgets down to whole units of
cost, so that no rounding ever overspends. FLOPs mostly have a common divisor that
makes the units exact.
"""

import itertools
import math
import numbers
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._budget import warn
from ._checks import is_traced
from ._exact import mul32, u32


_MOST = 2**30  # cost of a full cycle at most, in units of cost
_SUBSETS = 12  # up to so many units all subsets are looked at
_GRID = 4  # different numbers of steps that are tried
_ROUNDS = 3  # of spending what is left over
_DEPTHS = 64  # so many depths of truncation are tried in any case
_ROWS = 2**13  # and so many divided by the number of units


class CostTable(NamedTuple):
    """The costs of a step in whole units. Static: NumPy arrays and integers."""

    paths: tuple[str, ...]
    cycle: int  # steps
    most: Fraction  # the cost of full training for a cycle, not rounded
    forward: int  # cost of a step with no unit active
    full: int  # cost of a step with all units active
    weight: np.ndarray  # of each unit; shape=(units,), dtype=int32
    piece: np.ndarray  # of the chain; shape=(pieces,), dtype=int32
    needs: np.ndarray  # shape=(units, pieces), dtype=bool
    depths: np.ndarray  # sets of pieces; shape=(depths, pieces), dtype=bool
    chain: np.ndarray  # cost of each depth; shape=(depths,), dtype=int32
    allowed: np.ndarray  # units with all they need; shape=(units, depths), dtype=bool
    subsets: np.ndarray  # cost of each set of few units; dtype=int32


def cost_table(costs: Any, cycle: int) -> CostTable:
    """Costs as from `backward_costs`, in whole units. Raises where they are none."""
    paths, forward, weight, piece, members = _checked(costs)
    pieces: dict[tuple[int, ...], Fraction] = {}
    for cost, row in zip(piece, members, strict=True):
        who = tuple(np.flatnonzero(row).tolist())
        if who and cost:  # equal sets of members make one piece
            pieces[who] = pieces.get(who, Fraction(0)) + cost
    numbers = [forward, *weight, *pieces.values()]
    unit = _unit(numbers, cycle)
    rounded = [math.ceil(x / unit) for x in numbers]
    needs = np.zeros((len(paths), len(pieces)), bool)
    for i, who in enumerate(pieces):
        needs[list(who), i] = True
    end = 1 + len(paths)
    weight, piece = (np.array(x, np.int32) for x in (rounded[1:end], rounded[end:]))
    depths = _depths(needs, piece)
    few = 2 ** len(paths) if len(paths) <= _SUBSETS else 0
    sets = _in_subset(np.arange(few)[:, None], np.arange(len(paths)))
    subsets = sets @ weight + (sets @ needs > 0) @ piece
    return CostTable(
        paths,
        cycle,
        most=sum(numbers) / unit * cycle,
        forward=rounded[0],
        full=sum(rounded),
        weight=weight,
        piece=piece,
        needs=needs,
        depths=depths,
        chain=(depths @ piece).astype(np.int32),
        allowed=~np.any(needs[:, None] & ~depths, axis=2),
        subsets=subsets.astype(np.int32),
    )


def _checked(costs: Any) -> tuple:
    try:
        fields = costs.paths, costs.forward, costs.weight, costs.groups, costs.members
    except AttributeError:
        raise TypeError(
            f"costs must be what backward_costs(fun, params, ...) returns, got "
            f"{costs!r}"
        ) from None
    paths, forward, weight, piece, members = fields
    forward, weight, piece = (
        np.asarray(x, np.float64) for x in (forward, weight, piece)
    )
    members = np.asarray(members, bool).reshape(piece.size, weight.size)
    for name, x in (("forward", forward), ("weight", weight), ("groups", piece)):
        if not np.all(np.isfinite(x) & (x >= 0)):
            raise ValueError(f"costs.{name} must be finite and at least 0, got {x}")
    if len(paths) != weight.size:
        raise ValueError(f"costs has {len(paths)} paths for {weight.size} weights")
    exact = [[Fraction(c) for c in x.tolist()] for x in (weight, piece)]
    return tuple(paths), Fraction(forward.item()), *exact, members


def check_paths(table: CostTable, paths: Sequence[str]) -> None:
    """Raises unless the costs are those of params with these paths.

    Frameworks spell the same path in several ways, so only names are compared, and
    one path may be the end of the other.
    """
    pairs = list(itertools.zip_longest(table.paths, paths))
    if len(table.paths) == len(paths):
        pairs = [(a, b) for a, b in pairs if not _is_same(a, b)]
    else:
        pairs = [(a, b) for a, b in pairs if not (a and b and _is_same(a, b))]
    if pairs:
        ours, theirs = pairs[0]
        raise ValueError(
            f"costs must be those of the params: they are of {len(table.paths)} leaves "
            f"for {len(paths)} in the params, and the first that differs is "
            f"{ours or 'missing'} in the costs, {theirs or 'missing'} in the params. "
            f"Call backward_costs(fun, params, ...) with these params"
        )


def _is_same(a: str, b: str) -> bool:
    a, b = map(_names, (a, b))
    return a.endswith(b) or b.endswith(a)


def _names(path: str) -> str:
    """``params['a'][0].value`` as ``/a/0``."""
    path = path.removeprefix("params").removesuffix(".value")
    path = re.sub(r"<flat index (\d+)>", r"\1", path)
    return re.sub(r"\['?(.*?)'?\]|\.(\w+)", r"/\1\2", path)


def warn_over_cost(table: CostTable, budget: Any, low: Any, high: Any) -> None:
    """One warning when a budget cannot be spent between the bounds."""
    known = not any(
        callable(x) or is_traced(x) or isinstance(x, jax.Array)
        for x in (budget, low, high)
    )
    if not known or budget >= 1 or not table.most:
        return
    low, high = (min(max(x, 1), table.cycle) for x in (low, high))
    said = f"budget={budget!r} of the cost of full training"
    share = Fraction(float(budget))
    if share < _share(table, 1):
        warn(
            f"{said} is less than the full first step of each cycle and the other "
            f"{table.cycle - 1} forward passes cost: only the first step of each cycle "
            f"trains, and that costs more than the budget. The least feasible "
            f"budget is {_round_up(_share(table, 1))}"
        )
    elif share < _share(table, low):
        warn(
            f"{said} does not pay for min_updates={low} full steps in a cycle, which "
            f"takes {_round_up(_share(table, low))}: the lower bound is dropped, and "
            f"the units with the best scores come first"
        )
    elif share > _share(table, high):
        warn(
            f"{said} is more than max_updates={high} full steps in a cycle of "
            f"{table.cycle} cost: what exceeds {_round_up(_share(table, high))} stays "
            f"unspent"
        )


def _share(table: CostTable, full_steps: int) -> Fraction:
    """The share of so many full steps and the other forward passes, at most 1."""
    backward = full_steps * (table.full - table.forward)
    return min((table.cycle * table.forward + backward) / table.most, Fraction(1))


def _round_up(share: Fraction) -> str:
    return f"{math.ceil(share * 10**4) / 10**4:.4g}"


def _unit(numbers: Sequence[Fraction], cycle: int) -> Fraction:
    """The largest common divisor if that is fine, else so that a cycle is countable."""
    total = sum(numbers)
    if not total:
        return Fraction(1)
    base = math.lcm(*(x.denominator for x in numbers))
    divisor = Fraction(math.gcd(*(int(x * base) for x in numbers)), base)
    coarsest = _MOST // cycle - len(numbers)  # each is rounded up by less than one
    if coarsest < len(numbers):
        raise ValueError(f"recalc_every={cycle} is too large for a budget in cost")
    return divisor if total <= coarsest * divisor else total / coarsest


def _depths(needs: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """All unions of what units need; if those are many, along the order of depth."""
    order = sorted(range(len(needs)), key=lambda u: (piece @ needs[u], u))
    rows = [sum(1 << int(g) for g in np.flatnonzero(needs[u])) for u in order]
    limit = max(_ROWS // max(len(needs), 1), _DEPTHS)
    found = {0: None}
    for row in dict.fromkeys(rows):
        found.update(dict.fromkeys([row | other for other in found]))
        if len(found) > limit:
            break
    else:
        return _bits(list(found), needs.shape[1])
    prefixes = [0]
    for row in rows:
        prefixes.append(prefixes[-1] | row)
    chosen = list(dict.fromkeys(prefixes))
    if len(chosen) > limit:
        places = np.linspace(0, len(chosen) - 1, limit).round().astype(int)
        chosen = [chosen[i] for i in places]
    alone = [row for row in dict.fromkeys(rows) if row not in chosen]
    return _bits(chosen + alone[: limit - len(chosen)], needs.shape[1])


def _bits(sets: Sequence[int], width: int) -> np.ndarray:
    out = [[bool(s >> g & 1) for g in range(width)] for s in sets]
    return np.array(out, bool).reshape(len(sets), width)


class _Problem(NamedTuple):
    """What is to be spent in the steps that are not full. Units by gain per cost."""

    gain: jax.Array  # of each unit, in one step; shape=(units,), dtype=int32
    weight: jax.Array  # its cost; shape=(units,), dtype=int32
    needs: jax.Array  # pieces of the chain; shape=(units, pieces), dtype=bool
    allowed: jax.Array  # in which depths; shape=(units, depths), dtype=bool
    unit: jax.Array  # its place in the params; shape=(units,), dtype=int32
    steps: jax.Array  # in which a unit can be active
    spare: jax.Array  # budget, less the full steps and all forward passes


def cycle_cost(table: CostTable, budget: Any) -> jax.Array:
    """What a cycle may cost by a share of full training, in whole units of cost.

    Args:
      table: of the costs.
      budget: the share: a float, or an array of floats read as float32.

    Returns:
      The cost, rounded down; shape=(), dtype=int32. A share of 1 pays for everything,
      whatever was rounded.
    """
    everything = jnp.int32(table.cycle * table.full)
    if isinstance(budget, numbers.Real):
        share = math.floor(Fraction(float(budget)) * table.most)
        return everything if float(budget) >= 1 else jnp.int32(max(share, 0))
    exact = jnp.asarray(budget)
    share = exact.astype(jnp.float32)
    if exact.dtype == jnp.float64:
        share = jnp.where(share > exact, jnp.nextafter(share, jnp.float32(0)), share)
    # A product with a power of two is exact, and so is one of two words.
    digits = u32(jnp.clip(share, 0.0, 1.0 - 2.0**-24) * jnp.float32(2**31))
    low, high = mul32(digits, u32(math.floor(table.most)))
    return jnp.where(share >= 1, everything, _int32(high << 1 | low >> 31))


def select(
    table: CostTable,
    scores: jax.Array,
    total: jax.Array,
    low: jax.typing.ArrayLike,
    high: jax.typing.ArrayLike,
) -> jax.Array:
    """Quotas of the best predicted gain, the sum of scores times quotas, to be found.

    The first step of a cycle is full, even where that costs more than `total`.

    Args:
      table: of the costs.
      scores: shape=(units,), dtype=float32; finite, not negative. If all are zero
        they count as equal; otherwise nothing is spent on those that are.
      total: cost of the cycle at most, as from `cycle_cost`.
      low: the number of full steps in a cycle, if `total` allows it.
      high: largest quota; beyond the steps of a cycle it has no meaning.

    Returns:
      Quotas in 1..cycle, shape=(units,), dtype=int32.
    """
    cycle, units = table.cycle, scores.size
    low, high = (_int32(jnp.clip(jnp.asarray(x), 1, cycle)) for x in (low, high))
    forwards, backward = cycle * table.forward, table.full - table.forward
    low = jnp.where(low * backward + forwards <= total, low, 1)
    if units == 0 or cycle == 1:
        return jnp.broadcast_to(low, (units,))
    spare = total - forwards - low * backward
    steps = jnp.where(spare < 0, 0, jnp.maximum(high - low, 0))
    problem = _problem(table, scores, steps, jnp.maximum(spare, 0))
    best = low + _best(table, problem)
    return jnp.zeros_like(best).at[problem.unit].set(best, unique_indices=True)


def _int32(x: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(x).astype(jnp.int32)


def _divide(x: Any, y: Any) -> jax.Array:
    """`x // y` for numbers from 0 on. Unsigned, the division needs no correction."""
    return _int32(u32(x) // u32(y))


def _problem(
    table: CostTable, scores: jax.Array, steps: jax.Array, spare: jax.Array
) -> _Problem:
    """Gains as integers: their sums do not depend on how they are compiled."""
    units, top = scores.size, jnp.max(scores)
    part = jnp.where(top > 0, scores / jnp.where(top > 0, top, 1), 1)
    bits = 30 - (units * table.cycle).bit_length()
    gain = _int32(part * jnp.float32(2**bits))
    weight = jnp.asarray(table.weight)
    worth = part / jnp.maximum(weight.astype(jnp.float32), 0.5)
    places = jnp.arange(units, dtype=jnp.int32)
    _, gain, weight, unit = lax.sort((-worth, gain, weight, places), num_keys=1)
    needs, allowed = jnp.asarray(table.needs)[unit], jnp.asarray(table.allowed)[unit]
    return _Problem(gain, weight, needs, allowed, unit, steps, spare)


def _best(table: CostTable, problem: _Problem) -> jax.Array:
    """Steps of each unit: the best of several beginnings, each filled up."""
    steps = problem.steps
    # Two sets share the steps, so one of them has at most half.
    grid = max(1, min(_GRID, (table.cycle - 1) // 2))
    some = steps * np.arange(1, grid + 1, dtype=np.int32) // (2 * grid)
    counts = jnp.clip(some, jnp.minimum(steps, 1), steps)
    few = table.subsets.size > 0
    cost, gain = (_subsets if few else _prefixes)(table, problem)
    first, second = _pairs(cost, gain, problem, counts)
    if few:
        member = lambda index: _in_subset(index[None], problem.unit[:, None])
    else:
        member = lambda index: _in_prefix(index, problem)
    tries = jnp.where(member(first), counts[None], 0)
    tries += jnp.where(member(second), steps - counts[None], 0)
    more = jnp.maximum(steps // np.array([1, 2, 4, table.cycle], np.int32), 1)

    def step(_, tries):
        return _fill(table, problem, tries, jnp.minimum(more, steps)[:, None])

    tries = lax.fori_loop(0, _ROUNDS, step, tries)
    gains = jnp.sum(problem.gain[:, None] * tries, axis=0, dtype=jnp.int32)
    return tries[:, jnp.argmax(gains)]


def _in_subset(index: Any, unit: Any) -> Any:
    return index >> unit & 1 > 0


def _subsets(table: CostTable, problem: _Problem) -> tuple[jax.Array, jax.Array]:
    """Cost and gain of all sets of units."""
    sets = np.arange(table.subsets.size, dtype=np.int32)
    members = _in_subset(sets[None], problem.unit[:, None])
    gain = jnp.sum(
        jnp.where(members, problem.gain[:, None], 0), axis=0, dtype=jnp.int32
    )
    return jnp.asarray(table.subsets), gain


def _prefixes(table: CostTable, problem: _Problem) -> tuple[jax.Array, jax.Array]:
    """Cost and gain of the best units of each depth: none, one, two, and so on."""

    def add(carry, unit):
        allowed, amounts = unit
        carry = carry + jnp.where(allowed[None], amounts[:, None], 0)
        return carry, carry

    amounts = jnp.stack([problem.weight, problem.gain], axis=1)
    chain = jnp.stack([jnp.asarray(table.chain), jnp.zeros_like(table.chain)])
    start = chain + problem.gain[0] * 0  # varies over a mesh where the scores do
    _, sums = lax.scan(add, start, (problem.allowed, amounts))
    sums = jnp.concatenate([start[None], sums])
    sums = jnp.moveaxis(sums, 1, 0).reshape(2, -1)
    return sums[0], sums[1]


def _in_prefix(index: jax.Array, problem: _Problem) -> jax.Array:
    units, depths = problem.allowed.shape
    place = _divide(index, depths)
    depth = index - place * depths
    inside = np.arange(units, dtype=np.int32)[:, None] < place[None]
    return jnp.take(problem.allowed, depth, axis=1, mode="clip") & inside


def _pairs(
    cost: jax.Array, gain: jax.Array, problem: _Problem, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For so many steps the best set to have in them, and the best in the others.

    They need not be nested. The costs are submodular, so their union and their
    intersection, which are, cost no more.
    """
    places = np.arange(cost.size, dtype=np.int32)
    cost, gain, index = lax.sort((cost, gain, jnp.asarray(places)), num_keys=1)
    counts = counts[None]
    best, rest = lax.cummax(gain), problem.steps - counts
    room = problem.spare - cost[:, None] * counts
    # Divided, as products of costs and steps that are not spent may overflow.
    each = _divide(jnp.maximum(room, 0), jnp.maximum(rest, 1))
    afford = jnp.where(room < 0, -1, each)
    place = jnp.searchsorted(cost, afford, side="right").astype(jnp.int32) - 1
    other = jnp.take(best, place, mode="clip")
    total = jnp.where(place < 0, -1, gain[:, None] * counts + other * rest)
    first = jnp.argmax(total, axis=0)
    last = jnp.max(jnp.where(places[:, None] == first[None], place, -1), axis=0)
    second = jnp.argmax(
        jnp.where(places[:, None] <= last[None], gain[:, None], -1), axis=0
    )
    # Where not even nothing can be had, both are the cheapest, for no steps.
    return index[first], index[second]


def _fill(
    table: CostTable, problem: _Problem, tries: jax.Array, counts: jax.Array
) -> jax.Array:
    """Spends what each try leaves over, in the best of all depths and numbers of steps.

    Args:
      table: of the costs.
      problem: to be solved.
      tries: steps of each unit so far; shape=(units, tries).
      counts: numbers of steps in which to have a depth; shape=(counts, 1).

    Returns:
      Tries in which no unit has fewer steps.
    """
    piece, needs = jnp.asarray(table.piece)[:, None], problem.needs[:, :, None]
    # Steps of each piece so far, and of each unit at no cost of further pieces.
    used = jnp.max(jnp.where(needs, tries[:, None], 0), axis=0, initial=0)
    within = jnp.where(needs, used[None], problem.steps)
    within = jnp.min(within, axis=1, initial=table.cycle)
    within = jnp.minimum(within, problem.steps)
    spent = jnp.sum(problem.weight[:, None] * tries, axis=0, dtype=jnp.int32)
    spent += jnp.sum(piece * used, axis=0, dtype=jnp.int32)
    # What the depths cost beyond that; shape=(depths, counts, tries).
    more = jnp.maximum(counts[None] - used[:, None], 0) * piece[:, None]
    more = jnp.where(table.depths[:, :, None, None], more[None], 0)
    room = problem.spare - spent[None, None] - jnp.sum(more, axis=1, dtype=jnp.int32)

    def take(carry, unit):
        room, total = carry
        gain, weight, allowed, now, within = unit
        now, within = now[None, None], within[None, None]
        paid = jnp.maximum(counts[None], within)
        bound = jnp.where(allowed[:, None, None], paid, within)
        free = jnp.where((room >= 0) & (gain > 0), jnp.maximum(bound - now, 0), 0)
        fits = _divide(jnp.maximum(room, 0), jnp.maximum(weight, 1))
        taken = jnp.where(weight > 0, jnp.minimum(free, fits), free)
        return (room - taken * weight, total + taken * gain), taken

    units = problem.gain, problem.weight, problem.allowed, tries, within
    (_, total), taken = lax.scan(take, (room, room * 0), units)
    total = total.reshape(-1, tries.shape[1])
    taken = taken.reshape(len(tries), *total.shape)
    rows = np.arange(len(total))[:, None]
    chosen = rows == jnp.argmax(total, axis=0)[None]
    return tries + jnp.sum(jnp.where(chosen[None], taken, 0), axis=1, dtype=jnp.int32)

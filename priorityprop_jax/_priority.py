"""The engine of both transformations: once per cycle gradients become quotas.

`Settings` are what a user chose, `PriorityPropState` is what is remembered, and
`advance` is one step: it returns how many updates each unit gets now.
"""

import functools
import numbers
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from . import _units
from ._allocation import (
    allocate_leaves,
    allocate_vector,
    ALLOCATIONS,
    are_few,
    positions,
)
from ._budget import (
    check_budget,
    check_share,
    resolve,
    resolve_share,
    warn_infeasible,
)
from ._checks import check_bounds, check_count, check_finite, check_name, is_traced
from ._schedule import multiplicity, ranking
from ._scores import (
    element_gains,
    element_magnitudes,
    gains,
    MAGNITUDES,
    magnitudes,
    Score,
    ScoreInputs,
    SCORES,
    TAYLOR,
)
from ._selection import check_paths, cost_table, cycle_cost, select, warn_over_cost


class DepthFactor(NamedTuple):
    """A rule for the depth factor, wrapped so that it is not taken for a schedule.

    Attributes:
      factors: ``(depths, max_depth) -> factors``, from one int32 per leaf and their
        largest (at least 1) to one float32 per leaf.

    Examples:
      >>> from priorityprop_jax import DepthFactor, priority_prop
      >>> doubling = DepthFactor(lambda depths, max_depth: 2.0**depths)
      >>> tx = priority_prop(budget=0.5, depth_factor=doubling)
    """

    factors: Callable[[jax.Array, jax.Array], jax.Array]


class PriorityPropState(NamedTuple):
    """What `priority_prop` and `prioritize` remember.

    With leaf and axis units `counts`, `scores` and `quotas` are vectors over the
    units; with ``units="element"`` they are pytrees like the params, sharded like
    them, of int32, float32 and (up to ``max_updates=255``) uint8.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import priority_prop
      >>> tx = optax.chain(priority_prop(budget=0.5), optax.adam(1e-3))
      >>> state = tx.init({"w": jnp.ones(3)})
      >>> print(optax.tree.get(state, "PriorityPropState").counts)
      [0]
    """

    step: jax.Array  # calls of update so far; shape=(), dtype=int32
    counts: Any  # updates given so far; shape=(units,), dtype=int32
    scores: Any  # as of the last recalculation; shape=(units,), dtype=float32
    quotas: Any  # updates in this cycle; shape=(units,), dtype=int32
    score_state: Any  # of the score, if it has one
    budget: jax.Array  # updates handed out in this cycle; shape=(), dtype=int32
    nonfinite: jax.Array  # units found non-finite; shape=(leaves,), dtype=int32
    depths: jax.Array  # of the leaves, 0 at the loss; shape=(leaves,), dtype=int32
    sizes: jax.Array  # units in each leaf; shape=(leaves,), dtype=int32
    rank: jax.Array  # order of the steps; shape=(recalc_every,), dtype=int32


class Settings(NamedTuple):
    """The arguments that `priority_prop` and `prioritize` share."""

    budget: Any
    min_updates: Any
    max_updates: Any
    recalc_every: int
    units: Any
    magnitude: str
    score: Any
    depth_factor: Any
    depth_from: str
    depths: Any
    allocation: str
    axis_name: Any
    seed: Any
    costs: Any = None  # what `backward_costs` returns, once checked a `CostTable`

    @property
    def by_element(self) -> bool:
        """Whether every scalar is a unit."""
        return isinstance(self.units, str) and self.units == "element"

    def is_full(self, units: int) -> bool:
        """Whether each unit is known to be updated exactly once at every step."""
        fixed = all(isinstance(x, int) for x in (self.min_updates, self.max_updates))
        if not fixed or not self.min_updates == self.max_updates == self.recalc_every:
            return False
        if isinstance(self.budget, int):
            return self.budget >= units * self.recalc_every
        return isinstance(self.budget, float) and self.budget == 1.0


def check_settings(settings: Settings, sees_steps: bool = False) -> Settings:
    """Raises where an argument cannot be meant; resolves the score's name.

    `sees_steps`: whether `advance` will be told the steps of an optimizer.
    """
    check_budget(settings.budget)
    check_bounds(settings.min_updates, settings.max_updates)
    check_count("recalc_every", settings.recalc_every, least=1, static=True)
    if isinstance(settings.units, str):
        check_name("units", settings.units, ("leaf", "element"))
    elif callable(settings.units) and jax.tree_util.all_leaves([settings.units]):
        raise TypeError(
            "units must be 'leaf', 'element' or a pytree of tuples of axes, got a "
            "function; call unit_axes(params, rule) to make one from a rule"
        )
    elif is_traced(settings.units) or isinstance(settings.units, jax.Array):
        raise TypeError(
            f"units decide shapes and must be 'leaf', 'element' or a pytree of "
            f"tuples of axes, got {settings.units!r}. Under optax.inject_hyperparams "
            f"name them in static_args: inject_hyperparams(..., static_args=('units',))"
        )
    if settings.magnitude == TAYLOR and not sees_steps:
        raise ValueError(
            f"magnitude={TAYLOR!r} is made from the optimizer's own steps, which only "
            f"prioritize sees: prioritize(optax.adam(1e-3), magnitude={TAYLOR!r}). "
            f"Others are {', '.join(map(repr, MAGNITUDES))}"
        )
    known = (*MAGNITUDES, TAYLOR) if sees_steps else MAGNITUDES
    check_name("magnitude", settings.magnitude, known)
    check_name("depth_from", settings.depth_from, ("loss", "input"))
    check_name("allocation", settings.allocation, ALLOCATIONS)
    check_count("seed", settings.seed, least=-(2**31))
    _check_depth_factor(settings.depth_factor)
    settings = _check_costs(settings)
    if isinstance(settings.score, Score):
        return settings
    check_name("score", settings.score, tuple(SCORES))
    return settings._replace(score=SCORES[settings.score])


def _check_costs(settings: Settings) -> Settings:
    if settings.costs is None:
        return settings
    if not (isinstance(settings.units, str) and settings.units == "leaf"):
        raise ValueError(
            f"with costs the units must be 'leaf', as the costs are known for whole "
            f"leaves, got units={settings.units!r}"
        )
    check_share(settings.budget)
    return settings._replace(costs=cost_table(settings.costs, settings.recalc_every))


def _check_depth_factor(depth_factor: Any) -> None:
    if isinstance(depth_factor, DepthFactor):
        return
    if isinstance(depth_factor, types.FunctionType | functools.partial):
        raise TypeError(
            "depth_factor must be a number, a DepthFactor or a pytree of factors, got "
            "a function; wrap it: DepthFactor(lambda depths, max_depth: ...)"
        )
    if _is_scalar(depth_factor) or isinstance(depth_factor, str):
        _check_factor("depth_factor", depth_factor)


def _check_factor(argument: str, factor: Any) -> None:
    check_finite(argument, factor)
    if not is_traced(factor) and float(factor) < 0:
        raise ValueError(f"{argument} must be at least 0, got {factor!r}")


def init_priority(settings: Settings, params: optax.Params) -> PriorityPropState:
    """The state before the first step. Looks at structure, shapes and dtypes only."""
    where = _units.layout(params, settings.units)
    bounds = settings.min_updates, settings.max_updates
    if settings.costs is None:
        warn_infeasible(settings.budget, where.size, *bounds, settings.recalc_every)
    elif where.paths:  # optax looks up the state's structure without any
        check_paths(settings.costs, where.paths)
        warn_over_cost(settings.costs, settings.budget, *bounds)
    depths = jnp.asarray(_depths(settings, where, params))
    _leaf_factors(settings, params, depths)  # an error now, not in the first step
    zeros = functools.partial(_zeros, settings, where, params)
    return PriorityPropState(
        step=jnp.zeros([], jnp.int32),
        counts=zeros(jnp.int32),
        scores=zeros(jnp.float32),
        quotas=zeros(_quota_dtype(settings)),
        score_state=_init_score(settings, where, params),
        budget=jnp.zeros([], jnp.int32),
        nonfinite=jnp.zeros((len(where.paths),), jnp.int32),
        depths=depths,
        sizes=jnp.asarray(np.diff(where.offsets).astype(np.int32)),
        rank=jnp.asarray(ranking(settings.recalc_every)),
    )


def _zeros(settings: Settings, where, params, dtype) -> Any:
    if not settings.by_element:
        return jnp.zeros((where.size,), dtype)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)


def _quota_dtype(settings: Settings) -> Any:
    high = settings.max_updates
    small = isinstance(high, int) and high <= 255 and settings.by_element
    return jnp.uint8 if small else jnp.int32


def _init_score(settings: Settings, where, params) -> Any:
    """The score's state; for element units one tree like the params per array."""
    if not settings.by_element:
        return settings.score.init(jnp.zeros((where.size,), jnp.float32))
    like = lambda p: settings.score.init(jnp.zeros_like(p, dtype=jnp.float32))
    kind = jax.tree.structure(settings.score.init(jnp.zeros((0,), jnp.float32)))
    trees = [
        jax.tree.map(lambda p, i=i: jax.tree.leaves(like(p))[i], params)
        for i in range(kind.num_leaves)
    ]
    return jax.tree.unflatten(kind, trees)


def _depths(settings: Settings, where, params) -> np.ndarray:
    if settings.depths is None:
        depths = _units.module_depths(where)
    else:
        given = _units.match_tree("depths", settings.depths, params)
        for path, depth in zip(where.paths, given, strict=True):
            check_count(f"the depth of {path}", depth, least=0)
        depths = np.array([int(d) for d in given], np.int32)
    if settings.depth_from == "input" and depths.size:
        depths = depths.max() - depths
    return depths.astype(np.int32)


def _leaf_factors(
    settings: Settings, params: optax.Params, depths: jax.Array
) -> jax.Array:
    """The depth factor of each leaf: shape=(leaves,), dtype=float32."""
    factor = settings.depth_factor
    most = jnp.maximum(jnp.max(depths, initial=0), 1)
    if isinstance(factor, DepthFactor):
        factors = jnp.asarray(factor.factors(depths, most)).astype(jnp.float32)
        if factors.shape != depths.shape:
            raise ValueError(
                f"depth_factor must return one factor per leaf, shape {depths.shape}, "
                f"got shape {factors.shape}"
            )
        return factors
    if _is_scalar(factor):
        rate = jnp.asarray(factor).astype(jnp.float32)
        return 1.0 + rate * (depths.astype(jnp.float32) / most.astype(jnp.float32))
    given = _units.match_tree("depth_factor", factor, params)
    for path, value in zip(_units.layout(params, "leaf").paths, given, strict=True):
        _check_factor(f"the depth factor of {path}", value)
    return jnp.array(given, jnp.float32)


def _is_scalar(x: Any) -> bool:
    if is_traced(x) or isinstance(x, jax.Array):
        return x.ndim == 0
    return isinstance(x, numbers.Real)


class Turn(NamedTuple):
    """What `advance` decided for one step."""

    where: _units.Layout
    leaves: list[jax.Array]  # the incoming updates
    given: list[jax.Array]  # updates of each unit now; arrays as in the state

    @property
    def whole(self) -> bool:
        """Whether each leaf is one unit."""
        return self.where.axes is not None and not any(self.where.axes)

    def by_leaf(self, statistic: list[jax.Array]) -> list[jax.Array]:
        """Arrays as in the state, as one array per leaf that broadcasts against it."""
        by_element = self.where.axes is None
        return statistic if by_element else _units.split(self.where, statistic[0])


class _Plan(NamedTuple):
    """The part of the state that the first step of a cycle changes."""

    scores: Any
    quotas: Any
    score_state: Any
    budget: jax.Array
    nonfinite: jax.Array
    # Whose gradient can be used; empty where each element can tell for itself.
    finite: list[jax.Array]


def advance(
    settings: Settings,
    updates: optax.Updates,
    state: PriorityPropState,
    steps: Callable[[Turn], list[jax.Array]] | None = None,
) -> tuple[Turn, PriorityPropState]:
    """One step: at the first of a cycle new quotas, then who is updated how often.

    With ``magnitude="taylor"`` `steps` tells what an optimizer would add to the params
    in a turn; it is asked about one in which each unit is due once.
    """
    where = _units.layout(updates, settings.units)
    check_state(settings, where, state)
    leaves = [jnp.asarray(g) for g in jax.tree.leaves(updates)]
    r = state.step % settings.recalc_every
    # Made out here: in a branch of the cond they would lose an explicit sharding.
    kept = not settings.by_element or settings.axis_name is not None
    kept = kept or steps is not None
    like = jax.tree.leaves(state.quotas) if kept else []
    finite = [jnp.ones_like(q, dtype=bool) for q in like]
    plan = _Plan(
        state.scores,
        state.quotas,
        state.score_state,
        state.budget,
        state.nonfinite,
        finite,
    )
    factors = _leaf_factors(settings, updates, state.depths)
    # The branch that passes through must be the false one: the other order copies.
    plan = lax.cond(
        r == 0,
        lambda p: _recalculate(settings, where, leaves, factors, state, steps, p),
        lambda p: p,
        plan,
    )
    finite = plan.finite or [jnp.isfinite(g) | (r != 0) for g in leaves]
    if settings.is_full(where.size):  # as without us, come what may
        finite = [jnp.ones_like(ok) for ok in finite]
    given = [
        jnp.where(ok, multiplicity(q, state.rank, r), 0)
        for q, ok in zip(jax.tree.leaves(plan.quotas), finite, strict=True)
    ]
    counts = [
        _saturating_add(c, m)
        for c, m in zip(jax.tree.leaves(state.counts), given, strict=True)
    ]
    state = state._replace(
        step=optax.safe_increment(state.step),
        counts=jax.tree.unflatten(jax.tree.structure(state.counts), counts),
        scores=plan.scores,
        quotas=plan.quotas,
        score_state=plan.score_state,
        budget=plan.budget,
        nonfinite=plan.nonfinite,
    )
    return Turn(where, leaves, given), state


def check_state(settings: Settings, where, state: PriorityPropState) -> None:
    """Raises unless the state was made for these units and cycles."""
    shapes = [c.shape for c in jax.tree.leaves(state.counts)]
    _units.check_layout(where, state.depths.size, shapes)
    if state.rank.size != settings.recalc_every:
        raise ValueError(
            f"recalc_every={settings.recalc_every}, but the state was initialized "
            f"with recalc_every={state.rank.size}"
        )


def _saturating_add(count: jax.Array, more: jax.Array) -> jax.Array:
    most = jnp.iinfo(jnp.int32).max
    return jnp.where(count > most - more, most, count + more)


def _recalculate(settings, where, leaves, factors, state, steps, plan: _Plan) -> _Plan:
    """Scores from gradients, quotas from scores."""
    if steps is None:
        sizes = _magnitudes(settings, where, leaves)
    else:
        sizes = _gains(where, leaves, steps(_everyone(where, leaves, plan)))
    if settings.axis_name is not None:
        n = lax.psum(1, settings.axis_name)
        sizes = [lax.psum(x / n, settings.axis_name) for x in sizes]
    finite = [jnp.isfinite(x) for x in sizes]
    sizes = [jnp.where(ok, x, 0.0) for x, ok in zip(sizes, finite, strict=True)]
    scores, score_state = _score(settings, where, sizes, factors, state)
    scores = [
        jnp.where(ok & jnp.isfinite(s) & (s > 0), s, 0.0)
        for s, ok in zip(scores, finite, strict=True)
    ]
    budget = None
    if settings.costs is None:
        budget = resolve(settings.budget, state.step, where.size, settings.recalc_every)
        quotas = _allocate(settings, scores, budget)
    else:
        quotas = _select(settings, scores, state.step)
    # Unusable gradients get the minimum even where the budget could afford more.
    quotas = [
        jnp.where(ok, q, jnp.minimum(q, settings.min_updates)).astype(old.dtype)
        for q, ok, old in zip(quotas, finite, jax.tree.leaves(plan.quotas), strict=True)
    ]
    if budget is None:
        budget = jnp.sum(quotas[0], dtype=jnp.int32)
    return _Plan(
        jax.tree.unflatten(jax.tree.structure(plan.scores), scores),
        jax.tree.unflatten(jax.tree.structure(plan.quotas), quotas),
        score_state,
        jnp.asarray(budget).astype(jnp.int32),
        plan.nonfinite + _bad_per_leaf(where, finite),
        finite if plan.finite else [],
    )


def _magnitudes(settings: Settings, where, leaves) -> list[jax.Array]:
    """One array per leaf for element units, else one vector over all units."""
    if where.axes is None:
        return [element_magnitudes(g) for g in leaves]
    return [magnitudes(leaves, where.axes, settings.magnitude)]


def _gains(where, leaves, steps) -> list[jax.Array]:
    """The same of gradients and steps."""
    if where.axes is None:
        return list(map(element_gains, leaves, steps))
    return [gains(leaves, steps, where.axes)]


def _everyone(where, leaves, plan: _Plan) -> Turn:
    """A turn in which each unit is due once."""
    if where.axes is not None:
        return Turn(where, leaves, [jnp.ones(where.size, jnp.int32)])
    # Shaped and sharded like the leaves already.
    once = [lax.convert_element_type(ok, jnp.int32) for ok in plan.finite]
    return Turn(where, leaves, once)


def _score(settings: Settings, where, sizes, factors, state):
    peak = jnp.max(
        jnp.stack([jnp.max(x, initial=0.0) for x in sizes] or [jnp.float32(0)])
    )
    if settings.by_element:
        spread = [factors[i] for i in range(len(sizes))]
        offsets = where.offsets
    else:
        spread, offsets = [_units.per_leaf(where, factors)], (0,)
    kind = jax.tree.structure(settings.score.init(jnp.zeros((0,), jnp.float32)))
    trees = kind.flatten_up_to(state.score_state)
    scores, states = [], []
    for i, (x, count, factor) in enumerate(
        zip(sizes, jax.tree.leaves(state.counts), spread, strict=True)
    ):
        inputs = ScoreInputs(
            magnitudes=x,
            counts=count,
            depth_factors=factor,
            index=positions(x, offsets[i]),
            units=where.size,
            offset=offsets[i],
            peak=peak,
            cycle=state.step // settings.recalc_every,
            step=state.step,
            seed=settings.seed,
        )
        old = jax.tree.unflatten(kind, [jax.tree.leaves(t)[i] for t in trees])
        score, new = settings.score.update(inputs, old)
        scores.append(score.astype(jnp.float32))
        states.append(jax.tree.leaves(new))
    new_trees = [
        jax.tree.unflatten(jax.tree.structure(t), [s[j] for s in states])
        for j, t in enumerate(trees)
    ]
    return scores, jax.tree.unflatten(kind, new_trees)


def _allocate(settings: Settings, scores, budget) -> list[jax.Array]:
    bounds = budget, settings.min_updates, settings.max_updates
    few = are_few(settings.max_updates)
    if settings.by_element and settings.allocation == "bisect":
        return allocate_leaves(scores, *bounds, few)
    vector = _units.join(scores)
    quotas = allocate_vector(vector, *bounds, settings.allocation, few)
    ends = np.cumsum([s.size for s in scores])[:-1]
    parts = jnp.split(quotas, ends) if scores else []
    return [
        _units.shard_like(q.reshape(s.shape), s)
        for q, s in zip(parts, scores, strict=True)
    ]


def _select(settings: Settings, scores, step) -> list[jax.Array]:
    """Quotas by a budget in cost."""
    total = cycle_cost(settings.costs, resolve_share(settings.budget, step))
    bounds = settings.min_updates, settings.max_updates
    quotas = select(settings.costs, _units.join(scores), total, *bounds)
    return [_units.shard_like(quotas, scores[0])]


def _bad_per_leaf(where, finite: list[jax.Array]) -> jax.Array:
    """How many units of each leaf have a gradient that is not finite."""
    if where.axes is not None and not any(where.axes):
        return (~finite[0]).astype(jnp.int32)
    if where.axes is not None:
        finite = _units.split(where, finite[0])
    bad = [jnp.sum(~ok, dtype=jnp.int32) for ok in finite]
    return jnp.stack(bad) if bad else jnp.zeros((0,), jnp.int32)


def find_state(
    opt_state: optax.OptState, params: optax.Params, index: int | None = None
) -> PriorityPropState:
    """The one `PriorityPropState` in a chain or wrapper, or the one at `index`."""
    is_ours = lambda x: isinstance(x, PriorityPropState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError(
            "opt_state holds no PriorityPropState: is priority_prop or prioritize in "
            "the optimizer?"
        )
    if index is None and len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} PriorityPropStates; choose one by "
            f"index=0..{len(found) - 1}"
        )
    if not -len(found) <= (index or 0) < len(found):
        raise ValueError(
            f"index must be in [0, {len(found)}), as opt_state holds {len(found)} "
            f"PriorityPropStates, got {index}"
        )
    state = _unwrap(found[index or 0])
    leaves = len(jax.tree.leaves(params))
    if leaves != state.sizes.size:
        raise ValueError(
            f"params has {leaves} leaves, but the PriorityPropState was initialized "
            f"for {state.sizes.size}; under optax.masked or optax.partition pass the "
            f"params with optax.MaskedNode() at the other leaves"
        )
    return state


def _unwrap(state: PriorityPropState) -> PriorityPropState:
    """The arrays themselves, where a framework (flax.nnx) keeps them in variables."""
    single = {
        name: jax.tree.leaves(getattr(state, name))[0]
        for name in ("step", "budget", "nonfinite", "depths", "sizes", "rank")
    }
    return state._replace(**single)


def largest_quotas(
    state: PriorityPropState, params: optax.Params, units: Any = None
) -> list[jax.Array]:
    """The largest quota in each leaf of a found state, as int32 scalars.

    Given the `units`, a vector for leaves with units along the first axis: by row.
    """
    n, quotas = state.sizes.size, jax.tree.leaves(state.quotas)
    where = None if units is None else _units.layout(params, units)
    if where is not None and where.axes is not None and any(where.axes):
        if where.size != sum(q.size for q in quotas):
            raise ValueError(
                f"units make {where.size} units of these params, but the "
                f"PriorityPropState was initialized for {sum(q.size for q in quotas)}"
            )
        return [
            jnp.max(part, axis=tuple(range(0 in axes, part.ndim)), initial=0)
            for part, axes in zip(
                _units.split(where, quotas[0]), where.axes, strict=True
            )
        ]
    if len(quotas) == n:  # an array for each leaf, or a single leaf
        return [jnp.max(q, initial=0).astype(jnp.int32) for q in quotas]
    size = quotas[0].size
    owner = jnp.repeat(jnp.arange(n), state.sizes, total_repeat_length=size)
    most = jax.ops.segment_max(quotas[0].astype(jnp.int32), owner, n)
    return _units.unstack(jnp.maximum(most, 0))  # the largest of none is below 0


def by_leaf(state: PriorityPropState, statistic: Any) -> list[np.ndarray]:
    """A per-unit statistic of a found state, as one flat array per leaf. On the host.

    Element units have one array per leaf already; else the vector is cut.
    """
    arrays = [np.ravel(x) for x in jax.tree.leaves(statistic)]
    if len(arrays) == state.sizes.size:
        return arrays
    return np.split(arrays[0], np.cumsum(state.sizes)[:-1]) if state.sizes.size else []

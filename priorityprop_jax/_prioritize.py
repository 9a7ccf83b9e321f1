"""`prioritize`: an optimizer in which units rest for real.

Each leaf has its own inner state (see `_leafwise`). A large leaf is updated inside a
conditional, so that resting costs nothing; small leaves are selected.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._checks import check_name
from ._leafwise import init_inner, Leafwise, leafwise, update_together
from ._priority import (
    advance,
    check_settings,
    DepthFactor,
    init_priority,
    PriorityPropState,
    Settings,
    Turn,
)
from ._scores import Score
from ._units import Layout, layout, unstack_together


RESTING = ("keep", "decay", "reset")
# Leaves up to this size are selected instead of branched on: a conditional has a cost.
_SMALL = 2**14
_FOREVER = 2**31 - 2


class PrioritizeState(NamedTuple):
    """The state of `prioritize`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import prioritize
      >>> state = prioritize(optax.adam(1e-3), budget=0.5).init({"w": jnp.ones(3)})
      >>> print(state.inner[0].count)  # one per leaf
      [0]
    """

    priority: PriorityPropState
    inner: Any  # the inner state; numbers shared by all leaves have shape=(leaves, ...)
    rested: Any  # steps since each unit's last update, int32; () with "keep"


def prioritize(
    inner: optax.GradientTransformation,
    budget: optax.ScalarOrSchedule = 100,
    min_updates: int | jax.typing.ArrayLike = 1,
    max_updates: int | jax.typing.ArrayLike = 20,
    recalc_every: int = 10,
    *,
    units: Any = "leaf",
    magnitude: str = "l2",
    score: str | Score = "priority",
    depth_factor: float | jax.typing.ArrayLike | DepthFactor | Any = 1.0,
    depth_from: str = "loss",
    depths: Any = None,
    allocation: str = "argsort",
    axis_name: Any = None,
    seed: int | jax.typing.ArrayLike = 0,
    resting: str = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""Give each unit exactly as many updates of an optimizer as its share of a budget.

    Units are scored and quotas handed out as by `priority_prop`. A unit with
    multiplicity :math:`m_u(r) = 0` gets no update at all: decoupled weight decay
    rests too, the state of `inner` for it does not move, and the work is skipped
    (`jax.lax.cond`). A unit with :math:`m_u(r) = k` gets k updates of `inner` in a
    row from the same gradient, the params moving along:

    .. math::
      p_{j+1} = p_j + inner(g, state_j, p_j), \quad j = 0 \dots k - 1

    Each leaf has its own state, so Adam's bias correction counts that leaf's updates.
    Learning-rate schedules inside `inner` follow the global step, not the leaf's
    count, and k updates in one step share a rate (recognized: optax's schedules, and
    `optax.inject_hyperparams`).

    For units finer than a leaf the updates and the state arrays shaped like the leaf
    are selected per unit; other state (Adam's count, Adafactor's rows and columns)
    advances when any unit of the leaf is updated.

    .. note::
      Each leaf is updated alone, so a transformation that couples leaves, such as
      clipping by the global norm, belongs in front and not into `inner`:
      ``optax.chain(optax.clip_by_global_norm(1.0), prioritize(optax.adam(1e-3)))``.

    Args:
      inner: any optax transformation that works under `optax.masked`.
      budget: see `priority_prop`, like all arguments that are not named here.
      min_updates: see `priority_prop`.
      max_updates: see `priority_prop`.
      recalc_every: see `priority_prop`.
      units: see `priority_prop`.
      magnitude: see `priority_prop`.
      score: see `priority_prop`.
      depth_factor: see `priority_prop`.
      depth_from: see `priority_prop`.
      depths: see `priority_prop`.
      allocation: see `priority_prop`.
      axis_name: see `priority_prop`.
      seed: see `priority_prop`.
      resting: what becomes of the inner state of a unit that rests. ``"keep"``: it
        waits. ``"decay"``: on return it is caught up with one zero-gradient update
        for each step rested. ``"reset"``: on return it starts anew.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PrioritizeState`. With
      ``budget=1.0`` and ``min_updates == max_updates == recalc_every`` its updates
      are those of `inner`.

    Raises:
      ValueError, TypeError: an argument cannot be meant; in `init` and `update` as
        for `priority_prop`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from priorityprop_jax import prioritize
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(1.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 0.1 * p["b"] ** 2
      >>> tx = prioritize(optax.adam(0.1), budget=0.5)
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(state, "quotas"), optax.tree.get(state, "count"))
      [9 1] [9 1]
    """
    settings = check_settings(
        Settings(
            budget,
            min_updates,
            max_updates,
            recalc_every,
            units,
            magnitude,
            score,
            depth_factor,
            depth_from,
            depths,
            allocation,
            axis_name,
            seed,
        )
    )
    check_name("resting", resting, RESTING)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner must be an optax.GradientTransformation, got {inner!r}; for "
            f"example prioritize(optax.adam(1e-3), budget=0.5)"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        priority = init_priority(settings, params)
        counts = priority.counts
        rested = () if resting == "keep" else jax.tree.map(jnp.zeros_like, counts)
        return PrioritizeState(priority, init_inner(inner, params), rested)

    def step(updates, state, params, extra_args):
        turn, priority = advance(settings, updates, state.priority)
        if not turn.leaves:
            return updates, state._replace(priority=priority)
        params = _check_params(turn.where, turn.leaves, params)
        parts = leafwise(inner, updates, state.inner, params, extra_args)
        rested = jax.tree.leaves(state.rested)
        most = _most_in_a_row(settings)
        out, inner_state = _run(parts, turn, params, resting, rested, most)
        out = jax.tree.unflatten(jax.tree.structure(updates), out)
        rested = jax.tree.unflatten(
            jax.tree.structure(state.rested),
            map(_rest, jax.tree.leaves(state.rested), turn.given),
        )
        return out, PrioritizeState(priority, inner_state, rested)

    # Inlined where the caller compiles; else compiled once, not at every call.
    compiled = jax.jit(functools.partial(step, extra_args={}))
    count = jax.jit(lambda updates, state: advance(settings, updates, state)[1])

    def update_fn(updates, state, params=None, **extra_args):
        where = layout(updates, settings.units)
        if where.paths and settings.is_full(where.size):
            # Not compiled as a whole: called eagerly, `inner` would round differently.
            _check_params(where, jax.tree.leaves(updates), params)
            priority = count(updates, state.priority)
            updates, inner_state = update_together(
                inner, updates, state.inner, params, extra_args
            )
            rested = jax.tree.map(jnp.zeros_like, state.rested)
            return updates, PrioritizeState(priority, inner_state, rested)
        if extra_args:
            return step(updates, state, params, extra_args)
        return compiled(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _most_in_a_row(settings: Settings) -> int | None:
    """Updates of a unit in one step, if known."""
    high = settings.max_updates
    return -(-high // settings.recalc_every) if isinstance(high, int) else None


def _check_params(where: Layout, grads: list[jax.Array], params: Any) -> Any:
    if params is None:
        return None
    params = jax.tree.map(jnp.asarray, params)
    leaves = jax.tree.leaves(params)
    shapes = [jnp.shape(g) for g in grads]
    if [p.shape for p in leaves] != shapes:
        different = [
            path
            for path, p, shape in zip(where.paths, leaves, shapes, strict=False)
            if p.shape != shape
        ]
        raise ValueError(
            f"params must match the updates: {len(leaves)} leaves for "
            f"{len(grads)}, first different shape at {(different or ['-'])[0]}"
        )
    return params


def _rest(rested: jax.Array, given: jax.Array) -> jax.Array:
    return jnp.where(given > 0, 0, jnp.minimum(rested, _FOREVER) + 1)


class _Job(NamedTuple):
    """One step, taken apart leaf by leaf."""

    parts: Leafwise
    resting: str
    most: int | None  # updates of a unit in one step, if known
    whole: bool  # each leaf is one unit
    grads: list[jax.Array]
    params: list[Any]
    due: list[jax.Array]  # updates of the units of each leaf, to broadcast
    back: list[jax.Array]  # steps that its returning units have rested, else 0
    busiest: list[jax.Array]  # the largest of `due`, a scalar
    longest: list[jax.Array]  # the largest of `back`
    factors: list[list[jax.Array]]  # what the first update takes from shared state
    second: list[list[jax.Array]]  # the same for the second, where it is the last
    left: list[list[jax.Array]]  # shared state as each leaf left it, to be caught up
    after: list[list[jax.Array]]  # shared state after the first update, for the next


class _Progress(NamedTuple):
    """How far one leaf has come within the step."""

    total: jax.Array  # sum of the updates
    own: list[jax.Array]  # inner state of this leaf alone
    shared: list[jax.Array]  # its entries of what is shared


def _run(
    parts: Leafwise,
    turn: Turn,
    params: Any,
    resting: str,
    rested: list[jax.Array],
    most: int | None,
) -> tuple[list[jax.Array], Any]:
    """All updates of this step, by leaf, and the inner state after them."""
    n = len(turn.leaves)
    params = [None] * n if params is None else jax.tree.leaves(params)
    due = turn.given
    back = [jnp.where(m > 0, t, 0) for m, t in zip(due, rested or due, strict=True)]
    if turn.whole:
        busiest, longest = due[0], back[0]
    else:
        due, back = turn.by_leaf(due), turn.by_leaf(back)
        busiest, longest = (jnp.stack(list(map(_largest, x))) for x in (due, back))
    job = _Job(
        parts, resting, most, turn.whole, turn.leaves, params, due, back, *[[]] * 6
    )
    job, shared = _share(job, busiest, longest)
    small = [i for i in range(n) if job.grads[i].size <= _SMALL]
    first = [_first(job, i) for i in small]
    done = dict(zip(small, _more(job, small, first), strict=True))
    ready = jnp.int32(0)
    for i in range(n):
        if i not in done:
            done[i], ready = _branch(job, i, ready)
    own = [done[i].own for i in range(n)]
    return [done[i].total for i in range(n)], parts.collect(own, shared)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(x, initial=0)


def _share(job: _Job, due: jax.Array, back: jax.Array) -> tuple[_Job, list]:
    """Moves what leaves share, as vectors, and tells each leaf what it needs of it."""
    parts, state = job.parts, job.parts.shared
    advance = jax.vmap(parts.advance) if state else lambda _: ([], [])

    def move(count, j, state):
        after = advance(state)[0]
        return [_choose(count > j, a, b) for a, b in zip(after, state, strict=True)]

    if job.resting == "decay" and state:
        catch_up = functools.partial(move, back)
        state = lax.fori_loop(0, _largest(back), catch_up, state)
    elif job.resting == "reset" and state:
        fresh = parts.fresh(0, _param(job, 0))[1]
        state = [_choose(back > 0, a, b) for a, b in zip(fresh, state, strict=True)]
    after, factors = advance(state)
    last = _repeat(job.most, _largest(due), functools.partial(move, due), after)
    new = [_choose(due > 0, a, b) for a, b in zip(last, parts.shared, strict=True)]
    few = job.most is not None and job.most < 2**24  # exact in float32, and shorter
    columns = [
        [(due > 0) if job.most == 1 else due.astype(jnp.float32) if few else due],
        [back] if job.resting != "keep" else [],
        factors,
        advance(after)[1] if job.most == 2 else [],
        parts.shared if job.resting == "decay" else [],
        after if job.most not in (1, 2) else [],
    ]
    rows = unstack_together([x for xs in columns for x in xs])
    ends = list(itertools.accumulate(map(len, columns), initial=0))
    cut = [[row[a:b] for row in rows] for a, b in itertools.pairwise(ends)]
    busiest, longest = ([x for part in column for x in part] for column in cut[:2])
    names = ("factors", "second", "left", "after")
    parts = dict(zip(names, cut[2:], strict=True))
    job = job._replace(busiest=busiest, longest=longest, **parts)
    return job._replace(due=busiest, back=longest) if job.whole else job, new


def _choose(on: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Selects whole entries of arrays over the leaves."""
    return jnp.where(on.reshape(on.shape + (1,) * (jnp.ndim(old) - 1)), new, old)


def _repeat(most: int | None, busiest: jax.Array, once: Callable, start: Any) -> Any:
    """``once(j, ...)`` for the updates j = 1, 2, ... after the first."""
    if most is None:
        return lax.fori_loop(1, busiest, once, start)

    def maybe(j, at):
        return lax.cond(j < busiest, functools.partial(once, j), lambda at: at, at)

    # A fixed number of rounds can be differentiated.
    return maybe(1, start) if most == 2 else lax.fori_loop(1, most, maybe, start)


def _branch(job: _Job, i: int, ready: jax.Array) -> tuple[_Progress, jax.Array]:
    """The updates of a large leaf, and a zero that is known when they are done."""
    # What passes through must be the false branch: the other order copies.
    own = job.parts.own[i]
    late_update = job.parts.late_update(i) if job.most == 1 else None
    if late_update is None:
        total = jnp.zeros_like(job.grads[i], dtype=job.parts.dtype(i))
        due = job.busiest[i].astype(jnp.int32)
        # One leaf after the other: what the update is used for comes in between, and
        # its memory serves for the next. All at once, they would all be in memory.
        total, own, done = lax.cond(
            due > ready,
            lambda *_: (*_more(job, [i], [_first(job, i)])[0][:2], due),
            lambda *passed: passed,
            total,
            own,
            ready,
        )
        return _Progress(total, own, []), jnp.minimum(done, 0)
    due = _is_due(job.busiest[i])
    own = lax.cond(due, lambda _: _first(job, i).own, lambda own: own, own)
    # Outside, to be fused into what follows: it never is an array in memory.
    total = late_update(job.grads[i], own, job.factors[i], job.params[i])
    total = _where(_is_due(job.due[i]), total, jnp.zeros_like(total))
    return _Progress(total, own, []), ready


def _is_due(number: jax.Array) -> jax.Array:
    return number if number.dtype == jnp.bool else number > 0


def _first(job: _Job, i: int) -> _Progress:
    """The first update of a leaf in this step."""
    g, p = job.grads[i], job.params[i]
    sure = job.whole and g.size > _SMALL
    own = _welcome_back(job, i)
    total, new = job.parts.update(i, g, own, job.factors[i], p)
    start = _Progress(jnp.zeros_like(total), own, [])
    due = sure or _is_due(job.due[i])
    at = _select(due, _Progress(total, new, []), start)
    return at._replace(shared=job.after[i] if job.after else [])


def _more(job: _Job, members: list[int], start: list[_Progress]) -> list[_Progress]:
    """The updates after the first, from the same gradients, the params moving along."""
    if job.most == 1 or not members:
        return start
    sure = job.whole and len(members) == 1

    def once(j, progress):
        return [
            _select(sure or job.due[i] > j, _next(job, i, at), at)
            for i, at in zip(members, progress, strict=True)
        ]

    busiest = functools.reduce(jnp.maximum, (job.busiest[i] for i in members))
    return _repeat(job.most, busiest, once, start)


def _next(job: _Job, i: int, at: _Progress) -> _Progress:
    shared, factors = at.shared, job.second[i] if job.second else []
    if job.most != 2:
        shared, factors = job.parts.advance(shared)
    p = job.params[i]
    p = None if p is None else optax.apply_updates(p, at.total)
    update, own = job.parts.update(i, job.grads[i], at.own, factors, p)
    return _Progress((at.total + update).astype(at.total.dtype), own, shared)


def _select(on: Any, new: _Progress, old: _Progress) -> _Progress:
    """New where units are due; state of another shape where any unit is."""
    if on is True:
        return new
    shape, some = new.total.shape, jnp.any(on) if on.ndim else on
    return jax.tree.map(
        lambda a, b: _where(on if b.shape == shape else some, a, b), new, old
    )


def _where(on: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`jnp.where` of equal types, which for a scalar is a single operation."""
    return jnp.where(on, new, old) if on.ndim else lax.select_n(on, old, new)


def _welcome_back(job: _Job, i: int) -> list[jax.Array]:
    """The state of a leaf, treated as `resting` says where units rested."""
    g, own = job.grads[i], job.parts.own[i]
    if job.resting == "keep":
        return own
    if job.resting == "reset":
        fresh = _Progress(g, job.parts.fresh(i, _param(job, i))[0], [])
        return _select(job.back[i] > 0, fresh, _Progress(g, own, [])).own

    def decay(t, at):
        shared, factors = job.parts.advance(at.shared)
        _, new = job.parts.update(i, jnp.zeros_like(g), at.own, factors, job.params[i])
        return _select(job.whole or job.back[i] > t, _Progress(g, new, shared), at)

    at = _Progress(g, own, job.left[i])
    return lax.fori_loop(0, job.longest[i], decay, at).own


def _param(job: _Job, i: int) -> Any:
    """What `inner.init` is shown for a leaf."""
    return jnp.zeros_like(job.grads[i]) if job.params[i] is None else job.params[i]

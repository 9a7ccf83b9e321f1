"""All updates of one step of `prioritize`: who is due none, one, or several in a row.

A large leaf is updated inside a conditional, so that its work is skipped while it
rests; small leaves are selected. Where an update can be computed from the state after
it, as Adam's can, that is left for later, to be fused into what the update is used for.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._leafwise import Leafwise
from ._priority import Turn
from ._units import unstack_together


# Leaves up to this size are selected instead of branched on. A conditional has a cost,
# above all to compile; and by a scalar XLA:CPU selects whole loops, not elements.
_SMALL = 2**16


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
    second: list[list[jax.Array]]  # the same for the second, where there can be two
    final: list[list[jax.Array]]  # the same for the last of those
    left: list[list[jax.Array]]  # shared state as each leaf left it, to be caught up
    after: list[list[jax.Array]]  # shared state after the first update, for the next


class _Progress(NamedTuple):
    """How far one leaf has come within the step."""

    total: jax.Array  # sum of the updates
    own: list[jax.Array]  # inner state of this leaf alone
    shared: list[jax.Array]  # its entries of what is shared


def run(
    parts: Leafwise,
    turn: Turn,
    params: Any,
    resting: str,
    rested: list[jax.Array],
    most: int | None,
) -> tuple[list[jax.Array], Any]:
    """All updates of this step, by leaf, and the inner state after them.

    `most` is how often a unit can be updated in a step, None if that is not known.
    """
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
        parts, resting, most, turn.whole, turn.leaves, params, due, back, *[[]] * 7
    )
    job, shared = _share(job, busiest, longest)
    done: dict[int, _Progress] = {}
    now, ready = [], jnp.int32(0)
    for i in range(n):
        late = parts.late_update(i) is not None
        if late and most == 1:
            done[i] = _late(job, i)
        elif late and most == 2 and turn.whole:
            done[i], ready = _late_twice(job, i, ready)
        elif _is_small(job, i):
            now.append(i)
        else:
            done[i], ready = _branch(job, i, ready)
    done |= zip(now, _more(job, now, [_first(job, i) for i in now]), strict=True)
    own = [done[i].own for i in range(n)]
    return [done[i].total for i in range(n)], parts.collect(own, shared)


def _is_small(job: _Job, i: int) -> bool:
    return job.grads[i].size <= _SMALL


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
    second = advance(after)[1] if job.most == 2 else []
    pairs = zip(second, factors, strict=False)
    final = [_choose(due > 1, b, a) for b, a in pairs] if job.whole else []
    last = _repeat(job.most, _largest(due), functools.partial(move, due), after)
    new = [_choose(due > 0, a, b) for a, b in zip(last, parts.shared, strict=True)]
    few = job.most is not None and job.most < 2**24  # exact in float32, and shorter
    columns = [
        [(due > 0) if job.most == 1 else due.astype(jnp.float32) if few else due],
        [back] if job.resting != "keep" else [],
        factors,
        second,
        final,
        parts.shared if job.resting == "decay" else [],
        after if job.most not in (1, 2) else [],
    ]
    rows = unstack_together([x for xs in columns for x in xs])
    ends = list(itertools.accumulate(map(len, columns), initial=0))
    cut = [[row[a:b] for row in rows] for a, b in itertools.pairwise(ends)]
    busiest, longest = ([x for part in column for x in part] for column in cut[:2])
    names = ("factors", "second", "final", "left", "after")
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


def _late(job: _Job, i: int) -> _Progress:
    """The state of a leaf first, and its update from that.

    Outside of the conditional, to be fused into what follows: the update never is an
    array in memory.
    """
    g, p, own = job.grads[i], job.params[i], job.parts.own[i]
    if _is_small(job, i):
        own = _moved(job, i)
    elif own:
        # What passes through must be the false branch: the other order copies.
        on = _is_due(job.busiest[i])
        own = lax.cond(on, lambda _: _moved(job, i), _same, own)
    total = _update(job, i)(g, own, job.factors[i], p)
    total = _where(_is_due(job.due[i]), total, _nothing(total))
    return _Progress(total, own, [])


def _late_twice(job: _Job, i: int, ready: jax.Array) -> tuple[_Progress, jax.Array]:
    """The same where there can be two updates; only the first of two is an array.

    Also returns a zero that is known when that is done, for the next leaf to wait for.
    """
    g, p, due = job.grads[i], job.params[i], job.due[i].astype(jnp.int32)
    none = _nothing(g, job.parts.dtype(i))

    def first(own):
        return _update(job, i)(g, own, job.factors[i], p)

    def second(own, before):
        return job.parts.move(i, g, own, job.second[i], _plus(p, before))

    if _is_small(job, i):
        own = _moved(job, i)
        before = _where(due > 1, first(own), none)
        new = second(own, before)
        own = [_where(due > 1, a, b) for a, b in zip(new, own, strict=True)]
    else:
        # XLA copies what does not pass through whole, so the state has a conditional
        # to itself; and that waits for this one, which reads the old state.
        before, due = lax.cond(
            due > 1 + ready,
            lambda *_: (first(_moved(job, i)), due),
            lambda *passed: passed,
            none,
            jnp.minimum(due, 1),
        )
        ready = jnp.minimum(due, 0)

        def both(_):
            new = _moved(job, i)
            return lax.cond(due > 1, lambda own: second(own, before), _same, new)

        own = lax.cond(due > 0, both, _same, job.parts.own[i])
        before = _where(due > 1, before, none)
    total = before + _update(job, i)(g, own, job.final[i], _plus(p, before))
    total = _where(due > 0, _as(total, none), none)
    return _Progress(total, own, []), ready


def _same(x: Any) -> Any:
    return x


def _update(job: _Job, i: int) -> Callable[[Any, list, list, Any], Any]:
    update = job.parts.late_update(i)
    assert update is not None
    return update


def _nothing(like: jax.Array, dtype: Any = None) -> jax.Array:
    """The update of what rests.

    Negative zeros, which change no number they are added to, not even -0.0. That is
    not true of zeros, so that a sum with them would have to be computed.
    """
    dtype = None if dtype == like.dtype else dtype  # None keeps weak types weak
    return lax.neg(lax.full_like(like, 0, dtype))


def _as(x: jax.Array, like: jax.Array) -> jax.Array:
    """In the dtype of another; if that is its own, as weak as it was."""
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def _plus(p: Any, update: jax.Array) -> Any:
    return None if p is None else optax.apply_updates(p, update)


def _moved(job: _Job, i: int) -> list[jax.Array]:
    """The state of a leaf after the first update in this step."""
    g, old = job.grads[i], _welcome_back(job, i)
    new = job.parts.move(i, g, old, job.factors[i], job.params[i])
    if job.whole and not _is_small(job, i):
        return new
    # Of a leaf that rests, what `old` holds may already be that of its return.
    return _select(
        _is_due(job.due[i]), _Progress(g, new, []), _Progress(g, old, [])
    ).own


def _branch(job: _Job, i: int, ready: jax.Array) -> tuple[_Progress, jax.Array]:
    """The updates of a large leaf, and a zero that is known when they are done."""
    total = _nothing(job.grads[i], job.parts.dtype(i))
    due = job.busiest[i].astype(jnp.int32)
    # One leaf after the other: what the update is used for comes in between, and its
    # memory serves for the next. All at once, they would all be in memory.
    total, own, done = lax.cond(
        due > ready,
        lambda *_: (*_more(job, [i], [_first(job, i)])[0][:2], due),
        lambda *passed: passed,
        total,
        job.parts.own[i],
        ready,
    )
    return _Progress(total, own, []), jnp.minimum(done, 0)


def _is_due(number: jax.Array) -> jax.Array:
    return number if number.dtype == jnp.bool else number > 0


def _first(job: _Job, i: int) -> _Progress:
    """The first update of a leaf in this step."""
    g, p = job.grads[i], job.params[i]
    sure = job.whole and g.size > _SMALL
    own = _welcome_back(job, i)
    total, new = job.parts.update(i, g, own, job.factors[i], p)
    start = _Progress(_nothing(total), own, [])
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
    p = _plus(job.params[i], at.total)
    update, own = job.parts.update(i, job.grads[i], at.own, factors, p)
    return _Progress(_as(at.total + update, at.total), own, shared)


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

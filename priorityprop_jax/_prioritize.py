"""`prioritize`: an optimizer in which units rest for real.

The state of the inner optimizer keeps its own structure, with one change: numbers
that all leaves share (Adam's `count`) become vectors with an entry per leaf, because
leaves no longer step together. A leaf is updated by showing the inner optimizer a
tree in which all other leaves are masked out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._checks import check_name
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
from ._units import Layout, layout, split, unstack


RESTING = ("keep", "decay", "reset")
_SHARED, _GLOBAL = -1, -2
# Leaves up to this size are selected together instead of branched on one by one.
_SMALL = 2**14
_FOREVER = 2**31 - 2

_SCHEDULES = (optax.ScaleByScheduleState,)
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


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
        return PrioritizeState(priority, _init_inner(inner, params), rested)

    def step(updates, state, params, extra_args):
        turn, priority = advance(settings, updates, state.priority)
        owners = _owners(inner, updates)
        values = jax.tree.leaves(state.inner)
        job = _Job(
            inner=inner,
            extra_args=extra_args,
            most=_most_in_a_row(settings),
            resting=resting,
            kind=jax.tree.structure(updates),
            owners=owners,
            state_kind=jax.tree.structure(state.inner),
            values=values,
            shared=[
                _entries(x)
                for x, owner in zip(values, owners, strict=True)
                if owner == _SHARED
            ],
            grads=turn.leaves,
            params=_params_leaves(turn.where, turn.leaves, params),
            due=turn.multiplicities,
            rested=None if resting == "keep" else _by_leaf(turn, state.rested),
        )
        out, inner_state = _run(job)
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
            _params_leaves(where, jax.tree.leaves(updates), params)
            priority = count(updates, state.priority)
            updates, inner_state = _run_together(
                inner, updates, state.inner, params, extra_args
            )
            rested = jax.tree.map(jnp.zeros_like, state.rested)
            return updates, PrioritizeState(priority, inner_state, rested)
        if extra_args:
            return step(updates, state, params, extra_args)
        return compiled(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Job(NamedTuple):
    """One call of `update`, taken apart leaf by leaf."""

    inner: optax.GradientTransformationExtraArgs
    extra_args: dict[str, Any]
    most: int | None  # updates of a unit in one step, if known
    resting: str
    kind: Any  # treedef of the updates
    owners: tuple[int, ...]  # of each value: a leaf, or _SHARED, or _GLOBAL
    state_kind: Any  # treedef of the inner state
    values: list[jax.Array]  # leaves of the inner state
    shared: list[list[jax.Array]]  # of each that is shared, the entries of the leaves
    grads: list[jax.Array]
    params: list[jax.Array] | None
    due: list[jax.Array]  # multiplicities, broadcast against the leaf
    rested: list[jax.Array] | None


class _Progress(NamedTuple):
    """How far one leaf has come within the step."""

    total: jax.Array  # sum of the updates so far
    own: list[jax.Array]  # inner state of this leaf alone
    shared: list[jax.Array]  # its entry of what is shared: Adam's count


def _most_in_a_row(settings: Settings) -> int | None:
    high = settings.max_updates
    return -(-high // settings.recalc_every) if isinstance(high, int) else None


def _params_leaves(
    where: Layout, grads: list[jax.Array], params: Any
) -> list[jax.Array] | None:
    if params is None:
        return None
    leaves = [jnp.asarray(p) for p in jax.tree.leaves(params)]
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
    return leaves


def _by_leaf(turn: Turn, rested: Any) -> list[jax.Array]:
    arrays = jax.tree.leaves(rested)
    return arrays if turn.where.axes is None else split(turn.where, arrays[0])


def _rest(rested: jax.Array, given: jax.Array) -> jax.Array:
    return jnp.where(given > 0, 0, jnp.minimum(rested, _FOREVER) + 1)


def _mask(kind: Any, index: int | None, value: Any) -> Any:
    """A tree in which only one leaf, or none, is not masked out."""
    return kind.unflatten(
        value if i == index else optax.MaskedNode() for i in range(kind.num_leaves)
    )


def _owners(inner: optax.GradientTransformation, tree: Any) -> tuple[int, ...]:
    """For each leaf of the inner state the leaf of the params that it belongs to.

    Found by asking which state is there when half of the leaves are masked out, once
    for each binary digit of a leaf's number. Shapes alone, nothing is computed.
    """
    kind = jax.tree.structure(tree)
    shapes = [
        jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))
        for x in jax.tree.leaves(tree)
    ]

    def present(keep: Callable[[int], int]) -> Any:
        masked = [s if keep(i) else optax.MaskedNode() for i, s in enumerate(shapes)]
        return jax.eval_shape(inner.init, kind.unflatten(masked))

    def paths(state: Any) -> list[Any]:
        return [p for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]

    full = present(lambda i: 1)
    always = set(paths(present(lambda i: 0)))
    digits = [
        set(paths(present(lambda i, b=b: i >> b & 1)))
        for b in range((len(shapes) - 1).bit_length())
    ]
    owners = []
    for path, of_step in zip(paths(full), _of_the_step(full), strict=True):
        leaf = sum(1 << b for b, seen in enumerate(digits) if path in seen)
        shared = _GLOBAL if of_step else _SHARED
        owners.append(shared if path in always else leaf)
    return tuple(owners)


def _of_the_step(state: Any) -> list[bool]:
    """Which state counts steps of training: that of schedules, not of leaves."""

    def mark(node):
        if isinstance(node, _INJECTED):
            marked = jax.tree.map(lambda _: True, node._replace(inner_state=()))
            return marked._replace(inner_state=walk(node.inner_state))
        return jax.tree.map(lambda _: isinstance(node, _SCHEDULES), node)

    def walk(tree):
        known = (*_SCHEDULES, *_INJECTED)
        return jax.tree.map(mark, tree, is_leaf=lambda x: isinstance(x, known))

    return jax.tree.leaves(walk(state))


def _init_inner(inner: optax.GradientTransformation, params: optax.Params) -> Any:
    state = inner.init(params)
    n = len(jax.tree.leaves(params))
    values = []
    for x, owner in zip(jax.tree.leaves(state), _owners(inner, params), strict=True):
        if owner == _SHARED:
            x = jnp.broadcast_to(x, (n, *jnp.shape(x)))
        values.append(x if owner == _GLOBAL else lax.convert_element_type(x, x.dtype))
    return jax.tree.unflatten(jax.tree.structure(state), values)


def _run_together(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """`inner` itself, bit for bit, where no leaf ever rests."""
    owners, kind = _owners(inner, updates), jax.tree.structure(state)
    values = jax.tree.leaves(state)
    plain = [
        x[0] if owner == _SHARED else x for x, owner in zip(values, owners, strict=True)
    ]
    updates, state = inner.update(updates, kind.unflatten(plain), params, **extra_args)
    new = [
        jnp.broadcast_to(x, old.shape) if owner == _SHARED else x
        for x, old, owner in zip(jax.tree.leaves(state), values, owners, strict=True)
    ]
    return updates, kind.unflatten(new)


def _run(job: _Job) -> tuple[Any, Any]:
    """All updates of this step, and the inner state after them."""
    small = [i for i, g in enumerate(job.grads) if g.size <= _SMALL]
    large = [[i] for i, g in enumerate(job.grads) if g.size > _SMALL]
    done: dict[int, _Progress] = {}
    for members in [small, *large] if small else large:
        start = [_start(job, i) for i in members]
        # The branch that passes through must be the false one: the other order copies.
        done |= zip(
            members,
            lax.cond(
                _busiest(job, members) > 0,
                functools.partial(_burst, job, members),
                lambda progress: progress,
                start,
            ),
            strict=True,
        )
    out = job.kind.unflatten(done[i].total for i in range(len(done)))
    return out, job.state_kind.unflatten(_collect(job, done))


def _entries(x: jax.Array) -> list[jax.Array]:
    numbers = x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.number)
    return unstack(x) if numbers else [x[i] for i in range(x.shape[0])]


def _start(job: _Job, i: int) -> _Progress:
    own = [x for x, owner in zip(job.values, job.owners, strict=True) if owner == i]
    shared = [entries[i] for entries in job.shared]
    g = job.grads[i]
    dtype = None
    p = None if job.params is None else job.params[i]
    if p is not None and p.dtype != g.dtype:  # the updates may have either type
        fresh = _Progress(g, own, shared)
        dtype = jax.eval_shape(lambda: _call(job, i, g, fresh, p)).total.dtype
    return _Progress(jnp.zeros_like(g, dtype=dtype), own, shared)


def _busiest(job: _Job, members: list[int]) -> jax.Array:
    most = [jnp.max(job.due[i], initial=0) for i in members]
    return functools.reduce(jnp.maximum, most)


def _burst(job: _Job, members: list[int], progress: list[_Progress]):
    """The updates in a row of some leaves, of which at least one is due."""
    alone = len(members) == 1 and job.due[members[0]].ndim == 0
    progress = _welcome_back(job, members, progress)

    def once(j, progress):
        return [
            _update(job, i, at, True if alone else job.due[i] > j)
            for i, at in zip(members, progress, strict=True)
        ]

    if job.most == 1:
        return once(0, progress)
    busiest = _busiest(job, members)
    if job.most is None:
        return lax.fori_loop(0, busiest, once, progress)

    def maybe(j, progress):
        return lax.cond(j < busiest, functools.partial(once, j), lambda x: x, progress)

    # A fixed number of rounds can be differentiated, and XLA:CPU copies less.
    return lax.fori_loop(0, job.most, maybe, progress)


def _update(job: _Job, i: int, at: _Progress, on: Any) -> _Progress:
    """One update of one leaf, kept where `on`."""
    p = None if job.params is None else job.params[i]
    if p is not None and job.most != 1:
        p = optax.apply_updates(p, at.total)
    new = _call(job, i, job.grads[i], at, p)
    new = new._replace(total=(at.total + new.total).astype(at.total.dtype))
    return _select(on, new, at)


def _call(job: _Job, i: int, g: Any, at: _Progress, p: Any) -> _Progress:
    """What the inner optimizer does to leaf `i` alone."""
    own, shared = iter(at.own), iter(at.shared)
    held, values = [], []
    for owner, value in zip(job.owners, job.values, strict=True):
        if owner not in (i, _SHARED, _GLOBAL):
            values.append(optax.MaskedNode())
            continue
        held.append(owner)
        values.append(
            value if owner == _GLOBAL else next(shared if owner == _SHARED else own)
        )
    updates, state = job.inner.update(
        _mask(job.kind, i, g),
        job.state_kind.unflatten(values),
        None if job.params is None else _mask(job.kind, i, p),
        **job.extra_args,
    )
    new = list(zip(jax.tree.leaves(state), held, strict=True))
    return _Progress(
        jax.tree.leaves(updates)[0],
        _cast([x for x, owner in new if owner == i], at.own),
        _cast([x for x, owner in new if owner == _SHARED], at.shared),
    )


def _cast(new: list[Any], old: list[Any]) -> list[jax.Array]:
    return [lax.convert_element_type(x, y.dtype) for x, y in zip(new, old, strict=True)]


def _select(on: Any, new: _Progress, old: _Progress) -> _Progress:
    if on is True:
        return new
    shape = old.total.shape
    some = jnp.any(on)
    return jax.tree.map(
        lambda a, b: jnp.where(on if b.shape == shape else some, a, b), new, old
    )


def _welcome_back(job: _Job, members: list[int], progress: list[_Progress]):
    """Treats the inner state of units that rested as `resting` says."""
    if job.rested is None:
        return progress
    back = {i: jnp.where(job.due[i] > 0, job.rested[i], 0) for i in members}
    if job.resting == "reset":
        return [
            _select(back[i] > 0, _fresh(job, i, at), at)
            for i, at in zip(members, progress, strict=True)
        ]

    def decay(t, progress):
        return [
            _select(back[i] > t, _idle(job, i, at), at)
            for i, at in zip(members, progress, strict=True)
        ]

    longest = [jnp.max(rested, initial=0) for rested in back.values()]
    return lax.fori_loop(0, functools.reduce(jnp.maximum, longest), decay, progress)


def _idle(job: _Job, i: int, at: _Progress) -> _Progress:
    """An update with a zero gradient, of which only the state is kept."""
    p = None if job.params is None else job.params[i]
    return _call(job, i, jnp.zeros_like(job.grads[i]), at, p)._replace(total=at.total)


def _fresh(job: _Job, i: int, at: _Progress) -> _Progress:
    p = jnp.zeros_like(job.grads[i]) if job.params is None else job.params[i]
    state = jax.tree.leaves(job.inner.init(_mask(job.kind, i, p)))
    held = [owner for owner in job.owners if owner in (i, _SHARED, _GLOBAL)]
    new = list(zip(state, held, strict=True))
    return _Progress(
        at.total,
        _cast([x for x, owner in new if owner == i], at.own),
        _cast([x for x, owner in new if owner == _SHARED], at.shared),
    )


def _collect(job: _Job, done: dict[int, _Progress]) -> list[jax.Array]:
    """The leaves of the inner state after the step, in their old places."""
    if not done:
        return job.values
    own = {i: iter(at.own) for i, at in done.items()}
    shared = zip(*(done[i].shared for i in range(len(done))), strict=True)
    of_step = iter(_advance_schedules(job))
    out = []
    for owner in job.owners:
        if owner == _GLOBAL:
            out.append(next(of_step))
        else:
            out.append(
                jnp.stack(next(shared)) if owner == _SHARED else next(own[owner])
            )
    return out


def _advance_schedules(job: _Job) -> list[jax.Array]:
    """What belongs to the step and not to a leaf: one empty update moves it."""
    if _GLOBAL not in job.owners:
        return []
    held = [o for o in job.owners if o in (_SHARED, _GLOBAL)]
    values = [
        optax.MaskedNode() if o >= 0 else x[0] if o == _SHARED else x
        for x, o in zip(job.values, job.owners, strict=True)
    ]
    empty = _mask(job.kind, None, None)
    params = None if job.params is None else empty
    state = job.state_kind.unflatten(values)
    _, state = job.inner.update(empty, state, params, **job.extra_args)
    new = zip(jax.tree.leaves(state), held, strict=True)
    return [x for x, owner in new if owner == _GLOBAL]

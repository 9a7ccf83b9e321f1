"""`prioritize`: an optimizer in which units rest for real.

Each leaf has its own inner state (`_leafwise`); `_bursts` has the updates of a step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._bursts import run
from ._checks import check_name
from ._costs import BackwardCosts
from ._leafwise import init_inner, leafwise, update_together
from ._priority import (
    advance,
    check_settings,
    check_state,
    DepthFactor,
    init_priority,
    PriorityPropState,
    Settings,
)
from ._scores import Score, TAYLOR
from ._units import Layout, layout


RESTING = ("keep", "decay", "reset")
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
    costs: BackwardCosts | None = None,
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
      magnitude: see `priority_prop`. Or ``"taylor"``: what the unit's own step gains,
        :math:`\max(0, -\sum_i g_i u_i)` over its elements, with u what `inner` would
        add to the params in one update (weight decay included). That is the decrease
        of the loss to first order, so that scores are gains per update, and with
        `costs` gains per cost. A step that goes against the gradient, as on momentum,
        gains nothing. Where the learning rate is zero nothing gains, and quotas are
        as for equal scores. Once per cycle this takes one more update of `inner`.
        ElasticTrainer's score (Huang et al., 2023), with the gradient that the step
        was made from; theirs is from a second backward pass, after the step. Add
        ``score="gradient"`` for the gain alone, without counts and depths.
      score: see `priority_prop`.
      depth_factor: see `priority_prop`.
      depth_from: see `priority_prop`.
      depths: see `priority_prop`.
      allocation: see `priority_prop`.
      axis_name: see `priority_prop`.
      seed: see `priority_prop`.
      costs: see `priority_prop`.
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

      The scores are what a step of gradient descent gains, ``rate * sum(g**2)``:

      >>> tx = prioritize(optax.sgd(0.1), 0.5, magnitude="taylor", score="gradient")
      >>> grads = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(1.0)}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> print(state.priority.scores)
      [0.5 0.1]
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
            costs,
        ),
        sees_steps=True,
    )
    check_name("resting", resting, RESTING)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner must be an optax.GradientTransformation, got {inner!r}; for "
            f"example prioritize(optax.adam(1e-3), budget=0.5)"
        )
    inner = optax.with_extra_args_support(inner)
    taylor = settings.magnitude == TAYLOR

    def init_fn(params):
        priority = init_priority(settings, params)
        counts = priority.counts
        rested = () if resting == "keep" else jax.tree.map(jnp.zeros_like, counts)
        return PrioritizeState(priority, init_inner(inner, params), rested)

    def step(updates, state, params, extra_args):
        rested = jax.tree.leaves(state.rested)

        def take_apart(turn):
            known = _check_params(turn.where, turn.leaves, params)
            return leafwise(inner, updates, state.inner, known, extra_args), known

        def first_steps(turn):
            if not turn.leaves:
                return []
            parts, known = take_apart(turn)
            # From the state before and not after it, which is not needed here.
            parts = parts._replace(late_update=lambda _: None)
            return run(parts, turn, known, resting, rested, 1)[0]

        steps = first_steps if taylor else None
        turn, priority = advance(settings, updates, state.priority, steps)
        if not turn.leaves:
            return updates, state._replace(priority=priority)
        parts, params = take_apart(turn)
        most = _most_in_a_row(settings)
        out, inner_state = run(parts, turn, params, resting, rested, most)
        out = jax.tree.unflatten(jax.tree.structure(updates), out)
        rested = jax.tree.unflatten(
            jax.tree.structure(state.rested),
            map(_rest, jax.tree.leaves(state.rested), turn.given),
        )
        return out, PrioritizeState(priority, inner_state, rested)

    # Inlined where the caller compiles; else compiled once, not at every call.
    compiled = jax.jit(functools.partial(step, extra_args={}))

    @jax.jit
    def count(updates, state, steps):
        known = None if steps is None else lambda _: jax.tree.leaves(steps)
        return advance(settings, updates, state, known)[1]

    def update_fn(updates, state, params=None, **extra_args):
        where = layout(updates, settings.units)
        if where.paths and settings.is_full(where.size):
            # Not compiled as a whole: called eagerly, `inner` would round differently.
            check_state(settings, where, state.priority)
            _check_params(where, jax.tree.leaves(updates), params)
            steps, inner_state = update_together(
                inner, updates, state.inner, params, extra_args
            )
            priority = count(updates, state.priority, steps if taylor else None)
            rested = jax.tree.map(jnp.zeros_like, state.rested)
            return steps, PrioritizeState(priority, inner_state, rested)
        if extra_args:
            return step(updates, state, params, extra_args)
        return compiled(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _most_in_a_row(settings: Settings) -> int | None:
    """Updates of a unit in one step, if known."""
    if settings.costs is not None:
        return 1
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

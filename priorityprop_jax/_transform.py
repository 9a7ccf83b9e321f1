"""`priority_prop`: scale each unit's update by how often it is due; `active`: who is.

The rule is in `_priority`; this file is the optax transformation around it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._costs import BackwardCosts
from ._priority import (
    advance,
    check_settings,
    DepthFactor,
    find_state,
    init_priority,
    largest_quotas,
    Settings,
)
from ._scores import Score


def priority_prop(
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
) -> optax.GradientTransformationExtraArgs:
    r"""Spend a fixed budget of updates on the parameters with the highest priority.

    A cycle is `recalc_every` calls of `update`. At the first, each unit (by default
    each array of the params) is given a score

    .. math::
      s_u = \frac{|g_u| \cdot depth_u}{1 + count_u}

    and the budget is handed out as integer quotas in proportion to the scores (see
    `allocate`), which `schedule` spreads over the cycle: unit u is due :math:`m_u(r)`
    updates at step r. This transformation multiplies its incoming update by that.

    What this means depends on the place in the chain:

    * before Adam, ``optax.chain(priority_prop(...), optax.adam(1e-3))``: Adam sees a
      zero gradient where a unit rests, still moves on its momentum, and is blind to
      a constant factor;
    * after Adam, ``optax.chain(optax.adam(1e-3), priority_prop(...))``: whole steps of
      Adam are multiplied, which is what "m updates" means to first order. Scores are
      then made from Adam's steps, which differ little between units.

    For units that truly rest, with optimizer state that rests with them, use
    `prioritize`.

    Args:
      budget: updates to hand out per cycle. An integer is their number; a float in
        (0, 1] the share of updating every unit at every step; a callable is a
        schedule of the step, evaluated at the start of each cycle. With `costs` a
        share of the cost of full training.
      min_updates: least number of updates of a unit in a cycle. Dropped, with a
        warning, where the budget does not suffice.
      max_updates: largest number of updates of a unit in a cycle. What then remains
        stays unspent, with a warning. More than `recalc_every` means several in one
        step.
      recalc_every: steps in a cycle. Static.
      units: ``"leaf"``, ``"element"`` (each scalar), or a pytree (or prefix) of tuples
        of axes to keep, see `unit_axes`. Static.
      magnitude: ``"l2"``, ``"l1"``, ``"mean"``, ``"rms"`` or ``"max"`` of a unit's
        gradient. (``"taylor"`` needs the steps of the optimizer, which `prioritize`
        sees.)
      score: a `Score`, or ``"priority"``, ``"gradient"`` (no counts, no depth),
        ``"uniform"``, ``"random"``, ``"cyclic"``, ``"ucb"``.
      depth_factor: a number b means ``1 + b * depth / max(depth)``; or a
        `DepthFactor`, or a pytree of factors.
      depth_from: ``"loss"`` or ``"input"``, where depth is 0.
      depths: pytree of ints from `infer_depths`. By default the natural order of the
        names of the modules: ``Dense_2`` is nearer to the input than ``Dense_10``.
      allocation: ``"argsort"`` or ``"bisect"``: the same quotas, the latter without
        a sort, and for element units without moving any leaf.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the axis over which magnitudes
        are averaged, so that every replica decides alike.
      seed: for ``score="random"``.
      costs: from `backward_costs`, makes the budget one of cost: the steps of a cycle
        together cost at most ``budget * recalc_every * costs.full``, with forward
        passes, the chain down to the active leaves, and the first step of the cycle,
        which trains everything. Within that, quotas are chosen for a large sum of
        scores times quotas: depths of truncation are compared, each filled by score
        per cost. For up to 12 leaves the result is at least as good as the best of
        all sets of leaves, if one set were trained in all the other steps. A quota
        is at most `recalc_every`; `min_updates` is a number of full steps;
        `allocation` is not used; the state's `budget` is the sum of the quotas.
        Needs ``units="leaf"``. The costs come true where the gradients are from
        `value_and_grad` with ``active=``.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PriorityPropState`. A unit
      whose gradient is not finite at the first step of a cycle sits that step out and
      gets the minimum in this cycle; `priority_report` counts such gradients.

    Raises:
      ValueError, TypeError: an argument cannot be meant; in `init` and `update`, a
        leaf has no gradient to speak of, or a tree does not match the params.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from priorityprop_jax import priority_prop
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(1.0)}
      >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 0.1 * p["b"] ** 2
      >>> tx = optax.chain(priority_prop(budget=10, max_updates=9), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(params), state)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(state, "quotas"))
      [9 1]
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
        )
    )

    def init_fn(params):
        return init_priority(settings, params)

    @jax.jit  # inlined where the caller compiles; otherwise compiled once, not per call
    def scale(updates, state):
        turn, state = advance(settings, updates, state)
        scaled = map(_times, turn.leaves, turn.by_leaf(turn.given))
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return scale(updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times(g: jax.Array, m: jax.Array) -> jax.Array:
    """``m * g``, zero where m is, also if g is not finite; type and weakness of g.

    A negative zero, as adding one changes nothing: behind an optimizer XLA can see that
    a resting parameter need not be written.
    """
    return jnp.where(m > 0, g * lax.convert_element_type(m, int), -0.0)


def active(
    opt_state: optax.OptState,
    params: optax.Params,
    index: int | None = None,
    units: Any = None,
) -> Any:
    """Which leaves the next call of `update` will use.

    Before the first step of a cycle that is all of them: that step's gradients are
    what the next quotas are made from.

    Args:
      opt_state: the state of any chain or wrapper with one `priority_prop` or
        `prioritize` in it; may be traced.
      params: the pytree that `init` was given. Only its structure is used.
      index: which `PriorityPropState`, where there are several.
      units: what the transformation was given as `units`, for a bool per row: leaves
        with units along the first axis, such as layers stacked for a `jax.lax.scan`,
        then get a vector of bools. `params` must then be arrays, or their shapes.

    Returns:
      A pytree of bool scalars in the structure of `params`: whether any unit of the
      leaf (or row) has an update due.

    Raises:
      ValueError: `opt_state` holds no `PriorityPropState`, or several and no `index`
        was given, or one for another number of leaves or units.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import active, prioritize
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> tx = prioritize(optax.sgd(0.1), budget=6, max_updates=5, recalc_every=5)
      >>> state = tx.init(params)
      >>> _, state = tx.update({"a": jnp.ones(2), "b": jnp.zeros(3)}, state, params)
      >>> active(state, params)
      {'a': Array(True, dtype=bool), 'b': Array(False, dtype=bool)}
    """
    state = find_state(opt_state, params, index)
    r = state.step % state.rank.size
    # A unit is due at step r iff its quota is larger than the rank of r: see schedule.
    least = jnp.where(r == 0, -1, state.rank[r])
    used = [most > least for most in largest_quotas(state, params, units)]
    return jax.tree.unflatten(jax.tree.structure(params), used)

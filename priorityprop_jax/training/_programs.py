"""The programs of a training step: pure functions of params, state and batch."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from .._gradients import value_and_grad
from .._masks import StaticMask
from .._prioritize import PrioritizeState
from .._priority import find_state, largest_quotas, PriorityPropState
from .._transform import active


# States of which it is known that a call of `update` is one for what they hold, too.
# Others (`optax.MultiSteps`, `optax.apply_if_finite`) may hold it back.
_IN_STEP = (
    PrioritizeState,
    optax.MaskedState,
    optax.transforms.PartitionState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)
_CONTAINERS = (tuple, list, dict, OrderedDict)


class Metrics(NamedTuple):
    """What a training step reports.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import make_train_step, prioritize
      >>> tx = prioritize(optax.sgd(0.1), budget=0.5)
      >>> params = {"w": jnp.ones(3)}
      >>> step = make_train_step(lambda p, x: jnp.sum(p["w"] * x), tx)
      >>> params, state, metrics = step(params, tx.init(params), 2.0)
      >>> print(metrics.loss, metrics.aux, metrics.due)
      6.0 None [ True]
    """

    loss: jax.Array  # before the update; shape=()
    aux: Any  # what `loss_fn` returned next to it; None without has_aux
    # Which leaves were due, or any row of them; shape=(leaves,), dtype=bool. On the
    # host in static mode, on the device in dynamic mode.
    due: Any = None


class Variant(NamedTuple):
    """One of the compiled programs of a `TrainStep`."""

    mask: StaticMask  # the leaves whose gradients are computed
    kind: str  # "first" of a cycle, "exact", or "prefix": more leaves than are due


class Recipe(NamedTuple):
    """What all programs of a training step share."""

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    has_aux: bool
    index: int | None
    units: Any
    skip_nonfinite: bool


class Place(NamedTuple):
    """Where the schedule is: positions among the leaves of the optimizer state."""

    step: int
    rank: int
    quotas: tuple[int, ...]
    alone: bool  # whether it is the only one
    holder: str | None  # the type of a state that may hold it back


def _gradients(
    recipe: Recipe, mask: Any, params: Any, batch: tuple, kwargs: dict
) -> tuple[Metrics, Any]:
    of = value_and_grad(recipe.loss_fn, has_aux=recipe.has_aux)
    value, gradients = of(params, *batch, active=mask, **kwargs)
    if isinstance(mask, StaticMask):
        # Constants get merged into loops that read old and write new state of a leaf
        # in an order for which XLA then copies the old.
        hide = lambda on, g: lax.optimization_barrier(g) if on is False else g
        gradients = jax.tree.map(hide, mask.tree, gradients)
    loss, aux = value if recipe.has_aux else (value, None)
    return Metrics(loss, aux), gradients


def _update(
    recipe: Recipe, metrics: Metrics, gradients: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """The new params and the new state. The loss goes to those who ask for `value`."""
    tx = optax.with_extra_args_support(recipe.tx)

    def update(gradients, opt_state, params):
        updates, state = tx.update(gradients, opt_state, params, value=metrics.loss)
        return optax.apply_updates(params, updates), state

    if not recipe.skip_nonfinite:
        return update(gradients, opt_state, params)
    holder = find_place(opt_state, params, recipe.index).holder
    # A selection for each array would cost copies: new params come from new moments.
    return lax.cond(
        jnp.all(jnp.isfinite(metrics.loss)),
        update,
        lambda _, state, params: (params, state if holder else _pass_over(state)),
        gradients,
        opt_state,
        params,
    )


def _pass_over(opt_state: Any) -> Any:
    """Of a step that changes nothing: only the schedule goes on.

    The host knows the plan of a cycle beforehand, so it must not be held up. If the
    very first step is lost, each unit gets a quota of one, as there have to be quotas.
    """

    def next_step(x):
        if not _is_ours(x):
            return x
        one = lambda q: jnp.where(x.step == 0, jnp.ones_like(q), q)
        units = min(sum(q.size for q in jax.tree.leaves(x.quotas)), 2**31 - 1)
        return x._replace(
            step=optax.safe_increment(x.step),
            quotas=jax.tree.map(one, x.quotas),
            budget=jnp.where(x.step == 0, jnp.full_like(x.budget, units), x.budget),
        )

    return jax.tree.map(next_step, opt_state, is_leaf=_is_ours)


def dynamic_step(recipe: Recipe, params, opt_state, *batch, **kwargs):
    """Any step."""
    due = active(opt_state, params, recipe.index, recipe.units)
    metrics, gradients = _gradients(recipe, due, params, batch, kwargs)
    params, opt_state = _update(recipe, metrics, gradients, opt_state, params)
    by_leaf = [jnp.any(x) for x in jax.tree.leaves(due)]
    vector = jnp.stack(by_leaf) if by_leaf else jnp.zeros(0, bool)
    return params, opt_state, metrics._replace(due=vector)


def first_step(recipe: Recipe, params, opt_state, *batch, **kwargs):
    """The first step of a cycle.

    Returns a summary of the new state, too, unless the cycle is over with it.
    """
    metrics, gradients = _gradients(recipe, None, params, batch, kwargs)
    params, opt_state = _update(recipe, metrics, gradients, opt_state, params)
    if find_state(opt_state, params, recipe.index).rank.size == 1:
        return params, opt_state, metrics
    return params, opt_state, metrics, summarize(recipe, opt_state, params)


def later_step(recipe: Recipe, variant: Variant, params, opt_state, *batch, **kwargs):
    """Any other step of a cycle, in which no leaf outside of the mask is due."""
    metrics, gradients = _gradients(recipe, variant.mask, params, batch, kwargs)
    if variant.kind == "prefix":
        # What stands in front of the schedule in a chain must not see more gradients
        # than with an exact mask.
        due = active(opt_state, params, recipe.index, recipe.units)
        gradients = jax.tree.map(_zero_unless, due, gradients)
    place = find_place(opt_state, params, recipe.index)
    shown = _mid_cycle(place, opt_state)
    new_params, new_state = _update(recipe, metrics, gradients, shown, params)
    new_state = _restore(place, new_state, opt_state)
    if variant.kind == "exact" and place.alone:
        return *_unmoved(
            variant.mask, new_params, new_state, params, opt_state
        ), metrics
    return new_params, new_state, metrics


def _zero_unless(on: jax.Array, g: jax.Array) -> jax.Array:
    on = on.reshape(on.shape + (1,) * (g.ndim - on.ndim))
    return jnp.where(on, g, jnp.zeros_like(g))


def _mid_cycle(place: Place, opt_state: Any) -> Any:
    """The state with a step that XLA can see is not the first of a cycle.

    So that it drops the program for new quotas, of which there would be one in each
    variant. Each step gets the rank of the present one, hence the same units are due.
    """
    if place.holder is not None:
        return opt_state
    leaves, treedef = jax.tree.flatten(opt_state)
    step, rank = leaves[place.step], leaves[place.rank]
    leaves[place.step] = jnp.int32(1)
    leaves[place.rank] = jnp.broadcast_to(rank[step % rank.size], rank.shape)
    return treedef.unflatten(leaves)


def _restore(place: Place, new_state: Any, opt_state: Any) -> Any:
    """Undoes `_mid_cycle` after the update."""
    if place.holder is not None:
        return new_state
    old, treedef = jax.tree.flatten(opt_state)
    leaves = jax.tree.leaves(new_state)
    leaves[place.step] = optax.safe_increment(old[place.step])
    leaves[place.rank] = old[place.rank]
    return treedef.unflatten(leaves)


def _unmoved(
    mask: StaticMask, new_params: Any, new_state: Any, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """The same values, in a way that XLA can see that those at rest have not moved.

    A leaf at rest under `prioritize` keeps its value (where nothing comes after in a
    chain) and its part of the inner state.
    """
    choose = lambda on, new, old: old if on is False else new
    is_ours = lambda x: isinstance(x, PrioritizeState)
    last = opt_state
    while type(last) is tuple and last:
        last = last[-1]
    if is_ours(last):
        new_params = jax.tree.map(choose, mask.tree, new_params, params)
    shapes = jax.tree.map(jnp.shape, params)

    def like_params(x):
        same = jax.tree.structure(x) == mask.treedef
        return same and jax.tree.map(jnp.shape, x) == shapes

    def merge(new, old):
        whole = like_params(new) and mask.treedef != jax.tree.structure(0)
        return jax.tree.map(choose, mask.tree, new, old) if whole else new

    def inner(new, old):
        if not is_ours(new):
            return new
        kept = jax.tree.map(merge, new.inner, old.inner, is_leaf=like_params)
        return new._replace(inner=kept)

    return new_params, jax.tree.map(inner, new_state, opt_state, is_leaf=is_ours)


def summarize(recipe: Recipe, opt_state: Any, params: Any) -> jax.Array:
    """The step, the rank of each step of a cycle, and the largest quotas.

    Of each leaf or, for those with units by row, of each row. A unit is due at step r
    of the cycle iff its quota is larger than ``rank[r]``.
    """
    state = find_state(opt_state, params, recipe.index)
    most = largest_quotas(state, params, recipe.units)
    return jnp.concatenate([state.step[None], state.rank, *map(jnp.ravel, most)])


def _is_ours(x: Any) -> bool:
    return isinstance(x, PriorityPropState)


def _ours(tree: Any) -> list[PriorityPropState]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_ours) if _is_ours(x)]


def find_place(opt_state: Any, params: Any, index: int | None) -> Place:
    leaves, treedef = jax.tree.flatten(opt_state)
    for state in _ours(opt_state):
        if shape := np.shape(jax.tree.leaves(state.step)[0]):
            raise ValueError(
                f"the step in opt_state must be a scalar, got shape {shape}: for a "
                f"stack of states make a step with mode='dynamic' and map that"
            )
    find_state(opt_state, params, index)  # raises if there is none to speak of
    found = _ours(treedef.unflatten(range(len(leaves))))
    place = found[index or 0]
    (step,), (rank,) = jax.tree.leaves(place.step), jax.tree.leaves(place.rank)
    quotas = tuple(jax.tree.leaves(place.quotas))
    target, holder, node = _ours(opt_state)[index or 0], None, opt_state
    while node is not target:
        if type(node) not in _CONTAINERS and not isinstance(node, _IN_STEP):
            holder = type(node).__name__
        below = jax.tree.leaves(node, is_leaf=lambda x, node=node: x is not node)
        node = next(x for x in below if any(y is target for y in _ours(x)))
    return Place(step, rank, quotas, len(found) == 1, holder)

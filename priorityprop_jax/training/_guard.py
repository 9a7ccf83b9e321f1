"""`guard`: a step whose loss is not finite changes nothing.

Nothing but the schedule's count of steps: the plan of a cycle, which the host knows
beforehand in static mode, goes on as if the step had been taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._prioritize import PrioritizeState
from .._priority import PriorityPropState


_SMALL = 1024  # numbers, of which a selection costs next to nothing


class GuardState(NamedTuple):
    """The state of `guard`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax.training import guard
      >>> print(guard(optax.sgd(0.1)).init(jnp.ones(3)).skipped)
      0
    """

    inner: Any  # the state of the transformation inside
    skipped: jax.Array  # steps whose loss was not finite; shape=(), dtype=int32


def guard(
    tx: optax.GradientTransformation, rests: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Leaves params and optimizer alone where the loss is not finite.

    At such a step updates are zero and the state stays as it was: moments, counts,
    scores and quotas. Only the step of a `priority_prop` or `prioritize` inside goes
    on. A first step of a cycle that is lost this way leaves the quotas of the cycle
    before; the very first one, before which there are none, leaves each unit one
    update (or without `rests` what gradients as they are make of it).

    It looks at the loss and not at gradients, and belongs around all other
    transformations. It costs a selection for each array of the state.

    Args:
      tx: an optax transformation.
      rests: whether at a bad step a `prioritize` inside is just told that nothing is
        due, which costs nothing. Not for one with a full budget, which does not ask
        what is due.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `GuardState`. Its `update` needs
      the keyword argument ``value``, the loss, which `make_train_step` gives to it.

    Raises:
      TypeError: `tx` is no transformation; in `update`, no ``value``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax.training import guard
      >>> tx = guard(optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> bad = jnp.array([jnp.nan, 1.0])
      >>> updates, state = tx.update(bad, state, params, value=jnp.nan)
      >>> print(params + updates, state.skipped)
      [1. 1.] 1
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"tx must be an optax.GradientTransformation, got {tx!r}")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return GuardState(tx.init(params), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        if "value" not in extra_args:
            raise TypeError(
                "guard needs the loss: tx.update(grads, state, params, value=loss)"
            )
        ok, old = jnp.all(jnp.isfinite(extra_args["value"])), state.inner
        told = rests and all(s.priority.rank.size > 1 for s in _found(old))
        shown = _map_ours(lambda s: _nothing_due(ok, s), old) if told else old
        updates, new = tx.update(updates, shown, params, **extra_args)
        # Negative zeros, as adding one changes nothing, in no bit.
        updates = jax.tree.map(lambda u: jnp.where(ok, u, -jnp.zeros_like(u)), updates)
        choose = lambda new, old: _choose(ok, told, new, old)
        inner = jax.tree.map(choose, new, old, is_leaf=_is_special)
        skipped = state.skipped + (~ok).astype(jnp.int32)
        return updates, GuardState(inner, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_ours(x: Any) -> bool:
    return isinstance(x, PrioritizeState)


def _is_special(x: Any) -> bool:
    return isinstance(x, PrioritizeState | PriorityPropState)


def _found(state: Any) -> list[PrioritizeState]:
    return [x for x in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(x)]


def _map_ours(function: Callable[[PrioritizeState], Any], state: Any) -> Any:
    apply = lambda x: function(x) if _is_ours(x) else x
    return jax.tree.map(apply, state, is_leaf=_is_ours)


def _nothing_due(ok: jax.Array, state: PrioritizeState) -> PrioritizeState:
    """In a bad step: in the middle of a cycle without quotas."""
    priority = state.priority
    none = jax.tree.map(lambda q: jnp.where(ok, q, jnp.zeros_like(q)), priority.quotas)
    step = jnp.where(ok, priority.step, jnp.ones_like(priority.step))
    return state._replace(priority=priority._replace(step=step, quotas=none))


def _choose(ok: jax.Array, told: bool, new: Any, old: Any) -> Any:
    """The new state, or the old but for the step of a schedule."""
    if isinstance(new, PrioritizeState) and told:
        return PrioritizeState(
            _after_nothing_due(ok, new.priority, old.priority),
            # What is large has rested. Small numbers may be those of all leaves.
            jax.tree.map(
                lambda a, b: _select(ok, a, b) if a.size <= _SMALL else a,
                new.inner,
                old.inner,
            ),
            _select(ok, new.rested, old.rested),
        )
    if isinstance(new, PrioritizeState):
        priority = _choose(ok, told, new.priority, old.priority)
        rest = _select(ok, (new.inner, new.rested), (old.inner, old.rested))
        return PrioritizeState(priority, *rest)
    if isinstance(new, PriorityPropState):
        first = ok | (old.step == 0)  # there have to be quotas
        return _select(ok, new, old)._replace(
            step=new.step,
            quotas=_select(first, new.quotas, old.quotas),
            budget=_select(first, new.budget, old.budget),
        )
    return _select(ok, new, old)


def _after_nothing_due(
    ok: jax.Array, new: PriorityPropState, old: PriorityPropState
) -> PriorityPropState:
    one = lambda q: jnp.where(old.step == 0, jnp.ones_like(q), q)
    return new._replace(
        step=optax.safe_increment(old.step),
        quotas=_select(ok, new.quotas, jax.tree.map(one, old.quotas)),
    )


def _select(ok: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

"""From the arguments of a trainer to an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_name
from .._costs import backward_costs, BackwardCosts
from .._depth import infer_depths
from .._prioritize import prioritize
from .._priority import find_state, PriorityPropState
from .._transform import priority_prop


COSTS = ("flops", "ms")
_RUNS = 5  # of each program, where costs are measured


class ScheduleArguments(NamedTuple):
    """What a trainer was told about who is to be updated how often."""

    optimizer: optax.GradientTransformation
    total_budget: Any  # None: everything at every step
    min_updates: Any
    max_updates: Any
    recalc_every: int
    transformation: str
    units: Any
    magnitude: str
    score: Any
    depth_factor: Any
    depths: Any  # "auto", None (by name) or a pytree
    resting: str
    costs: Any  # None, "flops", "ms" or BackwardCosts
    seed: int

    def check(self) -> None:
        """Raises where an argument cannot be meant, before there is a batch."""
        check_name("transformation", self.transformation, ("prioritize", "chain"))
        if isinstance(self.depths, str):
            check_name("depths", self.depths, ("auto",))
        if isinstance(self.costs, str):
            check_name("costs", self.costs, COSTS)
        elif not (self.costs is None or isinstance(self.costs, BackwardCosts)):
            raise TypeError(
                f"costs must be None, 'flops', 'ms' or what backward_costs returned, "
                f"got {self.costs!r}"
            )
        named = isinstance(self.costs, str)
        if (
            named
            and not isinstance(self.total_budget, float)
            and not callable(self.total_budget)
        ):
            raise ValueError(
                f"with costs={self.costs!r} total_budget is a share of the cost of "
                f"full training, such as 0.5, got {self.total_budget!r}"
            )
        self.build(None, None if named else self.costs)

    def build(self, depths: Any, costs: Any) -> optax.GradientTransformation:
        """The transformation.

        Args:
          depths: pytree of ints, or None for those by name.
          costs: `BackwardCosts` or None.
        """
        if not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation such as "
                f"optax.adam(1e-3), got {self.optimizer!r}"
            )
        given = depths if isinstance(self.depths, str) else self.depths
        budget, least, most = self.total_budget, self.min_updates, self.max_updates
        recalc_every, magnitude = self.recalc_every, self.magnitude
        if budget is None:  # nobody competes: each step can be a cycle
            budget, least, most, recalc_every, costs = 1.0, 1, 1, 1, None
            magnitude = "l2"
        arguments: dict[str, Any] = dict(
            budget=budget,
            min_updates=least,
            max_updates=most,
            recalc_every=recalc_every,
            units=self.units,
            magnitude=magnitude,
            score=self.score,
            depth_factor=self.depth_factor,
            depths=given,
            seed=self.seed,
            costs=costs,
        )
        if self.total_budget is None:
            return everything(priority_prop(**arguments), self.optimizer)
        if self.transformation == "chain":
            return optax.chain(priority_prop(**arguments), self.optimizer)
        return prioritize(self.optimizer, resting=self.resting, **arguments)

    def look(
        self, loss: Callable[..., Any], example: tuple, given: bool
    ) -> tuple[Any, BackwardCosts, BackwardCosts | None]:
        """Reads off a first batch what the transformation is to know.

        Args:
          loss: ``loss(params, *rest) -> (loss, aux)``.
          example: its arguments.
          given: whether the transformation is there already.

        Returns:
          Depths, or None; costs in FLOPs; the costs that the budget is in, or None.
        """
        flops = backward_costs(loss, *example, has_aux=True)
        if given:
            return None, flops, None
        depths, costs = None, self.costs
        if isinstance(self.depths, str):
            depths = infer_depths(lambda *args: loss(*args)[0], *example)
        if costs == "ms":
            costs = backward_costs(loss, *example, has_aux=True, measure=_RUNS)
        elif costs == "flops":
            costs = flops
        assert not isinstance(costs, str)
        return depths, flops, costs


def everything(
    schedule: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The optimizer alone, with the state of a schedule in which all are always due.

    Nobody competes: no gradient is measured, all scores are 0, and the quotas are there
    from the start.
    """
    tx = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        plan: Any = schedule.init(params)
        due = plan.rank.size
        units = sum(q.size for q in jax.tree.leaves(plan.quotas))
        plan = plan._replace(
            quotas=jax.tree.map(lambda q: jnp.full_like(q, due), plan.quotas),
            budget=jnp.full_like(plan.budget, min(units * due, 2**31 - 1)),
        )
        return plan, tx.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        plan, inner = state
        updates, inner = tx.update(updates, inner, params, **extra_args)
        plan = plan._replace(
            step=optax.safe_increment(plan.step),
            counts=jax.tree.map(optax.safe_increment, plan.counts),
        )
        return updates, (plan, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def holds_schedule(tx: Any, params: Any) -> bool:
    """Whether there is a `priority_prop` or a `prioritize` in it already."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        return False
    is_ours = lambda x: isinstance(x, PriorityPropState)
    shapes = jax.eval_shape(tx.init, params)
    return any(map(is_ours, jax.tree.leaves(shapes, is_leaf=is_ours)))


def by_leaf_on_device(opt_state: Any, params: Any) -> Any:
    """A compiled function of the optimizer state: counts, quotas, scores by leaf.

    Returns:
      ``opt_state -> (counts, quotas, scores)``, each of shape=(leaves,): sums over the
      units of a leaf, of the scores the mean. Sums of more units than leaves are
      float32, as they may be more than an int32 holds.
    """
    sizes = np.asarray(jax.device_get(find_state(opt_state, params).sizes))
    n, units = sizes.size, int(sizes.sum())
    leaf = np.repeat(np.arange(n), sizes)
    stand_in = [0] * n  # find_state looks at the number of leaves alone

    def sums(statistic, dtype):
        arrays = jax.tree.leaves(statistic)
        if len(arrays) == n and (n > 1 or arrays[0].size == units):
            return jnp.stack([jnp.sum(x.astype(dtype)) for x in arrays])
        return jax.ops.segment_sum(arrays[0].astype(dtype), leaf, n)

    def snapshot(opt_state):
        state = find_state(opt_state, stand_in)
        dtype = jnp.int32 if units == n else jnp.float32
        scores = sums(state.scores, jnp.float32) / np.maximum(sizes, 1)
        return sums(state.counts, dtype), sums(state.quotas, dtype), scores

    return jax.jit(snapshot)

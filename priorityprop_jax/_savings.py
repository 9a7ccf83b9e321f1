"""What a budget saved: the costs of full training, and of the leaves that were due.

A step with the active leaves S costs ``costs.flops(S)``. So an account of the masks of
all steps gives the exact sum, split into weight gradients that were left out and pieces
of the chain that were cut off. Pure functions on vectors over the leaves.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._costs import BackwardCosts
from ._masks import StaticMask


_UNCUT = 0.9  # of the chain at every step: then it is never cut to speak of


@dataclasses.dataclass(frozen=True)
class Savings:
    """What training cost, next to training all leaves at every step.

    Attributes:
      unit: of all costs, ``"flops"`` or ``"ms"``, as in `BackwardCosts`.
      steps: how many the totals are about.
      exact: whether they are sums over the masks of all steps; else they are an
        estimate from the counts of the units.
      full: cost of training all leaves at every step.
      spent: cost of what was due.
      by_resting: share of `full` saved by weight gradients that were not computed.
      by_truncation: share of `full` saved where the chain was cut.
      by_caching: share of `full` saved in the forward pass.
      traffic_full: bytes of optimizer traffic if all leaves moved at every step.
      traffic_spent: bytes, less those of resting leaves if their optimizer rests too.
      cycle: this cycle's cost as a share of full training's; None before the first.
      bound: the speed-up at most, if of what runs at every step of this cycle all else
        was left out: the forward pass, leaves that never rest, the chain down to them.
      notes: plain sentences on choices that make savings impossible.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import backward_costs, prioritize, priority_report
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"])
      >>> params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}, jnp.ones((5, 3))
      >>> state = prioritize(optax.sgd(0.1), budget=0.5).init(params)
      >>> costs = backward_costs(loss, params, x)
      >>> priority_report(state, params, costs=costs).savings.spent
      0.0
    """

    unit: str
    steps: int
    exact: bool
    full: float
    spent: float
    by_resting: float
    by_truncation: float
    by_caching: float
    traffic_full: float
    traffic_spent: float
    cycle: float | None
    bound: float
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """How many times as much full training would have cost."""
        return self.full / self.spent if self.spent else 1.0

    def __str__(self) -> str:
        unit = "FLOPs" if self.unit == "flops" else self.unit
        how = "" if self.exact else ", estimated from the counts"
        share = self.spent / self.full if self.full else 1.0
        kept = self.traffic_spent / self.traffic_full if self.traffic_full else 1.0
        lines = [
            f"full training {self.full:.3g} {unit} in {self.steps:,} steps, spent "
            f"{self.spent:.3g} ({share:.1%}, {self.speedup:.2f}x){how}",
            f"saved by resting weights {self.by_resting:.1%}, by cutting the chain "
            f"{self.by_truncation:.1%}, by caching {self.by_caching:.1%}",
            f"optimizer traffic {self.traffic_spent:.3g} bytes, {kept:.1%} of full",
        ]
        if self.cycle is not None:
            lines.append(
                f"this cycle {self.cycle:.1%} of full training; at most "
                f"{self.bound:.2f}x for its selection"
            )
        return "\n".join([*lines, *self.notes])


def cycle_masks(quotas: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Which leaves are due at each step of a cycle: all at the first.

    Args:
      quotas: largest quota of a unit of each leaf; shape=(leaves,).
      rank: order of the steps, as in the state; shape=(recalc_every,).

    Returns:
      shape=(recalc_every, leaves), dtype=bool.

    Examples:
      >>> import numpy as np
      >>> from priorityprop_jax._savings import cycle_masks
      >>> cycle_masks(np.array([1, 2]), np.array([0, 2, 1])).astype(int).tolist()
      [[1, 1], [0, 0], [0, 1]]
    """
    due = quotas[None] > rank[:, None]
    return due | (np.arange(rank.size) == 0)[:, None]


def account_masks(
    account: Mapping[Any, int], leaves: int
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of an account and their numbers of steps, as arrays.

    Args:
      account: steps by mask: a `StaticMask` or a tuple with a bool for each leaf. A
        leaf with a vector of bools is active where any of them is.
      leaves: how many the masks have.

    Returns:
      Masks, shape=(masks, leaves), dtype=bool; and steps, shape=(masks,).

    Raises:
      TypeError: a key is no mask, or a value no count.
      ValueError: a mask is for another number of leaves, or a count is negative.
    """
    masks, steps = [np.zeros((0, leaves), bool)], []
    for mask, count in account.items():
        bools = mask.leaves if isinstance(mask, StaticMask) else mask
        if not isinstance(bools, tuple):
            raise TypeError(
                "the keys of account must be what static_mask returns, or tuples of "
                f"bools, got {mask!r}"
            )
        if len(bools) != leaves:
            raise ValueError(
                f"a mask in account has {len(bools)} leaves, the params have {leaves}"
            )
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise TypeError(f"account must count steps in integers, got {count!r}")
        if count < 0:
            raise ValueError(f"account must count steps from 0 on, got {count!r}")
        masks.append(np.array([[bool(np.any(x)) for x in bools]]).reshape(1, leaves))
        steps.append(int(count))
    return np.concatenate(masks), np.array(steps, np.int64)


def savings_of(
    costs: BackwardCosts,
    counts: np.ndarray,
    quotas: np.ndarray,
    rank: np.ndarray,
    step: int,
    *,
    optimizer_rests: bool,
    account: Mapping[Any, int] | None = None,
    cached: float = 0.0,
) -> Savings:
    """The savings account, see `priority_report`.

    Args:
      costs: of the leaves.
      counts: most updates of a unit of each leaf so far; shape=(leaves,).
      quotas: largest quota of a unit of each leaf in this cycle; shape=(leaves,).
      rank: order of the steps, as in the state; shape=(recalc_every,).
      step: steps so far.
      optimizer_rests: whether the optimizer's work is left out for resting leaves.
      account: steps by mask, if known.
      cached: cost of the forward pass that a cache saved so far.

    Returns:
      The `Savings`.

    Raises:
      ValueError: costs for other params, a bad account, or more cached than computed.
      TypeError: an account that is none.
    """
    n = len(costs.paths)
    if n != counts.size:
        raise ValueError(
            f"costs are those of {n} leaves, but the params have {counts.size}"
        )
    if account is not None:
        masks, times = account_masks(account, n)
        steps = int(times.sum())
        runs = times @ masks  # steps in which a leaf was active
        reached = times @ _reached(costs, masks)
    else:
        # Nested as within a cycle, with the first step of each in full.
        steps, cycles = step, math.ceil(step / rank.size)
        runs = np.clip(counts, cycles, step)
        reached = np.max(costs.members * runs, axis=1, initial=0)
    full = steps * costs.full
    if not 0 <= cached <= steps * costs.forward:
        raise ValueError(
            "cached must be between 0 and the cost of all forward passes, "
            f"{steps * costs.forward:.3g}, got {cached!r}"
        )
    rested = float(costs.weight @ (steps - runs))
    cut = float(costs.groups @ (steps - reached))
    traffic = float(costs.traffic.sum()) * steps
    idle = float(costs.traffic @ (steps - runs)) if optimizer_rests else 0.0
    share, bound, notes = _of_cycle(costs, quotas, rank, step)
    if account is not None and steps != step:
        notes = (f"The account has {steps:,} of {step:,} steps.", *notes)
    if not optimizer_rests:
        notes += (
            "priority_prop only scales updates: the optimizer works for resting leaves "
            "too; prioritize(optimizer, ...) lets it rest.",
        )
    part = lambda saved: saved / full if full else 0.0
    return Savings(
        unit=costs.unit,
        steps=steps,
        exact=account is not None,
        full=full,
        spent=full - rested - cut - cached,
        by_resting=part(rested),
        by_truncation=part(cut),
        by_caching=part(cached),
        traffic_full=traffic,
        traffic_spent=traffic - idle,
        cycle=share,
        bound=bound,
        notes=notes,
    )


def _reached(costs: BackwardCosts, masks: np.ndarray) -> np.ndarray:
    """Which pieces of the chain each mask runs, (masks, groups)."""
    return (masks.astype(int) @ costs.members.T.astype(int)) > 0


def _of_cycle(
    costs: BackwardCosts, quotas: np.ndarray, rank: np.ndarray, step: int
) -> tuple[float | None, float, tuple[str, ...]]:
    """This cycle's share of full training, the bound of its selection, and notes."""
    length, full = rank.size, costs.full
    at_most = lambda least: full / least if least else 1.0
    if not step or not costs.paths:  # nothing has been handed out yet
        return None, at_most(costs.forward), ()
    if length == 1:
        note = "Every step is the first of a cycle and computes all: nothing is saved."
        return 1.0, 1.0, (note,)
    masks = cycle_masks(quotas, rank)
    share = sum(map(costs.flops, masks)) / (length * full) if full else 1.0
    always = np.all(masks[1:], axis=0)
    uncut = np.all(_reached(costs, masks[1:]), axis=0)
    chain = float(costs.groups[uncut].sum())
    least = costs.forward + float(costs.weight[always].sum()) + chain
    bound = length * full / (full + (length - 1) * least) if full else 1.0
    if always.all():
        return share, bound, ("All leaves are active at every step: nothing is saved.",)
    if not chain or chain < _UNCUT * costs.groups.sum():
        return share, bound, ()
    # The leaf to blame, if a single one is.
    lowest = int(np.argmax(np.where(always, costs.chain, -1)))
    if always[lowest] and costs.chain[lowest] >= _UNCUT * costs.groups.sum():
        most = at_most(costs.flops(np.arange(always.size) == lowest))
        who = f"{costs.paths[lowest]} is active at every step"
    else:
        most = at_most(costs.forward + chain)
        who = "Some leaf far from the loss is active at every step"
    return share, bound, (f"{who}: the chain is never cut; at most {most:.1f}x.",)


def leaf_maxima(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The largest entry for each leaf, 0 where there is none."""
    return np.array([np.max(x, initial=0) for x in arrays], np.int64)

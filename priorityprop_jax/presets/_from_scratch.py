"""`from_scratch`: layers far from the loss are annealed early, and then rest."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_count, check_finite
from .._costs import BackwardCosts
from .._prioritize import PrioritizeState
from .._selection import check_paths
from .._transform import priority_prop
from .._units import layout, unstack
from ..training._schedules import everything


NEVER = 2**31 - 1  # later than any step
# Leaves whose chains differ by less than this share of a full step are one layer.
_SAME_LAYER = 0.01


class Preset(NamedTuple):
    """What a preset chose.

    Attributes:
      tx: the transformation, for `make_train_step` or `PriorityPropTrainer`.
      reason: why, in a sentence.
      saving: predicted share of the cost of full training that is saved; 0.0 where the
        guard chose full training.
      until: leaf -> the step from which on it rests; None: it never does.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import backward_costs, presets
      >>> loss = lambda p, x: jnp.sum((x @ p["in"] @ p["out"]) ** 2)
      >>> params = {"in": jnp.ones((8, 8)), "out": jnp.ones((8, 1))}
      >>> costs = backward_costs(loss, params, jnp.ones((16, 8)))
      >>> preset = presets.from_scratch(optax.adam, 1e-3, 1000, costs, epochs=10)
      >>> preset.until
      {"params['in']": 700, "params['out']": None}
    """

    tx: optax.GradientTransformationExtraArgs
    reason: str
    saving: float
    until: dict[str, int | None]


def from_scratch(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    steps: int,
    costs: BackwardCosts,
    epochs: float,
    *,
    start: float = 0.7,
    boost: float = 1.0,
    cycle: int | None = None,
    least_saving: float = 0.05,
    least_epochs: float = 10.0,
) -> Preset:
    r"""Late freezing: layers far from the loss are annealed early, and then rest.

    FreezeOut with a late start. Layers are numbered from the one farthest from the
    loss, l = 0 .. L - 1; layer l is trained until

    .. math::
      t_l = T \left(start + (1 - start) \frac{l}{L - 1}\right)

    with the learning rate :math:`boost \cdot s(t \, T / t_l)`: the schedule s of the
    whole run, faster. From then on it does not move, and neither its gradient nor the
    chain down to it is computed. The last layer has s itself, and never rests.

    The guard: what this saves of forward and backward passes is predicted from `costs`,
    the first step of each cycle, which computes all gradients, included. If it is less
    than `least_saving`, or the run shorter than `least_epochs`, the preset is the
    optimizer with s, and nothing rests.

    .. warning::
      A step never computes more than a full one; but that a target is reached in as
      many steps is not guaranteed, but for the fallback. On MNIST (an MLP
      784-512-512-10, Adam with learning rate and horizon tuned, 1 to 5 epochs) all of
      the 12 % saved was lost again: next to plain Adam in a run of equal cost, this had
      0.92x to 1.00x of the speed to equal accuracy (standard error 0.04), and 0.85x
      with ``boost=1.4`` in one epoch. At 10 epochs the two were equal (2 seeds). Hence
      `least_epochs`. In longer runs, too, training losses near the lowest that plain
      Adam gets to take more than what is saved, or are not reached. A shorter run of
      plain Adam is the first thing to try.

    Args:
      optimizer: makes an optax transformation of a learning rate: `optax.adam`, or
        ``functools.partial(optax.adamw, weight_decay=0.1)``. Its updates must be
        proportional to the learning rate, as those of nearly all of them are: it is
        made with 1.0 where layers have rates of their own.
      learning_rate: at the start, from which it falls linearly to zero at `steps`; or a
        schedule s of the step, over `steps`.
      steps: T, the length of the run.
      costs: of the params to be trained, by `backward_costs`: FLOPs, or (with
        ``measure=``) milliseconds.
      epochs: how often the run goes through its data:
        ``steps * batch_size / examples``; 1 for a stream, whose data never come twice.
      start: when the first layer comes to rest, in (0, 1], as a share of `steps`. 1.0:
        nothing rests.
      boost: factor of the learning rate of a layer that is to rest.
      cycle: steps in a cycle, at whose beginning layers come to rest; the masks of a
        cycle are known beforehand. None: a 20th of `steps`, at most 100.
      least_saving: of the guard, as a share of the cost of full training, in [0, 1).
      least_epochs: of the guard: in shorter runs each layer needs all of its updates.

    Returns:
      A `Preset`. Its `tx` holds a `PriorityPropState`.

    Raises:
      TypeError, ValueError: an argument cannot be meant; in ``tx.init``, the costs are
        those of other params.

    References:
      Brock et al., `FreezeOut: Accelerate Training by Progressively Freezing Layers
      <https://arxiv.org/abs/1706.04983>`_, 2017 (there `start` is 0.5 to 0.8, and
      `boost` 1 or T / t_l).

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import backward_costs, make_train_step, presets
      >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - x) ** 2)
      >>> params = {"in": jnp.full((8, 4), 0.1), "out": jnp.full((4, 8), 0.1)}
      >>> costs = backward_costs(loss, params, jnp.eye(8))
      >>> preset = presets.from_scratch(optax.adam, 1e-2, 100, costs, epochs=100)
      >>> step, state = make_train_step(loss, preset.tx), preset.tx.init(params)
      >>> for _ in range(100):
      ...     params, state, metrics = step(params, state, jnp.eye(8))
      >>> print(metrics.due, preset.until["params['in']"])
      [False  True] 70
      >>> print(preset.reason)
      1 of 2 layers come to rest, the first at step 70 of 100: saves 9.2% of all FLOPs
    """
    schedule = _check(optimizer, learning_rate, steps, costs)
    _check_interval("start", start, "(0, 1]")
    _check_interval("least_saving", least_saving, "[0, 1)")
    _check_interval("boost", boost, "(0, inf)")
    _check_interval("least_epochs", least_epochs, "[0, inf)")
    if isinstance(epochs, bool) or not isinstance(epochs, int | float):
        raise TypeError(f"epochs must be a number, got {epochs!r}")
    if not epochs > 0:
        raise ValueError(f"epochs must be positive, got {epochs!r}")
    if cycle is None:
        cycle = min(100, max(1, steps // 20))
    check_count("cycle", cycle, least=1, static=True)
    layers = layers_of(costs)
    ends = _ends(layers, start, steps, cycle)
    saving = saving_of(costs, ends, steps, cycle)
    unit = "FLOPs" if costs.unit == "flops" else "milliseconds"
    found = (
        f"{len(set(layers[ends < NEVER]))} of {layers.max(initial=-1) + 1} layers come "
        f"to rest, the first at step {ends.min(initial=NEVER)} of {steps}: saves "
        f"{saving:.1%} of all {unit}"
    )
    if not (ends < NEVER).any():
        return _in_full(optimizer(schedule), costs, "full training: no layer can rest")
    if epochs < least_epochs:
        reason = (
            f"full training: {epochs:.3g} epochs are fewer than {least_epochs:.3g}, "
            f"and in short runs each layer needs all of its updates"
        )
        return _in_full(optimizer(schedule), costs, reason)
    if saving < least_saving:
        reason = f"full training: {found}, less than {least_saving:.1%}"
        return _in_full(optimizer(schedule), costs, reason)
    rates = _rates(schedule, ends, steps, boost)
    tx = resting_from(optax.chain(optimizer(1.0), rates), ends, cycle, costs)
    until = [None if end == NEVER else int(end) for end in ends]
    return Preset(tx, found, saving, dict(zip(costs.paths, until, strict=True)))


def _check(
    optimizer: Any, learning_rate: Any, steps: Any, costs: Any
) -> Callable[..., Any]:
    """Raises where an argument cannot be meant; returns the schedule of the run."""
    if hasattr(optimizer, "update") or not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function of a learning rate, such as optax.adam "
            f"(not optax.adam(1e-3)), got {optimizer!r}"
        )
    check_count("steps", steps, least=1, static=True)
    if not isinstance(costs, BackwardCosts):
        raise TypeError(
            f"costs must be what backward_costs(loss, params, *batch) returned, got "
            f"{type(costs).__name__}"
        )
    if callable(learning_rate):
        return learning_rate
    check_finite("learning_rate", learning_rate)
    if float(learning_rate) <= 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
    return optax.linear_schedule(learning_rate, 0.0, steps)


def _check_interval(argument: str, value: Any, allowed: str) -> None:
    """Raises unless it is a number in an interval such as ``(0, 1]``."""
    check_finite(argument, value)
    low, high = map(float, allowed[1:-1].split(","))
    ends = {low} if allowed[0] == "[" else {high} if allowed[-1] == "]" else set()
    if not (low < value < high or value in ends):
        raise ValueError(f"{argument} must be in {allowed}, got {value!r}")


# --- What presets are made of.


def layers_of(costs: BackwardCosts) -> np.ndarray:
    """The layer of each leaf, numbered from the one farthest from the loss.

    By the cost of the chain down to them: what is computed with the same chain lies in
    one layer, and so does what adds next to nothing to it.

    Args:
      costs: of the leaves.

    Returns:
      shape=(leaves,), dtype=int64.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import backward_costs
      >>> loss = lambda p, x: jnp.sum((x @ p["in"] + p["bias"][None]) @ p["out"])
      >>> w = jnp.ones((8, 8))
      >>> params = {"bias": jnp.ones(8), "in": w, "out": w}
      >>> layers_of(backward_costs(loss, params, jnp.ones((16, 8)))).tolist()
      [0, 0, 1]
    """
    chain = costs.chain
    order = np.argsort(-chain, kind="stable")
    layer = np.zeros(chain.size, np.int64)
    for before, leaf in itertools.pairwise(order):
        new = chain[before] - chain[leaf] > _SAME_LAYER * costs.full
        layer[leaf] = layer[before] + new
    return layer


def _ends(layers: np.ndarray, start: float, steps: int, cycle: int) -> np.ndarray:
    """For each leaf the step from which on it rests, a multiple of `cycle`."""
    last = layers.max(initial=0)
    share = start + (1 - start) * layers / max(last, 1)
    ends = np.rint(share * steps / cycle).astype(np.int64) * cycle
    ends = np.maximum(ends, cycle)
    # What has no time to rest in never does.
    return np.where((layers == last) | (ends >= steps), NEVER, ends)


def saving_of(costs: BackwardCosts, ends: np.ndarray, steps: int, cycle: int) -> float:
    """The share of the cost of full training that resting saves.

    The first step of each cycle is a full one.

    Args:
      costs: of the leaves.
      ends: for each leaf the step from which on it rests, a multiple of `cycle`;
        shape=(leaves,).
      steps: length of the run.
      cycle: steps in a cycle.

    Returns:
      The share, in [0, 1).

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax import backward_costs
      >>> loss = lambda w, x: jnp.sum(x @ w[0] @ w[1])
      >>> costs = backward_costs(loss, [jnp.ones((8, 8))] * 2, jnp.ones((16, 8)))
      >>> round(saving_of(costs, np.array([10, 100]), steps=20, cycle=10), 3)
      0.178
    """
    if not costs.full:
        return 0.0
    spent, bounds = 0.0, sorted({0, steps, *(int(e) for e in ends if e < steps)})
    for a, b in itertools.pairwise(bounds):
        firsts = math.ceil((b - a) / cycle)
        spent += firsts * costs.full + (b - a - firsts) * costs.flops(ends > a)
    return 1.0 - spent / (steps * costs.full)


def _rates(
    schedule: Callable[..., Any], ends: np.ndarray, steps: int, boost: float
) -> optax.GradientTransformation:
    """Multiplies the updates of each leaf by its own learning rate."""

    def rate(end, count):
        return (
            schedule(count) if end == NEVER else boost * schedule(count * steps / end)
        )

    def update_fn(updates, state, params=None):
        del params
        known = {int(end): rate(int(end), state.count) for end in set(ends)}
        leaves, treedef = jax.tree.flatten(updates)
        scaled = [
            jnp.asarray(known[int(end)], g.dtype) * g
            for end, g in zip(ends, leaves, strict=True)
        ]
        count = optax.safe_increment(state.count)
        return treedef.unflatten(scaled), optax.ScaleByScheduleState(count)

    def init_fn(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    return optax.GradientTransformation(init_fn, update_fn)


def resting_from(
    inner: optax.GradientTransformation,
    ends: np.ndarray,
    cycle: int,
    costs: BackwardCosts,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer in which leaves rest from given steps on, for good.

    A leaf that rests does not move; its gradient is zero to `inner`, whose work for it
    `make_train_step` leaves out. As nobody competes, no gradient is measured, and while
    all are due, this is `inner` alone.

    Args:
      inner: an optax transformation. It may couple leaves.
      ends: for each leaf the step from which on it rests, a multiple of `cycle`;
        shape=(leaves,).
      cycle: steps in a cycle.
      costs: of the leaves, whose names are compared with those of the params.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PrioritizeState`.

    Raises:
      ValueError: in `init`, `costs` are those of other params.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from priorityprop_jax import backward_costs
      >>> loss = lambda p, x: jnp.sum(p["a"] * p["b"] * x)
      >>> params = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
      >>> costs = backward_costs(loss, params, 1.0)
      >>> tx = resting_from(optax.sgd(1.0), np.array([1, 9]), 1, costs)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"a": 1.0, "b": 1.0}, state, params)
      >>> print(updates["a"], updates["b"], state.priority.counts)
      -0.0 -1.0 [1 3]
    """
    tx = optax.with_extra_args_support(inner)
    schedule = priority_prop(1.0, cycle, cycle, recalc_every=cycle)
    last = np.minimum(ends, NEVER).astype(np.int32)
    rests = last < NEVER
    table: Any = costs  # of which the paths are looked at

    def init_fn(params):
        paths = layout(params, "leaf").paths
        if paths:  # optax looks up the state's structure without any
            check_paths(table, paths)
        plan: Any = schedule.init(params)
        quotas = jnp.full_like(plan.quotas, cycle)
        plan = plan._replace(quotas=quotas, budget=jnp.sum(quotas, dtype=jnp.int32))
        return PrioritizeState(plan, tx.init(params), ())

    def at_rest(plan, updates, zero):
        """Zeros for leaves that rest; what never rests is not asked."""
        leaves, treedef = jax.tree.flatten(updates)
        on = unstack(plan.quotas > 0)
        kept = zip(rests, on, leaves, strict=True)
        out = [jnp.where(d, g, jnp.full_like(g, zero)) if r else g for r, d, g in kept]
        return treedef.unflatten(out)

    def update_fn(updates, state, params=None, **extra_args):
        plan = state.priority
        # Later in a cycle the quotas know; `make_train_step` hides the step there.
        first = plan.step % cycle == 0
        due = jnp.where(plan.step < last, jnp.int32(cycle), 0)
        quotas = jnp.where(first, due, plan.quotas)
        budget = jnp.where(first, jnp.sum(due, dtype=jnp.int32), plan.budget)
        plan = plan._replace(quotas=quotas, budget=budget)
        updates = at_rest(plan, updates, 0.0)
        updates, inner_state = tx.update(updates, state.inner, params, **extra_args)
        # Adding a negative zero changes no number, not even -0.0.
        updates = at_rest(plan, updates, -0.0)
        given = jnp.minimum(jnp.minimum(plan.quotas, 1), NEVER - plan.counts)
        step = optax.safe_increment(plan.step)
        plan = plan._replace(step=step, counts=plan.counts + given)
        return updates, PrioritizeState(plan, inner_state, ())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_full(
    optimizer: optax.GradientTransformation, costs: BackwardCosts, reason: str
) -> Preset:
    """The optimizer alone: a single program, all leaves at every step."""
    tx = everything(priority_prop(1.0, 1, 1, recalc_every=1), optimizer)
    return Preset(tx, reason, 0.0, dict.fromkeys(costs.paths))

"""`finetune`: first layers that promise little rest, and what they compute is kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_count, check_finite
from .._costs import backward_costs
from .._depth import infer_depths
from .._masks import leaf_masks, static_mask, StaticMask
from .._scores import gains as gains_of
from ..training import CachedPrefix


class FineTuneState(NamedTuple):
    """The state of a `FineTune` run: a pytree, for checkpoints.

    Attributes:
      step: steps so far; a Python int.
      gains: decrease of the loss that each leaf promised so far; shape=(leaves,).
      inner: the optimizer's state, of active leaves only once others rest.
      start: the params before the first step, until it is decided who rests; then None.
    """

    step: int
    gains: Any
    inner: Any
    start: Any


class _Plan(NamedTuple):
    """What is done from the decision on."""

    active: StaticMask
    cache: CachedPrefix | None
    speedup: float
    reason: str
    update: Callable[..., Any]


class FineTune:
    """What `finetune` returns: the two functions of a loop, and what was decided.

    For one run at a time.

    Attributes:
      plan: None before the decision; then a NamedTuple with ``active``, a `StaticMask`
        of the leaves that are trained; ``cache``, a `CachedPrefix` or None;
        ``speedup``, predicted for all steps after the decision; and ``reason``, a
        sentence.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax.presets import finetune
      >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - x) ** 2)
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 3))}
      >>> tuning = finetune(loss, optax.adam(0.1), params, jnp.eye(3), steps=9, probe=1)
      >>> state = tuning.init(params)
      >>> for _ in range(9):
      ...     params, state, value = tuning.step(params, state, None, jnp.eye(3))
      >>> print(tuning.plan.reason)
      all leaves are trained: the first, params['in'], promises ...
    """

    def __init__(
        self,
        loss: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        params: Any,
        batch: Sequence[Any],
        settings: "_Settings",
    ):
        self.plan: _Plan | None = None
        self._loss, self._settings = loss, settings
        self._optimizer = optax.with_extra_args_support(optimizer)
        self._costs = backward_costs(
            loss,
            params,
            *batch,
            measure=settings.measure,
            optimizer=optimizer if settings.measure else None,
        )
        self._depths = jax.tree.leaves(infer_depths(loss, params, *batch))
        self._treedef = jax.tree.structure(params)
        # What the plan is made from: a run resumed from a checkpoint makes it anew.
        self._decided: bytes | None = None
        # Batches of the probe, which no cache has seen.
        self._seen: list[tuple[Any, tuple[Any, ...]]] = []
        self._probe = _update(self._loss, self._optimizer, watch=True)

    def init(self, params: optax.Params) -> FineTuneState:
        """The state before the first step."""
        gains = jnp.zeros(self._treedef.num_leaves, jnp.float32)
        start = jax.tree.map(jnp.copy, params) if self._settings.probe else None
        return FineTuneState(0, gains, self._optimizer.init(params), start)

    def step(
        self, params: optax.Params, state: FineTuneState, ids: Any, *batch: Any
    ) -> tuple[Any, FineTuneState, jax.Array]:
        """One step: the new params, the new state, and the loss before the update.

        Params that are active, and the state, are given up to the step, which reuses
        their memory. Runs on the host: not under `jax.jit`.

        Args:
          params: pytree of arrays.
          state: a `FineTuneState`.
          ids: integers, shape (batch,), in ``[0, num_examples)``: which examples these
            are. Without `num_examples` it may be None.
          *batch: the other arguments of the loss.
        """
        probe = self._settings.probe
        nobody = self._treedef.unflatten([None] * self._treedef.num_leaves)
        if state.step < probe:
            args = params, nobody, state.inner, *batch
            params, inner, value, new = self._probe(*args)
            if self._settings.num_examples is not None:
                self._seen.append((ids, batch))
            gains = state.gains + new
            state = FineTuneState(state.step + 1, gains, inner, state.start)
            return params, state, value
        gains = np.asarray(state.gains)
        if self.plan is None or self._decided != gains.tobytes():
            self.plan = self._decide(gains, params, batch)
            self._decided = gains.tobytes()
        plan, inner = self.plan, state.inner
        if all(plan.active.leaves):
            self._seen.clear()
            params, inner, value, _ = plan.update(params, nobody, inner, *batch)
            return params, FineTuneState(state.step + 1, gains, inner, None), value
        active, resting = _parts(params, plan.active)
        if state.start is not None:
            resting = _parts(state.start, plan.active)[1]  # as they were pretrained
            params = _join(active, resting)
        if state.step == probe:
            inner = _prune(self._optimizer, inner, plan.active)
            # Else they would be missing one by one in later batches, of which each
            # computes a whole batch of the prefix for one that is missing.
            if plan.cache is not None:
                for old_ids, old in self._seen:
                    plan.cache(params, old_ids, *old)
            self._seen.clear()
        if plan.cache is not None:
            batch = plan.cache(params, ids, *batch), *batch
        active, inner, value, _ = plan.update(active, resting, inner, *batch)
        params = _join(active, resting)
        return params, FineTuneState(state.step + 1, gains, inner, None), value

    def _decide(self, gains: np.ndarray, params: Any, batch: Sequence[Any]) -> _Plan:
        settings, costs = self._settings, self._costs
        full = lambda why: self._plan(
            np.ones(len(gains), bool), None, 1.0, f"all leaves are trained: {why}"
        )
        depths = np.array(self._depths)
        share = shares(gains, depths)
        if settings.active is None:
            mask = promising(share, depths, settings.most_lost)
        else:
            mask = np.array(settings.active)
        if mask.all():
            if settings.active is not None:
                return full("as asked for")
            first = depths == depths.max()
            return full(
                f"the first, {costs.paths[int(first.argmax())]}, promises "
                f"{share[first].sum():.0%} of the gain (most_lost="
                f"{settings.most_lost:.0%})"
            )
        cache, cost, how = self._cache(mask, params, batch)
        speedup, lost = costs.full / cost, float(share[~mask].sum())
        resting = [p for p, on in zip(costs.paths, mask, strict=True) if not on]
        names = resting[0] if len(resting) == 1 else f"{len(resting)} leaves"
        known = settings.active is None
        if cost > (1 - settings.least_saving) * (1 - lost * known) * costs.full:
            promise = f"promises {1 - lost:.0%} of the gain and " if known else ""
            return full(
                f"a step without {names} {promise}is predicted to cost "
                f"{cost / costs.full:.0%} of a full one (least_saving="
                f"{settings.least_saving:.0%})"
            )
        promised = f" which promise {lost:.0%} of the gain," if known else ""
        reason = (
            f"{len(resting)} of {len(mask)} leaves rest,{promised} {how}: a step is "
            f"predicted to cost {cost / costs.full:.0%} of a full one"
        )
        return self._plan(mask, cache, speedup, reason)

    def _plan(
        self, mask: np.ndarray, cache: CachedPrefix | None, speedup: float, reason: str
    ) -> _Plan:
        loss = self._loss if cache is None else cache.loss
        update = _update(loss, self._optimizer)
        active = static_mask(self._treedef.unflatten(mask.tolist()))
        return _Plan(active, cache, speedup, reason, update)

    def _cache(
        self, mask: np.ndarray, params: Any, batch: Sequence[Any]
    ) -> tuple[CachedPrefix | None, float, str]:
        """The cache, if there can be one; the cost of a step; and how."""
        settings, costs = self._settings, self._costs
        alone = costs.flops(mask)
        examples = settings.num_examples
        if examples is None:
            return None, alone, "without a cache"
        active = self._treedef.unflatten(mask.tolist())
        make = functools.partial(
            CachedPrefix,
            self._loss,
            params,
            active,
            *batch,
            in_axes=settings.in_axes,
            limit_bytes=settings.limit_bytes,
        )
        try:
            trial = make(num_examples=(size := _size(batch, settings.in_axes)))
            cache = make(num_examples=examples)
        except ValueError as error:
            return None, alone, f"without a cache ({error})"
        features = trial(params, np.arange(size), *batch)
        cached = backward_costs(
            trial.loss, params, features, *batch, measure=settings.measure
        )
        # At the first pass over the data the prefix is computed as well.
        steps = max(settings.steps - settings.probe, 1)
        computed = min(1.0, examples / (steps * size))
        saved = (costs.forward - cached.forward) * (1 - computed)
        return cache, alone - max(saved, 0.0), "and are cached"


class _Settings(NamedTuple):
    steps: int
    num_examples: int | None
    active: tuple[bool, ...] | None
    probe: int
    most_lost: float
    least_saving: float
    measure: int
    limit_bytes: int | None
    in_axes: Any


def finetune(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    *batch: Any,
    steps: int,
    num_examples: int | None = None,
    active: Any = None,
    probe: int = 5,
    most_lost: float = 0.28,
    least_saving: float = 0.2,
    measure: int = 0,
    limit_bytes: int | None = 2**31,
    in_axes: int | None | Sequence[Any] = 0,
) -> FineTune:
    r"""Fine-tunes without the first layers, if the new task needs them as they are.

    The first `probe` steps are those of the optimizer alone. Meanwhile it is added up
    what each leaf promises: the first-order estimate of the decrease of the loss by its
    own update (the score of ElasticTrainer; with Adam and little noise, about the
    learning rate times the sum of absolute gradients):

    .. math::
      gain_l = \max(0, -\sum g_l \cdot u_l), \quad u = optimizer(g)

    Then leaves rest for good, from the input on (by `infer_depths`): as many as
    together hold at most `most_lost` of these gains, the last layer left out. They get
    back the values that they were pretrained to (of which `FineTuneState` keeps a copy
    until then). Neither their gradients nor the chain below the lowest active layer is
    computed, the optimizer drops its state for them, and given `num_examples`, what
    they make of an example is computed once and kept.

    **The guard.** Resting must pay: a step that holds the share a of the gains must be
    predicted to cost less than ``(1 - least_saving) a`` of the full one, averaged over
    the run. Else nothing rests, and the run is that of the plain optimizer, step for
    step. That what is left to train gets as far as all would is a guess from the gains
    of the first steps. Both numbers were set by two small workloads, and by a few small
    nets to which resting that saved a fifth of a step did more harm than good.

    Args:
      loss: ``loss(params, *batch)``, a scalar, the mean over examples.
      optimizer: any optax transformation. Once leaves rest it sees None in their place,
        so a global norm is one of active leaves.
      params: pretrained, pytree of floating arrays, with the new head in place.
      *batch: an example of the other arguments; ``jax.ShapeDtypeStruct`` will do
        without `measure`.
      steps: how many will be taken, to know what a cache is worth.
      num_examples: how many examples there are, with ids in ``[0, num_examples)``.
        None: without a cache, as where the data are augmented.
      active: pytree of bools, the leaves to train from the first step on, in the
        structure of `params` or a prefix of it; then nothing is probed. The guard holds
        all the same.
      probe: steps before the decision.
      most_lost: share of these gains that resting leaves may hold, in [0, 1).
      least_saving: share of the cost of a step, in [0, 1).
      measure: if positive, costs are milliseconds on this device, the optimizer's work
        included, from as many runs each (see `backward_costs`); else FLOPs.
      limit_bytes: of features in memory; with more, there is no cache.
      in_axes: as for `CachedPrefix`.

    Returns:
      A `FineTune`, with ``init`` and ``step``.

    Raises:
      ValueError, TypeError: an argument cannot be meant, or `active` has no True.

    References:
      Huang et al., `ElasticTrainer
      <https://dl.acm.org/doi/10.1145/3581791.3596852>`_, 2023; Liu et al., `AutoFreeze
      <https://arxiv.org/abs/2102.01386>`_, 2021 (frozen prefixes, cached).

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from priorityprop_jax.presets import finetune
      >>> def loss(params, x, y):
      ...     for w in params["body"]:
      ...         x = jnp.tanh(x @ w)
      ...     return jnp.mean((x @ params["head"] - y) ** 2)
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> body = [jax.random.normal(k, (16, 16)) / 4 for k in keys]
      >>> params = {"body": body, "head": jnp.zeros((16, 1))}
      >>> x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
      >>> y, active = x[:, :1], {"body": [False, False, False, True], "head": True}
      >>> tuning = finetune(
      ...     loss, optax.adam(1e-2), params, x[:8], y[:8],
      ...     steps=80, num_examples=64, active=active,
      ... )
      >>> state = tuning.init(params)
      >>> for i in range(80):
      ...     ids = np.arange(8 * i, 8 * i + 8) % 64
      ...     params, state, value = tuning.step(params, state, ids, x[ids], y[ids])
      >>> print(tuning.plan.reason)
      3 of 5 leaves rest, and are cached: a step is predicted to cost ...% of a full one
      >>> tuning.plan.cache.stats.hits, tuning.plan.cache.stats.misses
      (576, 64)
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function, got {loss!r}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {optimizer!r}"
        )
    check_count("steps", steps, least=1, static=True)
    check_count("probe", probe, least=0, static=True)
    if num_examples is not None:
        check_count("num_examples", num_examples, least=1, static=True)
    for name, share in (("most_lost", most_lost), ("least_saving", least_saving)):
        check_finite(name, share)
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be in [0, 1), got {share!r}")
    mask = None
    if active is not None:
        mask, probe = tuple(bool(np.any(m)) for m in leaf_masks(active, params)), 0
        if not any(mask):
            raise ValueError("active: no leaf is, so there is nothing to train")
    elif not probe:
        raise ValueError("probe=0: then the leaves to train must be given as active")
    settings = _Settings(
        int(steps),
        num_examples,
        mask,
        int(probe),
        most_lost,
        least_saving,
        measure,
        limit_bytes,
        in_axes,
    )
    return FineTune(loss, optimizer, params, batch, settings)


def shares(gains: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """What each leaf promises, as a share of what all below the last layer do.

    The last layer is new, and always trained: what it promises says nothing of others.

    Args:
      gains: of each leaf, none negative; shape=(leaves,).
      depths: of each leaf, 0 at the loss; shape=(leaves,).

    Returns:
      shape=(leaves,), 0 in the last layer. Where nothing promises anything, nothing is
      known, and each leaf holds all.

    Examples:
      >>> import numpy as np
      >>> shares(np.array([1.0, 3.0, 9.0]), depths=np.array([2, 1, 0])).tolist()
      [0.25, 0.75, 0.0]
    """
    below = depths > depths.min(initial=0)
    total = gains[below].sum()
    return np.where(below, gains / total if total else 1.0, 0.0)


def promising(shares: np.ndarray, depths: np.ndarray, most_lost: float) -> np.ndarray:
    """The leaves to train: all but the farthest from the loss that promise little.

    Args:
      shares: of each leaf; shape=(leaves,).
      depths: of each leaf, 0 at the loss; shape=(leaves,).
      most_lost: what the others may hold together.

    Returns:
      shape=(leaves,), dtype=bool. True for all leaves at the least depth.

    Examples:
      >>> import numpy as np
      >>> shares, depths = np.array([0.1, 0.1, 0.8, 0.0]), np.array([3, 2, 1, 0])
      >>> promising(shares, depths, most_lost=0.3)
      array([False, False,  True,  True])
    """
    active = np.ones(len(shares), bool)
    for depth in np.unique(depths)[:0:-1]:
        if shares[depths >= depth].sum() > most_lost:
            break
        active = depths < depth
    return active


def _update(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformationExtraArgs,
    watch: bool = False,
) -> Callable[..., Any]:
    """A jitted step on the active part; with `watch`, what each leaf gains as well."""

    def update(active, resting, state, *batch):
        of_active = lambda part: loss(_join(part, resting), *batch)
        value, gradients = jax.value_and_grad(of_active)(active)
        updates, state = optimizer.update(gradients, state, active, value=value)
        new = optax.apply_updates(active, updates)
        sides = jax.tree.leaves(gradients), jax.tree.leaves(updates)
        gained = None
        if watch:
            gained = jnp.nan_to_num(gains_of(*sides, [()] * len(sides[0])))
        return new, state, value, gained

    return jax.jit(update, donate_argnums=(0, 2))


def _parts(params: Any, active: StaticMask) -> tuple[Any, Any]:
    """The params that are active, and those that rest; None where they are not."""
    choose = lambda on: jax.tree.map(lambda a, p: p if a is on else None, tree, params)
    tree = active.tree
    return choose(True), choose(False)


def _join(active: Any, resting: Any) -> Any:
    missing = lambda x: x is None
    either = lambda a, r: r if a is None else a
    return jax.tree.map(either, active, resting, is_leaf=missing)


def _prune(
    optimizer: optax.GradientTransformation, state: Any, active: StaticMask
) -> Any:
    """The optimizer's state without what belongs to resting leaves."""
    keep = lambda x, on: x if on else None
    return optax.tree.map_params(optimizer, keep, state, active.tree)


def _size(batch: Sequence[Any], in_axes: Any) -> int:
    """The number of examples in a batch."""
    axes = in_axes if isinstance(in_axes, tuple | list) else [in_axes] * len(batch)
    for axis, argument in zip(axes, batch, strict=True):
        if axis is not None and (leaves := jax.tree.leaves(argument)):
            return np.shape(leaves[0])[axis]
    raise ValueError("the loss needs an argument per example: all in_axes are None")

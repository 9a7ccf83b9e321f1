"""`make_train_step`: loss, gradients of what is due, and update, as one function.

Two ways to leave out the work of what rests. **Static**: a compiled program for each
mask; the host reads the quotas once per cycle, and since these determine all masks of
the cycle, it knows which program comes next without asking the device again.
**Dynamic**: one program for all masks, which decides on the device.
"""

import collections
import functools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
import optax

from .._checks import check_count, check_name
from .._depth import infer_depths
from .._masks import StaticMask
from .._units import layout
from ._programs import (
    dynamic_step,
    find_place,
    first_step,
    later_step,
    Metrics,
    Place,
    Recipe,
    summarize,
    Variant,
)


MODES = ("auto", "static", "dynamic")
# A program makes room for another when no run has needed it for as many cycles.
_PATIENCE = 50
# So many runs can take turns without the step being read from the device again.
_RUNS = 16
_LAST = 2**31 - 1  # where the counter of steps stops

_log = logging.getLogger("priorityprop_jax")


class _Cycle(NamedTuple):
    """What the host knows of a run, before a call."""

    step: int  # number of the call
    summary: jax.Array | None  # of the state, on its way from the device
    # By step of the cycle: the leaves due, and the program; empty if not known.
    plan: dict[int, tuple[StaticMask, Variant]]


def _read(x: Any) -> np.ndarray:
    """Waits for a small array. The only place where this module does."""
    return np.asarray(jax.device_get(x))


@functools.lru_cache(maxsize=256)
def _is_tracer(kind: type) -> bool:
    return issubclass(kind, jax.core.Tracer)


def _any_traced(leaves: list[Any]) -> bool:
    return any(map(_is_tracer, set(map(type, leaves))))


def _masks(
    summary: np.ndarray, length: int, treedef: Any, rows: Sequence[int | None]
) -> list[StaticMask]:
    """Which leaves are due at each step of a cycle, by row where there are rows."""
    rank, most = summary[1 : 1 + length], summary[1 + length :]
    ends = np.cumsum([1 if n is None else n for n in rows])
    by_leaf = np.split(most, ends[:-1]) if len(rows) else []

    def mask(r):
        due = [tuple((q > rank[r]).tolist()) if r else (True,) for q in by_leaf]
        return tuple(all(d) if all(d) == any(d) else d for d in due)

    return [StaticMask(mask(r), treedef) for r in range(length)]


@functools.lru_cache(maxsize=1024)
def _by_leaf(mask: StaticMask) -> np.ndarray:
    """Which leaves are due, or any row of them. Not to be written to."""
    found = np.array([np.any(x) for x in mask.leaves], bool)
    found.flags.writeable = False
    return found


def _rows(params: Any, units: Any) -> list[int | None]:
    """For each leaf the number of rows, or None where it is due as a whole."""
    leaves = jax.tree.leaves(params)
    if units is None or (axes := layout(params, units).axes) is None:
        return [None] * len(leaves)
    return [p.shape[0] if 0 in a else None for p, a in zip(leaves, axes, strict=True)]


def _prefix(mask: StaticMask, depths: Sequence[int], levels: int) -> StaticMask:
    """The mask and all leaves nearer to the loss, rounded up to one of a few levels."""
    known = sorted(set(depths))
    count = min(levels, len(known))
    ends = [known[-(-len(known) * (i + 1) // count) - 1] for i in range(count)]
    lowest = max(
        (d for d, on in zip(depths, mask.leaves, strict=True) if on), default=-1
    )
    level = next(end for end in ends if end >= lowest)
    return StaticMask(tuple(d <= level for d in depths), mask.treedef)


def _covers(variant: Variant, due: StaticMask) -> bool:
    """Whether a program is one for this mask."""
    if variant.kind == "exact":
        return variant.mask == due
    pairs = zip(_by_leaf(variant.mask), _by_leaf(due), strict=True)
    return all(computed or not on for computed, on in pairs)


def _dump(mask: StaticMask | Variant) -> list[Any]:
    if isinstance(mask, Variant):
        return [_dump(mask.mask), mask.kind]
    return [list(x) if isinstance(x, tuple) else x for x in mask.leaves]


def _load_mask(saved: list[Any], treedef: Any) -> StaticMask:
    if len(saved) != treedef.num_leaves:
        raise ValueError(
            f"the saved step is for params of {len(saved)} leaves, these have "
            f"{treedef.num_leaves}"
        )
    leaves = (tuple(map(bool, x)) if isinstance(x, list) else bool(x) for x in saved)
    return StaticMask(tuple(leaves), treedef)


class TrainStep:
    """The function that `make_train_step` returns.

    Attributes:
      mode: ``"static"``, ``"dynamic"``, or ``"auto"`` as long as that is not decided.
      reason: why.
      variants: the compiled programs of the static mode: `Variant` -> jitted function;
        ``step.variants[v].lower(params, opt_state, *batch).compile()`` has its costs.
      account: mask -> in how many steps those leaves were due. Of steps in static mode
        only; ``account.clear()`` starts anew.
      computed: mask -> in how many steps the gradients of those leaves were computed:
        the same but for prefixes.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import make_train_step, priority_prop
      >>> tx = optax.chain(priority_prop(budget=0.5), optax.sgd(0.1))
      >>> make_train_step(lambda p, x: jnp.sum(p * x), tx, mode="static")
      TrainStep(mode='static', reason='as asked for', variants=0)
    """

    def __init__(
        self,
        recipe: Recipe,
        mode: str,
        donate: bool,
        max_variants: int,
        compile_ahead: bool,
    ):
        self.mode, self.reason = mode, "" if mode == "auto" else "as asked for"
        self.variants: dict[Variant, Any] = {}
        self.account: collections.Counter[StaticMask] = collections.Counter()
        self.computed: collections.Counter[StaticMask] = collections.Counter()
        self._recipe, self._asked, self._donate = recipe, mode, donate
        self._levels = max(1, max_variants // 4)
        self._room = max_variants - 1 - self._levels  # for exact masks
        self._compile_ahead = compile_ahead
        self._dynamic = self._jit(functools.partial(dynamic_step, recipe))
        self._summarize = jax.jit(functools.partial(summarize, recipe))
        self._places: dict[Any, Place] = {}
        self._everything: dict[Any, tuple[StaticMask, Variant]] = {}
        self._depths: dict[Any, list[int]] = {}
        self._ahead: dict[Variant, Future] = {}
        self._calls = 0
        self._used: dict[Variant, int] = {}  # the call that last planned to
        # The programs planned for the steps from the first one on.
        self._planned: tuple[int, dict[int, Variant]] = 0, {}
        # By the id of the step in the state that was returned.
        self._known: collections.OrderedDict[int, tuple[list, _Cycle]]
        self._known = collections.OrderedDict()

    def __repr__(self) -> str:
        return (
            f"TrainStep(mode={self.mode!r}, reason={self.reason!r}, "
            f"variants={len(self.variants)})"
        )

    def __call__(
        self,
        params: optax.Params,
        opt_state: optax.OptState,
        *batch: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any, Metrics]:
        """One step: the new params, the new state, and `Metrics`."""
        call = params, opt_state, *batch
        leaves, treedef = jax.tree.flatten(opt_state)
        arrays, structure = jax.tree.flatten(params)
        if _any_traced([*leaves, *arrays, *jax.tree.leaves((batch, kwargs))]):
            if self._asked == "static":
                raise TypeError(
                    "a training step with mode='static' reads the quotas between the "
                    "steps, so it cannot be called inside of jit, scan, vmap, pmap or "
                    "shard_map: make one with mode='dynamic' (or 'auto')"
                )
            return dynamic_step(self._recipe, *call, **kwargs)
        if self.mode == "dynamic":
            return self._dynamic(*call, **kwargs)
        place = self._places.get(treedef)
        if place is None:
            place = find_place(opt_state, params, self._recipe.index)
            self._places[treedef] = place
            self._decide_early(place, np.size(leaves[place.rank]))
            if self.mode == "dynamic":
                return self._dynamic(*call, **kwargs)
        self._calls += 1
        (length,), cycle = leaves[place.rank].shape, None
        due, variant = self._first(structure)
        if length > 1:
            cycle = self._recall(place, leaves)
            if r := cycle.step % length:
                if not cycle.plan:
                    cycle = self._plan(cycle, length, call, kwargs)
                    if self.mode == "dynamic":
                        return self._dynamic(*call, **kwargs)
                due, variant = cycle.plan[r]
        program = self.variants.get(variant) or self._program(variant)
        if self._ahead and variant in self._ahead:
            self._ahead.pop(variant).result()
        params, opt_state, metrics, *summary = program(*call, **kwargs)
        metrics = metrics._replace(due=_by_leaf(due))
        self.account[due] += 1
        self.computed[variant.mask] += 1
        if cycle is not None:
            cycle = cycle._replace(step=min(cycle.step + 1, _LAST))
            if summary:
                cycle = cycle._replace(summary=summary[0], plan={})
                summary[0].copy_to_host_async()
            self._remember(place, opt_state, cycle)
        return params, opt_state, metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to take the same programs; plain, for JSON.

        That they are the same matters for bits alone: programs for other masks round
        differently. Params and optimizer state are saved by other means.

        Examples:
          >>> import jax.numpy as jnp, optax
          >>> from priorityprop_jax import make_train_step, prioritize
          >>> tx = prioritize(optax.sgd(0.1), budget=0.5)
          >>> step = make_train_step(lambda p, x: jnp.sum(p * x), tx, mode="static")
          >>> step.state_dict()["mode"]
          'static'
        """
        first, planned = self._planned
        return {
            "mode": self.mode,
            "reason": self.reason,
            "calls": self._calls,
            "used": [[_dump(v), call] for v, call in self._used.items()],
            "planned": [first, [[r, _dump(v)] for r, v in planned.items()]],
            "account": [[_dump(m), n] for m, n in self.account.items()],
            "computed": [[_dump(m), n] for m, n in self.computed.items()],
        }

    def load_state_dict(self, state: dict[str, Any], params: optax.Params) -> None:
        """Goes on like the step that `state` is from, which `state_dict` returned.

        Args:
          state: as it was returned, or read back from JSON.
          params: the pytree to be trained; its structure is used.

        Raises:
          ValueError: `state` is about another number of leaves, or of the other mode
            where this one was asked for.

        Examples:
          >>> import jax.numpy as jnp, optax
          >>> from priorityprop_jax import make_train_step, prioritize
          >>> tx = prioritize(optax.sgd(0.1), budget=0.5)
          >>> loss = lambda p, x: jnp.sum(p * x)
          >>> step, params = make_train_step(loss, tx), jnp.ones(3)
          >>> _ = step(jnp.ones(3), tx.init(params), 1.0)
          >>> again = make_train_step(loss, tx)
          >>> again.load_state_dict(step.state_dict(), params)
          >>> again.account == step.account
          True
        """
        treedef = jax.tree.structure(params)
        if self._asked not in ("auto", state["mode"]) and state["mode"] != "auto":
            raise ValueError(
                f"mode={self._asked!r}, but the saved step was {state['mode']!r}: to "
                f"round alike, make one with mode='auto' or mode={state['mode']!r}"
            )
        mask = functools.partial(_load_mask, treedef=treedef)
        variant = lambda saved: Variant(mask(saved[0]), saved[1])
        account = {mask(m): n for m, n in state["account"]}
        computed = {mask(m): n for m, n in state["computed"]}
        used = {variant(v): call for v, call in state["used"]}
        first, planned = state["planned"]
        self._planned = first, {r: variant(v) for r, v in planned}
        self.mode, self.reason = state["mode"], state["reason"]
        self._calls, self._used = state["calls"], used
        self.account, self.computed = map(collections.Counter, (account, computed))
        self.variants, self._ahead = {}, {}
        self._known.clear()
        for known in used:
            self._program(known)

    def _jit(self, program: Callable[..., Any]) -> Any:
        return jax.jit(program, donate_argnums=(0, 1) if self._donate else ())

    def _first(self, treedef: Any) -> tuple[StaticMask, Variant]:
        """The mask and the program of the first step of a cycle."""
        known = self._everything.get(treedef)
        if known is None:
            due = StaticMask((True,) * treedef.num_leaves, treedef)
            known = self._everything[treedef] = due, Variant(due, "first")
        return known

    def _program(self, variant: Variant) -> Any:
        if variant not in self.variants:
            if variant.kind == "first":
                program = functools.partial(first_step, self._recipe)
            else:
                program = functools.partial(later_step, self._recipe, variant)
            self.variants[variant] = self._jit(program)
        return self.variants[variant]

    def _settle(self, mode: str, reason: str) -> None:
        self.mode, self.reason = mode, reason
        _log.info("training step: mode %r, as %s", mode, reason)

    def _decide_early(self, place: Place, length: int) -> None:
        """What can be known before the first step."""
        held = f"the schedule is inside of a {place.holder}, which may hold it back"
        if self.mode == "auto" and jax.process_count() > 1:
            self._settle("dynamic", "there are several processes")
        elif self.mode == "auto" and place.holder is not None:
            self._settle("dynamic", held)
        elif self.mode == "auto" and length == 1:
            self._settle("static", "every step is the first of a cycle")
        elif place.holder is not None:
            self._settle(
                "static", f"asked for; reads the state at every step, as {held}"
            )

    def _recall(self, place: Place, leaves: list) -> _Cycle:
        """What is known of the run that this state belongs to; else reads its step."""
        known = self._known.get(id(leaves[place.step]))
        watched = (leaves[i] for i in (place.step, place.rank, *place.quotas))
        if known and all(ref() is x for ref, x in zip(known[0], watched, strict=True)):
            if self._donate:  # this state can be given to us only once
                del self._known[id(leaves[place.step])]
            return known[1]
        return _Cycle(int(_read(leaves[place.step])), None, {})

    def _remember(self, place: Place, opt_state: Any, cycle: _Cycle) -> None:
        if place.holder is not None:
            return
        leaves = jax.tree.leaves(opt_state)
        watched = [leaves[i] for i in (place.step, place.rank, *place.quotas)]
        self._known[id(watched[0])] = list(map(weakref.ref, watched)), cycle
        if len(self._known) > _RUNS:
            self._known.popitem(last=False)

    def _plan(self, cycle: _Cycle, length: int, call: tuple, kwargs: dict) -> _Cycle:
        """Reads the quotas, and chooses a program for each step left in the cycle."""
        params, opt_state, *batch = call
        summary = cycle.summary
        if summary is None:
            summary = self._summarize(opt_state, params)
        summary = _read(summary)
        if summary[0] != cycle.step:
            raise RuntimeError(
                f"opt_state is at step {summary[0]} where {cycle.step} was expected: "
                f"something in tx holds priority_prop back, so use mode='dynamic'"
            )
        rows = _rows(params, self._recipe.units)
        masks = _masks(summary, length, jax.tree.structure(params), rows)
        if self.mode == "auto":
            self._decide(len(set(masks[1:])))
        now, new, plan = cycle.step % length, [], {}
        first = cycle.step - now
        before = self._planned[1] if self._planned[0] == first else {}
        for r in range(now, length) if self.mode == "static" else ():
            variant = Variant(masks[r], "exact")
            if r in before and _covers(before[r], masks[r]):  # resumed
                self._program(before[r])
                plan[r] = masks[r], before[r]
                continue
            if not self._has_room(variant, length):
                if self._asked == "auto":
                    bound = f"the masks outgrew the {self._room} programs for them"
                    self._settle("dynamic", bound)
                    break
                depths = self._find_depths(params, batch, kwargs)
                variant = Variant(_prefix(masks[r], depths, self._levels), "prefix")
            if variant not in self.variants:
                self._program(variant)
                new.append(variant)
            self._used[variant] = self._calls
            plan[r] = masks[r], variant
        # Several processes would have to compile the same programs at the same time.
        ahead = self._compile_ahead and jax.process_count() == 1
        if self.mode == "static" and ahead and len(new) > 1:
            self._compile(new, call, kwargs)
        self._planned = first, {r: variant for r, (_, variant) in plan.items()}
        return cycle._replace(summary=None, plan=plan)

    def _decide(self, masks: int) -> None:
        """By the number of masks in the later steps of the first cycle."""
        most = self._room // 2
        if masks <= most:
            self._settle("static", f"a cycle has {masks} masks, at most {most}")
        else:
            self._settle("dynamic", f"a cycle has {masks} masks, more than {most}")

    def _has_room(self, variant: Variant, length: int) -> bool:
        """Whether there is a program for an exact mask, or may be one more."""
        if variant in self.variants:
            return True
        exact = [v for v in self.variants if v.kind == "exact"]
        if len(exact) < self._room:
            return True
        oldest = min(exact, key=self._used.__getitem__, default=None)
        if oldest is None or self._calls - self._used[oldest] <= _PATIENCE * length:
            return False
        del self.variants[oldest], self._used[oldest]
        self._ahead.pop(oldest, None)
        return True

    def _find_depths(self, params: Any, batch: Sequence, kwargs: dict) -> list[int]:
        """How far each leaf is from the loss."""
        kind = jax.tree.structure(params)
        if kind not in self._depths:
            has_aux, loss_fn = self._recipe.has_aux, self._recipe.loss_fn
            loss = (lambda *a, **k: loss_fn(*a, **k)[0]) if has_aux else loss_fn
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of unused params
                depths = infer_depths(loss, params, *batch, **kwargs)
            # None, of a leaf that is no array: always in the mask.
            self._depths[kind] = [d or 0 for d in kind.flatten_up_to(depths)]
        return self._depths[kind]

    def _compile(self, variants: list[Variant], call: tuple, kwargs: dict) -> None:
        """Several at once; traced here, as `loss_fn` may not be thread-safe."""
        pool = ThreadPoolExecutor(min(len(variants), os.cpu_count() or 1))
        for variant in variants:
            lowered = self._program(variant).lower(*call, **kwargs)
            # The call finds what this leaves in the cache of the jitted function.
            self._ahead[variant] = pool.submit(lowered.compile)
        pool.shutdown(wait=False)


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    mode: str = "auto",
    has_aux: bool = False,
    *,
    index: int | None = None,
    units: Any = None,
    skip_nonfinite: bool = False,
    donate: bool = True,
    max_variants: int = 32,
    compile_ahead: bool = True,
) -> TrainStep:
    """A training step that computes only the gradients that the schedule will use.

    ``step(params, opt_state, *batch, **kwargs) -> (params, opt_state, metrics)`` gives
    what one jitted function with `value_and_grad` (and its argument ``active``),
    ``tx.update`` and `optax.apply_updates` would give, with less work:

    * ``"static"``: a program for each mask. The quotas are read once per cycle (one
      number for each leaf); which leaves are due in the other steps of the cycle
      follows from them. Saves the most: nothing is kept for the backward pass of
      resting leaves, and under `prioritize` they and their state are not touched.
    * ``"dynamic"``: one program, which decides on the device. A step like this can be
      called inside of `jax.jit`, `jax.lax.scan`, `jax.vmap`, `jax.pmap` and
      `jax.shard_map`, and never waits for the device.
    * ``"auto"``: dynamic inside of those, with several processes, and where an
      optimizer such as `optax.MultiSteps` may hold the schedule back; else static,
      unless a cycle has many masks, or the masks of all cycles outgrow `max_variants`.

    To whatever else is in `tx`, a resting leaf has the gradient zero. In front of the
    schedule that can be seen: `optax.clip_by_global_norm` takes the norm of what is
    active; `optax.adam`, when put before `priority_prop`, averages the zeros.

    In static mode a run is known by the state that the step returned last. Any other
    state may be given to it (one from a checkpoint, of another run); then the step
    number is read from it.

    Args:
      loss_fn: ``loss_fn(params, *batch, **kwargs)`` returns a real scalar, or a pair of
        it and anything else (new batch statistics, say), if `has_aux`.
      tx: an optax transformation with a `priority_prop` or a `prioritize` in it, over
        all of the params.
      mode: ``"auto"``, ``"static"`` or ``"dynamic"``.
      has_aux: whether `loss_fn` returns a pair.
      index: which `PriorityPropState`, where `tx` has several.
      units: what the transformation was given as `units`, so that leaves with units
        along their first axis, layers stacked for a `jax.lax.scan`, rest by layer.
      skip_nonfinite: whether a step whose loss is not finite changes nothing: params,
        moments, counts, scores and quotas stay, and only the step of the schedule goes
        on. A first step of a cycle that is lost this way leaves the quotas of the cycle
        before; the very first one, before which there are none, each unit one update.
        Inside of `jax.pmap` or `jax.shard_map` the loss must be the same on all
        devices, such as a `jax.lax.pmean`, or they would decide differently.
      donate: whether params and state are given up to the step, which reuses their
        memory.
      max_variants: bound for the number of programs in static mode, at least 2. A
        quarter is reserved for prefixes: where the masks vary so much that there is no
        room for a further one, the gradients of all leaves at least as near to the loss
        as the lowest one due are computed, and those not due set to zero. Programs that
        were not needed for 50 cycles make room.
      compile_ahead: whether all programs of a cycle are compiled at its second step, in
        threads, instead of each when it is needed.

    Returns:
      A `TrainStep`, to be called like a function. Its `mode` and `reason` tell what
      was chosen, `account` in how many steps which leaves were due.

    Raises:
      ValueError, TypeError: an argument cannot be meant; at the first call, there is no
        `PriorityPropState`, or there are several and no `index`; ``mode="static"``
        and an argument is traced.
      RuntimeError: something in `tx` keeps the schedule from advancing by one step at
        each call. In static mode only, where it would be wrong.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import make_train_step, prioritize
      >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - x) ** 2)
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 3))}
      >>> tx = prioritize(optax.sgd(0.1), budget=0.5)
      >>> step, state = make_train_step(loss, tx), tx.init(params)
      >>> for _ in range(20):
      ...     params, state, metrics = step(params, state, jnp.eye(3))
      >>> step.mode, sum(step.account.values())
      ('static', 20)
    """
    check_name("mode", mode, MODES)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"tx must be an optax.GradientTransformation, got {tx!r}; for example "
            f"prioritize(optax.adam(1e-3), budget=0.5)"
        )
    check_count("max_variants", max_variants, least=2, static=True)
    recipe = Recipe(loss_fn, tx, has_aux, index, units, skip_nonfinite)
    return TrainStep(recipe, mode, donate, max_variants, compile_ahead)

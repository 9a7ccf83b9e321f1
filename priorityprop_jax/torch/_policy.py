"""The half that JAX does: from sizes of gradients to numbers of updates.

JAX works at the first step of a cycle, on the CPU; what the other steps need is a
table, looked up. Between two steps of torch all caches are cold, so that what counts is
how much is touched: the state goes to JAX and back in two arrays, and within a cycle
only the step moves.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._budget import resolve
from .._priority import advance, PriorityPropState, Settings
from .._schedule import schedule


_INT_MAX = np.iinfo(np.int32).max
_INTEGERS = ("step", "budget", "counts", "quotas", "nonfinite", "depths")
_SAVED = (*_INTEGERS, "scores")


class Row(NamedTuple):
    """A step of the schedule."""

    given: list[int]  # updates of each parameter
    resting: list[int]  # who has none
    repeated: list[int]  # who has more than one


class Turn(NamedTuple):
    """What a step does, for `Policy.commit`."""

    row: Row
    state: PriorityPropState | None  # that of a new cycle, after its first step
    rows: list[Row]  # of that cycle


class Policy:
    """Who is updated how often at which step.

    Args:
      settings: checked.
      names: of the parameters, each of which is a unit.
      state: from `init_priority`.
      device: a `jax.Device`, where to compute.
    """

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        state: PriorityPropState,
        device: Any,
    ):
        self._settings, self._names, self._device = settings, list(names), device
        self.state = state
        like = self._state._replace(score_state=None)
        self._decide = jax.jit(functools.partial(_decide, settings, tuple(names), like))

    @property
    def state(self) -> PriorityPropState:
        """What is remembered, in NumPy; can be set to any place within a cycle."""
        if self._since:
            counts = np.sum(self._since, axis=0, dtype=np.int64) + self._state.counts
            self._state = self._state._replace(
                step=np.int32(self._step),
                counts=np.minimum(counts, _INT_MAX).astype(np.int32),
            )
            self._since = []
        return self._state

    @state.setter
    def state(self, state: PriorityPropState) -> None:
        self._state = jax.device_get(state)
        self._step = int(self._state.step)
        self._since: list[list[int]] = []  # updates by the steps that are not in it yet
        self._rows: list[Row] | None = None

    @property
    def place(self) -> int:
        """The step within the cycle."""
        return self._step % self._settings.recalc_every

    def row(self) -> Row:
        """This step, which is not the first of a cycle."""
        if self._rows is None:
            with jax.default_device(self._device):
                table = _table(self._state.quotas, self._settings.recalc_every)
            self._rows = _rows(np.asarray(table))
        return self._rows[self.place]

    def resting(self) -> list[int]:
        """Who needs no gradient now: nobody at the first step of a cycle."""
        return self.row().resting if self.place else []

    def active(self) -> list[bool]:
        """The opposite, for all parameters."""
        resting = set(self.resting())
        return [i not in resting for i in range(len(self._names))]

    def turn(self, sizes: Callable[[], np.ndarray]) -> Turn:
        """This step, to be committed once it is done.

        Args:
          sizes: to be called at the first step of a cycle, for the magnitudes of all
            gradients, NaN where one is not finite.
        """
        if self.place:
            return Turn(self.row(), None, [])
        measured = sizes()  # before the state is read: it may set depths
        state, settings = self.state, self._settings
        budget = None
        if callable(settings.budget):
            budget = resolve(
                settings.budget, state.step, len(self._names), settings.recalc_every
            )
            budget = np.int32(budget)
        integers = np.hstack([getattr(state, name) for name in _INTEGERS])
        floats = np.hstack([measured, state.scores])
        with jax.default_device(self._device):
            found = self._decide(integers, floats, state.score_state, budget)
            table, integers, scores, score_state = jax.device_get(found)
        first, *rest = _rows(table)
        state = state._replace(
            **_unpacked(state, integers), scores=scores, score_state=score_state
        )
        return Turn(first, state, [first, *rest])

    def commit(self, turn: Turn) -> None:
        """The step is done."""
        if turn.state is not None:
            self.state, self._rows = turn.state, turn.rows
        else:
            self._since.append(turn.row.given)
            self._step = min(self._step + 1, _INT_MAX)

    def state_dict(self) -> dict[str, Any]:
        """The state in plain Python, for `torch.save` or `json.dumps`."""
        state = self.state
        saved = {name: getattr(state, name).tolist() for name in _SAVED}
        score = [np.asarray(x).tolist() for x in jax.tree.leaves(state.score_state)]
        every = self._settings.recalc_every
        head = {"version": 1, "names": self._names, "recalc_every": every}
        return {**head, **saved, "score_state": score}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` returned.

        Raises:
          ValueError: it is something else, or of other parameters or cycles.
        """
        missing = {"names", "recalc_every", "score_state", *_SAVED} - set(saved)
        if missing:
            raise ValueError(
                f"not a saved budget: it lacks {', '.join(map(repr, sorted(missing)))}"
            )
        names, every = list(saved["names"]), self._settings.recalc_every
        if names != self._names:
            ours, theirs = set(self._names), set(names)
            if ours == theirs:
                what = "has them in another order"
            else:
                who = sorted(ours ^ theirs)[0]
                what = f"has {who!r}" if who in theirs else f"lacks {who!r}"
            raise ValueError(
                f"the saved budget is of {len(names)} parameters, this one of "
                f"{len(self._names)}: the saved one {what}"
            )
        if saved["recalc_every"] != every:
            raise ValueError(
                f"recalc_every={every}, but the saved budget has "
                f"recalc_every={saved['recalc_every']}"
            )
        like = self._state
        parts = {
            name: _array(name, saved[name], getattr(like, name)) for name in _SAVED
        }
        leaves, kind = jax.tree.flatten(like.score_state)
        if len(leaves) != len(saved["score_state"]):
            raise ValueError("the saved budget is of another score")
        score = [
            _array("score_state", x, y)
            for x, y in zip(saved["score_state"], leaves, strict=True)
        ]
        score = jax.tree.unflatten(kind, score)
        self.state = like._replace(score_state=score, **parts)


def _array(name: str, value: Any, like: Any) -> np.ndarray:
    found, like = np.asarray(value), np.asarray(like)
    if found.shape != like.shape:
        raise ValueError(
            f"the saved {name!r} has shape {found.shape}, expected {like.shape}"
        )
    return found.astype(like.dtype)


def _unpacked(like: PriorityPropState, integers: Any) -> dict[str, Any]:
    """The fields of `_INTEGERS`, which were put into one vector."""
    shapes = [np.shape(getattr(like, name)) for name in _INTEGERS]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    split = np.split if isinstance(integers, np.ndarray) else jnp.split
    parts = split(integers, ends[:-1])
    return {
        name: part.reshape(shape)
        for name, part, shape in zip(_INTEGERS, parts, shapes, strict=True)
    }


def _decide(settings: Settings, names, like, integers, floats, score_state, budget):
    """`advance`, with each gradient stood for by its size: its own maximum.

    Returns the updates by step of the cycle and parameter, and the state.
    """
    if budget is not None:
        settings = settings._replace(budget=budget)
    sizes, scores = jnp.split(floats, 2)
    state = jax.tree.map(jnp.asarray, like)._replace(
        **_unpacked(like, integers), scores=scores, score_state=score_state
    )
    gradients = OrderedDict(zip(names, sizes, strict=True))
    turn, state = advance(settings._replace(magnitude="max"), gradients, state)
    table = schedule(state.quotas, settings.recalc_every).at[0].set(turn.given[0])
    integers = jnp.hstack([getattr(state, name) for name in _INTEGERS])
    return table, integers, state.scores, state.score_state


def _rows(table: np.ndarray) -> list[Row]:
    return [
        Row(
            given,
            [i for i, m in enumerate(given) if m == 0],
            [i for i, m in enumerate(given) if m > 1],
        )
        for given in table.tolist()
    ]


_table = jax.jit(schedule, static_argnums=1)

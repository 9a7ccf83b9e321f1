"""The half that JAX does: from sizes of gradients to numbers of updates.

The state is a `PriorityPropState` of NumPy arrays. JAX works at the first step of a
cycle, on the CPU; what the other steps need is a table, looked up.
"""

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._budget import resolve
from .._priority import advance, PriorityPropState, Settings
from .._schedule import schedule


_INT_MAX = np.iinfo(np.int32).max
_SAVED = ("step", "counts", "scores", "quotas", "budget", "nonfinite", "depths")


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
        self._decide = jax.jit(functools.partial(_decide, settings, tuple(names)))
        self.state = state

    @property
    def state(self) -> PriorityPropState:
        """What is remembered; setting it may lead into the middle of a cycle."""
        return self._state

    @state.setter
    def state(self, state: PriorityPropState) -> None:
        self._state = jax.device_get(state)
        self._rows: Any = None  # updates, by step and parameter

    @property
    def place(self) -> int:
        """The step within the cycle."""
        return int(self._state.step) % self._settings.recalc_every

    def given(self) -> list[int]:
        """Updates of each parameter at this step, which is not the first of a cycle."""
        rows = self._rows
        if rows is None:
            with jax.default_device(self._device):
                table = _rows(self._state.quotas, self._settings.recalc_every)
            rows = self._rows = np.asarray(table).tolist()
        return rows[self.place]

    def active(self) -> list[bool]:
        """Who needs a gradient now: all at the first step of a cycle."""
        if self.place == 0:
            return [True] * len(self._names)
        return [m > 0 for m in self.given()]

    def turn(self, sizes: np.ndarray | None) -> tuple[list[int], PriorityPropState]:
        """This step's updates, and the state to set once they are done.

        Args:
          sizes: magnitudes of all gradients, NaN where one is not finite; used at the
            first step of a cycle.
        """
        state = self._state
        if self.place == 0:
            budget = self._settings.budget
            if callable(budget):
                every = self._settings.recalc_every
                budget = resolve(budget, state.step, len(self._names), every)
                budget = np.int32(budget)
            else:
                budget = None
            with jax.default_device(self._device):
                given, state = jax.device_get(self._decide(sizes, state, budget))
            return given.tolist(), state
        given = self.given()
        counts = state.counts.astype(np.int64) + given
        counts = np.minimum(counts, _INT_MAX).astype(np.int32)
        step = np.int32(min(int(state.step) + 1, _INT_MAX))
        return given, state._replace(step=step, counts=counts)

    def commit(self, state: PriorityPropState) -> None:
        """The step that `turn` returned this state for is done."""
        if state.quotas is self._state.quotas:
            self._state = state
        else:
            self.state = state

    def state_dict(self) -> dict[str, Any]:
        """The state in plain Python, for `torch.save` or `json.dumps`."""
        saved = {name: getattr(self._state, name).tolist() for name in _SAVED}
        score = [
            np.asarray(x).tolist() for x in jax.tree.leaves(self._state.score_state)
        ]
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


def _decide(settings: Settings, names, sizes, state, budget):
    """`advance`, with each gradient stood for by its size: its own maximum."""
    if budget is not None:
        settings = settings._replace(budget=budget)
    gradients = OrderedDict(zip(names, sizes, strict=True))
    turn, state = advance(settings._replace(magnitude="max"), gradients, state)
    return turn.given[0], state


_rows = jax.jit(schedule, static_argnums=1)

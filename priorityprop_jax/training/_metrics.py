"""Numbers on their way from the device, and what is summed up of them.

No step waits for the device: its few numbers start their way to the host at once, and
are read when the device is some steps ahead. What is kept does not grow with the steps.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._costs import BackwardCosts
from .._masks import StaticMask
from ..report import PriorityReport
from ._objective import EXAMPLES, STEPS


DELAY = 10  # steps
_MASKS = 256  # different ones, before their sums are made


class Background:
    """A queue of small arrays, in the order of their steps.

    Args:
      delay: how many entries stay unread, as the device may not have got to them. As
        many more are waited for, so that the host is woken once for all of these.
    """

    def __init__(self, delay: int = DELAY):
        self._delay, self._on_host = delay, jax.default_backend() == "cpu"
        self._queue: collections.deque[tuple[Any, Any]] = collections.deque()

    def push(self, tag: Any, tree: Any) -> None:
        """Starts to copy the arrays to the host."""
        if not self._on_host:
            for x in jax.tree.leaves(tree):
                if isinstance(x, jax.Array):
                    x.copy_to_host_async()
        self._queue.append((tag, tree))

    @property
    def is_due(self) -> bool:
        """Whether `pop` has something to give."""
        return len(self._queue) > 2 * self._delay

    def pop(self, everything: bool = False) -> Iterator[tuple[Any, Any]]:
        """Pairs of tag and NumPy arrays: those old enough, or all of them."""
        if not everything and not self.is_due:
            return
        while len(self._queue) > (0 if everything else self._delay):
            tag, tree = self._queue.popleft()
            yield tag, jax.tree.map(np.asarray, tree)

    def clear(self) -> None:
        self._queue.clear()


class Means:
    """Sums over examples, from which the means of an epoch are made."""

    def __init__(self, saved: Mapping[str, float] | None = None):
        self.entries, self._names = 0, list(saved or ())
        self._sums = np.array(list((saved or {}).values()), np.float64)

    @property
    def sums(self) -> dict[str, float]:
        return dict(zip(self._names, self._sums.tolist(), strict=True))

    def add(self, names: Sequence[str], sums: np.ndarray) -> None:
        """Adds the sums of a step; one of the names is `EXAMPLES`."""
        self.entries += 1
        if names != self._names:
            before = self.sums
            self._names = [*names, *(x for x in before if x not in names)]
            self._sums = np.array([before.get(x, 0.0) for x in self._names])
        self._sums[: len(names)] += sums

    def means(self) -> dict[str, float]:
        """The loss first; NaN where there was no example."""
        sums = self.sums
        n = sums.get(EXAMPLES, 0.0)
        names = sorted(sums, key=lambda name: (name != "loss", name))
        mean = lambda x: x / n if n else float("nan")
        return {x: mean(sums[x]) for x in names if x not in (EXAMPLES, STEPS)}


class Account:
    """In how many steps which leaf was due, and which piece of the chain was needed.

    Attributes:
      steps: how many there were.
      runs: steps in which the gradient of each leaf was computed; shape=(leaves,).
      reached: steps in which each piece of the chain was; shape=(groups,).
    """

    def __init__(self, costs: BackwardCosts, saved: Mapping[str, Any] | None = None):
        self.costs, self._full = costs, costs.full
        self.steps, self.runs = 0, np.zeros(len(costs.paths), np.int64)
        self.reached = np.zeros(len(costs.groups), np.int64)
        self._recent: collections.Counter[bytes] = collections.Counter()
        self._seen: dict[StaticMask, int] = {}
        if saved is not None:
            self.steps = int(saved["steps"])
            self.runs = np.array(saved["runs"], np.int64)
            self.reached = np.array(saved["reached"], np.int64)

    def add(self, due: np.ndarray) -> None:
        """A step that decided on the device: bools by leaf."""
        self._recent[due.tobytes()] += 1
        if len(self._recent) > _MASKS:
            self._settle()

    def follow(self, computed: Mapping[StaticMask, int]) -> None:
        """Steps of the static mode: the attribute ``computed`` of a training step."""
        for mask, times in computed.items():
            if more := times - self._seen.get(mask, 0):
                self._add(np.array([np.any(x) for x in mask.leaves], bool), more)
                self._seen[mask] = times

    def skip(self, computed: Mapping[StaticMask, int]) -> None:
        """Says that `follow` has been told of these already."""
        self._seen = dict(computed)

    def _add(self, due: np.ndarray, times: int) -> None:
        self.steps += times
        self.runs += times * due
        self.reached += times * (self.costs.members & due).any(axis=1)

    def _settle(self) -> None:
        for mask, times in self._recent.items():
            self._add(np.frombuffer(mask, bool), times)
        self._recent.clear()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        self._settle()
        runs, reached = self.runs.tolist(), self.reached.tolist()
        return {"steps": self.steps, "runs": runs, "reached": reached}

    @property
    def spent(self) -> float:
        """The cost of all steps."""
        self._settle()
        parts = self.costs.weight @ self.runs, self.costs.groups @ self.reached
        return float(self.costs.forward * self.steps + sum(parts))

    @property
    def full(self) -> float:
        """What it would have been with all leaves in all steps."""
        self._settle()
        return self._full * self.steps

    def correct(self, report: PriorityReport) -> PriorityReport:
        """A report with the sums of this account, where it has an estimate of them."""
        savings, full, costs = report.savings, self.full, self.costs
        if savings is None:
            return report
        idle = self.steps - self.runs
        part = lambda saved: float(saved) / full if full else 0.0
        # The estimate says whether the optimizer rests where leaves do.
        rests = savings.traffic_spent < savings.traffic_full
        traffic = float(costs.traffic.sum()) * self.steps
        exact = dataclasses.replace(
            savings,
            steps=self.steps,
            exact=True,
            full=full,
            spent=self.spent,
            by_resting=part(costs.weight @ idle),
            by_truncation=part(costs.groups @ (self.steps - self.reached)),
            traffic_full=traffic,
            traffic_spent=traffic - float(costs.traffic @ idle) * rests,
        )
        return dataclasses.replace(report, savings=exact)


class CompileClock:
    """Sums up, inside of a ``with``, the seconds for which XLA compiles."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *error: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs

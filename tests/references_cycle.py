"""Whole cycles of the method, slowly: plain loops over units, written from the rules.

Scores are made in float64, quotas and steps in rational arithmetic (`references`).
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from references import exact_quotas, exact_schedule


def exact_magnitude(unit: Any, name: str) -> float:
    """The size of a gradient, in float64; float32 input cannot overflow it."""
    sizes = [abs(complex(x)) for x in np.ravel(unit)]
    n = len(sizes)
    if not n or not np.isfinite(sizes).all():
        return math.nan if n else 0.0
    return {
        "l1": math.fsum(sizes),
        "mean": math.fsum(sizes) / n,
        "max": max(sizes),
        "l2": math.sqrt(math.fsum(s * s for s in sizes)),
        "rms": math.sqrt(math.fsum(s * s for s in sizes) / n),
    }[name]


def units_of(leaf: Any, kept: Sequence[int]) -> list[np.ndarray]:
    """The units of a leaf: one slice for each index along the kept axes."""
    leaf = np.asarray(leaf)
    out = []
    for index in np.ndindex(*(leaf.shape[a] for a in kept)):
        where: list[Any] = [slice(None)] * leaf.ndim
        for axis, i in zip(kept, index, strict=True):
            where[axis] = i
        out.append(leaf[tuple(where)])
    return out


class Simulation:
    """What a `priority_prop` remembers, and one step of it at a time."""

    def __init__(
        self,
        axes: Sequence[Sequence[int]],  # kept axes of each leaf
        factors: Sequence[float],  # depth factor of each leaf
        budget: int | float | Callable[[int], int],
        min_updates: int = 1,
        max_updates: int = 20,
        recalc_every: int = 10,
        magnitude: str = "l2",
        score: Callable[[float, int, float], float] = lambda g, n, d: g * d / (1 + n),
    ):
        self.axes, self.factors, self.budget = axes, factors, budget
        self.low, self.high, self.cycle = min_updates, max_updates, recalc_every
        self.magnitude, self.score = magnitude, score
        self.step = 0
        self.counts: list[int] = []
        self.nonfinite = [0] * len(axes)

    def units(self, leaves: Sequence[Any]) -> list[tuple[int, np.ndarray]]:
        return [
            (i, unit)
            for i, leaf in enumerate(leaves)
            for unit in units_of(leaf, self.axes[i])
        ]

    def updates_per_cycle(self, units: int) -> int:
        budget = self.budget(self.step) if callable(self.budget) else self.budget
        if isinstance(budget, int):
            return budget
        return math.ceil(Fraction(str(budget)) * units * self.cycle)

    def __call__(self, leaves: Sequence[Any]) -> list[int]:
        """How many updates each unit gets at this step."""
        units = self.units(leaves)
        self.counts = self.counts or [0] * len(units)
        r = self.step % self.cycle
        sits_out = [False] * len(units)
        if r == 0:
            sizes = [exact_magnitude(g, self.magnitude) for _, g in units]
            sits_out = [math.isnan(size) for size in sizes]
            self.scores = [
                0.0 if out else self.score(size, n, self.factors[i])
                for size, n, (i, _), out in zip(
                    sizes, self.counts, units, sits_out, strict=True
                )
            ]
            for out, (i, _) in zip(sits_out, units, strict=True):
                self.nonfinite[i] += out
            self.spent = self.updates_per_cycle(len(units))
            quotas = exact_quotas(self.scores, self.spent, self.low, self.high)
            self.quotas = [
                min(q, self.low) if out else q
                for q, out in zip(quotas, sits_out, strict=True)
            ]
        due = exact_schedule(self.quotas, self.cycle)[r]
        due = [0 if out else m for m, out in zip(due, sits_out, strict=True)]
        self.counts = [n + m for n, m in zip(self.counts, due, strict=True)]
        self.step += 1
        return due

    def times(self, leaves: Sequence[Any]) -> list[np.ndarray]:
        """The same, one array for each leaf to broadcast against it."""
        due, out = iter(self(leaves)), []
        for leaf, kept in zip(leaves, self.axes, strict=True):
            shape = np.shape(leaf)
            wide = [n if a in kept else 1 for a, n in enumerate(shape)]
            n = math.prod(wide) if kept else 1
            values = np.array([next(due) for _ in range(n)], np.int32)
            out.append(values.reshape(wide if kept else ()))
        return out


def allocate_exactly(scores, budget, low, high, method, few):
    """Stands in for `allocate_vector`: quotas from the oracle, little to compile."""
    del method, few

    def on_host(scores, budget, low, high):
        quotas = exact_quotas(scores, int(budget), int(low), int(high))
        return np.array(quotas, np.int32).reshape(scores.shape)

    shape = jax.ShapeDtypeStruct(scores.shape, np.int32)
    return jax.pure_callback(on_host, shape, scores, budget, low, high)

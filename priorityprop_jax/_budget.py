"""What `budget` means: a number of updates per cycle, a share, or a schedule.

With costs it is a share of the cost of full training, see `_selection`.
"""

import math
import numbers
import warnings
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import is_traced


def check_budget(budget: Any) -> None:
    """Raises unless `budget` is a positive int, a float in (0, 1], or a schedule."""
    if callable(budget):
        return
    allowed = (
        "budget must be a positive integer (updates per cycle), a float in (0, 1] (a "
        "share of updating everything at every step), or a schedule of the step"
    )
    if is_traced(budget) or isinstance(budget, jax.Array):
        if budget.ndim or not (
            jnp.issubdtype(budget.dtype, jnp.integer)
            or jnp.issubdtype(budget.dtype, jnp.floating)
        ):
            raise TypeError(f"{allowed}, got {budget!r}")
        if is_traced(budget):
            return
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"{allowed}, got {budget!r}")
    if isinstance(budget, numbers.Integral):
        if not 1 <= int(budget) < 2**31:
            raise ValueError(f"{allowed}; integers must be in [1, 2**31), got {budget}")
    elif not 0 < float(budget) <= 1:
        raise ValueError(f"{allowed}, got {budget!r}")


def check_share(budget: Any) -> None:
    """Raises unless a budget that has passed `check_budget` can be a share."""
    if callable(budget) or not _is_integer(budget):
        return
    raise ValueError(
        f"with costs the budget must be a float in (0, 1], a share of the cost of full "
        f"training (or a schedule of it), got {budget!r}; integers are numbers of "
        f"updates"
    )


def resolve_share(budget: Any, step: jax.Array) -> float | jax.Array:
    """The share of the cost of full training in the cycle that starts at `step`."""
    share = budget(step) if callable(budget) else budget
    check_share(share)
    return float(share) if isinstance(share, numbers.Real) else jnp.asarray(share)


def _is_integer(x: Any) -> bool:
    if is_traced(x) or isinstance(x, jax.Array):
        return jnp.issubdtype(x.dtype, jnp.integer)
    return isinstance(x, numbers.Integral)


def resolve(
    budget: Any, step: jax.Array, units: int, recalc_every: int
) -> int | jax.Array:
    """The number of updates to hand out in the cycle that starts at `step`.

    Shares are rounded up, so that even one unit gets something. The rounding error
    of a share like 0.1 is no reason for one more.
    """
    value = budget(step) if callable(budget) else budget
    most = units * recalc_every
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        share = math.ceil(Fraction(float(value)).limit_denominator(10**6) * most)
        return min(max(share, min(most, 1)), 2**31 - 1)
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    # float32 holds 2**31 but not 2**31 - 1.
    share = jnp.ceil(value.astype(jnp.float32) * jnp.float32(most * (1 - 1e-6)))
    return jnp.clip(share, min(most, 1), min(most, 2**31 - 128)).astype(jnp.int32)


def warn_infeasible(
    budget: Any, units: int, low: Any, high: Any, recalc_every: int
) -> None:
    """One warning when a budget cannot be handed out between the bounds."""
    known = not any(
        callable(x) or is_traced(x) or isinstance(x, jax.Array)
        for x in (budget, low, high)
    )
    if not known or units == 0:
        return
    updates = resolve(budget, jnp.int32(0), units, recalc_every)
    said = f"budget={budget!r}"
    if not isinstance(budget, numbers.Integral):
        said += f" ({updates} updates per cycle)"
    if updates < units * low:
        warn(
            f"{said} is less than min_updates={low} for each of {units} units: the "
            f"lower bound is dropped, and the units with the best scores come first"
        )
    elif updates > units * high:
        warn(
            f"{said} is more than max_updates={high} for each of {units} units: each "
            f"gets {high}, and {updates - units * high} updates per cycle stay unspent"
        )


def warn(message: str) -> None:
    """Warns at the line that calls `init`: four calls above."""
    warnings.warn(message, UserWarning, stacklevel=5)

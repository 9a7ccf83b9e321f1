"""Errors for people: what was given, what is allowed, and where in the tree."""

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def is_traced(x: Any) -> bool:
    """Whether the value of `x` is unknown until the compiled program runs."""
    return isinstance(x, jax.core.Tracer)


def check_name(argument: str, value: Any, known: Sequence[str]) -> None:
    """Raises unless `value` is one of the `known` names."""
    names = ", ".join(map(repr, known))
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be one of {names}, got {value!r}")
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument} must be one of {names}, got {value!r}{hint}")


def check_count(
    argument: str, value: Any, least: int, most: int = 2**31 - 1, static: bool = False
) -> None:
    """Raises unless `value` is an integer scalar in [least, most]."""
    if static and (is_traced(value) or isinstance(value, jax.Array)):
        raise TypeError(
            f"{argument} decides shapes and must be a Python int, got {value!r}. Under "
            f"optax.inject_hyperparams name it in static_args: "
            f"inject_hyperparams(..., static_args=({argument!r},))"
        )
    if is_traced(value) or isinstance(value, jax.Array):
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{argument} must be an integer scalar, got {value!r}")
        if is_traced(value):
            return
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{argument} must be an integer, got {value!r} of type "
            f"{type(value).__name__}"
        )
    if not least <= int(value) <= most:
        raise ValueError(f"{argument} must be in [{least}, {most}], got {value!r}")


def check_finite(argument: str, value: Any) -> None:
    """Raises unless `value` is a finite real number (or traced)."""
    if is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real | jax.Array):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{argument} must be finite, got {value!r}")


def check_bounds(low: Any, high: Any) -> None:
    """Raises unless 0 <= min_updates <= max_updates, and some update is possible."""
    check_count("min_updates", low, least=0)
    check_count("max_updates", high, least=1)
    known = not any(is_traced(x) for x in (low, high))
    if known and int(low) > int(high):
        raise ValueError(
            f"min_updates must not exceed max_updates, got min_updates={low} > "
            f"max_updates={high}"
        )

r"""How much each unit deserves an update.

The score of the method is :math:`|g_u| \cdot depth_u / (1 + count_u)`; its rivals
are here under their own names, so that one harness compares them all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


MAGNITUDES = ("l2", "l1", "mean", "rms", "max")


class ScoreInputs(NamedTuple):
    """What a score is made from; arrays have one entry per unit.

    Examples:
      >>> from priorityprop_jax import Score
      >>> rarest_first = Score(
      ...     lambda magnitudes: (), lambda x, state: (1.0 / (1 + x.counts), state)
      ... )
    """

    magnitudes: jax.Array  # size of the gradients, dtype=float32, finite
    counts: jax.Array  # updates given so far, dtype=int32
    depth_factors: jax.Array  # broadcasts against magnitudes, dtype=float32
    index: jax.Array  # place in the order of units, dtype=uint32
    units: int  # number of all units
    offset: int  # index of the first unit here (element units: of this leaf)
    peak: jax.Array  # largest of all magnitudes, shape=(), dtype=float32
    cycle: jax.Array  # cycles completed, shape=(), dtype=int32
    step: jax.Array  # calls of update so far, shape=(), dtype=int32
    seed: jax.typing.ArrayLike  # an integer


class Score(NamedTuple):
    """A pluggable score: a pair of pure functions, like an optax transformation.

    A NamedTuple and not a bare function, which `optax.inject_hyperparams` would take
    for a schedule.

    Attributes:
      init: ``magnitudes -> state``: from zeros shaped like the units to a pytree of
        arrays, or ``()``.
      update: ``(ScoreInputs, state) -> (scores, state)``, called at the first step of
        each cycle, and for ``units="element"`` leaf by leaf. Scores are float32,
        shaped like the magnitudes; negative and non-finite ones count as zero.

    Examples:
      >>> from priorityprop_jax import priority_prop, Score
      >>> squared = Score(
      ...     init=lambda magnitudes: (),
      ...     update=lambda inputs, state: (inputs.magnitudes**2, state),
      ... )
      >>> tx = priority_prop(budget=0.5, score=squared)
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[ScoreInputs, Any], tuple[jax.Array, Any]]


def _stateless(scores: Callable[[ScoreInputs], jax.Array]) -> Score:
    return Score(lambda _: (), lambda inputs, state: (scores(inputs), state))


def _priority(x: ScoreInputs) -> jax.Array:
    # Divided first: the product alone could overflow.
    return x.magnitudes / (1.0 + x.counts.astype(jnp.float32)) * x.depth_factors


def _random(x: ScoreInputs) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(x.seed), x.cycle)
    key = jax.random.fold_in(key, x.offset)
    return 1.0 - jax.random.uniform(key, x.magnitudes.shape, jnp.float32)


def _cyclic(x: ScoreInputs) -> jax.Array:
    turn = x.cycle.astype(jnp.uint32) % jnp.uint32(max(x.units, 1))
    return (x.index == turn).astype(jnp.float32)


def _ucb(x: ScoreInputs) -> jax.Array:
    gain = _relative(x.magnitudes, x.peak)
    time = jnp.log1p(x.step.astype(jnp.float32))
    return gain + jnp.sqrt(time / (1.0 + x.counts.astype(jnp.float32)))


SCORES = {
    "priority": _stateless(_priority),
    # What has the largest gradient, however often it was served.
    "gradient": _stateless(lambda x: x.magnitudes),
    "uniform": _stateless(lambda x: jnp.ones_like(x.magnitudes)),
    # LISA (Pan et al., 2024): layers drawn at random.
    "random": _stateless(_random),
    # BAdam (Luo et al., 2024): one block after another.
    "cyclic": _stateless(_cyclic),
    # Upper confidence bound (Auer et al., 2002): gain + c sqrt(log t / n), c = 1,
    # with gradients relative to the largest as the gain.
    "ucb": _stateless(_ucb),
}


def magnitude(g: jax.Array, kept: tuple[int, ...] | None, name: str) -> jax.Array:
    """The size of each unit's gradient, float32; NaN where it is not finite.

    Scaled by its maximum before it is squared, so that nothing overflows or
    underflows that fits into float32. `kept` are the axes that units lie along,
    None for all. Larger than float32 holds is its largest number.
    """
    most = float(jnp.finfo(jnp.float32).max)
    size = jnp.abs(lax.stop_gradient(g))
    if size.dtype == jnp.float64 or jnp.iscomplexobj(g):
        # What is finite itself may be beyond float32, or of infinite modulus.
        size = jnp.where(jnp.isfinite(g), jnp.minimum(size, most), size)
    size = size.astype(jnp.float32)
    if kept is None:
        return jnp.where(jnp.isfinite(size), size, jnp.nan)
    axes = tuple(a for a in range(g.ndim) if a not in kept)
    # As bit patterns, which order like the numbers: an integer maximum is several
    # times faster than one that has to carry NaN along, and finds NaN all the same.
    bits = lax.bitcast_convert_type(size, jnp.uint32)
    peak = jnp.max(bits, axis=axes, initial=0)
    total = jnp.minimum(_reduce(size, peak, axes, name), most)
    return jnp.where(peak < 0x7F800000, total, jnp.nan)


def _relative(size: jax.Array, peak: jax.Array) -> jax.Array:
    """``size / peak``, in [0, 1]."""
    # XLA may multiply by 1 / peak, which is flushed to zero from 2**126 on.
    down = jnp.where(peak > 1.0, 0.125, 1.0).astype(jnp.float32)
    return size * down / jnp.maximum(peak * down, jnp.finfo(jnp.float32).tiny)


def _reduce(size: jax.Array, peak: jax.Array, axes, name: str) -> jax.Array:
    """The magnitude, computed in units of a power of two near the peak's bits."""
    if name == "max":
        return lax.bitcast_convert_type(peak, jnp.float32)
    unit = jnp.clip(peak & 0x7F800000, 1 << 23, 253 << 23)
    down = lax.bitcast_convert_type((254 << 23) - unit, jnp.float32)
    scaled = size * jnp.expand_dims(down, axes)
    n = max(math.prod(size.shape[a] for a in axes), 1)
    if name in ("l1", "mean"):
        total = jnp.sum(scaled, axis=axes) / (n if name == "mean" else 1)
    else:
        total = jnp.sum(jnp.square(scaled), axis=axes)
        total = jnp.sqrt(total / (n if name == "rms" else 1))
    return total * lax.bitcast_convert_type(unit, jnp.float32)

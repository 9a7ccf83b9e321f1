r"""How much each unit deserves an update.

The score of the method is :math:`|g_u| \cdot depth_u / (1 + count_u)`; its rivals
are here under their own names, so that one harness compares them all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._units import join


MAGNITUDES = ("l2", "l1", "mean", "rms", "max")  # of a gradient alone
TAYLOR = "taylor"  # of a gradient and of the optimizer's step, see `gains`
_MOST = float(jnp.finfo(jnp.float32).max)


class ScoreInputs(NamedTuple):
    """What a score is made from; arrays have one entry per unit.

    Examples:
      >>> from priorityprop_jax import Score
      >>> rarest_first = Score(
      ...     lambda magnitudes: (), lambda x, state: (1.0 / (1 + x.counts), state)
      ... )
    """

    magnitudes: jax.Array  # size of the gradients or gain, dtype=float32, finite
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


def magnitudes(
    leaves: Sequence[jax.Array], kept: Sequence[tuple[int, ...]], name: str
) -> jax.Array:
    """The size of each unit's gradient, one float32 vector; NaN where not finite.

    Nothing overflows or underflows that fits into float32; what is larger becomes its
    largest number. `kept` are the axes of each leaf that units lie along.
    """
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    leaves = [lax.stop_gradient(g) for g in leaves]
    away = [
        tuple(a for a in range(g.ndim) if a not in k)
        for g, k in zip(leaves, kept, strict=True)
    ]
    if name == "max":
        sizes = join(
            [
                jnp.max(_modulus(g), a, initial=0)
                for g, a in zip(leaves, away, strict=True)
            ]
        )
        return jnp.where(jnp.isfinite(sizes), sizes, jnp.nan)
    linear = name in ("l1", "mean")
    # In units that fit most gradients; then once more in others, if there are any that
    # were too small or too large. So 2**31 squares lose nothing, and do not overflow.
    scales = (1.0, 1.0, 2.0**-32) if linear else (2.0**4, 2.0**89, 2.0**-80)
    small = 0.0 if linear else 2.0**-41

    def measure(state):
        turn, sizes = state
        scale = lax.select_n(turn, *map(jnp.float32, scales))
        total = join(
            [_sum(g, a, scale, name) for g, a in zip(leaves, away, strict=True)]
        )
        found = jnp.minimum((total if linear else jnp.sqrt(total)) / scale, _MOST)
        found = jnp.where(jnp.isfinite(total), found, jnp.nan)
        again = jnp.where(turn == 1, sizes < small, jnp.isnan(sizes))
        sizes = jnp.where(again, found, sizes)
        # Those that are too small come next, then those that are not finite.
        left = (jnp.isnan(sizes) & (turn < 2)).astype(jnp.int32)
        left = jnp.where((sizes < small) & (turn == 0), 2, left)
        return 3 - jnp.max(left, initial=0), sizes

    units = zip(leaves, kept, strict=True)
    size = sum(math.prod(g.shape[a] for a in k) for g, k in units)
    unknown = jnp.full((size,), jnp.nan, jnp.float32)
    for g in leaves:
        if _varies(g):  # then so must what the loop starts with
            unknown = unknown + jnp.sum(_modulus(g.reshape(-1)[:1]))
    turn = jnp.sum(unknown == 0, dtype=jnp.int32)
    return lax.while_loop(lambda s: s[0] < 3, measure, (turn, unknown))[1]


def element_magnitudes(g: jax.Array) -> jax.Array:
    """`magnitudes` where each element is a unit, shaped like the leaf."""
    size = _modulus(g)
    return jnp.where(jnp.isfinite(size), size, jnp.nan)


def gains(
    leaves: Sequence[jax.Array],
    steps: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
) -> jax.Array:
    """What each unit's own step gains, one float32 vector; NaN where not finite.

    The decrease of the loss to first order, ``max(0, -sum(g * u))``, of gradients g
    and the steps u that an optimizer would add to the params (ElasticTrainer, Huang et
    al., 2023). `kept` are the axes of each leaf that units lie along.
    """
    return join(
        [
            element_gains(g, u, tuple(a for a in range(g.ndim) if a not in k))
            for g, u, k in zip(leaves, steps, kept, strict=True)
        ]
    )


def element_gains(g: jax.Array, u: jax.Array, axes: tuple[int, ...] = ()) -> jax.Array:
    """`gains` where each element is a unit, shaped like the leaf; or summed over axes.

    The gain is in units of the loss, so scales as in `magnitudes` are not needed:
    products below 2**-126 are nothing. Beyond 2**96 they count as that, and no sum of
    2**31 of them overflows.
    """
    g, u = lax.stop_gradient((g, u))
    products = _product(jnp.real(g), jnp.real(u))
    if jnp.iscomplexobj(g):
        products = products + _product(jnp.imag(g), jnp.imag(u))
    return jnp.maximum(0.0 - jnp.sum(products, axis=axes), 0.0)  # NaN stays


def _product(g: jax.Array, u: jax.Array) -> jax.Array:
    finite = jnp.isfinite(g) & jnp.isfinite(u)
    if jnp.float64 in (g.dtype, u.dtype):  # which can be beyond float32
        g, u = (jnp.clip(x, -_MOST, _MOST) for x in (g, u))
    product = g.astype(jnp.float32) * u.astype(jnp.float32)
    return jnp.where(finite, jnp.clip(product, -(2.0**96), 2.0**96), jnp.nan)


def _varies(x: jax.Array) -> bool:
    """Whether, inside of `jax.shard_map`, `x` differs along an axis of the mesh."""
    kind = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)
    return bool(getattr(kind, "varying", None) or getattr(kind, "vma", None))


def _modulus(g: jax.Array) -> jax.Array:
    size = jnp.abs(lax.stop_gradient(g))
    if size.dtype == jnp.float64 or jnp.iscomplexobj(g):
        # What is finite itself may be beyond float32, or of infinite modulus.
        size = jnp.where(jnp.isfinite(g), jnp.minimum(size, _MOST), size)
    return size.astype(jnp.float32)


def _sum(g: jax.Array, axes: tuple[int, ...], scale: jax.Array, name: str) -> jax.Array:
    """What the magnitude `name` is made from, for each unit of a leaf."""
    plain = jnp.issubdtype(g.dtype, jnp.floating) and g.dtype != jnp.float64
    size = (g.astype(jnp.float32) if plain else _modulus(g)) * scale
    size = jnp.abs(size) if name in ("l1", "mean") else jnp.square(size)
    total = jnp.sum(size, axis=axes)
    n = max(math.prod(g.shape[a] for a in axes), 1)
    return total / n if name in ("mean", "rms") else total


def _relative(size: jax.Array, peak: jax.Array) -> jax.Array:
    """``size / peak``, in [0, 1]."""
    # XLA may multiply by 1 / peak, which is flushed to zero from 2**126 on.
    down = jnp.where(peak > 1.0, 0.125, 1.0).astype(jnp.float32)
    return size * down / jnp.maximum(peak * down, jnp.finfo(jnp.float32).tiny)

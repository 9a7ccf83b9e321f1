"""From quotas to steps: how often each unit is updated at each step of a cycle.

    m_u(r) = q_u // R + [(q_u mod R) > rank(r)],    summed over r: q_u

with a fixed ranking of the steps, so that the sets of active units are nested: a
unit with the larger quota is active wherever one with a smaller quota is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check_count


def schedule(quotas: jax.typing.ArrayLike, recalc_every: int) -> jax.Array:
    r"""Spread quotas over the steps of a cycle.

    .. math::
      m_u(r) = \lfloor q_u / R \rfloor + [(q_u \bmod R) > rank(r)]

    where `rank` orders the steps by bit reversal, cut to R: step 0 first, then the
    middle of the cycle, then the quarters. A unit with quota 3 of R = 10 is updated
    at steps spread over the cycle; the sets of active units are nested, and every
    unit with a quota is active at step 0.

    Args:
      quotas: updates per cycle, any shape, integer dtype, not negative.
      recalc_every: R, the number of steps in a cycle, at least 1.

    Returns:
      Multiplicities, shape ``(recalc_every, *quotas.shape)``, dtype int32; the sum
      over the leading axis is `quotas`.

    Raises:
      ValueError: `recalc_every` is less than 1.
      TypeError: `recalc_every` is no integer, or `quotas` are not.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import schedule
      >>> print(schedule(jnp.array([1, 3, 6]), recalc_every=4))
      [[1 1 2]
       [0 1 1]
       [0 1 2]
       [0 0 1]]
    """
    check_count("recalc_every", recalc_every, least=1, static=True)
    quotas = jnp.asarray(quotas)
    if not jnp.issubdtype(quotas.dtype, jnp.integer):
        raise TypeError(f"quotas must be integers, got dtype {quotas.dtype}")
    rank = jnp.asarray(ranking(recalc_every))
    steps = jnp.arange(recalc_every).reshape((-1,) + (1,) * quotas.ndim)
    return multiplicity(quotas[None], rank, steps)


def multiplicity(quotas: jax.Array, rank: jax.Array, r: jax.Array) -> jax.Array:
    """Updates of each unit at step `r` of a cycle of ``rank.size`` steps, int32."""
    quotas = quotas.astype(jnp.int32)
    whole = quotas // rank.size
    return whole + (quotas - whole * rank.size > rank[r]).astype(jnp.int32)


def ranking(recalc_every: int) -> np.ndarray:
    """`rank(r)`: the place of each step in bit-reversal order, shape ``(R,)``."""
    width = max(recalc_every - 1, 1).bit_length()
    order = [int(f"{i:0{width}b}"[::-1], 2) for i in range(2**width)]
    rank = np.empty(recalc_every, np.int32)
    rank[[r for r in order if r < recalc_every]] = np.arange(recalc_every)
    return rank

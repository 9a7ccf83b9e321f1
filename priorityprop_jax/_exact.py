"""Exact arithmetic in uint32: integers of several words, and floats as integers.

An allocation must not depend on the backend, on the order of a sum, or on whether
64-bit types are switched on, so it is computed in integers. A wide number is a tuple
of uint32 arrays of one shape, least significant word first. A float32 is its bit
pattern, which orders like the number as long as it is positive, and which may run on
past infinity: the exponent field just gets wider.
"""

import jax
import jax.numpy as jnp
from jax import lax


Words = tuple[jax.Array, ...]


def u32(x: jax.typing.ArrayLike) -> jax.Array:
    """`x` as uint32, whatever the default integer type is."""
    return jnp.uint32(x) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32)


def widen(x: Words, n: int) -> Words:
    """The same number in exactly `n` words (high words are cut off or zero)."""
    return (x + (jnp.zeros_like(x[0]),) * n)[:n]


def add(x: Words, y: Words) -> Words:
    """`x + y`, modulo 2**(32 * words); both have the same number of words."""
    out, carry = [], jnp.uint32(0)
    for a, b in zip(x, y, strict=True):
        low = a + b
        total = low + carry
        carry = (low < a).astype(jnp.uint32) | (total < low).astype(jnp.uint32)
        out.append(total)
    return tuple(out)


def negate(x: Words) -> Words:
    """`-x`, in two's complement."""
    one = (jnp.ones_like(x[0]),) + (jnp.zeros_like(x[0]),) * (len(x) - 1)
    return add(tuple(~a for a in x), one)


def sub(x: Words, y: Words) -> Words:
    """`x - y`, modulo 2**(32 * words)."""
    return add(x, negate(y))


def mul32(a: jax.Array, b: jax.Array) -> Words:
    """The full product of two words."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    low, mid, cross = a0 * b0, a1 * b0, a0 * b1
    carry = (low >> 16) + (mid & 0xFFFF) + (cross & 0xFFFF)
    high = a1 * b1 + (mid >> 16) + (cross >> 16) + (carry >> 16)
    return a * b, high


def mul(x: Words, y: Words, n: int) -> Words:
    """`x * y` in `n` words."""
    zero = jnp.zeros_like(x[0] + y[0])
    out = (zero,) * n
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            if i + j < n:
                low, high = mul32(a, b)
                out = add(out, widen((zero,) * (i + j) + (zero + low, zero + high), n))
    return out


def less(x: Words, y: Words) -> jax.Array:
    """`x < y`, as unsigned numbers."""
    out = jnp.asarray(False)
    for a, b in zip(x, y, strict=True):
        out = (a < b) | ((a == b) & out)
    return out


def signed(x: jax.Array) -> Words:
    """An int32 as three words, in two's complement."""
    high = jnp.where(x < 0, u32(0xFFFFFFFF), u32(0))
    return u32(x), high, high


def is_negative(x: Words) -> jax.Array:
    """Whether a two's complement number is below zero."""
    return (x[-1] >> 31) == 1


def to_float(x: Words) -> jax.Array:
    """The nearest float32 or so of an unsigned number (relative error < 2**-21)."""
    out = jnp.float32(0)
    for a in reversed(x):
        out = out * jnp.float32(2.0**32) + a.astype(jnp.float32)
    return out


def shift_left(x: Words, bits: jax.Array, n: int) -> Words:
    """`x * 2**bits` in `n` words; `bits` is a traced integer in [0, 32 * n)."""
    bits = u32(bits)
    power = tuple(
        jnp.where(bits // 32 == i, u32(1) << (bits % 32), u32(0)) for i in range(n)
    )
    return mul(power, x, n)


def mantissa(bits: jax.Array) -> jax.Array:
    """The number is ``mantissa * 2**(exponent - 150)``, subnormal or not."""
    fraction = bits & 0x7FFFFF
    return jnp.where(bits >= 1 << 23, fraction | (1 << 23), fraction)


def exponent(bits: jax.Array) -> jax.Array:
    """See `mantissa`."""
    return jnp.maximum(bits >> 23, 1)


def fixed_point(bits: jax.Array, window: jax.Array) -> Words:
    """A float in units of 2**-32 of the last place at the exponent of `window`.

    Two words; `bits` must not exceed `window`. Exact down to 2**-32 of the window;
    what lies below is rounded to odd, so that it stays visible in comparisons.
    """
    m, d = mantissa(bits), exponent(window) - exponent(bits)
    past = jnp.minimum(jnp.maximum(d, 32) - 32, 31)
    near = jnp.where(d == 0, u32(0), m << (32 - jnp.clip(d, 1, 32)))
    lost = (m & ((u32(1) << past) - 1)) != 0
    low = jnp.where(d <= 32, near, (m >> past) | u32(lost))
    return low, jnp.where(d < 24, m >> jnp.minimum(d, 31), u32(0))


def scale_up(bits: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The smallest float that is at least ``x * a / b``, for a scalar and a <= b."""
    m, e = mantissa(bits), exponent(bits)
    ratio = m.astype(jnp.float32) * (a.astype(jnp.float32) / b.astype(jnp.float32))
    pattern = lax.bitcast_convert_type(ratio, jnp.uint32)
    power = (pattern >> 23).astype(jnp.int32) + e.astype(jnp.int32) - 150
    normal = u32(power << 23) + (pattern & 0x7FFFFF)
    under = mantissa(pattern) >> u32(jnp.clip(1 - power, 0, 31))
    guess = jnp.where(power >= 1, normal, under)
    # Off by a few units in the last place, depending on the backend: try them all.
    near = guess - jnp.minimum(guess, 6) + lax.iota(jnp.uint32, 13)
    gap = jnp.clip(e.astype(jnp.int32) - exponent(near).astype(jnp.int32), 0, 63)
    target = shift_left(mul32(m, a), gap, 4)
    reached = widen(mul32(mantissa(near), b), 4)
    below = less(reached, target) & (near < bits)
    found = near[0] + jnp.sum(below, dtype=jnp.uint32)
    return jnp.where(a > 0, found, u32(0))

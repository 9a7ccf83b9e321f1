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
    """The same number in `n` words."""
    return x + (jnp.zeros_like(x[0]),) * (n - len(x))


def add(x: Words, y: Words) -> Words:
    """`x + y`, modulo 2**(32 * words); both have the same number of words."""
    out, carry = [], u32(0)
    for a, b in zip(x, y, strict=True):
        partial = a + b
        total = partial + carry
        carry = u32((partial < a) | (total < partial))
        out.append(total)
    return tuple(out)


def sub(x: Words, y: Words) -> Words:
    """`x - y`, modulo 2**(32 * words)."""
    out, borrow = [], u32(0)
    for a, b in zip(x, y, strict=True):
        partial = a - b
        out.append(partial - borrow)
        borrow = u32((a < b) | (partial < borrow))
    return tuple(out)


def mul32(a: jax.Array, b: jax.Array) -> Words:
    """The product of two words, in two words."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    mid, cross = a1 * b0, a0 * b1
    carry = (a0 * b0 >> 16) + (mid & 0xFFFF) + (cross & 0xFFFF)
    return a * b, a1 * b1 + (mid >> 16) + (cross >> 16) + (carry >> 16)


def scale(a: jax.Array, x: Words) -> Words:
    """`a * x`, for one word and a number; one word longer than `x`."""
    out, carry = [], u32(0)
    for word in x:
        low, high = mul32(a, word)
        total = low + carry
        carry = high + u32(total < low)
        out.append(total)
    return (*out, carry)


def shift_left(x: jax.Array, bits: jax.Array) -> Words:
    """`x * 2**bits` for one word, in three words; bits in [0, 64)."""
    by = bits % 32
    low, high = x << by, jnp.where(by == 0, u32(0), x >> ((32 - by) % 32))
    zero, near = u32(0), bits < 32
    return (
        jnp.where(near, low, zero),
        jnp.where(near, high, low),
        jnp.where(near, zero, high),
    )


def less(x: Words, y: Words) -> jax.Array:
    """`x < y`, as unsigned numbers with the same number of words."""
    out = x[0] < y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        out = (a < b) | ((a == b) & out)
    return out


def to_float(x: Words) -> jax.Array:
    """The float32 of an unsigned number, with a relative error below 2**-21."""
    out = x[-1].astype(jnp.float32)
    for a in reversed(x[:-1]):
        out = out * jnp.float32(2.0**32) + a.astype(jnp.float32)
    return out


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
    gap = jnp.maximum(e, exponent(near)) - exponent(near)
    a0, a1 = mul32(m, a)  # below 2**55, and shifted by as much as a / b is small
    low, high = shift_left(a0, gap), shift_left(a1, gap)
    target = add((*low, u32(0)), (u32(0), *high))
    reached = widen(mul32(mantissa(near), b), 4)
    below = less(reached, target) & (near < bits)
    found = near[0] + jnp.sum(below, dtype=jnp.uint32)
    return jnp.where(a > 0, found, u32(0))

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


def add(x: Words, y: Words) -> Words:
    """`x + y`, modulo 2**(32 * words); both have the same number of words."""
    out = [x[0] + y[0]]
    carry = out[0] < x[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        partial = a + b
        out.append(partial + u32(carry))
        carry = (partial < a) | (out[-1] < partial)
    return tuple(out)


def sub(x: Words, y: Words) -> Words:
    """`x - y`, modulo 2**(32 * words)."""
    out = [x[0] - y[0]]
    borrow = x[0] < y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        partial = a - b
        out.append(partial - u32(borrow))
        borrow = (a < b) | (partial < out[-1])
    return tuple(out)


def mul32(a: jax.Array, b: jax.Array) -> Words:
    """The product of two words, in two words."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    mid, cross = a1 * b0, a0 * b1
    carry = (a0 * b0 >> 16) + (mid & 0xFFFF) + (cross & 0xFFFF)
    return a * b, a1 * b1 + (mid >> 16) + (cross >> 16) + (carry >> 16)


def scale(a: jax.Array, x: Words) -> Words:
    """`a * x`, for one word and a number; one word longer than `x`."""
    low, carry = mul32(a, x[0])
    out = [low]
    for word in x[1:]:
        low, high = mul32(a, word)
        out.append(low + carry)
        carry = high + u32(out[-1] < low)
    return (*out, carry)


def scale_short(a: jax.Array, x: Words) -> Words:
    """`scale` for a number below 2**16, modulo 2**(32 * words)."""
    out, carry = [], jnp.zeros_like(a)
    for word in x:
        low, high = a * (word & 0xFFFF) + carry, a * (word >> 16)
        out.append(low + (high << 16))
        carry = (high >> 16) + u32(out[-1] < low)
    return tuple(out)


def less(x: Words, y: Words) -> jax.Array:
    """`x < y`, as unsigned numbers with the same number of words."""
    out = x[0] < y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        out = (a < b) | ((a == b) & out)
    return out


def length(x: Words) -> jax.Array:
    """The number of binary digits, uint32."""
    out = u32(0)
    for i, word in enumerate(x):
        out = jnp.where(word > 0, u32(32 * i + 32) - lax.clz(word), out)
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

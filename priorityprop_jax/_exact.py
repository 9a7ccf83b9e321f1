"""Exact arithmetic in uint32: integers of several words, and floats as integers.

An allocation must not depend on the backend, on the order of a sum, or on whether
64-bit types are switched on, so it is computed in integers. A wide number is a tuple
of uint32 arrays of one shape, least significant word first. A float32 is its bit
pattern, which orders like the number as long as it is positive, and which may run on
past infinity: the exponent field just gets wider.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


Words = tuple[jax.Array, ...]


def u32(x: jax.typing.ArrayLike) -> Any:
    """`x` as uint32, whatever the default integer type is.

    A Python int becomes a NumPy scalar, as `x + 1` is traced as an addition and a
    conversion of the 1.
    """
    return np.uint32(x) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32)


_HALF, _LOW = np.uint32(16), np.uint32(0xFFFF)  # of a word
_FIELD = np.uint32(23)  # where the exponent begins
_NONE, _ONE, _WORD = np.uint32(0), np.uint32(1), np.uint32(32)


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


def halves(x: jax.Array) -> Words:
    """The low and the high 16 bits of a word."""
    return x & _LOW, x >> _HALF


def shift(x: Words, bits: int) -> Words:
    """``x * 2**bits``, for less than 32 bits; one word longer than `x`."""
    if bits == 0:
        return (*x, jnp.zeros_like(x[-1]))
    up, down = np.uint32(bits), np.uint32(32 - bits)
    carried = [word >> down for word in x]
    lower = [a << up | b for a, b in zip(x[1:], carried[:-1], strict=True)]
    return (x[0] << up, *lower, carried[-1])


def mul32(a: jax.Array, b: jax.Array) -> Words:
    """The product of two words, in two words."""
    (a0, a1), (b0, b1) = halves(a), halves(b)
    mid, cross = a1 * b0, a0 * b1
    carry = (a0 * b0 >> _HALF) + (mid & _LOW) + (cross & _LOW)
    high = (mid >> _HALF) + (cross >> _HALF) + (carry >> _HALF)
    return a * b, a1 * b1 + high


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
        low, high = a * (word & _LOW) + carry, a * (word >> _HALF)
        out.append(low + (high << _HALF))
        carry = (high >> _HALF) + u32(out[-1] < low)
    return tuple(out)


def less(x: Words, y: Words) -> jax.Array:
    """`x < y`, as unsigned numbers with the same number of words."""
    out = x[0] < y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        out = (a < b) | ((a == b) & out)
    return out


def length(x: Words) -> jax.Array:
    """The number of binary digits, uint32."""
    out = _WORD - lax.clz(x[0])
    for i, word in enumerate(x[1:], 2):
        out = jnp.where(word > _NONE, u32(32 * i) - lax.clz(word), out)
    return out


def to_float(x: Words) -> jax.Array:
    """The float32 of an unsigned number, with a relative error below 2**-21."""
    out = x[-1].astype(jnp.float32)
    for a in reversed(x[:-1]):
        out = out * jnp.float32(2.0**32) + a.astype(jnp.float32)
    return out


def mantissa(bits: jax.Array) -> jax.Array:
    """The number is ``mantissa * 2**(exponent - 150)``, subnormal or not."""
    one = _ONE << _FIELD
    fraction = bits & (one - _ONE)
    return jnp.where(bits >= one, fraction | one, fraction)


def exponent(bits: jax.Array) -> jax.Array:
    """See `mantissa`."""
    return jnp.maximum(bits >> _FIELD, _ONE)


def fixed_point(bits: jax.Array, window: jax.Array) -> Words:
    """A float in units of 2**-32 of the last place at the exponent of `window`.

    Two words; `bits` must not exceed `window`. Exact down to 2**-32 of the window;
    what lies below is rounded to odd, so that it stays visible in comparisons.
    """
    m, d = mantissa(bits), exponent(window) - exponent(bits)
    most = _WORD - _ONE
    past = jnp.minimum(jnp.maximum(d, _WORD) - _WORD, most)
    near = jnp.where(d == _NONE, _NONE, m << (_WORD - jnp.clip(d, _ONE, _WORD)))
    lost = (m & ((_ONE << past) - _ONE)) != _NONE
    low = jnp.where(d <= _WORD, near, (m >> past) | u32(lost))
    return low, jnp.where(d <= _FIELD, m >> jnp.minimum(d, most), _NONE)

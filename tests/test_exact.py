"""Wide integers against Python's, and floats as integers against rationals."""

from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from priorityprop_jax import _exact as exact


BATCH = 32  # numbers to an example: one shape, so that everything compiles once
WORD = 2**32
BEYOND = 320 << 23  # the exponent field runs on past infinity

property_test = hypothesis.settings(deadline=None, max_examples=50)

words = st.one_of(
    st.sampled_from([0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, WORD - 1]),
    st.integers(0, WORD - 1),
)
# Subnormal, normal and past-infinity patterns, and the first and last of an exponent.
patterns = st.one_of(
    st.integers(0, BEYOND),
    st.integers(0, 1 << 24),
    st.builds(lambda e, d: (e << 23) + d, st.integers(1, 319), st.integers(-2, 2)),
)


def batch(elements, *shape):
    return hnp.arrays(np.uint32, (*shape, BATCH), elements=elements, fill=st.nothing())


def wide(n):
    """A batch of numbers of `n` words."""
    return batch(words, n).map(tuple)


def integers(x):
    """The numbers that tuples of words stand for."""
    columns = np.stack([np.asarray(w) for w in x], axis=-1).tolist()
    return [sum(w << (32 * i) for i, w in enumerate(column)) for column in columns]


def value(bits):
    """The number that a bit pattern stands for, with exponents past infinity."""
    field, fraction = bits >> 23, bits & 0x7FFFFF
    significand = fraction + (1 << 23 if field else 0)
    return significand * Fraction(2) ** (max(field, 1) - 150)


add, sub, less = map(jax.jit, (exact.add, exact.sub, exact.less))
scale = jax.jit(exact.scale)
fixed_point = jax.jit(exact.fixed_point)
scale_short = jax.jit(exact.scale_short)
length = jax.jit(exact.length)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@hypothesis.given(data=st.data())
@property_test
def test_sums_and_differences(n, data):
    x, y = data.draw(wide(n)), data.draw(wide(n))
    pairs = list(zip(integers(x), integers(y), strict=True))
    assert integers(add(x, y)) == [(a + b) % WORD**n for a, b in pairs]
    assert integers(sub(x, y)) == [(a - b) % WORD**n for a, b in pairs]


@pytest.mark.parametrize("n", [1, 2, 3])
@hypothesis.given(data=st.data())
@property_test
def test_comparison(n, data):
    x, y = data.draw(wide(n)), data.draw(wide(n))
    # Random numbers differ in the last word already: let high words agree now and then.
    same = data.draw(st.integers(0, n))
    y = (*y[: n - same], *x[n - same :])
    expected = [a < b for a, b in zip(integers(x), integers(y), strict=True)]
    assert less(x, y).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 3])
@hypothesis.given(data=st.data())
@property_test
def test_product_with_a_word(n, data):
    a, x = data.draw(batch(words)), data.draw(wide(n))
    pairs = zip(a.tolist(), integers(x), strict=True)
    assert integers(scale(a, x)) == [a * b for a, b in pairs]


@pytest.mark.parametrize("n", [1, 2, 3])
@hypothesis.given(data=st.data())
@property_test
def test_product_with_a_short_number(n, data):
    short = st.sampled_from([0, 1, 2**16 - 1]) | st.integers(0, 2**16 - 1)
    a, x = data.draw(batch(short)), data.draw(wide(n))
    pairs = zip(a.tolist(), integers(x), strict=True)
    assert integers(scale_short(a, x)) == [a * b % WORD**n for a, b in pairs]


@pytest.mark.parametrize("n", [1, 2, 3])
@hypothesis.given(data=st.data())
@property_test
def test_number_of_digits(n, data):
    x = data.draw(wide(n))
    x = (*x[:-1], x[-1] * (data.draw(st.integers(0, 1))))
    assert length(x).tolist() == [a.bit_length() for a in integers(x)]


@pytest.mark.parametrize("bits", [0, 1, 16, 31])
@hypothesis.given(x=wide(2))
@property_test
def test_shift(bits, x):
    found = exact.shift(tuple(map(jnp.asarray, x)), bits)
    assert integers(found) == [a << bits for a in integers(x)]


@hypothesis.given(x=batch(words))
@property_test
def test_halves(x):
    low, high = exact.halves(jnp.asarray(x))
    assert (low < 2**16).all() and (high < 2**16).all()
    np.testing.assert_array_equal(low + (high << 16), x)


@hypothesis.given(x=batch(words), y=batch(words))
@property_test
def test_product_of_two_words(x, y):
    expected = [a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert integers(exact.mul32(jnp.asarray(x), jnp.asarray(y))) == expected


@hypothesis.given(x=wide(3))
@property_test
def test_to_float_is_near(x):
    for a, b in zip(integers(x), exact.to_float(x).tolist(), strict=True):
        assert abs(a - Fraction(b)) * 2**21 <= a


@hypothesis.given(bits=batch(patterns))
@property_test
def test_mantissa_and_exponent(bits):
    m, e = exact.mantissa(jnp.asarray(bits)), exact.exponent(jnp.asarray(bits))
    pairs = zip(m.tolist(), e.tolist(), strict=True)
    found = [m * Fraction(2) ** (e - 150) for m, e in pairs]
    assert found == [value(b) for b in bits.tolist()]


def test_mantissa_and_exponent_are_those_of_numpy():
    floats = np.array([0, 1e-45, 1e-39, 1.1754944e-38, 0.1, 1, 3e38], np.float32)
    assert [value(int(b)) for b in floats.view(np.uint32)] == [
        Fraction(float(f)) for f in floats
    ]


@hypothesis.given(bits=batch(patterns), window=batch(patterns))
@property_test
def test_fixed_point_is_exact_or_rounded_to_odd(bits, window):
    bits, window = np.minimum(bits, window), np.maximum(bits, window)
    found = integers(fixed_point(bits, window))
    for b, w, number in zip(bits.tolist(), window.tolist(), found, strict=True):
        units = value(b) * 2**32 / Fraction(2) ** (max(w >> 23, 1) - 150)
        floor = units.numerator // units.denominator
        assert number == (floor if units == floor else floor | 1), f"{b=:#x} {w=:#x}"
        assert number < 2**56

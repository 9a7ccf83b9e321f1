"""Magnitudes without overflow, and the scores that can be chosen by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax import Score
from priorityprop_jax._scores import (
    element_magnitudes,
    MAGNITUDES,
    magnitudes,
    ScoreInputs,
    SCORES,
)
from references_cycle import exact_magnitude, units_of


NORMAL = np.random.default_rng(0).normal(size=(3, 4, 2))
TINY = float(np.finfo(np.float32).tiny)


def magnitude(leaf, kept, name):
    """Of one leaf, as an array over the axes that are kept; None for elements."""
    if kept is None:
        return element_magnitudes(leaf)
    return magnitudes([leaf], [kept], name).reshape([leaf.shape[a] for a in kept])


def assert_like_reference(leaf, kept, rtol=1e-6):
    """All magnitudes of all units of a leaf, against float64 loops over elements."""
    wide = np.asarray(leaf)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64)
    for name in MAGNITUDES:
        got = magnitude(leaf, kept, name)
        assert got.dtype == jnp.float32
        assert got.shape == tuple(leaf.shape[a] for a in kept)
        expected = [exact_magnitude(unit, name) for unit in units_of(wide, kept)]
        np.testing.assert_allclose(np.ravel(got), expected, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("kept", [(), (0,), (2,), (0, 2), (0, 1, 2)])
def test_every_magnitude_of_every_unit(kept):
    assert_like_reference(jnp.asarray(NORMAL, jnp.float32), kept)


@pytest.mark.parametrize("scale", [1e37, 1e19, 1e-19, 1e-36])
def test_no_overflow_and_no_underflow(scale):
    # Squares of all of these are infinite or zero in float32.
    assert_like_reference(jnp.asarray(scale * NORMAL, jnp.float32), ())


def test_squares_of_the_extremes():
    values = jnp.array([1e38, -1e38, 1e-38, 0.0], jnp.float32)
    got = {name: float(magnitude(values, (), name)) for name in MAGNITUDES}
    assert got == pytest.approx(
        {
            "l2": 1e38 * 2**0.5,
            "l1": 2e38,
            "mean": 0.5e38,
            "rms": 1e38 * 0.5**0.5,
            "max": 1e38,
        },
        rel=1e-6,
    )
    # Normal float32 numbers just above the subnormal ones.
    small = jnp.full((4,), 1.2e-38, jnp.float32)
    assert float(magnitude(small, (), "l2")) == pytest.approx(2.4e-38, rel=1e-6)
    assert float(magnitude(small, (), "rms")) == pytest.approx(1.2e-38, rel=1e-6)


def test_larger_than_float32_is_its_largest_number():
    values = jnp.full((100,), 3e38, jnp.float32)
    for name in ("l1", "l2"):
        assert magnitude(values, (), name) == jnp.finfo(jnp.float32).max
    assert float(magnitude(values, (), "mean")) == pytest.approx(3e38, rel=1e-6)
    assert float(magnitude(values, (), "rms")) == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_half_precision_is_summed_in_float32(dtype, scale):
    # In float16 the sum of squares overflows from 65504 on; in bfloat16 it has 8 bits.
    leaf = jnp.asarray(scale * NORMAL, dtype)
    assert_like_reference(leaf, ())
    assert_like_reference(leaf, (1,))
    many = jnp.ones((5000,), dtype)
    assert float(magnitude(many, (), "l1")) == 5000.0


@pytest.mark.parametrize("scale", [1.0, 1e37, 1e-36])
def test_complex_by_modulus(scale):
    leaf = jnp.asarray(scale * (NORMAL + 1j * NORMAL[::-1]), jnp.complex64)
    assert_like_reference(leaf, ())
    assert_like_reference(leaf, (0, 1, 2))


def test_float64_beyond_float32():
    with jax.enable_x64(True):
        assert_like_reference(jnp.asarray(NORMAL, jnp.float64), ())
        huge = jnp.array([1e300, 1.0])
        for name in ("l2", "l1", "max"):
            got = magnitude(huge, (), name)
            assert got.dtype == jnp.float32
            assert got == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("kept", [(), None])
def test_finite_numbers_of_infinite_modulus(kept):
    values = jnp.array([3e38 + 3e38j], jnp.complex64)
    got = magnitude(values, kept, "max")
    np.testing.assert_array_equal(jnp.ravel(got), [jnp.finfo(jnp.float32).max])


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_nan_of_that_unit_alone(name, bad):
    leaf = jnp.ones((3, 4), jnp.float32).at[1, 2].set(bad)
    np.testing.assert_array_equal(
        jnp.isnan(magnitude(leaf, (0,), name)), [False, True, False]
    )
    assert jnp.isnan(magnitude(leaf, (), name))
    assert jnp.isnan(magnitude(leaf, None, name)).sum() == 1


@pytest.mark.parametrize("name", MAGNITUDES)
def test_leaves_of_all_sizes_together(name):
    """Units of one scale do not lend it to the others."""
    scales = [1.0, 1e-30, 1e30, 1e-12, 1e37, 0.0, np.nan, 1e14, 1e-36]
    leaves = [jnp.asarray(scale * NORMAL, jnp.float32) for scale in scales]
    kept = [(), (0,), (1, 2), (), (2,), (0,), (1,), (), ()]
    got = magnitudes(leaves, kept, name)
    each = [
        units_of(np.asarray(g, np.float64), k)
        for g, k in zip(leaves, kept, strict=True)
    ]
    expected = [exact_magnitude(unit, name) for units in each for unit in units]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert magnitudes([], [], name).shape == (0,)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_zeros_scalars_and_nothing(name):
    assert magnitude(jnp.zeros((3, 2)), (), name) == 0
    assert magnitude(jnp.array(-2.5), (), name) == 2.5
    assert magnitude(jnp.zeros((0, 3)), (), name) == 0
    assert magnitude(jnp.zeros((0, 3)), (1,), name).shape == (3,)
    np.testing.assert_array_equal(
        magnitude(jnp.array([[-1.0, 2.0]]), None, name), [[1.0, 2.0]]
    )


@pytest.mark.parametrize("name", MAGNITUDES)
def test_derivative_is_zero_and_no_nan(name):
    g = jax.grad(lambda x: magnitude(x, (), name))(jnp.array([0.0, 3.0]))
    np.testing.assert_array_equal(g, [0.0, 0.0])


def inputs(**given):
    """Four units after some training."""
    fields = dict(
        magnitudes=jnp.array([4.0, 0.5, 0.0, 2.0]),
        counts=jnp.array([3, 0, 7, 1], jnp.int32),
        depth_factors=jnp.array([1.0, 2.0, 1.5, 1.25]),
        index=jnp.arange(4, dtype=jnp.uint32),
        units=4,
        offset=0,
        peak=jnp.float32(4.0),
        cycle=jnp.int32(6),
        step=jnp.int32(60),
        seed=0,
    )
    return ScoreInputs(**{**fields, **given})


def scores(name, **given):
    x = inputs(**given)
    rule = SCORES[name]
    got, state = rule.update(x, rule.init(x.magnitudes))
    assert state == ()
    assert got.dtype == jnp.float32
    assert got.shape == x.magnitudes.shape
    return np.asarray(got)


def test_the_formulas_by_hand():
    np.testing.assert_allclose(scores("priority"), [1.0, 1.0, 0.0, 1.25])
    np.testing.assert_array_equal(scores("gradient"), [4.0, 0.5, 0.0, 2.0])
    np.testing.assert_array_equal(scores("uniform"), [1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(scores("cyclic"), [0.0, 0.0, 1.0, 0.0])
    gains = np.array([1.0, 0.125, 0.0, 0.5])
    explore = np.sqrt(np.log(61) / np.array([4.0, 1.0, 8.0, 2.0]))
    np.testing.assert_allclose(scores("ucb"), gains + explore, rtol=1e-6)


def test_priority_of_the_largest_float_does_not_overflow():
    largest = jnp.full((4,), jnp.finfo(jnp.float32).max)
    counts = jnp.full((4,), 2**31 - 1, jnp.int32)
    got = scores("priority", magnitudes=largest, counts=counts)
    assert np.isfinite(got).all()
    assert (got > 0).all()


def test_ucb_of_zero_gradients_prefers_what_was_served_least():
    got = scores("ucb", magnitudes=jnp.zeros(4), peak=jnp.float32(0))
    assert np.isfinite(got).all()
    assert got.argmax() == 1
    assert got.argmin() == 2


@pytest.mark.parametrize("peak", [3e38, 2e-38])
def test_ucb_at_the_ends_of_float32(peak):
    none = dict(counts=jnp.zeros(4, jnp.int32), step=jnp.int32(0))
    relative = jnp.array([1.0, 0.75, 0.0, 0.875])
    got = scores("ucb", magnitudes=peak * relative, peak=jnp.float32(peak), **none)
    np.testing.assert_allclose(got, relative, rtol=1e-6)


def test_cyclic_takes_one_after_another():
    turns = [scores("cyclic", cycle=jnp.int32(c)) for c in range(8)]
    np.testing.assert_array_equal(turns, np.tile(np.eye(4), (2, 1)))


def test_random_differs_by_seed_cycle_and_place_and_nothing_else():
    first = scores("random")
    assert ((first > 0) & (first <= 1)).all()
    assert len(set(first.tolist())) == 4
    np.testing.assert_array_equal(
        first, scores("random", magnitudes=jnp.ones(4), counts=jnp.zeros(4, jnp.int32))
    )
    for other in (dict(seed=1), dict(cycle=jnp.int32(7)), dict(offset=4)):
        assert (first != scores("random", **other)).all(), other


def test_random_is_uniform():
    n = 20_000
    got = scores("random", magnitudes=jnp.zeros(n))
    # Mean and variance within five standard errors.
    assert abs(got.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(got.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5


def test_a_score_survives_inject_hyperparams():
    """What is a function would be called as a schedule, a pair of them is not."""
    assert not callable(Score(lambda m: (), lambda x, s: (x.magnitudes, s)))
    assert all(isinstance(rule, Score) for rule in SCORES.values())

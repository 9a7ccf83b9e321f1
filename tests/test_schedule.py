"""Quotas over the steps of a cycle: all handed out, nested, and spread."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax._schedule import multiplicity, ranking, schedule
from references import exact_schedule


CYCLES = [1, 2, 3, 8, 10, 31, 33]


@functools.cache
def every_multiplicity(recalc_every):
    """The quotas from 0 to some more than three a step, and their schedule."""
    quotas = np.arange(3 * recalc_every + 2, dtype=np.int32)
    return quotas, np.asarray(schedule(quotas, recalc_every))


@pytest.mark.parametrize("recalc_every", CYCLES)
def test_equals_the_reference(recalc_every):
    quotas, times = every_multiplicity(recalc_every)
    expected = exact_schedule(quotas.tolist(), recalc_every)
    np.testing.assert_array_equal(times, expected)


def test_by_hand():
    # 0..9 by their mirrored digits: 0, 8, 4, 2, 6, 1, 9, 5, 3, 7.
    np.testing.assert_array_equal(ranking(10), [0, 5, 3, 8, 2, 7, 4, 9, 1, 6])
    np.testing.assert_array_equal(
        schedule(jnp.array([0, 1, 3, 10, 13]), 10).T,
        [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 1, 0, 0, 0, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [2, 1, 1, 1, 2, 1, 1, 1, 2, 1],
        ],
    )


@pytest.mark.parametrize("recalc_every", CYCLES)
def test_sum_over_the_cycle_is_the_quota(recalc_every):
    quotas, times = every_multiplicity(recalc_every)
    np.testing.assert_array_equal(times.sum(0), quotas)
    assert times.min() == 0
    assert (times.max(0) - times.min(0) <= 1).all()


@pytest.mark.parametrize("recalc_every", CYCLES)
def test_a_larger_quota_is_active_wherever_a_smaller_one_is(recalc_every):
    _, times = every_multiplicity(recalc_every)
    assert (np.diff(times, axis=1) >= 0).all()


@pytest.mark.parametrize("recalc_every", [*range(1, 70), 128, 1000])
def test_rank_is_a_permutation_that_starts_with_step_zero(recalc_every):
    rank = ranking(recalc_every)
    assert rank[0] == 0
    assert sorted(rank.tolist()) == list(range(recalc_every))


@pytest.mark.parametrize("recalc_every", [*range(1, 70), 100, 128])
def test_updates_are_spread_evenly(recalc_every):
    rank = ranking(recalc_every)
    for quota in range(1, recalc_every + 1):
        steps = np.flatnonzero(rank < quota).tolist()
        gaps = [b - a for a, b in itertools.pairwise([*steps, recalc_every])]
        assert max(gaps) * quota < 2 * recalc_every, f"{quota=} {gaps=}"
        # The gap to the next cycle may be shorter: there the bit reversal is cut.
        assert max(gaps) <= 2 * min(gaps[:-1] or gaps), f"{quota=} {gaps=}"


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shape_and_dtype(shape, x64):
    del x64
    quotas = jnp.full(shape, 5, jnp.int32)
    times = schedule(quotas, 4)
    assert times.dtype == jnp.int32
    assert times.shape == (4, *shape)
    np.testing.assert_array_equal(times.sum(0), quotas)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_any_integer_dtype(dtype):
    times = schedule(np.array([0, 1, 7, 120], dtype), 120)
    np.testing.assert_array_equal(times.sum(0), [0, 1, 7, 120])


def test_largest_quota_and_cycle():
    largest = 2**31 - 1
    times = np.asarray(schedule(jnp.array([largest]), 1000), np.int64)
    assert times.sum() == largest


def test_one_step_of_a_cycle_under_jit():
    quotas = jnp.arange(40)
    rank = jnp.asarray(ranking(10))
    step = jax.jit(lambda r: multiplicity(quotas, rank, r))
    rows = [step(r) for r in range(10)]
    np.testing.assert_array_equal(rows, exact_schedule(range(40), 10))


@pytest.mark.parametrize("recalc_every", [0, -3])
def test_cycle_out_of_range(recalc_every):
    with pytest.raises(ValueError, match=rf"recalc_every must .* got {recalc_every}$"):
        schedule(jnp.array([1]), recalc_every)


@pytest.mark.parametrize("recalc_every", [2.0, True, None, "10"])
def test_cycle_of_the_wrong_type(recalc_every):
    with pytest.raises(TypeError, match=rf"recalc_every must .* got {recalc_every!r}"):
        schedule(jnp.array([1]), recalc_every)


def test_traced_cycle_tells_how_to_make_it_static():
    with pytest.raises(TypeError, match=r"static_args=\('recalc_every',\)"):
        jax.jit(schedule)(jnp.array([1]), 10)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_quotas_must_be_integers(dtype):
    with pytest.raises(TypeError, match=f"quotas must be integers, got dtype {dtype}"):
        schedule(jnp.ones(3, dtype), 10)

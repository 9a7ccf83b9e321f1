"""Budgets: numbers of updates, shares, schedules; and those that cannot be spent."""

import math
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import prioritize, priority_prop
from priorityprop_jax._budget import check_budget, resolve


def five():
    return {i: np.ones(2, np.float32) for i in range(5)}


@pytest.mark.parametrize("budget", [1, 7, 2**31 - 1, np.int64(7), np.uint8(7)])
def test_integers_are_numbers_of_updates(budget):
    check_budget(budget)
    assert int(resolve(budget, jnp.int32(0), 5, 10)) == int(budget)
    assert int(resolve(jnp.int32(budget), jnp.int32(0), 5, 10)) == int(budget)


@pytest.mark.parametrize(
    "share", [1.0, 0.5, 0.3, 0.1, 1e-6, 0.999999, 1 / 3, np.float32(0.7)]
)
@pytest.mark.parametrize(("units", "cycle"), [(5, 10), (1, 1), (7, 3), (1000, 100)])
def test_shares_of_updating_all_units_at_all_steps(share, units, cycle):
    check_budget(share)
    decimal = Fraction(str(share)) if share != 1 / 3 else Fraction(1, 3)
    expected = math.ceil(decimal * units * cycle)
    assert int(resolve(share, jnp.int32(0), units, cycle)) == expected
    traced = jax.jit(lambda b: resolve(b, jnp.int32(0), units, cycle))(share)
    assert traced.dtype == jnp.int32
    assert int(traced) == expected


def test_a_share_of_one_unit_is_never_nothing():
    assert resolve(1e-9, jnp.int32(0), 1, 1) == 1
    assert resolve(jnp.float32(1e-9), jnp.int32(0), 1, 1) == 1
    assert resolve(jnp.bfloat16(0.01), jnp.int32(0), 1, 10) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_injected_shares_of_any_dtype(dtype):
    assert resolve(jnp.asarray(0.5, dtype), jnp.int32(0), 8, 10) == 40
    assert resolve(jnp.asarray(1.0, dtype), jnp.int32(0), 8, 10) == 80


def test_no_units_no_updates():
    assert resolve(0.5, jnp.int32(0), 0, 10) == 0
    assert resolve(jnp.float32(0.5), jnp.int32(0), 0, 10) == 0


def test_shares_of_very_many_units_saturate():
    assert 2**31 - 129 <= int(resolve(1.0, jnp.int32(0), 2**30, 10)) < 2**31
    assert 2**31 - 129 <= int(resolve(jnp.float32(1), jnp.int32(0), 2**30, 10)) < 2**31


def test_schedules_of_the_step():
    shares = optax.linear_schedule(1.0, 0.5, 10)
    assert resolve(shares, jnp.int32(0), 4, 10) == 40
    assert resolve(shares, jnp.int32(10), 4, 10) == 20
    numbers = lambda step: 7 + step
    assert resolve(numbers, jnp.int32(10), 4, 10) == 17
    assert resolve(lambda step: 0.25, jnp.int32(10), 4, 10) == 10


@pytest.mark.parametrize("make", [priority_prop, lambda b: prioritize(optax.sgd(1), b)])
@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (2**31, ValueError),
        (0.0, ValueError),
        (-0.5, ValueError),
        (1.5, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (np.float32(2), ValueError),
        (jnp.int32(0), ValueError),
        (jnp.float32(np.nan), ValueError),
        (True, TypeError),
        ("0.5", TypeError),
        (None, TypeError),
        (1j, TypeError),
        ([1], TypeError),
        (jnp.array([1, 2]), TypeError),
        (jnp.array(True), TypeError),
    ],
)
def test_bad_budgets_are_named_with_what_is_allowed(make, budget, error):
    with pytest.raises(error) as e:
        make(budget)
    message = str(e.value)
    assert "budget must be a positive integer" in message
    assert "a float in (0, 1]" in message
    assert "got " in message
    if not isinstance(budget, np.generic | jax.Array):  # printed in various ways
        assert str(budget) in message


def warnings_of(**settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        priority_prop(**settings).init(five())
        prioritize(optax.sgd(1.0), **settings).init(five())
    assert all(w.category is UserWarning for w in caught)
    assert all(w.filename == __file__ for w in caught), "the caller's line"
    return [str(w.message) for w in caught]


def test_too_small_a_budget_warns_once_with_numbers():
    first, second = warnings_of(budget=9, min_updates=2)
    assert first == second
    assert "budget=9 is less than min_updates=2 for each of 5 units" in first
    assert "lower bound is dropped" in first


def test_too_large_a_budget_warns_once_with_numbers():
    first, second = warnings_of(budget=10**9, max_updates=20)
    assert first == second
    assert "budget=1000000000 is more than max_updates=20 for each of 5 units" in first
    assert f"{10**9 - 100} updates per cycle stay unspent" in first


def test_shares_warn_with_their_number_of_updates():
    for message in warnings_of(budget=0.05, min_updates=1, recalc_every=10):
        assert "budget=0.05 (3 updates per cycle) is less than min_updates=1" in message
    for message in warnings_of(budget=1.0, max_updates=4, recalc_every=10):
        assert "budget=1.0 (50 updates per cycle) is more than max_updates=4" in message
    assert len(warnings_of(budget=1.0, max_updates=4, recalc_every=10)) == 2


@pytest.mark.parametrize("budget", [10, 100, 0.2, 1.0, lambda step: 1])
def test_budgets_that_can_be_spent_do_not_warn(budget):
    assert warnings_of(budget=budget, min_updates=2, max_updates=20) == []

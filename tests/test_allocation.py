"""Quotas against rational arithmetic, and every promise about them by itself."""

import functools
import itertools
from typing import NamedTuple

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from priorityprop_jax._allocation import allocate, allocate_leaves
from references import exact_quotas


METHODS = ["argsort", "bisect"]
SIZES = [1, 2, 3, 7, 40, 300]  # few, because each of them compiles anew
LARGEST = 2**31 - 1

property_test = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
each_method = pytest.mark.parametrize("method", METHODS)


class Problem(NamedTuple):
    scores: np.ndarray
    budget: int
    low: int
    high: int

    def solve(self, method):
        return np.asarray(allocate(*self, method=method), np.int64)


def floats(low, high):
    return st.floats(np.float32(low).item(), np.float32(high).item(), width=32)


scores_of_a_kind = st.sampled_from(
    [
        floats(0, 1),
        floats(0, 2e-38),  # most of them subnormal
        st.floats(-30, 30).map(lambda e: 10.0**e),
        st.integers(0, 4).map(float),
        st.sampled_from([0, 1, 3, 1e-30, 1e-44, 2e-45, 1e-3, 1e10, 1e38]),
        st.floats(width=32),  # negative, infinite and NaN
    ]
)


def scores_of(size):
    def arrays(elements):
        # Without the default `fill` almost all scores of a large array are ties.
        fill = st.nothing() if size <= 40 else None
        return hnp.arrays(np.float32, size, elements=elements, fill=fill)

    def many(seed):
        rng = np.random.default_rng(seed)
        spread = rng.choice([0.1, 1, 10, 30])
        scores = 10.0 ** rng.uniform(-spread, spread, size)
        return np.where(rng.random(size) < 0.1, 0, scores).astype(np.float32)

    kinds = scores_of_a_kind.flatmap(arrays)
    return kinds if size <= 40 else kinds | st.integers(0, 2**32 - 1).map(many)


@st.composite
def problems(draw, sizes=SIZES, scores=scores_of):
    size = draw(st.sampled_from(sizes))
    low = draw(st.sampled_from([0, 1, 2, 5]) | st.integers(0, 10**4))
    high = low + draw(st.sampled_from([0, 1, 3, 19, 200]) | st.integers(0, 10**9))
    high = max(high, 1)
    most = min(size * high, LARGEST - 3)
    budget = draw(
        st.integers(0, most + 3)  # some not feasible
        | st.integers(min(size * low, most), min(size * max(3 * low, 9), most))
        | st.sampled_from([size * low, most, 0, 10**9])
    )
    return Problem(draw(scores(size)), min(budget, LARGEST), low, high)


# Against the reference


@each_method
@hypothesis.given(problem=problems())
@property_test
def test_equals_rational_arithmetic(method, problem):
    assert problem.solve(method).tolist() == exact_quotas(*problem)


@pytest.mark.parametrize(
    ("scores", "budget", "low", "high", "expected"),
    [
        ([4, 2, 1, 0], 15, 1, 20, [8, 4, 2, 1]),
        ([3, 2, 1], 6, 0, 9, [3, 2, 1]),
        ([1, 1, 1], 4, 1, 20, [2, 1, 1]),  # ties by position
        ([0, 0, 0], 8, 1, 20, [3, 3, 2]),
        ([5, 5, 1], 2, 1, 20, [1, 1, 0]),  # too little for the lower bound
        ([1, 2], 50, 1, 20, [20, 20]),  # 10 remain unspent
        ([9, 0, 0, 0], 32, 1, 20, [20, 4, 4, 4]),  # zeros share what is left
        ([np.nan, 1, np.inf, -1], 8, 1, 20, [1, 5, 1, 1]),
        ([7], 13, 1, 20, [13]),
        ([1e-45, 1e38], 30, 1, 29, [1, 29]),
        ([1, 2], 0, 1, 20, [0, 0]),
        ([1, 3], 10**9, 1, 10**9, [250_000_000, 750_000_000]),
        ([1, 1], LARGEST, 0, LARGEST, [2**30, 2**30 - 1]),
        ([], 10, 1, 20, []),
    ],
)
@each_method
def test_by_hand(method, scores, budget, low, high, expected):
    problem = Problem(np.array(scores, np.float32), budget, low, high)
    assert exact_quotas(*problem) == expected
    assert problem.solve(method).tolist() == expected


# The promises, one by one


@each_method
@hypothesis.given(problem=problems())
@property_test
def test_budget_is_spent_to_the_unit(method, problem):
    quotas = problem.solve(method)
    assert quotas.sum() == min(problem.budget, quotas.size * problem.high)


@each_method
@hypothesis.given(problem=problems())
@property_test
def test_quotas_keep_the_bounds(method, problem):
    quotas = problem.solve(method)
    dropped = problem.budget < quotas.size * problem.low
    assert quotas.min() >= (0 if dropped else problem.low)
    assert quotas.max() <= problem.high


@each_method
@hypothesis.given(problem=problems())
@property_test
def test_higher_score_never_gets_less(method, problem):
    quotas = problem.solve(method)
    scores = np.where(np.isfinite(problem.scores), problem.scores, 0).clip(0)
    for _, group in itertools.groupby(sorted(zip(scores, quotas, strict=True))):
        del group
    order = np.lexsort((quotas, scores))
    rises = np.diff(scores[order]) > 0
    assert (np.diff(quotas[order])[rises] >= 0).all()


@each_method
@hypothesis.given(problem=problems())
@property_test
def test_equal_scores_differ_by_one_at_most_and_the_first_get_more(method, problem):
    quotas = problem.solve(method)
    for score in np.unique(problem.scores):
        steps = np.diff(quotas[problem.scores == score])
        assert (steps <= 0).all()
        assert steps.sum() >= -1


@each_method
@hypothesis.given(problem=problems(), power=st.integers(-150, 150))
@property_test
def test_scaling_by_a_power_of_two_changes_nothing(method, problem, power):
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.ldexp(problem.scores, power)
        exact = np.ldexp(scaled, -power)
    hypothesis.assume(np.isfinite(scaled).sum() == np.isfinite(problem.scores).sum())
    np.testing.assert_array_equal(
        problem.solve(method),
        problem._replace(scores=scaled).solve(method),
    )


@each_method
@hypothesis.given(problem=problems(), score=floats(1e-45, 3e38))
@property_test
def test_no_score_is_as_good_as_equal_scores(method, problem, score):
    zeros, equal = np.zeros_like(problem.scores), np.full_like(problem.scores, score)
    np.testing.assert_array_equal(
        problem._replace(scores=zeros).solve(method),
        problem._replace(scores=equal).solve(method),
    )


@hypothesis.given(problem=problems())
@property_test
def test_methods_agree(problem):
    np.testing.assert_array_equal(problem.solve("argsort"), problem.solve("bisect"))

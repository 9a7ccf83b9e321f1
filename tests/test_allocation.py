"""Quotas against rational arithmetic, and every promise about them by itself."""

from typing import NamedTuple

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from priorityprop_jax._allocation import (
    allocate,
    allocate_leaves,
    are_few,
    score_bits,
)
from references import exact_quotas, exact_scores


METHODS = ["argsort", "bisect"]
SIZES = [1, 4, 300]  # few, because each of them compiles anew
LARGEST = 2**31 - 1

property_test = hypothesis.settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,  # that is compilation
        hypothesis.HealthCheck.function_scoped_fixture,  # how to compile, for all
    ],
)
each_method = pytest.mark.parametrize("method", METHODS)
# Where the values have been checked as compiled by default.
quick = pytest.mark.usefixtures("quick_compilation")


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
        fill = st.nothing() if size <= 4 else None
        return hnp.arrays(np.float32, size, elements=elements, fill=fill)

    def many(seed):
        rng = np.random.default_rng(seed)
        spread = rng.choice([0.1, 1, 10, 30])
        scores = 10.0 ** rng.uniform(-spread, spread, size)
        return np.where(rng.random(size) < 0.1, 0, scores).astype(np.float32)

    kinds = scores_of_a_kind.flatmap(arrays)
    return kinds if size <= 4 else kinds | st.integers(0, 2**32 - 1).map(many)


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
        ([3, 2, 1, 0], 6, 0, 9, [3, 2, 1, 0]),
        ([1, 1, 1, 1], 6, 1, 20, [2, 2, 1, 1]),  # ties by position
        ([0, 0, 0, 0], 11, 1, 20, [3, 3, 3, 2]),
        ([1, 5, 5, 5], 2, 1, 20, [0, 1, 1, 0]),  # too little for the lower bound
        ([1, 2, 3, 4], 99, 1, 20, [20, 20, 20, 20]),  # 19 remain unspent
        ([9, 0, 0, 0], 32, 1, 20, [20, 4, 4, 4]),  # zeros share what is left
        ([np.nan, 1, np.inf, -1], 8, 1, 20, [1, 5, 1, 1]),
        ([1e-45, 0, 1e38, 0], 30, 1, 27, [1, 1, 27, 1]),
        ([1, 2, 3, 4], 0, 1, 20, [0, 0, 0, 0]),
        ([1, 3, 0, 0], 10**9, 0, 10**9, [250_000_000, 750_000_000, 0, 0]),
        ([1, 0, 1, 0], LARGEST, 0, LARGEST, [2**30, 0, 2**30 - 1, 0]),
        ([7], 13, 1, 20, [13]),
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
    order = np.lexsort((quotas, scores))  # within a score by quota
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
    with np.errstate(all="ignore"):
        scaled = np.ldexp(problem.scores, power)
        exact = np.isfinite(scaled) & (np.ldexp(scaled, -power) == problem.scores)
    before = problem._replace(scores=np.where(exact, problem.scores, 0))
    after = problem._replace(scores=np.where(exact, scaled, 0))
    np.testing.assert_array_equal(before.solve(method), after.solve(method))


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


# Cut into leaves

CUTS = {
    "small": [(), (0,), (2, 3, 4), (0, 3), (1, 5)],
    "large": [(3,), (11, 27)],
}


jitted_allocate_leaves = jax.jit(allocate_leaves, static_argnames="few")


@quick
@pytest.mark.parametrize("shapes", CUTS.values(), ids=CUTS)
@hypothesis.given(data=st.data())
@hypothesis.settings(property_test, max_examples=40)
def test_leaves_get_what_one_vector_gets(shapes, data):
    sizes = [int(np.prod(shape)) for shape in shapes]
    problem = data.draw(problems([sum(sizes)]))
    parts = np.split(problem.scores, np.cumsum(sizes)[:-1])
    leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    found = jitted_allocate_leaves(leaves, *problem[1:], few=are_few(problem.high))
    assert [leaf.shape for leaf in found] == shapes
    assert {leaf.dtype for leaf in found} == {jnp.dtype("int32")}
    flat = np.concatenate([np.ravel(leaf) for leaf in found])
    assert flat.tolist() == exact_quotas(*problem)


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 3), (0,)]])
def test_leaves_without_units(shapes):
    found = allocate_leaves([jnp.zeros(shape) for shape in shapes], 10, 1, 20)
    assert [leaf.shape for leaf in found] == shapes


# Under transformations, and in other dtypes


@quick
@each_method
def test_traces_once_for_all_values(method):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(scores, budget, low, high):
        return allocate(scores, budget, low, high, method=method)

    rng = np.random.default_rng(0)
    for budget in [0, 1, 3, 4, 30, 79, 80, 90, 10**9]:
        for low, high in [(1, 20), (0, 1), (7, 7), (0, 10**9)]:
            scores = rng.random(4, np.float32)
            found = solve(scores, budget, low, high)
            assert found.tolist() == exact_quotas(scores, budget, low, high)


@quick
@each_method
@hypothesis.given(batch=st.lists(problems([4]), min_size=8, max_size=8))
@hypothesis.settings(property_test, max_examples=20)
def test_vmap_over_everything(method, batch):
    solve = jax.vmap(lambda *x: allocate(*x, method=method))
    scores, *numbers = (np.stack(column) for column in zip(*batch, strict=True))
    found = solve(scores, *numbers)
    assert found.tolist() == [exact_quotas(*problem) for problem in batch]


@quick
def test_derivative_is_that_of_a_constant():
    def loss(scores):
        return jnp.sum(allocate(scores, 50) * scores)

    scores = jnp.array([3.0, 0.0, jnp.nan, 1.0])
    assert jax.grad(loss)(scores).tolist() == exact_quotas(scores, 50, 1, 20)


@quick
@each_method
def test_with_and_without_64_bit_types(method, x64):
    scores = jnp.asarray(10.0 ** np.array([-300, -30, -10, 0]))
    assert scores.dtype == (jnp.float64 if x64 else jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        for budget, high in [(30, 20), (77, 20), (77, LARGEST), (10**9, 10**9)]:
            found = allocate(scores, budget, 1, high, method)
            assert found.dtype == jnp.int32
            assert found.tolist() == exact_quotas(scores, budget, 1, high)


@quick
def test_dtype_of_budget_and_bounds(x64):
    budget, low, high = np.array([100, 1, 60], "int64" if x64 else "uint8")
    scores = np.arange(4, dtype=np.float32)
    found = allocate(scores, budget, low, high)
    assert found.tolist() == exact_quotas(scores, 100, 1, 60)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("bfloat16", [0, 1, -5, 1 / 3, 1e38, 1e-40, np.nan, np.inf, -np.inf]),
        ("float16", [0, 1, -5, 1 / 3, 6e4, 6e-8, np.nan, np.inf, -np.inf]),
        ("float32", [0, -0.0, 1, -5, 3e38, 1e-45, np.nan, -np.nan, np.inf, -np.inf]),
        ("float64", [0, 1, -5, np.pi, 1e300, -1e300, 1e-300, 1e-30, np.nan]),
        ("int32", [0, 1, -5, 2**24 + 1, 2**24 + 3, 2**31 - 1, -(2**31)]),
        ("uint8", [0, 1, 255]),
        ("bool", [False, True]),
    ],
)
def test_scores_are_read_as_float32(dtype, values, x64):
    del x64
    scores = np.asarray(values).astype(jnp.dtype(dtype))
    with np.errstate(over="ignore"):
        bits = np.asarray(score_bits(jnp.asarray(scores)))
    floats = bits.view(np.float32).tolist()
    assert floats == exact_scores(scores)


# Many units, where a float32 sum loses some


@each_method
def test_a_million_units(method):
    rng = np.random.default_rng(2)
    scores = rng.lognormal(sigma=3, size=10**6).astype(np.float32)
    quotas = Problem(scores, 18_000_001, 1, 20).solve(method)
    assert quotas.sum() == 18_000_001  # no float32
    assert (quotas.min(), quotas.max()) == (1, 20)
    assert (np.diff(quotas[np.argsort(scores)]) >= 0).all()


@each_method
def test_a_million_units_with_few_scores(method):
    scores = np.random.default_rng(3).choice([0, 1, 2, 3, 0.1], 10**6)
    problem = Problem(scores.astype(np.float32), 7_654_321, 2, 13)
    np.testing.assert_array_equal(problem.solve(method), exact_quotas(*problem))


@pytest.mark.parametrize(
    "size", [10**6, pytest.param(2**24 + 3, marks=pytest.mark.slow)]
)
@each_method
def test_equal_scores_give_one_more_to_the_first(method, size):
    extra = size // 3
    scores = np.full(size, 0.1, np.float32)
    quotas = Problem(scores, 7 * size + extra, 1, 20).solve(method)
    np.testing.assert_array_equal(quotas, np.where(np.arange(size) < extra, 8, 7))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 5000])
@each_method
def test_rows_are_padded_with_nothing(method, size):
    """Also where units with score zero get what the others cannot take."""
    scores = np.zeros(size, np.float32)
    scores[::7] = 3
    for budget, low in [(10 * size + 3, 0), (19 * size + 3, 2), (2 * size + 1, 1)]:
        problem = Problem(scores, budget, low, 20)
        np.testing.assert_array_equal(problem.solve(method), exact_quotas(*problem))


@pytest.mark.slow
@each_method
def test_ten_million_units(method):
    scores = np.random.default_rng(4).lognormal(sigma=3, size=10**7)
    quotas = Problem(scores.astype(np.float32), 34_567_891, 1, 20).solve(method)
    assert quotas.sum() == 34_567_891
    assert (quotas.min(), quotas.max()) == (1, 20)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": -1}, ValueError, r"budget must be in \[0, 2147483647\], got -1"),
        ({"budget": 2**31}, ValueError, r"budget must be in .* got 2147483648"),
        ({"budget": 0.5}, TypeError, r"budget must be an integer, got 0\.5 of type fl"),
        ({"budget": np.nan}, TypeError, r"budget must be an integer, got nan"),
        ({"budget": True}, TypeError, r"budget must be an integer, got True of type b"),
        ({"budget": None}, TypeError, r"budget must be an integer, got None"),
        (
            {"budget": jnp.float32(5)},
            TypeError,
            r"budget must be an integer scalar, .*5\.",
        ),
        ({"budget": jnp.array([5])}, TypeError, r"budget must be an integer scalar"),
        ({"min_updates": -2}, ValueError, r"min_updates must be in .* got -2"),
        ({"min_updates": "1"}, TypeError, r"min_updates must be an integer, got '1'"),
        ({"max_updates": 0}, ValueError, r"max_updates must be in \[1, .* got 0"),
        ({"max_updates": 2.0}, TypeError, r"max_updates must be an integer, got 2\.0"),
        (
            {"min_updates": 5, "max_updates": 4},
            ValueError,
            r"min_updates must not exceed max_updates, got .*5 > .*4",
        ),
        ({"method": "argsrot"}, ValueError, r"'bisect', got 'argsrot'.* 'argsort'\?"),
        ({"method": None}, TypeError, r"method must be one of 'argsort', .* got None"),
        ({"scores": np.ones((2, 3))}, ValueError, r"scores must .* got \(2, 3\)"),
        ({"scores": 1.0}, ValueError, r"scores must have shape \(units,\), got \(\)"),
    ],
)
def test_bad_input(arguments, error, message):
    good = {"scores": np.ones(3, np.float32), "budget": 10}
    with pytest.raises(error, match=message):
        allocate(**(good | arguments))


def test_traced_budget_of_the_wrong_type():
    with pytest.raises(TypeError, match="budget must be an integer scalar"):
        jax.jit(allocate)(jnp.ones(3), 0.5)


def test_complex_scores_are_an_error():
    with pytest.raises(TypeError, match="scores must be real, got dtype complex64"):
        allocate(np.ones(3, np.complex64), 10)

"""Whole cycles of the engine against a simulation of the rules, unit by unit."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import _priority, DepthFactor, priority_prop, Score
from references_cycle import allocate_exactly, Simulation


# In jax's order: Dense_0, Dense_1, Dense_10, Dense_2; 3, 2, 0, 1 from the loss.
SHAPES = {
    "Dense_0": {"bias": (4,), "kernel": (3, 4)},
    "Dense_1": {"bias": (2,), "kernel": (4, 2)},
    "Dense_10": {"kernel": (2, 3)},
    "Dense_2": {"kernel": (2, 2)},
}
DEPTHS = [3, 3, 2, 2, 0, 1]
BY_DEPTH = [1 + d / 3 for d in DEPTHS]


def tree(values):
    """Named arrays from a list of them."""
    kind = jax.tree.structure(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(kind, list(values))


def leaf_shapes():
    return jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = tree([np.ones(shape, np.float32) for shape in leaf_shapes()])
WHOLE = [()] * 6


def gradients(steps, seed=0):
    """Different leaves lead at different times."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        scales = 10.0 ** rng.uniform(-2, 1, 6)
        yield [
            np.float32(scale * rng.normal(size=shape))
            for scale, shape in zip(scales, leaf_shapes(), strict=True)
        ]


@pytest.fixture
def oracle_quotas(monkeypatch):
    """Allocation has tests of its own, and it takes long to compile."""
    monkeypatch.setattr(_priority, "allocate_vector", allocate_exactly)


def check_cycles(tx, sim, steps, grads=None):
    """Updates, counts, quotas, scores and the rest of the state, at every step."""
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for leaves in grads or gradients(steps):
        updates, state = update(tree(leaves), state)
        times = sim.times(leaves)
        assert int(state.step) == sim.step
        assert int(state.budget) == sim.spent
        np.testing.assert_array_equal(flat(state.quotas), sim.quotas)
        np.testing.assert_array_equal(flat(state.counts), sim.counts)
        np.testing.assert_array_equal(state.nonfinite, sim.nonfinite)
        np.testing.assert_allclose(flat(state.scores), sim.scores, rtol=1e-5)
        for u, g, m in zip(jax.tree.leaves(updates), leaves, times, strict=True):
            g = np.where(m > 0, g, 0)  # 0 * nan
            np.testing.assert_allclose(u, np.float32(m) * g, rtol=1e-6)
    return state


def flat(units):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(units)])


ROWS = tree([(), (0,), (0,), (0, 1), (), (1,)])
EACH = [tuple(range(len(shape))) for shape in leaf_shapes()]
CASES = {
    "defaults": (dict(budget=40), dict(axes=WHOLE)),
    "bisect, more than one a step": (
        dict(budget=35, max_updates=12, recalc_every=4, allocation="bisect"),
        dict(axes=WHOLE),
    ),
    "rows": (
        dict(budget=0.3, max_updates=8, recalc_every=8, units=ROWS, magnitude="mean"),
        dict(axes=[(), (0,), (0,), (0, 1), (), (1,)]),
    ),
    "elements": (
        dict(budget=0.4, min_updates=0, recalc_every=4, units="element"),
        dict(axes=EACH),
    ),
    "elements by bisection": (
        dict(budget=90, max_updates=9, recalc_every=4, units="element", magnitude="l1")
        | dict(allocation="bisect"),
        dict(axes=EACH),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "by bisection" in name else [])
        for name in CASES
    ],
)
def test_cycles_equal_the_simulation(name):
    settings, given = CASES[name]
    same = ("budget", "min_updates", "max_updates", "recalc_every", "magnitude")
    shared = {k: v for k, v in settings.items() if k in same}
    sim = Simulation(factors=BY_DEPTH, **given, **shared)
    check_cycles(priority_prop(**settings), sim, steps=2 * sim.cycle + 2)
    assert len(set(sim.quotas)) > 1


FACTORS = [1.0, 0.5, 3.0, 0.0, 2.0, 1.5]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        (dict(depth_factor=0.0), [1.0] * 6),
        (dict(depth_factor=4), [1 + 4 * d / 3 for d in DEPTHS]),
        (dict(depth_from="input"), [1 + (3 - d) / 3 for d in DEPTHS]),
        (
            dict(depths=tree([9, 9, 0, 1, 3, 2])),
            [2.0, 2.0, 1.0, 1 + 1 / 9, 1 + 3 / 9, 1 + 2 / 9],
        ),
        (
            dict(depths=tree([9, 9, 0, 1, 3, 2]), depth_from="input", depth_factor=2.0),
            [1.0, 1.0, 3.0, 1 + 16 / 9, 1 + 12 / 9, 1 + 14 / 9],
        ),
        (dict(depth_factor=tree(FACTORS)), FACTORS),
        (
            dict(depth_factor=DepthFactor(lambda d, most: 2.0**d + most)),
            [2.0**d + 3 for d in DEPTHS],
        ),
        (
            dict(depth_factor=DepthFactor(lambda d, most: d), depth_from="input"),
            [3.0 - d for d in DEPTHS],
        ),
        (dict(depths=tree([0] * 6)), [1.0] * 6),
    ],
)
def test_depth_factors(settings, factors, oracle_quotas):
    # The first step's scores suffice, and the second cycle's, where counts matter.
    tx = priority_prop(budget=8, max_updates=3, recalc_every=2, **settings)
    sim = Simulation(WHOLE, factors, 8, max_updates=3, recalc_every=2)
    check_cycles(tx, sim, steps=3)


@pytest.mark.parametrize("magnitude", ["l1", "rms", "max"])
def test_magnitudes_reach_the_scores(magnitude, oracle_quotas):
    settings = dict(budget=8, max_updates=3, recalc_every=2, magnitude=magnitude)
    sim = Simulation(WHOLE, BY_DEPTH, **settings)
    check_cycles(priority_prop(**settings), sim, steps=3)


@pytest.mark.parametrize(
    ("score", "rule"),
    [
        ("gradient", lambda g, n, d: g),
        ("uniform", lambda g, n, d: 1.0),
        (
            Score(
                lambda m: (),
                lambda x, s: (x.magnitudes**2 + x.depth_factors + x.counts, s),
            ),
            lambda g, n, d: g * g + d + n,
        ),
    ],
    ids=["gradient", "uniform", "a Score"],
)
def test_other_scores(score, rule, oracle_quotas):
    settings = dict(budget=15, max_updates=4, recalc_every=3)
    tx = priority_prop(**settings, score=score)
    check_cycles(tx, Simulation(WHOLE, BY_DEPTH, **settings, score=rule), steps=7)


@pytest.mark.parametrize("units", ["leaf", "element"])
def test_a_score_may_remember(units, oracle_quotas):
    """Here the mean of the magnitudes of all cycles, by a running sum and a number."""
    mean = Score(
        lambda m: {"sum": m, "n": jnp.zeros_like(m)},
        lambda x, s: (
            (s["sum"] + x.magnitudes) / (s["n"] + 1),
            {"sum": s["sum"] + x.magnitudes, "n": s["n"] + 1},
        ),
    )
    settings = dict(budget=0.5, max_updates=3, recalc_every=2, score=mean)
    tx = priority_prop(**settings, units=units)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    sizes = []
    for step, leaves in enumerate(gradients(6)):
        _, state = update(tree(leaves), state)
        if step % 2 == 0:
            norms = [np.linalg.norm(g) for g in leaves]
            sizes.append(
                norms if units == "leaf" else flat([np.abs(g) for g in leaves])
            )
        np.testing.assert_allclose(flat(state.scores), np.mean(sizes, 0), rtol=1e-5)


def quotas_of(tx, cycles, grads=None):
    """Quotas of each cycle of a transformation with recalc_every=1."""
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    out = []
    for leaves in grads or gradients(cycles):
        _, state = update(tree(leaves), state)
        out.append(flat(state.quotas).tolist())
    return out


@pytest.mark.usefixtures("quick_compilation")
def test_cyclic_visits_all(oracle_quotas):
    tx = priority_prop(4, 0, 4, recalc_every=1, score="cyclic")
    assert quotas_of(tx, 12) == (4 * np.tile(np.eye(6, dtype=int), (2, 1))).tolist()
    tx = priority_prop(4, 0, 4, recalc_every=1, score="cyclic", units="element")
    visited = np.array(quotas_of(tx, 44))
    units = sum(int(np.prod(shape)) for shape in leaf_shapes())
    np.testing.assert_array_equal(visited[:units], 4 * np.eye(units))


@pytest.mark.usefixtures("quick_compilation")
def test_random_is_reproducible_and_differs_by_seed_and_cycle(oracle_quotas):
    def drawn(seed, units="leaf", grads=None):
        tx = priority_prop(
            15, 0, 9, recalc_every=1, score="random", seed=seed, units=units
        )
        return quotas_of(tx, 4, grads)

    first = drawn(0)
    assert first == drawn(0, grads=list(gradients(4, seed=5))), "not by gradients"
    assert first != drawn(-1)
    assert len(set(map(tuple, first))) == 4
    # Leaves of one size must not share their draws.
    by_element = np.array(drawn(0, "element"))
    assert (by_element[:, :4] != by_element[:, 4:8]).any()


def test_ucb(oracle_quotas):
    def rule(g, n, d):
        del d
        return g / sim.peak + np.sqrt(np.log1p(sim.step) / (1 + n))

    settings = dict(budget=14, max_updates=4, recalc_every=3)
    sim = Simulation(WHOLE, BY_DEPTH, **settings, score=rule)
    grads = list(gradients(7))
    tx = priority_prop(**settings, score="ucb")
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for leaves in grads:
        sim.peak = max(np.linalg.norm(g) for g in leaves)
        _, state = update(tree(leaves), state)
        sim(leaves)
        np.testing.assert_allclose(state.scores, sim.scores, rtol=1e-5)
        np.testing.assert_array_equal(state.quotas, sim.quotas)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_gradients_that_are_not_finite(bad, oracle_quotas):
    """Out for that step, then the minimum; the others as if its score were zero."""
    settings = dict(budget=24, min_updates=2, max_updates=8, recalc_every=4)
    grads = list(gradients(10))
    grads[0][1][2, 1] = bad  # first step of the first cycle
    grads[4][3][...] = bad  # and of the second
    grads[4][5][0, 0] = bad
    sim = Simulation(WHOLE, BY_DEPTH, **settings)
    state = check_cycles(priority_prop(**settings), sim, 10, grads)
    assert state.nonfinite.tolist() == [0, 1, 0, 1, 0, 1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert state.quotas[3] == state.quotas[5] == 2

    def first_quotas(g):
        tx = priority_prop(**settings)
        return tx.update(tree(g), tx.init(PARAMS))[1].quotas

    zeroed = [np.where(i == 1, 0, g).astype(np.float32) for i, g in enumerate(grads[0])]
    np.testing.assert_array_equal(first_quotas(grads[0]), first_quotas(zeroed))


def test_a_row_that_is_not_finite_rests_alone(oracle_quotas):
    settings = dict(budget=30, min_updates=1, max_updates=8, recalc_every=4)
    axes = [(), (0,), (0,), (0, 1), (), (1,)]
    grads = list(gradients(5))
    grads[0][1][2, 1] = np.nan
    sim = Simulation(axes, BY_DEPTH, **settings)
    check_cycles(priority_prop(**settings, units=ROWS), sim, 5, grads)
    assert sim.nonfinite == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("units", ["leaf", "element"])
def test_only_the_first_step_of_a_cycle_looks_for_what_is_not_finite(
    units, oracle_quotas
):
    tx = priority_prop(1.0, recalc_every=2, min_updates=1, max_updates=2, units=units)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    _, state = update(PARAMS, state)
    bad = tree([np.full(shape, np.nan, np.float32) for shape in leaf_shapes()])
    updates, state = update(bad, state)
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))
    assert set(flat(state.counts).tolist()) == {2}
    assert not np.any(state.nonfinite)


@pytest.mark.parametrize("units", ["leaf", "element"])
def test_nothing_is_finite(units, oracle_quotas):
    tx = priority_prop(0.5, recalc_every=4, units=units)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    g = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), PARAMS)
    updates, state = update(g, state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert set(flat(state.quotas).tolist()) == {1}
    assert not np.any(flat(state.counts))
    updates, state = update(PARAMS, state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates)), "quota 1 was spent"


def test_zero_gradients_are_equal_scores(oracle_quotas):
    zeros = [np.zeros(shape, np.float32) for shape in leaf_shapes()]
    tx = priority_prop(40, recalc_every=10)
    state = tx.update(tree(zeros), tx.init(PARAMS))[1]
    assert state.quotas.tolist() == [7, 7, 7, 7, 6, 6]


def test_one_unit(oracle_quotas):
    tx = priority_prop(7, recalc_every=10)
    state = tx.init(np.float32(1))
    total = 0
    for _ in range(10):
        u, state = tx.update(np.float32(2), state)
        total += float(u)
    assert total == 14
    assert state.counts.tolist() == state.quotas.tolist() == [7]


def test_a_budget_beyond_all_bounds_gives_all_the_maximum(oracle_quotas):
    with pytest.warns(UserWarning, match="unspent") as caught:
        tx = priority_prop(10**9, max_updates=20)
        state = tx.init(PARAMS)
    assert len(caught) == 1
    state = tx.update(PARAMS, state)[1]
    assert state.quotas.tolist() == [20] * 6
    assert int(state.budget) == 10**9


def test_a_budget_below_all_bounds_serves_the_best_first(oracle_quotas):
    with pytest.warns(UserWarning, match="lower bound is dropped") as caught:
        tx = priority_prop(2, min_updates=1, depth_factor=0.0)
        state = tx.init(PARAMS)
    assert len(caught) == 1
    sizes = [3.0, 1.0, 2.0, 0.1, 2.9, 0.0]
    g = tree(
        [np.full(s, x, np.float32) for s, x in zip(leaf_shapes(), sizes, strict=True)]
    )
    tx = priority_prop(2, min_updates=1, depth_factor=0.0, magnitude="max")
    state = tx.update(g, state)[1]
    assert state.quotas.tolist() == [1, 0, 0, 0, 1, 0]


def test_budgets_on_a_schedule_count_at_the_start_of_a_cycle(oracle_quotas):
    budget = lambda step: 10 + step
    tx = priority_prop(budget, max_updates=9, recalc_every=3)
    sim = Simulation(WHOLE, BY_DEPTH, budget, max_updates=9, recalc_every=3)
    check_cycles(tx, sim, steps=8)
    assert sim.spent == 16


def test_injected_numbers(oracle_quotas):
    """Set from outside between the cycles, without a compilation."""
    make = optax.inject_hyperparams(priority_prop, static_args="recalc_every")
    tx = make(budget=0.5, min_updates=1, max_updates=9, recalc_every=3)
    sim = Simulation(WHOLE, BY_DEPTH, 0.5, max_updates=9, recalc_every=3)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step, leaves in enumerate(gradients(6)):
        if step == 3:
            sim.budget, sim.low, sim.high = 0.75, 2, 4
            state.hyperparams["budget"] = jnp.asarray(0.75, jnp.float32)
            state.hyperparams["min_updates"] = jnp.asarray(2)
            state.hyperparams["max_updates"] = jnp.asarray(4)
        _, state = update(tree(leaves), state)
        sim(leaves)
        found = optax.tree.get(state, "PriorityPropState")
        np.testing.assert_array_equal(found.quotas, sim.quotas)


@pytest.mark.parametrize("kind", ["int keys", "list", "named tuple"])
def test_containers(kind, oracle_quotas):
    Layers = collections.namedtuple("Layers", [f"l{i}" for i in range(12)])
    make = {
        "int keys": lambda xs: dict(enumerate(xs)),
        "list": list,
        "named tuple": lambda xs: Layers(*xs),
    }[kind]
    sizes = np.random.default_rng(0).permutation(12) + 1.0
    g = make([{"w": jnp.full((1,), x, jnp.float32)} for x in sizes])
    tx = priority_prop(60, recalc_every=10)
    state = tx.update(g, tx.init(g))[1]
    factors = 1 + np.arange(11, -1, -1) / 11
    np.testing.assert_allclose(state.scores, sizes * factors, rtol=1e-6)


def test_counts_saturate(oracle_quotas):
    tx = priority_prop(30, max_updates=20, recalc_every=1)
    state = tx.init(PARAMS)
    state = state._replace(counts=jnp.full((6,), 2**31 - 3, jnp.int32))
    _, state = tx.update(PARAMS, state)
    assert min(state.quotas.tolist()) > 2
    assert set(state.counts.tolist()) == {2**31 - 1}

"""A budget in cost: against all subsets, in rational arithmetic, and in training."""

import functools
import itertools
import math
import warnings
from fractions import Fraction
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import active, prioritize, priority_prop, priority_report
from priorityprop_jax._selection import cost_table, cycle_cost, select


pytestmark = pytest.mark.usefixtures("quick_compilation")


class Costs(NamedTuple):
    """As from `backward_costs`, by hand."""

    paths: tuple[str, ...]
    forward: float
    weight: np.ndarray
    groups: np.ndarray
    members: np.ndarray


def costs_of(forward, weight, groups=(), members=()):
    weight, groups = np.asarray(weight, float), np.asarray(groups, float)
    paths = tuple(f"params['p{i:03}']" for i in range(weight.size))
    members = np.asarray(members, bool).reshape(groups.size, weight.size)
    return Costs(paths, float(forward), weight, groups, members)


def members_of(kind, units, rng):
    """Who needs which piece. Unit 0 is next to the input."""
    chain = np.tri(units - 1, units, dtype=bool)
    if kind == "chain":
        return chain
    if kind == "towers":
        half = units // 2
        left, right = np.zeros_like(chain), np.zeros_like(chain)
        left[:, :half] = np.tri(units - 1, half, dtype=bool)
        right[:, half:] = np.tri(units - 1, units - half, dtype=bool)
        return np.concatenate(
            [left[: half - 1], right[: half - 1], np.ones((1, units))]
        )
    return rng.random((units, units)) < rng.choice([0.1, 0.2, 0.4])


def instance(kind, units, seed):
    """Random costs, all of them whole numbers, scores and a feasible budget."""
    rng = np.random.default_rng(seed)
    weights = [
        rng.integers(1, 100, units),  # all kinds of sizes
        np.where(rng.random(units) < 0.3, 1000, rng.integers(1, 30, units)),  # heavy
        np.full(units, 37),  # all alike
    ]
    weight = weights[seed % 3]
    members = members_of(kind, units, rng)
    groups = rng.integers(0, 100, len(members)) * rng.choice([1, 4])
    costs = costs_of(weight.sum() // rng.integers(1, 4), weight, groups, members)
    scores = [
        rng.random(units),
        10 ** rng.uniform(-3, 0, units),
        weight * rng.uniform(0.99, 1.01, units),  # of equal gain per cost
    ]
    return costs, np.float32(scores[seed // 3 % 3]), rng.random()


# The rules, in rational numbers.


def flops(costs, mask):
    needed = [
        c for c, m in zip(costs.groups, costs.members, strict=True) if any(m & mask)
    ]
    parts = [costs.forward, *costs.weight[mask], *needed]
    return sum((Fraction(float(x)) for x in parts), Fraction(0))


def full(costs):
    return flops(costs, np.ones(len(costs.weight), bool))


def spent(costs, quotas, cycle):
    """All steps of a cycle, the first with everything."""
    masks = [np.asarray(quotas) > k for k in range(cycle)]
    masks[0] = np.ones_like(masks[0])
    return sum(flops(costs, mask) for mask in masks)


def least_share(costs, cycle):
    first, idle = full(costs), flops(costs, np.zeros(len(costs.weight), bool))
    return (first + (cycle - 1) * idle) / (cycle * first)


def share_at(costs, cycle, part):
    """A budget between the least feasible one and 1."""
    least = float(least_share(costs, cycle)) * (1 + 1e-12)
    return min(least + (1 - least) * part, 1.0)


@functools.cache
def all_subsets(units):
    return np.array(list(itertools.product([False, True], repeat=units)))


def best_of_all_subsets(costs, scores, budget, cycle):
    """The largest gain with one set in all steps but the first. Costs are integers."""
    sets = all_subsets(len(scores))
    groups = np.zeros(len(sets))
    for c, row in zip(costs.groups, costs.members, strict=True):
        groups += c * (sets & row).any(axis=1)
    cost = costs.forward + sets @ costs.weight + groups
    allowed = (Fraction(budget) * cycle - 1) * full(costs) / (cycle - 1)
    gains = (sets @ scores.astype(float))[cost <= math.floor(allowed)]
    return (cycle - 1) * gains.max()


# One program for many tables: padded with pieces that cost nothing.


@functools.cache
def program(cycle):
    def run(table, scores, total, low, high):
        return select(table._replace(cycle=cycle), scores, total, low, high)

    return jax.jit(run)


def quotas_of(costs, scores, budget, cycle, low=1, high=10**6):
    table = cost_table(costs, cycle)
    total = cycle_cost(table, budget)
    pieces = table.piece.size
    rows = 4 ** max(3, math.ceil(math.log(len(table.depths), 4)))
    columns = len(table.weight) + 1
    depths = np.resize(table.depths, (rows, pieces))
    pad = ((0, 0), (0, columns - pieces))
    padded = table._replace(
        paths=(),
        most=0,
        cycle=0,
        piece=np.pad(table.piece, pad[1]),
        needs=np.pad(table.needs, pad),
        depths=np.pad(depths, pad),
        chain=np.resize(table.chain, rows),
        allowed=np.resize(table.allowed.T, (rows, len(table.weight))).T,
    )
    return np.asarray(program(cycle)(padded, np.float32(scores), total, low, high))


def gain(scores, quotas):
    return float(np.asarray(scores, float) @ (quotas - 1))


@pytest.mark.parametrize("kind", ["chain", "towers", "general"])
@pytest.mark.parametrize("cycle", [2, 3, 10])
def test_as_good_as_the_best_of_all_subsets(kind, cycle):
    for seed in range(60):
        costs, scores, part = instance(kind, 8, seed)
        budget = share_at(costs, cycle, part)
        quotas = quotas_of(costs, scores, budget, cycle)
        assert quotas.min() >= 1 and quotas.max() <= cycle
        assert spent(costs, quotas, cycle) <= Fraction(budget) * cycle * full(costs)
        best = best_of_all_subsets(costs, scores, budget, cycle)
        assert gain(scores, quotas) >= 0.99 * best


def test_as_good_for_twelve_units():
    for seed in range(12):
        costs, scores, part = instance("towers", 12, seed)
        budget = share_at(costs, 4, part)
        quotas = quotas_of(costs, scores, budget, 4)
        assert spent(costs, quotas, 4) <= Fraction(budget) * 4 * full(costs)
        best = best_of_all_subsets(costs, scores, budget, 4)
        assert gain(scores, quotas) >= 0.99 * best


@pytest.mark.parametrize("cycle", [2, 10])
def test_what_fits_exactly_is_taken(cycle):
    """Seven of ten equal units, or the two heavy ones that fill a step together."""
    backward = 10 * 4
    budget = Fraction(cycle * 20 + backward + (cycle - 1) * 28, cycle * (20 + backward))
    if Fraction(float(budget)) < budget:
        budget = Fraction(math.nextafter(float(budget), 1))
    costs = costs_of(20, [4] * 10)
    quotas = quotas_of(costs, np.ones(10), float(budget), cycle)
    assert gain(np.ones(10), quotas) == 7 * (cycle - 1)
    costs = costs_of(20, [14, 14, 15, *[0.5] * 2])  # 15 is best by gain per cost
    scores = np.array([14, 14, 15.5, 1e-6, 1e-6], np.float32)
    total = cycle * 20 + 44 + (cycle - 1) * 28
    budget = math.nextafter(total / (cycle * 64), 1)
    assert gain(scores, quotas_of(costs, scores, budget, cycle)) >= 28 * (cycle - 1)


def best_in_a_chain(costs, scores, budget, cycle):
    """The same as `best_of_all_subsets` for a plain net: the least cost of any gain.

    From the input on: the first unit that is active pays for the chain above.
    """
    allowed = (Fraction(budget) * cycle - 1) * full(costs) / (cycle - 1)
    room = math.floor(allowed) - int(costs.forward)
    best = np.full(room + 1, -np.inf)  # by cost; some unit so far is active
    above = np.array([sum(costs.groups[u:]) for u in range(len(scores))])
    for u, (w, s) in enumerate(zip(costs.weight.astype(int), scores, strict=True)):
        new = best.copy()
        new[w:] = np.maximum(
            new[w:], best[: room + 1 - w] + s if w <= room else new[w:]
        )
        if w + above[u] <= room:
            new[int(w + above[u]) :] = np.maximum(new[int(w + above[u]) :], s)
        best = new
    return (cycle - 1) * max(best.max(), 0)


@pytest.mark.parametrize("units", [13, 40])
def test_many_units_against_the_exact_optimum_for_one_set(units):
    for seed in range(20):
        costs, scores, part = instance("chain", units, seed)
        budget = share_at(costs, 10, part)
        quotas = quotas_of(costs, scores, budget, 10)
        assert spent(costs, quotas, 10) <= Fraction(budget) * 10 * full(costs)
        best = best_in_a_chain(costs, scores.astype(float), budget, 10)
        assert gain(scores, quotas) >= 0.99 * best


def test_the_references_agree():
    for seed in range(20):
        costs, scores, part = instance("chain", 8, seed)
        arguments = costs, scores.astype(float), share_at(costs, 5, part), 5
        found = best_in_a_chain(*arguments), best_of_all_subsets(*arguments)
        np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("kind", ["chain", "towers", "general"])
def test_more_budget_is_never_less_gain(kind):
    for seed in range(6):
        costs, scores, _ = instance(kind, 8, seed)
        shares = [share_at(costs, 10, part) for part in np.linspace(0, 1, 25)]
        gains = [scores @ quotas_of(costs, scores, share, 10) for share in shares]
        assert np.all(gains >= 0.99 * np.maximum.accumulate(gains))
        np.testing.assert_allclose(gains[-1], 10 * scores.sum(), rtol=1e-6)


sizes = st.sampled_from([0.0, 1e-3, 0.3, 1.0, math.pi, 1e6, 3e14]) | st.floats(0, 1e9)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    forward=sizes.filter(bool),
    weight=st.lists(sizes, min_size=6, max_size=6),
    groups=st.lists(sizes, min_size=5, max_size=5),
    seed=st.integers(0, 99),
    share=st.floats(1e-6, 1.0) | st.sampled_from([1.0, 0.5, 0.3, 0.1]),
    wide=st.booleans(),
    low=st.integers(0, 9),
    more=st.integers(1, 9),
)
def test_never_over_budget(forward, weight, groups, seed, share, wide, low, more):
    """Whatever the costs, and whether or not they have a common divisor."""
    copies = 3 if wide else 1  # 18 units are too many for all subsets
    rng = np.random.default_rng(seed)
    members = rng.random((5, 6 * copies)) < rng.choice([0.1, 0.4])
    costs = costs_of(forward, weight * copies, groups, members)
    scores = np.float32(10 ** rng.uniform(-30, 30, 6 * copies))
    quotas = quotas_of(costs, scores, share, 7, low, low + more)
    assert quotas.min() >= 1
    assert quotas.max() <= min(max(low + more, 1), 7)
    allowed = Fraction(share) * 7 * full(costs)
    if spent(costs, np.ones(6 * copies), 7) <= allowed:
        assert spent(costs, quotas, 7) <= allowed
    traced = quotas_of(costs, scores, jnp.float32(share), 7, low, low + more)
    allowed = Fraction(float(np.float32(share))) * 7 * full(costs)
    if spent(costs, np.ones(6 * copies), 7) <= allowed:
        assert spent(costs, traced, 7) <= allowed


def test_scaling_the_scores_changes_nothing():
    for seed in range(10):
        costs, scores, part = instance("chain", 8, seed)
        arguments = share_at(costs, 10, part), 10
        quotas = quotas_of(costs, scores, *arguments)
        for scale in (2.0**-40, 2.0**60):
            scaled = quotas_of(costs, scores * np.float32(scale), *arguments)
            np.testing.assert_array_equal(scaled, quotas)
        third = quotas_of(costs, scores / np.float32(3), *arguments)
        np.testing.assert_allclose(scores @ third, scores @ quotas, rtol=1e-3)


def test_zero_scores():
    costs = costs_of(10, [4] * 8)
    quotas = quotas_of(costs, np.zeros(8), 0.6, 10)
    np.testing.assert_array_equal(quotas, quotas_of(costs, np.ones(8), 0.6, 10))
    assert quotas.max() > 1
    some = np.array([0, 1, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(quotas_of(costs, some, 0.9, 10), 1 + 9 * some)
    alone = costs_of(10, [0.0, 4.0])  # no cost is no reason without a gain
    np.testing.assert_array_equal(quotas_of(alone, [0, 1], 0.9, 10)[0], 1)


def test_bounds_of_the_quotas():
    costs, scores, _ = instance("chain", 8, 1)
    everything = quotas_of(costs, scores, 1.0, 10)
    np.testing.assert_array_equal(everything, 10)
    np.testing.assert_array_equal(quotas_of(costs, scores, 1.0, 10, 1, 4), 4)
    np.testing.assert_array_equal(quotas_of(costs, scores, 1.0, 10, 99, 99), 10)
    np.testing.assert_array_equal(
        quotas_of(costs, scores, float(share_at(costs, 10, 0.25)), 10, 3).min(), 3
    )
    least = float(least_share(costs, 10)) * (1 + 1e-9)
    np.testing.assert_array_equal(quotas_of(costs, scores, least / 2, 10), 1)
    assert quotas_of(costs, scores, least, 10, 5).min() == 1  # the bound is dropped
    np.testing.assert_array_equal(quotas_of(costs, scores, 0.5, 1), 1)


def test_ties_go_to_the_first():
    costs = costs_of(10, [4] * 8)
    quotas = quotas_of(costs, np.ones(8), 0.6, 10)
    assert list(quotas) == sorted(quotas, reverse=True)


def test_the_same_by_any_route(x64):
    """Traced or static budgets, x64 on or off, batched or one by one."""
    costs, _, _ = instance("towers", 8, 4)
    table = cost_table(costs, 10)
    scores = np.float32(np.random.default_rng(0).random((3, 8)))
    one = lambda s, b: select(table, s, cycle_cost(table, b), 1, 20)
    batch = jax.jit(jax.vmap(one, (0, None)))(scores, jnp.float32(0.625))
    assert batch.dtype == jnp.int32
    expected = [quotas_of(costs, s, 0.625, 10) for s in scores]
    np.testing.assert_array_equal(batch, expected)


def test_no_pieces_no_units_no_cost():
    assert quotas_of(costs_of(1, [1.0, 2.0]), [1, 1], 0.9, 4).min() >= 1
    np.testing.assert_array_equal(quotas_of(costs_of(1, [0.0] * 2), [1, 1], 0.5, 4), 1)
    assert select(cost_table(costs_of(0, []), 4), jnp.zeros(0), 1, 1, 4).shape == (0,)
    nothing = cost_table(costs_of(0, [0.0]), 4)
    assert int(cycle_cost(nothing, 0.5)) == 0


# In a transformation.

PARAMS = {f"p{i:03}": jnp.ones(3) for i in range(5)}
CHAIN = costs_of(20, [10, 20, 10, 5, 5], [8, 8, 4, 4], np.tri(4, 5))
KINDS = [priority_prop, functools.partial(prioritize, optax.sgd(0.1))]


def gradients(step):
    rng = np.random.default_rng(step)
    return {k: jnp.float32(rng.normal(size=3) * (i + 1)) for i, k in enumerate(PARAMS)}


@pytest.mark.parametrize("make", KINDS)
def test_whole_cycles_keep_to_the_budget(make):
    tx = optax.chain(make(budget=0.55, recalc_every=5, costs=CHAIN))
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    plain = optax.chain(make(budget=0.55, recalc_every=5)).init(PARAMS)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, plain)
    for cycle in range(3):
        masks = []
        for r in range(5):
            masks.append(np.array(jax.tree.leaves(active(state, PARAMS))))
            updates, state = update(gradients(5 * cycle + r), state, PARAMS)
            moved = [bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)]
            assert moved == list(masks[-1])
        assert masks[0].all() and not all(m.all() for m in masks)
        cost = sum(flops(CHAIN, m) for m in masks)
        assert cost <= Fraction(0.55) * 5 * full(CHAIN)
        report = priority_report(state, PARAMS)
        assert report.budget == sum(leaf.quota for leaf in report.leaves)
        assert report.budget == sum(int(m.sum()) for m in masks)
        assert report.unspent == 0


def test_schedules_and_injected_budgets():
    schedule = lambda step: jnp.where(step < 5, 1.0, 0.5)
    tx = priority_prop(budget=schedule, recalc_every=5, costs=CHAIN)
    inject = optax.inject_hyperparams(
        priority_prop, static_args=("recalc_every", "units")
    )
    injected = inject(budget=0.5, recalc_every=5, costs=CHAIN)

    def run(tx, steps):
        state = tx.init(PARAMS)
        grads = jax.tree.map(lambda *g: jnp.stack(g), *map(gradients, range(steps)))
        return jax.lax.scan(
            lambda s, g: (tx.update(g, s)[1], optax.tree.get(s, "quotas")), state, grads
        )[0]

    state = run(tx, 6)
    np.testing.assert_array_equal(state.counts, 5 + 1)
    assert spent(CHAIN, state.quotas, 5) <= Fraction(0.5) * 5 * full(CHAIN)
    quotas = optax.tree.get(run(injected, 1), "quotas")
    assert 1 < quotas.max() <= 5
    assert spent(CHAIN, quotas, 5) <= Fraction(0.5) * 5 * full(CHAIN)


def test_a_gradient_that_is_not_finite_costs_no_further_step():
    tx = priority_prop(budget=0.8, recalc_every=5, costs=CHAIN)
    grads = gradients(0) | {"p004": jnp.full(3, jnp.nan)}
    _, state = tx.update(grads, tx.init(PARAMS))
    assert state.quotas[4] == 1 and state.counts[4] == 0
    assert state.budget == state.quotas.sum()
    assert spent(CHAIN, state.quotas, 5) <= Fraction(0.8) * 5 * full(CHAIN)


def test_replicas_decide_alike():
    tx = priority_prop(budget=0.55, recalc_every=5, costs=CHAIN, axis_name="x")
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    grads = jax.tree.map(lambda *g: jnp.concatenate(g), gradients(0), gradients(1))

    def step(grads):
        return tx.update(grads, tx.init(PARAMS))[1].quotas

    quotas = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spec("x"), out_specs=spec())
    )
    assert spent(CHAIN, quotas(grads), 5) <= Fraction(0.55) * 5 * full(CHAIN)


def test_init_looks_at_structure_only():
    tx = priority_prop(budget=0.5, costs=CHAIN)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert jax.tree.structure(tx.init(shapes)) == jax.tree.structure(tx.init(PARAMS))
    specs = optax.tree.map_params(tx, lambda p: p, tx.init(PARAMS))
    assert jax.tree.structure(specs) == jax.tree.structure(tx.init(PARAMS))


@pytest.mark.parametrize(
    "paths",
    [
        ["['p{:03}'].value", "params['p{:03}']"],
        ["params.p{:03}", "params['p{:03}']"],
        ["params['params']['p{:03}']", "params['p{:03}']"],
        ["params[<flat index {}>]", "params[{}]"],
    ],
)
def test_only_names_of_paths_are_compared(paths):
    theirs = tuple(paths[0].format(i) for i in range(5))
    number = "{:03}" not in paths[1]
    params = list(PARAMS.values()) if number else PARAMS
    priority_prop(budget=0.5, costs=CHAIN._replace(paths=theirs)).init(params)


# Bad input.


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("budget", [5, 1, np.int64(3), jnp.int32(3)])
def test_numbers_of_updates_are_no_cost(make, budget):
    with pytest.raises(ValueError, match="with costs the budget must be a float"):
        make(budget=budget, costs=CHAIN)


def test_schedules_of_numbers_of_updates_are_no_cost():
    tx = priority_prop(budget=lambda step: 7, costs=CHAIN)
    with pytest.raises(ValueError, match="with costs the budget .* got 7"):
        tx.update(gradients(0), tx.init(PARAMS))


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("units", ["element", {k: (0,) for k in PARAMS}])
def test_units_are_leaves(make, units):
    with pytest.raises(ValueError, match="with costs the units must be 'leaf'"):
        make(budget=0.5, units=units, costs=CHAIN)


@pytest.mark.parametrize("make", KINDS)
def test_costs_are_checked(make):
    with pytest.raises(TypeError, match="costs must be what backward_costs"):
        make(budget=0.5, costs=[1.0, 2.0])
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=r"costs\.weight must be finite"):
            make(budget=0.5, costs=costs_of(1, [1.0, bad]))
        with pytest.raises(ValueError, match=r"costs\.forward must be finite"):
            make(budget=0.5, costs=costs_of(bad, [1.0]))
    with pytest.raises(ValueError, match="recalc_every=.* is too large"):
        make(budget=0.5, recalc_every=2**30, costs=CHAIN)


@pytest.mark.parametrize("make", KINDS)
def test_costs_of_other_params_name_the_first_path(make):
    tx = make(budget=0.5, costs=CHAIN)
    with pytest.raises(ValueError) as e:
        tx.init(dict(list(PARAMS.items())[:3]))
    assert "of 5 leaves for 3" in str(e.value)
    assert "params['p003'] in the costs, missing in the params" in str(e.value)
    other = {("p0030" if k == "p003" else k): v for k, v in PARAMS.items()}
    with pytest.raises(ValueError) as e:
        tx.init(other)
    assert "params['p003'] in the costs, params['p0030'] in the params" in str(e.value)


def warnings_of(**settings: Any):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        priority_prop(costs=CHAIN, **settings).init(PARAMS)
        prioritize(optax.sgd(1.0), costs=CHAIN, **settings).init(PARAMS)
    assert all(w.filename == __file__ for w in caught), "the caller's line"
    return [str(w.message) for w in caught]


def test_too_small_a_budget_warns_with_the_least():
    first, second = warnings_of(budget=0.2, recalc_every=10)
    assert first == second
    assert "only the first step of each cycle trains" in first
    least = float(first.rsplit(" ", 1)[1])
    assert 0 <= least - least_share(CHAIN, 10) <= 1e-4
    assert warnings_of(budget=least, recalc_every=10) == []
    tx = priority_prop(budget=lambda step: 0.2, costs=CHAIN)
    _, state = tx.update(gradients(0), tx.init(PARAMS))
    np.testing.assert_array_equal(state.quotas, 1)


def test_bounds_that_a_budget_cannot_meet_warn():
    for message in warnings_of(budget=0.5, min_updates=5):
        assert "does not pay for min_updates=5 full steps" in message
        assert "lower bound is dropped" in message
    for message in warnings_of(budget=0.95, max_updates=5):
        assert "is more than max_updates=5 full steps in a cycle of 10" in message
    assert len(warnings_of(budget=0.95, max_updates=5)) == 2
    assert warnings_of(budget=0.95) == []
    assert warnings_of(budget=1.0, recalc_every=1) == []

"""`priority_prop` in a chain, and `active`, which tells who is used next."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import _priority, active, prioritize, priority_prop, schedule
from references_cycle import allocate_exactly, Simulation


SHAPES = {"a": (3,), "b": (2, 4), "c": ()}
PARAMS = {k: jnp.ones(shape, jnp.float32) for k, shape in SHAPES.items()}
RNG = np.random.default_rng(0)
GRADS = [
    {
        k: jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)
        for (k, shape), scale in zip(SHAPES.items(), scales, strict=True)
    }
    for scales in 10.0 ** RNG.uniform(-1, 1, size=(9, 3))
]
SETTINGS = dict(budget=6, min_updates=1, max_updates=4, recalc_every=4)


@pytest.fixture(autouse=True)
def quotas_from_the_oracle(monkeypatch):
    """Allocation has tests of its own, and it takes long to compile."""
    monkeypatch.setattr(_priority, "allocate_vector", allocate_exactly)


def simulation(**settings):
    return Simulation([()] * 3, [1.0] * 3, **{**SETTINGS, **settings})


def adam(grads, rate=0.1, b1=0.9, b2=0.999):
    """Adam's updates for one leaf, in float64."""
    mu = nu = 0.0
    for t, g in enumerate(np.float64(grads), 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        yield -rate * (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + 1e-8)


@pytest.mark.parametrize("max_updates", [4, 9])
def test_before_adam_it_sees_zeros_and_multiples(max_updates):
    settings = dict(SETTINGS, max_updates=max_updates, budget=3 * max_updates // 2)
    tx = optax.chain(priority_prop(**settings, depth_factor=0.0), optax.adam(0.1))
    sim = simulation(**settings)
    due = [sim(list(g.values())) for g in GRADS]
    assert 0 in due[1]
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    got = []
    for g in GRADS:
        updates, state = update(g, state)
        got.append(updates)
    for i, k in enumerate(SHAPES):
        seen = [m[i] * np.asarray(g[k]) for m, g in zip(due, GRADS, strict=True)]
        expected = np.array(list(adam(seen)))
        np.testing.assert_allclose([u[k] for u in got], expected, rtol=1e-4, atol=1e-7)
        rests = [m[i] == 0 for m in due]
        assert not any(rests) or np.any(expected[rests]), "it moves on its momentum"


@pytest.mark.parametrize("max_updates", [4, 9])
def test_after_adam_whole_steps_are_multiplied(max_updates):
    settings = dict(SETTINGS, max_updates=max_updates, budget=3 * max_updates // 2)
    # Adam's first steps are all alike (the sign), and rounding would decide.
    tx = optax.chain(
        optax.adam(0.1), priority_prop(**settings, depth_factor=0.0, magnitude="l1")
    )
    steps = {k: list(adam([g[k] for g in GRADS])) for k in SHAPES}
    sim = simulation(**settings, magnitude="l1")
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t, g in enumerate(GRADS):
        updates, state = update(g, state)
        due = sim([steps[k][t] for k in SHAPES])
        for m, k in zip(due, SHAPES, strict=True):
            np.testing.assert_allclose(
                updates[k], m * steps[k][t], rtol=1e-4, atol=1e-7
            )
            if m == 0:
                assert not np.any(updates[k])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_updates_are_multiples_in_their_own_dtype(dtype):
    g = {k: x.astype(dtype) for k, x in GRADS[0].items()}
    tx = priority_prop(9, max_updates=7, recalc_every=2, depth_factor=0.0)
    updates, state = tx.update(g, tx.init(g))
    times = np.asarray(schedule(state.quotas, 2))[0]
    assert times.max() > 1
    for k, m in zip(SHAPES, times, strict=True):
        assert updates[k].dtype == dtype
        assert updates[k].shape == g[k].shape
        np.testing.assert_array_equal(updates[k], jnp.asarray(m, dtype) * g[k])


def test_the_full_budget_is_the_identity():
    tx = priority_prop(1.0, min_updates=4, max_updates=4, recalc_every=4)
    state = tx.init(PARAMS)
    for g in GRADS:
        updates, state = tx.update(g, state)
        jax.tree.map(np.testing.assert_array_equal, updates, g)
    bad = {**GRADS[0], "a": jnp.full((3,), jnp.nan)}
    updates, state = tx.update(bad, tx.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, updates, bad)


def leaf_flags(flags):
    return [bool(x) for x in jax.tree.leaves(flags)]


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.chain(tx, optax.adam(1))]
)
@pytest.mark.parametrize("units", ["leaf", "element", {"a": (0,), "b": (1,), "c": ()}])
def test_active_is_what_the_next_update_will_use(units, wrap):
    axes = {"leaf": [()] * 3, "element": [(0,), (0, 1), ()]}
    axes = axes[units] if isinstance(units, str) else list(units.values())
    settings = dict(SETTINGS, budget=6 if units == "leaf" else 12, min_updates=0)
    tx = wrap(priority_prop(**settings, units=units, depth_factor=0.0))
    sim = Simulation(axes, [1.0] * 3, **settings)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    ask = jax.jit(active)
    rested = False
    for t, g in enumerate(GRADS):
        flags = ask(state, PARAMS)
        assert jax.tree.structure(flags) == jax.tree.structure(PARAMS)
        assert all(x.shape == () and x.dtype == bool for x in jax.tree.leaves(flags))
        assert leaf_flags(flags) == leaf_flags(active(state, PARAMS))
        used = [bool(np.any(m)) for m in sim.times(list(g.values()))]
        rested |= not all(used)
        assert leaf_flags(flags) == ([True] * 3 if t % 4 == 0 else used)
        _, state = update(g, state)
    assert rested


def test_gradients_of_inactive_leaves_do_not_matter():
    tx = prioritize(optax.adam(0.1), **SETTINGS)
    update, state, other = jax.jit(tx.update), tx.init(PARAMS), tx.init(PARAMS)
    for g in GRADS:
        flags = active(other, PARAMS)
        lazy = jax.tree.map(lambda on, x: jnp.where(on, x, jnp.nan), flags, g)
        updates, state = update(g, state, PARAMS)
        found, other = update(lazy, other, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, found, updates)
    jax.tree.map(np.testing.assert_array_equal, other, state)


def test_active_finds_the_one_state_there_is():
    ours = priority_prop(**SETTINGS)
    for tx in (
        ours,
        prioritize(optax.adam(1), **SETTINGS),
        optax.named_chain(("clip", optax.clip(1.0)), ("ours", ours)),
        optax.MultiSteps(ours, 2),
        optax.apply_if_finite(ours, 3),
    ):
        assert leaf_flags(active(tx.init(PARAMS), PARAMS)) == [True] * 3
    with pytest.raises(ValueError, match="no PriorityPropState: is priority_prop or"):
        active(optax.adam(1).init(PARAMS), PARAMS)


def test_active_of_several_states():
    tx = optax.chain(priority_prop(**SETTINGS), priority_prop(12, recalc_every=4))
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS[0], state)
    with pytest.raises(ValueError, match=r"2 PriorityPropStates.*index=0..1"):
        active(state, PARAMS)
    for i in (0, 1):
        alone = active(state[i], PARAMS)
        assert leaf_flags(active(state, PARAMS, index=i)) == leaf_flags(alone)
    with pytest.raises(ValueError, match=r"index must be in \[0, 2\).*got 2"):
        active(state, PARAMS, index=2)


def test_active_under_masked_takes_the_masked_params():
    keep = {"a": True, "b": False, "c": True}
    tx = optax.masked(priority_prop(4, recalc_every=4), keep)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match="params has 3 leaves.*initialized for 2.*masked"
    ):
        active(state, PARAMS)
    masked = {k: p if keep[k] else optax.MaskedNode() for k, p in PARAMS.items()}
    assert jax.tree.structure(active(state, masked)) == jax.tree.structure(masked)
    none = {k: p if keep[k] else None for k, p in PARAMS.items()}
    assert leaf_flags(active(state, none)) == [True, True]


def test_active_takes_shapes():
    tx = priority_prop(**SETTINGS)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert leaf_flags(active(tx.init(PARAMS), shapes)) == [True] * 3


def test_active_by_row():
    """A vector for a leaf with units along its first axis; else as ever."""
    params = {"a": jnp.ones((3, 2, 2)), "b": jnp.ones((4,)), "c": jnp.ones((2, 3))}
    units = {"a": (0,), "b": (), "c": (0, 1)}
    tx = prioritize(optax.sgd(0.1), budget=0.5, max_updates=5, units=units)
    size = lambda *x: jnp.array(x)
    gradients = {
        "a": size(1.0, 9.0, 0.0)[:, None, None] * params["a"],
        "b": 0.1 * params["b"],
        "c": size(5.0, 0.0)[:, None] * size(1.0, 0.0, 2.0)[None],
    }
    _, state = tx.update(gradients, tx.init(params), params)
    state = state.priority
    for r in range(1, 10):
        now = state._replace(step=jnp.int32(r))
        due = np.asarray(state.quotas) > int(state.rank[r])  # the rule, by unit
        whole, rows = active(now, params), active(now, params, units=units)
        np.testing.assert_array_equal(rows["a"], due[:3])
        np.testing.assert_array_equal(rows["c"], due[4:].reshape(2, 3).any(1))
        assert rows["b"].shape == () and bool(rows["b"]) == due[3] == bool(whole["b"])
        assert [bool(whole["a"]), bool(whole["c"])] == [due[:3].any(), due[4:].any()]
    with pytest.raises(ValueError, match="units make 4 units .* initialized for 10"):
        active(state, params, units={"a": (), "b": (), "c": (0,)})


def test_active_by_row_of_the_only_leaf():
    params, units = jnp.ones((3, 2)), (0,)
    tx = priority_prop(budget=0.5, units=units)
    state = tx.init(params)
    assert active(state, params).shape == ()
    np.testing.assert_array_equal(active(state, params, units=units), [True] * 3)

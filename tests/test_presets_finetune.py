"""Tests of `finetune`, against loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import backward_costs
from priorityprop_jax.presets._finetune import finetune, promising, shares


pytestmark = pytest.mark.usefixtures("quick_compilation")

N, B, STEPS = 24, 8, 12
RANDOM = np.random.default_rng(0)
# Small inputs: the first layer promises little.
XS = 0.1 * RANDOM.normal(size=(N, 6)).astype(np.float32)
YS = RANDOM.normal(size=(N, 2)).astype(np.float32)
NAMES = ("layer_0", "layer_1", "layer_2", "head_3")
LAST = {name: name in NAMES[2:] for name in NAMES}


def loss(params, x, y):
    for name in NAMES[:-1]:
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x @ params["head_3"] - y) ** 2)


def new_params():
    shapes = dict(zip(NAMES, [(6, 32), (32, 32), (32, 8), (8, 2)], strict=True))
    random = np.random.default_rng(1)
    params = {n: random.normal(size=s) / np.sqrt(s[0]) for n, s in shapes.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def batches(start=0, end=STEPS):
    for i in range(start, end):
        ids = np.random.default_rng(i // 3).permutation(N)[
            (i % 3) * B : (i % 3 + 1) * B
        ]
        yield ids, XS[ids], YS[ids]


def preset(optimizer=None, **settings):
    optimizer = optimizer or optax.adam(1e-2)
    known = {"steps": STEPS, "num_examples": N, "least_saving": 0.05}
    settings = {**known, **settings}
    return finetune(loss, optimizer, new_params(), XS[:B], YS[:B], **settings)


def run(tuning, params, state, start=0, end=STEPS):
    losses = []
    for ids, *batch in batches(start, end):
        params, state, value = tuning.step(params, state, ids, *batch)
        losses.append(float(value))
    return params, state, losses


def by_hand(optimizer, params, mask, probe=0):
    """All leaves move; then the active ones do, and the others are as at the start."""
    state, resting, start = optimizer.init(params), {}, params
    for i, (_, *batch) in enumerate(batches()):
        if i == probe:
            resting = {n: start[n] for n in params if not mask[n]}
            part = lambda tree: {n: tree[n] for n in tree if mask[n]}
            is_params = lambda x: isinstance(x, dict) and "head_3" in x
            choose = lambda x: part(x) if is_params(x) else x  # noqa: B023
            params = part(params)
            state = jax.tree.map(choose, state, is_leaf=is_params)
        grad = jax.grad(lambda p: loss({**resting, **p}, *batch))(params)  # noqa: B023
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return {**resting, **params}


def assert_close(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "scheduled": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, STEPS)),
    "momentum": lambda: optax.sgd(1e-2, 0.9),
    "clipped": lambda: optax.chain(optax.clip(0.1), optax.adam(1e-2)),
    "decayed": lambda: optax.adamw(
        1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
}


@pytest.mark.parametrize("examples", [N, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_loop_by_hand(name, examples):
    optimizer = OPTIMIZERS[name]()
    tuning = preset(optimizer, num_examples=examples, active=LAST)
    start = new_params()
    params, _, _ = run(tuning, start, tuning.init(start))
    assert_close(params, by_hand(optimizer, new_params(), LAST))
    assert (tuning.plan.cache is not None) == (examples is not None)
    assert tuning.plan.active.tree == LAST


def test_probes_then_rests():
    tuning = preset(probe=4)
    start = new_params()
    params, state, _ = run(tuning, start, tuning.init(start))
    mask = tuning.plan.active.tree
    assert not mask["layer_0"] and mask["head_3"]
    assert_close(params, by_hand(optax.adam(1e-2), new_params(), mask, probe=4))
    assert state.inner[0].mu["layer_0"] is None
    assert int(state.inner[0].count) == state.step == STEPS
    assert state.start is None
    assert np.array_equal(params["layer_0"], new_params()["layer_0"])
    # Every example was computed once, those of the probe too.
    stats = tuning.plan.cache.stats
    assert (stats.misses, stats.hits) == (N, STEPS * B - N)


def test_gains_are_those_of_the_updates():
    tuning = preset(probe=5)
    params, adam = new_params(), optax.adam(1e-2)
    _, state, _ = run(tuning, new_params(), tuning.init(params), end=5)
    inner, expected = adam.init(params), np.zeros(4)
    for _, *batch in batches(0, 5):
        grad = jax.grad(loss)(params, *batch)
        updates, inner = adam.update(grad, inner, params)
        params = optax.apply_updates(params, updates)
        pairs = zip(jax.tree.leaves(grad), jax.tree.leaves(updates), strict=True)
        products = [-np.sum(np.float64(g) * np.float64(u)) for g, u in pairs]
        expected += np.maximum(products, 0)
    np.testing.assert_allclose(state.gains, expected, rtol=1e-4)


def test_takes_what_is_not_finite_for_no_gain():
    tuning = preset(optax.sgd(0.1), probe=1)
    start = new_params()
    bad = np.full_like(XS[:B], np.nan)
    _, state, value = tuning.step(start, tuning.init(start), np.arange(B), bad, YS[:B])
    assert np.isnan(value) and not np.any(state.gains)
    # Nothing is known, so nothing rests.
    start = new_params()
    state = state._replace(inner=tuning.init(start).inner)
    tuning.step(start, state, np.arange(B), XS[:B], YS[:B])
    assert all(tuning.plan.active.leaves)


def test_resumes_where_it_was():
    start = new_params()
    whole, *_ = run(tuning := preset(probe=4), start, tuning.init(start))
    for stop in (2, 4):  # in the probe, and right before the decision
        tuning, start = preset(probe=4), new_params()
        half = run(tuning, start, tuning.init(start), end=stop)
        saved = jax.tree.map(np.asarray, half[:2])  # as from a file
        params, state = jax.tree.map(jnp.asarray, saved)
        rest, *_ = run(preset(probe=4), params, state, start=stop)
        assert_close(rest, whole, rtol=1e-5)


class TestGuard:
    def test_trains_all_where_the_first_layer_promises_most(self):
        tuning = preset(probe=4, most_lost=0.001)
        start = new_params()
        params, *_ = run(tuning, start, tuning.init(start))
        everything = dict.fromkeys(NAMES, True)
        assert tuning.plan.active.tree == everything and tuning.plan.speedup == 1.0
        assert "params['layer_0'], promises" in tuning.plan.reason
        assert_close(params, by_hand(optax.adam(1e-2), new_params(), everything))

    def test_trains_all_where_resting_saves_too_little(self):
        first = {**dict.fromkeys(NAMES, True), "layer_0": False}
        costs = backward_costs(loss, new_params(), XS[:B], YS[:B])
        share = costs.flops(first) / costs.full
        assert 0.5 < share < 0.95
        for least, rests in ((1 - share + 0.01, False), (1 - share - 0.01, True)):
            tuning = preset(active=first, num_examples=None, least_saving=least)
            start = new_params()
            run(tuning, start, tuning.init(start), end=1)
            assert all(tuning.plan.active.leaves) != rests
            assert ("predicted to cost" in tuning.plan.reason) and (
                tuning.plan.reason.startswith("all leaves are trained") != rests
            )

    def test_counts_the_first_pass_of_a_cache(self):
        speedups = []
        for steps in (3, 6, 3000):  # one pass, two, and so many that it is free
            tuning = preset(active=LAST, steps=steps, least_saving=0.0)
            start = new_params()
            run(tuning, start, tuning.init(start), end=1)
            speedups.append(tuning.plan.speedup)
        costs = backward_costs(loss, new_params(), XS[:B], YS[:B])
        uncached = costs.full / costs.flops(LAST)
        assert speedups[0] == pytest.approx(uncached)
        # What is left of a step of hits, as counted by the compiler.
        hit = tuning.plan.cache.loss
        features = tuning.plan.cache(new_params(), np.arange(B), XS[:B], YS[:B])
        top = {n: new_params()[n] for n in NAMES[2:]}

        def of_top(top):
            return hit({**new_params(), **top}, features, XS[:B], YS[:B])

        counted = jax.jit(jax.value_and_grad(of_top)).lower(top).compile()
        flops = counted.cost_analysis()["flops"]
        assert costs.full / speedups[2] == pytest.approx(flops, rel=0.1)
        assert costs.full / speedups[1] == pytest.approx(
            (costs.full / speedups[0] + costs.full / speedups[2]) / 2, rel=0.01
        )

    def test_does_without_a_cache_that_is_too_large(self):
        tuning = preset(active=LAST, limit_bytes=16)
        start = new_params()
        params, *_ = run(tuning, start, tuning.init(start))
        assert tuning.plan.cache is None and "limit_bytes=16" in tuning.plan.reason
        assert_close(params, by_hand(optax.adam(1e-2), new_params(), LAST))


def test_promising_stops_at_the_bound():
    gains, depths = np.array([1.0, 2.0, 7.0, 40.0]), np.array([2, 2, 1, 0])
    share = shares(gains, depths)
    np.testing.assert_allclose(share, [0.1, 0.2, 0.7, 0.0])
    masks = [promising(share, depths, lost).tolist() for lost in (0.29, 0.31, 0.99)]
    rest_two = [False, False, True, True]
    assert masks == [[True] * 4, rest_two, rest_two]
    assert promising(shares(np.zeros(4), depths), depths, 0.99).all()


@pytest.mark.parametrize(
    "bad, error, words",
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.5}, TypeError, "steps"),
        ({"probe": 0}, ValueError, "probe=0"),
        ({"probe": -1}, ValueError, "probe"),
        ({"num_examples": 0}, ValueError, "num_examples"),
        ({"most_lost": 1.0}, ValueError, "most_lost"),
        ({"least_saving": -0.1}, ValueError, "least_saving"),
        ({"active": False}, ValueError, "active: no leaf"),
        ({"active": {"layer_0": True}}, ValueError, "active"),
        ({"optimizer": 0.1}, TypeError, "optimizer"),
    ],
)
def test_refuses(bad, error, words):
    with pytest.raises(error, match=words):
        preset(**bad)


# --- what it takes to reach a target


def shared_first(params, x):
    """Two layers that see 32 positions each: they cost much, and hold few weights."""
    x = jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]).mean(1)
    x = jnp.tanh(jnp.tanh(3 * x @ params[2]) @ params[3])
    return x @ params[4]


def alike(params, x):
    """Layers of which each costs about as much as the next."""
    x = x.mean(1)
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


NETS = {  # and whether layers rest
    "shared_first": (shared_first, [6, 24, 24, 64, 64, 2], True),
    "alike": (alike, [6, 64, 64, 64, 64, 64, 64, 2], False),
}


def until(target, losses, costs):
    """What was spent until the mean of the last ten losses was low enough."""
    means = np.convolve(losses, np.ones(10) / 10, "valid")
    assert means.min() <= target
    return np.cumsum(costs)[9 + int(np.argmax(means <= target))]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rotated", [False, True])
def test_guard_bounds_the_cost_to_a_target(net, rotated):
    """At most 5 % more than with the optimizer alone, counted in FLOPs.

    The new task needs the same features, of the same inputs or of rotated ones.
    """
    apply, sizes, rests = NETS[net]
    steps, random = 400, np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    old = [draw(m, n) / m**0.5 for m, n in pairs]
    start = [*old[:-1], 0 * old[-1]]
    inputs = draw(400, 32, 6) + draw(400, 1, 6)
    x, y = np.asarray(inputs), np.asarray(apply(old, inputs))
    x = x @ np.linalg.qr(np.asarray(draw(6, 6)))[0] if rotated else x
    ids = [random.integers(0, len(x), 16) for _ in range(steps)]
    adam = optax.adam(optax.linear_schedule(3e-3, 0.0, steps))

    def loss(params, x, y):
        return jnp.mean((apply(params, x) - y) ** 2)

    @jax.jit
    def plain(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, by_plain = start, adam.init(start), []
    for i in ids:
        params, state, value = plain(params, state, x[i], y[i])
        by_plain.append(float(value))
    costs = backward_costs(loss, start, x[:16], y[:16])
    tuning = finetune(loss, adam, start, x[:16], y[:16], steps=steps)
    params, losses, spent = jax.tree.map(jnp.copy, start), [], []
    state = tuning.init(params)
    for i in ids:
        params, state, value = tuning.step(params, state, None, x[i], y[i])
        losses.append(float(value))
        mask = None if tuning.plan is None else tuning.plan.active.tree
        spent.append(costs.full if mask is None else costs.flops(mask))
    assert all(tuning.plan.active.leaves) != rests, tuning.plan.reason
    for part in (0.5, 0.1, 0.03):
        target = part * by_plain[0]
        most = until(target, by_plain, np.full(steps, costs.full))
        assert until(target, losses, spent) <= 1.05 * most

"""`prioritize`: k updates of the inner optimizer on a leaf alone, or none at all."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from helpers import slow_unless
from priorityprop_jax import _bursts, _priority, prioritize
from references_cycle import allocate_exactly, Simulation


# "wide" is branched on, the others are small enough to be selected.
SHAPES = {"bias": (3,), "kernel": (4, 5), "scale": (), "wide": (136, 130)}
STEPS = 8
INNERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: optax.adam(rate),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.3),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.3),
    "rmsprop": lambda rate: optax.rmsprop(rate, momentum=0.5, centered=True),
    "adafactor": lambda rate: optax.adafactor(rate, weight_decay_rate=0.01),
    "muon": lambda rate: optax.contrib.muon(rate, weight_decay=0.3),
}
# Without state, and with all kinds of it: for what does not depend on the optimizer.
GENERIC = ("sgd", "adamw")
# Up to one update in a step, and up to four.
ONE = dict(budget=8, min_updates=1, max_updates=4, recalc_every=4)
MANY = dict(budget=14, min_updates=1, max_updates=7, recalc_every=2)


def tree(rng, scale=1.0):
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


RNG = np.random.default_rng(0)
PARAMS = tree(RNG)
# Different leaves lead at different times.
GRADS = [
    {k: g * scale for (k, g), scale in zip(tree(RNG).items(), scales, strict=True)}
    for scales in 4.0 ** RNG.integers(0, 3, size=(STEPS, 4)) * [1, 1, 3, 1e-2]
]


SMALL = {k: PARAMS[k] for k in ("bias", "kernel", "scale")}
SMALL_GRADS = [{k: g[k] for k in SMALL} for g in GRADS]


@pytest.fixture(autouse=True)
def lean(monkeypatch):
    """Allocation has tests of its own; compiling it for each of these takes long."""
    monkeypatch.setattr(_priority, "allocate_vector", allocate_exactly)
    # Wherever the border lies, "wide" is above it.
    monkeypatch.setattr(_bursts, "_SMALL", 10_000)


@functools.cache
def multiplicities(many, **settings):
    """Of each leaf at each step, from the rules alone."""
    sim = Simulation([()] * 4, [1.0] * 4, **(MANY if many else ONE), **settings)
    due = [[int(m) for m in sim(list(g.values()))] for g in GRADS]
    assert {0, 1} <= {m for row in due for m in row}
    assert (max(m for row in due for m in row) > 1) == many
    return due


@functools.cache
def named(name):
    """One instance of each, so that what is compiled can be shared."""
    return INNERS[name](0.05)


@functools.cache
def compiled(inner):
    return jax.jit(inner.update)


class Alone:
    """The inner optimizer on one leaf, with a state of its own."""

    def __init__(self, inner, name):
        self.name, self.inner = name, inner
        self.update = compiled(inner)
        self.state = inner.init({name: PARAMS[name]})

    def __call__(self, g, p, k):
        total = jnp.zeros_like(p)
        for _ in range(k):
            u, self.state = self.update(
                {self.name: g}, self.state, {self.name: p + total}
            )
            total = total + u[self.name]
        return total


def own_state(whole, alone, i):
    """Pairs of what one leaf has in the whole state and in its own, found by path."""
    found = dict(jax.tree_util.tree_flatten_with_path(whole)[0])
    for path, x in jax.tree_util.tree_flatten_with_path(alone)[0]:
        shared = found[path].shape != x.shape
        yield jax.tree_util.keystr(path), (found[path][i] if shared else found[path]), x


def check_against_alone(tx, inner, due, params=PARAMS, grads=GRADS, alone=None):
    """Whole training, leaf by leaf: updates, state, and rest to the bit."""
    update = jax.jit(tx.update)
    alone = alone or {name: Alone(inner, name) for name in params}
    state = tx.init(params)
    for step, (g, times) in enumerate(zip(grads, due, strict=True)):
        updates, new = update(g, state, params)
        for i, (name, k) in enumerate(zip(params, times, strict=True)):
            where = f"{step=} {name} {k=}"
            expected = alone[name](g[name], params[name], k)
            if k == 0:
                assert not np.any(updates[name]), where
            np.testing.assert_allclose(
                updates[name], expected, rtol=2e-4, atol=2e-6, err_msg=where
            )
            before = own_state(state.inner, alone[name].state, i)
            after = own_state(new.inner, alone[name].state, i)
            for (path, old, _), (_, x, y) in zip(before, after, strict=True):
                if k == 0:
                    np.testing.assert_array_equal(x, old, err_msg=where + path)
                np.testing.assert_allclose(
                    x, y, rtol=2e-4, atol=2e-6, err_msg=where + path
                )
        params = optax.apply_updates(params, updates)
        state = new
    return state


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "many"),
    [
        slow_unless(not many or name in GENERIC, name, many, id=f"{name}-{times}")
        for name in INNERS
        for times, many in {"one": False, "many": True}.items()
    ],
)
def test_k_updates_of_the_leaf_alone_or_none(name, many):
    inner = named(name)
    tx = prioritize(inner, **(MANY if many else ONE), depth_factor=0.0)
    state = check_against_alone(tx, inner, multiplicities(many))
    np.testing.assert_array_equal(
        state.priority.counts, np.sum(multiplicities(many), axis=0)
    )


@pytest.mark.parametrize(
    "name", [slow_unless(n in (*GENERIC, "adafactor"), n) for n in INNERS]
)
def test_the_full_budget_is_the_inner_optimizer_to_the_bit(name):
    inner = named(name)
    tx = prioritize(inner, 1.0, min_updates=2, max_updates=2, recalc_every=2)
    # Adafactor treats large leaves differently.
    start = PARAMS if name == "adafactor" else SMALL
    for mode in (jax.jit, lambda f: f):
        ours, theirs = mode(tx.update), mode(inner.update)
        state, plain, params = tx.init(start), inner.init(start), start
        for g in GRADS[:3]:
            g = {k: g[k] for k in start}
            updates, state = ours(g, state, params)
            expected, plain = theirs(g, plain, params)
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(state.priority.counts, [3] * len(start))
        for i in range(len(start)):
            for path, x, y in own_state(state.inner, plain, i):
                np.testing.assert_array_equal(x, y, err_msg=path)


def rates(step):
    return optax.cosine_decay_schedule(0.1, STEPS)(step)


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("how", ["schedule", "inject_hyperparams"])
def test_learning_rates_follow_the_step_and_not_the_leaf(how, many):
    inner = INNERS["adamw"](rates)
    if how == "inject_hyperparams":
        inner = optax.inject_hyperparams(optax.adamw)(rates, weight_decay=0.3)
    tx = prioritize(inner, **(MANY if many else ONE), depth_factor=0.0)
    update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
    mu = {k: np.zeros(p.shape) for k, p in PARAMS.items()}
    nu, count = dict(mu), dict.fromkeys(PARAMS, 0)
    for step, (g, times) in enumerate(zip(GRADS, multiplicities(many), strict=True)):
        updates, state = update(g, state, params)
        rate = 0.1 * (1 + np.cos(np.pi * step / STEPS)) / 2
        for (k, p), m in zip(params.items(), times, strict=True):
            # AdamW, by hand in float64.
            q, d = np.float64(p), np.float64(g[k])
            for _ in range(m):
                count[k] += 1
                mu[k] = 0.9 * mu[k] + 0.1 * d
                nu[k] = 0.999 * nu[k] + 0.001 * d * d
                first = mu[k] / (1 - 0.9 ** count[k])
                second = nu[k] / (1 - 0.999 ** count[k])
                q = q - rate * (first / (np.sqrt(second) + 1e-8) + 0.3 * q)
            np.testing.assert_allclose(
                updates[k],
                q - np.float64(p),
                rtol=1e-4,
                atol=1e-5,
                err_msg=f"{step} {k}",
            )
        params = optax.apply_updates(params, updates)
    resting = [k for k in PARAMS if count[k] != STEPS]
    assert resting, "or the count of the leaf would do as well"


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("resting", ["keep", "decay", "reset"])
def test_what_becomes_of_the_state_while_resting(resting, many, monkeypatch):
    # The kernel is branched on, the others are selected.
    monkeypatch.setattr(_bursts, "_SMALL", 10)
    settings = dict(MANY if many else ONE, budget=9 if many else 6)
    sim = Simulation([()] * 3, [1.0] * 3, **settings)
    inner = named("adam")
    tx = prioritize(inner, **settings, resting=resting, depth_factor=0.0)
    alone = {name: Alone(inner, name) for name in SMALL}
    rested = dict.fromkeys(SMALL, 0)
    update, state, params = jax.jit(tx.update), tx.init(SMALL), SMALL
    returns = 0
    for g in SMALL_GRADS:
        updates, state = update(g, state, params)
        for i, (name, k) in enumerate(zip(SMALL, sim(list(g.values())), strict=True)):
            one, p = alone[name], params[name]
            if k == 0:
                rested[name] += 1
                assert not np.any(updates[name])
                continue
            if rested[name] and one.state[0].count > 0:
                returns += 1
            if resting == "reset" and rested[name]:
                one.state = inner.init({name: p})
            for _ in range(rested[name] if resting == "decay" else 0):
                _, one.state = one.update({name: 0 * p}, one.state, {name: p})
            rested[name] = 0
            np.testing.assert_allclose(updates[name], one(g[name], p, k), rtol=2e-5)
            for path, x, y in own_state(state.inner, one.state, i):
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7, err_msg=path)
        params = optax.apply_updates(params, updates)
    assert returns


AXES = {"bias": (0,), "kernel": (1,), "scale": ()}


@pytest.mark.parametrize(
    ("units", "many"), [("axes", True), ("element", False)], ids=["axes", "element"]
)
@pytest.mark.parametrize("resting", ["keep", "decay", "reset"])
def test_units_finer_than_a_leaf(units, resting, many):
    """Momentum, element by element: each is as if it were a leaf of its own."""
    axes = [tuple(range(g.ndim)) for g in SMALL.values()]
    given = "element"
    if units == "axes":
        axes, given = list(AXES.values()), AXES
    n = sum(
        int(np.prod([g.shape[a] for a in ax]))
        for g, ax in zip(SMALL.values(), axes, strict=True)
    )
    settings = dict(budget=2 * n + 1, min_updates=1, max_updates=7, recalc_every=2)
    if not many:
        settings = dict(budget=2 * n + 1, min_updates=0, max_updates=4, recalc_every=4)
    sim = Simulation(axes, [1.0] * 3, **settings)
    tx = prioritize(
        optax.sgd(0.1, momentum=0.9),
        **settings,
        units=given,
        resting=resting,
        depth_factor=0.0,
    )
    update, state, params = jax.jit(tx.update), tx.init(SMALL), SMALL
    trace = {k: np.zeros(p.shape) for k, p in SMALL.items()}
    rested = {k: np.zeros(p.shape, int) for k, p in SMALL.items()}
    mixed = False
    for g in SMALL_GRADS:
        updates, state = update(g, state, params)
        for (k, d), times in zip(g.items(), sim.times(list(g.values())), strict=True):
            times = np.broadcast_to(times, d.shape)
            mixed |= len(np.unique(times)) > 1
            expected = np.zeros(d.shape)
            for at in np.ndindex(d.shape):
                if times[at] and resting == "decay":
                    trace[k][at] *= 0.9 ** rested[k][at]
                if times[at] and resting == "reset" and rested[k][at]:
                    trace[k][at] = 0.0
                rested[k][at] = 0 if times[at] else rested[k][at] + 1
                for _ in range(times[at]):
                    trace[k][at] = 0.9 * trace[k][at] + d[at]
                    expected[at] -= 0.1 * trace[k][at]
            np.testing.assert_allclose(updates[k], expected, rtol=1e-5, atol=2e-6)
            assert not np.any(np.asarray(updates[k])[times == 0])
            np.testing.assert_allclose(
                state.inner[0].trace[k], trace[k], rtol=1e-5, atol=1e-5
            )
        params = optax.apply_updates(params, updates)
    assert mixed


def test_a_clip_in_front_sees_all_leaves():
    inner = optax.adam(0.05)
    clip = optax.clip_by_global_norm(0.5)
    clipped = [clip.update(g, clip.init(g))[0] for g in SMALL_GRADS]
    assert optax.tree.norm(SMALL_GRADS[0]) > 0.5
    tx = optax.chain(clip, prioritize(inner, budget=6, recalc_every=4, max_updates=4))
    alone = prioritize(inner, budget=6, recalc_every=4, max_updates=4)
    update, plain = jax.jit(tx.update), jax.jit(alone.update)
    state, expected_state = tx.init(SMALL), alone.init(SMALL)
    for g, c in zip(SMALL_GRADS, clipped, strict=True):
        updates, state = update(g, state, SMALL)
        expected, expected_state = plain(c, expected_state, SMALL)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4), updates, expected
        )


def equations(jaxpr, inside=False):
    """All equations, and whether a branch or a loop holds them."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        within = inside or eqn.primitive.name in ("cond", "scan", "while")
        for value in jax.tree.leaves(list(eqn.params.values())):
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                yield from equations(sub, within)


def leaves_of(n, shape):
    return {f"layer_{i}": jnp.ones(shape, jnp.float32) for i in range(n)}


@pytest.mark.parametrize(
    ("inner", "max_updates", "outside"),
    [
        (optax.adamw(1e-3), 9, set()),
        (optax.lion(1e-3), 4, set()),
        # From the state after it, so that it can be fused with its use.
        (optax.adamw(1e-3), 4, {"add", "div", "mul", "select_n", "sqrt"}),
    ],
    ids=["adamw, many in a row", "lion", "adamw"],
)
def test_work_for_resting_leaves_is_skipped(inner, max_updates, outside):
    """Everything of the size of a leaf happens in a branch, but making zeros."""
    params = leaves_of(3, (136, 130))
    tx = prioritize(inner, 6, max_updates=max_updates, recalc_every=4)
    state = tx.init(params)
    closed = jax.make_jaxpr(tx.update)(params, state, params)
    large = [
        eqn
        for eqn, inside in equations(closed.jaxpr)
        if not inside and any(v.aval.shape == (136, 130) for v in eqn.outvars)
    ]
    names = {eqn.primitive.name for eqn in large}
    assert names - {"broadcast_in_dim", "cond", "jit", "pjit", "neg"} == outside
    # One for each leaf, which does nothing if false.
    branches = [e.params["branches"] for e in large if e.primitive.name == "cond"]
    assert len(branches) == 3
    assert all(not false.jaxpr.eqns for false, _ in branches)
    assert all(true.jaxpr.eqns for _, true in branches)


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1)])
def test_what_rests_changes_no_bit_of_the_params(inner, many):
    """Not even the sign of a zero, which XLA would otherwise have to compute."""
    tx, due = prioritize(inner, **(MANY if many else ONE)), multiplicities(many)
    params = jax.tree.map(lambda p: jnp.where(p > 0, p, -0.0), PARAMS)
    update, state = jax.jit(tx.update), tx.init(params)
    for g, times in zip(GRADS, due, strict=True):
        updates, state = update(g, state, params)
        new = optax.apply_updates(params, updates)
        for name, k in zip(params, times, strict=True):
            same = np.array(new[name]).tobytes() == np.array(params[name]).tobytes()
            assert same == (k == 0), (name, k)


def test_the_compiled_program_still_branches():
    params = leaves_of(3, (136, 130))
    tx = prioritize(optax.adamw(1e-3), 6, max_updates=4, recalc_every=4)
    state = tx.init(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert text.count(" conditional(") >= 1 + 3


@pytest.mark.parametrize(("max_updates", "branches"), [(4, 0), (8, 0), (12, 1)])
def test_small_leaves_are_selected_together(max_updates, branches):
    """No branches for up to two updates in a row, one for all of the later ones."""
    params = leaves_of(20, (4, 5))
    tx = prioritize(optax.adamw(1e-3), 40, max_updates=max_updates, recalc_every=4)
    state = tx.init(params)
    closed = jax.make_jaxpr(tx.update)(params, state, params)
    branched = [
        eqn
        for eqn, inside in equations(closed.jaxpr)
        if eqn.primitive.name in ("cond", "scan", "while")
        and not inside
        and any(v.aval.shape == (4, 5) for v in eqn.outvars)
    ]
    assert len(branched) == branches


def test_without_params_and_with_extra_arguments():
    def update(g, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda x: factor * x, g), state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = prioritize(inner, budget=6, max_updates=4, recalc_every=4)
    sim = Simulation([()] * 3, [1.0] * 3, 6, max_updates=4, recalc_every=4)
    state = tx.init(SMALL)
    for g in SMALL_GRADS[:2]:
        due = sim(list(g.values()))
        updates, state = tx.update(g, state, factor=jnp.float32(3.0), other="unused")
        for (k, d), m in zip(g.items(), due, strict=True):
            np.testing.assert_allclose(updates[k], 3 * m * d, rtol=1e-6)


@pytest.mark.parametrize("units", ["leaf", "element"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_inner_state_stays_finite(bad, units):
    tx = prioritize(optax.adam(0.1), 0.5, min_updates=1, recalc_every=4, units=units)
    update, state = jax.jit(tx.update), tx.init(SMALL)
    g = {**SMALL_GRADS[0], "bias": jnp.full((3,), bad)}
    updates, state = update(g, state, SMALL)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert not np.any(updates["bias"])
    assert np.sum(state.priority.nonfinite) == (1 if units == "leaf" else 3)
    for quotas in [optax.tree.get(state, "quotas")]:
        if units == "leaf":
            assert quotas[0] == 1
        else:
            np.testing.assert_array_equal(quotas["bias"], [1, 1, 1])


def test_half_precision_params_with_float32_gradients():
    params = {k: p.astype(jnp.bfloat16) for k, p in SMALL.items()}
    tx = prioritize(optax.sgd(0.1), budget=6, max_updates=4, recalc_every=4)
    updates, state = jax.jit(tx.update)(SMALL_GRADS[0], tx.init(params), params)
    sim = Simulation([()] * 3, [1.0] * 3, 6, max_updates=4, recalc_every=4)
    for m, (k, u) in zip(
        sim(list(SMALL_GRADS[0].values())), updates.items(), strict=True
    ):
        np.testing.assert_allclose(
            np.float32(u), -0.1 * m * np.float32(SMALL_GRADS[0][k]), rtol=1e-2
        )

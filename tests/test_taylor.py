"""`magnitude="taylor"`: what an optimizer's own step gains, against loops by hand."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from helpers import kinds
from priorityprop_jax import (
    _bursts,
    _priority,
    backward_costs,
    prioritize,
    priority_prop,
    PriorityPropTrainer,
    Score,
)
from priorityprop_jax._scores import element_gains, gains
from references_cycle import allocate_exactly, Simulation, units_of


# "wide" is branched on, the others are small enough to be selected.
SHAPES = {"bias": (3,), "kernel": (4, 5), "scale": (), "wide": (136, 130)}
STEPS = 9  # three cycles of 4 begin
ONE = dict(budget=8, min_updates=1, max_updates=4, recalc_every=4)
MANY = dict(budget=14, min_updates=1, max_updates=7, recalc_every=2)
AXES = {"bias": (0,), "kernel": (1,), "scale": (), "wide": (1,)}
ELEMENTS = {"bias": (0,), "kernel": (0, 1), "scale": ()}


def tree(rng, shapes=SHAPES):
    return {
        name: np.asarray(rng.normal(size=shape), np.float32)
        for name, shape in shapes.items()
    }


RNG = np.random.default_rng(0)
PARAMS = tree(RNG)
# Different leaves lead at different times, and momentum is against some of them.
GRADS = [
    {k: np.float32(s) * g for (k, g), s in zip(tree(RNG).items(), scales, strict=True)}
    for scales in 4.0 ** RNG.integers(0, 3, size=(STEPS, 4)) * [1, 1, 3, 1e-2]
]


@pytest.fixture
def lean(monkeypatch):
    """Allocation has tests of its own; compiling it for each of these takes long."""
    monkeypatch.setattr(_priority, "allocate_vector", allocate_exactly)
    monkeypatch.setattr(_bursts, "_SMALL", 10_000)


# The sums.


def exact_gain(g, u):
    """In float64, where products of float32 are exact."""
    g, u = np.ravel(g), np.ravel(u)
    if not (np.isfinite(g).all() and np.isfinite(u).all()):
        return math.nan
    pairs = [*zip(g.real, u.real, strict=True), *zip(g.imag, u.imag, strict=True)]
    return max(0.0, -math.fsum(float(a) * float(b) for a, b in pairs))


def check_gains(g, u, kept, rtol=1e-5):
    pairs = zip(units_of(g, kept), units_of(u, kept), strict=True)
    expected = [exact_gain(a, b) for a, b in pairs]
    got = jax.jit(lambda g, u: gains([g], [u], [kept]))(g, u)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=rtol)
    return expected


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [(kept, "float32") for kept in [(), (0,), (1,), (0, 2), (0, 1, 2)]]
    + [
        ((0,), "bfloat16"),
        ((1,), "float16"),
        ((), "complex64"),
        ((0, 1, 2), "complex64"),
    ],
)
def test_gains_of_all_kinds_of_units(kept, dtype):
    g, u = RNG.normal(size=(2, 3, 4, 2))
    if dtype == "complex64":
        g, u = g + 1j * g[::-1], u - 1j * u[:, ::-1]
    expected = check_gains(jnp.asarray(g, dtype), jnp.asarray(u - g, dtype), kept)
    if kept == (0, 1, 2):
        assert 0.0 in expected and max(expected) > 0
        got = element_gains(jnp.asarray(g, dtype), jnp.asarray(u - g, dtype))
        np.testing.assert_allclose(jnp.ravel(got), expected, rtol=1e-5)


def test_gains_of_float64():
    with jax.enable_x64(True):
        g, u = map(jnp.asarray, RNG.normal(size=(2, 3, 4)))
        check_gains(g, u - g, (0,))
        got = gains([jnp.array([1e300, 1.0])], [jnp.array([-1e-300, -2.0])], [()])
        assert got.dtype == jnp.float32
        # 1e300 counts as the largest float32, and 1e-300 is none but zero.
        np.testing.assert_allclose(got, [2.0])
        assert np.isfinite(gains([jnp.array([1e300])], [jnp.array([-1e300])], [()]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["gradient", "step"])
def test_not_finite_is_nan_of_that_unit_alone(bad, whose):
    pair = [np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)]
    # Where the other factor is zero, too.
    pair[whose == "step"][1, 2] = bad
    assert np.isnan(check_gains(*map(jnp.asarray, pair), (0,))).tolist() == [0, 1, 0]
    bits = np.isnan(element_gains(*map(jnp.asarray, pair)))
    assert bits.sum() == 1 and bits[1, 2]


@pytest.mark.parametrize("scale", [1e-16, 1e13])
def test_gains_do_not_overflow_or_underflow(scale):
    g = np.float32(scale * RNG.normal(size=(3, 500)))
    check_gains(jnp.asarray(g), jnp.asarray(-g), (0,))


def test_what_is_too_large_counts_as_a_large_number():
    g = jnp.array([3e38, 3e38, 1.0], jnp.float32)
    assert np.isfinite(gains([g], [-g], [()])) and gains([g], [-g], [()]) > 1e28
    # A loss does not change by as much, and the signs cancel.
    np.testing.assert_array_equal(gains([g], [g * jnp.array([1, -1, 0.0])], [()]), 0.0)
    many = jnp.full((2**20,), 1e38, jnp.float32)
    assert np.isfinite(gains([many], [-many], [()]))


def test_gains_of_nothing():
    assert gains([], [], []).shape == (0,)
    empty = jnp.zeros((0, 3))
    np.testing.assert_array_equal(gains([empty], [empty], [()]), [0.0])
    assert gains([empty], [empty], [(0,)]).shape == (0,)


# Whole cycles.


class Adam:
    """Of one leaf, in float64. Without decay rates it is gradient descent."""

    def __init__(self, shape, rate=0.05, decay=0.3):
        self.rate, self.decay, self.shape = rate, decay, shape
        self.start()

    def start(self):
        self.mu, self.nu, self.count = np.zeros(self.shape), np.zeros(self.shape), 0

    def moved(self, g):
        mu, nu = 0.9 * self.mu + 0.1 * g, 0.999 * self.nu + 0.001 * g * g
        return mu, nu, self.count + 1

    def step(self, g, p):
        """What would be added to p, and nothing remembered."""
        mu, nu, count = self.moved(g)
        mu, nu = mu / (1 - 0.9**count), nu / (1 - 0.999**count)
        return -self.rate * (mu / (np.sqrt(nu) + 1e-8) + self.decay * p)

    def __call__(self, g, p):
        u = self.step(g, p)
        self.mu, self.nu, self.count = self.moved(g)
        return u


def check_cycles(tx, sim, resting="keep", axes=None):
    """Scores, quotas and updates at all steps, by hand."""
    update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
    alone = {k: Adam(p.shape) for k, p in PARAMS.items()}
    rested = dict.fromkeys(PARAMS, 0)
    nothing = 0
    axes = axes or [()] * len(PARAMS)
    for t, g in enumerate(GRADS):
        updates, state = update(g, state, params)
        g = {k: np.float64(x) for k, x in g.items()}
        if t % sim.cycle == 0:
            for k, one in alone.items():
                if rested[k] and resting == "reset":
                    one.start()
                for _ in range(rested[k] if resting == "decay" else 0):
                    one.mu, one.nu, one.count = one.moved(0.0)
                rested[k] = 0
            sizes = [
                np.array([exact_gain(*pair) for pair in zip(*both, strict=True)])
                for k, kept in zip(PARAMS, axes, strict=True)
                for both in [
                    (
                        units_of(g[k], kept),
                        units_of(alone[k].step(g[k], np.float64(params[k])), kept),
                    )
                ]
            ]
            nothing += sum(np.sum(x == 0) for x in sizes)
        # The simulation takes the maximum of each unit, and here that is its gain.
        due = sim(sizes)
        np.testing.assert_allclose(
            state.priority.scores, sim.scores, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(state.priority.quotas, sim.quotas)
        np.testing.assert_array_equal(state.priority.counts, sim.counts)
        if len(due) == len(PARAMS):
            for (k, one), m in zip(alone.items(), due, strict=True):
                p, total = np.float64(params[k]), 0.0
                if m and rested[k] and resting == "reset":
                    one.start()
                for _ in range(rested[k] if m and resting == "decay" else 0):
                    one.mu, one.nu, one.count = one.moved(0.0)
                rested[k] = 0 if m else rested[k] + 1
                for _ in range(m):
                    total = total + one(g[k], p + total)
                np.testing.assert_allclose(updates[k], total, rtol=1e-3, atol=1e-5)
            params = optax.apply_updates(params, updates)
    return nothing


@pytest.mark.usefixtures("lean", "quick_compilation")
@pytest.mark.parametrize(
    ("many", "resting"),
    [
        (False, "keep"),
        (True, "decay"),
        (False, "reset"),
        pytest.param(True, "keep", marks=pytest.mark.slow),
        pytest.param(False, "decay", marks=pytest.mark.slow),
        pytest.param(True, "reset", marks=pytest.mark.slow),
    ],
)
def test_cycles_equal_adamw_by_hand(many, resting):
    """The step is that which the leaf would take next: its own count, its own rest."""
    settings = MANY if many else ONE
    tx = prioritize(
        optax.adamw(0.05, weight_decay=0.3),
        **settings,
        magnitude="taylor",
        depth_factor=0.0,
        resting=resting,
    )
    sim = Simulation([(0,)] * 4, [1.0] * 4, **settings, magnitude="max")
    nothing = check_cycles(tx, sim, resting)
    assert resting == "reset" or nothing  # some step goes against its gradient


@pytest.mark.usefixtures("lean", "quick_compilation")
@pytest.mark.parametrize("kind", ["axes", "element"])
def test_finer_units_equal_gradient_descent_by_hand(kind):
    """With momentum, each unit has its own; the state of resting ones waits."""
    shapes = {k: SHAPES[k] for k in ELEMENTS} if kind == "element" else SHAPES
    axes = [ELEMENTS[k] if kind == "element" else AXES[k] for k in shapes]
    n = sum(
        math.prod(shape[a] for a in kept)
        for shape, kept in zip(shapes.values(), axes, strict=True)
    )
    settings = dict(budget=2 * n + 1, min_updates=0, max_updates=4, recalc_every=4)
    units = "element" if kind == "element" else AXES
    inner = optax.sgd(0.1, momentum=0.9)
    tx = prioritize(
        inner, **settings, units=units, magnitude="taylor", depth_factor=0.0
    )
    each = [(0,)] * len(shapes)
    sim = Simulation(each, [1.0] * len(shapes), **settings, magnitude="max")
    params = {k: PARAMS[k] for k in shapes}
    update, state = jax.jit(tx.update), tx.init(params)
    trace = {k: np.zeros(shape) for k, shape in shapes.items()}
    zeros = 0
    for t, g in enumerate(GRADS[:6]):
        g = {k: g[k] for k in shapes}
        updates, state = update(g, state, params)
        if t % 4 == 0:
            sizes = []
            for (k, d), kept in zip(g.items(), axes, strict=True):
                step = -0.1 * (0.9 * trace[k] + np.float64(d))
                pairs = zip(units_of(d, kept), units_of(step, kept), strict=True)
                sizes.append(np.array([exact_gain(*pair) for pair in pairs]))
            zeros += sum(np.sum(x == 0) for x in sizes)
        due = iter(sim(sizes))
        scores = [np.ravel(x) for x in jax.tree.leaves(state.priority.scores)]
        np.testing.assert_allclose(
            np.concatenate(scores), sim.scores, rtol=1e-4, atol=1e-5
        )
        for (k, d), kept in zip(g.items(), axes, strict=True):
            wide = [n if a in kept else 1 for a, n in enumerate(d.shape)]
            m = np.array([next(due) for _ in range(math.prod(wide))]).reshape(wide)
            trace[k] = np.where(m > 0, 0.9 * trace[k] + np.float64(d), trace[k])
            expected = np.where(m > 0, -0.1 * trace[k], 0.0)
            np.testing.assert_allclose(updates[k], expected, rtol=1e-4, atol=1e-5)
    assert zeros and len(set(sim.quotas)) > 1


@pytest.mark.usefixtures("lean", "quick_compilation")
def test_of_gradient_descent_it_is_the_square_of_the_gradient():
    grads = GRADS[0]
    build = functools.partial(prioritize, optax.sgd(0.2), **ONE, depth_factor=0.0)
    squares = Score(lambda _: (), lambda x, s: (0.2 * x.magnitudes**2, s))
    by_gain = build(magnitude="taylor", score="gradient")
    by_square = build(magnitude="l2", score=squares)
    updates, state = by_gain.update(grads, by_gain.init(PARAMS), PARAMS)
    expected, other = by_square.update(grads, by_square.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        state.priority.scores,
        [0.2 * np.sum(np.float64(g) ** 2) for g in grads.values()],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(state.priority.quotas, other.priority.quotas)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    # The first step of Adam is the rate times the sign.
    tx = prioritize(optax.adam(0.2), **ONE, magnitude="taylor", score="gradient")
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        state.priority.scores,
        [0.2 * np.sum(np.abs(np.float64(g))) for g in grads.values()],
        rtol=1e-4,
    )


@pytest.mark.usefixtures("lean", "quick_compilation")
def test_an_optimizer_that_couples_leaves_is_asked_about_each_alone():
    """As it is updated: the step that counts is the one that would be taken."""
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
    tx = prioritize(inner, **ONE, magnitude="taylor", score="gradient")
    grads = {k: GRADS[0][k] for k in ("bias", "kernel", "scale")}
    _, state = tx.update(grads, tx.init(grads), grads)
    norms = np.array([np.linalg.norm(np.ravel(g)) for g in grads.values()])
    expected = 0.1 * norms * np.minimum(norms, 0.5)
    np.testing.assert_allclose(state.priority.scores, expected, rtol=1e-5)


@pytest.mark.usefixtures("lean", "quick_compilation")
def test_a_schedule_is_that_of_the_step():
    rate = optax.linear_schedule(0.1, 0.2, 4)
    tx = prioritize(optax.sgd(rate), **ONE, magnitude="taylor", score="gradient")
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for g in GRADS[:5]:
        _, state = update(g, state, PARAMS)
    expected = [0.2 * np.sum(np.float64(g) ** 2) for g in GRADS[4].values()]
    np.testing.assert_allclose(state.priority.scores, expected, rtol=1e-5)


@pytest.mark.usefixtures("lean", "quick_compilation")
@pytest.mark.parametrize("zero", ["gradients", "rate"])
def test_nothing_to_gain_is_as_for_equal_scores(zero):
    rate = 0.0 if zero == "rate" else 0.1
    grads = jax.tree.map(np.zeros_like, PARAMS) if zero == "gradients" else GRADS[0]
    tx = prioritize(optax.adam(rate), **ONE, magnitude="taylor")
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(state.priority.scores, np.zeros(4))
    assert not np.signbit(state.priority.scores).any()
    np.testing.assert_array_equal(state.priority.quotas, [2, 2, 2, 2])


def bursting(rate=0.1):
    """Gradient descent whose step is infinite where a gradient is beyond 100."""

    def update(g, state, params=None):
        del params
        burst = lambda x: jnp.where(jnp.abs(x) > 100, -jnp.inf, -rate * x)
        return jax.tree.map(burst, g), state

    return optax.GradientTransformation(lambda p: optax.EmptyState(), update)


@pytest.mark.usefixtures("lean", "quick_compilation")
@pytest.mark.parametrize(
    ("bad", "units"),
    [(1000.0, "leaf"), (1000.0, "axes"), (1000.0, "element")]
    + [(np.nan, "leaf"), (np.inf, "element")],
)
def test_a_step_that_is_not_finite_is_not_taken(bad, units):
    shapes = {"a": (3, 2), "b": (2,)}
    params = {k: jnp.ones(shape) for k, shape in shapes.items()}
    grads = {"a": jnp.ones((3, 2)).at[1, 0].set(bad), "b": jnp.ones(2)}
    axes = {"a": (0,), "b": ()}
    tx = prioritize(
        bursting(),
        0.9,
        min_updates=1,
        max_updates=4,
        recalc_every=4,
        units=axes if units == "axes" else units,
        magnitude="taylor",
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    rests = np.zeros((3, 2), bool)
    rests[{"leaf": ..., "axes": 1, "element": (1, 0)}[units]] = True
    np.testing.assert_array_equal(updates["a"] == 0, rests)
    assert np.isfinite(updates["a"]).all() and np.all(updates["b"] != 0)
    np.testing.assert_array_equal(state.priority.nonfinite, [1, 0])
    quotas, scores, counts = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(found, name))])
        for found in [state.priority]
        for name in ("quotas", "scores", "counts")
    )
    at = {"leaf": 0, "axes": 1, "element": 2}[units]
    assert (quotas[at], scores[at], counts[at]) == (1, 0.0, 0)
    others = np.delete(np.arange(len(quotas)), at)
    assert (scores[others] > 0).all() and (counts[others] == 1).all()


@pytest.mark.usefixtures("quick_compilation")
def test_the_full_budget_is_the_inner_optimizer_and_has_scores():
    inner = optax.adam(0.05)
    tx = prioritize(
        inner, 1.0, min_updates=2, max_updates=2, recalc_every=2, magnitude="taylor"
    )
    for mode in (jax.jit, lambda f: f):
        update, plain_update = mode(tx.update), mode(inner.update)
        state, plain, params = tx.init(PARAMS), inner.init(PARAMS), PARAMS
        for t, g in enumerate(GRADS[:4]):
            before = state.priority
            updates, state = update(g, state, params)
            expected, plain = plain_update(g, plain, params)
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
            if t % 2 == 0:
                factor = 1 + np.asarray(before.depths) / max(1, before.depths.max())
                wanted = [
                    f * exact_gain(np.float64(g[k]), np.float64(u)) / (1 + n)
                    for (k, u), n, f in zip(
                        expected.items(), before.counts, factor, strict=True
                    )
                ]
                np.testing.assert_allclose(
                    state.priority.scores, wanted, rtol=1e-4, atol=1e-6
                )
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(state.priority.quotas, [2] * 4)
        np.testing.assert_array_equal(state.priority.counts, [4] * 4)


@pytest.mark.usefixtures("quick_compilation")
def test_with_costs_it_is_gain_per_cost():
    """The same choice as by a score that knows the gains."""
    rng = np.random.default_rng(1)
    params = {f"layer_{i}": np.float32(rng.normal(size=(6, 6))) for i in range(4)}

    def loss(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    x = np.float32(rng.normal(size=(16, 6)))
    grads = jax.grad(loss)(params, x)
    build = functools.partial(
        prioritize, optax.adam(0.1), 0.6, costs=backward_costs(loss, params, x)
    )
    known = np.array([0.1 * np.sum(np.abs(g)) for g in grads.values()], np.float32)
    fixed = Score(lambda _: (), lambda x, s: (jnp.asarray(known), s))
    tx, other = build(magnitude="taylor", score="gradient"), build(score=fixed)
    _, state = tx.update(grads, tx.init(params), params)
    _, expected = other.update(grads, other.init(params), params)
    np.testing.assert_allclose(state.priority.scores, known, rtol=1e-4)
    np.testing.assert_array_equal(state.priority.quotas, expected.priority.quotas)
    assert len(set(np.asarray(state.priority.quotas).tolist())) > 1


# How it fits in.


@pytest.mark.usefixtures("lean", "quick_compilation")
@pytest.mark.parametrize("units", ["leaf", "element"])
def test_one_program_and_no_more_state(units):
    params = {k: PARAMS[k] for k in ("bias", "kernel")}
    build = functools.partial(prioritize, optax.adam(0.1), 0.5, units=units)
    tx = build(magnitude="taylor")
    assert kinds(tx.init(params)) == kinds(build().init(params))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for g in GRADS * 2:
        g = {k: g[k] for k in params}
        updates, new = update(g, state, params)
        assert kinds(new) == kinds(state) and kinds(updates) == kinds(g)
        state = new


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                yield from equations(sub)


def test_the_step_is_tried_only_where_there_are_to_be_new_quotas():
    """The first conditional has it in the branch taken at the start of a cycle."""

    def roots(magnitude):
        tx = prioritize(optax.adam(0.1), **ONE, magnitude=magnitude)
        state = tx.init(PARAMS)
        closed = jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
        large = lambda jaxpr: sum(
            eqn.primitive.name == "sqrt"
            and eqn.outvars[0].aval.shape == SHAPES["kernel"]
            for eqn in equations(jaxpr)
        )
        first = next(e for e in equations(closed.jaxpr) if e.primitive.name == "cond")
        inside = [large(branch.jaxpr) for branch in first.params["branches"]]
        return large(closed.jaxpr) - sum(inside), inside

    outside, inside = roots("l2")
    assert outside >= 1 and inside == [0, 0]
    assert roots("taylor") == (outside, [0, 1])


@pytest.mark.usefixtures("lean", "quick_compilation")
def test_it_can_be_differentiated():
    tx = prioritize(optax.adam(0.1), **ONE, magnitude="taylor")
    params = {k: PARAMS[k] for k in ("bias", "scale")}

    def after(g):
        updates, _ = tx.update(g, tx.init(params), params)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    slopes = jax.grad(after)(
        {"bias": jnp.array([1.0, 0.5, 2.0]), "scale": jnp.ones(())}
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_replicas_average_their_gains(quick_compilation):
    """Under shard_map, each replica with gradients of its own."""
    n, grads = 4, {k: np.stack([g[k] for g in GRADS[:4]]) for k in ("bias", "kernel")}
    grads["bias"][2] *= 1e3
    tx = prioritize(
        optax.sgd(0.1), **ONE, magnitude="taylor", score="gradient", axis_name="i"
    )
    mesh = jax.make_mesh((n,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(state, grads):
        own = jax.tree.map(lambda g: g[0], grads)
        return tx.update(own, state)[1].priority

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("i")), out_specs=P(), check_vma=True
    )
    state = jax.jit(mapped)(tx.init(jax.tree.map(lambda g: g[0], grads)), grads)
    expected = [
        0.1 * np.mean(np.sum(np.float64(g).reshape(n, -1) ** 2, 1))
        for g in grads.values()
    ]
    np.testing.assert_allclose(state.scores, expected, rtol=1e-5)


# Where it cannot be.


@pytest.mark.parametrize(
    "build",
    [
        priority_prop,
        lambda **kwargs: PriorityPropTrainer(
            (PARAMS, lambda params, x: x),
            optax.adam(0.1),
            lambda y, x: jnp.mean(x),
            transformation="chain",
            **kwargs,
        ),
    ],
    ids=["priority_prop", "trainer"],
)
def test_who_sees_no_steps_says_who_does(build):
    with pytest.raises(ValueError, match="'taylor'.*prioritize"):
        build(magnitude="taylor")


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="'taylor', got 'tailor'.*'taylor'?"):
        prioritize(optax.adam(0.1), magnitude="tailor")
    with pytest.raises(ValueError) as e:
        priority_prop(magnitude="tailor")
    assert "taylor" not in str(e.value)


@pytest.mark.parametrize("full", [False, True], ids=["some", "full"])
def test_params_that_do_not_match_are_named(full):
    settings = dict(budget=1.0, min_updates=2, max_updates=2, recalc_every=2)
    tx = prioritize(optax.adamw(0.1), **(settings if full else ONE), magnitude="taylor")
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    wrong = {"a": jnp.ones(3), "b": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"params\['b'\]"):
        tx.update(params, tx.init(params), wrong)
    with pytest.raises(ValueError, match="initialized for 2"):
        tx.update({"a": jnp.ones(3)}, tx.init(params), {"a": jnp.ones(3)})

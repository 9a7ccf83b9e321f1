"""Rule sets of three kinds that are not gradients, each against a formula of its own.

Relevances (messages that are no cotangents), total propagation (messages that are
pairs, at nodes the user marked), probes (messages that only say what came past).
"""

import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from priorityprop_jax.propagation import propagate, Rule, Rules, tag, tag_info, VJP


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def double():
    """64-bit types."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def vjp_of(op, inputs):
    """The cotangents of all inputs that have some, as a function; None for others."""
    inexact = [
        i for i, t in enumerate(op.inputs) if jnp.issubdtype(t.dtype, np.inexact)
    ]

    def some(*xs):
        full = list(inputs)
        for i, x in zip(inexact, xs, strict=True):
            full[i] = x
        return op.bind(*full)

    _, vjp = jax.vjp(some, *(inputs[i] for i in inexact))

    def back(cts):
        out = [None] * len(inputs)
        for i, ct in zip(inexact, vjp(cts), strict=True):
            out[i] = ct
        return out

    return back


def remember(op, *inputs):
    outputs = op.bind(*inputs)
    return outputs, (inputs, outputs)


# ---- (a) layer-wise relevance, epsilon rule (Weber et al. 2025, arXiv 2308.12053)


EPS = 1e-9


def affine_backward(op, saved, messages):
    """n = r / s(z); a * VJP_a(n) to activations, |p| * VJP_p(n) to parameters."""
    inputs, (z,) = saved
    n = messages[0] / (z + EPS * jnp.where(z < 0, -1, 1))
    sent = vjp_of(op, inputs)([n])
    return [
        None if v is None else (x if given else jnp.abs(x)) * v
        for x, v, given in zip(inputs, sent, op.given, strict=True)
    ]


AFFINE = Rule(remember, affine_backward)
SAME = Rule(
    lambda op, *xs: (op.bind(*xs), None),
    lambda op, _, messages: [messages[0], *(None for _ in op.inputs[1:])],
)


def affine_groups(equations):
    """A product, the broadcasts of a bias, and their sum are one operation."""
    users: dict[Any, list[Any]] = {}
    makers = {v: eqn for eqn in equations for v in eqn.outvars}
    for eqn in equations:
        for v in eqn.invars:
            if not hasattr(v, "val"):
                users.setdefault(v, []).append(eqn)

    def bias(v):
        """The broadcasts that make a value, or None if it is made otherwise."""
        eqn = makers.get(v)
        if eqn is None:
            return []
        if eqn.primitive.name != "broadcast_in_dim" or len(users[v]) != 1:
            return None
        before = bias(eqn.invars[0])
        return None if before is None else [*before, eqn]

    groups = {}
    for eqn in equations:
        if eqn.primitive.name != "add":
            continue
        for product, other in (eqn.invars, eqn.invars[::-1]):
            made = makers.get(product) if not hasattr(product, "val") else None
            if made is None or made.primitive.name != "dot_general":
                continue
            broadcasts = bias(other)
            if len(users[product]) == 1 and broadcasts:
                groups[id(eqn)] = [made, *broadcasts, eqn]
    inside = {id(e) for part in groups.values() for e in part}
    return [
        ("affine", groups[id(eqn)])
        if id(eqn) in groups
        else (eqn.primitive.name, [eqn])
        for eqn in equations
        if id(eqn) in groups or id(eqn) not in inside
    ]


RELEVANCE = Rules(
    {
        "affine": AFFINE,
        "dot_general": AFFINE,
        "add": AFFINE,
        "custom_jvp_call:relu": SAME,
        "max": SAME,
        **{name: VJP for name in ("slice", "squeeze", "broadcast_in_dim", "reshape")},
    },
    default=None,
    group=affine_groups,
)


def mlp(params, x, relu=jax.nn.relu):
    *hidden, last = params
    for w, b in hidden:
        x = relu(x @ w + b[None])
    return x @ last[0] + last[1][None]


def layers(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(m, n))), jnp.asarray(rng.normal(size=n)))
        for m, n in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def examples(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def stabilized(z):
    return z + EPS * np.where(z < 0, -1, 1)


def mlp_relevances(params, x, reward):
    """The same layer by layer in NumPy: feedbacks, and the relevance of the input."""
    activations, sums = [np.asarray(x)], []
    for k, (w, b) in enumerate(params):
        sums.append(activations[-1] @ np.asarray(w) + np.asarray(b))
        activations.append(np.maximum(sums[-1], 0) if k + 1 < len(params) else sums[-1])
    r, feedbacks = np.asarray(reward), []
    for k, (w, b) in reversed(list(enumerate(params))):
        w, b, a = np.asarray(w), np.asarray(b), activations[k]
        n = r / stabilized(sums[k])
        feedback = np.zeros_like(w)
        for example in range(len(a)):
            feedback += np.abs(w) * np.outer(a[example], n[example])
        feedbacks.append((feedback, np.abs(b) * n.sum(0)))
        r = a * (n @ w.T)
    return feedbacks[::-1], r


def assert_close(ours, theirs, rtol=1e-6):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@jax.custom_vjp
def backward_of_its_own(params, x):
    return mlp(params, x)


backward_of_its_own.defvjp(lambda *args: (mlp(*args), None), lambda *args: 1 / 0)

WAYS = {
    "plain": mlp,
    "jit": lambda params, x: jax.jit(mlp)(params, x),
    "layers in jit": lambda params, x: mlp(params, x, jax.jit(jax.nn.relu)),
    "maximum": lambda params, x: mlp(params, x, lambda z: jnp.maximum(z, 0)),
    "checkpoint": lambda params, x: jax.checkpoint(mlp)(params, x),
    "custom_vjp": backward_of_its_own,
    "cond": lambda params, x: lax.cond(
        x[0, 0] < 9, mlp, lambda params, x: x[:, :3] @ params[2][0][:3], params, x
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_relevance(way, double):
    params, x = layers([4, 5, 6, 3]), examples((7, 4))
    reward = examples((7, 3), 2)

    @jax.jit
    def relevances(params, x, reward):
        logits, back = propagate(WAYS[way], RELEVANCE, data=1)(params, x)
        return logits, back(reward)

    logits, (feedbacks, r) = relevances(params, x, reward)
    assert_close(logits, mlp(params, x))
    assert_close((feedbacks, r), mlp_relevances(params, x, reward))


def test_relevance_is_conserved(double):
    params = [(w, 0 * b) for w, b in layers([4, 5, 3])]
    x, reward = examples((7, 4)), examples((7, 3), 2)
    _, back = propagate(mlp, RELEVANCE, data=1)(params, x)
    np.testing.assert_allclose(back(reward)[1].sum(1), reward.sum(1), rtol=1e-5)


def test_relevance_is_gradient_times_weight(double):
    """Of ReLU nets, with the reward o * (1_y - softmax(o))."""
    params, x = layers([4, 6, 5, 3]), examples((9, 4))
    labels = jax.nn.one_hot(jnp.arange(9) % 3, 3, dtype=x.dtype)

    def entropy(params):
        return -jnp.sum(labels * jax.nn.log_softmax(mlp(params, x)))

    logits, back = propagate(lambda params: mlp(params, x), RELEVANCE)(params)
    (feedbacks,) = back(logits * (labels - jax.nn.softmax(logits)))
    gradients = jax.grad(entropy)(params)
    expected = jax.tree.map(lambda w, g: -jnp.abs(w) * g, params, gradients)
    assert_close(feedbacks, expected)


def recurrent(params, xs):
    """Weights shared over time: h = relu(x @ w + h @ u + b), o = h @ v + c."""
    w, u, b, v, c = params

    def step(h, x):
        return jax.nn.relu(h @ u + (x @ w + b[None])), None

    h = lax.scan(step, jnp.zeros((xs.shape[1], len(u)), xs.dtype), xs)[0]
    return h @ v + c[None]


def recurrent_relevances(params, xs, reward):
    w, u, b, v, c = map(np.asarray, params)
    xs, r = np.asarray(xs), np.asarray(reward)
    states, sums = [np.zeros((xs.shape[1], len(u)))], []
    for x in xs:
        sums.append(states[-1] @ u + (x @ w + b))
        states.append(np.maximum(sums[-1], 0))
    n = r / stabilized(states[-1] @ v + c)
    of_v, of_c = np.abs(v) * (states[-1].T @ n), np.abs(c) * n.sum(0)
    r = states[-1] * (n @ v.T)
    of_w, of_u, of_b, of_x = np.zeros_like(w), np.zeros_like(u), np.zeros_like(b), []
    for t in reversed(range(len(xs))):
        n = r / stabilized(sums[t])
        part = xs[t] @ w + b
        below = n * part / stabilized(part)  # 1, but for eps
        old = states[t] @ u
        n = n * old / stabilized(old)
        of_w += np.abs(w) * (xs[t].T @ below)
        of_b += np.abs(b) * below.sum(0)
        of_u += np.abs(u) * (states[t].T @ n)
        of_x.append(xs[t] * (below @ w.T))
        r = states[t] * (n @ u.T)
    return (of_w, of_u, of_b, of_v, of_c), np.stack(of_x[::-1])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_relevance_through_time(wrap, double):
    shapes = {"w": (3, 5), "u": (5, 5), "b": (5,), "v": (5, 2), "c": (2,)}
    params = [examples(s, k) for k, s in enumerate(shapes.values())]
    xs, reward = examples((4, 6, 3), 8), examples((6, 2), 9)

    @jax.jit
    def relevances(params, xs, reward):
        _, back = propagate(wrap(recurrent), RELEVANCE, data=1)(params, xs)
        return back(reward)

    found = relevances(params, xs, reward)
    assert_close(found, recurrent_relevances(params, xs, reward), rtol=1e-5)


def here(fun, mark):
    """Where a marked line of a function is, as errors say it."""
    lines, first = inspect.getsourcelines(fun)
    (k,) = [k for k, line in enumerate(lines) if mark in line]
    return re.escape(f"{__file__}:{first + k}")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        jax.vmap,
        lambda f: lambda x: lax.scan(lambda c, x: (f(c) + x, None), x[0], x)[0],
        lambda f: lambda x: lax.cond(x[0, 0] < 9, f, lambda x: x, x),
    ],
)
def test_operation_without_a_rule(wrap):
    def fun(x):
        return (
            jnp.tanh(x)  # here
            + x
        )

    value, back = propagate(wrap(fun), RELEVANCE)(jnp.ones((2, 2)))
    with pytest.raises(NotImplementedError) as error:
        back(jax.tree.map(jnp.ones_like, value))
    assert re.search(f"no rule for tanh at {here(fun, '# here')}", str(error.value))


def test_operation_without_a_rule_where_no_message_comes():
    fun = lambda x: (jnp.tanh(x), x + x, lax.stop_gradient(jnp.tanh(x)) + x)
    _, back = propagate(fun, RELEVANCE, data=0)(jnp.ones(2))
    np.testing.assert_allclose(back((None, jnp.ones(2), None))[0], [1, 1], rtol=1e-5)
    np.testing.assert_allclose(
        back((None, None, jnp.ones(2)))[0], [1 / (1 + np.tanh(1))] * 2, rtol=1e-5
    )


# ---- (b) total propagation (Parmas et al. 2018; Proppo, NeurIPS 2022)


class Pair(NamedTuple):
    """The message to a sampled state."""

    v: jax.Array  # cotangent
    cost: jax.Array  # of all that follows, of this particle


class Estimates(NamedTuple):
    """The message to the mean of a state: cotangents by two estimators; the cost."""

    lr: jax.Array
    rp: jax.Array
    cost: jax.Array


def cost_backward(op, inputs, messages):
    (sent,) = vjp_of(op, inputs)([messages[0].v])
    return [Pair(sent, messages[0].cost)]


def sample_backward(op, saved, messages):
    """Nothing to the sample itself; its mean gets both estimates."""
    x, arrays = saved
    info = tag_info(op, x, arrays)
    n = lax.psum(1, info["axis"])
    v, cost = messages[0]
    advantage = n / (n - 1) * (cost - lax.pmean(cost, info["axis"]))
    score = (x - info["mean"]) / info["scale"] ** 2
    sent = {"mean": Estimates(advantage / n * score, v, cost), "scale": None}
    return [None, sent["mean"], sent["scale"]]


def variance(tree, axis):
    """Over particles, summed over everything else."""
    n = lax.psum(1, axis)
    of = lambda x: jnp.sum((x - lax.pmean(x, axis)) ** 2)
    return lax.psum(sum(map(of, jax.tree.leaves(tree))), axis) / (n - 1)


def mean_backward(op, inputs, messages, weight=None):
    """Both estimates as far as the parameters of this step, weighted by variance."""
    ((lr, rp, cost),) = messages
    back = vjp_of(op, inputs)
    lr, rp = back([lr]), back([rp])
    params = [i for i, given in enumerate(op.given) if not given]
    of_lr, of_rp = (variance([x[i] for i in params], "particles") for x in (lr, rp))
    total = of_lr + of_rp
    k = jnp.where(total == 0, 0.5, of_rp / jnp.where(total == 0, 1, total))
    k = k if weight is None else weight
    joined = [k * a + (1 - k) * b for a, b in zip(lr, rp, strict=True)]
    return [m if i in params else Pair(m, cost) for i, m in enumerate(joined)]


def total_propagation(weight=None):
    inputs = lambda op, *xs: (op.bind(*xs), xs)
    return Rules(
        {
            "jit:cost": Rule(inputs, cost_backward),
            "jit:dynamics": Rule(
                inputs, lambda *args: mean_backward(*args, weight=weight)
            ),
            "tag:sample": Rule(lambda op, x, *xs: ([x], (x, xs)), sample_backward),
        },
        default=None,
    )


GOAL, PULL, STEPS, PARTICLES = 0.5, 0.3, 5, 6


@jax.jit
def dynamics(params, s):
    return s + PULL * jnp.tanh(s @ params["w"] + params["b"])


@jax.jit
def cost(s):
    return 1 - jnp.exp(-0.5 * jnp.sum((s - GOAL) ** 2))


def rollout(params, start, noise, scale):
    """The costs of one particle over time."""

    def step(s, e):
        mu = dynamics(params, s)
        s = tag(mu + scale * e, "sample", mean=mu, scale=scale, axis="particles")
        return s, cost(s)

    return lax.scan(step, start, noise)[1]


def reference(params, start, noise, scale, weight=None):
    """The formulas, step by step for all particles at once, in NumPy."""
    w, b = np.asarray(params["w"]), np.asarray(params["b"])
    n = len(start)
    states, means = [np.asarray(start)], []
    for t in range(STEPS):
        s = states[-1]
        means.append(s + PULL * np.tanh(s @ w + b))
        states.append(means[-1] + scale * noise[:, t])
    sums = {"w": np.zeros_like(w), "b": np.zeros_like(b)}
    v, following, weights = np.zeros_like(states[0]), np.zeros(n), []
    for t in reversed(range(STEPS)):
        s, before = states[t + 1], states[t]
        falls = np.exp(-0.5 * ((s - GOAL) ** 2).sum(1))
        following = following + 1 - falls
        v = v + (s - GOAL) * falls[:, None] / n
        advantage = n / (n - 1) * (following - following.mean())
        score = (s - means[t]) / scale**2
        slope = PULL * (1 - np.tanh(before @ w + b) ** 2)
        found = []
        for ct in (score * advantage[:, None] / n, v):
            of_b = ct * slope
            of_w = before[:, :, None] * of_b[:, None, :]
            spread = of_b.var(0, ddof=1).sum() + of_w.var(0, ddof=1).sum()
            found.append((of_w.sum(0), of_b.sum(0), ct + of_b @ w.T, spread))
        lr, rp = found
        k = rp[3] / (lr[3] + rp[3]) if weight is None else weight
        weights.append(k)
        sums["w"] += k * lr[0] + (1 - k) * rp[0]
        sums["b"] += k * lr[1] + (1 - k) * rp[1]
        v = k * lr[2] + (1 - k) * rp[2]
    return sums, v, following, weights


@pytest.mark.parametrize("weight", [None, 0.0, 1.0])
def test_total_propagation(weight, double):
    params = {"w": examples((2, 2)), "b": examples((2,), 2)}
    start, noise = examples((PARTICLES, 2), 3), examples((PARTICLES, STEPS, 2), 4)
    scale = jnp.float64(0.4)

    def one(params, start, noise):
        """The estimate of one particle; params are the same for all."""
        run = propagate(rollout, total_propagation(weight), data=(1, 2, 3))
        costs, back = run(params, start, noise, scale)
        sent, state, *others = back(Pair(jnp.full(STEPS, 1 / PARTICLES), costs))
        assert others == [None, None]
        return lax.psum(sent, "particles"), state

    found, state = jax.jit(
        jax.vmap(one, (None, 0, 0), out_axes=(None, 0), axis_name="particles")
    )(params, start, noise)
    sums, v, following, weights = reference(
        params, start, np.asarray(noise), 0.4, weight
    )
    assert_close(found, sums)
    assert_close(state, Pair(v, following))
    if weight is None:
        assert 0 < min(weights) < max(weights) < 1
    if weight == 0.0:  # all by reparameterization: the gradient
        costs = lambda params: jax.vmap(rollout, (None, 0, 0, None))(
            params, start, noise, scale
        )
        gradient = jax.grad(lambda params: jnp.sum(costs(params)) / PARTICLES)(params)
        assert_close(found, gradient)


# ---- (c) probes: squared norms of the gradients, without the gradients


class Norm(NamedTuple):
    """The message to a parameter."""

    squared: jax.Array


def is_parameter(op, i):
    return op.aligned[i] and not op.given[i]


def probe_backward(op, saved, messages):
    if any(isinstance(m, Norm) for m in messages):
        return messages  # a parameter in another type
    sent = VJP.backward(op, saved, messages)
    norm = lambda m: None if m is None else Norm(jnp.sum(m**2))
    return [norm(m) if is_parameter(op, i) else m for i, m in enumerate(sent)]


def probe_dot_backward(op, inputs, messages):
    """|sum_i a_i g_i^T|^2 = sum_ij (a_i . a_j) (g_i . g_j)."""
    (a, w), (g,) = inputs, messages
    assert op.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    assert is_parameter(op, 1)
    products = lambda x: lax.dot_general(x, x, (((1,), (1,)), ((), ())))
    back = lax.dot_general(g, w, (((1,), (1,)), ((), ())))
    return [back, Norm(jnp.sum(products(a) * products(g)))]


def add_probes(a, b):
    if isinstance(a, Norm):
        raise ValueError("norms of parts of a gradient say nothing about their sum")
    return a + b


PROBES = Rules(
    {"dot_general": Rule(lambda op, *xs: (op.bind(*xs), xs), probe_dot_backward)},
    default=Rule(VJP.forward, probe_backward),
    add=add_probes,
)


def shapes_in(jaxpr):
    """The shapes of all that is computed, however deep."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "optimization_barrier":  # of jax.checkpoint
            yield from (v.aval.shape for v in eqn.outvars)
        for inner in eqn.params.values():
            for one in inner if isinstance(inner, tuple) else (inner,):
                one = getattr(one, "jaxpr", one)
                if hasattr(one, "eqns"):
                    yield from shapes_in(one)


def squares(gradients):
    return jax.tree.map(lambda g: np.sum(np.asarray(g) ** 2), gradients)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_probes(wrap, double):
    params, x = layers([4, 5, 6, 3]), examples((7, 4))

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(wrap(mlp)(params, x)) ** 2)

    def norms(params):
        _, back = propagate(loss, PROBES)(params)
        return back(jnp.ones(()))[0]

    found = jax.jit(norms)(params)
    expected = squares(jax.grad(loss)(params))
    assert_close([m.squared for m in leaves(found)], jax.tree.leaves(expected))
    weights = {shape for w, _ in params for shape in (w.shape, w.shape[::-1])}
    computed = set(shapes_in(jax.make_jaxpr(norms)(params).jaxpr))
    assert not weights & computed
    assert weights & set(shapes_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Norm))


def test_probes_in_a_loop_over_layers(double):
    ws, bs, x = examples((3, 4, 4)), examples((3, 4), 2), examples((7, 4), 3)

    def loss(ws, bs):
        layer = lambda x, p: (jnp.tanh(x @ p[0] + p[1][None]), None)
        return jnp.sum(lax.scan(layer, x, (ws, bs))[0] ** 2)

    _, back = propagate(loss, PROBES)(ws, bs)
    gradients = jax.grad(loss, (0, 1))(ws, bs)
    for message, g in zip(back(1.0), gradients, strict=True):
        expected = jnp.sum(g.reshape(3, -1) ** 2, axis=1)
        np.testing.assert_allclose(message.squared, expected, rtol=1e-6)


def test_probes_of_shared_weights():
    w, x = jnp.ones((3, 3)), jnp.ones((2, 3))
    _, back = propagate(lambda w: jnp.sum(jnp.tanh(x @ w) @ w), PROBES)(w)
    with pytest.raises(ValueError, match="norms of parts"):
        back(1.0)


# ---- what a rule set can do


def scaled(factor):
    """The VJP of a rule, times a number."""
    times = lambda m: None if m is None else factor * m
    return Rule(VJP.forward, lambda *args: [times(m) for m in VJP.backward(*args)])


def test_label_before_name_before_default():
    def fun(x):
        return tag(x, "a") + tag(2 * x, "b") + jax.nn.relu(x) + jax.nn.silu(x)

    def slope(*names):
        by_name = {name: scaled(10.0**k) for k, name in enumerate(names, start=1)}
        return float(propagate(fun, Rules(by_name))(1.0)[1](1.0)[0])

    silu = float(jax.grad(jax.nn.silu)(1.0))
    np.testing.assert_allclose(slope(), 4 + silu)
    np.testing.assert_allclose(slope("tag"), 31 + silu)
    np.testing.assert_allclose(slope("tag", "tag:b"), 211 + silu)
    np.testing.assert_allclose(slope("tag:c"), 4 + silu)
    np.testing.assert_allclose(slope("custom_jvp_call:relu"), 13 + silu)
    np.testing.assert_allclose(slope("jit:silu"), 4 + 10 * silu, rtol=1e-6)


def test_rules_come_before_structure():
    """A rule set may have rules for what is otherwise walked through, or stopped at."""
    fun = lambda x: lax.stop_gradient(x) + jax.checkpoint(jnp.sin)(x)
    assert propagate(fun)(0.0)[1](1.0) == (1.0,)
    through = Rule(VJP.forward, lambda op, _, messages: messages)
    run = propagate(fun, Rules({"stop_gradient": through, "remat2": scaled(5.0)}))
    assert run(0.0)[1](1.0) == (6.0,)


def test_default_is_for_all_others():
    rules = Rules({"sin": VJP}, default=scaled(2.0))
    _, back = propagate(lambda x: jnp.sin(x * x), rules)(jnp.float32(3.0))
    np.testing.assert_allclose(back(1.0)[0], 2 * 6 * np.cos(9.0), rtol=1e-6)


def longest_paths():
    """Messages count operations up to the output; `add` takes the longest way."""
    more = lambda op, _, messages: [
        1 + max_of([m for m in messages if m is not None]) for _ in op.inputs
    ]
    max_of = lambda ms: ms[0] if len(ms) == 1 else jnp.maximum(ms[0], max_of(ms[1:]))
    remember = lambda op, *xs: (op.bind(*xs), None)
    return Rules(default=Rule(remember, more), add=jnp.maximum)


def test_custom_add():
    fun = lambda x, y: jnp.sin(jnp.sin(jnp.sin(x))) + x * y
    run = propagate(fun, longest_paths())
    assert run(1.0, 2.0)[1](0) == (4, 2)

    def loop(x, ys):  # five operations deep a turn, of which x comes in at the second
        return lax.scan(lambda c, y: (jnp.sin(jnp.sin(c) * x), jnp.cos(y)), x, ys)[0]

    _, back = propagate(loop, longest_paths())(1.0, jnp.ones(4))
    dx, dys = jax.jit(back)(0)
    assert dx == 12 and dys is None


def test_rules_are_used_again():
    rules, args = Rules({"sin": scaled(2.0)}), (jnp.float32(1.0),)
    first, second = (propagate(f, rules) for f in (jnp.sin, lambda x: jnp.sin(2 * x)))
    (_, a), (_, b) = first(*args), second(*args)
    for _ in range(2):
        np.testing.assert_allclose(b(1.0)[0], 4 * np.cos(2.0), rtol=1e-6)
        np.testing.assert_allclose(a(1.0)[0], 2 * np.cos(1.0), rtol=1e-6)


def test_group_shares_inputs_and_shows_what_is_used():
    def fun(x, y):
        a = x * y
        b = a + x
        return jnp.sin(b) * a, 3 * y

    seen = []

    def forward(op, *inputs):
        seen.append(op)
        return VJP.forward(op, *inputs)

    def group(equations):
        first, second, *others = equations
        assert [e.primitive.name for e in (first, second)] == ["mul", "add"]
        alone = [(e.primitive.name, [e]) for e in others]
        return [("both", [first, second]), *alone, ("nothing", [])]

    rules = Rules({"both": Rule(forward, VJP.backward)}, group=group)
    values, back = propagate(fun, rules)(2.0, 3.0)
    expected, vjp = jax.vjp(fun, 2.0, 3.0)
    assert_close(values, expected)
    assert_close(back((1.0, 1.0)), vjp((1.0, 1.0)))
    (op,) = seen
    assert op.name == "both" and len(op.equations) == 2
    assert len(op.inputs) == 2 and len(op.outputs) == 2
    assert re.search(here(fun, "a + x"), str(op))


def test_wrong_groups():
    fun = lambda x: jnp.sin(jnp.cos(x))
    single = lambda eqns: [(e.primitive.name, [e]) for e in eqns]

    def run(group):
        propagate(fun, Rules(group=group))(1.0)

    run(single)
    for wrong in (
        lambda eqns: single(eqns)[1:],
        lambda eqns: single(eqns) * 2,
        lambda eqns: [("all", eqns), *single(eqns)],
    ):
        with pytest.raises(ValueError, match="each equation in one group"):
            run(wrong)
    for wrong in (
        lambda eqns: single(eqns)[::-1],
        lambda eqns: [("all", eqns[::-1])],
    ):
        with pytest.raises(ValueError, match="order.* sin at .*test_rules.* too early"):
            run(wrong)


def test_rules_that_return_too_little():
    fun = lambda x: jnp.sum(x * x)
    few = Rule(lambda op, *xs: ([], None), VJP.backward)
    with pytest.raises(ValueError, match="rule for mul at .* 1 outputs, got 0"):
        propagate(fun, Rules({"mul": few}))(jnp.ones(2))
    few = Rule(VJP.forward, lambda op, _, messages: messages)
    _, back = propagate(fun, Rules({"mul": few}))(jnp.ones(2))
    with pytest.raises(ValueError, match="rule for mul at .* 2 messages, got 1"):
        back(1.0)


def test_messages_of_two_structures():
    odd = Rule(VJP.forward, lambda *args: [(m,) for m in VJP.backward(*args)])
    fun = lambda i, x: lax.cond(i > 0, jnp.sin, jnp.cos, x)
    _, back = propagate(fun, Rules({"sin": odd}))(1, 2.0)
    with pytest.raises(TypeError, match="one structure"):
        back(1.0)

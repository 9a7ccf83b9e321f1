"""The same training in every framework's own loop, and in every way to compile it."""

import functools
from collections.abc import Callable

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from priorityprop_jax import active, infer_depths, prioritize, priority_prop


SIZES = (6, 9, 7, 4)
STEPS = 25
NAMES = [f"Dense_{i}" for i in range(len(SIZES) - 1)]


def before_adam(**kwargs):
    return optax.chain(priority_prop(**kwargs), optax.adam(1e-2))


def around_adam(**kwargs):
    return prioritize(optax.adam(1e-2), **kwargs)


# Units along axes, given as a prefix tree, and whole leaves.
ROWS = {name: (0,) if name == "Dense_1" else () for name in NAMES}
SETUPS = {"priority_prop": (before_adam, ROWS), "prioritize": (around_adam, "leaf")}
# By hand: the last layer is at the loss.
DEPTHS = {name: {"kernel": d, "bias": d} for d, name in enumerate(reversed(NAMES))}

pytestmark = pytest.mark.usefixtures("quick_compilation")
both = pytest.mark.parametrize("setup", SETUPS)


def build(setup, depths=DEPTHS):
    make, units = SETUPS[setup]
    return make(budget=0.4, max_updates=10, units=units, depths=depths)


@pytest.fixture(autouse=True)
def _traces_are_counted_per_test():
    chex.clear_trace_counter()


def linear(params, x):
    return x @ params["kernel"] + params["bias"][None]


def predict(params, x):
    for name in NAMES[:-1]:
        x = jnp.tanh(linear(params[name], x))
    return linear(params[NAMES[-1]], x)


def error(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def loss_fn(params, x, y):
    return error(predict(params, x), y)


def initial_params():
    rng = np.random.default_rng(0)
    params = {}
    for name, m, n in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
        kernel = rng.normal(size=(m, n)).astype(np.float32) * m**-0.5
        params[name] = {"kernel": kernel, "bias": np.zeros(n, np.float32)}
    return params


def batches():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, 8, SIZES[0])).astype(np.float32)
    return x, np.sin(x @ rng.normal(size=(SIZES[0], SIZES[-1])).astype(np.float32))


def steps():
    return zip(*batches(), strict=True)


def plain_step(tx, params, state, x, y):
    grads = jax.grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def plain_loop(setup):
    """Params, quotas and active leaves after each step of the loop compared with."""
    tx = build(setup)
    params, history = jax.tree.map(jnp.array, initial_params()), []
    state = tx.init(params)
    step = jax.jit(functools.partial(plain_step, tx))
    for batch in steps():
        params, state = step(params, state, *batch)
        history.append((params, optax.tree.get(state, "quotas"), active(state, params)))
    assert step._cache_size() == 1
    return jax.device_get(history)


def in_step(setup):
    """Each batch, and what the plain loop has after it."""
    return zip(steps(), plain_loop(setup), strict=True)


def check(params, quotas, expected, used=None):
    """As the plain loop has it, to rounding. Leaves are in the same order."""
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, jax.tree.leaves(params), jax.tree.leaves(expected[0]))
    (quotas,) = jax.tree.leaves(quotas)
    np.testing.assert_array_equal(quotas, expected[1])
    if used is not None:
        assert jax.tree.leaves(used) == jax.tree.leaves(expected[2])


@both
def test_plain_loop_spends_the_budget_unevenly(setup):
    history = plain_loop(setup)
    quotas = np.stack([quotas for _, quotas, _ in history])
    assert len(np.unique(quotas, axis=0)) == 3  # one allocation per cycle of ten steps
    np.testing.assert_array_equal(quotas.sum(1), np.ceil(0.4 * 10 * quotas.shape[1]))
    assert (quotas.min(1) < quotas.max(1)).all()
    used = [sum(jax.tree.leaves(used)) for *_, used in history]
    assert used[9] == used[19] == 6  # all leaves before a new cycle
    assert min(used) < 6


@both
def test_scan_over_steps(setup):
    tx = build(setup)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(params, data):
        def step(carry, batch):
            params, state = plain_step(tx, *carry, *batch)
            return (params, state), (params, optax.tree.get(state, "quotas"))

        return jax.lax.scan(step, (params, tx.init(params)), data)[1]

    all_params, all_quotas = run(initial_params(), batches())
    for t, expected in enumerate(plain_loop(setup)):
        now = jax.tree.map(lambda x, t=t: x[t], (all_params, all_quotas))
        check(*now, expected)


def test_without_jit():
    tx = build("prioritize")
    params = initial_params()
    state = tx.init(params)
    for batch, expected in in_step("prioritize"):
        params, state = plain_step(tx, params, state, *batch)
        check(params, optax.tree.get(state, "quotas"), expected, active(state, params))


def test_donated_buffers():
    tx = build("priority_prop")
    params = jax.tree.map(jnp.array, initial_params())
    state = tx.init(params)
    step = jax.jit(plain_step, static_argnums=0, donate_argnums=(1, 2))
    for batch, expected in in_step("priority_prop"):
        before = params
        params, state = step(tx, params, state, *batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        check(params, optax.tree.get(state, "quotas"), expected, active(state, params))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in SIZES[1:-1]:
            x = jnp.tanh(nn.Dense(n)(x))
        return nn.Dense(SIZES[-1])(x)


@both
def test_linen_train_state(setup):
    model = Linen()
    variables = {"params": initial_params()}
    depths = infer_depths(model.apply, variables, batches()[0][0])["params"]
    assert depths == DEPTHS
    tx = build(setup, depths)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, x, y):
        loss = lambda params: error(state.apply_fn({"params": params}, x), y)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for batch, expected in in_step(setup):
        state = step(state, *batch)
        used = active(state.opt_state, state.params)
        check(state.params, optax.tree.get(state.opt_state, "quotas"), expected, used)


class Nnx(nnx.Module):
    """Named as above, so that the leaves are in the same order."""

    def __init__(self, rngs):
        for name, m, n in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
            setattr(self, name, nnx.Linear(m, n, rngs=rngs))
        self.calls = nnx.BatchStat(jnp.zeros(()))  # no parameter, not for wrt=Param

    def __call__(self, x):
        self.calls[...] += 1.0
        for name in NAMES[:-1]:
            x = jnp.tanh(getattr(self, name)(x))
        return getattr(self, NAMES[-1])(x)


def nnx_model():
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, nnx.State(initial_params()))
    return model


def nnx_depths(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    fun = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)
    return infer_depths(fun, params, batches()[0][0])


@both
def test_nnx_optimizer(setup):
    model = nnx_model()
    depths = nnx_depths(model)
    assert isinstance(depths, nnx.State)
    assert jax.tree.leaves(depths) == jax.tree.leaves(DEPTHS)
    tx = build(setup, depths)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer, x, y):
        grads = nnx.grad(lambda model: error(model(x), y))(model)
        optimizer.update(model, grads)

    for batch, expected in in_step(setup):
        step(model, optimizer, *batch)
        params = nnx.state(model, nnx.Param)
        quotas = optax.tree.get(optimizer.opt_state, "quotas")
        used = active(optimizer.opt_state, params)
        assert jax.tree.structure(used) == jax.tree.structure(params)
        check(params, quotas, expected, used)
    assert model.calls[...] == STEPS


@pytest.mark.parametrize("kind", ["nnx.State", "PyTree of names", "reversed"])
def test_nnx_depths_are_found_by_name(kind):
    model = nnx_model()
    depths = {"nnx.State": nnx_depths(model), "PyTree of names": DEPTHS}.get(kind)
    if kind == "reversed":  # and they do matter
        depths = jax.tree.map(lambda d: 2 - d, DEPTHS)
    tx = build("prioritize", depths)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    found = optax.tree.get(optimizer.opt_state, "depths")
    found = jax.tree.leaves(found)[0]
    expected = [2, 2, 1, 1, 0, 0]
    np.testing.assert_array_equal(
        found, expected[::-1] if kind == "reversed" else expected
    )


class Equinox(eqx.Module):
    """Parameters next to what is none: a function, a flag and a count."""

    layers: list
    calls: int
    activation: Callable

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), len(NAMES))
        self.layers = [
            eqx.nn.Linear(m, n, key=key)
            for m, n, key in zip(SIZES[:-1], SIZES[1:], keys, strict=True)
        ]
        self.calls, self.activation = 0, jnp.tanh

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def equinox_model():
    """With the parameters above; equinox has its kernels transposed, and first."""
    model = Equinox()
    for i, p in enumerate(initial_params().values()):
        where = lambda m, i=i: (m.layers[i].weight, m.layers[i].bias)
        model = eqx.tree_at(
            where, model, (jnp.array(p["kernel"].T), jnp.array(p["bias"]))
        )
    return model


def as_dict(model):
    return {
        name: {"kernel": layer.weight.T, "bias": layer.bias}
        for name, layer in zip(NAMES, model.layers, strict=True)
    }


def test_equinox():
    model = equinox_model()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    fun = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    depths = infer_depths(fun, params, batches()[0][0])
    tx = build("prioritize", depths)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    @chex.assert_max_traces(1)
    def step(model, state, x, y):
        grads = eqx.filter_grad(lambda m: error(jax.vmap(m)(x), y))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    for batch, (expected, quotas, used) in in_step("prioritize"):
        model, state = step(model, state, *batch)
        swapped = np.reshape(quotas, (-1, 2))[:, ::-1].ravel()
        found = optax.tree.get(state, "quotas")
        check(as_dict(model), found, (expected, swapped))
        now = active(state, eqx.filter(model, eqx.is_inexact_array))
        assert jax.tree.structure(now).num_leaves == 6  # None where None was
        as_bools = [[layer.bias, layer.weight] for layer in now.layers]
        assert jax.tree.leaves(as_bools) == jax.tree.leaves(used)

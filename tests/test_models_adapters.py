"""Models in functional form give what their own libraries give."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx

from priorityprop_jax.training._models import as_functional, BoundModel


KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(0), (6, 4))


def close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


# --- nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        layers = [nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)]
        self.layers = nnx.List(layers)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))
        self.table = nnx.Param(jnp.arange(3))  # not to be trained: integers

    def __call__(self, x):
        self.calls[...] += 1
        x = self.norm(self.layers[0](x))
        return self.layers[1](self.dropout(x))


def test_nnx_is_the_module_itself():
    module = Net(nnx.Rngs(0))
    model = as_functional(module)
    assert set(model.params) == {"layers", "norm"} and set(model.params["layers"]) == {
        0,
        1,
    }
    assert model.kind == "nnx" and model.couples_examples
    reference = nnx.clone(module)
    params, state = model.params, model.state
    apply = jax.jit(functools.partial(model.apply, train=True, key=KEY))
    for _ in range(3):  # streams and statistics go on
        reference.train()
        outputs, state = apply(params, state, X)
        close(outputs, reference(X))
    close(state["norm"]["mean"], reference.norm.mean[...])
    assert state["calls"] == 3
    reference.eval()
    outputs, after = model.apply(params, state, X, train=False, key=KEY)
    close(outputs, reference(X))
    close(after["norm"], state["norm"])
    # The user's own is as it was until told.
    assert module.calls[...] == 0 and not module.dropout.deterministic
    moved = jax.tree.map(lambda x: x + 1, params)
    model.write_back(moved, state)
    close(module.layers[1].bias[...], reference.layers[1].bias[...] + 1)
    assert module.calls[...] == 3 and not module.dropout.deterministic


def test_nnx_gradients_are_those_of_nnx():
    module = Net(nnx.Rngs(0))
    model = as_functional(module)
    module.eval()
    mine = jax.grad(
        lambda p: jnp.sum(model.apply(p, model.state, X, train=False, key=KEY)[0] ** 2)
    )(model.params)
    chosen = nnx.DiffState(0, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("table"))))
    theirs = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=chosen)(module)
    close(jax.tree.leaves(mine), jax.tree.leaves(theirs))


def test_nnx_keeps_nothing_that_was_not_there():
    class Noting(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return self.linear(x)

    model = as_functional(Noting(nnx.Rngs(0)))
    outputs, state = model.apply(model.params, model.state, X, train=True, key=KEY)
    assert outputs.shape == (6, 2)
    assert jax.tree.structure(state) == jax.tree.structure(model.state)


def test_nnx_shares_what_is_tied():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.second = nnx.Linear(4, 4, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    module = Tied(nnx.Rngs(0))
    model = as_functional(module)
    assert len(jax.tree.leaves(model.params)) == 3
    outputs, _ = model.apply(model.params, model.state, X, train=True, key=KEY)
    close(outputs, module(X))


def test_a_mode_with_nothing_to_train():
    class Empty(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(jnp.arange(3))

    with pytest.raises(ValueError, match="no trainable parameters: no flax.nnx.Param"):
        as_functional(Empty())
    with pytest.raises(ValueError, match="no trainable parameters"):
        as_functional(({}, lambda p, x: x))


# --- linen


class Linen(nn.Module):
    says: str = "train"

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(2)(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(2)(x))


@pytest.mark.parametrize("given", ["example", "shape", "variables", "frozen"])
def test_linen_is_apply(given):
    module = Linen()
    variables = module.init({"params": jax.random.key(7)}, X)
    variables = {k: variables[k] for k in ("params", "batch_stats")}
    if given == "example":
        model = as_functional(module, example_input=X, seed=7)
    elif given == "shape":
        like = jax.ShapeDtypeStruct(X.shape, X.dtype)
        model = as_functional(module, example_input=like, seed=7)
    else:
        freeze = core.freeze if given == "frozen" else lambda x: x
        model = as_functional(module, freeze(variables))
    assert model.kind == "linen" and model.couples_examples
    assert set(model.state) == {"batch_stats"} and type(model.params) is dict
    if given in ("variables", "frozen"):
        close(model.params, variables["params"])
    everything = {"params": model.params, **model.state}
    rngs = {"params": KEY, "dropout": jax.random.fold_in(KEY, 1)}
    expected, new = module.apply(
        everything, X, True, rngs=rngs, mutable=["batch_stats"]
    )
    outputs, state = model.apply(model.params, model.state, X, train=True, key=KEY)
    close(outputs, expected)
    close(state, dict(new))
    outputs, after = model.apply(model.params, state, X, train=False, key=KEY)
    close(outputs, module.apply({"params": model.params, **new}, X))
    close(after, state)


def test_linen_told_by_another_name():
    model = as_functional(Deterministic(), example_input=X)
    assert model.state == {} and not model.couples_examples
    call = functools.partial(model.apply, model.params, {}, X)
    one, two = (call(train=True, key=jax.random.key(i))[0] for i in range(2))
    close(one, call(train=True, key=jax.random.key(0))[0])
    assert not np.array_equal(one, two)
    evaluated = [call(train=False, key=jax.random.key(i))[0] for i in range(2)]
    close(*evaluated)


def test_linen_params_alone_and_boxed():
    boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    module = nn.Dense(2, kernel_init=boxed)
    model = as_functional(module, example_input=X)
    assert isinstance(model.params["kernel"], jax.Array)
    again = as_functional(module, model.params)
    close(again.params, model.params)


def test_linen_needs_something():
    with pytest.raises(ValueError, match="example_input="):
        as_functional(nn.Dense(2))


# --- functions


def test_functions():
    params = {"w": jnp.ones((4, 2))}

    def apply_fn(p, x, training, rng):
        noise = jax.random.normal(rng, (2,)) if training else jnp.zeros(2)
        return x @ p["w"] + noise[None]

    for model in (as_functional((params, apply_fn)), as_functional(apply_fn, params)):
        assert model.kind == "function" and model.state == {}
        outputs, state = model.apply(params, {}, X, train=True, key=KEY)
        close(outputs, apply_fn(params, X, True, KEY))
        assert state == {}
        close(model.apply(params, {}, X, train=False, key=KEY)[0], X @ params["w"])
        model.write_back(params, {})


def test_a_bound_model_takes_any_arguments():
    apply_fn = lambda p, x, y, scale=1.0: scale * (x + y) * p
    model = as_functional((jnp.ones(()), apply_fn)).bind(
        jnp.float32(2.0), {}, True, KEY
    )
    assert isinstance(model, BoundModel) and model.train
    assert model(1.0, 2.0, scale=3.0) == 18.0


# --- what cannot be meant


class _Odd:
    __name__ = "odd"


@pytest.mark.parametrize(
    "args, error, message",
    [
        (
            (_Odd(),),
            TypeError,
            "flax.nnx.Module, a flax.linen.Module, or a pair .*_Odd",
        ),
        ((lambda p, x: x,), TypeError, "for a function give params="),
        ((({}, lambda p, x: x), {}), ValueError, "params came twice"),
        ((({"n": jnp.arange(3)}, abs),), TypeError, r"params\['n'\] .* got int32"),
        ((({"n": [1.0]}, abs),), TypeError, r"params\['n'\]\[0\] .* got float"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        as_functional(*args)


def test_params_of_an_nnx_module_are_its_own():
    with pytest.raises(ValueError, match="leave out params="):
        as_functional(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"w": X})


def test_functions_need_no_flax():
    code = (
        "import sys, jax.numpy as jnp\n"
        "from priorityprop_jax.training._models import as_functional\n"
        "as_functional((jnp.ones(2), lambda p, x: x))\n"
        "assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

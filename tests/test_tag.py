"""Tags stay where they were put, change nothing, and can be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from priorityprop_jax.propagation import propagate, Rule, Rules, tag, tag_info


pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


def tags(fun, *args):
    """The tags in the jaxpr of a function, however deep: names and shapes."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "tag":
                shapes = [v.aval.shape for v in eqn.invars]
                found.append((eqn.params["name"], *shapes))
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(fun)(*args).jaxpr)
    return found


def test_returns_what_it_is_given():
    tree = {"a": X, "b": (np.float32(2), None, 3), "key": jax.random.key(0)}
    for mark in (tag, jax.jit(tag, static_argnums=1)):
        marked = mark(tree, "all")
        assert jax.tree.structure(marked) == jax.tree.structure(tree)
        np.testing.assert_array_equal(marked["a"], X)
        assert marked["b"][0] == 2.0 and marked["b"][2] == 3
        assert marked["key"] == tree["key"]
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(marked))


def test_weak_types_stay_weak():
    assert jnp.float16(1) * tag(2.0, "number") == jnp.float16(2)
    assert (jnp.float16(1) * tag(2.0, "number")).dtype == jnp.float16


def test_each_leaf_is_an_operation():
    assert tags(lambda x: tag({"a": x, "b": x[0]}, "t"), X) == [
        ("t", (2, 3)),
        ("t", (3,)),
    ]


STRUCTURES = {
    "jit": lambda f: jax.jit(f),
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x))),
    "value_and_grad": lambda f: jax.value_and_grad(lambda x: jnp.sum(f(x) ** 2)),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "checkpoint": lambda f: jax.checkpoint(f),
    "scan": lambda f: lambda x: lax.scan(lambda c, x: (f(x), c), f(x[0]), x)[1],
    "cond": lambda f: lambda x: lax.cond(x[0, 0] > 0, f, jnp.sin, x),
    "while": lambda f: (
        lambda x: lax.fori_loop(0, x.astype(int)[0, 0], lambda _, x: f(x), x)
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_stays(name):
    plain = STRUCTURES[name](lambda x: jnp.sin(x) * x)
    tagged = STRUCTURES[name](lambda x: tag(jnp.sin(x), "sine", scale=x) * x)
    assert "sine" in [t[0] for t in tags(tagged, X)]
    for a, b in zip(
        jax.tree.leaves(jax.jit(tagged)(X)),
        jax.tree.leaves(jax.jit(plain)(X)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_examples_come_first():
    """Under vmap the value and all arrays in info have the axis in front."""
    f = lambda x, s: tag(x, "t", scale=s, by=2)
    batched = jax.vmap(f, (1, None))
    assert tags(batched, X, jnp.ones(4)) == [("t", (3, 2), (3, 4))]
    np.testing.assert_array_equal(batched(X, jnp.ones(4)), X.T)
    batched = jax.vmap(f, (None, 0), out_axes=1)
    assert tags(batched, X, jnp.ones((5, 4))) == [("t", (5, 2, 3), (5, 4))]
    np.testing.assert_array_equal(
        batched(X, jnp.ones((5, 4))), jnp.stack([X] * 5, axis=1)
    )
    twice = jax.vmap(jax.vmap(f, (0, None)), (None, 0))
    assert tags(twice, X, jnp.ones((5, 4))) == [("t", (5, 2, 3), (5, 2, 4))]


def test_derivatives():
    f = lambda x, s: tag(x, "t", scale=s)
    x, s = X[0], X[1]
    np.testing.assert_array_equal(jax.jacobian(f, 0)(x, s), np.eye(3))
    np.testing.assert_array_equal(jax.jacfwd(f, 0)(x, s), np.eye(3))
    np.testing.assert_array_equal(jax.jacobian(f, 1)(x, s), np.zeros((3, 3)))
    transposed = jax.linear_transpose(lambda x: f(x, s), x)
    np.testing.assert_array_equal(transposed(s)[0], s)
    cubes = lambda x: jnp.sum(f(x, x) ** 3)
    np.testing.assert_allclose(jax.hessian(cubes)(x), np.diag(6 * x), rtol=1e-6)


@pytest.mark.parametrize("check", [True, False])
def test_in_shard_map(check):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    f = jax.shard_map(
        lambda x, s: lax.psum(jnp.sum(tag(x, "t", scale=s)[0] * s), "d"),
        mesh=mesh,
        in_specs=(spec("d"), spec()),
        out_specs=spec(),
        check_vma=check,
    )
    assert tags(f, X, X[0]) == [("t", (1, 3), (3,))]
    found = jax.jit(jax.grad(f, (0, 1)))(X, X[0])
    np.testing.assert_allclose(found[0], jnp.stack([X[0]] * 2), rtol=1e-6)
    np.testing.assert_allclose(found[1], jnp.sum(X, 0), rtol=1e-6)


def test_rules_read_info():
    seen = []

    def forward(op, x, *arrays):
        seen.append((op.label, tag_info(op, x, arrays)))
        return [x], (x, arrays)

    def backward(op, saved, messages):
        info = tag_info(op, *saved)
        return [messages[0] * info["scale"]["all"], *(None for _ in saved[1])]

    def fun(x, s):
        return jnp.sum(tag(x, "t", scale={"all": s}, k=(1, "b"), none=None) * x)

    run = propagate(fun, Rules({"tag": Rule(forward, backward)}))
    both_ways = lambda x, s: run(x, s)[1](1.0)
    dx, ds = jax.jit(jax.vmap(both_ways, (0, None)))(X, 3.0)
    ((label, info),) = seen
    assert label == "t"
    assert info["k"] == (1, "b") and info["none"] is None
    np.testing.assert_allclose(dx, 4 * X, rtol=1e-6)
    assert ds is None


def test_rules_can_send_messages_to_info():
    rule = Rule(
        lambda op, x, s: ([x], s),
        lambda op, s, messages: [messages[0], messages[0] * s],
    )
    run = propagate(lambda x, s: tag(x, "t", scale=s), Rules({"tag:t": rule}))
    _, back = run(X, X + 1)
    dx, ds = back(X)
    np.testing.assert_array_equal(dx, X)
    np.testing.assert_array_equal(ds, X * (X + 1))


def test_bad_input():
    with pytest.raises(TypeError, match="name of a tag must be a string, got 3"):
        tag(X, 3)
    with pytest.raises(TypeError, match=r"info\['a'\]\['b'\] of tag 't' .* set()"):
        tag(X, "t", a={"b": set()})


def test_how_it_looks():
    text = str(jax.make_jaxpr(lambda x: tag(x, "t", scale=x, k=3))(X))
    assert "name=t" in text and "info={'k': 3, 'scale': array}" in text

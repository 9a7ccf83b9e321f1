"""With the default rules `propagate` is jax.vjp, whatever the function is made of."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from priorityprop_jax.propagation import propagate, tag


pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.linspace(-0.9, 1.1, 3)
W = jnp.linspace(-0.5, 0.7, 9).reshape(3, 3)
XS = jnp.linspace(0.3, 1.0, 12).reshape(4, 3)


@jax.custom_jvp
def cube(x):
    return x**3


cube.defjvp(lambda primals, tangents: (cube(*primals), 7 * tangents[0] * primals[0]))


@jax.custom_vjp
def clipped(x, y):
    return jnp.sin(x) * y


clipped.defvjp(
    lambda x, y: (clipped(x, y), (x, y)),
    lambda saved, ct: (jnp.clip(ct, -0.1, 0.1) * saved[1], None),
)


def scan(**options):
    """A loop with constants, carries of which one is an integer, and rows."""

    def fun(w, c, xs):
        def body(carry, x):
            h, n, total = carry
            h = jnp.tanh(w @ h + x * n)
            return (h, n + 1, total + jnp.sum(h)), (h * x, n)

        return lax.scan(body, (c, 0, 0.0), xs, **options)

    return fun


def nested_scan(w, c, xs):
    def inner(h, x):
        return jnp.sin(w * x) * h, None

    def outer(h, x):
        h = lax.scan(inner, h, x)[0]
        return h, h * w

    return lax.scan(outer, c, xs.reshape(2, 2, 3))


def late_carry(w, c, xs):
    # What is carried depends on w only after two turns, and messages to it come late.
    def body(carry, x):
        a, b, d = carry
        return (b, d * x, w * 1.5), a * x

    return lax.scan(body, (c, c, c), xs)


def branches(i):
    def fun(w, x):
        return lax.switch(
            i,
            [
                lambda w, x: jnp.sin(w @ x),  # messages to both
                lambda w, x: 2 * x,  # to x alone
                lambda w, x: jnp.ones_like(x),  # to none
                lambda w, x: jnp.sum(w, 0),
            ],
            w,
            x,
        )

    return fun


def traced_branch(w, x):
    return lax.cond(jnp.sum(x) > 0, lambda w, x: w @ x, lambda w, x: 3 * x, w, x)


def forward_loops(x):
    n = lax.while_loop(lambda n: n < 5, lambda n: n + 2, 0)
    steady = lax.fori_loop(0, n, lambda i, y: y * 2 + i, lax.stop_gradient(x))
    return x * steady


def flat_loop(x):
    """A loop that nothing can be differentiated with respect to."""
    step = lambda c: (c[0] + 1, jnp.sign(c[1]), 2 * c[2])
    start = (0, jnp.floor(x), jnp.argmax(x).astype(x.dtype))
    _, signs, top = lax.while_loop(lambda c: c[0] < 3, step, start)
    return x * signs * top


def random_loop(key, x):
    noisy = lambda key, h: h * jax.random.uniform(key, h.shape)

    def body(carry, _):
        key, h = carry
        key, sub = jax.random.split(key)
        h = jax.checkpoint(noisy)(sub, h)
        return (key, lax.cond(h[0] > 0, lambda _, h: h, noisy, sub, h)), h

    return lax.scan(body, (key, x), length=3)[1]


def policy(w, x):
    saved = jax.checkpoint_policies.dots_saveable
    inner = jax.checkpoint(lambda w, x: jnp.sin(w @ jnp.tanh(x)), policy=saved)
    return inner(w, inner(w, x))


@jax.jit
def called(w, x):
    return jax.jit(lambda y: jnp.sin(w @ y))(x) + jax.jit(jnp.cos)(x)


CASES = {
    "jit": (called, W, X),
    "jit twice": (lambda w, x: called(w, called(w, x)), W, X),
    "scan": (scan(), W, X, XS),
    "scan reversed": (scan(reverse=True), W, X, XS),
    "scan unrolled": (scan(unroll=3), W, X, XS),
    "scan of nothing": (scan(), W, X, XS[:0]),
    "scan in a scan": (nested_scan, W[0], X, XS),
    "scan, late messages": (late_carry, X, X, XS),
    "cond": (traced_branch, W, X),
    "branch 0": (branches(jnp.int32(0)), W, X),
    "branch 1": (branches(jnp.int32(1)), W, X),
    "branch 2": (branches(jnp.int32(2)), W, X),
    "branch 3": (branches(jnp.int32(3)), W, X),
    "branch in a scan": (
        lambda w, c, xs: lax.scan(lambda h, x: (traced_branch(w, h * x), h), c, xs),
        W,
        X,
        XS,
    ),
    "checkpoint": (jax.checkpoint(called), W, X),
    "checkpoint with a policy": (policy, W, X),
    "checkpoint in a scan": (
        lambda w, c, xs: lax.scan(
            jax.checkpoint(lambda h, x: (jnp.sin(w @ h) * x, h)), c, xs
        ),
        W,
        X,
        XS,
    ),
    "custom_jvp": (lambda x: jax.nn.relu(cube(x) * 2), X),
    "custom_vjp": (lambda x: clipped(x, x) * clipped(2 * x, X), X),
    "custom_vjp in a scan": (
        lambda c, xs: lax.scan(lambda h, x: (clipped(h, x), cube(h)), c, xs),
        X,
        XS,
    ),
    "loops forward": (forward_loops, X),
    "loop without derivative": (flat_loop, X),
    "loop with keys": (random_loop, jax.random.key(0), X),
    "effects": (lambda x: (jax.debug.callback(lambda: None), jnp.sin(x))[1], X),
    "solver": (lambda w, x: jnp.linalg.solve(w + jnp.eye(3), x), W, X),
    "used twice": (lambda x: jnp.sin(x) * x + x, X),
    "one value as two inputs": (lambda x, w: (x * x, (w * 2) @ (w * 2)), X, W),
    "three times": (lambda x: lax.clamp(x, x, x) + jnp.where(x > 0, x, x), X),
    "integers": (lambda i, x: (x[i] * i, i + 1, i > 1), jnp.array([0, 2]), X),
    "keys": (
        lambda k, x: jax.random.normal(k, (3,)) * x,
        jax.random.key(0),
        X,
    ),
    "input as output": (lambda x, w: (x, x, w * x), X, W[0]),
    "argument without use": (lambda x, w: jnp.sin(x), X, W),
    "constants as output": (lambda x: (jnp.ones(2), 3.0, x + X), X),
    "complex": (lambda x, z: (jnp.exp(z) * x, jnp.abs(z)), X, X + 0.5j),
    "complex scan": (
        lambda z, xs: lax.scan(lambda h, x: (h * z, jnp.real(h) * x), z, xs),
        X + 0.5j,
        XS,
    ),
    "sorted": (lambda x: (jnp.sort(x), lax.top_k(x, 2), jnp.cumsum(x)), X),
    "tags": (
        lambda x, w: tag({"a": x * w, "b": w}, "both", scale=w, of=("x", 3)),
        X,
        W[0],
    ),
    "bfloat16": (lambda x: jnp.sum(jnp.sin(x.astype(jnp.bfloat16)), dtype="f4"), X),
    "trees": (
        lambda tree, pair: {"a": tree["w"] @ pair[0], "b": [None, pair[1]["c"] * 2]},
        {"w": W, "unused": None},
        (X, {"c": X}),
    ),
}


def is_inexact(x):
    return jnp.issubdtype(jnp.result_type(x), np.inexact)


def messages_for(outputs):
    """Other numbers for each output; for integers what jax.vjp wants, and None."""

    def draw(k, x):
        if not is_inexact(x):
            return np.zeros(jnp.shape(x), jax.dtypes.float0), None
        values = jnp.cos(jnp.arange(jnp.size(x)) + k).reshape(jnp.shape(x))
        return (values.astype(jnp.result_type(x)),) * 2

    leaves, treedef = jax.tree.flatten(outputs)
    pairs = [draw(k, x) for k, x in enumerate(leaves)]
    return [treedef.unflatten(column) for column in zip(*pairs, strict=True)]


def by_jax(fun, *args):
    """Outputs and cotangents, as jax has them."""
    outputs, vjp = jax.vjp(fun, *args)
    return outputs, vjp(messages_for(outputs)[0])


def by_us(fun, *args, rules=None):
    """The same by messages; zeros for those that did not arrive."""
    outputs, back = propagate(fun, rules)(*args)
    sent = back(messages_for(outputs)[1])

    def fill(x, message):
        if not is_inexact(x):
            assert message is None
            return np.zeros(jnp.shape(x), jax.dtypes.float0)
        return jnp.zeros_like(x) if message is None else message

    leaves, treedef = jax.tree.flatten(args)
    messages = treedef.flatten_up_to(sent)
    filled = [fill(x, m) for x, m in zip(leaves, messages, strict=True)]
    return outputs, treedef.unflatten(filled)


def assert_same(ours, theirs, rtol=1e-6, atol=1e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(
                np.asarray(a), np.asarray(b), rtol=rtol, atol=atol
            )


def without_float0(tree):
    """For jit: what has no tangents cannot leave it."""
    has_none = lambda x: getattr(x, "dtype", None) == jax.dtypes.float0
    return jax.tree.map(lambda x: jnp.zeros(x.shape) if has_none(x) else x, tree)


def both(fun):
    """One function that returns ours and theirs, so that jax compiles once."""
    return lambda *args: (by_us(fun, *args), by_jax(fun, *args))


@pytest.mark.parametrize("name", CASES)
def test_default_rules_are_vjp(name):
    fun, *args = CASES[name]
    assert_same(*jax.jit(lambda *args: without_float0(both(fun)(*args)))(*args))


def everything(w, x):
    """All structures at once, small."""

    def body(h, x):
        h = lax.cond(jnp.sum(h) > 0, lambda h: w @ h, jnp.sin, h * x)
        return jax.checkpoint(called)(w, h), clipped(h, x)

    h, ys = lax.scan(body, x, jnp.stack([x, 2 * x]))
    return {"h": jax.nn.relu(tag(h, "h", scale=x)), "ys": ys}


def test_under_vmap():
    ws = jnp.stack([W, W + 1])
    for axes in ((0, 1), (None, 1)):
        args = [W if axes[0] is None else ws, X if axes[1] is None else XS.T[:, :2]]
        assert_same(*jax.jit(jax.vmap(both(everything), axes))(*args))


def test_of_vmap():
    batched = jax.vmap(everything, (None, 1))
    assert_same(*jax.jit(both(batched))(W, XS.T))


def test_in_a_scan():
    def steps(method):
        def step(w, x):
            outputs, (dw, _) = method(everything, w, x)
            return w - 0.1 * dw, outputs

        return jax.jit(lambda w, xs: lax.scan(step, w, xs))

    assert_same(steps(by_us)(W, XS), steps(by_jax)(W, XS), rtol=1e-5)


def test_eager():
    assert_same(by_us(called, W, X), by_jax(called, W, X))


def test_types(x64):
    x = jnp.asarray(np.linspace(0.1, 1, 3))
    assert x.dtype == (jnp.float64 if x64 else jnp.float32)
    assert_same(*jax.jit(both(everything))(jnp.outer(x, x), x))
    mixed = lambda x, y: (x * jnp.sin(y), (x + 1).astype(y.dtype))
    half = X.astype(jnp.float16)
    assert_same(*jax.jit(both(mixed))(x, half), rtol=2e-3)


def test_differentiated():
    # The clip of custom_vjp has no second derivative worth comparing.
    def fun(w, x):
        return jnp.sum(lax.scan(lambda h, x: (jnp.sin(w @ h) * x, h), x, XS)[0] ** 2)

    def norm(gradient):
        return lambda w, x: sum(jnp.sum(g**2) for g in gradient(w, x))

    ours = norm(lambda w, x: propagate(fun)(w, x)[1](1.0))
    theirs = norm(jax.grad(fun, (0, 1)))
    assert_same(
        jax.jit(jax.grad(ours, (0, 1)))(W, X),
        jax.jit(jax.grad(theirs, (0, 1)))(W, X),
        rtol=1e-5,
    )


@pytest.mark.parametrize("check", [True, False])
def test_in_shard_map(check):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(w, xs):
        body = lambda h, x: (
            jax.checkpoint(lambda h: jnp.sin(w @ h) * x)(h),
            clipped(h, x),
        )
        h, ys = lax.scan(body, xs[0], xs)
        h = lax.cond(jnp.sum(h) > 0, lambda h: w @ h, jnp.sin, tag(h, "h", scale=w))
        return lax.psum(jnp.sum(h * jnp.sum(ys, 0)), "d")

    def gradients(method):
        def local(w, xs):
            return method(loss, w, xs)

        specs = (spec(), spec("d")) if check else (spec("d"), spec("d"))
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec(), spec("d")),
            out_specs=(spec(), specs),
            check_vma=check,
        )

    sharded = lambda w, xs: (
        gradients(lambda f, *a: by_us(f, *a))(w, xs),
        gradients(lambda f, *a: by_jax(f, *a))(w, xs),
    )
    assert_same(*jax.jit(sharded)(W, XS), rtol=1e-5)


def test_of_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    fun = jax.shard_map(
        lambda w, xs: lax.psum(jnp.sum(jnp.sin(xs @ w)), "d"),
        mesh=mesh,
        in_specs=(spec(), spec("d")),
        out_specs=spec(),
    )
    assert_same(*jax.jit(both(fun))(W, XS))


def test_silent_outputs():
    fun = lambda w, x, y: {"a": w * x, "b": lax.scan(lambda c, x: (c * x, c), x, y)}
    outputs, back = propagate(fun)(X, X + 1, XS)
    silent = jax.tree.map(lambda _: None, outputs)
    assert back(silent) == (None, None, None)
    ct = jnp.ones_like(X)
    dw, dx, dy = back(silent | {"a": ct})
    np.testing.assert_array_equal(dw, X + 1)
    np.testing.assert_array_equal(dx, X)
    assert dy is None
    _, vjp = jax.vjp(fun, X, X + 1, XS)
    zeros = jax.tree.map(jnp.zeros_like, outputs)
    expected = vjp(zeros | {"b": (zeros["b"][0], XS)})[1:]
    found = back(silent | {"b": (None, XS)})
    assert found[0] is None
    assert_same(found[1:], expected)


def test_numbers_are_arguments():
    value, back = propagate(lambda x, n: x * n)(2.0, 3)
    assert value == 6.0
    assert back(1.0) == (3.0, None)


def test_messages_of_another_structure():
    _, back = propagate(lambda x: (x, x))(X)
    with pytest.raises(ValueError, match="tuple"):
        back([X, X])


def test_messages_cannot_pass_while():
    def fun(x):
        return lax.while_loop(lambda x: x < 9, lambda x: 2 * x, x)  # here

    value, back = propagate(fun)(1.5)
    assert value == 12.0
    line = here(fun, "# here")
    with pytest.raises(NotImplementedError, match=f"while at .*{line}.*lax.scan"):
        back(1.0)


def here(fun, mark):
    """Where a marked line of a function is, as errors say it."""
    lines, first = inspect.getsourcelines(fun)
    (k,) = [k for k, line in enumerate(lines) if mark in line]
    return re.escape(f"{__file__}:{first + k}")


def test_data_that_is_not_there():
    for data in (2, -3, [0, 5]):
        with pytest.raises(ValueError, match="but there are 2 arguments"):
            propagate(lambda x, w: x @ w, data=data)(X, W)


def test_residuals_are_saved_once():
    # A constant of a loop is not saved once a step, nor a value that two rules need.
    def fun(w, c, xs):
        return lax.scan(lambda h, x: (jnp.sin(w @ h), None), c, xs)[0]

    def both_ways(w, c, xs):
        _, back = propagate(fun)(w, c, xs)
        return back(c)

    jaxpr = jax.make_jaxpr(both_ways)(W, X, XS).jaxpr
    ahead = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = [v.aval.shape for v in ahead.outvars]
    assert (4, 3, 3) not in stacked


PIECES = {
    "sin": lambda x, y: jnp.sin(x),
    "mul": lambda x, y: x * y,
    "square": lambda x, y: x * x,
    "product": lambda x, y: W @ x + y,
    "tag": lambda x, y: tag(x, "t", scale=y),
    "relu": lambda x, y: jax.nn.relu(x) - y,
    "stop": lambda x, y: lax.stop_gradient(x) * y,
    "step": lambda x, y: jnp.where(x > 0, x, y),
    "sort": lambda x, y: jnp.sort(x) + jnp.round(y),
}
WRAPS = {
    "none": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda x, y: lax.cond(x[0] > y[0], f, lambda x, y: x - y, x, y),
    "scan": lambda f: (
        lambda x, y: lax.scan(
            lambda c, _: ((c[1], f(*c)), None),
            (x, y),
            length=2,
        )[0][1]
    ),
}


@st.composite
def programs(draw):
    """A function of two arrays: pieces one after the other, some inside of others."""

    def part(depth):
        names = draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4))
        pieces = [PIECES[name] for name in names]
        if depth:
            pieces.insert(len(pieces) // 2, part(depth - 1))
        swaps = [draw(st.booleans()) for _ in pieces]

        def fun(x, y):
            for piece, swap in zip(pieces, swaps, strict=True):
                x, y = (piece(x, y), x) if swap else (piece(x, y), y)
            return x

        return WRAPS[draw(st.sampled_from(sorted(WRAPS)))](fun)

    return part(2)


@given(programs())
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
def test_programs(program):
    assert_same(*jax.jit(both(program))(X, W[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@given(programs())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_many_programs(program):
    assert_same(*jax.jit(both(program))(X, W[0]), rtol=1e-5, atol=1e-5)

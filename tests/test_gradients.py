"""Gradients of active leaves are jax.grad's, the others zero, and the work is left out.

What is left out is counted by XLA for static masks; for dynamic ones by callbacks in
the backward pass, as nothing in a program says which branches it will take.
"""

import collections
import functools
import pickle
import random
import re

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import models
from helpers import kinds, slow_unless
from models import affine, dense, draw, mlp, MODELS, squares
from priorityprop_jax import grad, static_mask, value_and_grad
from priorityprop_jax.propagation import _levels


# A static mask leaves the backward pass to JAX: what may differ is the tree, not the
# operations.
STATIC = (
    "nnx mlp",
    "cnn",
    "transformer",
    "equinox",
    "scan",
    "custom_vjp",
    "stopped",
    "tied",
    "complex",
    "scalars",
    "bare array",
    "keywords",
)
# Like "linen scan of remat", "rnn" and "plain mlp", to the interpreter.
ALIKE = ("linen scan", "linen lstm", "inner jit", "keywords", "linen mlp")
both = pytest.mark.parametrize("kind", ["static", "dynamic"])


@pytest.fixture(autouse=True)
def levels(monkeypatch):
    """Several programs for a traced mask, which are not worth it for small models."""
    monkeypatch.setattr(_levels, "_LEAST", 0)


@pytest.fixture
def one_program(monkeypatch, levels):
    monkeypatch.setattr(_levels, "_LEAST", np.inf)


def traceable(mask):
    """The same mask, not known while tracing."""
    return jax.tree.map(jnp.asarray, mask)


def of_kind(kind, mask):
    return mask if kind == "static" else traceable(mask)


def choose(kind, mask, given):
    """The mask, or what is given for it to a function under jit."""
    return mask if kind == "static" else given


def random_mask(params, seed, share=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda _: bool(rng.random() < share), params)


def only(params, *active):
    """A mask with these leaves, by their position."""
    leaves, treedef = jax.tree.flatten(params)
    active = [i % len(leaves) for i in active]
    return jax.tree.unflatten(treedef, [i in active for i in range(len(leaves))])


def masks_for(params):
    """All, none, the first and the last alone, and random ones."""
    return [
        only(params, *range(len(jax.tree.leaves(params)))),
        only(params),
        only(params, 0),
        only(params, -1),
        *(random_mask(params, seed) for seed in range(3)),
    ]


def vector_masks(m, seeds=3):
    """With a bool for each layer of the leaves that are stacked."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)

        def one(path, leaf, rng=rng):
            stacked = any(
                f"['{key}']" in jax.tree_util.keystr(path) for key in m.stacked
            )
            return (
                rng.random(leaf.shape[:1]) < 0.5
                if stacked
                else bool(rng.random() < 0.5)
            )

        yield jax.tree_util.tree_map_with_path(one, m.params)


def exact(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_gated(got, expected, mask, rtol=2e-5):
    """`got` is zero where the mask is False, and `expected` elsewhere."""
    assert kinds(got) == kinds(expected)
    mask = jax.tree.broadcast(mask, expected)
    found = jax.tree_util.tree_leaves_with_path(got)
    for (path, g), e, m in zip(
        found, jax.tree.leaves(expected), jax.tree.leaves(mask), strict=True
    ):
        g, e, m = exact(g), exact(e), np.asarray(m)
        rows = np.broadcast_to(m.reshape(m.shape + (1,) * (g.ndim - m.ndim)), g.shape)
        where = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(g[~rows], 0, where)
        scale = np.abs(e).max(initial=0.0)
        np.testing.assert_allclose(
            g[rows], e[rows], rtol=0, atol=rtol * scale, err_msg=where
        )


def assert_values(got, expected, rtol=1e-5):
    """Of value and aux: nothing about them depends on a mask."""
    got, expected = jax.tree.map(jnp.asarray, (got, expected))
    assert kinds(got) == kinds(expected)

    def close(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = exact(a), exact(b)
        scale = np.abs(b).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)

    jax.tree.map(close, got, expected)


@functools.cache
def expected_of(name):
    m = models.model(name)
    theirs = jax.jit(jax.value_and_grad(m.loss, has_aux=m.has_aux))
    return theirs(m.params, *m.args, **m.kwargs)


# Every model.


@pytest.mark.parametrize("name", [slow_unless(n in STATIC, n) for n in MODELS])
def test_static(name, quick_compilation):
    """Several masks in one program, which compiles faster than several programs."""
    m = models.model(name)
    masks = masks_for(m.params)[1:5]

    @jax.jit
    def ours(*args, **kwargs):
        f = value_and_grad(m.loss, has_aux=m.has_aux)
        return [f(*args, **kwargs, active=mask) for mask in masks]

    found = ours(m.params, *m.args, **m.kwargs)
    values, expected = expected_of(name)
    for (got_values, got), mask in zip(found, masks, strict=True):
        assert_gated(got, expected, mask, m.rtol)
        assert_values(got_values, values, m.rtol)


def compiled_once(m):
    f = value_and_grad(m.loss, has_aux=m.has_aux)
    chex.clear_trace_counter()  # it counts by name

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ours(mask, *args, **kwargs):
        return f(*args, **kwargs, active=mask)

    def call(mask):
        out = ours(traceable(mask), m.params, *m.args, **m.kwargs)
        assert ours._cache_size() == 1
        return out

    return call


@pytest.mark.parametrize("name", [slow_unless(n not in ALIKE, n) for n in MODELS])
def test_dynamic(name, quick_compilation):
    """One program for all masks, traced once."""
    m = models.model(name)
    ours = compiled_once(m)
    values, expected = expected_of(name)
    masks = [
        *masks_for(m.params),
        *(random_mask(m.params, s, 0.2) for s in range(3, 8)),
    ]
    for mask in masks:
        got_values, got = ours(mask)
        assert_gated(got, expected, mask, m.rtol)
        assert_values(got_values, values, m.rtol)


STACKED = ["scan", "reverse scan", "layer drop", "linen scan", "linen scan of remat"]


@both
@pytest.mark.parametrize(
    "name", [slow_unless(name != STACKED[-1], name) for name in STACKED]
)
def test_layer_by_layer(name, kind, quick_compilation):
    """A vector for a stacked leaf: rows of the gradient."""
    m = models.model(name)
    values, expected = expected_of(name)
    masks = [*vector_masks(m), random_mask(m.params, 0)]
    if kind == "dynamic":  # a scalar for a stacked leaf is of another shape
        masks, ours = masks[:-1], compiled_once(m)
    else:
        f = value_and_grad(m.loss, has_aux=m.has_aux)
        ours = lambda mask: jax.jit(functools.partial(f, active=mask))(
            m.params, *m.args
        )
        masks = masks[:1]
    for mask in masks:
        got_values, got = ours(mask)
        assert_gated(got, expected, mask, m.rtol)
        assert_values(got_values, values, m.rtol)


ROWS = ["plain mlp", "rnn", "embedding", "scan"]


@both
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_leaf(name, kind, quick_compilation):
    """Of the start of a scan's carry, of what all its steps share, of a table."""
    m = models.model(name)
    draw_rows = lambda leaf, rng: rng.random(leaf.shape[:1]) < 0.5
    masks = []
    for seed in range(1 if kind == "static" else 3):
        rng = np.random.default_rng(seed)
        masks.append(jax.tree.map(functools.partial(draw_rows, rng=rng), m.params))
    f = value_and_grad(m.loss)
    ours = jax.jit(lambda given, *a: f(*a, active=choose(kind, masks[0], given)))
    for mask in masks:
        value, got = ours(traceable(mask), m.params, *m.args)
        assert_gated(got, expected_of(name)[1], mask, m.rtol)
        assert_values(value, expected_of(name)[0], m.rtol)


@both
@pytest.mark.parametrize("steps", [4, 5])
def test_rows_through_a_batched_scan(steps, kind, quick_compilation):
    """Rows of a batch that is the carry of a scan: they are not its steps."""
    params = {"a": draw(4, 3), "b": draw(steps, 3, seed=1)}
    layer = lambda x, w: (jnp.tanh(x * w + 1), None)
    one = lambda row, ws: lax.scan(layer, row, ws)[0]
    loss = lambda p: (jax.vmap(one, (0, None))(p["a"], p["b"]) ** 2).sum()
    mask = {"a": np.array([True, False, False, True]), "b": False}
    ours = lambda given, p: grad(loss)(p, active=choose(kind, mask, given))
    got = jax.jit(ours)(traceable(mask), params)
    assert_gated(got, jax.grad(loss)(params), mask)


@both
def test_scan_of_no_steps(kind):
    params = {"a": draw(3), "b": draw(3, seed=1)}
    layer = lambda b, x, _: (x * b, x)
    scan = lambda p: lax.scan(
        functools.partial(layer, p["b"]), p["a"], jnp.zeros((0, 2))
    )
    loss = lambda p: (scan(p)[0] ** 2).sum() + scan(p)[1].sum()
    mask = {"a": True, "b": False}
    ours = lambda given, p: grad(loss)(p, active=choose(kind, mask, given))
    got = jax.jit(ours)(traceable(mask), params)
    assert_gated(got, jax.grad(loss)(params), mask)


# Forms of masks and of calls.


PLAIN = models.plain_mlp()
A = jnp.float32(1.0)
PLAIN_ARGS = (PLAIN.params, *PLAIN.args)


@functools.cache
def plain_expected():
    return jax.jit(jax.value_and_grad(PLAIN.loss))(*PLAIN_ARGS)


PREFIXES = {
    "True": True,
    "False": False,
    "numpy scalar": np.bool_(False),
    "numpy array": np.array(True),
    "by layer": {"d0": False, "d1": True, "d2": False},
    "mixed depths": {"d0": {"w": True, "b": False}, "d1": False, "d2": np.bool_(True)},
}


@both
@pytest.mark.parametrize("mask", PREFIXES.values(), ids=PREFIXES)
def test_prefix(mask, kind, quick_compilation):
    f = jax.jit(
        lambda *args: value_and_grad(PLAIN.loss)(*args, active=of_kind(kind, mask))
    )
    value, got = f(*PLAIN_ARGS)
    assert_values(value, plain_expected()[0])
    assert_gated(got, plain_expected()[1], mask)


def test_prefix_of_other_nodes():
    """Lists, tuples and None in the params."""
    params = ([jnp.float32(2), None], (jnp.float32(3), {"a": jnp.float32(4)}))
    loss = lambda p: p[0][0] * p[1][0] ** 2 * p[1][1]["a"]
    expected = jax.grad(loss)(params)
    for mask in (
        ([True, None], False),
        (False, (True, {"a": False})),
        (True, (False, True)),
    ):
        got = grad(loss)(params, active=mask)
        full = jax.tree.broadcast(mask, params, is_leaf=None)
        assert_gated(got, expected, full)


@pytest.mark.parametrize(
    "name", [slow_unless(n != "stopped", n) for n in ("scalars", "equinox", "stopped")]
)
@pytest.mark.parametrize("kind", ["static", "dynamic", "one of each"])
def test_not_compiled(name, kind):
    """As users try it first; Python and NumPy numbers among the params."""
    m = models.model(name)
    expected = jax.grad(m.loss)(m.params, *m.args)
    mask = random_mask(m.params, 1)
    given = of_kind("static" if kind == "static" else "dynamic", mask)
    if kind == "one of each":
        turn = iter(range(100))
        given = jax.tree.map(lambda a, b: a if next(turn) % 2 else b, mask, given)
    assert_gated(grad(m.loss)(m.params, *m.args, active=given), expected, mask, m.rtol)


def test_default_is_all():
    for active in ({}, {"active": None}):
        value, got = value_and_grad(PLAIN.loss)(*PLAIN_ARGS, **active)
        assert_values(value, plain_expected()[0])
        assert_gated(got, plain_expected()[1], True)


def test_static_and_dynamic_in_one_mask(quick_compilation):
    """What is known to rest costs nothing; the rest is one program."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ours(a, b, *args):
        mask = {
            "d0": False,
            "d1": {"w": a, "b": True},
            "d2": {"w": np.bool_(True), "b": b},
        }
        return value_and_grad(PLAIN.loss)(*args, active=mask)

    for a, b in [(True, False), (False, False), (False, True)]:
        mask = {"d0": False, "d1": {"w": a, "b": True}, "d2": {"w": True, "b": b}}
        value, got = ours(jnp.bool_(a), jnp.bool_(b), *PLAIN_ARGS)
        assert_values(value, plain_expected()[0])
        assert_gated(got, plain_expected()[1], mask)


@both
def test_vectors_static_beside_dynamic(kind, quick_compilation):
    m = models.model("scan")
    vector = np.array([False, True, True, False])
    for flag in (True, False):
        mask = {
            "d0": flag,
            "d1": True,
            "stack": {"w": vector, "b": flag},
            "shared": flag,
        }
        given = {
            "d0": jnp.bool_(flag),
            "d1": True,
            "stack": {"w": of_kind(kind, vector), "b": jnp.bool_(flag)},
            "shared": flag if kind == "static" else jnp.bool_(flag),
        }
        got = jax.jit(lambda *args, given=given: grad(m.loss)(*args, active=given))(
            m.params, *m.args
        )
        assert_gated(got, expected_of("scan")[1], mask)


def pair_loss(a, x, b, *, scale):
    return scale * squares(jnp.tanh(x @ a["w"]) @ b, 1.0)


PAIR = ({"w": draw(5, 6), "unused": draw(2)}, models.X, draw(6, 3, seed=1))


@both
@pytest.mark.parametrize(
    "argnums, mask",
    [
        (0, {"w": True, "unused": False}),
        (2, True),
        (-1, False),
        ((2,), (True,)),
        ((0, 2), ({"w": True, "unused": False}, False)),
        ((2, 0), (True, False)),
        ([0, -1], (False, True)),
        ((0, 1, 2), (False, True, False)),
        ((0, 1, 2), True),
    ],
    ids=str,
)
def test_argnums(argnums, mask, kind):
    """A mask has the structure of what is differentiated by: a tuple of arguments."""
    theirs = jax.value_and_grad(pair_loss, argnums)(*PAIR, scale=2.0)
    active = of_kind(kind, mask)
    value, got = value_and_grad(pair_loss, argnums)(*PAIR, scale=2.0, active=active)
    assert_values(value, theirs[0])
    assert_gated(got, theirs[1], mask)


@both
def test_grad_with_aux(kind):
    fun = lambda p, x: (p["a"] * p["b"] * x, {"x": x, "n": 3})
    params = {"a": jnp.float32(2), "b": jnp.float32(3)}
    mask = {"a": True, "b": False}
    got, aux = grad(fun, has_aux=True)(params, 5.0, active=of_kind(kind, mask))
    assert (got["a"], got["b"]) == (15, 0)
    assert aux == {"x": 5.0, "n": 3}


def test_looks_like_the_function():
    def loss(params):
        """Its documentation."""
        return params

    for f in (value_and_grad(loss), grad(loss)):
        assert f.__doc__ and "Its documentation." in f.__doc__
        assert "loss" in f.__name__


def test_nan_of_a_resting_leaf():
    """Zero, where a product of mask and gradient would be NaN."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(()), "c": jnp.ones(())}
    loss = lambda p: jnp.sqrt(p["a"] * p["b"]).sum() + 1e38 * p["c"] ** 2 * 10
    expected = jax.grad(loss)(params)
    assert not any(np.isfinite(g).any() for g in jax.tree.leaves(expected))
    mask = {"a": np.array([True, False, False]), "b": False, "c": False}
    for given in (mask, traceable(mask)):
        got = grad(loss)(params, active=given)
        np.testing.assert_array_equal(got["a"], [np.nan, 0, 0])
        assert (got["b"], got["c"]) == (0, 0)
    over = jax.vmap(lambda m: grad(loss)(params, active=m))(jnp.array([True, False]))
    for g in jax.tree.leaves(over):
        assert not np.isfinite(g[0]).any()
        np.testing.assert_array_equal(g[1], 0)


@both
@pytest.mark.parametrize(
    "out", [lambda p: 1.0, lambda p: jnp.float16(2)], ids=["1", "2"]
)
def test_constant_function(out, kind):
    params = {"a": A, "b": jnp.ones(3)}
    theirs = jax.value_and_grad(out)(params)
    active = of_kind(kind, {"a": True, "b": False})
    value, got = value_and_grad(out)(params, active=active)
    assert_values(value, theirs[0])
    assert_gated(got, theirs[1], True)


@both
def test_runs_the_function_once(kind):
    """What the function does besides happens as often as under jax.grad: once."""
    seen = []

    def loss(p):
        jax.debug.callback(seen.append, p["a"])
        return jnp.sin(p["a"]) * p["b"]

    params, mask = {"a": A, "b": A}, {"a": False, "b": True}
    ours = lambda given, p: grad(loss)(p, active=choose(kind, mask, given))
    for f in (ours, jax.jit(ours)):
        seen.clear()
        jax.block_until_ready(f(traceable(mask), params))
        jax.effects_barrier()
        assert len(seen) == 1


def test_shapes_alone():
    """As trainers do that allocate before they compute."""
    f = value_and_grad(PLAIN.loss)
    for mask in (random_mask(PLAIN.params, 0), traceable(random_mask(PLAIN.params, 0))):
        value, got = jax.eval_shape(functools.partial(f, active=mask), *PLAIN_ARGS)
        assert kinds((value, got)) == kinds(plain_expected())


def test_mask_as_an_argument_of_jit(quick_compilation):
    """There, Python bools are traced like any number."""
    step = jax.jit(value_and_grad(PLAIN.loss))
    for seed in range(2):
        mask = random_mask(PLAIN.params, seed)
        for given in (mask, traceable(mask)):
            _, got = step(*PLAIN_ARGS, active=given)
            assert_gated(got, plain_expected()[1], mask)


@pytest.mark.parametrize("kind", [slow_unless(False, "static"), "dynamic"])
def test_leaks_nothing(kind):
    mask = {"a": True, "b": False, "c": np.array([True, False])}
    layer = lambda x, w: (jnp.sin(x * w), None)
    loss = lambda p: lax.scan(layer, p["a"], p["c"])[0]
    params = {"a": A, "b": A, "c": jnp.ones(2)}
    ours = lambda given, p: grad(loss)(p, active=choose(kind, mask, given))
    with jax.checking_leaks():
        got = jax.jit(ours)(traceable(mask), params)
        ours(traceable(mask), params)
    assert_gated(got, jax.grad(loss)(params), mask)


# Static masks as arguments of jit.


@pytest.mark.parametrize("form", ["of the function itself", "of a function around it"])
def test_static_argument(form):
    """Equal masks share a program, other masks have their own."""
    traces = []

    def loss(params, x, target):
        traces.append(None)
        return PLAIN.loss(params, x, target)

    f = value_and_grad(loss)
    around = lambda params, x, target, *, active: f(params, x, target, active=active)
    step = jax.jit(f if "itself" in form else around, static_argnames="active")
    masks = [random_mask(PLAIN.params, seed) for seed in (0, 1, 0, 1)]
    before = []
    for mask in masks:
        _, got = step(*PLAIN_ARGS, active=static_mask(traceable(mask)))
        assert_gated(got, plain_expected()[1], mask)
        before.append(len(traces))
    assert 0 < before[0] < before[1] == before[2] == before[3]
    assert step._cache_size() == 2


def test_static_masks_are_values():
    vector = np.array([True, False])
    trees = [{"a": True, "b": [False, vector]}, {"a": True, "b": [True, vector]}, True]
    masks = [static_mask(tree) for tree in trees]
    again = [static_mask(traceable(tree)) for tree in trees]
    assert masks == again and list(map(hash, masks)) == list(map(hash, again))
    assert len(set(masks)) == 3
    assert static_mask(masks[0]) == masks[0]
    assert static_mask({"a": True}) != static_mask([True])
    for mask, tree in zip(masks, trees, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mask.tree, tree)
    assert pickle.loads(pickle.dumps(masks[2])) == masks[2]


def test_static_mask_as_active():
    m = models.model("scan")
    (mask,) = vector_masks(m, 1)
    got = jax.jit(functools.partial(grad(m.loss), active=static_mask(mask)))(
        m.params, *m.args
    )
    assert_gated(got, expected_of("scan")[1], mask)
    whole = static_mask({"d0": False, "d1": True, "shared": False, "stack": True})
    got = jax.jit(functools.partial(grad(m.loss), active=whole))(m.params, *m.args)
    assert_gated(got, expected_of("scan")[1], whole.tree)


def test_static_mask_rejects():
    with pytest.raises(TypeError, match=r"\['a'\]"):
        static_mask({"a": 1, "b": True})
    with pytest.raises(TypeError, match=r"\['b'\].*traced"):
        jax.jit(lambda flag: static_mask({"a": True, "b": flag}))(jnp.bool_(True))


# Inside of other transformations.


@both
def test_vmap_over_examples(kind, quick_compilation):
    """Gradients of each example, one mask for all."""
    params, x, target = PLAIN_ARGS
    mapped = lambda f: jax.jit(jax.vmap(f, (None, None, 0, 0)))
    theirs = mapped(lambda _, *args: jax.value_and_grad(PLAIN.loss)(*args))
    values, expected = theirs(True, params, x, target)
    for seed in range(2 if kind == "dynamic" else 1):
        mask = random_mask(params, seed)
        ours = mapped(
            lambda given, *args, mask=mask: value_and_grad(PLAIN.loss)(
                *args, active=choose(kind, mask, given)
            )
        )
        got_values, got = ours(traceable(mask), params, x, target)
        assert_values(got_values, values)
        assert_gated(got, expected, mask)


def test_vmap_keeps_conditionals():
    """With the mask for all examples, a select would do all of the work."""
    f = jax.vmap(
        lambda mask, *args: value_and_grad(PLAIN.loss)(*args, active=mask),
        (None, None, 0, 0),
    )
    mask = traceable(random_mask(PLAIN.params, 0))
    names = [
        eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(mask, *PLAIN_ARGS))
    ]
    assert "cond" in names


def test_vmap_over_masks(quick_compilation):
    """Nothing is saved, and the gradients are right."""
    masks = [random_mask(PLAIN.params, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *m: jnp.array(m), *masks)
    f = lambda mask: value_and_grad(PLAIN.loss)(*PLAIN_ARGS, active=mask)
    values, got = jax.jit(jax.vmap(f))(stacked)
    for i, mask in enumerate(masks):
        assert_values(values[i], plain_expected()[0])
        assert_gated(jax.tree.map(lambda g, i=i: g[i], got), plain_expected()[1], mask)


def train_steps(masks):
    """Plain SGD, a mask at each step, one example at a time."""

    def reference():
        params, history = PLAIN.params, []
        step = jax.jit(jax.grad(PLAIN.loss))
        for t in range(len(masks)):
            g = step(params, models.X + t, models.T)
            gated = jax.tree.map(lambda g, m: g * m, g, masks[t])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gated)
            history.append(gated)
        return params, history

    return reference()


def test_scan_over_steps(quick_compilation):
    masks = [random_mask(PLAIN.params, seed) for seed in range(4)]
    params, history = train_steps(masks)

    @jax.jit
    def ours(masks, params):
        def step(params, step):
            t, mask = step
            g = grad(PLAIN.loss)(params, models.X + t, models.T, active=mask)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), g

        return lax.scan(step, params, (jnp.arange(4), masks))

    stacked = jax.tree.map(lambda *m: jnp.array(m), *masks)
    got_params, got = ours(stacked, PLAIN.params)
    for t, mask in enumerate(masks):
        assert_gated(jax.tree.map(lambda g, t=t: g[t], got), history[t], mask, 1e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), got_params, params
    )


@both
def test_inside_of_cond_and_while(kind, quick_compilation):
    """Masks that are made inside of control flow."""
    mask = {"d0": False, "d1": {"w": True, "b": False}, "d2": True}

    @jax.jit
    def ours(given, *args):
        chosen = choose(kind, mask, given)
        f = lambda: grad(PLAIN.loss)(*args, active=chosen)
        zeros = lambda: jax.tree.map(jnp.zeros_like, args[0])
        twice = lambda i, total: jax.tree.map(jnp.add, total, lax.cond(i > 0, f, zeros))
        return lax.fori_loop(0, 2, twice, zeros())

    assert_gated(ours(traceable(mask), *PLAIN_ARGS), plain_expected()[1], mask)


@both
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_of_gradients(kind, mode, quick_compilation):
    """A Hessian times a vector, either way."""
    params, x, target = PLAIN_ARGS
    mask = random_mask(params, 2)
    assert 0 < sum(jax.tree.leaves(mask)) < len(jax.tree.leaves(mask))
    vector = models.fill(params, 7)

    def product(f):
        g = lambda p: jax.tree.map(lambda g, m: g * m, f(p), mask)
        if mode == "forward":
            return jax.jit(lambda p: jax.jvp(g, (p,), (vector,))[1])(params)
        dot = lambda p: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g(p), vector)))
        return jax.jit(jax.grad(dot))(params)

    given = of_kind(kind, mask)
    expected = product(lambda p: jax.grad(PLAIN.loss)(p, x, target))
    got = product(lambda p: grad(PLAIN.loss)(p, x, target, active=given))
    assert_gated(got, expected, mask if mode == "forward" else True)


@pytest.mark.parametrize("kind", [slow_unless(False, "static"), "dynamic"])
@pytest.mark.parametrize("name", ["plain mlp", "scan", "complex"])
def test_with_and_without_x64(name, kind, x64, quick_compilation):
    m = MODELS[name]()
    wide = lambda a: jnp.asarray(a, jnp.result_type(a, jnp.float64)) if x64 else a
    is_float = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.inexact)
    params, args = jax.tree.map(
        lambda a: wide(a) if is_float(a) else a, (m.params, m.args)
    )
    mask = random_mask(params, 3)
    theirs = jax.jit(jax.value_and_grad(m.loss))(params, *args)
    ours = jax.jit(
        lambda given, *a: value_and_grad(m.loss)(*a, active=choose(kind, mask, given))
    )
    value, got = ours(traceable(mask), params, *args)
    rtol = 1e-12 if x64 and name != "complex" else m.rtol  # there, a complex64 is in it
    assert_values(value, theirs[0], rtol)
    assert_gated(got, theirs[1], mask, rtol)


# Many devices.


DEVICES = 4


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,))


def replicated_gradients(f):
    """In each replica the gradients of its part of the batch, and then their mean."""

    def step(mask, params, x, target):
        value, g = f(params, x, target, active=mask)
        return lax.pmean((value, g), "i")

    return step


def without_mask(f):
    return lambda *args, active: f(*args)


@both
def test_pmap(kind, quick_compilation):
    params, x, target = PLAIN_ARGS
    split = lambda a: a.reshape(DEVICES, 1, -1)

    def run(f, mask):
        step = lambda given, *args: replicated_gradients(f)(
            choose(kind, mask, given), *args
        )
        mapped = jax.pmap(
            step, "i", in_axes=(None, None, 0, 0), devices=jax.devices()[:DEVICES]
        )
        return mapped(traceable(mask), params, split(x), split(target))

    mask = random_mask(params, 0)
    values, expected = run(without_mask(jax.value_and_grad(PLAIN.loss)), mask)
    got_values, got = run(value_and_grad(PLAIN.loss), mask)
    assert_values(got_values, values)
    assert_gated(got, expected, mask)
    np.testing.assert_allclose(values, plain_expected()[0], rtol=1e-5)


@both
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mean", ["of gradients", "of losses"])
def test_shard_map(check_vma, mean, kind, quick_compilation):
    """Under `check_vma` the gradients of replicated params are summed by autodiff."""
    params, x, target = PLAIN_ARGS
    inside = lambda *args: lax.pmean(PLAIN.loss(*args), "i")
    loss = PLAIN.loss if mean == "of gradients" else inside

    def run(f, masks):
        step = lambda given, *args: replicated_gradients(f)(
            choose(kind, masks[0], given), *args
        )
        specs = {"in_specs": (P(), P(), P("i"), P("i")), "out_specs": P()}
        mapped = jax.shard_map(step, mesh=mesh_of(), check_vma=check_vma, **specs)
        mapped = jax.jit(mapped)
        return [mapped(traceable(mask), params, x, target) for mask in masks]

    masks = [random_mask(params, seed) for seed in range(1 if kind == "static" else 3)]
    ((values, expected),) = run(without_mask(jax.value_and_grad(loss)), masks[:1])
    for mask, (got_values, got) in zip(
        masks, run(value_and_grad(loss), masks), strict=True
    ):
        assert_values(got_values, values)
        assert_gated(got, expected, mask)


@both
def test_shard_map_scan(kind, quick_compilation):
    """A scan over layers in every replica; under `check_vma` its carry has a type."""
    m = models.model("scan")
    masks = list(vector_masks(m, 1 if kind == "static" else 3))

    def run(f, masks):
        def step(given, params, steps, x, target):
            active = choose(kind, masks[0], given)
            return lax.pmean(f(params, steps, x, target, active=active), "i")

        specs = {"in_specs": (P(), P(), P(), P("i"), P("i")), "out_specs": P()}
        mapped = jax.jit(jax.shard_map(step, mesh=mesh_of(), check_vma=True, **specs))
        return [mapped(traceable(mask), m.params, *m.args) for mask in masks]

    ((values, expected),) = run(without_mask(jax.value_and_grad(m.loss)), masks[:1])
    for mask, (got_values, got) in zip(
        masks, run(value_and_grad(m.loss), masks), strict=True
    ):
        assert_values(got_values, values)
        assert_gated(got, expected, mask)


@both
def test_data_parallel_by_the_compiler(kind, quick_compilation):
    params, *batch = PLAIN_ARGS
    mesh = mesh_of()
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, NamedSharding(mesh, P("i")))
    mask = random_mask(params, 0)
    ours = jax.jit(
        lambda given, *args: value_and_grad(PLAIN.loss)(
            *args, active=choose(kind, mask, given)
        )
    )
    value, got = ours(traceable(mask), params, *batch)
    assert_values(value, plain_expected()[0])
    assert_gated(got, plain_expected()[1], mask)


@both
def test_shard_map_inside_of_the_function(kind, quick_compilation):
    params, *batch = PLAIN_ARGS
    mesh = mesh_of()
    specs = {"in_specs": (P(), P("i"), P("i")), "out_specs": P()}
    part = lambda *args: lax.pmean(PLAIN.loss(*args), "i")
    loss = jax.shard_map(part, mesh=mesh, check_vma=True, **specs)
    mask = random_mask(params, 0)
    ours = lambda given, *args: value_and_grad(loss)(
        *args, active=choose(kind, mask, given)
    )
    value, got = jax.jit(ours)(traceable(mask), *PLAIN_ARGS)
    assert_values(value, plain_expected()[0])
    assert_gated(got, plain_expected()[1], mask)


SHARDED = {"in": (8, 4), "middle": (4, 12), "out": (12, 8)}
SPECS = {"in": P("i"), "middle": P(None, "i"), "out": P()}


def sharded_params(mesh):
    params = {
        name: draw(*shape, seed=i) for i, (name, shape) in enumerate(SHARDED.items())
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put(params, shardings), shardings


@pytest.mark.parametrize("active", ["none", "some"])
def test_zeros_lie_where_the_params_lie(active):
    params, shardings = sharded_params(mesh_of())
    loss = lambda p: squares(jnp.tanh(p["in"] @ p["middle"]) @ p["out"], 1.0)
    mask = {"in": False, "middle": False, "out": active == "some"}
    got = grad(loss)(params, active=mask)
    for name in ("in", "middle"):
        assert got[name].sharding.is_equivalent_to(shardings[name], 2), name
    device = jax.devices()[3]
    params = jax.device_put(params, device)
    assert grad(loss)(params, active=mask)["in"].devices() == {device}


@both
def test_explicit_sharding(kind, quick_compilation):
    """Shardings are parts of types; gradients have those of jax.grad."""
    mesh = mesh_of(AxisType.Explicit)
    mask = {"in": False, "middle": True, "out": False}

    def loss(p):
        y = jnp.matmul(p["in"], p["middle"], out_sharding=P("i", None))
        y = jnp.matmul(jnp.tanh(y), p["out"], out_sharding=P("i", None))
        return squares(y, 1.0)

    with jax.set_mesh(mesh):
        params, _ = sharded_params(mesh)
        expected = jax.jit(jax.grad(loss))(params)
        for mask in (only(params, 0), only(params, 1), only(params)):
            ours = lambda given, p, mask=mask: grad(loss)(
                p, active=choose(kind, mask, given)
            )
            got = jax.jit(ours)(traceable(mask), params)
            assert_gated(got, expected, mask)
            assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, expected)


# What is left out of a static variant, counted by XLA.


DEEP = (16, 32, 32, 32, 32, 4)
DEEP_ARGS = (dense(*DEEP), draw(64, 16, seed=80), draw(64, 4, seed=81))


def deep_loss(params, x, target):
    return squares(mlp(params, x), target)


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def by_layer(*active):
    return {f"d{i}": i in active for i in range(5)}


def by_hand(f, mask):
    """What someone writes who knows which layers rest."""

    def theirs(params, *args):
        rest = {k: p for k, p in params.items() if not mask[k]}
        wanted = {k: p for k, p in params.items() if mask[k]}
        return jax.value_and_grad(lambda p: f({**rest, **p}, *args))(wanted)

    return theirs


def ours_static(f, mask):
    return lambda *args: value_and_grad(f)(*args, active=mask)


def test_flops_fall_as_the_prefix_grows():
    forward = flops(deep_loss, *DEEP_ARGS)
    found = []
    for first in range(6):
        mask = by_layer(*range(first, 5))
        found.append(flops(ours_static(deep_loss, mask), *DEEP_ARGS))
        if first in (1, 4):
            assert found[-1] <= 1.01 * flops(by_hand(deep_loss, mask), *DEEP_ARGS)
    assert all(a > 1.03 * b for a, b in zip(found[:-1], found[1:], strict=True)), found
    assert forward <= found[-1] <= 1.01 * forward


@pytest.mark.parametrize("active", [(0,), (0, 3), (1, 4), (2,)], ids=str)
def test_flops_of_scattered_layers(active):
    """A chain down to the lowest, and no weight gradients but those asked for."""
    mask = by_layer(*active)
    ours = flops(ours_static(deep_loss, mask), *DEEP_ARGS)
    assert ours <= 1.01 * flops(by_hand(deep_loss, mask), *DEEP_ARGS)
    layer = lambda i: 2 * 64 * DEEP[i] * DEEP[i + 1]
    chain = sum(layer(i) for i in range(min(active) + 1, 5))
    products = sum(map(layer, range(5))) + chain + sum(map(layer, active))
    assert products <= ours <= 1.3 * products  # and the element-wise rest


@pytest.mark.parametrize(
    "name", [slow_unless(n != "cnn", n) for n in ("cnn", "transformer", "linen scan")]
)
def test_nothing_active_costs_a_forward_pass(name):
    m = models.model(name)
    assert not m.kwargs
    args = (m.params, *m.args)
    f = value_and_grad(m.loss, has_aux=m.has_aux)
    ours = flops(lambda *args: f(*args, active=False), *args)
    assert ours <= 1.02 * flops(m.loss, *args)


@pytest.mark.slow
def test_flops_of_a_prefix_of_a_transformer():
    m = models.model("transformer")
    args = (m.params, *m.args)
    above = {k: k in ("norm", "up1", "down1") for k in m.params}
    ours = flops(ours_static(m.loss, above), *args)
    assert ours <= 1.02 * flops(by_hand(m.loss, above), *args)
    assert ours < 0.7 * flops(jax.value_and_grad(m.loss), *args)


def temporary(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_falls_as_the_prefix_grows():
    """Residuals of resting layers are not saved."""
    params, *_ = DEEP_ARGS
    batch = (draw(512, 16, seed=80), draw(512, 4, seed=81))
    masks = [by_layer(*range(first, 5)) for first in (0, 2, 3, 4)]
    found = [temporary(ours_static(deep_loss, mask), params, *batch) for mask in masks]
    assert all(a > 1.1 * b for a, b in zip(found[:-1], found[1:], strict=True)), found
    assert found[-1] < 0.6 * found[0]
    best = temporary(by_hand(deep_loss, masks[1]), params, *batch)
    assert found[1] <= 1.01 * best


@pytest.mark.slow
def test_memory_of_a_checkpoint():
    """Layers that are computed again in the backward pass are not saved either."""
    params = dense(*DEEP)
    batch = (draw(512, 16, seed=80), draw(512, 4, seed=81))
    layer = jax.checkpoint(lambda own, x: jnp.tanh(jnp.sin(jnp.tanh(affine(own, x)))))

    def loss(params, x, target):
        for i in range(4):
            x = layer(params[f"d{i}"], x)
        return squares(affine(params["d4"], x), target)

    ours = temporary(ours_static(loss, by_layer(0, 1, 2, 3, 4)), params, *batch)
    assert ours <= 1.02 * temporary(jax.value_and_grad(loss), params, *batch)


# What is left out of a dynamic program.


def equations(jaxpr):
    """All equations, also those of jaxprs in the parameters of others."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def dynamic_jaxpr(loss, mask, *args):
    ours = lambda mask, *args: value_and_grad(loss)(*args, active=mask)
    return jax.make_jaxpr(ours)(traceable(mask), *args)


def test_pass_through_is_the_false_branch(one_program):
    """The other way round XLA copies what passes through."""
    jaxpr = dynamic_jaxpr(deep_loss, random_mask(DEEP_ARGS[0], 0), *DEEP_ARGS)
    conds = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "cond"]
    assert conds
    for eqn in conds:
        false, true = eqn.params["branches"]
        products = lambda branch: sum(
            eqn.primitive.name == "dot_general" for eqn in equations(branch)
        )
        assert products(false) == 0
    assert max(products(eqn.params["branches"][1]) for eqn in conds) > 1  # nested


def outermost(jaxpr):
    """The conditionals that are not inside of another."""
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]


def test_levels(monkeypatch):
    """Which program runs, and what it computes, by how far down active leaves are."""
    mask = random_mask(DEEP_ARGS[0], 0)
    (cond,) = outermost(dynamic_jaxpr(deep_loss, mask, *DEEP_ARGS))
    everything, any_of_them, half, last = cond.params["branches"]
    assert not outermost(everything) and outermost(any_of_them)

    def cost(branch):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in branch.in_avals]
        return flops(jax.extend.core.jaxpr_as_fun(branch), *shapes)

    for branch, active in [
        (everything, (0, 1, 2, 3, 4)),
        (any_of_them, (0, 1, 2, 3, 4)),
        (half, (3, 4)),
        (last, (4,)),
    ]:
        known = flops(ours_static(deep_loss, by_layer(*active)), *DEEP_ARGS)
        assert cost(branch) == pytest.approx(known, rel=0.02)

    taken = []

    def switch(index, branches, original=lax.switch):
        taken.append(int(index))
        return original(index, branches)

    monkeypatch.setattr(_levels.lax, "switch", switch)
    for active, program in [
        ((0, 1, 2, 3, 4), 0),
        ((0, 4), 1),
        ((0,), 1),
        ((2, 4), 1),
        ((3, 4), 2),
        ((3,), 2),
        ((4,), 3),
        ((), 3),
    ]:
        value_and_grad(deep_loss)(*DEEP_ARGS, active=traceable(by_layer(*active)))
        assert taken.pop() == program, active


def test_levels_are_for_programs_that_are_worth_it(monkeypatch):
    """Not for small ones, not where something is shared with other devices."""
    mask = random_mask(DEEP_ARGS[0], 0)

    def branches(loss, *args):
        conds = outermost(dynamic_jaxpr(loss, mask, *args))
        return [len(eqn.params["branches"]) for eqn in conds]

    assert branches(deep_loss, *DEEP_ARGS) == [4]
    monkeypatch.setattr(_levels, "_SHARES", {1 / 2: 5, 1 / 16: 2000})
    assert branches(deep_loss, *DEEP_ARGS) == [3]

    def printing(params, x, target):
        jax.debug.print("{}", x[0, 0])
        return deep_loss(params, x, target)

    def averaged(mask, *args):
        loss = lambda *args: lax.pmean(deep_loss(*args), "i")
        return value_and_grad(loss)(*args, active=mask)

    shared = jax.shard_map(averaged, mesh=mesh_of(), in_specs=P(), out_specs=P())
    inside = equations(jax.make_jaxpr(shared)(traceable(mask), *DEEP_ARGS))
    conds = [eqn for eqn in inside if eqn.primitive.name == "cond"]
    assert {len(eqn.params["branches"]) for eqn in conds} == {2}
    assert set(branches(printing, *DEEP_ARGS)) == {2}
    monkeypatch.setattr(_levels, "_LEAST", 1e6)
    assert set(branches(deep_loss, *DEEP_ARGS)) == {2}


def test_levels_stay_conditionals_under_a_batch_of_masks():
    """The level is the lowest of those that the members need."""
    masks = [by_layer(4), by_layer(3)]
    stacked = jax.tree.map(lambda *m: jnp.array(m), *masks)
    f = lambda mask: value_and_grad(deep_loss)(*DEEP_ARGS, active=mask)
    (cond,) = outermost(jax.make_jaxpr(jax.vmap(f))(stacked))
    assert len(cond.params["branches"]) == 4
    _, got = jax.jit(jax.vmap(f))(stacked)
    expected = jax.grad(deep_loss)(*DEEP_ARGS)
    for i, mask in enumerate(masks):
        assert_gated(jax.tree.map(lambda g, i=i: g[i], got), expected, mask)


def test_program_grows_with_the_depth():
    """And not with its square, nor faster, as nested branches could."""

    def size(layers):
        params = [draw(3, 3, seed=i) for i in range(layers)]
        loss = lambda p, x: (
            functools.reduce(lambda x, w: jnp.tanh(x @ w), p, x) ** 2
        ).sum()
        jaxpr = dynamic_jaxpr(loss, [True] * layers, params, draw(2, 3))
        return sum(1 for _ in equations(jaxpr))

    assert size(32) < 2.5 * size(16)


def test_dynamic_does_nothing_twice():
    """XLA counts the costlier branch of each conditional."""
    mask = traceable(random_mask(DEEP_ARGS[0], 0))
    ours = flops(
        lambda mask, *args: value_and_grad(deep_loss)(*args, active=mask),
        mask,
        *DEEP_ARGS,
    )
    theirs = flops(jax.value_and_grad(deep_loss), *DEEP_ARGS)
    assert 0.95 * theirs <= ours <= 1.05 * theirs


def test_static_part_of_a_dynamic_mask_costs_nothing():
    params, *batch = DEEP_ARGS

    def ours(flag, *args):
        mask = {"d0": False, "d1": False, "d2": flag, "d3": True, "d4": flag}
        return value_and_grad(deep_loss)(*args, active=mask)

    known = flops(ours_static(deep_loss, by_layer(2, 3, 4)), *DEEP_ARGS)
    assert flops(ours, jnp.bool_(True), *DEEP_ARGS) <= 1.05 * known


def computations(text):
    """Name -> text of each computation of an HLO module."""
    found = {}
    for block in re.split(r"\n\}\n?", text):
        header = re.search(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", block, re.MULTILINE)
        if header:
            found[header[1]] = block[header.end() :]
    return found


def reachable(start, blocks):
    """The text of a computation and of all that it calls."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [n for n in re.findall(r"%([\w.\-]+)", blocks[name]) if n in blocks]
    return "\n".join(blocks[name] for name in seen)


def test_conditionals_are_left_by_the_compiler():
    ours = jax.jit(lambda mask, *args: value_and_grad(deep_loss)(*args, active=mask))
    mask = traceable(random_mask(DEEP_ARGS[0], 0))
    text = ours.lower(mask, *DEEP_ARGS).compile().as_text()
    assert text.count(" conditional(") >= 5  # a layer at a time


@pytest.mark.parametrize("vectors", [False, True], ids=["leaf", "layers"])
def test_conditionals_inside_of_the_loop_over_layers(vectors):
    m = models.model("scan")
    mask = next(vector_masks(m)) if vectors else random_mask(m.params, 0)
    ours = jax.jit(lambda mask, *args: value_and_grad(m.loss)(*args, active=mask))
    text = ours.lower(traceable(mask), m.params, *m.args).compile().as_text()
    blocks = computations(text)
    bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    assert bodies
    assert any(" conditional(" in reachable(body, blocks) for body in bodies)


@functools.cache
def counters():
    """`mark(name, index, x)` is x, and counts when a cotangent passes it."""
    calls = collections.Counter()

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def mark(name, index, x):
        return x

    def forward(name, index, x):
        return x, index

    def backward(name, index, g):
        def count(index, g):
            calls[name, int(index)] += 1
            return np.asarray(g)

        like = jax.ShapeDtypeStruct(g.shape, g.dtype)
        return None, jax.pure_callback(count, like, index, g)

    mark.defvjp(forward, backward)
    return mark, calls


def counted(f, *args):
    """How often each mark was passed."""
    _, calls = counters()
    calls.clear()
    jax.block_until_ready(f(*args))
    return dict(calls)


def should_count(weights):
    """Each layer's weight if it is active; its input if one below it is."""
    n = len(weights)
    expected = {("w", i): 1 for i in range(n) if weights[i]}
    return expected | {("x", i): 1 for i in range(n) if any(weights[:i])}


def marked_mlp(params, x):
    mark, _ = counters()
    for i, w in enumerate(params):
        x = x if i == 0 else mark("x", i, x)
        x = jnp.tanh(x @ mark("w", i, w))
    return (x**2).sum()


@both
def test_what_runs(kind, quick_compilation):
    """Only weight gradients of active layers, and the chain no further than needed."""
    params = [draw(3, 3, seed=i) for i in range(4)]
    x = draw(2, 3, seed=9)
    f = value_and_grad(marked_mlp)
    dynamic = jax.jit(lambda mask, *args: f(*args, active=mask))
    masks = [*np.ndindex(2, 2, 2, 2)] if kind == "dynamic" else [(0, 1, 0, 1), (0,) * 4]
    for mask in masks:
        mask = list(map(bool, mask))
        if kind == "dynamic":
            found = counted(dynamic, traceable(mask), params, x)
        else:
            found = counted(jax.jit(functools.partial(f, active=mask)), params, x)
        assert found == should_count(mask), mask


@both
def test_what_runs_in_a_scan(kind, quick_compilation):
    """The same for the layers of a scan, each with its own bool."""
    mark, _ = counters()

    def loss(params, x):
        def layer(x, own):
            i, w = own
            return jnp.tanh(mark("x", i, x) @ mark("w", i, w)), None

        x = x @ mark("w", -1, params["stem"])
        return (lax.scan(layer, x, (jnp.arange(4), params["stack"]))[0] ** 2).sum()

    params = {"stem": draw(3, 3, seed=7), "stack": draw(4, 3, 3, seed=8)}
    x = draw(2, 3, seed=9)
    f = value_and_grad(loss)
    dynamic = jax.jit(lambda mask, *args: f(*args, active=mask))
    masks = [
        (0, 0, 0, 0, 1),
        (0, 0, 1, 0, 1),
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (0,) * 5,
    ]
    for mask in masks if kind == "dynamic" else masks[1:2]:
        stem, *stack = map(bool, mask)
        active = {"stem": stem, "stack": np.array(stack)}
        if kind == "dynamic":
            found = counted(dynamic, traceable(active), params, x)
        else:
            found = counted(jax.jit(functools.partial(f, active=active)), params, x)
        expected = {("w", i): 1 for i in range(4) if stack[i]}
        expected |= {("x", i): 1 for i in range(4) if stem or any(stack[:i])}
        assert found == expected | ({("w", -1): 1} if stem else {}), mask


def test_what_runs_in_towers(quick_compilation):
    """The chain goes down those towers alone in which something is active."""
    mark, _ = counters()

    def tower(params, i, x):
        return jnp.tanh(mark("x", i, jnp.tanh(x @ params[0])) @ params[1])

    def loss(params, x):
        product = tower(params["left"], 0, x) * tower(params["right"], 1, x)
        return (mark("x", 2, product) ** 2).sum()

    names = ("left", "right")
    params = {
        n: [draw(3, 3, seed=i), draw(3, 3, seed=5 + i)] for i, n in enumerate(names)
    }
    ours = jax.jit(lambda mask, *args: value_and_grad(loss)(*args, active=mask))
    for flags in np.ndindex(2, 2, 2, 2):
        left, right = mask = np.array(flags, bool).reshape(2, 2).tolist()
        given = traceable({"left": left, "right": right})
        found = counted(ours, given, params, draw(2, 3, seed=2))
        runs = {("x", 0): left[0], ("x", 1): right[0], ("x", 2): any(left + right)}
        assert found == {key: 1 for key, run in runs.items() if run}, mask


# Programs that nobody wrote.


def random_step(kind, a, b, w, stack):
    """Two values and a weight make another value."""
    product = lambda a, w: jnp.tanh(a @ w)
    if kind == "product":
        return product(a, w)
    if kind == "sum":
        return a + jnp.sin(b)
    if kind == "times":
        return a * b
    if kind == "jit":
        return jax.jit(product)(a, w)
    if kind == "checkpoint":
        return jax.checkpoint(product)(a, w) + b
    if kind == "layers":
        return lax.scan(lambda c, v: (product(c, v), c), a, stack)[0]
    if kind == "time":
        return lax.scan(lambda c, r: (product(c, w) + r, c), a, b[:, None])[1][-1]
    if kind == "cond":
        return lax.cond(b.sum() > 0, product, lambda a, w: a + w[:1], a, w)
    assert kind == "stop"
    return lax.stop_gradient(a) - jnp.concatenate([b[:, 2:], a[:, :2]], 1)


STEPS = "product sum times jit checkpoint layers time cond stop".split()


def random_program(seed):
    """A net of random branches, shared weights, scans, jits and checkpoints."""
    rng = random.Random(seed)
    n = rng.randrange(2, 5)
    params = {f"p{i}": draw(4, 4, seed=100 * seed + i) for i in range(n)}
    params["stack"] = draw(3, 4, 4, seed=100 * seed + 50)
    steps = [
        (
            rng.choice(STEPS),
            rng.randrange(99),
            rng.randrange(99),
            f"p{rng.randrange(n)}",
        )
        for _ in range(rng.randrange(3, 9))
    ]

    def loss(params, x):
        values = [x, jnp.cos(x)]
        for kind, i, j, name in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(random_step(kind, a, b, params[name], params["stack"]))
        return sum((v**2).sum() for v in values[-3:])

    return params, loss, draw(2, 4, seed=99)


@pytest.mark.parametrize("seed", [slow_unless(seed < 6, seed) for seed in range(40)])
def test_random_program(seed, quick_compilation):
    params, loss, x = random_program(seed)
    value, expected = jax.jit(jax.value_and_grad(loss))(params, x)
    ours = jax.jit(lambda mask, *args: value_and_grad(loss)(*args, active=mask))
    for s in range(4):
        mask = random_mask(params, s)
        mask["stack"] = np.random.default_rng(s).random(3) < 0.5
        got_value, got = ours(traceable(mask), params, x)
        assert_values(got_value, value)
        assert_gated(got, expected, mask, 1e-4)


# Bad input.


BAD_MASKS = {
    "missing key": ({"d0": True, "d1": True}, ValueError, "d2"),
    "extra key": (
        {"d0": True, "d1": True, "d2": True, "d9": True},
        ValueError,
        "d9",
    ),
    "other node": ({"d0": True, "d1": [True, True], "d2": True}, ValueError, "d1"),
    "deeper": (
        {"d0": True, "d1": {"w": {"a": True}, "b": True}, "d2": True},
        ValueError,
        "w",
    ),
    "list": ([True, True, True], ValueError, "params"),
    "int": ({"d0": True, "d1": 1, "d2": True}, TypeError, "d1"),
    "zero": (0, TypeError, "params"),
    "float": ({"d0": True, "d1": True, "d2": 1.0}, TypeError, "d2"),
    "string": ({"d0": "no", "d1": True, "d2": True}, TypeError, "d0"),
    "int array": ({"d0": jnp.int32(1), "d1": True, "d2": True}, TypeError, "d0"),
    "float array": ({"d0": np.ones(()), "d1": True, "d2": True}, TypeError, "d0"),
    "wrong length": (
        {"d0": {"w": np.ones(4, bool), "b": True}, "d1": True, "d2": True},
        ValueError,
        "d0.*w.*5",
    ),
    "matrix": (
        {"d0": {"w": np.ones((5, 6), bool), "b": True}, "d1": True, "d2": True},
        ValueError,
        "d0.*w",
    ),
    "dynamic, wrong length": (
        {"d0": {"w": jnp.ones(4, bool), "b": True}, "d1": True, "d2": True},
        ValueError,
        "d0.*w.*5",
    ),
}


@pytest.mark.parametrize("mask, error, path", BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_mask(mask, error, path):
    with pytest.raises(error, match=f"active.*{path}"):
        value_and_grad(PLAIN.loss)(*PLAIN_ARGS, active=mask)


def test_vector_for_a_scalar():
    with pytest.raises(ValueError, match=r"active.*\['a'\]"):
        grad(lambda p: p["a"])({"a": jnp.float32(1)}, active={"a": np.ones(1, bool)})


def test_traced_mask_of_the_wrong_dtype():
    f = jax.jit(lambda mask: grad(PLAIN.loss)(*PLAIN_ARGS, active=mask))
    with pytest.raises(TypeError, match=r"\['d1'\].*int32"):
        f({"d0": True, "d1": jnp.int32(1), "d2": True})


IN_JAX_WORDS = {
    "integer params": (
        lambda p: 1.0 * p["a"] * p["b"],
        {"a": A, "b": jnp.int32(2)},
        {},
    ),
    "bool params": (lambda p: 1.0 * p["a"] * p["b"], {"a": A, "b": True}, {}),
    "string params": (lambda p: p["a"], {"a": A, "b": "text"}, {}),
    "object params": (lambda p: p["a"], {"a": A, "b": object()}, {}),
    "vector output": (lambda p: p["a"] * p["b"] * jnp.ones(3), {"a": A, "b": A}, {}),
    "pair without aux": (lambda p: (p["a"], p["b"]), {"a": A, "b": A}, {}),
    "dict output": (lambda p: {"loss": p["a"]}, {"a": A, "b": A}, {}),
    "None output": (lambda p: None, {"a": A, "b": A}, {}),
    "integer output": (lambda p: (p["a"] * 0).astype(int), {"a": A, "b": A}, {}),
    "complex output": (lambda p: p["a"] * 1j * p["b"], {"a": A, "b": A}, {}),
    "aux not a pair": (lambda p: p["a"], {"a": A, "b": A}, {"has_aux": True}),
    "aux a triple": (lambda p: (p["a"], 1, 2), {"a": A, "b": A}, {"has_aux": True}),
    "argnums past the end": (lambda p: p["a"], {"a": A, "b": A}, {"argnums": 1}),
    "argnums before the start": (
        lambda p: p["a"],
        {"a": A, "b": A},
        {"argnums": (0, -2)},
    ),
    "error in the function": (lambda p: p["c"], {"a": A, "b": A}, {}),
}
ACTIVE = {
    "default": None,
    "all": True,
    "none": False,
    "static": {"a": True, "b": False},
    "dynamic": {"a": jnp.bool_(True), "b": jnp.bool_(False)},
}


@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
@pytest.mark.parametrize(
    "fun, params, options", IN_JAX_WORDS.values(), ids=IN_JAX_WORDS
)
def test_in_jax_words(fun, params, options, active):
    if isinstance(options.get("argnums"), tuple) and isinstance(active, dict):
        active = (active, active)
    with pytest.raises(Exception) as theirs:  # noqa: B017
        jax.value_and_grad(fun, **options)(params)
    with pytest.raises(type(theirs.value)) as ours:
        value_and_grad(fun, **options)(params, active=active)
    # Other values, same words.
    printed = r"(<class|Output was [({]|\(GradTracer|\(Array|\(JitTracer).*"
    # Other values, the same words.
    words = [re.sub(printed, "", str(e.value), flags=re.DOTALL) for e in (ours, theirs)]
    assert words[0] == words[1]


@pytest.mark.parametrize(
    "fun, argnums", [(3, 0), (None, 0), (jnp.sum, 1.5), (jnp.sum, "x")]
)
def test_not_to_be_differentiated(fun, argnums):
    with pytest.raises(Exception) as theirs:  # noqa: B017
        jax.value_and_grad(fun, argnums)(1.0)
    with pytest.raises(type(theirs.value)) as ours:
        value_and_grad(fun, argnums)(1.0)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("active", [None, True, False, "same"])
@pytest.mark.parametrize("params", [{}, (), None, {"a": [], "b": {}}], ids=str)
def test_empty_trees(params, active):
    active = params if active == "same" else active
    value, got = value_and_grad(lambda p, x: 2.0 * x)(params, A, active=active)
    assert value == 2 and got == params


@both
def test_leaking_tracers(kind):
    """What escapes from the function says so when it is used, as under jax.grad."""
    leaked = []

    def loss(p):
        leaked.append(p["a"] * 2.0)
        return p["a"] * p["b"]

    active = of_kind(kind, {"a": True, "b": False})
    jax.jit(lambda p: grad(loss)(p, active=active))({"a": A, "b": A})
    with pytest.raises(jax.errors.UnexpectedTracerError):
        _ = leaked[0] + 1.0


def test_constants_of_an_outer_trace():
    """A loss may use tracers of the function around it."""

    @jax.jit
    def outer(scale, mask, p):
        return grad(lambda p: scale * p["a"] * p["b"])(p, active=mask)

    mask = {"a": jnp.bool_(True), "b": jnp.bool_(False)}
    assert outer(A * 3, mask, {"a": A, "b": A * 2}) == {"a": 6, "b": 0}


@pytest.mark.parametrize("programs", ["one_program", "levels"])
def test_convolutions_in_conditionals_are_in_the_usual_order(
    programs, request, quick_compilation
):
    """In any other XLA:CPU is very slow at them, in a conditional."""
    request.getfixturevalue(programs)
    shapes = {"a": (3, 3, 1, 2), "b": (3, 2, 2, 4)}
    params = {name: models.draw(*shape) for name, shape in shapes.items()}

    def loss(p, x):
        usual = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["a"], (1, 2), "SAME", None, None, usual)
        w = p["b"].transpose(3, 2, 0, 1)
        x = jnp.tanh(x).transpose(0, 3, 1, 2)
        return jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "VALID") ** 2)

    def ours(p, x, active):
        return grad(loss)(p, x, active=active)

    x = models.draw(2, 6, 8, 1)
    expected = jax.grad(loss)(params, x)
    for mask in ({"a": True, "b": False}, {"a": False, "b": True}):
        got = jax.jit(ours)(params, x, jax.tree.map(jnp.bool_, mask))
        assert_gated(got, expected, mask)
    lowered = jax.jit(ours).lower(params, x, jax.tree.map(jnp.bool_, mask))
    branches = lowered.as_text().split("stablehlo.case", 1)[1]
    found = re.findall(r"stablehlo.convolution.*?dim_numbers = (.*?), window", branches)
    # Two weight gradients, and the chain in between; the forward pass with them where
    # all are active, or any, and with the gradient of the last where no other is.
    count = {"one_program": 3, "levels": (2 + 3) + (2 + 3) + (2 + 1)}[programs]
    assert len(found) == count
    assert set(found) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}

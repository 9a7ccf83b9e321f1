"""What optax and JAX expect of any transformation, asked of all of ours."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import kinds, slow_unless, SUBJECTS, subjects
from priorityprop_jax import prioritize


def build(name, like, **settings):
    return SUBJECTS[name].build(like, **settings)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


# init


@pytest.mark.parametrize("name", SUBJECTS)
def test_init_looks_at_shapes_only(name):
    params = helpers.model()
    tx = build(name, shapes_of(params))
    state = tx.init(params)
    assert kinds(jax.eval_shape(tx.init, params)) == kinds(state)
    chex.assert_trees_all_equal(tx.init(shapes_of(params)), state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert not any(weak for _, _, weak in kinds(state)[1])
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("name", SUBJECTS)
def test_state_does_not_alias(name):
    # What is donated twice is an error on some backends, and garbage on others.
    params = helpers.model()
    leaves = jax.tree.leaves((params, build(name, params).init(params)))
    places = [x.unsafe_buffer_pointer() for x in leaves if x.nbytes]
    assert len(places) == len(set(places))


# update


@subjects(helpers.MOST, SUBJECTS)
def test_state_and_updates_are_a_fixed_point(name, allocation):
    """50 steps with donated buffers compile once; all types and shardings stay."""
    check_fixed_point(name)


@subjects(["priority_prop-leaf-argsort"], ["prioritize-adamw-element-decay"])
def test_fixed_point_with_the_exact_allocation(name):
    check_fixed_point(name)


def check_fixed_point(name):
    chex.clear_trace_counter()
    params = helpers.model()
    tx = build(name, params)
    grads = helpers.gradients(params, 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    expected, shardings = kinds(state), jax.tree.map(lambda x: x.sharding, state)
    for i in range(50):
        params, state, updates = step(params, state, grads[i % 2])
        assert kinds(state) == expected
        assert kinds(updates) == kinds(grads[0])
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
    chex.assert_tree_all_finite((params, state))
    assert helpers.ours(state).step == 50


DTYPES = ("bfloat16", "float16", "float32", "complex64", "float64", "complex128")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        slow_unless(n == helpers.FEW[-1] or d in ("bfloat16", "complex64"), n, d)
        for n in helpers.FEW
        for d in DTYPES
    ],
)
def test_dtypes_are_a_fixed_point(name, dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        params = helpers.model(dtype)
        tx = build(name, params)
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert kinds(new) == kinds(state)
        assert kinds(updates) == kinds(params)
        assert all(x.dtype == dtype for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_float32_whatever_the_gradients(dtype, allocation):
    """The square of 300 overflows in float16, as does the sum of squares."""
    del allocation
    with jax.enable_x64(dtype in ("float64", "complex128")):
        g = {"a": jnp.full((4,), 300, dtype), "b": jnp.full((9,), 0.25, dtype)}
        g["b"] = g["b"] * jnp.asarray(1j if "complex" in dtype else 1, dtype)
        tx = build("priority_prop-leaf-argsort", g, depth_factor=0.0)
        updates, state = tx.update(g, tx.init(g))
        assert state.scores.dtype == jnp.float32
        np.testing.assert_allclose(state.scores, [600.0, 0.75], rtol=1e-6)
        times = [int(m) for m in state.counts]
        assert kinds(updates) == kinds(g)
        for (key, u), m in zip(updates.items(), times, strict=True):
            np.testing.assert_array_equal(u, np.asarray(g[key]) * m)


@subjects()
def test_types_do_not_depend_on_x64(name, x64):
    params = helpers.model(jnp.float32)
    tx = build(name, params)
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert kinds(new) == kinds(state)
    assert kinds(updates) == kinds(params)
    held = {x.dtype.name for x in jax.tree.leaves(helpers.ours(state))}
    assert held <= {"int32", "float32", "uint8"}


def test_decisions_do_not_depend_on_x64(allocation):
    """To the bit. The allocation has its own such test."""
    del allocation
    params = helpers.model(jnp.float32)
    grads = helpers.random_like(params, 5)
    found = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            tx = build("priority_prop-axis-argsort", params)
            _, state = tx.update(grads, tx.init(params))
            found.append(jax.device_get(state))
    chex.assert_trees_all_equal(*found)
    rows = 3 + 4 + 2
    assert found[0].budget == rows * 4 // 2
    assert len(set(found[0].quotas.tolist())) > 1


def weakly_typed(tree):
    return jax.tree.map(
        lambda x: x * 1.0, jax.tree.map(lambda _: jnp.asarray(2.0), tree)
    )


@subjects()
def test_weakly_typed_params(name):
    """Where optax itself keeps types stable, so do we."""
    params = weakly_typed(helpers.model())
    assert all(x.weak_type for x in jax.tree.leaves(params))
    tx = build(name, params)
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert kinds(helpers.ours(new)) == kinds(helpers.ours(state))
    assert [k[:2] for k in kinds(new)[1]] == [k[:2] for k in kinds(state)[1]]
    if "adam" not in name:
        assert kinds(new) == kinds(state)
        assert kinds(updates) == kinds(params)


@subjects()
def test_pure_and_params_may_be_left_out(name, allocation):
    """The same input gives the same output, whatever was called in between."""
    del allocation
    params = helpers.model()
    grads, others = helpers.gradients(params, 2)
    tx = build(name, params)
    state = tx.init(params)
    before = tx.update(grads, state, params)
    tx.update(others, before[1], params)
    chex.assert_trees_all_equal(tx.update(grads, state, params), before)
    if SUBJECTS[name].needs_params:
        with pytest.raises(ValueError, match="not passing `params`"):
            tx.update(grads, state)
        return
    chex.assert_trees_all_close(tx.update(grads, state), before, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["priority_prop-leaf-argsort", "adam>priority_prop-leaf"]
)
def test_unknown_extra_args_are_ignored(name, allocation):
    del allocation
    params = helpers.model()
    tx = build(name, params)
    state = tx.init(params)
    plain = tx.update(params, state, params)
    chex.assert_trees_all_equal(
        tx.update(params, state, params, value=1.0, loss_fn=lambda p: p), plain
    )


@pytest.mark.parametrize("units", [*helpers.UNITS, "full"])
def test_extra_args_reach_the_inner_transformation(units, allocation):
    del allocation

    def update(updates, state, params=None, *, factor, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = helpers.model()
    full = {"budget": 1.0, "recalc_every": 4, "min_updates": 4, "max_updates": 4}
    settings = full if units == "full" else helpers.SHORT | {"max_updates": 4}
    units = "leaf" if units == "full" else units
    tx = prioritize(inner, units=helpers.units_of(units, params), **settings)
    state, update = tx.init(params), jax.jit(tx.update)
    once, state_once = update(params, state, params, factor=1.0)
    thrice, state_thrice = update(params, state, params, factor=3.0)
    chex.assert_trees_all_close(thrice, jax.tree.map(lambda u: 3 * u, once))
    chex.assert_trees_all_equal(state_thrice, state_once)
    with pytest.raises(TypeError, match="factor"):
        tx.update(params, state, params)


# trees


@pytest.mark.parametrize("tree", helpers.EMPTY)
@subjects(helpers.CORE)
def test_empty_trees(name, tree):
    params = helpers.EMPTY[tree]
    tx = build(name, params)
    state = tx.init(params)
    updates, new = tx.update(params, state, params)
    assert updates == params
    assert kinds(new) == kinds(state)
    assert helpers.ours(new).step == 1


@pytest.mark.parametrize("tree", helpers.TREES)
@subjects([n for n in helpers.FEW if ">" not in n], helpers.FEW)
def test_odd_trees_are_a_fixed_point(name, tree):
    params = helpers.TREES[tree]()
    tx = build(name, params)
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert kinds(updates) == kinds(params)
    assert kinds(new) == kinds(state)
    assert len(helpers.ours(state).sizes) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("tree", helpers.TREES)
@subjects(["prioritize-adam-element-keep"])
def test_odd_trees(name, tree, allocation):
    """All but what has no elements is updated: in a first step nothing rests."""
    del allocation
    params = helpers.TREES[tree]()
    tx = build(name, params)
    state = tx.init(params)
    for i, g in enumerate(helpers.gradients(params, 2)):
        updates, state = tx.update(g, state, params)
        chex.assert_tree_all_finite(updates)
        assert i or all(jnp.all(u != 0) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("units", helpers.UNITS)
def test_what_is_absent_does_not_compete(units, allocation):
    """Budget and quotas are those of the tree without the absent leaves."""
    del allocation
    tree = {"a": None, "b": jnp.ones((2, 3)), "c": {"m": optax.MaskedNode()}}
    tree["c"]["w"] = jnp.ones(3)
    expected = {"leaf": 2, "axis": 5, "element": 9}[units]
    tx = build(f"priority_prop-{units}-argsort", tree)
    _, state = tx.update(helpers.random_like(tree, 3), tx.init(tree))
    quotas = np.concatenate([np.ravel(q) for q in jax.tree.leaves(state.quotas)])
    assert quotas.size == expected
    assert state.budget == expected * 4 // 2
    assert quotas.min() >= 1


# JAX's transformations


@subjects(helpers.CORE, SUBJECTS)
def test_traces_without_leaks_inside_cond_and_scan(name):
    params = helpers.model()
    grads = helpers.random_like(params, 1)

    def train(params, state, go):
        def body(carry, _):
            params, state = carry
            updates, state = jax.lax.cond(
                go,
                lambda: tx.update(grads, state, params),
                lambda: (jax.tree.map(jnp.zeros_like, grads), state),
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), length=3)[0]

    with jax.checking_leaks():
        tx = build(name, params)
        state = jax.eval_shape(tx.init, params)
        out = jax.eval_shape(train, params, state, jnp.bool_(True))
    assert kinds(out) == kinds((params, state))


@subjects(helpers.FEW[1:])
def test_scan_and_cond_train_like_a_loop(name, allocation):
    del allocation
    params = helpers.model()
    tx = build(name, params)
    grads = helpers.gradients(params, 9)

    def body(carry, now):
        g, go = now
        params, state = carry
        updates, state = jax.lax.cond(
            go,
            lambda: tx.update(g, state, params),
            lambda: (jax.tree.map(jnp.zeros_like, g), state),
        )
        return (optax.apply_updates(params, updates), state), None

    go = jnp.arange(9) != 2  # one step is left out
    together = jax.tree.map(lambda *x: jnp.stack(x), *grads), go
    (scanned, state), _ = jax.lax.scan(body, (params, tx.init(params)), together)
    del grads[2]
    _, looped, expected = helpers.run(tx, params, grads)
    chex.assert_trees_all_close((scanned, state), (looped, expected), rtol=1e-5)


@subjects(helpers.FEW[::3])
def test_ensembles(name, allocation):
    """Under vmap every member decides for itself."""
    del allocation
    members = [helpers.model(), helpers.random_like(helpers.model(), 7)]
    tx = build(name, members[0])
    grads = [helpers.gradients(members[0], 6), helpers.gradients(members[0], 12)[6:]]
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    many = optax.GradientTransformationExtraArgs(jax.vmap(tx.init), jax.vmap(tx.update))
    _, together, state = helpers.run(
        many, stack(*members), [stack(*g) for g in zip(*grads, strict=True)]
    )
    alone = [helpers.run(tx, p, g)[1:] for p, g in zip(members, grads, strict=True)]
    chex.assert_trees_all_close((together, state), stack(*alone), rtol=1e-5)


def loss(params):
    """Half of the squared distance to 1."""
    return sum(jnp.sum((p - 1) ** 2) for p in jax.tree.leaves(params)) / 2


@pytest.mark.parametrize(
    ("units", "resting"),
    [("axis", None), ("element", None), ("leaf", "reset"), ("element", "keep")],
)
def test_differentiable(units, resting, allocation):
    """Through a step of SGD, whose derivative is known: decisions are constants.

    The residual p - 1 becomes (1 - 0.1 m)(p - 1), so that half of its square has the
    derivative (1 - 0.1 m)^2 (p - 1).
    """
    del allocation
    params = helpers.model()
    if resting is None:
        tx = build(f"priority_prop-{units}-argsort", params)
        tx = optax.chain(tx, optax.sgd(0.1))
    else:
        tx = build(f"prioritize-sgd-{units}-{resting}", params)
    state = tx.init(params)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def after(params):
        updates, new = tx.update(jax.grad(loss)(params), state, params)
        return loss(optax.apply_updates(params, updates)), updates

    (_, updates), slope = jax.jit(after)(params)
    kept = jax.tree.map(lambda u, p: (1 + u / (p - 1)) ** 2 * (p - 1), updates, params)
    chex.assert_trees_all_close(slope, kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["prioritize-adam-leaf-decay", "prioritize-adam-axis-keep"]
)
def test_differentiable_through_adam(name, allocation):
    """Both ways, in a step at which some units rest and some come back."""
    del allocation
    params = helpers.model()
    tx = build(name, params)
    _, params, state = helpers.run(tx, params, helpers.gradients(params, 3))

    def after(params):
        updates, _ = tx.update(jax.grad(loss)(params), state, params)
        return loss(optax.apply_updates(params, updates))

    ones = jax.tree.map(jnp.ones_like, params)
    _, slope = jax.jit(functools.partial(jax.jvp, after))((params,), (ones,))
    back = jax.jit(jax.grad(after))(params)
    assert jnp.isfinite(slope) and slope != 0
    chex.assert_tree_all_finite(back)
    total = sum(jnp.sum(x) for x in jax.tree.leaves(back))
    np.testing.assert_allclose(total, slope, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["priority_prop-leaf-argsort", "prioritize-sgd-element-keep"]
)
def test_zero_gradients_differentiate(name, allocation):
    """At the minimum, where norms have no derivative: nothing moves, and no NaN."""
    del allocation
    params = jax.tree.map(jnp.ones_like, helpers.model())
    tx = build(name, params)
    state = tx.init(params)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def after(params):
        updates, new = tx.update(jax.grad(loss)(params), state, params)
        return loss(optax.apply_updates(params, updates)), (updates, new)

    (_, (updates, new)), slope = after(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    chex.assert_trees_all_equal(updates, zeros)
    chex.assert_trees_all_equal(slope, zeros)
    chex.assert_tree_all_finite(new)
    assert not any(jnp.any(s) for s in jax.tree.leaves(helpers.ours(new).scores))

"""Our transformations inside optax's wrappers, next to the same ones alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import helpers
from helpers import kinds, SUBJECTS, subjects
from priorityprop_jax import prioritize, priority_prop


STEPS = 6  # one cycle and a half
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)


@pytest.fixture
def alone(allocation):
    """``name -> (transformation, params, gradients, its updates, params, state)``."""

    def train(name):
        return _alone(name, allocation)

    return train


@functools.cache
def _alone(name, allocation):
    del allocation  # in force when this is traced, and part of the key
    params = helpers.model()
    grads = helpers.gradients(params, STEPS)
    tx = SUBJECTS[name].build(params)
    return tx, params, grads, *helpers.run(tx, params, grads)


def check_types(tx, params, state):
    assert kinds(state) == kinds(jax.eval_shape(tx.init, params))


@subjects(helpers.FEW)
def test_named_chain(name, alone):
    tx, params, grads, updates, last, expected = alone(name)
    named = optax.named_chain(("first", tx), ("second", optax.scale(0.5)))
    out, _, state = helpers.run(named, params, grads[:1])
    close(out[0], jax.tree.map(lambda u: u / 2, updates[0]))
    assert set(state) == {"first", "second"}
    found = optax.tree.get(state, "PriorityPropState")
    chex.assert_trees_all_equal(found, helpers.ours(state["first"]))
    check_types(named, params, state)


@subjects(helpers.FEW)
def test_masked_and_partition(name, alone):
    """Each group is as if the other did not exist; a group may be empty."""
    _, params, grads, *_ = alone(name)
    own = {"Dense_1": params["Dense_1"]}
    tx = SUBJECTS[name].build(params)  # with the units of all params
    own_grads = [{"Dense_1": g["Dense_1"]} for g in grads]
    expected, _, _ = helpers.run(SUBJECTS[name].build(own), own, own_grads)
    labels = {"Dense_0": "a", "Dense_1": "b"}
    empty = SUBJECTS[name].build(params)
    parts = {"a": optax.sgd(1.0), "b": tx, "nobody": empty}
    both = {
        "masked": optax.masked(tx, {"Dense_0": False, "Dense_1": True}),
        "partition": optax.partition(parts, labels),
    }
    for wrapped in both.values():
        out, _, state = helpers.run(wrapped, params, grads)
        for u, e in zip(out, expected, strict=True):
            close(u["Dense_1"], e["Dense_1"])
        check_types(wrapped, params, state)
    for u, g in zip(out, grads, strict=True):
        close(u["Dense_0"], jax.tree.map(jnp.negative, g["Dense_0"]))


@subjects(helpers.FEW)
def test_multi_steps(name, alone):
    """Every second call is a step, with the mean of two gradients."""
    tx, params, grads, updates, *_ = alone(name)
    offset = helpers.random_like(params, 77)
    doubled = [
        jax.tree.map(lambda g, d, s=sign: g + s * d, g, offset)
        for g in grads[:3]
        for sign in (1, -1)
    ]
    multi = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    out, _, state = helpers.run(multi, params, doubled)
    for i in range(3):
        close(out[2 * i], jax.tree.map(jnp.zeros_like, params))
        close(out[2 * i + 1], updates[i], rtol=1e-4, atol=1e-5)
    assert helpers.ours(state).step == 3
    check_types(multi, params, state)


@subjects(helpers.FEW)
def test_apply_if_finite(name, alone):
    tx, params, grads, updates, last, expected = alone(name)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads[0])
    wrapped = optax.apply_if_finite(tx, max_consecutive_errors=5)
    out, after, state = helpers.run(wrapped, params, [*grads[:2], bad, *grads[2:]])
    close(out.pop(2), jax.tree.map(jnp.zeros_like, params))
    close((out, after), (updates, last))
    close(state.inner_state, expected)
    check_types(wrapped, params, state)


@subjects(helpers.FEW)
def test_conditionally(name, alone):
    """Two steps as alone; then the state stays."""
    tx, params, grads, updates, *_ = alone(name)
    early = lambda step: step < 2
    wrapped = optax.conditionally_transform(tx, early)
    out, _, state = helpers.run(wrapped, params, grads[:4])
    close(out[:2], updates[:2])
    close(out[2:], grads[2:4])
    assert helpers.ours(state).step == 2
    check_types(wrapped, params, state)
    if name == helpers.FEW[0]:
        out, _, state = helpers.run(optax.conditionally_mask(tx, early), params, grads)
        close(out[:2], updates[:2])
        close(out[2], jax.tree.map(jnp.zeros_like, params))


@subjects(helpers.FEW)
def test_lookahead(name, alone):
    """Fast params as alone until they meet the slow ones."""
    tx, params, grads, updates, *_ = alone(name)
    wrapped = optax.lookahead(tx, sync_period=3, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params)
    state, update = wrapped.init(both), jax.jit(wrapped.update)
    for i in range(3):
        fast = updates[i]
        out, state = update(grads[i], state, both)
        if i < 2:
            close(out.fast, fast)
            close(out.slow, jax.tree.map(jnp.zeros_like, params))
        both = optax.apply_updates(both, out)
    total = jax.tree.map(lambda *u: sum(u), *updates[:3])
    close(both.slow, jax.tree.map(lambda p, u: p + u / 2, params, total), rtol=1e-4)
    close(both.fast, both.slow, rtol=1e-4)
    assert helpers.ours(state).step == 3
    assert kinds(state) == kinds(jax.eval_shape(wrapped.init, both))


@subjects(helpers.FEW)
def test_schedule_free(name, alone):
    """Its z moves by our updates."""
    tx, params, grads, updates, last, _ = alone(name)
    wrapped = optax.contrib.schedule_free(tx, learning_rate=0.1)
    _, after, state = helpers.run(wrapped, params, grads)
    if not SUBJECTS[name].needs_params:
        close(state.z, last, rtol=1e-4, atol=1e-5)
    chex.assert_tree_all_finite(optax.contrib.schedule_free_eval_params(state, after))
    check_types(wrapped, params, state)


@subjects(
    ["priority_prop-leaf-argsort", "prioritize-adam-element-keep"],
    [n for n in helpers.CORE if "axis" not in n and ("leaf" in n or "-keep" in n)],
)
def test_flatten(name, allocation):
    """One vector is one unit, or as many as it has elements; it always trains."""
    del allocation
    params = helpers.model()
    grads = helpers.gradients(params, 4)
    ravel = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    tx = SUBJECTS[name].build(ravel(params))
    wrapped = optax.flatten(tx)
    out, after, state = helpers.run(wrapped, params, grads)
    flat, last, expected = helpers.run(tx, ravel(params), [ravel(g) for g in grads])
    close([ravel(u) for u in out], flat)
    close((ravel(after), state), (last, expected))
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(out[0]))


MASK = {"Dense_0": True, "Dense_1": {"kernel": True, "bias": False}}
LABELS = {"Dense_0": "a", "Dense_1": {"kernel": "a", "bias": "b"}}
INSIDE = {
    "mask": lambda: optax.adamw(0.1, weight_decay=0.3, mask=MASK),
    "labels": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(1)}, LABELS
    ),
}


@pytest.mark.parametrize("units", ["leaf", "element"])
@pytest.mark.parametrize("inner", INSIDE)
def test_wrappers_inside(inner, units, allocation):
    """Masks and labels are for all params, however few `inner` is shown at once."""
    del allocation
    params, inner = helpers.model(), INSIDE[inner]()
    grads = helpers.random_like(params, 1)
    tx = prioritize(inner, **SHORT | {"max_updates": 4}, units=units)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = inner.update(grads, inner.init(params), params)
    close(updates, expected, atol=1e-6)  # in a first step nothing rests
    check_types(tx, params, state)


# Hyperparameters that are arrays


SHORT = helpers.SHORT
STATIC = ("recalc_every",)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (SHORT, "float32"),
        ({**SHORT, "budget": 6}, "float32"),
        # Numbers are injected in the dtype of the params.
        ({**SHORT, "units": "element", "depth_factor": 0.5, "seed": 3}, "bfloat16"),
    ],
)
def test_inject_hyperparams(settings, dtype, allocation):
    del allocation
    params = helpers.model(dtype)
    grads = helpers.gradients(params, 5)
    injected = optax.inject_hyperparams(priority_prop, static_args=STATIC)(**settings)
    out, _, state = helpers.run(injected, params, grads)
    expected, _, plain = helpers.run(priority_prop(**settings), params, grads)
    close(out, expected)
    close(helpers.ours(state).quotas, jax.tree.map(jnp.int32, plain.quotas))
    assert {"budget", "min_updates", "max_updates"} <= set(state.hyperparams)
    assert state.hyperparams["budget"] == settings["budget"]
    assert state.hyperparams["depth_factor"].dtype == dtype
    check_types(injected, params, state)


def test_inject_hyperparams_of_prioritize(allocation):
    """The inner transformation survives, and its state is not taken for a schedule."""
    del allocation
    params = helpers.model()
    grads = helpers.gradients(params, 5)
    injected = optax.inject_hyperparams(prioritize, static_args=(*STATIC, "inner"))
    tx = injected(optax.adam(0.01), **SHORT)
    out, _, state = helpers.run(tx, params, grads)
    expected, _, plain = helpers.run(
        prioritize(optax.adam(0.01), **SHORT), params, grads
    )
    close(out, expected)
    close(state.inner_state.inner, plain.inner)


def test_injected_budget_can_be_set_between_steps(allocation):
    params = helpers.model()
    tx = optax.inject_hyperparams(priority_prop, static_args=STATIC)(**SHORT)
    update, state = jax.jit(tx.update), tx.init(params)
    _, state = update(params, state)
    assert helpers.ours(state).budget == 6  # half of 3 units in 4 steps
    for _ in range(3):
        _, state = update(params, state)
    state.hyperparams["budget"] = jnp.asarray(0.75)
    _, state = update(params, state)
    assert helpers.ours(state).budget == 9
    if allocation == "exact":
        assert jnp.sum(helpers.ours(state).quotas) == 9


@pytest.mark.parametrize("build", [priority_prop, prioritize])
def test_inject_hyperparams_says_what_is_static(build):
    args = (optax.sgd(0.1),) if build is prioritize else ()
    injected = optax.inject_hyperparams(build)(*args, budget=0.5, recalc_every=4)
    with pytest.raises(TypeError, match=r"static_args=\('recalc_every',\)"):
        injected.init(helpers.model())


# optax.tree


@pytest.mark.parametrize("name", SUBJECTS)
def test_map_params_gives_specs_of_the_right_rank(name):
    """As shardings are built: arrays like a param get its spec, vectors none."""
    params = helpers.model()
    specs = jax.tree.map(lambda p: PartitionSpec(*"xy"[: p.ndim]), params)
    tx = SUBJECTS[name].build(params)
    state = tx.init(params)
    found = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    flat = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    assert all(len(spec) <= x.ndim for x, spec in flat)
    mine, own = helpers.ours(state), helpers.ours(found)
    for field in ("counts", "scores", "quotas"):
        by_element = isinstance(getattr(mine, field), dict)
        assert by_element == ("element" in name)
        assert getattr(own, field) == (specs if by_element else PartitionSpec())
    adam = [x for x in jax.tree.leaves(found, is_leaf=is_adam) if is_adam(x)]
    assert all(x.mu == x.nu == specs for x in adam)
    assert bool(adam) == ("adam" in name)


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize(
    "name", ["priority_prop-element-argsort", "prioritize-adam-leaf-keep"]
)
def test_shardings_from_map_params_place_the_state(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"a": jnp.ones((8, 2)), "b": jnp.ones((16,))}
    specs = {"a": PartitionSpec("x", None), "b": PartitionSpec("x")}
    place = functools.partial(NamedSharding, mesh)
    tx = SUBJECTS[name].build(params)
    shardings = optax.tree.map_params(
        tx,
        lambda _, spec: place(spec),
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda _: place(PartitionSpec()),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    for x, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    sharded = state.scores if "element" in name else state.inner[0].mu
    assert sharded["a"].sharding.shard_shape((8, 2)) == (1, 2)


@pytest.mark.parametrize("name", SUBJECTS)
def test_tree_get_and_set(name):
    params = helpers.model()
    state = SUBJECTS[name].build(params).init(params)
    mine = optax.tree.get(state, "PriorityPropState")
    assert mine is helpers.ours(state)
    for field in ("step", "counts", "scores", "quotas", "nonfinite"):
        assert optax.tree.get(state, field) is getattr(mine, field)
    changed = optax.tree.set(state, step=jnp.int32(7))
    assert optax.tree.get(changed, "step") == 7
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    if "adam" in name and "adamw" not in name:  # adamw's schedule has a count, too
        np.testing.assert_array_equal(optax.tree.get(state, "count"), 0)

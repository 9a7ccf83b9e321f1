"""``make_train_step(..., skip_nonfinite=True)``: a bad step changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from priorityprop_jax import (
    make_train_step,
    prioritize,
    priority_prop,
    PriorityPropState,
)


PARAMS = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.float32(-0.0)}
BAD = (np.nan, np.inf, -np.inf)


def loss_fn(params, x):
    return jnp.sum(params["a"] ** 2) * x + jnp.sum(params["b"] - 1.0) ** 2 * x


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def is_ours(x):
    return isinstance(x, PriorityPropState)


def find(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]


def earlier(state):
    """With the schedule one step earlier."""
    back = lambda x: x._replace(step=x.step - 1) if is_ours(x) else x
    return jax.tree.map(back, state, is_leaf=is_ours)


def everything(inner):
    """A budget for all, so that nothing but the loss decides."""
    return prioritize(inner, 1.0, min_updates=1, max_updates=1, recalc_every=1)


@pytest.fixture(scope="module")
def adam():
    tx = everything(optax.adam(0.1))
    return tx, make_train_step(loss_fn, tx, skip_nonfinite=True, donate=False)


@settings(max_examples=25, deadline=None)
@given(pattern=st.lists(st.sampled_from([1.0, 0.5, *BAD]), max_size=8))
def test_adam_sees_only_the_good_steps(adam, pattern):
    tx, step = adam
    params, state = PARAMS, tx.init(PARAMS)
    expected, expected_state = PARAMS, tx.init(PARAMS)
    for x in pattern:
        params, state, metrics = step(params, state, np.float32(x))
        assert np.isfinite(metrics.loss) == np.isfinite(x)
        if np.isfinite(x):
            expected, expected_state, _ = step(expected, expected_state, np.float32(x))
    assert bits(params) == bits(expected)
    assert bits(state.inner) == bits(expected_state.inner)
    assert find(state)[0].step == len(pattern)
    assert bits(find(state)[0].counts) == bits(find(expected_state)[0].counts)


KINDS = {
    "keep": lambda **k: prioritize(optax.adam(0.1), **k),
    "decay": lambda **k: prioritize(
        optax.adam(optax.linear_schedule(0.1, 0.0, 20)), resting="decay", **k
    ),
    "chain": lambda **k: optax.chain(priority_prop(**k), optax.adam(0.1)),
}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_step_of_a_schedule_goes_on(kind, mode):
    tx = KINDS[kind](budget=0.5, recalc_every=3, max_updates=7)
    step = make_train_step(loss_fn, tx, mode, skip_nonfinite=True, donate=False)
    state = tx.init(PARAMS)
    for i in range(5):
        params, new, _ = step(PARAMS, state, np.float32(BAD[i % 3]))
        assert bits(params) == bits(PARAMS)
        if i == 0:  # there have to be quotas
            (schedule,) = find(new)
            assert schedule.quotas.tolist() == [1, 1]
            assert schedule.counts.tolist() == [0, 0] and schedule.budget == 2
        else:
            assert bits(earlier(new)) == bits(state)
        state = new
        if i == 1:  # go on from a state that is not empty
            _, state, _ = step(PARAMS, state, np.float32(1.0))


def test_the_types_of_the_state_stay():
    noise = optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(0.1))
    tx = optax.chain(priority_prop(0.5), noise)
    step = make_train_step(loss_fn, tx, "dynamic", skip_nonfinite=True, donate=False)
    state = tx.init(PARAMS)
    kind = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))
    for x in (1.0, np.nan):
        _, new, _ = step(PARAMS, state, np.float32(x))
        assert jax.tree.map(kind, state) == jax.tree.map(kind, new)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_it_is_a_run_without_those_steps(mode, quick_compilation):
    """A reference that calls `update` eagerly, and leaves out what has to be."""
    tx = prioritize(optax.sgd(0.1), budget=0.5, recalc_every=3, max_updates=3)
    xs = [1.0, 0.5, np.nan, np.inf, 1.0, 2.0, 1.0, np.nan, 1.0, 1.0]
    step = make_train_step(loss_fn, tx, mode=mode, skip_nonfinite=True)
    params, state = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    expected, inner = PARAMS, tx.init(PARAMS)
    for x in xs:
        params, state, _ = step(params, state, jnp.float32(x))
        if np.isfinite(x):
            grads = jax.grad(loss_fn)(expected, x)
            updates, inner = tx.update(grads, inner, expected)
            expected = optax.apply_updates(expected, updates)
        else:
            inner = optax.tree.set(inner, step=optax.tree.get(inner, "step") + 1)
    assert step.mode == mode
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected
    )
    assert bits(find(state)[0].counts) == bits(find(inner)[0].counts)


def test_a_wrapper_that_holds_the_schedule_back_is_left_alone():
    """Its state says how far it is, so the schedule must not go on without it."""
    tx = optax.MultiSteps(KINDS["chain"](budget=0.5, recalc_every=3), 2)
    tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    step = make_train_step(loss_fn, tx, skip_nonfinite=True, donate=False)
    _, state, _ = step(PARAMS, tx.init(PARAMS), np.float32(1.0))
    params, new, _ = step(PARAMS, state, np.float32(np.nan))
    assert bits((params, new)) == bits((PARAMS, state))


def test_the_state_is_updated_in_place():
    """A selection for each array would have new params wait for copies of moments."""
    params = {k: jnp.ones((64, 64)) for k in "ab"}
    tx = everything(optax.adam(0.1))
    loss = lambda p, x: jnp.sum((x @ p["a"] @ p["b"]) ** 2)
    step = make_train_step(loss, tx, skip_nonfinite=True)
    arguments = params, tx.init(params), jnp.ones((4, 64))
    step(*jax.tree.map(jnp.copy, arguments))
    (program,) = step.variants.values()
    text = program.lower(*arguments).compile().as_text()
    moments = [line for line in text.splitlines() if "f32[64,64]" in line]
    assert any("conditional" in line for line in moments)
    assert not [x for x in moments if " copy(" in x and ("mu" in x or "nu" in x)]

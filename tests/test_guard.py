"""`guard`: steps with a bad loss leave no trace."""

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
from priorityprop_jax.training._guard import guard, GuardState


PARAMS = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.float32(-0.0)}
GRADS = {"a": jnp.array([0.3, -0.1, 2.0]), "b": jnp.float32(1.5)}
BAD = (jnp.nan, jnp.inf, -jnp.inf)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def adam():
    tx = guard(optax.adam(0.1))
    return tx, jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))


@settings(max_examples=25, deadline=None)
@given(pattern=st.lists(st.sampled_from([1.0, *map(float, BAD)]), max_size=8))
def test_adam_sees_only_the_good_steps(adam, pattern):
    tx, update = adam
    plain = optax.adam(0.1)
    alone = jax.jit(plain.update)
    params, state = PARAMS, tx.init(PARAMS)
    expected, inner = PARAMS, plain.init(PARAMS)
    for i, loss in enumerate(pattern):
        ok = np.isfinite(loss)
        grads = jax.tree.map(lambda g, i=i: g * (i + 1), GRADS)
        given = grads if ok else jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = update(given, state, params, loss)
        params = optax.apply_updates(params, updates)
        if ok:
            updates, inner = alone(grads, inner, expected)
            expected = optax.apply_updates(expected, updates)
    assert bits(params) == bits(expected)
    assert bits(state.inner) == bits(inner)
    assert state.skipped == sum(not np.isfinite(x) for x in pattern)


def is_ours(x):
    return isinstance(x, PriorityPropState)


def find(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]


def back(state):
    """The state inside, with the schedule one step earlier."""
    earlier = lambda x: x._replace(step=x.step - 1) if is_ours(x) else x
    return jax.tree.map(earlier, state.inner, is_leaf=is_ours)


@pytest.mark.parametrize("kind", ["told", "decay", "whole", "priority_prop"])
def test_only_the_step_of_a_schedule_goes_on(kind):
    settings = {"budget": 0.5, "recalc_every": 3, "max_updates": 7}
    if kind != "priority_prop":
        resting = "decay" if kind == "decay" else "keep"
        inner = optax.adam(optax.linear_schedule(0.1, 0.0, 20))
        tx = prioritize(inner, resting=resting, **settings)
        tx = guard(tx, rests=kind != "whole")
    else:
        tx = guard(optax.chain(priority_prop(**settings), optax.adam(0.1)))
    state = tx.init(PARAMS)
    for i in range(5):
        grads = jax.tree.map(lambda g: g * jnp.nan, GRADS)
        updates, new = tx.update(grads, state, PARAMS, value=BAD[i % 3])
        assert bits(optax.apply_updates(PARAMS, updates)) == bits(PARAMS)
        assert new.skipped == i + 1
        if i == 0:  # there have to be quotas
            (schedule,) = find(new)
            assert schedule.quotas.tolist() == [1, 1]
            assert schedule.counts.tolist() == [0, 0]
        else:
            assert bits(back(new)) == bits(state.inner)
        state = new
        if i == 1:  # go on from a state that is not empty
            _, state = tx.update(GRADS, state, PARAMS, value=1.0)


def test_the_types_of_the_state_stay():
    tx = guard(optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(0.1)))
    state = tx.init(PARAMS)
    _, new = jax.jit(tx.update)(GRADS, state, PARAMS, value=jnp.nan)
    kind = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))
    assert jax.tree.map(kind, state) == jax.tree.map(kind, new)


@pytest.mark.parametrize("rests", [True, False])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_in_a_training_step(mode, rests, quick_compilation):
    """A reference that calls `update` eagerly, and leaves out what guard leaves out."""
    tx = prioritize(optax.sgd(0.1), budget=0.5, recalc_every=3, max_updates=3)

    def loss(params, x):
        return jnp.sum(params["a"] ** 2) * x + jnp.sum(params["b"] - 1.0) ** 2 * x

    xs = [1.0, 0.5, np.nan, np.inf, 1.0, 2.0, 1.0, np.nan, 1.0, 1.0]
    step = make_train_step(loss, guard(tx, rests), mode=mode)
    params, state = jax.tree.map(jnp.copy, PARAMS), guard(tx).init(PARAMS)
    expected, inner = PARAMS, tx.init(PARAMS)
    for x in xs:
        params, state, metrics = step(params, state, jnp.float32(x))
        if np.isfinite(x):
            grads = jax.grad(loss)(expected, x)
            updates, inner = tx.update(grads, inner, expected)
            expected = optax.apply_updates(expected, updates)
        else:
            inner = optax.tree.set(inner, step=optax.tree.get(inner, "step") + 1)
        assert np.isfinite(metrics.loss) == np.isfinite(x)
    assert step.mode == mode
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected
    )
    counts = lambda s: optax.tree.get(s, "counts").tolist()
    assert counts(state.inner) == counts(inner) and state.skipped == 3


def test_what_cannot_be_meant():
    with pytest.raises(TypeError, match="must be an optax.GradientTransformation"):
        guard(lambda params: params)
    tx = guard(optax.sgd(0.1))
    with pytest.raises(TypeError, match="value"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_the_loss_reaches_the_inside():
    tx = guard(optax.contrib.reduce_on_plateau(patience=1))
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS, value=jnp.float32(2.0))
    assert isinstance(state, GuardState) and state.inner.best_value == 2.0

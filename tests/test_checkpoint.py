"""A state that was written down and read resumes the run itself, bit for bit."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import helpers
from priorityprop_jax import prioritize, priority_prop


STOP, END = 6, 11  # in the middle of the second cycle; in the third
SETTINGS = {"budget": 0.5, "max_updates": 6, "recalc_every": 4}
SCHEDULE = optax.linear_schedule(0.01, 0.001, 20)
BUILD = {
    "chain-leaf": lambda: optax.chain(
        priority_prop(**SETTINGS, score="random", seed=3), optax.adam(0.01)
    ),
    "chain-element": lambda: optax.chain(
        priority_prop(**SETTINGS, units="element"), optax.adam(0.01)
    ),
    "prioritize-leaf": lambda: prioritize(
        optax.adamw(SCHEDULE), **SETTINGS, resting="decay"
    ),
    "prioritize-element": lambda: prioritize(
        optax.adam(0.01), **SETTINGS, units="element", resting="reset"
    ),
}


def through_bytes(state, fresh, path):
    del path
    written = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(fresh, written)


def through_state_dict(state, fresh, path):
    del path
    written = flax.serialization.to_state_dict(state)
    return flax.serialization.from_state_dict(fresh, written)


def through_pickle(state, fresh, path):
    del fresh
    path.write_bytes(pickle.dumps(state))
    return pickle.loads(path.read_bytes())


def through_orbax(state, fresh, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(path, abstract)
    # Committed to a device now, for which the step would be compiled once more.
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored)


FORMATS = (through_bytes, through_state_dict, through_pickle, through_orbax)


def bits(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in leaves]


def gradient(i, params):
    """Depends on the params, so that what once differs stays different."""
    noise = helpers.random_like(params, i)
    return jax.tree.map(lambda p, n: p + n, params, noise)


def train(step, params, state, steps):
    for i in steps:
        params, state = step(params, state, gradient(i, params))
    return params, state


@functools.cache
def uninterrupted(name):
    """The step, what was reached at the stop, and at the end."""
    tx = BUILD[name]()

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = helpers.model()
    stopped = train(step, params, tx.init(params), range(STOP))
    return step, stopped, train(step, *stopped, range(STOP, END))


@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("name", BUILD)
def test_resumed_run_equals_the_uninterrupted_one(name, through, tmp_path):
    step, (params, state), end = uninterrupted(name)
    fresh = BUILD[name]().init(params)
    restored = through(state, fresh, tmp_path / "state")
    assert bits(restored) == bits(state)
    assert bits(restored) != bits(fresh)
    assert bits(train(step, params, restored, range(STOP, END))) == bits(end)


@pytest.mark.parametrize("name", BUILD)
def test_what_is_saved_matters(name):
    """From a fresh state, or the middle of another cycle, the run ends elsewhere."""
    step, (params, state), end = uninterrupted(name)
    fresh = BUILD[name]().init(params)
    assert bits(train(step, params, fresh, range(STOP, END))) != bits(end)
    forgotten = optax.tree.set(state, quotas=helpers.ours(fresh).quotas)
    assert bits(train(step, params, forgotten, range(STOP, END))) != bits(end)


@pytest.mark.parametrize("name", ["chain-leaf", "prioritize-element"])
def test_state_dict_is_plain(name):
    """Nothing but dictionaries with names and arrays: readable without this package."""
    params = helpers.model()
    written = flax.serialization.to_state_dict(BUILD[name]().init(params))
    nodes = [written]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            nodes.extend(node.values())
        else:
            assert isinstance(node, jax.Array) and node.dtype != jnp.object_

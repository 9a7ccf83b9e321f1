"""An optimizer taken apart does to each leaf what it does to that leaf alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from priorityprop_jax import _leafwise, prioritize


SCHEDULE = optax.linear_schedule(0.1, 0.01, 5)
TOGETHER = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw, masked decay": optax.adamw(
        0.1, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "adam, bf16 momentum": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(0.1),
    "schedule": optax.chain(optax.trace(0.9), optax.scale_by_schedule(SCHEDULE)),
    "nothing": optax.set_to_zero(),
}
ALONE = {
    "clip by global norm": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "every second": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}
PARAMS = {
    "a": jnp.linspace(-1, 1, 12).reshape(3, 4),
    "b": {"bias": jnp.ones(4), "scalar": jnp.float32(0.5)},
}
GRADS = jax.tree.map(lambda p: 0.3 * p + 0.1, PARAMS)


def taken_apart(inner, steps=2):
    """The parts of `inner` after some steps of all leaves, in lockstep."""
    inner = optax.with_extra_args_support(inner)
    state = _leafwise.init_inner(inner, PARAMS)
    for _ in range(steps):
        _, state = _leafwise.update_together(inner, GRADS, state, PARAMS, {})
    return _leafwise.leafwise(inner, GRADS, state, PARAMS, {})


def by_leaf(parts):
    """The update and the state of each leaf, from its part."""
    for i, (g, p) in enumerate(
        zip(*map(jax.tree.leaves, (GRADS, PARAMS)), strict=True)
    ):
        _, factors = parts.advance([x[i] for x in parts.shared])
        yield i, g, p, factors, parts.update(i, g, parts.own[i], factors, p)


@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_each_leaf_gets_the_update_it_gets_alone(name):
    inner = (TOGETHER | ALONE)[name]
    parts = taken_apart(inner)
    # What muon does to a leaf depends on its path, so all leaves keep their places.
    keep = lambda i, tree: jax.tree.unflatten(
        jax.tree.structure(tree),
        [
            x if i == j else optax.MaskedNode()
            for j, x in enumerate(jax.tree.leaves(tree))
        ],
    )
    for i, _, _, _, (update, _) in by_leaf(parts):
        grads, params = keep(i, GRADS), keep(i, PARAMS)
        state = inner.init(params)
        for _ in range(3):
            expected, state = inner.update(grads, state, params)
        np.testing.assert_allclose(
            update, jax.tree.leaves(expected)[0], rtol=1e-5, atol=3e-6
        )


@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_one_trace_serves_optimizers_that_do_not_couple_leaves(name, monkeypatch):
    by_masks = []
    monkeypatch.setattr(_leafwise, "_by_masks", by_masks.append)
    taken_apart((TOGETHER | ALONE)[name])
    assert bool(by_masks) == (name in ALONE)


@pytest.mark.parametrize("name", TOGETHER)
def test_an_update_from_the_state_after_it_is_the_same(name):
    parts = taken_apart(TOGETHER[name])
    for i, g, p, factors, (update, own) in by_leaf(parts):
        late = parts.late_update(i)
        if late is not None:
            np.testing.assert_allclose(late(g, own, factors, p), update, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("adam", True),
        ("rmsprop", True),
        ("lion", False),
        ("adam, bf16 momentum", False),
    ],
)
def test_which_updates_can_be_computed_from_the_state_after_them(name, late):
    """Not lion's, which mixes the gradient with the old momentum in another way."""
    parts = taken_apart(TOGETHER[name])
    assert all((parts.late_update(i) is not None) == late for i in range(3))


def test_orthogonalisation_is_no_work_for_a_leaf_that_rests():
    assert taken_apart(TOGETHER["muon"]).late_update(0) is None


def test_tracing_takes_one_call_of_the_optimizer():
    calls = []
    adam = optax.adam(0.1)

    def update(updates, state, params=None):
        calls.append(len(jax.tree.leaves(updates)))
        return adam.update(updates, state, params)

    tx = prioritize(optax.GradientTransformation(adam.init, update), 0.5)
    params = {str(i): jnp.ones(3) for i in range(20)}
    state = tx.init(params)
    jax.make_jaxpr(tx.update)(params, state, params)
    assert calls == [20]

"""Presets: who rests when, equality with training written by hand, and the guard."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from priorityprop_jax import (
    active,
    backward_costs,
    make_train_step,
    PriorityPropTrainer,
    value_and_grad,
)
from priorityprop_jax.presets._from_scratch import (
    from_scratch as presets_from_scratch,
    layers_of,
    NEVER,
    resting_from,
    saving_of,
)
from priorityprop_jax.report import priority_report


pytestmark = pytest.mark.usefixtures("quick_compilation")

from_scratch = functools.partial(presets_from_scratch, epochs=10)
OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}


def mlp(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "b": jnp.zeros(n, jnp.float32),
            "w": jnp.asarray(rng.normal(size=(m, n)) / m**0.5, jnp.float32),
        }
        for i, (m, n) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


def apply(params, x):
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = (x if i == 0 else jnp.tanh(x)) @ layer["w"] + layer["b"][None]
    return x


def loss(params, x):
    return jnp.mean((apply(params, x) - 1.0) ** 2)


def batches(n, size=16, width=8):
    return np.random.default_rng(1).normal(size=(n, size, width)).astype(np.float32)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def deep():
    """Params of four layers, and their costs."""
    params = mlp([8, 16, 16, 16, 4])
    return params, backward_costs(loss, params, jnp.ones((16, 8)))


def by_hand(name, rates, ends, params, data):
    """Each leaf has a rate of its own, and is left alone from its end on. In NumPy."""
    leaves, treedef = jax.tree.flatten(params)
    grad = jax.jit(jax.grad(lambda leaves, x: loss(treedef.unflatten(leaves), x)))
    values = [np.asarray(p, np.float64) for p in leaves]
    first, second = ([np.zeros_like(p) for p in values] for _ in range(2))
    for t, x in enumerate(data):
        grads = grad([jnp.asarray(p, jnp.float32) for p in values], x)
        for i, g in enumerate(np.asarray(g, np.float64) for g in grads):
            if t >= ends[i]:
                continue
            if name in ("sgd", "momentum"):
                first[i] = (0.9 if name == "momentum" else 0.0) * first[i] + g
                step = first[i]
            else:
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g**2
                mean, square = (
                    m / (1 - b ** (t + 1))
                    for m, b in ((first[i], 0.9), (second[i], 0.999))
                )
                step = mean / (np.sqrt(square) + 1e-8)
                step = step + (0.1 * values[i] if name == "adamw" else 0.0)
            values[i] = values[i] - rates[i](t) * step
    return values


def train(tx, params, data, mode):
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    if mode == "scan":

        def body(carry, x):
            params, state = carry
            due = active(state, params)
            _, grads = value_and_grad(loss)(params, x, active=due)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(body, (params, state), jnp.asarray(data))[0]
    step = make_train_step(loss, tx, mode=mode)
    for x in data:
        params, state, _ = step(params, state, x)
    return params, state


@pytest.mark.parametrize(
    "name, mode",
    [
        ("adam", "static"),
        ("adamw", "static"),
        ("momentum", "dynamic"),
        ("adam", "scan"),
    ],
)
def test_equals_training_by_hand(deep, name, mode):
    params, costs = deep
    preset = from_scratch(
        OPTIMIZERS[name], 0.02, 40, costs, start=0.4, cycle=4, boost=1.5
    )
    ends = [40 if end is None else end for end in preset.until.values()]
    # From 0.4 to 1 in three steps: 16, 24, 32 of 40, and both leaves of a layer alike.
    assert ends == [16, 16, 24, 24, 32, 32, 40, 40]
    data = batches(40)
    rates = [lambda t, e=e: (0.03 if e < 40 else 0.02) * (1 - t / e) for e in ends]
    expected = by_hand(name, rates, ends, params, data)
    found, _ = train(preset.tx, params, data, mode)
    for a, b in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_schedule_is_run_through_faster(deep):
    params, costs = deep
    cosine: Any = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 40)
    preset = from_scratch(optax.sgd, cosine, 40, costs, start=0.5, cycle=5)
    ends = list(preset.until.values())
    assert ends[0] == 20 and ends[-1] is None
    data = batches(40)
    until = [end or 40 for end in ends]
    rates = [lambda t, end=end: float(cosine(t * 40 / end)) for end in until]
    expected = by_hand("sgd", rates, until, params, data)
    found, _ = train(preset.tx, params, data, "static")
    for a, b in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_who_is_due_when(deep):
    params, costs = deep
    preset = from_scratch(optax.adam, 0.02, 50, costs, start=0.5, cycle=5)
    ends = np.array([NEVER if e is None else e for e in preset.until.values()])
    assert sorted(set(ends)) == [25, 35, 40, NEVER]  # 33.3 and 41.7, to whole cycles
    step = make_train_step(loss, preset.tx, mode="static")
    params = jax.tree.map(jnp.copy, params)
    state: Any = preset.tx.init(params)
    for t, x in enumerate(batches(50)):
        before = jax.tree.map(np.asarray, params)
        due = np.array(jax.tree.leaves(active(state, params)))
        np.testing.assert_array_equal(due, (t < ends) | (t % 5 == 0))
        params, state, metrics = step(params, state, x)
        np.testing.assert_array_equal(metrics.due, due)
        moved = [a != b for a, b in zip(bits(before), bits(params), strict=True)]
        np.testing.assert_array_equal(moved, t < ends)
    assert step.mode == "static"
    np.testing.assert_array_equal(state.priority.counts, np.minimum(ends, 50))


def test_predicts_what_is_counted(deep):
    params, costs = deep
    preset = from_scratch(optax.adam, 0.02, 47, costs, start=0.5, cycle=5)
    step = make_train_step(loss, preset.tx, mode="static")
    params = jax.tree.map(jnp.copy, params)
    state = preset.tx.init(params)
    for x in batches(47):
        params, state, _ = step(params, state, x)
    report = priority_report(state, params, costs=costs, account=step.account)
    assert report.savings is not None
    assert 1 - report.savings.spent / report.savings.full == pytest.approx(
        preset.saving
    )
    assert preset.saving > 0.05
    assert f"saves {preset.saving:.1%} of all FLOPs" in preset.reason
    # The compiler's own count of each program, optimizer included, never is higher
    # than that of a plain step but by the bookkeeping.
    adam = optax.adam(optax.linear_schedule(0.02, 0.0, 47))

    @jax.jit
    def plain(params, state, x):
        updates, state = adam.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    count = lambda f, *a: f.lower(*a).compile().cost_analysis()["flops"]
    most = count(plain, params, adam.init(params), x)
    counted = {
        v: count(program, params, state, x) for v, program in step.variants.items()
    }
    for variant, flops in counted.items():
        resting = not all(variant.mask.leaves)
        assert flops < most if resting else flops < 1.1 * most
    assert sum(not all(v.mask.leaves) for v in counted) == 3


@pytest.mark.parametrize("sizes", [[1, 64, 2], [4, 4], [2, 300, 300, 1]])
def test_guard_falls_back_to_the_optimizer_alone(sizes):
    params, data = mlp(sizes), batches(20, width=sizes[0])
    costs = backward_costs(loss, params, data[0])
    preset = from_scratch(optax.adam, 0.02, 20, costs, start=0.9, cycle=1)
    assert preset.reason.startswith("full training") and preset.saving == 0.0
    assert set(preset.until.values()) == {None}
    step = make_train_step(loss, preset.tx, mode="static")
    found, state = jax.tree.map(jnp.copy, params), preset.tx.init(params)
    plain = optax.adam(optax.linear_schedule(0.02, 0.0, 20))

    @jax.jit
    def by_optax(params, state, x):
        updates, state = plain.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    inner = plain.init(params)
    for x in data:
        found, state, metrics = step(found, state, x)
        params, inner = by_optax(params, inner, x)
        assert metrics.due.all()
    assert len(step.variants) == 1
    for a, b in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    report = priority_report(state, found, costs=costs, account=step.account)
    assert report.savings is not None
    assert report.savings.spent == report.savings.full == 20 * costs.full
    assert report.updates == 20 * len(costs.paths)


def test_guard_draws_the_line_where_it_is_told(deep):
    _, costs = deep
    make = functools.partial(from_scratch, optax.adam, 0.02, 100, costs)
    saving = make(least_saving=0.0).saving
    assert make(least_saving=saving).saving == saving
    assert make(least_saving=saving + 1e-9).saving == 0.0
    assert "less than" in make(least_saving=saving + 1e-9).reason
    assert make(start=1.0, least_saving=0.0).reason == (
        "full training: no layer can rest"
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 100, 1001])
@pytest.mark.parametrize("cycle", [1, 3, 20])
@pytest.mark.parametrize("start", [0.01, 0.6])
def test_saving_by_brute_force(deep, steps, cycle, start):
    _, costs = deep
    preset = from_scratch(
        optax.adam, 1.0, steps, costs, start=start, cycle=cycle, least_saving=0.0
    )
    ends = np.array([NEVER if e is None else e for e in preset.until.values()])
    spent = sum(
        costs.full if t % cycle == 0 else costs.flops(t < ends) for t in range(steps)
    )
    assert preset.saving == pytest.approx(1 - spent / (steps * costs.full), abs=1e-12)
    assert preset.saving >= 0.0
    assert saving_of(costs, ends, steps, cycle) == pytest.approx(preset.saving)
    resting = ends[ends < NEVER]
    assert (resting % cycle == 0).all() and (resting < steps).all()
    assert (resting > 0).all() and ends[-1] == NEVER


def test_guard_leaves_short_runs_alone(deep):
    _, costs = deep
    make = functools.partial(from_scratch, optax.adam, 0.02, 100, costs)
    assert make(epochs=9.9).reason.startswith(
        "full training: 9.9 epochs are fewer than 10, and in short runs"
    )
    assert make(epochs=9.9).saving == 0.0 < make(epochs=10).saving
    assert make(epochs=0.5, least_epochs=0).saving == make(epochs=math.inf).saving


def test_layers_are_told_by_their_chains():
    params = [{"b1": jnp.ones(32), "w1": jnp.ones((16, 32))}, jnp.ones((32, 32))]
    params += [jnp.ones((32, 8)), jnp.ones(())]

    def flat(params, x):
        first, second, third, scale = params
        x = jnp.tanh(x @ first["w1"] + first["b1"][None])
        return jnp.mean((jnp.tanh(x @ second) @ third) ** 2 * scale)

    costs = backward_costs(flat, params, jnp.ones((64, 16)))
    assert layers_of(costs).tolist() == [0, 0, 1, 2, 2]


def test_resumes_in_the_middle(deep):
    params, costs = deep
    data = batches(30)
    make = lambda: from_scratch(optax.adam, 0.02, 30, costs, start=0.5, cycle=3).tx
    whole, _ = train(make(), params, data, "static")
    # In the middle of a cycle, with a layer at rest.
    tx, at = make(), 16
    step, found = make_train_step(loss, tx), jax.tree.map(jnp.copy, params)
    state = tx.init(found)
    for x in data[:at]:
        found, state, _ = step(found, state, x)
    assert not all(jax.tree.leaves(active(state, found)))
    leaves, treedef = jax.tree.flatten(jax.device_get((found, state)))
    tx = make()
    kind = jax.tree.structure((found, tx.init(found)))
    assert treedef == kind
    found, state = kind.unflatten(map(jnp.asarray, leaves))
    step = make_train_step(loss, tx)
    for x in data[at:]:
        found, state, _ = step(found, state, x)
    assert bits(found) == bits(whole)


def test_one_program_serves_all_steps_in_dynamic_mode(deep):
    params, costs = deep
    tx = from_scratch(optax.adam, 0.02, 20, costs, start=0.5, cycle=2).tx
    traces = []

    @jax.jit
    def step(params, state, x):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x in batches(20):
        params, state = step(params, state, x)
    assert len(traces) == 1


def test_in_the_trainer(deep):
    params, costs = deep
    preset = from_scratch(optax.adam, 0.02, 40, costs, start=0.5, cycle=4)
    data = batches(40)
    labels = np.ones((16, 4), np.float32)
    error = lambda outputs, labels: ((outputs - labels) ** 2).mean(-1)
    trainer = PriorityPropTrainer((params, apply), preset.tx, error, progress=False)
    history = trainer.train([(x, labels) for x in data])
    expected, _ = train(preset.tx, params, data, "static")
    for a, b in zip(*map(jax.tree.leaves, (trainer.params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    counts = [40 if end is None else end for end in preset.until.values()]
    assert history["updates"][-1] == counts
    spent = history["flops_spent"][-1] / history["flops_full"][-1]
    assert spent == pytest.approx(1 - preset.saving, abs=0.02)


def test_a_bf16_leaf_stays_one(deep):
    params, _ = deep
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = batches(1)[0].astype(jnp.bfloat16)
    costs = backward_costs(loss, params, x)
    tx = from_scratch(optax.adam, 0.02, 20, costs, cycle=1).tx
    state = tx.init(params)
    update = lambda p, s: tx.update(jax.grad(loss)(p, x), s, p)
    updates, new = jax.eval_shape(update, params, state)
    kinds = lambda tree: [(a.dtype, a.shape) for a in jax.tree.leaves(tree)]
    assert kinds(updates) == kinds(params) and kinds(new) == kinds(state)


def test_a_resting_leaf_is_not_seen_by_what_couples_leaves():
    params = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
    costs = backward_costs(lambda p: p["a"] * p["b"], params)
    tx = resting_from(optax.clip_by_global_norm(1.0), np.array([1, NEVER]), 1, costs)
    state, grads = tx.init(params), {"a": jnp.float32(3.0), "b": jnp.float32(4.0)}
    update = jax.jit(lambda state: tx.update(grads, state))
    updates, state = update(state)
    assert (updates["a"], updates["b"]) == pytest.approx((0.6, 0.8))
    updates, state = update(state)
    assert (updates["a"], updates["b"]) == pytest.approx((0.0, 1.0))


def test_costs_must_be_those_of_the_params(deep):
    _, costs = deep
    tx = from_scratch(optax.adam, 0.02, 40, costs).tx
    with pytest.raises(ValueError, match="costs must be those of the params"):
        tx.init(mlp([8, 16, 4]))


BAD = [
    ({"optimizer": optax.adam(1e-3)}, TypeError, "function of a learning rate"),
    ({"optimizer": "adam"}, TypeError, "function of a learning rate"),
    ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive, got 0.0"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite"),
    ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
    ({"steps": 0}, ValueError, "steps must be in"),
    ({"steps": 10.0}, TypeError, "steps must be an integer"),
    ({"costs": None}, TypeError, "costs must be what backward_costs"),
    ({"start": 0.0}, ValueError, r"start must be in \(0, 1\], got 0.0"),
    ({"start": 1.5}, ValueError, r"start must be in \(0, 1\], got 1.5"),
    ({"start": None}, TypeError, "start must be a number, got None"),
    ({"boost": -1.0}, ValueError, "boost must be in"),
    ({"epochs": 0}, ValueError, "epochs must be positive, got 0"),
    ({"epochs": math.nan}, ValueError, "epochs must be positive, got nan"),
    ({"epochs": "all"}, TypeError, "epochs must be a number, got 'all'"),
    ({"least_epochs": -1}, ValueError, "least_epochs must be in"),
    ({"cycle": 0}, ValueError, "cycle must be in"),
    ({"least_saving": 1.0}, ValueError, r"least_saving must be in \[0, 1\)"),
]


@pytest.mark.parametrize("change, error, match", BAD)
def test_bad_input(deep, change, error, match):
    _, costs = deep
    good = dict(optimizer=optax.adam, learning_rate=0.1, steps=100, costs=costs)
    with pytest.raises(error, match=match):
        from_scratch(**{**good, **change})

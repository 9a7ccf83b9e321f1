"""`row_sparse`: rows that a batch touches, against an optimizer for each row alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import Score
from priorityprop_jax._row_sparse import row_sparse
from priorityprop_jax._rows import put_rows, take_rows, touched_rows


pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, WIDTH, STEPS = 9, 3, 8
INNERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: optax.adam(rate),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.3),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.3),
    "adagrad": lambda rate: optax.adagrad(rate),
    "rmsprop": lambda rate: optax.rmsprop(rate, momentum=0.5, centered=True),
}
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
# Some rows often, some rarely; repeated ids in most batches.
IDS = np.minimum(RNG.geometric(0.3, size=(STEPS, 5)) - 1, ROWS - 1).astype(np.int32)
TARGETS = RNG.normal(size=(STEPS, 5, WIDTH)).astype(np.float32)


def loss(table, ids, target):
    """Each id pulls its row to the target: repeated ids have gradients to sum."""
    return 0.5 * jnp.sum((table[ids] - target) ** 2)


def make_step(tx, **kwargs):
    @jax.jit
    def step(table, state, ids, target):
        rows = touched_rows(ids, table.shape[0], **kwargs)
        block = take_rows(table, rows)
        grads = jax.grad(loss)(block, rows.inverse, target)
        updates, state = tx.update(grads, state, block, rows=rows)
        return put_rows(table, rows, optax.apply_updates(block, updates)), state

    return step


def train(tx, **kwargs):
    """(tables, states), one for each step."""
    table, step = jnp.asarray(TABLE), make_step(tx, **kwargs)
    state, history = tx.init(table), []
    for ids, target in zip(IDS, TARGETS, strict=True):
        table, state = step(table, state, ids, target)
        history.append((table, state))
    return history


def chosen_rows(gradients, counts, budget):
    """By the rule alone, in float64: the best |g| / (1 + count), then the lower row."""
    order = sorted(
        gradients, key=lambda r: (-np.linalg.norm(gradients[r]) / (1 + counts[r]), r)
    )
    if budget is None:
        return order
    return order[: budget if isinstance(budget, int) else -(-len(order) // 2)]


@functools.cache
def alone(name):
    """One update of one row; the rate of this step is an argument."""
    return jax.jit(lambda rate, g, s, p: INNERS[name](rate).update(g, s, p))


def by_hand(name, rate, budget):
    """Each row with an optimizer of its own, in a Python loop."""
    table, counts = TABLE.copy(), [0] * ROWS
    states = [INNERS[name](0.1).init(jnp.asarray(row)) for row in table]
    history = []
    for step, (ids, target) in enumerate(zip(IDS, TARGETS, strict=True)):
        gradients = {}
        for i, t in zip(ids, target, strict=True):
            gradients[i] = gradients.get(i, 0.0) + (table[i].astype(float) - t)
        for i in chosen_rows(gradients, counts, budget):
            g = jnp.asarray(gradients[i], jnp.float32)
            update, states[i] = alone(name)(rate(step), g, states[i], table[i])
            table[i] += np.asarray(update)
            counts[i] += 1
        history.append((table.copy(), list(counts)))
    return history


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, 2) for name in INNERS), ("sgd", None), ("adamw", 0.5)]
)
def test_each_row_has_an_optimizer_of_its_own(name, budget):
    got = train(row_sparse(INNERS[name](0.1), budget))
    want = by_hand(name, lambda step: 0.1, budget)
    for (table, state), (expected, counts) in zip(got, want, strict=True):
        np.testing.assert_allclose(table, expected, rtol=2e-5, atol=2e-6)
        assert state.counts.tolist() == counts
    assert max(counts) > min(counts)


@pytest.mark.parametrize("kind", ["schedule", "injected"])
def test_learning_rates_follow_the_step(kind):
    rate = lambda step: 0.2 * 0.5**step
    make = optax.inject_hyperparams(optax.adam) if kind == "injected" else optax.adam
    got = train(row_sparse(make(rate), budget=2))
    for (table, _), (expected, _) in zip(got, by_hand("adam", rate, 2), strict=True):
        np.testing.assert_allclose(table, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop"])
def test_is_the_dense_optimizer_where_all_rows_are_touched(name):
    inner = INNERS[name](0.1)
    tx, ids = row_sparse(inner), np.array([*range(ROWS), 3, 3, 0])
    table = dense = jnp.asarray(TABLE)
    state, dense_state = tx.init(table), inner.init(table)
    step = make_step(tx)

    @jax.jit
    def dense_step(table, state, ids, target):
        grads = jax.grad(loss)(table, ids, target)
        updates, state = inner.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    for target in np.random.default_rng(3).normal(size=(4, len(ids), WIDTH)):
        target = target.astype(np.float32)
        table, state = step(table, state, ids, target)
        dense, dense_state = dense_step(dense, dense_state, ids, target)
        np.testing.assert_allclose(table, dense, rtol=2e-6, atol=1e-6)


def test_what_rests_does_not_change_by_a_bit():
    tx = row_sparse(optax.adamw(0.1, weight_decay=0.3), budget=2)
    history = train(tx)
    seen = 0
    for i in range(1, STEPS):
        (old, old_state), (new, new_state) = history[i - 1 : i + 1]
        rests = np.asarray(old_state.counts == new_state.counts)
        seen += sum(rests[r] for r in set(IDS[i].tolist()))  # touched, yet resting
        for a, b in zip(
            jax.tree.leaves((old, old_state.inner)),
            jax.tree.leaves((new, new_state.inner)),
            strict=True,
        ):
            np.testing.assert_array_equal(np.asarray(a)[rests], np.asarray(b)[rests])
    assert seen


def test_updates_of_what_rests_are_negative_zeros():
    rows = touched_rows(jnp.array([1, 2, 2]), ROWS)
    grads = jnp.array([[1.0], [2.0], [5.0]])  # the third place has no row
    for budget, resting in ((1, [0, 2]), (None, [2])):
        tx = row_sparse(optax.sgd(0.1), budget)
        state = tx.init(jnp.ones((ROWS, 1)))
        updates, _ = jax.jit(tx.update)(grads, state, rows=rows)
        found = np.flatnonzero(np.signbit(updates) & (np.asarray(updates) == 0))
        assert found.tolist() == resting


def test_a_row_first_seen_late_steps_by_the_learning_rate():
    late, table = 400, jnp.zeros((2, 1))
    tx = row_sparse(optax.adam(0.01))
    state = tx.init(table)
    for row in (0,) * late, (1,):
        rows = touched_rows(jnp.array(row[:1]), 2)
        update = jax.jit(functools.partial(tx.update, rows=rows))
        for _ in row:
            updates, state = update(jnp.ones((1, 1)), state)
    assert float(updates[0, 0]) == pytest.approx(-0.01, rel=1e-4)
    # What the bias correction by the global step makes of the same gradient.
    mu, nu = 0.1 / (1 - 0.9**late), 0.001 / (1 - 0.999**late)
    assert mu / nu**0.5 > 1.8
    assert 0.1 / 0.001**0.5 == pytest.approx(3.2, rel=0.02)  # in the end


@pytest.mark.parametrize(
    ("budget", "updated"), [(None, 4), (1, 1), (3, 3), (99, 4), (0.5, 2), (0.3, 2)]
)
def test_how_many_rows_are_updated(budget, updated):
    tx = row_sparse(optax.sgd(1.0), budget)
    rows = touched_rows(jnp.array([1, 2, 2, 5, 5, 5, 8]), ROWS)
    grads = jnp.arange(7.0)[:, None] + 1
    _, state = jax.jit(tx.update)(grads, tx.init(jnp.ones((ROWS, 1))), rows=rows)
    assert int(state.counts.sum()) == updated
    best = [8, 5, 2, 1][:updated]
    assert sorted(np.flatnonzero(state.counts)) == sorted(best)


@pytest.mark.parametrize("budget", [0.1, 0.07])
def test_a_share_is_not_rounded_up_for_its_rounding_error(budget):
    tx = row_sparse(optax.sgd(1.0), budget)
    rows = touched_rows(jnp.arange(100), 100)
    ones = jnp.ones((100, 1))
    _, state = jax.jit(tx.update)(ones, tx.init(ones), rows=rows)
    assert int(state.counts.sum()) == round(100 * budget)


def test_gradients_that_are_not_finite():
    rows = touched_rows(jnp.array([1, 2, 3]), ROWS)
    grads = jnp.array([[jnp.nan], [1.0], [jnp.inf]])
    for budget, updated in ((3, [2]), (None, [1, 2, 3])):  # plain optax asks nothing
        tx = row_sparse(optax.sgd(1.0), budget)
        _, state = jax.jit(tx.update)(grads, tx.init(jnp.ones((ROWS, 1))), rows=rows)
        assert np.flatnonzero(state.counts).tolist() == updated


def test_tables_share_the_budget():
    tables = {"a": jnp.ones((5, 2)), "b": jnp.ones(4), "c": jnp.ones((3, 1))}
    rows = {
        "a": touched_rows(jnp.array([4, 1, 1]), 5),
        "b": touched_rows(jnp.array([0, 3]), 4),
        "c": touched_rows(jnp.array([2]), 3),
    }
    grads = {
        "a": jnp.array([[0.0, 2.0], [6.0, 8.0], [99.0, 99.0]]),  # the last has no row
        "b": jnp.array([9.0, 3.0]),
        "c": jnp.array([[5.0]]),
    }
    counts = {}
    for budget in (1, 3, 5):
        tx = row_sparse(optax.sgd(1.0), budget)

        @jax.jit
        def once(tables, rows, grads, tx=tx):
            updates, state = tx.update(grads, tx.init(tables), rows=rows)
            block = optax.apply_updates(take_rows(tables, rows), updates)
            return put_rows(tables, rows, block), state

        put, state = once(tables, rows, grads)
        counts[budget] = [np.flatnonzero(c).tolist() for c in state.counts.values()]
        for name, moved in zip("abc", counts[budget], strict=True):
            changed = np.any(np.atleast_2d(put[name].T != tables[name].T), axis=0)
            assert np.flatnonzero(changed).tolist() == moved
    assert counts == {
        1: [[4], [], []],
        3: [[4], [0], [2]],
        5: [[1, 4], [0, 3], [2]],
    }


def test_magnitudes_and_scores():
    rows = touched_rows(jnp.array([1, 4, 7]), ROWS)
    grads = jnp.array([[3.0, 3.0], [0.0, 4.0], [2.0, 2.0]])

    def order(*steps, **kwargs):
        tx = row_sparse(optax.sgd(1.0), 1, **kwargs)
        state, out = tx.init(jnp.ones((ROWS, 2))), []
        update = jax.jit(functools.partial(tx.update, grads, rows=rows))
        for _ in range(*steps):
            before = state.counts
            _, state = update(state)
            out.append(int(jnp.argmax(state.counts - before)))
        return out

    assert order(4) == [1, 4, 7, 1]  # 4.24, 4, 2.83, then 4.24 / 2
    assert order(4, magnitude="max") == [4, 1, 4, 7]  # 4, 3, 4 / 2, 2
    assert order(4, score="gradient") == [1, 1, 1, 1]
    latest = Score(lambda m: (), lambda x, s: (x.index.astype(jnp.float32), s))
    assert order(2, score=latest) == [7, 7]
    drawn = order(20, score="random")
    assert set(drawn) == {1, 4, 7} and drawn == order(20, score="random")
    assert drawn != order(20, score="random", seed=1)


def test_inside_of_scan_with_one_trace():
    tx, traces = row_sparse(optax.adam(0.1), budget=2), []
    want, _ = train(tx)[-1]
    step = make_step(tx).__wrapped__

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(table, state):
        traces.append(1)
        return jax.lax.scan(
            lambda carry, batch: (step(*carry, *batch), None),
            (table, state),
            (jnp.asarray(IDS), jnp.asarray(TARGETS)),
        )[0]

    for _ in range(2):
        table, _ = run(jnp.array(TABLE), tx.init(jnp.array(TABLE)))
        np.testing.assert_allclose(table, want, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_one_compilation_over_steps():
    tx = row_sparse(optax.adam(optax.linear_schedule(0.1, 0.0, STEPS)), 0.5)
    step = make_step(tx)
    table, state = jnp.array(TABLE), tx.init(jnp.array(TABLE))
    for ids, target in zip(IDS, TARGETS, strict=True):
        table, state = step(table, state, ids, target)
    assert step._cache_size() == 1


def test_dtypes_stay(x64):
    budget = 0.5 if x64 else 2
    table = jnp.asarray(TABLE, jnp.bfloat16)
    tx = row_sparse(optax.adam(0.1, mu_dtype=jnp.float32), budget)
    state = tx.init(table)
    new, after = make_step(tx)(table, state, IDS[0], TARGETS[0].astype(jnp.bfloat16))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert kinds((new, after)) == kinds((table, state))
    moved = np.any(np.asarray(new != table), axis=1)
    assert np.flatnonzero(moved).tolist() == np.flatnonzero(after.counts).tolist()


def test_too_many_rows_are_seen():
    tx = row_sparse(optax.adam(0.1))
    table, target = jnp.asarray(TABLE), jnp.ones((5, WIDTH))
    ids = jnp.arange(5)
    fits = make_step(tx, capacity=5)(table, tx.init(table), ids, target)
    assert np.isfinite(fits[0]).all()
    rows = touched_rows(ids, ROWS, capacity=4)
    assert rows.missed == 2 and rows.distinct == 5
    assert np.isnan(loss(take_rows(table, rows), rows.inverse, target))


def test_an_empty_batch_moves_nothing_but_the_step():
    tx = row_sparse(optax.adam(optax.linear_schedule(0.1, 0.0, STEPS)), budget=2)
    table = jnp.asarray(TABLE)
    state = tx.init(table)
    empty = jnp.zeros((0,), jnp.int32), jnp.zeros((0, WIDTH))
    new, after = make_step(tx)(table, state, *empty)
    np.testing.assert_array_equal(new, table)
    assert after.step == 1 and after.inner[1].count == 1
    for a, b in zip(state.inner[0], after.inner[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_next_to_other_optimizers():
    """In `optax.partition`, behind a clip by the norm of all gradients."""
    params = {"embed": jnp.asarray(TABLE), "out": jnp.ones((WIDTH,))}
    parts = {"rows": row_sparse(optax.sgd(1.0)), "dense": optax.sgd(1.0)}
    labels = {"embed": "rows", "out": "dense"}
    clip = optax.clip_by_global_norm(0.1)
    tx = optax.chain(clip, optax.partition(parts, labels))
    ids = jnp.array([3, 1, 3])
    model = lambda p, ids: jnp.sum(jnp.sin(p["embed"][ids] @ p["out"]))

    state = tx.init(params)
    rows = touched_rows(ids, ROWS)
    block = params | {"embed": take_rows(params["embed"], rows)}
    grads = jax.grad(model)(block, rows.inverse)
    updates, state = tx.update(grads, state, block, rows=rows)
    block = optax.apply_updates(block, updates)
    new = block | {"embed": put_rows(params["embed"], rows, block["embed"])}

    dense = optax.chain(clip, optax.sgd(1.0))
    grads = jax.grad(model)(params, ids)
    updates, _ = dense.update(grads, dense.init(params))
    want = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(new[name], want[name], rtol=1e-6)


def compiled(rows, make=row_sparse, donate=(0, 1), budget=None):
    tx = make(optax.adam(1e-3), budget)
    table = jax.ShapeDtypeStruct((rows, 32), jnp.float32)
    state = jax.eval_shape(tx.init, table)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    target = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    step = jax.jit(make_step(tx).__wrapped__, donate_argnums=donate)
    return step.lower(table, state, ids, target).compile()


def makers(program, rows):
    """Operations that make an array with an entry for each row, by HLO name."""
    text = program.as_text()
    made = re.findall(rf"= \w+\[{rows}[],][^=]*? ([\w-]+)\(", text)
    return set(made) - {"parameter", "bitcast", "get-tuple-element", "fusion"}


@pytest.mark.parametrize("budget", [None, 16])
def test_work_and_memory_do_not_depend_on_the_number_of_rows(budget):
    jax.config.update("jax_disable_most_optimizations", False)  # the fixture resets it
    small, large = (compiled(rows, budget=budget) for rows in (10_007, 1_000_003))
    flops = [p.cost_analysis()["flops"] for p in (small, large)]
    assert flops[0] == flops[1] > 0
    memory = [p.memory_analysis() for p in (small, large)]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes < 1e6
    # All of the table and of its state is updated where it lies: there is no copy, and
    # nothing else as long as the table.
    for m, rows in zip(memory, (10_007, 1_000_003), strict=True):
        held = rows * 4 * (3 * 32 + 2)  # params, mu, nu; both counts
        assert held <= m.alias_size_in_bytes <= held + 64
    assert makers(large, 1_000_003) == {"scatter"}
    if budget is None:
        return
    # `makers` can tell: without donation there are copies.
    assert "copy" in makers(compiled(1_000_003, donate=(), budget=budget), 1_000_003)


GOOD = touched_rows(jnp.array([1, 2]), ROWS)
ADAM = optax.adam(0.1)


def update(grads, params=None, rows=GOOD, table=TABLE):
    tx = row_sparse(ADAM)
    return tx.update(grads, tx.init(table), params, rows=rows)


ERRORS = {
    "inner must be an optax.GradientTransformation, got 3": lambda: row_sparse(3),
    "budget must be None .*a positive int .*got 0$": lambda: row_sparse(ADAM, 0),
    r"a float in \(0, 1\] .*, got 1.5": lambda: row_sparse(ADAM, 1.5),
    "budget must be .*got nan": lambda: row_sparse(ADAM, float("nan")),
    "budget must be .*decides shapes, got True": lambda: row_sparse(ADAM, True),
    "budget must be .*got Array": lambda: row_sparse(ADAM, jnp.array(3)),
    "magnitude must be one of .*'l3'": lambda: row_sparse(ADAM, 1, magnitude="l3"),
    "score must be one of .*'cyclic'": lambda: row_sparse(ADAM, 1, score="cyclic"),
    "score must have no state": lambda: row_sparse(
        ADAM, 1, score=Score(lambda m: m, lambda x, s: (x.magnitudes, s))
    ),
    r"score must return one score per touched row, shape \(2,\)": lambda: row_sparse(
        ADAM, 1, score=Score(lambda m: (), lambda x, s: (jnp.ones(()), s))
    ).update(jnp.ones((2, 3)), row_sparse(ADAM).init(TABLE), rows=GOOD),
    "seed must be an integer": lambda: row_sparse(ADAM, 1, seed=0.5),
    r"params\['b'\] has shape \(\), but a table needs rows": lambda: row_sparse(
        ADAM
    ).init({"b": jnp.ones(())}),
    r"params\['ids'\] has dtype int32": lambda: row_sparse(ADAM).init(
        {"ids": jnp.arange(3)}
    ),
    "update needs the rows that the gradients belong to": lambda: update(
        jnp.ones((2, 3)), rows=None
    ),
    "rows must be what touched_rows": lambda: update(jnp.ones((2, 3)), rows=[1, 2]),
    r"the gradient of params must have one row for each of 2 places, got .*9": (
        lambda: update(jnp.ones((ROWS, WIDTH)))
    ),
    r"params must be the block .* of shape \(2, 3\).* got shape \(9, 3\)": lambda: (
        update(jnp.ones((2, 3)), TABLE)
    ),
    "params must match the updates, which have 1 leaves, got 2": lambda: update(
        jnp.ones((2, 3)), [TABLE, TABLE]
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message]()


def test_an_optimizer_that_needs_params_says_so():
    tx = row_sparse(optax.adamw(0.1))
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones((2, WIDTH)), tx.init(TABLE), rows=GOOD)

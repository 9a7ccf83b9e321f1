"""A training step that leaves out work: what it computes, compiles, reads and keeps.

Values are compared with a plain step, `jax.value_and_grad` and `tx.update` in one jit,
which computes all gradients; masks with `schedule` and the quotas.
"""

import collections
import contextlib
import functools
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from helpers import ours, quick_vector, slow_unless
from models import affine, dense, draw, mlp, squares
from priorityprop_jax import (
    active,
    prioritize,
    priority_prop,
    schedule,
    Score,
    static_mask,
    StaticMask,
    value_and_grad,
)
from priorityprop_jax.training import _programs, _step
from priorityprop_jax.training._step import make_train_step, Variant


CYCLE = 4
SIZES = (5, 6, 7, 3)  # of an MLP with six leaves
LEAVES = 6
# The same in every cycle: quotas that differ, and the masks of a cycle with them.
FIXED = Score(lambda _: (), lambda x, s: (jnp.exp2(-x.index.astype(jnp.float32)), s))
SHORT = {"budget": 10, "max_updates": CYCLE, "recalc_every": CYCLE}
RANDOM = SHORT | {"budget": 8, "min_updates": 0, "score": "random"}


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Compiles quickly: no exact allocation, few of XLA's optimizations."""
    monkeypatch.setattr("priorityprop_jax._priority.allocate_vector", quick_vector)
    if "optimized" not in request.fixturenames:
        request.getfixturevalue("quick_compilation")


@pytest.fixture
def optimized():
    """For tests that look at what XLA makes of a program."""


@pytest.fixture
def reads(monkeypatch):
    """What is read from the device, in which nothing else may be."""
    seen = []

    def read(x, original=_step._read):
        seen.append(np.size(x))
        with jax.transfer_guard_device_to_host("allow"):
            return original(x)

    monkeypatch.setattr(_step, "_read", read)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        yield seen


@contextlib.contextmanager
def compilations():
    """Counts the programs that XLA compiles."""
    count, on = [0], [True]

    def listen(name, duration, **_):
        count[0] += on[0] and name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    on[0] = False


def params():
    return dense(*SIZES)


def loss(p, x, target):
    return squares(mlp(p, x), target)


def batches(steps, seed=0):
    return [
        (
            draw(4, SIZES[0], seed=seed + 2 * i),
            draw(4, SIZES[-1], seed=seed + 2 * i + 1),
        )
        for i in range(steps)
    ]


@functools.cache
def plain_step(loss_fn, tx):
    @jax.jit
    def step(p, s, *batch):
        value, gradients = jax.value_and_grad(loss_fn)(p, *batch)
        updates, s = tx.update(gradients, s, p)
        return optax.apply_updates(p, updates), s, value

    return step


def train(step, tx, data, p=None, s=None):
    """The params, state and losses after some steps."""
    p = params() if p is None else p
    s = tx.init(p) if s is None else s
    losses = []
    for batch in data:
        p, s, metrics = step(p, s, *batch)
        losses.append(getattr(metrics, "loss", metrics))
    return p, s, losses


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def copied(tree):
    """Through the host: other arrays with the same values."""
    return jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)


AXES = jax.tree.map(lambda x: (0,), params())
BUILDS = {
    "before sgd": lambda **k: optax.chain(priority_prop(**k), optax.sgd(0.1, 0.9)),
    "before adam": lambda **k: optax.chain(priority_prop(**k), optax.adam(0.01)),
    "prioritize adam": lambda **k: prioritize(optax.adam(0.01), **k),
    "prioritize adamw rows": lambda **k: prioritize(
        optax.adamw(optax.linear_schedule(0.01, 0.001, 20)),
        units=AXES,
        resting="decay",
        **k,
    ),
    "elements before sgd": lambda **k: optax.chain(
        priority_prop(units="element", **(k | {"budget": 0.2, "min_updates": 0})),
        optax.sgd(0.1),
    ),
    "clip, prioritize, decay": lambda **k: optax.chain(
        optax.clip(0.1),
        prioritize(optax.adam(0.01), **k),
        optax.add_decayed_weights(-0.01),
    ),
}


@functools.cache
def static_step(tx):
    """One for many tests, which saves compiling: any state may be given to it."""
    return make_train_step(loss, tx, "static")


@functools.cache
def build(name, **changes):
    given = SHORT | changes
    return BUILDS[name](**(given | ({"budget": 40} if "rows" in name else {})))


@pytest.mark.parametrize(
    "name", [slow_unless(i in (1, 2), name) for i, name in enumerate(BUILDS)]
)
def test_agrees_with_computing_everything(name):
    tx, data = build(name), batches(3 * CYCLE + 1)
    want = train(plain_step(loss, tx), tx, data)
    for mode in ("static", "dynamic"):
        step = static_step(tx) if mode == "static" else make_train_step(loss, tx, mode)
        assert_close(train(step, tx, data), want)


@pytest.mark.parametrize("name", ["before adam", "prioritize adam"])
def test_a_full_budget_is_plain_training(name):
    full = {"budget": 1.0, "min_updates": CYCLE, "max_updates": CYCLE}
    tx, data = build(name, **full), batches(CYCLE)
    want, _, losses = train(plain_step(loss, tx), tx, data)
    got, _, found = train(make_train_step(loss, tx, "static"), tx, data)
    assert_close((got, found), (want, losses))
    plain = optax.adam(0.01)
    assert_close(got, train(plain_step(loss, plain), plain, data)[0])


def test_account():
    """Steps per mask: what the quotas of each cycle say, and no others."""
    tx, step = build("before sgd"), make_train_step(loss, build("before sgd"))
    p = params()
    s, want = tx.init(p), collections.Counter()
    for i, batch in enumerate(batches(3 * CYCLE)):
        p, s, _ = step(p, s, *batch)
        if i % CYCLE == 0:
            due = np.array(schedule(ours(s).quotas, CYCLE)) > 0
        on = due[i % CYCLE] if i % CYCLE else np.ones(LEAVES, bool)
        want[StaticMask(tuple(map(bool, on)), jax.tree.structure(p))] += 1
    assert step.mode == "static" and len(want) > 2
    assert step.account == want and step.computed == want
    assert {v.mask for v in step.variants} == set(want)


@pytest.mark.parametrize("ahead", [True, False])
def test_compiles_once_per_mask_and_reads_once_per_cycle(ahead, reads):
    tx = build("prioritize adam", score=FIXED)
    step = make_train_step(loss, tx, "static", compile_ahead=ahead)
    p = params()
    s, data = tx.init(p), batches(5 * CYCLE)
    jax.block_until_ready((p, s, data))
    with compilations() as first:
        p, s, _ = train(step, tx, data[:CYCLE], p, s)
    masks = len(step.variants)
    assert 3 <= masks <= CYCLE
    assert first[0] == masks
    with compilations() as later:
        train(step, tx, data[CYCLE:], p, s)
    assert later[0] == 0 and len(step.variants) == masks
    # At the start the number of the step; then the step, CYCLE ranks, LEAVES quotas.
    assert reads == [1] + [1 + CYCLE + LEAVES] * 5
    assert not step._ahead


def test_other_batch_shapes_are_other_programs():
    tx = build("before sgd")
    step = make_train_step(loss, tx, "static")
    data = [tuple(a[: 1 + i % 2] for a in b) for i, b in enumerate(batches(CYCLE))]
    want = train(plain_step(loss, tx), tx, data)
    assert_close(train(step, tx, data), want)


# Any state may be given.


def test_resumes_in_the_middle_of_a_cycle():
    tx, data = build("before sgd"), batches(3 * CYCLE)
    step = static_step(tx)
    want = train(step, tx, data)
    at = train(step, tx, data[: CYCLE + 2])
    for again in (step, make_train_step(loss, tx, "static")):
        p, s = copied(at[:2])
        got = train(again, tx, data[CYCLE + 2 :], p, s)
        assert_equal(got[:2], want[:2])


def test_swapped_states():
    """Back to a state of long ago; and quotas changed by hand, at the same step."""
    tx = build("before sgd")
    plain, step = plain_step(loss, tx), static_step(tx)
    data = batches(2 * CYCLE)
    old = train(plain, tx, data[:2])
    p, s, _ = train(step, tx, data[: CYCLE + 1])
    kept = copied((p, s))
    p, s = copied(old[:2])
    assert_close(
        train(step, tx, data[2:4], p, s), train(plain, tx, data[2:4], *old[:2])
    )

    p, s, _ = train(step, tx, data[CYCLE + 1 : CYCLE + 3], *copied(kept))
    other = jnp.array([0, 0, 0, 0, 1, CYCLE])
    s = optax.tree.set(s, quotas=other)
    want = train(plain, tx, data[-1:], *copied((p, s)))
    step.account.clear()
    assert_close(train(step, tx, data[-1:], p, s), want)
    (mask,) = step.account
    assert mask.leaves == (False,) * 5 + (True,)


def test_two_runs_take_turns(reads):
    tx, data = build("before sgd"), batches(2 * CYCLE + 1)
    step = static_step(tx)
    p = [dense(*SIZES, seed=i) for i in (1, 2)]
    s = [tx.init(x) for x in p]
    for i in range(len(data)):
        for run in (0, 1):
            if i > run:  # the second is one step behind
                p[run], s[run], _ = step(p[run], s[run], *data[i - 1 - run])
    once = 1 + CYCLE + LEAVES
    assert sorted(reads) == [1] * 2 + [once] * 4
    for run in (0, 1):
        n = len(data) - 1 - run
        want = train(step, tx, data[:n], dense(*SIZES, seed=run + 1))
        assert_equal((p[run], s[run]), want[:2])


def test_the_same_state_twice():
    tx, data = build("before sgd"), batches(CYCLE)
    step = make_train_step(loss, tx, "static", donate=False)
    p, s, _ = train(step, tx, data[:2])
    first, second = (step(p, s, *data[2])[:2] for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_donation(mode):
    tx, data = build("prioritize adam"), batches(2)
    shared = {"static": static_step(tx), "dynamic": make_train_step(loss, tx, mode)}[
        mode
    ]
    for step in (shared, make_train_step(loss, tx, mode, donate=False)):
        p = params()
        s = tx.init(p)
        for batch in data:
            old, (p, s, _) = (p, s.inner), step(p, s, *batch)
            assert {x.is_deleted() for x in jax.tree.leaves(old)} == {step is shared}
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        p = params()
        s = tx.init(p)
        shared(p, s, *data[0])
        shared(p, s, *data[0])


# What rests costs nothing.


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_flops_and_copies(skip_nonfinite, optimized):
    """Of matmuls, in a net of three layers; and nothing of what rests is copied."""
    tx, width, batch = build("prioritize adam", score=FIXED), 40, 64
    p, data = dense(width, width, width, width), (draw(batch, width),) * 2
    step = make_train_step(loss, tx, "static", skip_nonfinite=skip_nonfinite)
    s = tx.init(p)
    p, s, _ = train(step, tx, [data] * CYCLE, p, s)
    exact = {v: f for v, f in step.variants.items() if v.kind == "exact"}
    assert len(exact) > 1
    for variant, program in exact.items():
        compiled = program.lower(p, s, *data).compile()
        layers = list(variant.mask.tree.values())
        active = [any(layer.values()) for layer in layers]
        chain = sum(any(active[:i]) for i in range(1, 3))
        weights = sum(layer["w"] for layer in layers)
        want = (3 + chain + weights) * 2 * batch * width**2
        assert compiled.cost_analysis()["flops"] == pytest.approx(want, rel=0.15)
        text = compiled.as_text()
        aliases = re.findall(r"(?:may|must)-alias", text)
        assert len(aliases) == len(jax.tree.leaves((p, s)))
        assert " sort(" not in text  # new quotas are for the first step
        copies = re.findall(r"f32\[40,40\]\S* copy\(([^)]*)\)", text)
        moving = {name for name, layer in zip(p, layers, strict=True) if layer["w"]}
        assert all(any(name in copy for name in moving) for copy in copies), copies


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_resting_leaves_are_returned_as_they_are(skip_nonfinite):
    """Params and Adam's moments of what rests."""
    tx = build("prioritize adam", score=FIXED)
    p = params()
    mask = static_mask({k: {"w": k == "d2", "b": k == "d2"} for k in p})
    recipe = _programs.Recipe(loss, tx, False, None, None, skip_nonfinite)
    program = functools.partial(_programs.later_step, recipe, Variant(mask, "exact"))
    out = jax.make_jaxpr(program)(p, tx.init(p), *batches(1)[0]).jaxpr
    untouched = sum(x in out.invars for x in out.outvars)
    assert untouched >= 3 * sum(not on for on in mask.leaves)


# When masks vary.


@pytest.mark.parametrize(
    "name",
    [slow_unless(n == "clip", n) for n in ("clip", "before adam", "prioritize adam")],
)
def test_prefixes_when_there_is_no_room(name):
    if name == "clip":
        tx = optax.chain(
            optax.clip_by_global_norm(0.01), build("prioritize adam", **RANDOM)
        )
    else:
        tx = build(name, **RANDOM)
    data = batches(6 * CYCLE)
    step = make_train_step(loss, tx, "static", max_variants=6)
    got = train(step, tx, data)
    assert_close(got, train(make_train_step(loss, tx, "dynamic"), tx, data))
    if name != "clip":
        assert_close(got, train(plain_step(loss, tx), tx, data))
    kinds = collections.Counter(v.kind for v in step.variants)
    assert kinds["first"] == kinds["prefix"] == 1 and kinds["exact"] == 4
    assert sum(step.account.values()) == sum(step.computed.values()) == len(data)
    assert len(step.account) > 6 >= len(step.computed)


def test_auto_turns_dynamic_when_there_is_no_room(caplog):
    tx, data = build("before sgd", **RANDOM), batches(5 * CYCLE)
    step = make_train_step(loss, tx, max_variants=9)
    assert step.mode == "auto"
    with caplog.at_level(logging.INFO, "priorityprop_jax"):
        got = train(step, tx, data)
    assert step.mode == "dynamic" and "outgrew" in step.reason
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]
    assert "static" in caplog.text and "at most 3" in caplog.text
    assert "mode='dynamic'" in repr(step)
    assert_close(got, train(plain_step(loss, tx), tx, data))


def test_auto_counts_the_masks_of_a_cycle():
    tx = build("before sgd", score=FIXED)
    step = make_train_step(loss, tx, max_variants=3)
    got = train(step, tx, batches(CYCLE + 1))
    assert step.mode == "dynamic" and "more than 0" in step.reason
    assert_close(got, train(plain_step(loss, tx), tx, batches(CYCLE + 1)))
    every = build("before sgd", recalc_every=1, max_updates=4)
    step = make_train_step(loss, every)
    train(step, every, batches(3))
    assert step.mode == "static" and len(step.variants) == 1


def test_programs_long_unused_make_room(monkeypatch):
    monkeypatch.setattr(_step, "_PATIENCE", 1)
    tx, data = build("before sgd", **RANDOM), batches(6 * CYCLE)
    step = make_train_step(loss, tx, "static", max_variants=9)
    seen, p = set(), params()
    s = tx.init(p)
    for batch in data:
        p, s, _ = step(p, s, *batch)
        exact = {v for v in step.variants if v.kind == "exact"}
        assert len(exact) <= 6 and len(step.variants) <= 9
        seen |= exact
    assert len(seen) > 6
    assert set(step._used) == {v for v in step.variants if v.kind != "first"}


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_prefix(leaves, levels):
    """Covers the mask, is closed towards the loss, and is one of a few."""
    depths = [d for d, _ in leaves]
    treedef = jax.tree.structure([0] * len(leaves))
    prefix = lambda on: _step._prefix(StaticMask(on, treedef), depths, levels).leaves
    mask = tuple(on for _, on in leaves)
    got = prefix(mask)
    assert all(g or not m for g, m in zip(got, mask, strict=True))
    inside = [d for d, g in zip(depths, got, strict=True) if g]
    assert all(g == (d <= max(inside)) for d, g in zip(depths, got, strict=True))
    each = {prefix(tuple(d == level for d in depths)) for level in set(depths)}
    assert len(each) <= levels and got in each
    if levels >= len(set(depths)) and any(mask):
        assert max(inside) == max(d for d, m in zip(depths, mask, strict=True) if m)


def test_depths_are_found_in_the_loss():
    """Whatever the names say; with a leaf that nothing uses."""
    tx = build("before sgd", **RANDOM)

    def backwards(p, x):
        for name in sorted(p, reverse=True)[:-1]:
            x = jnp.tanh(x @ p[name]["w"])
        return (x**2).mean(), x

    p = {f"d{i}": {"w": draw(4, 4, seed=i)} for i in range(4)}
    step = make_train_step(backwards, tx, "static", has_aux=True, max_variants=2)
    s = tx.init(p)
    for _ in range(2 * CYCLE):
        p, s, _ = step(p, s, draw(2, 4))
    assert step._find_depths(p, (draw(2, 4),), {}) == [0, 0, 1, 2]


# Inside of transformations.


def test_scan(monkeypatch):
    tx, data = build("prioritize adam"), batches(2 * CYCLE)
    want = train(plain_step(loss, tx), tx, data)
    want = *want[:2], jnp.stack(want[2])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *data)

    def run(step, p, s):
        def body(carry, batch):
            p, s, metrics = step(*carry, *batch)
            return (p, s), metrics.loss

        (p, s), losses = jax.lax.scan(body, (p, s), stacked)
        return p, s, losses

    for mode in ("dynamic", "auto"):
        p, step = params(), make_train_step(loss, tx, mode)
        got = jax.jit(functools.partial(run, step))(p, tx.init(p))
        assert_close(got, want)
        assert not any(x.is_deleted() for x in jax.tree.leaves(p))
    assert step.mode == "auto" and not step.account
    static = make_train_step(loss, tx, "static")
    with pytest.raises(TypeError, match="mode='dynamic'"):
        run(static, p, tx.init(p))


def test_shard_map():
    """Gradients averaged by the transformation in front; a batch on two devices."""
    average = optax.stateless(lambda g, _: jax.lax.pmean(g, "i"))
    inner, data = build("before sgd"), batches(CYCLE + 2)
    tx = optax.chain(average, inner)
    step = make_train_step(loss, tx)
    mesh = jax.make_mesh((2,), ("i",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (P(), P(), P("i"), P("i")), "out_specs": (P(), P())}
    of_shard = lambda *args: step(*args)[:2]
    sharded = jax.jit(jax.shard_map(of_shard, mesh=mesh, check_vma=False, **specs))
    p = params()
    s = tx.init(p)
    for batch in data:
        p, s = sharded(p, s, *batch)
    want = train(plain_step(loss, inner), inner, data)
    assert_close((p, s[1]), want[:2])


def test_ensemble():
    tx, data = build("before sgd"), batches(CYCLE + 1)
    step = make_train_step(loss, tx)
    seeds = [dense(*SIZES, seed=i) for i in (0, 7)]
    p = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    s = jax.vmap(tx.init)(p)
    mapped = jax.jit(jax.vmap(step, (0, 0, None, None)))
    for batch in data:
        p, s, _ = mapped(p, s, *batch)
    for i, seed in enumerate(seeds):
        want = train(plain_step(loss, tx), tx, data, seed)
        assert_close(jax.tree.map(lambda x, i=i: x[i], p), want[0])
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\).*dynamic"):
        make_train_step(loss, tx, "static")(p, s, *data[0])


def test_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    tx = build("before sgd")
    step = make_train_step(loss, tx)
    place = _programs.find_place(tx.init(params()), params(), None)
    step._decide_early(place, CYCLE)
    assert step.mode == "dynamic" and "processes" in step.reason


# Losses and optimizers of all kinds.


def test_aux_kwargs_keys_and_batch_statistics():
    """Running statistics go in with the batch, come out as aux; dropout has a key."""

    def noisy(p, stats, key, x, *, target, rate=0.5):
        x = affine(p["d0"], x)
        stats = {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0, keepdims=True)}
        x = jnp.tanh(x - stats["mean"]) * jax.random.bernoulli(key, 1 - rate, x.shape)
        return squares(affine(p["d1"], x), target), stats

    tx = build("before sgd")

    def run(step):
        p, stats = dense(5, 6, 3), {"mean": jnp.zeros((1, 6))}
        s = tx.init(p)
        for i, (x, target) in enumerate(batches(2 * CYCLE)):
            key = jax.random.fold_in(jax.random.key(3), i)
            p, s, metrics = step(p, s, stats, key, x, target=target, rate=0.25)
            stats = metrics.aux
        return p, s, stats, metrics.loss

    @jax.jit
    def plain(p, s, *batch, **kwargs):
        of = jax.value_and_grad(noisy, has_aux=True)
        (value, aux), gradients = of(p, *batch, **kwargs)
        updates, s = tx.update(gradients, s, p)
        return optax.apply_updates(p, updates), s, _programs.Metrics(value, aux)

    for mode in ("static", "dynamic"):
        step = make_train_step(noisy, tx, mode, has_aux=True)
        assert_close(run(step), run(plain))


@pytest.mark.parametrize(
    "wrap", ["multi_steps", pytest.param("if_finite", marks=pytest.mark.slow)]
)
def test_wrappers_that_hold_the_schedule_back(wrap):
    inner, data = build("before sgd", score=FIXED), batches(2 * CYCLE + 1)
    tx = {
        "multi_steps": lambda: optax.MultiSteps(inner, 2).gradient_transformation(),
        "if_finite": lambda: optax.apply_if_finite(inner, 3),
    }[wrap]()
    if wrap == "if_finite":
        data[2] = (data[2][0] * jnp.nan, data[2][1])
    want = train(plain_step(loss, tx), tx, data)
    step = make_train_step(loss, tx)
    assert_close(train(step, tx, data), want)
    assert step.mode == "dynamic" and "hold it back" in step.reason
    step = make_train_step(loss, tx, "static")
    assert_close(train(step, tx, data), want)
    assert step.mode == "static" and "at every step" in step.reason


def test_a_schedule_that_is_held_back_unseen():
    """By something that looks like a chain."""
    inner = build("before sgd", score=FIXED)

    def update(updates, state, params=None):
        out, new = inner.update(updates, state[0], params)
        return out, (optax.tree.set(new, step=jnp.int32(CYCLE)),)

    tx = optax.GradientTransformation(lambda p: (inner.init(p),), update)
    with pytest.raises(RuntimeError, match="step 4 where 1 was.*'dynamic'"):
        train(make_train_step(loss, tx, "static"), tx, batches(2))


@pytest.mark.slow
def test_several_schedules():
    two = optax.chain(build("prioritize adam"), priority_prop(**SHORT))
    data = batches(CYCLE + 1)
    with pytest.raises(ValueError, match="2 PriorityPropStates; choose one by index"):
        train(make_train_step(loss, two), two, data)
    want = train(plain_step(loss, two), two, data)
    # Gradients of what rests in the first are not needed by the second, which looks at
    # them in the first step of a cycle only.
    assert_close(train(make_train_step(loss, two, "static", index=0), two, data), want)


@pytest.mark.parametrize(
    "p", [draw(3, 2), [jnp.float32(0.5), jnp.ones(3)], {"a": draw(2), "none": None}]
)
def test_params_of_any_structure(p):
    tx = build("before sgd", budget=3)
    square = lambda p, x: (
        x * sum((jnp.asarray(a) ** 2).sum() for a in jax.tree.leaves(p))
    )
    data = [(jnp.float32(i),) for i in range(CYCLE - 1)]
    start = lambda: jax.tree.map(jnp.array, p)
    want = train(plain_step(square, tx), tx, data, start())
    for mode in ("static", "dynamic"):
        assert_close(train(make_train_step(square, tx, mode), tx, data, start()), want)


def test_sharded_params():
    kind = (AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("x",), kind, devices=jax.devices()[:2])
    tx, data = build("before sgd"), batches(CYCLE + 2)
    want = train(plain_step(loss, tx), tx, data)
    place = lambda x: jax.device_put(
        x, jax.NamedSharding(mesh, P("x") if np.shape(x) == (6, 7) else P())
    )
    p = jax.tree.map(place, params())
    s = jax.tree.map(place, tx.init(p))
    got = train(make_train_step(loss, tx, "static"), tx, data, p, s)
    assert_close(got, want)
    assert got[0]["d1"]["w"].sharding.spec[0] == "x"


# Errors.


def test_errors():
    tx = build("before sgd")
    with pytest.raises(ValueError, match="mode must be one of.*did you mean 'static'"):
        make_train_step(loss, tx, "statik")
    with pytest.raises(TypeError, match="loss_fn must be a function, got 3"):
        make_train_step(3, tx)
    with pytest.raises(TypeError, match="tx must be an optax.GradientTransformation"):
        make_train_step(loss, 0.1)
    with pytest.raises(ValueError, match="max_variants must be in"):
        make_train_step(loss, tx, max_variants=1)
    adam, data = optax.adam(0.1), batches(1)
    for mode in ("static", "dynamic"):
        with pytest.raises(ValueError, match="no PriorityPropState"):
            train(make_train_step(loss, adam, mode), adam, data)
        with pytest.raises(TypeError, match="scalar-output"):
            vector = lambda p, x, _: mlp(p, x)
            train(make_train_step(vector, tx, mode), tx, data)
        with pytest.raises(TypeError, match="real- or complex-valued inputs|float"):
            ints = params() | {"ids": jnp.arange(3)}
            floats = params() | {"ids": jnp.ones(3)}
            make_train_step(loss, tx, mode)(ints, tx.init(floats), *data[0])


def test_a_failed_call_changes_nothing():
    tx, data = build("before sgd"), batches(CYCLE)
    step = static_step(tx)
    want = train(step, tx, data)
    p, s, _ = train(step, tx, data[:2])
    with pytest.raises(TypeError, match="dot_general|shape"):
        step(p, s, jnp.ones((4, 2)), data[2][1])
    assert_equal(train(step, tx, data[2:], p, s)[:2], want[:2])


def test_gradients_are_those_of_value_and_grad():
    """With SGD behind the schedule the updates are the gradients."""
    tx = optax.chain(priority_prop(**SHORT, score=FIXED), optax.sgd(1.0))
    p, (batch,) = params(), batches(1)
    step = make_train_step(loss, tx, "static", donate=False)
    p, s, _ = step(p, tx.init(p), *batch)
    new, _, _ = step(p, s, *batch)
    (mask,) = [m for m in step.account if not all(m.leaves)]
    _, gradients = value_and_grad(loss)(p, *batch, active=mask)
    assert_close(new, jax.tree.map(lambda a, g: a - g, p, gradients))


STACK_UNITS = {"stack": (0,), "out": ()}


def stacked_loss(p, x, target):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
    return squares(x @ p["out"], target)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_rows_of_a_stack_rest_by_themselves(mode):
    """As without us, and no gradient is computed of a layer that is not due."""
    start = {"stack": 0.5 * draw(4, 5, 5), "out": draw(5, 3, seed=1)}
    by_index = Score(lambda _: (), lambda x, s: (1.0 + x.index % 2, s))
    tx = prioritize(optax.sgd(0.1), **SHORT, units=STACK_UNITS, score=by_index)
    step = make_train_step(stacked_loss, tx, mode, units=STACK_UNITS, donate=False)
    plain = plain_step(stacked_loss, tx)
    p, s = start, tx.init(start)
    q, t = p, s
    for x, target in [(draw(2, 5, seed=i), draw(2, 3, seed=50 + i)) for i in range(9)]:
        p, s, metrics = step(p, s, x, target)
        q, t, value = plain(q, t, x, target)
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), p, q)
    if mode == "static":
        rows = {mask.leaves[1] for mask in step.account}
        assert any(isinstance(x, tuple) for x in rows)
        assert sum(step.account.values()) == 9


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_metrics_say_who_was_due(mode):
    tx = build("prioritize adam", **RANDOM)
    step, p = make_train_step(loss, tx, mode), params()
    s = tx.init(p)
    for batch in batches(CYCLE + 2):
        want = jax.tree.leaves(active(s, p))
        p, s, metrics = step(p, s, *batch)
        assert metrics.due.dtype == bool and metrics.due.shape == (len(want),)
        np.testing.assert_array_equal(metrics.due, want)
        assert isinstance(metrics.due, np.ndarray) == (mode == "static")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_loss_goes_to_those_who_ask_for_it(mode):
    """`reduce_on_plateau` needs ``value=``; the same by hand is the reference."""
    inner = build("prioritize adam", score=FIXED)
    tx = optax.chain(inner, optax.contrib.reduce_on_plateau(0.5, patience=0))

    @jax.jit
    def plain(p, s, *batch):
        value, gradients = jax.value_and_grad(loss)(p, *batch)
        updates, s = tx.update(gradients, s, p, value=value)
        return optax.apply_updates(p, updates), s, value

    data = batches(2 * CYCLE)
    got = train(make_train_step(loss, tx, mode), tx, data)
    assert_close(got, train(plain, tx, data))
    assert float(optax.tree.get(got[1], "scale")) < 1


@pytest.mark.parametrize("at", [1, CYCLE + 2, 3 * CYCLE, 4 * CYCLE + 3])
@pytest.mark.parametrize("mode", ["auto", "static", "dynamic"])
def test_a_resumed_step_takes_the_same_programs(mode, at):
    """Some of them for prefixes, which round differently: equal to the last bit."""
    tx, data = build("before sgd", **RANDOM), batches(6 * CYCLE)
    whole = make_train_step(loss, tx, mode, max_variants=6)
    want = train(whole, tx, data)[:2]
    first = make_train_step(loss, tx, mode, max_variants=6)
    p, s, _ = train(first, tx, data[:at])
    saved = json.loads(json.dumps(first.state_dict()))
    second = make_train_step(loss, tx, mode, max_variants=6)
    second.load_state_dict(saved, p)
    assert_equal(train(second, tx, data[at:], p, s)[:2], want)
    assert second.account == whole.account and second.computed == whole.computed
    assert second.mode == whole.mode
    assert second.state_dict() == whole.state_dict()


def test_saved_steps_that_do_not_fit():
    tx = build("before sgd", score=FIXED)
    step = make_train_step(loss, tx, "static")
    train(step, tx, batches(2))
    saved = step.state_dict()
    with pytest.raises(ValueError, match=r"saved step was 'static': .*mode='auto'"):
        make_train_step(loss, tx, "dynamic").load_state_dict(saved, params())
    with pytest.raises(ValueError, match=r"of \d+ leaves, these have 1"):
        make_train_step(loss, tx).load_state_dict(saved, jnp.ones(3))

"""Many devices: every replica decides alike, and nothing moves that need not move."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from priorityprop_jax import prioritize, priority_prop


SETTINGS = {"budget": 0.4, "max_updates": 6, "recalc_every": 4}
REPLICAS = 4  # threads that take turns on fewer cores
STEPS = 5  # of which two begin a cycle
SHAPES = {"big": (64, 32), "wide": (16, 64), "bias": (32,)}
AXES = {"big": (0,), "wide": (1,), "bias": ()}
SPECS = {"big": P("x"), "wide": P("y", "x"), "bias": P()}


def before_adam(**kwargs):
    return optax.chain(priority_prop(**SETTINGS, **kwargs), optax.adam(1e-2))


def around_adam(**kwargs):
    return prioritize(optax.adam(1e-2), **SETTINGS, **kwargs)


@pytest.fixture(autouse=True)
def _eight_devices():
    assert jax.device_count() == 8, "tests/conftest.py asks for eight"


def random_tree(seed, *lead):
    """Like the params; the leaves differ in size by powers of ten."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=(*lead, *shape)) * 10.0**-i).astype(np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def replica_mesh():
    return jax.make_mesh((REPLICAS,), ("i",), axis_types=(AxisType.Auto,))


def quotas_of(state):
    return optax.tree.get(state, "quotas")


def step_with(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(step, params, state, all_grads):
    """Params and quotas after each step."""
    history = []
    for grads in all_grads:
        params, state = step(params, state, grads)
        history.append(jax.device_get((params, quotas_of(state))))
    return history


@functools.cache
def on_one_device(units):
    """What to compare `around_adam` with: a function from gradients to a history."""
    tx = around_adam(units=AXES if units == "axes" else units)
    step = jax.jit(functools.partial(step_with, tx))
    params = random_tree(0)
    return lambda all_grads: run(step, params, tx.init(params), all_grads)


def assert_same(history, expected):
    assert len(history) == len(expected)
    for (params, quotas), (other_params, other_quotas) in zip(
        history, expected, strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, quotas, other_quotas)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, params, other_params)
    flat = np.concatenate([np.ravel(q) for q in jax.tree.leaves(history[-1][1])])
    assert flat.min() < flat.max()  # else anything would be the same


# By hand: each replica has its own gradients.


def one_sided_grads(seed):
    """Gradients of all replicas, of which each finds another leaf important."""
    grads = random_tree(seed, REPLICAS)
    names = list(SHAPES)
    for replica in range(REPLICAS):
        grads[names[replica % 3]][replica] *= 1e4
    return grads


def mean_of_magnitudes(grads):
    """Gradients on one device with the same magnitudes as the mean over replicas."""

    def leaf(g):
        norms = [np.linalg.norm(part.astype(np.float64)) for part in g]
        mean = g.mean(0)
        return mean * (np.mean(norms) / np.linalg.norm(mean)).astype(np.float32)

    return {name: leaf(g) for name, g in grads.items()}


GRADS = [one_sided_grads(10 + t) for t in range(STEPS)]


def quotas_on_one_device(all_grads):
    return [quotas for _, quotas in on_one_device("leaf")(all_grads)]


def test_replicas_would_not_agree_on_their_own():
    """That is, the tests after this one can fail."""
    own = [jax.tree.map(lambda g, i=i: g[i], GRADS[0]) for i in range(REPLICAS)]
    quotas = {tuple(quotas_on_one_device([grads])[0]) for grads in own}
    assert len(quotas) > 1


def test_pmap():
    tx = around_adam(axis_name="i")

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        updates = jax.lax.pmean(updates, "i")
        return optax.apply_updates(params, updates), state

    stack = lambda tree: jax.tree.map(lambda x: np.stack([x] * REPLICAS), tree)
    params = random_tree(0)
    mapped = jax.pmap(step, axis_name="i", devices=jax.devices()[:REPLICAS])
    history = run(mapped, stack(params), stack(tx.init(params)), GRADS)
    for params, quotas in history:
        for x in jax.tree.leaves((params, quotas)):
            np.testing.assert_array_equal(x, np.broadcast_to(x[0], x.shape))
    expected = quotas_on_one_device(map(mean_of_magnitudes, GRADS))
    # From the second cycle on as well, when the counts differ between leaves.
    np.testing.assert_array_equal([q[0] for _, q in history], expected)


def test_shard_map():
    """Under `check_vma`: the state comes out as replicated as it went in."""
    tx = around_adam(axis_name="i")
    mesh = replica_mesh()

    def step(params, state, grads):
        own = jax.tree.map(lambda g: g[0], grads)
        mean = jax.lax.pmean(own, "i")
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("i")), out_specs=P(), check_vma=True
    )
    params = random_tree(0)
    history = run(jax.jit(sharded), params, tx.init(params), GRADS)
    mean = [jax.tree.map(lambda g: g.mean(0), grads) for grads in GRADS]
    assert_same(history, on_one_device("leaf")(mean))


def update_apart(units):
    """One update of replicas that each have their own gradients."""
    tx = priority_prop(**SETTINGS, units=units, axis_name="i")

    def step(state, grads):
        updates, state = tx.update(jax.tree.map(lambda g: g[0], grads), state)
        return jax.tree.map(lambda u: u[None], updates), state

    specs = {"in_specs": (P(), P("i")), "out_specs": (P("i"), P())}
    step = jax.jit(jax.shard_map(step, mesh=replica_mesh(), check_vma=True, **specs))
    return lambda grads: step(tx.init(jax.tree.map(lambda g: g[0], grads)), grads)


def test_shard_map_with_gradients_that_differ():
    """Updates differ between replicas and say so; the state does not."""
    updates, state = update_apart("leaf")(GRADS[0])
    (expected,) = quotas_on_one_device([mean_of_magnitudes(GRADS[0])])
    np.testing.assert_array_equal(state.quotas, expected)
    times = dict(zip(sorted(SHAPES), -(-np.asarray(state.quotas) // 4), strict=True))
    for name, g in GRADS[0].items():
        np.testing.assert_allclose(updates[name], g * times[name])


@pytest.mark.parametrize("units", ["leaf", "element"])
def test_what_is_not_finite_anywhere_rests_everywhere(units):
    """Else the counts of the replicas would go apart without a word."""
    grads = {
        "a": np.ones((REPLICAS, 3), np.float32),
        "b": np.ones((REPLICAS, 2), np.float32),
    }
    grads["a"][1, 2] = np.nan
    updates, state = update_apart(units)(grads)
    rests = [False, False, True] if units == "element" else [True] * 3
    np.testing.assert_array_equal(updates["a"] == 0, [rests] * REPLICAS)
    assert (np.asarray(updates["b"]) > 0).all()
    for count in jax.tree.leaves(state.counts):
        shards = [np.asarray(shard.data) for shard in count.addressable_shards]
        assert len(shards) == REPLICAS
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])


# By the compiler: arrays are sharded, and nothing is said to the transformation.


def auto_mesh():
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def state_shardings(tx, params, shardings):
    """As optax documents it: abstract init, then the params' shardings by position."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    state = jax.eval_shape(tx.init, params)
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def check_shardings(tree, shardings):
    for x, sharding in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding)


def test_data_parallel():
    """The batch is sharded; the gradients are global, and so is the choice."""
    tx = around_adam()
    mesh = replica_mesh()
    replicated = NamedSharding(mesh, P())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, 32, 64)).astype(np.float32)

    def loss_fn(params, x):
        y = jnp.tanh(x @ params["big"] + params["bias"][None])
        return jnp.mean((y[:, :16] @ params["wide"]) ** 2)

    @jax.jit
    def step(params, state, x):
        return step_with(tx, params, state, jax.grad(loss_fn)(params, x))

    params = random_tree(0)
    expected = run(step, params, tx.init(params), x)
    params = jax.device_put(params, replicated)
    state = jax.jit(tx.init, out_shardings=replicated)(params)
    batches = [jax.device_put(batch, NamedSharding(mesh, P("i"))) for batch in x]
    assert_same(run(step, params, state, batches), expected)


def collectives(compiled):
    """(operation, number of elements) of all communication in a program."""
    pattern = (
        r"= (.*?) (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
        r"|collective-broadcast|ragged-all-to-all|send|recv)(?:-start)?\("
    )
    found = []
    for shapes, operation in re.findall(pattern, compiled.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found.append((operation, math.prod(int(d) for d in dims.split(",") if d)))
    return found


@pytest.mark.parametrize(
    "units, allocation",
    [("element", "bisect"), ("element", "argsort"), ("axes", "argsort")],
)
def test_sharded_params(units, allocation):
    """State lies where its leaf lies, and stays there; no leaf moves to be counted."""
    grads = [random_tree(10 + t) for t in range(STEPS)]
    tx = around_adam(units=AXES if units == "axes" else units, allocation=allocation)
    mesh = auto_mesh()
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    params = jax.device_put(random_tree(0), shardings)
    state_sharding = state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=state_sharding)(params)
    ours = optax.tree.get(state, "PriorityPropState")
    for statistic in (ours.counts, ours.scores, ours.quotas):
        replicated = NamedSharding(mesh, P())
        check_shardings(statistic, shardings if units == "element" else replicated)

    # With "bisect" the compiler leaves all as it was; a sort in the middle tempts it
    # to shard small leaves that were not, unless it is told.
    kept = None if allocation == "bisect" else (shardings, state_sharding)
    step = jax.jit(functools.partial(step_with, tx), out_shardings=kept)
    step = step.lower(params, state, jax.device_put(grads[0], shardings)).compile()
    history = []
    for g in grads:  # what is compiled takes nothing that is sharded in another way
        params, state = step(params, state, jax.device_put(g, shardings))
        check_shardings(params, shardings)
        check_shardings(state, state_sharding)
        history.append(jax.device_get((params, quotas_of(state))))
    assert_same(history, on_one_device(units)(grads))

    found = collectives(step)
    if allocation == "bisect":
        assert {operation for operation, _ in found} == {"all-reduce"}
        assert max(size for _, size in found) == 1
    elif units == "element":  # so the assertions above can fail
        assert max(n for operation, n in found if operation == "all-gather") > 1000


# Explicit sharding: shardings are part of types, the default from JAX 0.9 on.


@pytest.mark.parametrize(
    "units, allocation, compiled, context",
    [
        pytest.param("element", "bisect", "jit", "no mesh", marks=pytest.mark.slow),
        ("element", "argsort", "jit", "mesh"),
        ("axes", "argsort", "jit", "no mesh"),
        ("leaf", "argsort", "eager", "no mesh"),
    ],
)
def test_explicit_sharding(units, allocation, compiled, context):
    """With the mesh set, or brought along by the arrays; types must not move."""
    tx = around_adam(units=AXES if units == "axes" else units, allocation=allocation)
    grads = [random_tree(10 + t) for t in range(STEPS)]
    step = functools.partial(step_with, tx)
    step = jax.jit(step) if compiled == "jit" else step
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with jax.set_mesh(mesh) if context == "mesh" else contextlib.nullcontext():
        history = run_explicit(tx, step, mesh, grads)
    assert_same(history, on_one_device(units)(grads))


def run_explicit(tx, step, mesh, all_grads):
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    params = jax.device_put(random_tree(0), shardings)
    state = tx.init(params)
    counts = optax.tree.get(state, "PriorityPropState").counts
    if isinstance(counts, dict):
        assert types(counts) == types(jax.tree.map(jnp.int32, params))
    history = []
    for grads in all_grads:
        before = types((params, state))
        params, state = step(params, state, jax.device_put(grads, shardings))
        assert types((params, state)) == before
        history.append(jax.device_get((params, quotas_of(state))))
    return history


def types(tree):
    """Without the mesh, which new numbers have only where one is set."""

    def describe(x):
        kind = jax.typeof(x)
        return kind.str_short(), kind.weak_type, kind.sharding.spec

    return jax.tree.map(describe, tree)

"""Placement: params, state and batches are where they belong, and stay there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from priorityprop_jax import make_train_step, prioritize, priority_prop
from priorityprop_jax.training._placement import batch_size, Placement


def mesh_of(*shape, names=("data", "model")):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, names[: len(shape)])


PARAMS = {
    "in": {"w": np.ones((8, 16), np.float32), "b": np.zeros(16, np.float32)},
    "out": {"w": np.ones((16, 3), np.float32), "b": np.zeros(3, np.float32)},
}
FSDP = {"in": {"w": P(None, "data"), "b": P("data")}, "out": {"w": P("data"), "b": P()}}
SPECS = {
    "in": {"w": P(None, "model"), "b": None},
    "out": {"w": P(("data", "model")), "b": P()},
}


def specs_of(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def is_spec(x):
    return x is None or isinstance(x, P)


def whole(tree):
    return jax.tree.map(lambda _: P(), tree)


@pytest.mark.parametrize(
    ("mesh", "sharding", "expected"),
    [
        (mesh_of(4), None, whole(PARAMS)),
        (mesh_of(4), "replicated", whole(PARAMS)),
        (mesh_of(4), "fsdp", FSDP),
        (mesh_of(2, 4), SPECS, SPECS),
        (mesh_of(2, 4), {"in": P(), "out": SPECS["out"]}, SPECS | {"in": None}),
        (mesh_of(2, 4), lambda path, x: P("model") if x.ndim > 1 else None, None),
    ],
    ids=["none", "replicated", "fsdp", "specs", "prefix", "function"],
)
def test_params(mesh, sharding, expected):
    placement = Placement(mesh, sharding)
    params = placement.tree(PARAMS)
    if expected is None:
        rule = lambda x: P("model") if np.ndim(x) > 1 else P()
        expected = jax.tree.map(rule, PARAMS)
    if "in" in expected and expected["in"] is None:
        expected = expected | {"in": whole(PARAMS["in"])}
    expected = jax.tree.map(lambda s: s or P(), expected, is_leaf=is_spec)
    same = jax.tree.map(
        lambda x, spec: x.sharding.is_equivalent_to(
            NamedSharding(placement.mesh, spec), x.ndim
        ),
        params,
        expected,
    )
    assert all(jax.tree.leaves(same)), specs_of(params)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert jax.tree.map(lambda x: x.sharding, params) == placement.shardings(PARAMS)


def test_named_shardings_bring_a_mesh():
    mesh = mesh_of(4)
    placement = Placement(sharding={"w": NamedSharding(mesh, P("data")), "b": None})
    params = placement.tree({"w": np.ones(8), "b": np.ones(3)})
    assert specs_of(params) == {"w": P("data"), "b": P()}
    assert placement.multiple == 4


def test_fsdp_takes_the_largest_axis_that_divides():
    shapes = [(), (3,), (8, 8), (4, 12), (12, 6), (0, 3), (3, 5, 8)]
    params = Placement(mesh_of(4), "fsdp").tree([np.ones(s) for s in shapes])
    found = [tuple(p.sharding.spec) for p in params]
    d = "data"
    assert found == [(), (), (d,), (None, d), (d,), (), (None, None, d)]


def test_explicit_mesh():
    """By default, a model is not bothered with shardings that are part of types."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    placement = Placement(mesh, "fsdp")
    assert placement.mesh.axis_types == (AxisType.Auto,)
    w, x = placement.tree(np.ones((8, 4))), placement.batch(np.ones((8, 8)))
    assert jax.jit(lambda w, x: (x @ w).sum())(w, x) == 256  # ambiguous with types
    with jax.set_mesh(mesh):
        placement = Placement(mesh)
        assert placement.mesh.axis_types == (AxisType.Explicit,)
        w, x = placement.tree(np.ones((8, 4))), placement.batch(np.ones((8, 8)))
        assert jax.jit(lambda w, x: (x @ w).sum())(w, x) == 256


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("data",), TypeError, "mesh must be a jax.sharding.Mesh"),
        ((mesh_of(2), "zero"), ValueError, "sharding must be None, 'replicated', 'fs"),
        ((None, "fsdp"), ValueError, "sharding='fsdp' needs a mesh"),
        ((None, {"w": P("data")}), ValueError, "needs a mesh"),
        ((None, lambda path, x: P()), ValueError, "needs a mesh"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        Placement(*args)


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        ({"in": P(), "oud": P()}, ValueError, "sharding must have the structure of"),
        (
            lambda path, x: P("date") if path == "['out']['b']" else None,
            ValueError,
            r"params\['out'\]\['b'\] names the axis 'date', the mesh has 'data', 'mo",
        ),
        (
            lambda path, x: P("data"),
            ValueError,
            r"axis 0 of params\['out'\]\['b'\] of shape \(3,\) .* over 2 devices",
        ),
        (
            {"in": {"w": P(), "b": P(None, "data")}, "out": P()},
            ValueError,
            r"params\['in'\]\['b'\] of shape \(16,\) has 2 axes",
        ),
        (lambda path, x: "data", TypeError, r"params\['in'\]\['b'\] must be a Part"),
    ],
)
def test_sharding_that_does_not_fit(sharding, error, message):
    with pytest.raises(error, match=message):
        Placement(mesh_of(2, 4), sharding).tree(PARAMS)


@pytest.mark.parametrize("mesh", [None, mesh_of(4)], ids=["one", "mesh"])
@pytest.mark.parametrize("kind", ["jax", "numpy", "key", "placed"])
def test_donating_the_copy_leaves_the_original(mesh, kind):
    placement = Placement(mesh)
    given = {
        "jax": jnp.arange(8.0),
        "numpy": np.arange(8.0, dtype=np.float32),
        "key": jax.random.split(jax.random.key(3), 8),
        "placed": placement.tree(np.arange(8.0)),
    }[kind]
    before = np.array(jax.random.key_data(given) if kind == "key" else given)
    for put in (placement.tree, placement.replicate):
        copy = put({"x": given})["x"]
        assert copy.dtype == given.dtype
        spoil = lambda x: jax.random.clone(x) if kind == "key" else x + 1
        jax.block_until_ready(jax.jit(spoil, donate_argnums=0)(copy))
        after = jax.random.key_data(given) if kind == "key" else given
        np.testing.assert_array_equal(after, before)


def test_default_device():
    with jax.default_device(jax.devices()[2]):
        placement = Placement()
    # also from a thread that has not heard of it
    for x in (placement.batch(np.ones(3)), placement.tree(jnp.ones(3))):
        assert x.devices() == {jax.devices()[2]}
    taken = jax.jit(lambda x: x)(Placement().batch(np.ones(3)))
    assert taken.devices() == {jax.devices()[0]}


def test_batches_for_the_cpu_stay_on_the_host():
    """Copies, as a loader may use its memory again; and of the types that jit makes."""
    given = {"x": np.ones(3), "n": 2, "device": jnp.ones(2)}
    batch = Placement().batch(given)
    assert isinstance(batch["x"], np.ndarray) and batch["x"].dtype == np.float32
    assert batch["n"].dtype == np.int32 and batch["device"] is given["device"]
    same = np.ones(3, np.float32)
    assert not np.shares_memory(Placement().batch(same), same)


def test_memory_of_its_own():
    """Also for what lies where XLA could use it as it is."""
    room = np.zeros(64 + 256, np.uint8)
    start = -room.ctypes.data % 64
    aligned = room[start : start + 256].view(np.float32)
    for placement in (Placement(), Placement(mesh_of(4))):
        x = placement.tree({"w": aligned})["w"]
        found = {s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
        assert len(found) == len(x.addressable_shards)
        assert aligned.ctypes.data not in found


# Batches.


def test_batch():
    placement = Placement(mesh_of(4, 2))
    assert placement.multiple == 4
    batch = {"x": np.ones((8, 3)), "y": np.ones(8, np.int64), "n": 3.0, "c": np.ones(5)}
    out = placement.batch(batch)
    assert specs_of(out) == {"x": P("data"), "y": P("data"), "n": P(), "c": P()}
    assert out["x"].dtype == jnp.float32 and out["y"].dtype == jnp.int32
    assert batch_size(batch) == 8
    odd = placement.batch({"x": np.ones((6, 3)), "y": np.ones(6)})
    assert specs_of(odd) == {"x": P(), "y": P()}
    assert placement.batch((np.ones(4), None))[1] is None
    assert Placement().multiple == 1
    placement.same("anything", 3)  # nobody to compare with


def test_keys_in_a_batch():
    keys = jax.random.split(jax.random.key(0), 8)
    out = Placement(mesh_of(4)).batch((np.ones(8), keys, jax.random.key(1)))
    assert out[1].sharding.spec == P("data")
    assert (jax.random.key_data(out[1]) == jax.random.key_data(keys)).all()
    assert out[2].is_fully_replicated


# Optimizer state.


OPTIMIZERS = {
    "prioritize adam": lambda: prioritize(optax.adam(1e-2), budget=0.5),
    "chain": lambda: optax.chain(priority_prop(budget=0.5), optax.adam(1e-2)),
    "elements": lambda: prioritize(
        optax.adam(1e-2), budget=0.5, units="element", allocation="bisect"
    ),
    "random": lambda: prioritize(optax.sgd(1e-2, 0.9), budget=0.5, score="random"),
    "masked": lambda: optax.chain(
        priority_prop(budget=0.5),
        optax.masked(optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),  # params in it
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


@pytest.mark.parametrize("mesh", [None, mesh_of(4)], ids=["one", "mesh"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state(mesh, name):
    tx = OPTIMIZERS[name]()
    placement = Placement(mesh, mesh and "fsdp")
    params = placement.tree(PARAMS)
    state, plain = placement.init(tx, params), tx.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    values = lambda x: jax.random.key_data(x) if is_key(x) else x
    compare = lambda a, b: np.testing.assert_array_equal(values(a), values(b))
    jax.tree.map(compare, state, plain)
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves((params, state))
        if x.size
        for shard in values(x).addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)  # all may be donated
    if mesh is None:
        return
    shardings = placement.state_shardings(plain, PARAMS)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    again = placement.state(plain, params)
    assert jax.tree.map(lambda x: x.sharding, again) == shardings
    # What has the shape of a param, and only that, is split like it.
    shapes = {np.shape(p): s for p, s in zip(*map(leaves, (PARAMS, FSDP)), strict=True)}
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        factor = "v_row" in name or "v_col" in name  # as long as another param
        assert x.sharding.spec == (P() if factor else shapes.get(x.shape, P())), name
    assert any(not x.is_fully_replicated for x in leaves(state))


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=is_spec)


def is_key(x):
    return jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)


def test_state_of_nnx_params():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    placement = Placement(mesh_of(4), "fsdp")
    params = placement.tree(params)
    state = placement.init(prioritize(optax.adam(1e-2), budget=0.5), params)
    (mu,) = [x for x in jax.tree.leaves(state.inner[0].mu) if x.ndim == 2]
    assert mu.sharding.spec == P(None, "data")
    assert state.priority.counts.is_fully_replicated


# Steps.


def loss_fn(params, x, y):
    x = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
    return jnp.mean((x @ params["out"]["w"] + params["out"]["b"][None] - y) ** 2)


def random_params():
    rng = np.random.default_rng(0)
    draw = lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.3
    return jax.tree.map(draw, PARAMS)


def train(placement, tx, mode, steps=12):
    rng = np.random.default_rng(1)
    params = placement.tree(random_params())
    state = placement.init(tx, params)
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    step, losses = make_train_step(loss_fn, placement.constrain(tx), mode), []
    for _ in range(steps):
        batch = rng.normal(size=(8, 8)), rng.normal(size=(8, 3))
        params, state, metrics = step(params, state, *placement.batch(batch))
        after = jax.tree.map(lambda x: x.sharding, (params, state))
        if placement.mesh is not None:
            assert after == before
        losses.append(float(metrics.loss))
    return losses, jax.device_get((params, state)), step


TENSORS = {"in": {"w": P(None, "model"), "b": P("model")}, "out": P()}


@pytest.mark.parametrize(
    ("mesh", "sharding"),
    [(mesh_of(8), None), (mesh_of(8), "fsdp"), (mesh_of(2, 4), TENSORS)],
    ids=["data parallel", "fsdp", "tensors"],
)
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_steps_are_as_on_one_device(mesh, sharding, mode, quick_compilation):
    """And params and state are where they were, so that nothing is compiled twice."""
    tx = prioritize(optax.adam(1e-2), budget=0.4, recalc_every=4, max_updates=4)
    expected, (params, state), _ = train(Placement(), tx, mode)
    losses, (other_params, other_state), step = train(
        Placement(mesh, sharding), tx, mode
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, other_params, params)
    quotas = state.priority.quotas
    np.testing.assert_array_equal(other_state.priority.quotas, quotas)
    assert quotas.min() < quotas.max()
    programs = [step._dynamic] if mode == "dynamic" else step.variants.values()
    assert all(program._cache_size() == 1 for program in programs)


def test_hold():
    placement = Placement(mesh_of(4))
    x = placement.batch(np.arange(8.0))
    free = jax.jit(lambda x: {"x": x * 2})(x)
    held = jax.jit(lambda x: placement.hold({"x": x * 2}))(x)
    assert specs_of(free) == {"x": P("data")}  # else there is nothing to hold
    assert specs_of(held) == {"x": P()}
    np.testing.assert_array_equal(held["x"], free["x"])
    placement.wait(held)
    one = Placement()
    assert one.hold(x) is x and one.wait(x) is None

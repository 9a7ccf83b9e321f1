"""`backward_costs` against XLA's own count, and against arithmetic by hand."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from priorityprop_jax import _flops, _measured
from priorityprop_jax._costs import backward_costs, BackwardCosts


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Case(NamedTuple):
    loss: Callable[..., Any]
    params: Any
    args: tuple
    has_aux: bool = False


def cross_entropy(logits, labels):
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * one_hot, axis=-1))


def mlp():
    sizes = [64, 96, 96, 80, 10]
    shapes = zip(sizes, sizes[1:], strict=False)
    params = [{"w": struct(a, b), "b": struct(1, b)} for a, b in shapes]

    def loss(params, x, labels):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], labels)

    return Case(loss, params, (struct(64, 64), struct(64, dtype=jnp.int32)))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (64, 64):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(64, (3, 3), strides=(2, 2))(x))
        x = nn.avg_pool(x, (2, 2)).reshape(len(x), -1)
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(10)(x)


def cnn():
    model, x, key = ConvNet(), struct(4, 12, 12, 32), jax.random.key(0)
    init = lambda x: model.init({"params": key, "dropout": key}, x)
    variables = jax.eval_shape(init, x)

    def loss(params, stats, x, labels, key):
        variables = {"params": params, "batch_stats": stats}
        rngs = {"dropout": key}
        logits, new = model.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
        return cross_entropy(logits, labels), new

    args = (variables["batch_stats"], x, struct(4, dtype=jnp.int32), key)
    return Case(loss, variables["params"], args, has_aux=True)


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    scaled = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return scaled * p["scale"][None, None] + p["bias"][None, None]


def transformer():
    width, heads, length, batch, words = 128, 2, 16, 2, 64
    norm = {"scale": struct(width), "bias": struct(width)}
    layer = {
        "norms": [norm, norm],
        "qkv": struct(width, 3 * width),
        "out": struct(width, width),
        "up": struct(width, 4 * width),
        "down": struct(4 * width, width),
    }
    params = {"embed": struct(words, width), "layers": [layer] * 2, "norm": norm}
    params["positions"] = struct(length, width)

    def attention(p, x):
        shape = (batch, length, heads, 3 * width // heads)
        q, k, v = jnp.split((x @ p["qkv"]).reshape(shape), 3, -1)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        return mixed.reshape(x.shape) @ p["out"]

    def loss(params, tokens):
        x = params["embed"][tokens] + params["positions"][None]
        activations = [jax.nn.gelu, jax.nn.relu]
        for p, activation in zip(params["layers"], activations, strict=True):
            x = x + attention(p, layer_norm(p["norms"][0], x))
            x = x + activation(layer_norm(p["norms"][1], x) @ p["up"]) @ p["down"]
        logits = layer_norm(params["norm"], x) @ params["embed"].T
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    return Case(loss, params, (struct(batch, length, dtype=jnp.int32),))


CASES = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


@functools.cache
def case_and_costs(name):
    case = CASES[name]()
    return case, backward_costs(
        case.loss, case.params, *case.args, has_aux=case.has_aux
    )


def subtree_loss(case, mask):
    """The loss as a function of the active leaves, and of the rest."""
    treedef = jax.tree.structure(case.params)

    def loss(active, resting, *args):
        active, resting = iter(active), iter(resting)
        leaves = [next(active) if on else next(resting) for on in mask]
        return case.loss(jax.tree.unflatten(treedef, leaves), *args)

    leaves = jax.tree.leaves(case.params)
    active = [x for x, on in zip(leaves, mask, strict=True) if on]
    return loss, active, [x for x, on in zip(leaves, mask, strict=True) if not on]


def xla_flops(case, mask):
    loss, active, resting = subtree_loss(case, mask)
    program = jax.value_and_grad(loss, has_aux=case.has_aux) if any(mask) else loss
    compiled = jax.jit(program).lower(active, resting, *case.args).compile()
    return compiled.cost_analysis()["flops"]


def masks_of(costs):
    n = len(costs.paths)
    rng = np.random.default_rng(n)
    near = np.argsort(costs.chain, kind="stable")
    masks = {"none": np.zeros(n, bool), "all": np.ones(n, bool)}
    masks["near the loss"] = np.isin(np.arange(n), near[: n // 2])
    masks["farthest"] = np.arange(n) == near[-1]
    masks["one"] = np.arange(n) == near[n // 3]
    masks["random"] = rng.random(n) < 0.4
    return masks


@pytest.mark.parametrize("mask", ["none", "all", "near the loss", "farthest", "random"])
@pytest.mark.parametrize("name", CASES)
def test_xla_counts_the_same(name, mask):
    case, costs = case_and_costs(name)
    mask = masks_of(costs)[mask]
    assert costs.flops(mask) == pytest.approx(xla_flops(case, mask), rel=0.02)


SINGLE = {
    "reductions": lambda x: x.sum(0) + x.max() + (x > 0).all(0),
    "argmax": lambda x: jnp.argmax(x, axis=1).astype(x.dtype),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "elementwise": lambda x: jax.nn.swish(x) ** 3 + lax.rem(x, 2 * x),
    "random": lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    "unpooling": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (3, 3), (1, 1), "SAME"
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_xla_counts_single_operations_the_same(name):
    total = lambda x: jnp.sum(SINGLE[name](x))
    fun = jax.grad(total) if name == "unpooling" else total
    expected = jax.jit(fun).lower(struct(32, 16)).compile().cost_analysis()["flops"]
    costs = backward_costs(lambda params, x: jnp.max(fun(x)), {}, struct(32, 16))
    assert costs.forward == pytest.approx(expected, rel=0.1)


# Tracing for all leaves tells what a trace for some of them has.


def remat(policy=None):
    def loss(params, x):
        def block(x, pair):
            return jnp.tanh(jnp.tanh(x @ pair[0]) @ pair[1])

        for pair in (params[:2], params[2:]):
            x = jax.checkpoint(block, policy=policy)(x, pair)
        return jnp.sum(x)

    return Case(loss, [struct(8, 8)] * 4, (struct(4, 8),))


def stack(length=3):
    def loss(params, x):
        body = lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None)
        h, _ = lax.scan(body, x @ params["in"], params["stack"])
        return jnp.sum(h @ params["out"])

    layers = {"w": struct(length, 8, 8), "b": struct(length, 1, 8)}
    params = {"in": struct(8, 8), "out": struct(8, 8), "stack": layers}
    return Case(loss, params, (struct(4, 8),))


def recurrent():
    def loss(params, xs):
        step = lambda h, x: (jnp.tanh(x @ params["in"] + h @ params["hidden"]), h)
        h, states = lax.scan(step, params["start"], xs)
        return jnp.sum(h @ params["out"]) + jnp.mean(states**2)

    params = {name: struct(8, 8) for name in ("in", "hidden", "out")}
    return Case(loss, {**params, "start": struct(4, 8)}, (struct(5, 4, 8),))


def branches():
    def loss(params, x, flag):
        deep = lambda x: jnp.sin(x @ params["a"]) @ params["b"]
        h = lax.cond(flag, deep, lambda x: x * params["c"], x @ params["first"])
        return jnp.sum(h @ params["last"])

    params = {name: struct(8, 8) for name in ("a", "b", "first", "last")}
    params["c"] = struct(1, 8)
    return Case(loss, params, (struct(4, 8), struct(dtype=bool)))


def mapped():
    case = mlp()
    loss = lambda p, x, y: jax.vmap(case.loss, (None, 0, 0))(p, x, y).mean()
    args = (struct(2, 3, 64), struct(2, 3, dtype=jnp.int32))
    return Case(loss, case.params, args)


@jax.custom_vjp
def matmul(x, w):
    return x @ w


matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def custom():
    def loss(params, x):
        for w in params:
            x = jnp.sin(matmul(x, w))
        return jnp.sum(x)

    return Case(loss, [struct(8, 8)] * 3, (struct(4, 8),))


VARIANTS = {
    **CASES,
    "remat": remat,
    "remat dots": lambda: remat(jax.checkpoint_policies.dots_saveable),
    "stack": stack,
    "recurrent": recurrent,
    "branches": branches,
    "vmap": mapped,
    "custom_vjp": custom,
    "jit": lambda: mlp()._replace(loss=jax.jit(mlp().loss)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_costs_of_a_selection_are_those_of_its_own_program(name):
    case = VARIANTS[name]()
    costs = backward_costs(case.loss, case.params, *case.args, has_aux=case.has_aux)
    for mask in masks_of(costs).values():
        loss, active, resting = subtree_loss(case, mask)
        args = (resting, *case.args)
        own = backward_costs(loss, active, *args, has_aux=case.has_aux)
        assert own.full == pytest.approx(costs.flops(mask), rel=1e-3), mask


# By hand.


def test_mlp_by_hand():
    batch, sizes = 32, [7, 11, 13, 5]
    params = [struct(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]

    def loss(params, x):
        for w in params:
            x = x @ w
        return x[0, 0]  # no arithmetic

    costs = backward_costs(loss, params, struct(batch, 7))
    f = [2 * batch * a * b for a, b in zip(sizes, sizes[1:], strict=False)]
    assert costs.forward == sum(f)
    np.testing.assert_array_equal(costs.weight, f)
    np.testing.assert_array_equal(costs.chain, [f[1] + f[2], f[2], 0])
    assert costs.full == 3 * sum(f) - f[0]
    for bits in range(1, 8):
        mask = np.array([bits >> i & 1 for i in range(3)], bool)
        lowest = int(np.argmax(mask))
        by_hand = sum(f) + sum(f[lowest + 1 :]) + np.array(f) @ mask
        assert costs.flops(mask) == by_hand
    assert costs.flops(np.zeros(3, bool)) == sum(f)


def test_own_gradients_by_hand():
    # A scale, a bias and a matmul: the sums and products that belong to each alone.
    def loss(params, x):
        return jnp.sum(jnp.sin((x @ params["w"]) * params["s"] + params["b"]))

    params = {"w": struct(3, 4), "s": struct(1, 4), "b": struct(1, 4)}
    costs = backward_costs(loss, params, struct(5, 3))
    own = dict(zip(costs.paths, costs.weight.tolist(), strict=True))
    assert own["params['b']"] == 5 * 4 - 4
    assert own["params['s']"] == 5 * 4 + 5 * 4 - 4
    assert own["params['w']"] == 2 * 5 * 3 * 4


def test_tied_weights_pay_for_both_uses():
    def loss(p, ids):
        return jnp.sum(jnp.sin(jnp.sin(p["e"][ids]) @ p["w"]) @ p["e"].T)

    params = {"e": struct(9, 4), "w": struct(4, 4)}
    costs = backward_costs(loss, params, struct(6, dtype=jnp.int32))
    # The matmul with the table, scattering into it, and the sum of both.
    assert costs.weight[0] == 2 * 6 * 4 * 9 + 6 * 4 + 9 * 4


@pytest.mark.parametrize(
    "kind, expected",
    [
        (dict(window_strides=(1,), padding="VALID"), 4 * 3),
        (dict(window_strides=(1,), padding="SAME"), 6 * 3 - 2),
        (dict(window_strides=(2,), padding="SAME"), 3 * 3 - 1),
        (dict(window_strides=(1,), padding="VALID", rhs_dilation=(2,)), 2 * 3),
        # Holes between the elements of the image: two products and one by turns.
        (dict(window_strides=(1,), padding=[(0, 0)], lhs_dilation=(2,)), 5 * 2 + 4),
    ],
    ids=["valid", "same", "strided", "dilated", "transposed"],
)
def test_convolution_by_hand(kind, expected):
    conv = lambda x, k: lax.conv_general_dilated(
        x, k, dimension_numbers=("NWC", "WIO", "NWC"), **kind
    )
    (eqn,) = jax.make_jaxpr(conv)(struct(2, 6, 3), struct(3, 3, 5)).jaxpr.eqns
    assert _flops.flops_of(eqn) == 2 * 2 * 3 * 5 * expected


def test_ragged_matmul_by_hand():
    # Every row is multiplied by the matrix of its group, and by no other.
    params, x, sizes = struct(3, 4, 5), struct(7, 4), struct(3, dtype=jnp.int32)
    loss = lambda params, x, sizes: lax.ragged_dot(x, params, sizes)[0, 0]
    costs = backward_costs(loss, params, x, sizes)
    assert costs.forward == costs.weight[0] == 2 * 7 * 4 * 5


def test_traffic_counts_reads_and_writes():
    params = {"a": struct(3, 4), "b": struct(5, dtype=jnp.bfloat16)}
    loss = lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"].astype(jnp.float32))
    for copies, passes in [(2, 7), (1, 5), (0, 3)]:
        costs = backward_costs(loss, params, state_per_param=copies)
        np.testing.assert_array_equal(costs.traffic, [48 * passes, 10 * passes])


def test_scan_counts_every_iteration():
    full = {}
    for length in (2, 3, 10):
        case = stack(length)
        full[length] = backward_costs(case.loss, case.params, *case.args).full
    body = full[3] - full[2]
    assert full[10] == full[2] + 8 * body
    # XLA counts the body of a loop once.
    assert xla_flops(stack(3), [True] * 4) == pytest.approx(full[2] - body, rel=0.02)


def test_shard_map_counts_one_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(params, x):
        local = lambda p, x: lax.pmean(jnp.sum(jnp.sin(x @ p[0]) @ p[1]), "data")
        spec = jax.sharding.PartitionSpec
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()
        )
        return mapped(params, x)

    costs = backward_costs(loss, [struct(64, 64)] * 2, struct(32, 64))
    case = Case(loss, [struct(64, 64)] * 2, (struct(32, 64),))
    assert costs.full == pytest.approx(xla_flops(case, [True, True]), rel=0.02)
    matmul = 2 * 16 * 64 * 64
    np.testing.assert_allclose(costs.weight, matmul, rtol=0.1)  # and a sum
    np.testing.assert_allclose(costs.chain, [matmul, 0], atol=0.1 * matmul)


def test_while_counts_one_iteration_and_cond_the_dearest_branch():
    def loop(params, x):
        frozen = lax.stop_gradient(params["w"])
        x = lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ frozen, x)
        return (x @ params["w"])[0, 0]

    costs = backward_costs(loop, {"w": struct(8, 8)}, struct(4, 8))
    assert costs.forward == 2 * 2 * 4 * 8 * 8 + 1  # and the comparison
    case = branches()
    costs = backward_costs(case.loss, case.params, *case.args)
    assert costs.forward == pytest.approx(4 * 2 * 4 * 8 * 8, rel=0.05)


def test_aux_is_part_of_the_forward_pass():
    params, x = {"w": struct(8, 8)}, struct(4, 8)
    loss = lambda p, x: (x @ p["w"])[0, 0]
    with_aux = lambda p, x: (loss(p, x), {"y": (x @ x.T, "not an array")[0]})
    plain = backward_costs(loss, params, x)
    extra = backward_costs(with_aux, params, x, has_aux=True)
    assert extra.forward == plain.forward + 2 * 4 * 4 * 8
    assert extra.full == plain.full + 2 * 4 * 4 * 8


# Algebra.


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_more_leaves_cost_more(name, data):
    _, costs = case_and_costs(name)
    n = len(costs.paths)
    mask = st.lists(st.booleans(), min_size=n, max_size=n).map(np.array)
    a, b = data.draw(mask), data.draw(mask)
    both, either = costs.flops(a & b), costs.flops(a | b)
    assert costs.forward <= both <= min(costs.flops(a), costs.flops(b))
    assert max(costs.flops(a), costs.flops(b)) <= either <= costs.full
    # What a leaf adds shrinks as others are there (the cost is submodular).
    assert both + either <= costs.flops(a) + costs.flops(b) + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_pieces_add_up(name):
    _, costs = case_and_costs(name)
    n = len(costs.paths)
    assert costs.flops(np.zeros(n, bool)) == costs.forward
    total = costs.forward + costs.weight.sum() + costs.groups.sum()
    assert costs.full == pytest.approx(total)
    for i, alone in enumerate(np.eye(n, dtype=bool)):
        backward = costs.weight[i] + costs.chain[i]
        assert costs.flops(alone) == pytest.approx(costs.forward + backward)
    assert (costs.groups > 0).all() and costs.members.any(axis=1).all()
    assert len({row.tobytes() for row in costs.members}) == len(costs.groups)


def test_masks_may_be_trees():
    case, costs = case_and_costs("mlp")
    mask = np.arange(8) > 5
    tree = jax.tree.unflatten(jax.tree.structure(case.params), mask.tolist())
    assert costs.flops(tree) == costs.flops(mask) == costs.flops(jnp.asarray(mask))


# Measured.


def test_measured_has_the_same_structure():
    params = [jnp.ones((8, 8))] * 3
    loss = lambda params, x: jnp.sum(x @ params[0] @ params[1] @ params[2])
    args = (params, jnp.ones((4, 8)))
    counted = backward_costs(loss, *args)
    timed = backward_costs(loss, *args, measure=1, optimizer=optax.adam(1e-3))
    assert timed.unit == "ms" and timed.paths == counted.paths
    np.testing.assert_array_equal(timed.members, counted.members)
    np.testing.assert_array_equal(timed.traffic, counted.traffic)
    assert timed.forward > 0 and (timed.weight > 0).all() and (timed.groups >= 0).all()
    assert "weight ms" in str(timed)


def test_times_are_spread_in_proportion_to_flops():
    _, costs = case_and_costs("transformer")
    masks = _measured.growing_sets(costs)
    flops = [costs.flops(mask) for mask in masks]
    assert not masks[0].any() and masks[-1].all() and 4 < len(masks) < 11
    assert all((a <= b).all() for a, b in zip(masks, masks[1:], strict=False))
    # If a FLOP takes a nanosecond everywhere, all costs are their FLOPs.
    timed = _measured.spread(costs, masks, np.array(flops) * 1e-6)
    np.testing.assert_allclose(timed.weight, costs.weight * 1e-6)
    np.testing.assert_allclose(timed.groups, costs.groups * 1e-6)
    # And what was measured comes back in any case.
    times = np.sort(np.random.default_rng(0).random(len(masks)))
    timed = _measured.spread(costs, masks, times)
    np.testing.assert_allclose([timed.flops(mask) for mask in masks], times)


# The interface.


def test_prints_and_becomes_json():
    _, costs = case_and_costs("cnn")
    lines = str(costs).splitlines()
    assert len(lines) == len(costs.paths) + 2 and len(set(map(len, lines[:-1]))) == 1
    assert lines[1].startswith("params['BatchNorm_0']['bias']")
    read = json.loads(json.dumps(costs.to_dict()))
    assert read["paths"] == list(costs.paths) and read["full"] == costs.full
    rebuilt = BackwardCosts(
        **{k: v for k, v in read.items() if k in BackwardCosts._fields}
    )
    assert rebuilt.forward == costs.forward and rebuilt.members == (
        costs.members.tolist()
    )


def test_a_leaf_that_never_reaches_the_loss_costs_nothing():
    params = {"lost": struct(8, 8), "w": struct(8, 8)}
    loss = lambda p, x: jnp.sum(x @ p["w"]) + 0 * jnp.sum(x @ x.T)
    costs = backward_costs(loss, params, struct(4, 8))
    assert costs.weight[0] == costs.chain[0] == 0
    assert costs.flops([True, False]) == costs.forward


def test_no_leaves():
    costs = backward_costs(lambda params, x: jnp.sum(x), {}, struct(4, 8))
    assert costs.paths == () and costs.full == costs.flops([]) == 4 * 8 - 1
    assert "forward 31 FLOPs" in str(costs)


def test_what_is_no_array_stays_as_it_is():
    def loss(params, x, activation, *, train, name):
        assert train is True and name == "a"
        return jnp.sum(activation(x @ params["w"])) * params["scale"]

    params = {"w": struct(8, 8), "scale": 0.5}
    costs = backward_costs(loss, params, struct(4, 8), jnp.tanh, train=True, name="a")
    assert costs.paths == ("params['scale']", "params['w']")


def test_nothing_is_executed():
    big = 10**7
    loss = lambda p, x: jnp.sum(x @ p)
    costs = backward_costs(loss, struct(big, big), x=struct(big, big))
    assert costs.paths == ("params",) and costs.weight[0] == 2.0 * big**3


LOSS = lambda params, x: jnp.sum(x @ params["w"])
X = struct(4, 8)


@pytest.mark.parametrize("bad", [struct(8, 8, dtype=int), struct(8, dtype=bool), 3])
def test_params_that_have_no_gradient(bad):
    with pytest.raises(TypeError, match=r"params\['n'\] must be a floating array"):
        backward_costs(LOSS, {"w": struct(8, 8), "n": bad}, X)
    with pytest.raises(TypeError, match=r"params\['key'\] must be a floating array"):
        backward_costs(LOSS, {"w": struct(8, 8), "key": jax.random.key(0)}, X)


def test_functions_without_a_scalar_output():
    with pytest.raises(TypeError, match="only defined for scalar-output functions"):
        backward_costs(lambda params, x: x @ params["w"], {"w": struct(8, 8)}, X)


@pytest.mark.parametrize(
    "error, match, kwargs",
    [
        (ValueError, r"measure must be in \[0, .*got -1", dict(measure=-1)),
        (ValueError, "state_per_param must be >= 0", dict(state_per_param=-1)),
        (ValueError, "optimizer is only timed with", dict(optimizer=optax.sgd(1.0))),
        (ValueError, "measure runs fun and needs arrays", dict(measure=1)),
    ],
)
def test_arguments_that_cannot_be_meant(error, match, kwargs):
    with pytest.raises(error, match=match):
        backward_costs(LOSS, {"w": struct(8, 8)}, X, **kwargs)


def test_masks_that_cannot_be_meant():
    costs = backward_costs(LOSS, {"w": struct(8, 8)}, X)
    with pytest.raises(ValueError, match="a bool for each of the 1 leaves, got 2"):
        costs.flops([True, False])
    with pytest.raises(TypeError, match=r"active must hold bools, got \[1\]"):
        costs.flops([1])

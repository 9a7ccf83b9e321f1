"""Depths derived by hand, by counting in random programs, and by unrolling loops."""

import random
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax._depth import infer_depths


KEY = jax.random.key(0)


def by_module(depths):
    """The depth of each module, all of whose parameters must agree."""
    found = {}
    for path, depth in jax.tree_util.tree_leaves_with_path(depths):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        found.setdefault(name.removeprefix("params/"), set()).add(depth)
    assert all(len(depths) == 1 for depths in found.values())
    return {name: depths.pop() for name, depths in found.items()}


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ones(*shape):
    return np.ones(shape, np.float32)


# Models: what is expected is counted from the last layer, which has depth 0.


class MLP(nn.Module):
    layers: int = 2
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(self.layers - 1):
            x = nn.Dense(4)(x)
            x = nn.LayerNorm()(x) if self.norm else x
            x = nn.relu(x)
        return nn.Dense(2)(x)


class ConvNet(nn.Module):
    """Stem (4), batch norm (3), residual block of two convs (2 and 1), head (0)."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        y = nn.relu(nn.Conv(3, (3, 3), name="conv1")(x))
        x = x + nn.Conv(3, (3, 3), name="conv2")(y)
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


CONV_NET = {"stem": 4, "norm": 3, "conv1": 2, "conv2": 1, "head": 0}


class Transformer(nn.Module):
    """One pre-norm block with dropout, and the token embedding as output matrix."""

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(11, 4, name="embed")
        x = embed(tokens) + self.param("position", nn.initializers.ones, (1, 5, 4))
        y = nn.LayerNorm(name="norm1")(x)
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, name="attend")
        y = attention(y, mask=nn.make_causal_mask(tokens), deterministic=not train)
        x = x + y
        y = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dropout(0.1)(nn.Dense(4, name="down")(y), deterministic=not train)
        return embed.attend(nn.LayerNorm(name="norm3")(x))


TRANSFORMER = {
    "embed": 8,  # the look-up, not the output matrix, which would be 0
    "params": 8,  # the position embedding, which has no module of its own
    "norm1": 7,
    "attend/query": 6,
    "attend/key": 6,
    "attend/value": 6,
    "attend/out": 5,
    "norm2": 4,
    "up": 3,
    "down": 2,
    "norm3": 1,
}


class Recurrent(nn.Module):
    """The input of the first of five steps passes four more cells, then the head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.RNN(nn.LSTMCell(3, name="cell"))(x)
        return nn.Dense(2, name="head")(x[:, -1])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(4, name="down")(nn.relu(nn.Dense(8, name="up")(x)))
        return nn.LayerNorm(name="norm")(x), None


class Stacked(nn.Module):
    """Three blocks of three layers each, stacked along a leading axis, and a head."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        block = nn.remat(Block) if self.remat else Block
        stack = nn.scan(block, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(nn.Dense(4, name="stem")(x), None)
        return nn.Dense(2, name="head")(x)


# The first of the three blocks is two blocks, six layers, deeper than the last.
STACKED = {"stem": 10, "stack/up": 9, "stack/down": 8, "stack/norm": 7, "head": 0}

TOKENS = np.zeros((2, 5), np.int32)
LINEN = {
    "mlp": (MLP(), ones(3, 5), {"Dense_0": 2, "LayerNorm_0": 1, "Dense_1": 0}),
    "twelve": (MLP(12, False), ones(3, 5), {f"Dense_{i}": 11 - i for i in range(12)}),
    "conv": (ConvNet(), ones(2, 4, 4, 3), CONV_NET),
    "transformer": (Transformer(), TOKENS, TRANSFORMER),
    "rnn": (
        Recurrent(),
        ones(2, 5, 4),
        {"head": 0} | {f"cell/{a}{b}": 5 for a in "ih" for b in "ifgo"},
    ),
    "stacked": (Stacked(), ones(3, 5), STACKED),
    "remat": (Stacked(remat=True), ones(3, 5), STACKED),
}


@pytest.fixture(params=LINEN)
def linen(request):
    model, x, expected = LINEN[request.param]
    variables = jax.eval_shape(model.init, KEY, x)
    return model, variables, x, expected


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("data", ["arguments", "captured", "batch captured"])
def test_linen(linen, train, data):
    model, variables, x, expected = linen
    params = {"params": variables["params"]}
    rest = {k: v for k, v in variables.items() if k != "params"}
    if data == "captured":
        rest = jax.tree.map(lambda s: jnp.ones(s.shape), rest)

    def fun(params, rest, x, key):
        rngs = {"dropout": key}
        mutable = list(rest) if train else False
        return model.apply({**params, **rest}, x, train, rngs=rngs, mutable=mutable)

    if data == "arguments":
        depths = infer_depths(fun, params, rest, x, KEY)
    elif data == "captured":
        depths = infer_depths(lambda p: fun(p, rest, x, KEY), params)
    else:
        depths = infer_depths(lambda p, r, k: fun(p, r, x, k), params, rest, KEY)
    assert by_module(depths) == expected


def test_loss_with_auxiliary_outputs_does_not_count(linen):
    model, variables, x, expected = linen

    def loss_fun(params, rest, x):
        logits = model.apply({**params, **rest}, x)
        logp = jax.nn.log_softmax(logits)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return -logp[..., 0].mean() + 0.1 * penalty, {"logits": logits, "n": 1}

    params = {"params": variables["params"]}
    rest = {k: v for k, v in variables.items() if k != "params"}
    assert by_module(infer_depths(loss_fun, params, rest, x)) == expected


def test_running_statistics_among_the_params():
    model, x, expected = LINEN["conv"]
    variables = jax.eval_shape(model.init, KEY, x)
    depths = infer_depths(model.apply, variables, x)
    # The mean is subtracted from what the stem makes; the variance is part of a scale.
    assert depths["batch_stats"]["norm"] == {"mean": 4, "var": 3}
    assert by_module({"params": depths["params"]}) == expected


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        for i in range(12):
            setattr(self, f"layer{i}", nnx.Linear(4, 4, rngs=rngs))
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for i in range(12):
            x = nnx.relu(getattr(self, f"layer{i}")(x))
        return self.head(self.dropout(self.norm(x)))


NNX_NET = [*range(13, 1, -1), 1, 0]  # layer0 ... layer11, norm, head


def nnx_depths(depths):
    """The depths of the kernels and of the scale."""
    layers = [depths[f"layer{i}"]["kernel"] for i in range(12)]
    found = [*layers, depths["norm"]["scale"], depths["head"]["kernel"]]
    return [jax.tree.leaves(depth)[0] for depth in found]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nnx_state(mode):
    model = NNXNet(nnx.Rngs(0))
    getattr(model, mode)()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fun = lambda params, rest, x: nnx.merge(graphdef, params, rest)(x)
    depths = infer_depths(fun, params, rest, struct(3, 4))
    assert nnx_depths(depths) == NNX_NET
    assert jax.tree.structure(depths) == jax.tree.structure(params)


def test_nnx_whole_state_has_no_depth_for_random_keys():
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0)))
    fun = lambda state, x: nnx.merge(graphdef, state)(x)
    # In training, the running statistics reach nothing but their own next values.
    with pytest.warns(UserWarning, match=r"\['norm'\]\['mean'\]"):
        depths = infer_depths(fun, state, struct(3, 4))
    assert nnx_depths(depths) == NNX_NET
    assert not jax.tree.leaves(depths["dropout"])


def test_nnx_module():
    model = NNXNet(nnx.Rngs(0))
    model.eval()
    if jax.tree_util.all_leaves([model]):
        pytest.skip("modules are pytrees from flax 0.12 on")
    depths = infer_depths(lambda model, x: model(x), model, struct(3, 4))
    assert nnx_depths(nnx.state(depths)) == NNX_NET


class EqxNet(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(7, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = eqx.nn.MLP(4, 2, 8, 2, key=key)
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, token, key):
        return self.mlp(self.dropout(self.norm(self.embed(token)), key=key))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_equinox(batched, filtered):
    model = EqxNet(KEY)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(model, token, key):
        model = eqx.combine(model, static) if filtered else model
        return jax.vmap(model, (0, None))(token, key) if batched else model(token, key)

    token = struct(*[5] * batched, dtype=jnp.int32)
    depths = infer_depths(fun, arrays if filtered else model, token, KEY)
    assert jax.tree.structure(depths) == jax.tree.structure(arrays)
    # A token is looked up and normalized, then there are three linear layers.
    assert depths.embed.weight == 4
    assert depths.norm.weight == depths.norm.bias == 3
    assert [layer.weight for layer in depths.mlp.layers] == [2, 1, 0]
    assert [layer.bias for layer in depths.mlp.layers] == [2, 1, 0]


def test_plain_dictionary_of_modules():
    params = {f"net/~/linear_{i}": {"w": struct(4, 4)} for i in range(12)}

    def fun(params, x):
        for i in range(12):
            x = jnp.tanh(x @ params[f"net/~/linear_{i}"]["w"])
        return x

    depths = infer_depths(fun, params, struct(2, 4))
    assert depths == {f"net/~/linear_{i}": {"w": 11 - i} for i in range(12)}


# Transformations that must not matter.


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["b"]


TWO = {"a": {"w": struct(3, 3), "b": struct(1, 3)}, "b": struct(3, 3)}
TWO_DEPTHS = {"a": {"w": 1, "b": 1}, "b": 0}


def with_custom_jvp(fun):
    wrapped = jax.custom_jvp(fun)
    wrapped.defjvp(lambda primals, tangents: 1 / 0)
    return wrapped


def with_custom_vjp(fun):
    wrapped = jax.custom_vjp(fun)
    wrapped.defvjp(lambda *args: 1 / 0, lambda *args: 1 / 0)
    return wrapped


def with_cond(fun):
    shallow = lambda params, x: x @ params["b"]
    return lambda params, x: jax.lax.cond(x.sum() > 0, fun, shallow, params, x)


def with_shard_map(fun):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("i",))
    spec = jax.sharding.PartitionSpec()
    if hasattr(jax, "shard_map"):
        shard_map = jax.shard_map
    else:
        from jax.experimental.shard_map import shard_map
    total = lambda params, x: jax.lax.psum(fun(params, x), "i")
    return shard_map(total, mesh=mesh, in_specs=(spec, spec), out_specs=spec)


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_custom_jvp,
    "custom_vjp": with_custom_vjp,
    "cond": with_cond,
    "shard_map": with_shard_map,
    "barrier": lambda fun: lambda *args: fun(*jax.lax.optimization_barrier(args)),
    "device_put": lambda fun: lambda *args: fun(*jax.device_put(args)),
    "bfloat16": lambda fun: (
        lambda *args: fun(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), args))
    ),
    "created": lambda fun: lambda params, x: fun(params, jnp.ones(x.shape)),
    "stop_gradient": lambda fun: lambda *args: fun(*jax.lax.stop_gradient(args)),
}


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", ["jit", "cond", "custom_vjp"])
def test_wrappers(outer, inner):
    fun = WRAPPERS[outer](WRAPPERS[inner](two_layers))
    assert infer_depths(fun, TWO, struct(2, 3)) == TWO_DEPTHS


def test_vmap_over_stacked_params():
    params = jax.tree.map(lambda s: struct(5, *s.shape), TWO)
    fun = jax.vmap(two_layers, (0, None))
    assert infer_depths(fun, params, struct(2, 3)) == TWO_DEPTHS


# What meets what. `w`, `v` and `u` are kernels, `s` a scale, `x` is data.

W = struct(3, 3)
V = struct(1, 3)
X = struct(2, 3)
IDS = struct(2, dtype=jnp.int32)
MASK = np.tri(3, dtype=np.float32)


def running_norm(p, x, mean, var):
    h = x @ p["w"]
    return (h - mean) * (jax.lax.rsqrt(var + 1e-5) * p["s"][None]) + p["b"][None]


def attention(p, x, mask):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    scores = jnp.where(mask, q @ k.T, -jnp.inf)
    return jax.nn.softmax(scores) @ v @ p["o"]


def class_token(p, x):
    h = jnp.concatenate([p["token"], x @ p["w"]])
    return h @ p["v"]


def attention_with_dropout(p, key):
    x = jnp.ones((2, 3))
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    keep = jax.random.bernoulli(key, 0.5, (2, 2))
    return (jax.nn.softmax(q @ k.T) * keep) @ v @ p["o"]


def low_rank(p, x):
    scale = 2 / jnp.sqrt(jnp.float32(3))
    return x @ p["w"] @ ((p["a"] * scale) @ p["c"])


MEETINGS = {
    # parameters of parameters are one layer where they meet data
    "low rank": (lambda p, x: x @ (p["w"] + p["a"] @ p["c"]), "wac", [X], "w0 a0 c0"),
    "two factors": (lambda p, x: x @ p["a"] @ p["c"], "ac", [X], "a1 c0"),
    "scaled low rank": (low_rank, "wac", [X], "w1 a0 c0"),
    "weight norm": (
        lambda p, x: x @ (p["s"][None] * p["w"] / jnp.linalg.norm(p["w"])) @ p["v"],
        "swv",
        [X],
        "s1 w1 v0",
    ),
    # masks: given, captured, made in the program, random
    "masks given": (
        lambda p, x, m: x @ (p["w"] * m) @ (p["v"] * m),
        "wv",
        [X, W],
        "w1 v0",
    ),
    "masks captured": (
        lambda p, x: x @ (p["w"] * MASK) @ (p["v"] * MASK),
        "wv",
        [X],
        "w1 v0",
    ),
    "mask made": (lambda p, x: x @ p["w"] @ jnp.tril(p["v"]), "wv", [X], "w1 v0"),
    "dropconnect": (
        lambda p, x, key: (
            (x @ p["w"]) @ (p["v"] * jax.random.bernoulli(key, 0.5, (3, 3)))
        ),
        "wv",
        [X, KEY],
        "w1 v0",
    ),
    "permuted rows": (
        lambda p, x: x @ p["w"] @ p["v"][np.array([2, 0, 1])],
        "wv",
        [X],
        "w1 v0",
    ),
    "projected": (lambda p, x: x @ p["w"] @ (MASK @ p["v"]), "wv", [X], "w1 v0"),
    "slice of a stack": (
        lambda p, x, i: x @ p["w"] @ jnp.stack([p["v"], p["u"]])[i],
        "wvu",
        [X, struct(dtype=jnp.int32)],
        "w1 v0 u0",
    ),
    # normalization with statistics from elsewhere
    "running norm": (running_norm, "wsb", [X, V, V], "w1 s0 b0"),
    # sums belong to the layer that made the data
    "bias after relu": (
        lambda p, x: jax.nn.relu(x @ p["w"]) + p["b"][None],
        "wb",
        [X],
        "w0 b0",
    ),
    "bias of the input": (lambda p, x: (x[0] - p["b"]) @ p["w"], "bw", [X], "b1 w0"),
    "mask token": (
        lambda p, x, m: jnp.where(m, p["token"], x @ p["w"]) @ p["v"],
        ("token", "w", "v"),
        [X, struct(2, 1, dtype=bool)],
        "token1 w1 v0",
    ),
    "class token": (class_token, ("token", "w", "v"), [X], "token1 w1 v0"),
    "noise scale": (
        lambda p, x, key: (
            (x[0] @ p["w"] + p["s"] * jax.random.normal(key, (3,))) @ p["v"]
        ),
        "wsv",
        [X, KEY],
        "w1 s1 v0",
    ),
    # products of data are no layers
    "gate": (
        lambda p, x: ((x @ p["w"]) * (x @ p["v"])) @ p["u"],
        "wvu",
        [X],
        "w1 v1 u0",
    ),
    "squeeze": (
        lambda p, x: (x @ p["w"]) * jax.nn.sigmoid(x @ p["w"] @ p["v"]),
        "wv",
        [X],
        "w1 v0",
    ),
    "attention": (attention, "qkvo", [X, struct(2, 2, dtype=bool)], "q1 k1 v1 o0"),
    "attention of captured data": (
        lambda p, mask: attention(p, ones(2, 3) @ p["w"], mask),
        "wqkvo",
        [struct(2, 2, dtype=bool)],
        "w2 q1 k1 v1 o0",
    ),
    "dropout in attention": (attention_with_dropout, "qkvo", [KEY], "q1 k1 v1 o0"),
    "two towers": (
        lambda p, i, j: p["w"][i] * p["v"][j] @ p["u"],
        "wvu",
        [IDS, IDS],
        "w1 v1 u0",
    ),
    "two scaled inputs": (
        lambda p, x, y: (x[0] * p["s"]) * (y[0] * p["b"]),
        "sb",
        [X, X],
        "s0 b0",
    ),
    # elementwise scales are layers, wherever they are
    "scale of the input": (lambda p, x: (x[0] * p["s"]) @ p["w"], "sw", [X], "s1 w0"),
    "scale and divide": (
        lambda p, x: x[0] * p["s"] / p["b"] ** 2,
        "sb",
        [X],
        "s1 b0",
    ),
    "prelu": (
        lambda p, x: jnp.where(x[0] > 0, x[0] @ p["w"], p["s"] * (x[0] @ p["w"])),
        "sw",
        [X],
        "s0 w1",
    ),
    # a frozen layer, whose kernel is an argument, is no layer
    "frozen": (lambda p, x, w: x @ p["w"] @ w @ p["v"], "wv", [X, W], "w1 v0"),
    # the last of several uses does not count, the first does
    "shared": (lambda p, x: x @ p["w"] @ p["v"] @ p["w"], "wv", [X], "w2 v1"),
}
SHAPES = {"s": struct(3), "b": struct(3), "token": struct(1, 3)}


@pytest.mark.parametrize("name", MEETINGS)
def test_meetings(name):
    fun, params, args, expected = MEETINGS[name]
    params = {name: SHAPES.get(name, W) for name in params}
    expected = {text[:-1]: int(text[-1]) for text in expected.split()}
    assert infer_depths(fun, params, *args) == expected


# Two independent countings, in random programs.


def random_program(rng, sizes):
    """Steps that make one value each from earlier ones."""
    n_inputs, n_steps, n_params = sizes
    steps = []
    for i in range(n_inputs, n_inputs + n_steps):
        kind = rng.choice(["linear", "scale", "bias", "tanh", "add", "product"])
        # Mostly the last values, so that programs get deep.
        operands = [max(0, i - 1 - int(rng.expovariate(0.7))) for _ in range(2)]
        steps.append((kind, operands, rng.randrange(n_params)))
    return steps


def run_program(steps, params, values):
    values = list(values)
    for kind, (i, j), p in steps:
        w, a, b = params[p], values[i], values[j]
        values.append(
            {
                "linear": lambda w=w, a=a: a @ w["w"],
                "scale": lambda w=w, a=a: a * w["s"],
                "bias": lambda w=w, a=a: a + w["b"],
                "tanh": lambda a=a: jnp.tanh(a),
                "add": lambda a=a, b=b: a + b,
                "product": lambda a=a, b=b: a * b,
            }[kind]()
        )
    return values


def counted_depths(steps, n_inputs, n_params):
    """All paths, one at a time, from each use of a parameter to the last value."""
    users = {}
    for index, (kind, (i, j), _) in enumerate(steps, n_inputs):
        for operand in {i, j} if kind in ("add", "product") else {i}:
            users.setdefault(operand, []).append((index, kind in ("linear", "scale")))
    last = n_inputs + len(steps) - 1

    def farthest(value):
        paths = [farthest(user) + layer for user, layer in users.get(value, [])]
        return max([0.0 if value == last else -np.inf, *paths])

    depths = [{"w": -np.inf, "s": -np.inf, "b": -np.inf} for _ in range(n_params)]
    for index, (kind, _, p) in enumerate(steps, n_inputs):
        name = {"linear": "w", "scale": "s", "bias": "b"}.get(kind)
        if name:
            depths[p][name] = max(depths[p][name], farthest(index))
    return depths


def random_params(n, *lead):
    return [
        {"w": struct(*lead, 3, 3), "s": struct(*lead, 1, 3), "b": struct(*lead, 1, 3)}
    ] * n


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    steps = random_program(random.Random(seed), (1, 12, 6))
    # A first layer, so that products are products of data that went through one.
    steps = [("linear", [0, 0], 0), *steps]
    expected = counted_depths(steps, 1, 6)
    lost = sum(d == -np.inf for d in jax.tree.leaves(expected))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fun = lambda params, x: run_program(steps, params, [x])[-1]
        depths = infer_depths(fun, random_params(6), struct(2, 3))
    assert depths == jax.tree.map(lambda d: int(max(d, 0)), expected)
    assert sum(str(w.message).count("params[") for w in caught) == lost


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_scan_is_its_unrolled_loop(seed, stacked, length):
    n_carry, n_params = 3, 4
    rng = random.Random(seed)
    steps = random_program(rng, (n_carry + 1, 8, n_params))
    # The carry is a shuffle of old and new values: some only move along for a while.
    sources = [
        rng.choice([1, 2, 3, rng.randrange(n_carry + 9)]) for _ in range(n_carry)
    ]

    def body(params, carry, x):
        values = run_program(steps, params, [x, *carry])
        return [values[i] for i in sources], values[-1]

    def start(params, x):
        return [x @ w for w in params["first"]]

    def scanned(params, x):
        xs = (params["body"] if stacked else None, jnp.stack([x] * length))
        step = lambda carry, x: body(x[0] if stacked else params["body"], carry, x[1])
        carry, ys = jax.lax.scan(step, start(params, x), xs, reverse=seed % 2 == 1)
        return carry[0], ys @ params["last"]

    def unrolled(params, x):
        carry, ys = start(params, x), []
        for i in range(length):
            part = params["body"]
            if stacked:
                part = jax.tree.map(lambda w, i=i: w[i], part)
            carry, y = body(part, carry, x)
            ys.append(y)
        return carry[0], jnp.stack(ys) @ params["last"]

    blocks = random_params(n_params, *[length] * stacked)
    params = {"first": [W] * n_carry, "body": blocks, "last": W}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # programs that do not use all parameters
        assert infer_depths(scanned, params, X) == infer_depths(unrolled, params, X)


# Loops.


def recurrent(params, xs, length=None):
    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["hidden"] + params["bias"])
        return h, h

    h, _ = jax.lax.scan(step, jnp.zeros((1, 3)), xs, length)
    return h @ params["out"]


RECURRENT = {"in": W, "hidden": W, "bias": struct(1, 3), "out": W}


def test_long_scan_is_not_unrolled():
    depths = infer_depths(recurrent, RECURRENT, struct(5000, 1, 3))
    assert depths == {"in": 5000, "hidden": 5000, "bias": 5000, "out": 0}


def test_scan_within_scan():
    # 3 rounds of 4 layers each, the last of which is followed by no other.
    def fun(params, x):
        inner = lambda h: jax.lax.scan(lambda h, w: (h @ w, None), h, params["stack"])[
            0
        ]
        return jax.lax.fori_loop(0, 3, lambda i, h: inner(h), x @ params["first"])

    params = {"first": W, "stack": struct(4, 3, 3)}
    assert infer_depths(fun, params, X) == {"first": 12, "stack": 11}


def test_loop_over_a_stack_by_index():
    def fun(params, x):
        return jax.lax.fori_loop(0, 4, lambda i, h: h @ params["stack"][i], x)

    assert infer_depths(fun, {"stack": struct(4, 3, 3)}, X) == {"stack": 3}


def test_scan_without_layers_in_its_carry():
    def fun(params, xs):
        total, ys = jax.lax.scan(lambda t, x: (t + x, x @ params["w"]), X_ONES, xs)
        return total @ params["v"], ys

    X_ONES = jnp.ones((2, 3))
    params = {"w": W, "v": W}
    assert infer_depths(fun, params, struct(9, 2, 3)) == {"w": 0, "v": 0}


def test_while_counts_one_iteration():
    def fun(params, x):
        h = x @ params["first"]
        h = jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h @ params["loop"], h)
        return h @ params["last"]

    params = {"first": W, "loop": W, "last": W}
    assert infer_depths(fun, params, X) == {"first": 2, "loop": 1, "last": 0}


def test_while_may_have_no_iteration():
    def fun(params, x):
        h = x @ params["first"]
        h = jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: x @ params["loop"], h)
        return h @ params["last"]

    params = {"first": W, "loop": W, "last": W}
    assert infer_depths(fun, params, X) == {"first": 1, "loop": 1, "last": 0}


def test_carry_that_is_overwritten():
    # What enters `a` leaves through `b` one iteration later, and is then lost: of the
    # initial values only those of the last iterations count, and here there are two.
    def fun(params, x):
        step = lambda carry, _: ((x, carry[0] @ params["w"]), None)
        start = (x @ params["a"], x @ params["b"])
        return jax.lax.scan(step, start, None, 2)[0][1]

    params = {"a": W, "b": W, "w": W}
    with pytest.warns(UserWarning, match=r"params\['a'\], params\['b'\]$"):
        assert infer_depths(fun, params, X) == {"a": 0, "b": 0, "w": 0}


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_carry_that_is_swapped(length):
    def fun(params, x):
        step = lambda carry, _: (carry[::-1], None)
        start = (x @ params["even"], x @ params["odd"])
        return jax.lax.scan(step, start, None, length)[0][0]

    lost = "odd" if length % 2 == 0 else "even"
    with pytest.warns(UserWarning, match=rf": params\['{lost}'\]$"):
        infer_depths(fun, {"even": W, "odd": W}, X)


def test_weight_whose_last_use_does_not_reach_the_output():
    # `w` enters `a`; only `b`, which is `a` one iteration earlier, is returned.
    def fun(params, x):
        step = lambda carry, _: ((x @ params["w"], carry[0] @ params["v"]), None)
        return jax.lax.scan(step, (x, x), None, 2)[0][1]

    assert infer_depths(fun, {"w": W, "v": W}, X) == {"w": 1, "v": 0}


def test_captured_arrays_as_literals():
    flag = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, flag):
        pytest.skip("captured arrays are always constants in this version of JAX")
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        x = jnp.ones((2, 3))
        assert infer_depths(lambda params: two_layers(params, x), TWO) == TWO_DEPTHS
    finally:
        jax.config.update(flag, before)


def test_learned_initial_state_is_an_input_of_its_layer():
    def fun(params, xs):
        step = lambda h, x: (jnp.tanh(x + h @ params["w"]), None)
        return jax.lax.scan(step, params["h"], xs)[0]

    depths = infer_depths(fun, {"h": struct(1, 3), "w": W}, struct(4, 1, 3))
    assert depths == {"h": 4, "w": 3}


# The interface.


def test_nothing_is_executed():
    big = 10**7
    params = {"w": struct(big, big), "v": struct(big, big)}

    def fun(params, x):
        assert isinstance(x, jax.core.Tracer)
        return x @ params["w"] @ params["v"]

    assert infer_depths(fun, params, x=struct(big, big)) == {"w": 1, "v": 0}


def test_works_inside_jit():
    @jax.jit
    def depth_of_first(params, x):
        return jnp.array(infer_depths(two_layers, params, x)["a"]["w"])

    params = jax.tree.map(lambda s: jnp.ones(s.shape), TWO)
    assert depth_of_first(params, jnp.ones((2, 3))) == 1


def test_what_is_no_array_stays_as_it_is():
    def fun(params, x, activation, *, train, name, scales, key):
        assert train is True and name == "a" and scales == [2, None, 0.5]
        jax.random.split(key)
        return activation(x @ params["w"]) @ params["v"]

    static = dict(train=True, name="a", scales=[2, None, 0.5], key=KEY)
    params = {"w": W, "v": W}
    assert infer_depths(fun, params, X, jnp.tanh, **static) == {"w": 1, "v": 0}


def test_only_floating_arrays_have_a_depth():
    params = {
        "w": W,
        "quantized": struct(3, 3, dtype=jnp.int8),
        "scale": struct(3, dtype=jnp.complex64),
        "mask": struct(3, 3, dtype=bool),
        "key": jax.random.split(KEY),
        "none": None,
        "activation": jnp.tanh,
        "rate": 0.5,
    }

    def fun(p, x):
        h = p["activation"](x @ jnp.where(p["mask"], p["w"], 0))
        return h @ (p["quantized"] * p["scale"][None])

    depths = infer_depths(fun, params, X)
    assert depths == dict.fromkeys(params) | {"w": 1, "scale": 0}


@pytest.mark.parametrize("params", [{}, None, (), {"a": None, "b": jnp.tanh}])
def test_no_parameters(params):
    expected = jax.tree.map(lambda _: None, params)
    assert infer_depths(lambda params, x: x, params, X) == expected


def test_a_single_array():
    assert infer_depths(lambda w, x: x @ w, W, X) == 0


def test_unreached_parameters_are_named():
    params = {"used": [W, {"bias": W}], "head": {"kernel": W}, "loop": W}

    def fun(params, x):
        x @ params["head"]["kernel"]
        h, _ = jax.lax.scan(lambda c, _: (c, c @ params["loop"]), x, None, 3)
        return h @ params["used"][0]

    with pytest.warns(UserWarning) as caught:
        depths = infer_depths(fun, params, X)
    assert depths == {"used": [0, {"bias": 0}], "head": {"kernel": 0}, "loop": 0}
    (warning,) = caught
    assert warning.filename == __file__
    _, names = str(warning.message).split(": ")
    assert names.split(", ") == [
        "params['head']['kernel']",
        "params['loop']",
        "params['used'][1]['bias']",
    ]


def test_function_without_array_output():
    with pytest.warns(UserWarning, match=r"reach .*: params\['w'\]$"):
        assert infer_depths(lambda params: "text", {"w": W}) == {"w": 0}

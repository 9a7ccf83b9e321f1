"""Small models for the tests of gradients: one of each kind that people train.

Nothing is compiled to build one. Params are random, also those that a library would
start at zero or one, so that no gradient vanishes by chance.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax


class Model(NamedTuple):
    """`loss(params, *args, **kwargs)` is a scalar; with `has_aux`, a pair."""

    params: Any
    loss: Callable[..., Any]
    args: tuple = ()
    kwargs: dict = {}
    has_aux: bool = False
    # The leaves below these keys have an axis of layers in front: `lax.scan` takes
    # the layers apart, and a mask may be a vector.
    stacked: tuple[str, ...] = ()
    # Error of an entry, relative to the largest one of its leaf.
    rtol: float = 2e-5


KEY = jax.random.key(0)
BATCH, FEATURES, WIDTH, CLASSES = 4, 5, 6, 3
VOCABULARY, LENGTH = 7, 4


def fill(like: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """Normal numbers in the shapes of arrays, or of what stands for arrays."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(draw, like)


def draw(*shape: int, seed: int = 0, scale: float = 0.5) -> jax.Array:
    return fill(jax.ShapeDtypeStruct(shape, jnp.float32), seed, scale)


def dense(*sizes: int, seed: int = 0) -> dict[str, dict[str, jax.Array]]:
    """Params of dense layers; `d0` is the first."""
    return {
        f"d{i}": {
            "w": draw(a, b, seed=seed + 2 * i),
            "b": draw(b, seed=seed + 2 * i + 1),
        }
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def affine(layer, x):
    return x @ layer["w"] + jnp.expand_dims(layer["b"], range(x.ndim - 1))


def mlp(params, x, activation=jnp.tanh):
    for name in sorted(params)[:-1]:
        x = activation(affine(params[name], x))
    return affine(params[sorted(params)[-1]], x)


X, T = draw(BATCH, FEATURES, seed=90, scale=1.0), draw(BATCH, CLASSES, seed=91)
LABELS = jnp.asarray([0, 2, 1, 1])
IMAGES = draw(BATCH, 6, 6, 2, seed=92, scale=1.0)
TOKENS = jnp.asarray([[1, 0, 5, 6], [3, 3, 2, 1]])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squares(y, target):
    return ((y - target) ** 2).mean()


def of_linen(module, *inputs, loss, labels, stacked=(), rtol=2e-5):
    params = fill(jax.eval_shape(module.init, KEY, *inputs))
    fun = lambda params, labels, *inputs: loss(module.apply(params, *inputs), labels)
    return Model(params, fun, (labels, *inputs), stacked=stacked, rtol=rtol)


# Flax, equinox.


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(WIDTH)(x))
        x = nn.LayerNorm()(jnp.tanh(nn.Dense(WIDTH)(x)))
        return nn.Dense(CLASSES)(x)


def linen_mlp():
    return of_linen(LinenMLP(), X, loss=cross_entropy, labels=LABELS)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(nnx.gelu(self.first(x))))


def nnx_mlp():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxMLP(nnx.Rngs(0))))

    def loss(params, x, labels):
        return cross_entropy(nnx.merge(graph, params)(x), labels)

    return Model(fill(state), loss, (X, LABELS))


class CNN(nn.Module):
    """Batch norm, whose statistics change, and dropout, which needs a key."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2))
        x = nn.Dropout(0.3, deterministic=False)(x.reshape(BATCH, -1))
        return nn.Dense(CLASSES)(x)


def cnn():
    module = CNN()
    rngs = {"params": KEY, "dropout": KEY}
    variables = fill(jax.eval_shape(module.init, rngs, IMAGES))

    def loss(params, stats, key, x, labels):
        logits, new = module.apply(
            {"params": params, "batch_stats": stats},
            x,
            rngs={"dropout": key},
            mutable="batch_stats",
        )
        return cross_entropy(logits, labels), (new["batch_stats"], logits)

    args = (variables["batch_stats"], KEY, IMAGES, LABELS)
    return Model(variables["params"], loss, args, has_aux=True)


class ResNet(nn.Module):
    """A stem, a block with an identity to skip it, one with a projection."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for i, stride in enumerate((1, 2)):
            y = nn.relu(nn.GroupNorm(2, name=f"norm{i}")(x))
            skip = x if stride == 1 else nn.Conv(4, (1, 1), stride, name="skip")(y)
            y = nn.relu(nn.Conv(4, (3, 3), stride, name=f"up{i}")(y))
            x = skip + nn.Conv(4, (3, 3), name=f"down{i}")(y)
        return nn.Dense(CLASSES, name="head")(nn.relu(x).mean((1, 2)))


def resnet():
    return of_linen(ResNet(), IMAGES, loss=cross_entropy, labels=LABELS)


class Transformer(nn.Module):
    """Pre-norm, causal, the embedding is the output matrix as well."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        x = x + self.param("position", nn.initializers.ones, (1, LENGTH, WIDTH))
        mask = nn.make_causal_mask(tokens)
        for i in range(2):
            y = nn.LayerNorm(name=f"norm{i}a")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attend{i}")(y, mask=mask)
            y = nn.Dense(8, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}b")(x))
            x = x + nn.Dense(WIDTH, name=f"down{i}")(nn.gelu(y))
        return embed.attend(nn.LayerNorm(name="norm")(x))


def transformer():
    # A key's bias adds the same to all scores of a softmax: a gradient of rounding
    # errors only, which no two programs share. So there are none.
    model = of_linen(Transformer(), TOKENS, loss=cross_entropy, labels=TOKENS)
    inner = dict(model.params["params"])
    for i in range(2):
        inner[f"attend{i}"] = dict(inner[f"attend{i}"])
        inner[f"attend{i}"]["key"] = {"kernel": inner[f"attend{i}"]["key"]["kernel"]}

    def loss(params, labels, tokens):
        whole = dict(params)
        for i in range(2):
            key = params[f"attend{i}"]["key"] | {"bias": jnp.zeros((2, WIDTH // 2))}
            whole[f"attend{i}"] = params[f"attend{i}"] | {"key": key}
        return model.loss({"params": whole}, labels, tokens)

    return Model(inner, loss, model.args)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(WIDTH, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.silu(y)), None


class Stacked(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(block, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(nn.Dense(WIDTH, name="stem")(x), None)
        return nn.Dense(CLASSES, name="head")(x)


def linen_scan(remat=False):
    module = Stacked(remat)
    return of_linen(module, X, loss=squares, labels=T, stacked=("stack",))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(3, name="cell"))(x)
        return nn.Dense(CLASSES, name="head")(x[:, -1])


def linen_lstm():
    x = draw(BATCH, 3, FEATURES, seed=93)
    return of_linen(Recurrent(), x, loss=squares, labels=T)


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    scale: jax.Array
    activation: Callable[..., Any]
    nothing: None = None

    def __init__(self):
        self.first = eqx.nn.Linear(FEATURES, WIDTH, key=KEY)
        self.last = eqx.nn.Linear(WIDTH, CLASSES, use_bias=False, key=KEY)
        self.scale = jnp.ones(())
        self.activation = jax.nn.relu

    def __call__(self, x):
        return self.last(self.scale * self.activation(self.first(x)))


def equinox():
    """Without a bias, and with a function among the fields: None in the params."""
    shapes = eqx.filter_eval_shape(Equinox)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    params, static = eqx.partition(shapes, is_shape)

    def loss(params, x, target):
        return squares(jax.vmap(eqx.combine(params, static))(x), target)

    return Model(fill(params), loss, (X, T))


# Control flow.


def plain_mlp():
    loss = lambda params, x, target: squares(mlp(params, x), target)
    return Model(dense(FEATURES, WIDTH, WIDTH, CLASSES), loss, (X, T))


def stack_of(layers: int, seed: int = 50):
    return {
        "w": draw(layers, WIDTH, WIDTH, seed=seed),
        "b": draw(layers, WIDTH, seed=seed + 1),
    }


def lax_scan():
    """Stacked weights, weights that all layers share, and a step size for each."""
    params = dense(FEATURES, WIDTH, CLASSES)
    params |= {"stack": stack_of(4), "shared": draw(WIDTH, WIDTH, seed=52)}

    def layer(shared, x, own):
        params, step = own
        return x + step * jnp.tanh(affine(params, x @ shared)), x.sum()

    def loss(params, steps, x, target):
        body = functools.partial(layer, params["shared"])
        x, sums = lax.scan(body, affine(params["d0"], x), (params["stack"], steps))
        return squares(affine(params["d1"], x), target) + 0.1 * (sums**2).mean()

    args = (jnp.asarray([0.5, 1.0, 1.5, 2.0]), X, T)
    return Model(params, loss, args, stacked=("stack",))


def reverse_scan():
    """From the last layer to the first, two at a time, an integer in the carry."""
    params = {"stack": stack_of(4), "head": draw(WIDTH, CLASSES, seed=3)}

    def layer(carry, own):
        i, x = carry
        return (i + 1, jnp.tanh(affine(own, x)) * (i + 1)), None

    def loss(params, x, target):
        start = (jnp.int32(0), x)
        (_, x), _ = lax.scan(layer, start, params["stack"], reverse=True, unroll=2)
        return squares(x @ params["head"], target)

    x = draw(BATCH, WIDTH, seed=94)
    return Model(params, loss, (x, T), stacked=("stack",))


def layer_drop():
    """Layers that a coin leaves out, dropout in the others, a key in the carry."""
    params = dense(FEATURES, WIDTH, CLASSES) | {"stack": stack_of(4)}

    def layer(carry, own):
        key, x = carry
        key, coin, drop = jax.random.split(key, 3)
        kept = jax.random.bernoulli(drop, 0.7, x.shape)
        run = lambda x: x + jnp.where(kept, jnp.tanh(affine(own, x)), 0.0)
        return (
            key,
            lax.cond(jax.random.bernoulli(coin, 0.7), run, lambda x: x, x),
        ), None

    def loss(params, key, x, target):
        start = (key, affine(params["d0"], x))
        (_, x), _ = lax.scan(layer, start, params["stack"])
        return squares(affine(params["d1"], x), target)

    return Model(params, loss, (KEY, X, T), stacked=("stack",))


def rnn():
    params = {
        "in": draw(FEATURES, WIDTH),
        "recurrent": draw(WIDTH, WIDTH, seed=1),
        "start": draw(1, WIDTH, seed=2),
        "out": draw(WIDTH, CLASSES, seed=3),
    }

    def loss(params, xs, targets):
        def cell(h, x):
            h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
            return h, h @ params["out"]

        start = jnp.broadcast_to(params["start"], (BATCH, WIDTH))
        _, ys = lax.scan(cell, start, xs)
        return squares(ys, targets)

    xs = draw(5, BATCH, FEATURES, seed=94, scale=1.0)
    return Model(params, loss, (xs, draw(5, BATCH, CLASSES, seed=95)))


def nested_scan():
    """Layers inside of pieces of the batch, with a checkpoint around each."""
    params = dense(FEATURES, WIDTH, CLASSES) | {"stack": stack_of(2)}

    def loss(params, x, target):
        @jax.checkpoint
        def piece(total, batch):
            x, target = batch
            layer = lambda x, own: (jnp.tanh(affine(own, x)), None)
            x, _ = lax.scan(layer, affine(params["d0"], x), params["stack"])
            return total + squares(affine(params["d1"], x), target), None

        half = lambda a: a.reshape(2, BATCH // 2, -1)
        return lax.scan(piece, jnp.zeros(()), (half(x), half(target)))[0]

    return Model(params, loss, (X, T))


def checkpoint():
    """Whole layers, one of them with a policy, one inside of another."""
    params = dense(FEATURES, WIDTH, WIDTH, WIDTH, CLASSES)
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = lambda own, x: jnp.sin(affine(own, x))
    outer = jax.checkpoint(lambda own, x: jnp.cos(jax.checkpoint(layer)(own, x)))

    def loss(params, x, target):
        x = jax.checkpoint(layer)(params["d0"], x)
        x = jax.checkpoint(layer, policy=dots)(params["d1"], x)
        return squares(affine(params["d3"], outer(params["d2"], x)), target)

    return Model(params, loss, (X, T))


def branches():
    """`cond` and `switch`, of branches that use other params."""
    params = dense(FEATURES, WIDTH, WIDTH, WIDTH, CLASSES)

    def loss(params, flag, index, x, target):
        x = jnp.tanh(affine(params["d0"], x))
        first = lambda x: jnp.sin(affine(params["d1"], x))
        x = lax.cond(flag, first, lambda x: 2.0 * x, x)
        second = lambda x: jnp.tanh(affine(params["d2"], x))
        x = lax.switch(index, [lambda x: x, second, first], x)
        return squares(affine(params["d3"], x), target)

    return Model(params, loss, (jnp.bool_(True), jnp.int32(1), X, T))


def data_loops():
    """Loops over what nothing is differentiated by; a loop over params of its own."""
    params = dense(FEATURES, WIDTH, CLASSES)

    def loss(params, x, target):
        x = lax.while_loop(lambda x: (x**2).sum() > 1.0, lambda x: 0.9 * x, x)
        steps = lax.while_loop(lambda i: i < 5, lambda i: i + 2, 0)
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), affine(params["d0"], x))
        halve = lambda x: 0.5 * x  # of a param, but nothing comes back
        size = lax.stop_gradient(jnp.abs(params["d1"]["w"]).sum())
        scale = lax.while_loop(lambda s: s > 1.0, halve, size)
        return squares(scale * steps * affine(params["d1"], h), target)

    return Model(params, loss, (X, T))


# Autodiff's own tools, inside of the loss.


@jax.custom_jvp
def smooth(x):
    return jnp.where(x > 0, x, 0.1 * x)


@smooth.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return smooth(x), jax.nn.sigmoid(3 * x) * t  # not what autodiff would find


def custom_jvp():
    params = dense(FEATURES, WIDTH, WIDTH, CLASSES)
    return Model(params, lambda p, x, t: squares(mlp(p, x, smooth), t), (X, T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded(levels, w):
    return jnp.round(w * levels) / levels


rounded.defvjp(
    lambda levels, w: (rounded(levels, w), w),
    lambda levels, w, g: (g * (jnp.abs(w) < 0.8),),  # straight through
)


@jax.custom_vjp
def fused(layer, x):
    return jax.nn.relu(affine(layer, x))


def _fused_backward(residuals, g):
    layer, x, y = residuals
    g = jnp.where(y > 0, g, 0.25 * g)  # not what autodiff would find
    return {"w": x.T @ g, "b": g.sum(0)}, g @ layer["w"].T


fused.defvjp(lambda layer, x: (y := fused(layer, x), (layer, x, y)), _fused_backward)


@jax.custom_vjp
def scaled(scale, x):
    return scale * x


scaled.defvjp(
    lambda scale, x: (scale.value * x.value, (scale.value, x.value)),
    lambda residuals, g: (2.0 * (g * residuals[1]).sum(), g * residuals[0]),
    symbolic_zeros=True,
)


def custom_vjp():
    """A function of a weight, a layer (params and input in one), symbolic zeros."""
    params = dense(FEATURES, WIDTH, WIDTH, CLASSES)

    def loss(params, x, target):
        x = fused(params["d1"], fused(params["d0"], x))
        last = {"w": rounded(8, params["d2"]["w"]), "b": params["d2"]["b"]}
        return squares(scaled(params["scale"], affine(last, x)), target)

    return Model(params | {"scale": draw(seed=31)}, loss, (X, T))


def gradient_in_loss():
    """A loss of the derivative of a net by its input."""
    params = dense(2, WIDTH, WIDTH, 1)

    def loss(params, points):
        slope = jax.grad(lambda point: mlp(params, point)[0])
        return (jax.vmap(slope)(points) ** 2).mean() + squares(mlp(params, points), 1.0)

    return Model(params, loss, (draw(BATCH, 2, seed=96),))


def inner_jit():
    """Jit inside of jit, the same function for two layers."""
    params = dense(WIDTH, WIDTH, WIDTH, CLASSES)
    layer = jax.jit(lambda own, x: jax.nn.gelu(affine(own, x)))

    def loss(params, x, target):
        x = layer(params["d1"], layer(params["d0"], x))
        return jax.jit(squares)(affine(params["d2"], x), target)

    return Model(params, loss, (draw(BATCH, WIDTH, seed=97), T))


def stopped():
    """A leaf that nothing uses, one behind `stop_gradient`, one used both ways."""
    params = dense(FEATURES, WIDTH, WIDTH, CLASSES) | {
        "unused": {"w": draw(2, 3)},
        "stopped": draw(WIDTH, WIDTH, seed=30),
        "empty": jnp.zeros((0, 3)),
    }

    def loss(params, x, target):
        h = jnp.tanh(affine(params["d0"], x)) @ lax.stop_gradient(params["stopped"])
        h = jnp.tanh(affine(params["d1"], h) + lax.stop_gradient(h))
        w = lax.stop_gradient(params["d2"]["w"])
        return squares(affine(params["d2"], h) + jnp.tanh(h) @ w, target)

    return Model(params, loss, (X, T))


# Shapes of models and of params.


def two_towers():
    params = {
        "left": dense(FEATURES, WIDTH, CLASSES),
        "right": dense(FEATURES, WIDTH, CLASSES, seed=10),
        "temperature": draw(seed=11),
    }

    def loss(params, left, right):
        scores = mlp(params["left"], left) @ mlp(params["right"], right).T
        scores = scores * jnp.exp(params["temperature"])
        pairs = jnp.arange(BATCH)
        return cross_entropy(scores, pairs) + cross_entropy(scores.T, pairs)

    return Model(params, loss, (X, draw(BATCH, FEATURES, seed=98)))


def embedding():
    """Looked up by integers, one table twice; what is looked up is added to."""
    params = {
        "tokens": draw(VOCABULARY, WIDTH),
        "positions": draw(LENGTH, WIDTH, seed=1),
        "out": draw(WIDTH, VOCABULARY, seed=2),
    }

    def loss(params, tokens):
        x = params["tokens"][tokens] + params["positions"][None]
        x = x.at[:, 1:].add(jnp.take(params["tokens"], tokens[:, :-1], axis=0))
        return cross_entropy(jnp.tanh(x) @ params["out"], tokens)

    return Model(params, loss, (TOKENS,))


def tied():
    """One matrix in three places, one of them transposed."""
    params = {"w": draw(WIDTH, WIDTH), "b": draw(1, WIDTH, seed=1)}

    def loss(params, x):
        y = jnp.tanh(jnp.tanh(x @ params["w"] + params["b"]) @ params["w"])
        return squares(y @ params["w"].T, x)

    return Model(params, loss, (draw(BATCH, WIDTH, seed=97),))


def examples():
    """The loss of one example, mapped over a batch."""

    def one(params, x, target):
        return ((mlp(params, x) - target) ** 2).sum()

    def loss(params, x, target):
        return jax.vmap(one, (None, 0, 0))(params, x, target).mean()

    return Model(dense(FEATURES, WIDTH, CLASSES), loss, (X, T))


def bfloat16():
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), dense(FEATURES, WIDTH, WIDTH, CLASSES)
    )

    def loss(params, x, target):
        y = mlp(params, x.astype(jnp.bfloat16))
        return squares(y.astype(jnp.float32), target)

    return Model(params, loss, (X, T), rtol=0.03)


def mixed_dtypes():
    """Master params in float32, computing in float16, a leaf of each."""
    params = dense(FEATURES, WIDTH, CLASSES)
    params["d1"]["b"] = params["d1"]["b"].astype(jnp.float16)

    def loss(params, x, target):
        half = jax.tree.map(lambda p: p.astype(jnp.float16), (params, x))
        return squares(mlp(*half).astype(jnp.float32), target)

    return Model(params, loss, (X, T), rtol=5e-3)


def complex_params():
    """A real loss of complex params, through a Fourier transform."""
    params = {
        "a": draw(FEATURES, WIDTH) + 1j * draw(FEATURES, WIDTH, seed=1),
        "b": draw(1, WIDTH, seed=2) + 1j * draw(1, WIDTH, seed=3),
        "real": draw(WIDTH, CLASSES, seed=4),
    }

    def loss(params, x, target):
        z = jnp.fft.fft(x.astype(jnp.complex64) @ params["a"] + params["b"])
        return squares(jnp.abs(z) @ params["real"], target)

    return Model(params, loss, (X, T))


def scalars():
    """Python floats, which are weakly typed, and scalars that are not; a list."""
    params = [2.0, {"b": jnp.float32(0.5), "c": -0.3}, np.float32(1.5)]

    def loss(params, x):
        a, inner, d = params
        return (jnp.tanh(a * x + inner["b"]) * inner["c"]).sum() * d

    return Model(params, loss, (X,))


def bare_array():
    return Model(draw(FEATURES, CLASSES), lambda w, x, t: squares(x @ w, t), (X, T))


def keywords():
    def loss(params, x, *, target, scale=1.0):
        return scale * squares(mlp(params, x), target)

    kwargs = {"target": T, "scale": 3.0}
    return Model(dense(FEATURES, WIDTH, CLASSES), loss, (X,), kwargs)


def autoencoder():
    """Noise from a key, and a pair of terms; auxiliary values of several kinds."""
    params = {
        "encoder": dense(FEATURES, WIDTH, 4),
        "decoder": dense(2, WIDTH, FEATURES, seed=20),
    }

    def loss(params, key, x):
        mean, log = jnp.split(mlp(params["encoder"], x), 2, axis=1)
        z = mean + jnp.exp(log) * jax.random.normal(key, mean.shape)
        error = squares(mlp(params["decoder"], z), x)
        divergence = (mean**2 + jnp.exp(2 * log) - 2 * log - 1).mean() / 2
        aux = {"error": error, "code": z, "size": len(x), "ids": jnp.arange(3)}
        return error + 0.1 * divergence, aux

    return Model(params, loss, (KEY, X), has_aux=True)


def algebra():
    """Primitives with unusual transposes: solve, sort, cumulative sums, a scatter."""
    params = {"a": draw(4, 4), "b": draw(4, 2, seed=1), "c": draw(8, seed=2)}

    def loss(params, ids):
        a = params["a"] @ params["a"].T + 4 * jnp.eye(4)
        y = jnp.linalg.solve(a, params["b"]).reshape(-1)
        z = jnp.cumsum(jnp.sort(params["c"])) * y
        z = jnp.zeros(5).at[ids].add(jnp.concatenate([z, y[:2]]))
        return lax.reduce_window(z, -jnp.inf, lax.max, (2,), (1,), "VALID").sum()

    return Model(params, loss, (jnp.asarray([0, 1, 2, 3, 4, 4, 3, 0, 1, 1]),))


MODELS: dict[str, Callable[[], Model]] = {
    "linen mlp": linen_mlp,
    "nnx mlp": nnx_mlp,
    "cnn": cnn,
    "resnet": resnet,
    "transformer": transformer,
    "linen scan": linen_scan,
    "linen scan of remat": functools.partial(linen_scan, remat=True),
    "linen lstm": linen_lstm,
    "equinox": equinox,
    "plain mlp": plain_mlp,
    "scan": lax_scan,
    "reverse scan": reverse_scan,
    "layer drop": layer_drop,
    "rnn": rnn,
    "nested scan": nested_scan,
    "checkpoint": checkpoint,
    "branches": branches,
    "data loops": data_loops,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "gradient in loss": gradient_in_loss,
    "inner jit": inner_jit,
    "stopped": stopped,
    "two towers": two_towers,
    "embedding": embedding,
    "tied": tied,
    "examples": examples,
    "bfloat16": bfloat16,
    "mixed dtypes": mixed_dtypes,
    "complex": complex_params,
    "scalars": scalars,
    "bare array": bare_array,
    "keywords": keywords,
    "autoencoder": autoencoder,
    "algebra": algebra,
}


@functools.cache
def model(name: str) -> Model:
    """The model of that name in `MODELS`; each is built once."""
    return MODELS[name]()

"""Tests of the cache of a resting prefix, against the loss without one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from priorityprop_jax.propagation import _examples, _split
from priorityprop_jax.training import _cache, CachedPrefix, Features


pytestmark = pytest.mark.usefixtures("quick_compilation")

N, B = 12, 4  # examples, and how many there are in a batch
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_loss(params, x, y):
    for layer in params["layers"][:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    last = params["layers"][-1]
    return cross_entropy(x @ last["w"] + last["b"][None], y)


SIZES = [5, 16, 8, 6, 3]
LAYERS = [
    {"w": draw(a, b), "b": draw(b)} for a, b in zip(SIZES[:-1], SIZES[1:], strict=True)
]
MLP = {"layers": LAYERS}
XS, YS = np.asarray(draw(N, 5)), RNG.integers(0, 3, N)


def lowest(params, resting):
    """A mask in which the layers below `resting` rest."""
    layers = range(len(params["layers"]))
    return {"layers": [k >= resting for k in layers]}


def mlp_cache(resting=2, **kwargs):
    args = MLP, lowest(MLP, resting), XS[:B], YS[:B]
    return CachedPrefix(mlp_loss, *args, **{"num_examples": N, **kwargs})


def close(a, b, rtol=2e-5):
    def check(x, y):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol, rtol * np.abs(y).max(initial=0) + 1e-6)

    jax.tree.map(check, a, b)


@functools.cache
def jitted(loss, has_aux):
    return jax.jit(jax.value_and_grad(loss, has_aux=has_aux))


def agrees(cache, loss, params, active, ids, *batch, has_aux=False, rtol=2e-5):
    """Values and gradients of the loss and of the one with a cache are the same."""
    features = cache(params, ids, *batch)
    full = jitted(loss, has_aux)(params, *batch)
    cached = jitted(cache.loss, has_aux)(params, features, *batch)
    close(cached[0], full[0], rtol)
    active = jax.tree.broadcast(active, params)
    mask = lambda keep, g: g if keep else jnp.zeros_like(g)
    close(cached[1], jax.tree.map(mask, active, full[1]), rtol)
    return features


@pytest.mark.parametrize("resting", [1, 2, 3])
def test_mlp(resting):
    cache, active = mlp_cache(resting), lowest(MLP, resting)
    for start in (0, 4, 0, 8):
        ids = np.arange(start, start + B)
        features = agrees(cache, mlp_loss, MLP, active, ids, XS[ids], YS[ids])
        # After the activation, not before and after: one value, and no bias.
        assert [x.shape for x in features.rows] == [(B, SIZES[resting])]
        assert not features.shared
    assert cache.frozen == tuple(
        f"params['layers'][{k}]['{x}']" for k in range(resting) for x in "bw"
    )
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.clears) == (B, N, 0)
    assert stats.bytes == N * SIZES[resting] * 4
    matmuls = sum(
        2 * a * b for a, b in zip(SIZES, SIZES[1 : resting + 1], strict=False)
    )
    assert matmuls * B <= stats.flops_saved <= 1.5 * matmuls * B


def test_flops_of_a_step_are_those_of_the_suffix():
    sizes = [64, 64, 64, 64, 10]
    layers = [{"w": draw(a, b), "b": draw(b)} for a, b in zip(sizes, sizes[1:])]  # noqa: B905
    params, batch = {"layers": layers}, (draw(32, 64), np.zeros(32, int))
    active = lowest(params, 2)
    cache = CachedPrefix(mlp_loss, params, active, *batch, num_examples=32)
    features = cache(params, np.arange(32), *batch)
    upper = {"layers": layers[2:]}

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    ours = flops(jax.value_and_grad(cache.loss), params, features, *batch)
    by_hand = flops(jax.value_and_grad(mlp_loss), upper, features.rows[0], batch[1])
    assert ours == pytest.approx(by_hand, rel=0.02)
    assert ours < 0.6 * flops(jax.value_and_grad(mlp_loss), params, *batch)


def test_training_is_the_same():
    tx = optax.adam(1e-2)
    active = lowest(MLP, 2)
    cache = mlp_cache()

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(loss, params, state, *args):
        grads = jax.grad(loss)(params, *args)
        broad = jax.tree.broadcast(active, params)
        grads = jax.tree.map(lambda a, g: g if a else 0 * g, broad, grads)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    runs = []
    for cached in (False, True):
        params = jax.tree.map(jnp.array, MLP)
        state = tx.init(params)
        for k in range(6):
            ids = np.arange(B) + B * (k % 3)
            batch = XS[ids], YS[ids]
            if cached:
                features = cache(params, ids, *batch, active=active)
                params, state = step(cache.loss, params, state, features, *batch)
            else:
                params, state = step(mlp_loss, params, state, *batch)
        runs.append(params)
    close(*runs, rtol=1e-4)
    # Params are new arrays at each step, but the resting ones have the same values.
    assert cache.stats.clears == 0 and cache.stats.hits == cache.stats.misses == N


def test_composes_with_active():
    from priorityprop_jax import value_and_grad

    cache, active = mlp_cache(), lowest(MLP, 2)
    features = cache(MLP, np.arange(B), XS[:B], YS[:B])
    active["layers"][2] = False  # what is above may rest as it likes
    grads = value_and_grad(cache.loss)(MLP, features, XS[:B], YS[:B], active=active)[1]
    full = jax.grad(mlp_loss)(MLP, XS[:B], YS[:B])
    close(grads["layers"][3], full["layers"][3])
    assert not np.any(grads["layers"][2]["w"])


class CNN(nn.Module):
    affine: bool = True
    dropout: tuple[bool, bool] = (False, False)

    @nn.compact
    def __call__(self, x, train):
        drop = lambda k: nn.Dropout(0.5, deterministic=not (train and self.dropout[k]))
        norm = lambda: nn.BatchNorm(
            use_running_average=not train, use_scale=self.affine, use_bias=self.affine
        )
        for k, features in enumerate((4, 5)):
            x = nn.relu(norm()(nn.Conv(features, (3, 3))(x)))
            x = drop(k)(nn.avg_pool(x, (2, 2), (2, 2)))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


IMAGES = np.asarray(draw(N, 8, 8, 2))


def cnn(train, **kwargs):
    model = CNN(**kwargs)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), IMAGES[:1])
    variables = jax.tree.map(lambda x: 0.5 + 0.3 * draw(*x.shape), variables)
    stats = jax.tree.map(jnp.abs, variables["batch_stats"])

    def loss(params, stats, key, x, y):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, y), new

    key = jax.random.key(1)
    return loss, variables["params"], (stats, key, IMAGES[:B], YS[:B])


def cnn_cache(loss, params, batch, trained, **kwargs):
    active = {name: name in trained for name in params}
    args = {"num_examples": N, "in_axes": (None, None, 0, 0), **kwargs}
    return CachedPrefix(loss, params, active, *batch, **args), active


def test_batchnorm_in_inference():
    loss, params, batch = cnn(False)
    cache, active = cnn_cache(loss, params, batch, ["Conv_1", "BatchNorm_1", "Dense_0"])
    agrees(cache, loss, params, active, np.arange(B), *batch, has_aux=True)
    assert {path.split("'")[1] for path in cache.frozen} == {"Conv_0", "BatchNorm_0"}
    # Statistics are watched like params.
    shifted = jax.tree.map(lambda x: x + 1, batch[0])
    ids = np.arange(B)
    agrees(cache, loss, params, active, ids, shifted, *batch[1:], has_aux=True)
    assert cache.stats.clears == 1 and cache.stats.hits == 0


def test_batchnorm_in_training():
    loss, params, batch = cnn(True)
    with pytest.raises(ValueError, match=r"\['BatchNorm_0'\].*reduce_sum at .*exampl"):
        cnn_cache(loss, params, batch, ["Conv_1", "BatchNorm_1", "Dense_0"])
    # Above all that rests it may see the batch, and update its state.
    trained = ["Conv_1", "BatchNorm_0", "BatchNorm_1", "Dense_0"]
    cache, active = cnn_cache(loss, params, batch, trained)
    agrees(cache, loss, params, active, np.arange(B), *batch, has_aux=True, rtol=2e-4)
    trained = ["Conv_1", "BatchNorm_1", "Dense_0"]
    cache, active = cnn_cache(loss, params, batch, trained, partial=True)
    agrees(cache, loss, params, active, np.arange(B), *batch, has_aux=True, rtol=2e-4)


def dropout_loss(where):
    def loss(params, key, x, y):
        for k, layer in enumerate(params["layers"]):
            if k == where:
                keep = jax.random.bernoulli(key, 0.5, x.shape)
                x = jnp.where(keep, x / 0.5, 0)
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return cross_entropy(x, y)

    return loss


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_dropout(where):
    loss, active = dropout_loss(where), lowest(MLP, 2)
    batch = jax.random.key(3), XS[:B], YS[:B]
    make = functools.partial(
        CachedPrefix, loss, MLP, active, *batch, num_examples=N, in_axes=(None, 0, 0)
    )
    if where < 2:
        path = rf"params\['layers'\]\[{where}\]\['w'\].*random_bits at .*test_cache"
        with pytest.raises(ValueError, match=path):
            make()
    if where == 0:
        return
    cache = make(partial=True)
    for seed in range(2):  # another mask from the same features
        batch = jax.random.key(seed), *batch[1:]
        agrees(cache, loss, MLP, active, np.arange(B), *batch)
    assert cache.stats.hits == cache.stats.misses == B


def transformer():
    d, heads, length, words = 8, 2, 6, 11
    block = lambda: {
        "ln": {"scale": draw(d), "bias": draw(d)},
        "qkv": 0.3 * draw(d, 3, heads, d // heads),
        "out": 0.3 * draw(heads, d // heads, d),
        "up": 0.3 * draw(d, 16),
        "down": 0.3 * draw(16, d),
    }
    params = {"embed": draw(words, d), "pos": draw(length, d)}
    params["layers"] = [block() for _ in range(3)]

    def norm(p, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"][None, None] + p["bias"][None, None]

    def apply(p, x):
        q, k, v = jnp.einsum("btd,dchi->cbhti", norm(p["ln"], x), p["qkv"])
        scores = jnp.einsum("bhti,bhsi->bhts", q, k)
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e9))
        x = x + jnp.einsum("bhts,bhsi,hid->btd", weights, v, p["out"])
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

    def loss(params, tokens):
        x = params["embed"][tokens] + params["pos"][None]
        for p in params["layers"]:
            x = jax.checkpoint(jax.jit(apply))(p, x)
        logits = x @ params["embed"].T
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    return loss, params, RNG.integers(0, words, (N, length))


@pytest.mark.parametrize(
    "tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"]
)
def test_transformer(tied):
    loss, params, tokens = transformer()
    if not tied:
        inner = loss
        loss = lambda p, t: inner(p["base"], t) + 0 * p["bias"]
        params = {"base": params, "bias": jnp.float32(0)}
    layers = params["layers"] if tied else params["base"]["layers"]
    base = {"embed": False, "pos": False, "layers": [k == 2 for k in range(3)]}
    active = base if tied else {"base": base, "bias": True}
    cache = CachedPrefix(loss, params, active, tokens[:B], num_examples=N)
    features = agrees(cache, loss, params, active, np.arange(B), tokens[:B])
    # The stream of residuals, once: its normalization is cheap.
    assert [x.shape for x in features.rows] == [(B, 6, 8)]
    assert len(layers) == 3 and not any("[2]" in path for path in cache.frozen)


def test_only_an_embedding_is_not_worth_it():
    loss, params, tokens = transformer()
    active = {"embed": False, "pos": False, "layers": True}
    with pytest.raises(ValueError, match="nothing to cache"):
        CachedPrefix(loss, params, active, tokens[:B], num_examples=N)


def test_loops_calls_and_rows_along_other_axes():
    def loss(params, x, y):  # x: (time, examples, features)
        cell = lambda h, x: (jnp.tanh(h @ params["h"] + x @ params["x"]),) * 2
        _, hidden = lax.scan(cell, jnp.zeros((x.shape[1], 6)), x)
        flat = hidden.swapaxes(0, 1).reshape(-1, 6)  # examples and time in one axis
        mixed = jax.nn.silu(flat @ params["mix"]).reshape(x.shape[1], -1)
        mixed = lax.cond(params["h"].sum() > 0, jnp.sin, jnp.cos, mixed)
        penalty = sum(jnp.sum(params[k] ** 2) for k in "hx")
        return cross_entropy(mixed @ params["out"], y) + 1e-3 * penalty

    params = {"h": draw(6, 6), "x": draw(5, 6), "mix": draw(6, 2), "out": draw(6, 3)}
    x, ids = np.asarray(draw(3, N, 5)), np.array([3, 1, 8, 0])
    active = {"h": False, "x": False, "mix": False, "out": True}
    kwargs = {"num_examples": N, "in_axes": (1, 0)}
    cache = CachedPrefix(loss, params, active, x[:, :B], YS[:B], **kwargs)
    features = agrees(cache, loss, params, active, ids, x[:, ids], YS[ids])
    assert [f.shape for f in features.rows] == [(B, 6)]
    assert [f.shape for f in features.shared] == [()]  # the penalty, not h and x
    active["mix"] = True
    cache = CachedPrefix(loss, params, active, x[:, :B], YS[:B], **kwargs)
    features = agrees(cache, loss, params, active, ids, x[:, ids], YS[ids])
    assert [f.size for f in features.rows] == [B * 3 * 6]
    short = ids[:3]
    agrees(cache, loss, params, active, short, x[:, short], YS[short])


def test_own_derivatives_stay():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def loss(params, x, y):
        x = straight_through(jax.nn.relu(x @ params["a"]))
        return cross_entropy(straight_through(x @ params["b"]), y)

    params, active = {"a": draw(5, 4), "b": draw(4, 3)}, {"a": False, "b": True}
    args = params, active, XS[:B], YS[:B]
    cache = CachedPrefix(loss, *args, num_examples=N)
    agrees(cache, loss, params, active, np.arange(B), XS[:B], YS[:B])
    assert np.any(jax.grad(loss)(params, XS[:B], YS[:B])["b"])


def test_rematerialized_as_a_whole():
    """Resting work inside of a `jax.checkpoint` is found, the rest recomputed."""
    loss = jax.checkpoint(mlp_loss)
    args = MLP, lowest(MLP, 2), XS[:B], YS[:B]
    cache = CachedPrefix(loss, *args, num_examples=N)
    features = agrees(cache, loss, MLP, lowest(MLP, 2), np.arange(B), XS[:B], YS[:B])
    assert [x.shape for x in features.rows] == [(B, SIZES[2])]
    jaxpr = str(jax.make_jaxpr(cache.loss)(MLP, features, XS[:B], YS[:B]))
    assert "checkpoint" in jaxpr or "remat" in jaxpr


def test_bfloat16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP)

    def loss(params, x, y):
        return mlp_loss(params, x.astype(jnp.bfloat16), y).astype(jnp.float32)

    active = lowest(MLP, 2)
    cache = CachedPrefix(loss, params, active, XS[:B], YS[:B], num_examples=N)
    for _ in range(2):
        ids = np.arange(B)
        features = agrees(cache, loss, params, active, ids, XS[:B], YS[:B], rtol=0.03)
        assert features.rows[0].dtype == jnp.bfloat16
    assert cache.stats.bytes == N * SIZES[2] * 2


def test_what_is_cast_is_kept_in_the_smaller_type():
    def loss(params, x, y):
        h = jnp.tanh(x @ params["a"])
        return cross_entropy((h.astype(jnp.float16) @ params["b"]), y)

    params = {"a": draw(5, 4), "b": draw(4, 3).astype(jnp.float16)}
    args = params, {"a": False, "b": True}, XS[:B], YS[:B]
    cache = CachedPrefix(loss, *args, num_examples=N)
    assert cache.stats.bytes == N * 4 * 2


def test_file(tmp_path):
    need = N * SIZES[2] * 4
    file = tmp_path / "features"
    with pytest.raises(ValueError, match=rf"{need} bytes.*limit_bytes=100.*path="):
        mlp_cache(limit_bytes=100)
    cache = mlp_cache(limit_bytes=need - 1, path=file)
    for _ in range(2):
        ids = np.array([11, 2, 3, 0])
        agrees(cache, mlp_loss, MLP, lowest(MLP, 2), ids, XS[ids], YS[ids])
    assert cache.stats.hits == B and file.stat().st_size == need
    with pytest.raises(FileExistsError, match="exists"):
        mlp_cache(limit_bytes=100, path=file)
    mlp_cache(limit_bytes=need, path=file)  # fits into memory: the file is not used


def test_features_come_in_the_same_order_from_every_trace():
    """A file of them may be read by another process."""

    def loss(params, x, y):
        parts = [jnp.tanh(x @ w) for w in params["first"]]
        found = sum(p @ params["last"] * (k + 1) for k, p in enumerate(parts))
        return cross_entropy(found, y)

    params = {"first": [draw(5, 7) for _ in range(8)], "last": draw(7, 3)}
    active = {"first": False, "last": True}
    make = lambda: CachedPrefix(loss, params, active, XS[:B], YS[:B], num_examples=B)
    ids = np.arange(B)
    found = [jax.tree.leaves(make()(params, ids, XS[:B], YS[:B])) for _ in range(5)]
    assert len(found[0]) == 8
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_of_other_sizes(size):
    cache = mlp_cache()
    for _ in range(2):
        ids = np.arange(N - size, N)
        agrees(cache, mlp_loss, MLP, lowest(MLP, 2), ids, XS[ids], YS[ids])
    assert cache.stats.hits == cache.stats.misses == size
    assert cache._prefix._cache_size() == 1  # whatever is missing: one program


def test_a_prefix_that_depends_on_the_size_of_the_batch():
    def loss(params, x, y):
        return mlp_loss(params, x / x.shape[0], y)

    args = MLP, lowest(MLP, 2), XS[:B], YS[:B]
    cache = CachedPrefix(loss, *args, num_examples=N)
    features = cache(MLP, np.arange(3), XS[:3], YS[:3])
    with pytest.raises(ValueError, match="batch of 3 instead of 4.*Pad"):
        cache.loss(MLP, features, XS[:3], YS[:3])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, N - 1), min_size=B, max_size=B), max_size=5))
def test_any_ids(batches):
    """Each example is computed once, and its features are always its own."""
    cache, seen, asked = _shared_cache(), set(), 0
    cache.clear()
    before = cache.stats
    for ids in batches:
        features = cache(MLP, np.array(ids), XS[ids], YS[ids])
        x = XS[ids].astype(np.float64)
        for layer in LAYERS[:2]:
            x = np.maximum(x @ np.asarray(layer["w"]) + np.asarray(layer["b"]), 0)
        np.testing.assert_allclose(features.rows[0], x, rtol=1e-4, atol=1e-5)
        seen, asked = seen | set(ids), asked + len(ids)
    assert cache.stats.misses - before.misses == len(seen)
    assert cache.stats.hits - before.hits == asked - len(seen)


@functools.cache
def _shared_cache():
    return mlp_cache()


def test_active_leaves_invalidate():
    cache = mlp_cache()
    batch = XS[:B], YS[:B]
    cache(MLP, np.arange(B), *batch)
    assert cache.covers(lowest(MLP, 2)) and cache.covers(lowest(MLP, 3))
    assert not cache.covers(lowest(MLP, 1)) and not cache.covers(True)
    with pytest.raises(ValueError, match=r"\['layers'\]\[1\]\['b'\].*active now"):
        cache(MLP, np.arange(B), *batch, active=lowest(MLP, 1))
    cache(MLP, np.arange(B), *batch)
    assert cache.stats[:3] == (0, 2 * B, 1)


def test_changed_params_invalidate():
    cache, ids, batch = mlp_cache(), np.arange(B), (XS[:B], YS[:B])
    cache(MLP, ids, *batch)
    copied = jax.tree.map(jnp.array, MLP)
    cache(copied, ids, *batch)
    assert cache.stats.hits == B
    above = {"layers": [*LAYERS[:3], jax.tree.map(lambda x: x + 1, LAYERS[3])]}
    agrees(cache, mlp_loss, above, lowest(MLP, 2), ids, *batch)
    assert cache.stats.clears == 0
    w = LAYERS[1]["w"]
    for changed in (w.at[3, 2].add(1e-6), w[::-1], w.at[0].set(-w[0])):
        below = {"layers": [LAYERS[0], {**LAYERS[1], "w": changed}, *LAYERS[2:]]}
        agrees(cache, mlp_loss, below, lowest(MLP, 2), ids, *batch)
    assert cache.stats.clears == 3


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "complex64", "int4", "uint8", "bool", "key<fry>"]
)
def test_fingerprint(dtype):
    """Any entry that changes, and any two that are swapped, change the number."""
    if dtype == "key<fry>":
        x = jax.random.split(jax.random.key(0), 4)
    else:
        x = jnp.arange(4).astype(dtype)
    changed = [x.at[k].set(x[(k + 1) % 4]) for k in range(4)] + [x[::-1]]
    changed = [y for y in changed if not np.all(y == x)]
    marks = np.asarray(_cache._fingerprints([x, x, *changed]))
    assert marks[0] == marks[1] and not np.isin(marks[0], marks[2:])


def test_changed_examples_are_an_error():
    cache = mlp_cache()
    cache(MLP, np.arange(B), XS[:B], YS[:B])
    augmented = XS[:B].copy()
    augmented[2, 0] += 1
    with pytest.raises(ValueError, match=r"example 2 \(ids\[2\]\) is not what it was"):
        cache(MLP, np.arange(B), augmented, YS[:B])
    with pytest.raises(ValueError, match="example 5 .*two examples with one id"):
        cache(MLP, np.full(B, 5), XS[:B], YS[:B])
    # What the prefix does not read is free to change.
    cache(MLP, np.arange(B), XS[:B], YS[:B] * 0)
    careless = mlp_cache(verify=False)
    careless(MLP, np.arange(B), XS[:B], YS[:B])
    careless(MLP, np.arange(B), augmented, YS[:B])
    assert careless.stats.hits == B


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (np.array([0, 1, 2, N]), ValueError, rf"\[0, {N}\).*ids\[3\] = {N}"),
        (np.array([0, -1, 2, 3]), ValueError, r"ids\[1\] = -1"),
        (np.arange(B) * 1.0, TypeError, "integers.*float64"),
        (np.ones(B, bool), TypeError, "integers.*bool"),
        (np.arange(3), ValueError, r"\(4,\), got shape \(3,\)"),
        (np.arange(B)[None], ValueError, r"got shape \(1, 4\)"),
        (2, ValueError, r"got shape \(\)"),
    ],
)
def test_wrong_ids(ids, error, message):
    with pytest.raises(error, match=message):
        _shared_cache()(MLP, ids, XS[:B], YS[:B])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"active": lowest(MLP, 0)}, ValueError, "nothing to cache.*single examples"),
        ({"active": True}, ValueError, "nothing to cache"),
        ({"active": False}, ValueError, "no leaf is"),
        ({"active": {"layers": [True]}}, ValueError, "active"),
        ({"active": 1}, TypeError, "must be a bool"),
        ({"num_examples": 0}, ValueError, "at least 1, got 0"),
        ({"num_examples": 2.0}, TypeError, "int, got 2.0"),
        ({"in_axes": (0,)}, ValueError, "each of the 2 arguments"),
        ({"in_axes": (0, 1)}, ValueError, r"batch\[1\].*no axis 1"),
        ({"in_axes": None}, ValueError, "all in_axes are None"),
        ({"in_axes": "0"}, ValueError, "in_axes"),
        ({"y": YS[:3]}, ValueError, "number of examples"),
        ({"y": 3}, ValueError, r"in_axes\[1\] must be None"),
        ({"x": XS[:0], "y": YS[:0]}, ValueError, "empty"),
    ],
)
def test_bad_input(change, error, message):
    settings = {"active": lowest(MLP, 2), "num_examples": N, **change}
    batch = settings.pop("x", XS[:B]), settings.pop("y", YS[:B])
    active = settings.pop("active")
    with pytest.raises(error, match=message):
        CachedPrefix(mlp_loss, MLP, active, *batch, **settings)


def test_bad_calls():
    cache, ids, batch = _shared_cache(), np.arange(B), (XS[:B], YS[:B])
    features = cache(MLP, ids, *batch)
    with pytest.raises(TypeError, match="outside of jax.jit"):
        jax.jit(cache)(MLP, ids, *batch)
    with pytest.raises(TypeError, match="active is traced"):
        jax.jit(lambda a: cache.covers(a))(jax.tree.map(jnp.bool_, lowest(MLP, 2)))
    with pytest.raises(TypeError, match="Features, got tuple"):
        cache.loss(MLP, tuple(features), *batch)
    with pytest.raises(ValueError, match="of 4 examples, but the batch has 3"):
        cache.loss(MLP, features, XS[:3], YS[:3])
    with pytest.raises(ValueError, match="params must have the structure"):
        cache(LAYERS, ids, *batch)
    with pytest.raises(ValueError, match=r"batch\[0\] has shape \(4, 4\).*axis 0 may"):
        cache(MLP, ids, XS[:B, :4], YS[:B])
    assert isinstance(features, Features)


def test_side_effects():
    def loss(where):
        def f(params, x, y):
            for k, layer in enumerate(params["layers"]):
                if k == where:
                    x = jax.experimental.io_callback(lambda x: x, x, x)
                x = x @ layer["w"]
            return cross_entropy(x, y)

        return f

    active, batch = lowest(MLP, 2), (XS[:B], YS[:B])
    with pytest.raises(ValueError, match=r"\[1\].*io_callback at .*side effects"):
        CachedPrefix(loss(1), MLP, active, *batch, num_examples=N)
    cache = CachedPrefix(loss(2), MLP, active, *batch, num_examples=N)
    features = cache(MLP, np.arange(B), *batch)
    close(cache.loss(MLP, features, *batch), loss(2)(MLP, *batch))


# ---- what is proven to be computed for each example apart

W, KEY = np.asarray(draw(6, 6)), jax.random.key(0)
LOOK_UP = lambda x: jnp.int32(jnp.abs(x[:, 0, 0])) % 6
APART = {
    "bias": lambda x: x + W[0][None, None],
    "matmul": lambda x: x @ W,
    "matmul from left": lambda x: jnp.einsum("ij,btj->ibt", W, x),
    "attention": lambda x: jnp.einsum("btd,bsd,bse->bte", x, x, x),
    "transposed": lambda x: x.T + jnp.ones((6, 3, 4)),
    "merged": lambda x: jnp.tanh(x.reshape(12, 6) @ W).reshape(4, 18),
    "sums": lambda x: x.sum((1, 2)) + x.max((1, 2)) * jnp.argmax(x[:, 0], 1),
    "softmax": lambda x: jax.nn.softmax(x),
    "cumulative": lambda x: jnp.cumsum(x, 1),
    "sorted": lambda x: jnp.sort(x, axis=2)[:, ::-1],
    "top_k": lambda x: lax.top_k(x, 2)[0],
    "embedding": lambda x: jnp.asarray(W)[LOOK_UP(x)],
    "own entries": lambda x: jnp.take_along_axis(x[:, 0], LOOK_UP(x)[:, None], 1),
    "entries": lambda x: x[:, jnp.array([2, 0])],
    "one hot": lambda x: jax.nn.one_hot(LOOK_UP(x), 6) * x[:, 0],
    "parts": lambda x: jnp.concatenate([x[:, :1], jnp.zeros((4, 2, 6)), x], 1),
    "stacked": lambda x: jnp.stack([*jnp.unstack(x, axis=1), jnp.ones((4, 6))]),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))),
    "split": lambda x: jnp.multiply(*jnp.split(x, 2, axis=2)),
    "pooled": lambda x: nn.max_pool(x, (2,)),
    "convolved": lambda x: lax.conv_general_dilated(
        x, np.ones((3, 6, 2), "f"), (1,), "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
    ),
    "grouped": lambda x: lax.conv_general_dilated(
        x, np.ones((3, 1, 6), "f"), (1,), "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=6,
    ),
    "scanned": lambda x: lax.scan(
        lambda h, w: (jnp.tanh(h + w[None]), h.sum(1)), x[:, 0], W
    )[1],
    "over time": lambda x: lax.scan(
        lambda h, x: (h + x @ W, h), jnp.zeros((4, 6)), x.swapaxes(0, 1)
    )[1],
    "while": lambda x: lax.fori_loop(0, lax.stop_gradient(3), lambda i, x: x @ W, x),
    "cond": lambda x: lax.cond(W[0, 0] > 0, jnp.sin, lambda x: x * 2, x),
    "window": lambda x: lax.dynamic_slice_in_dim(x, 1, 2, axis=1),
    "written": lambda x: lax.dynamic_update_slice(jnp.zeros((4, 5, 6)), x, (0, 1, 0)),
    "mapped": lambda x: jax.vmap(lambda x: jnp.linalg.norm(x @ W))(x),
    "remat": lambda x: jax.checkpoint(jax.nn.gelu)(x),
}  # fmt: skip
TOGETHER = {
    "mean": (lambda x: x - x.mean(0, keepdims=True), "reduce_sum"),
    "flat": (lambda x: x.reshape(-1).sum(), "reduce_sum"),
    "folded": (lambda x: x.reshape(2, 36) @ jnp.ones((36, 2)), "reshape"),
    "gram": (lambda x: x[:, 0] @ x[:, 0].T, "dot_general"),
    "contracted": (lambda x: jnp.einsum("btd,bk->tdk", x, W[:4]), "dot_general"),
    "reversed": (lambda x: x[::-1] + x, "rev"),
    "rolled": (lambda x: jnp.roll(x, 1, 0), "slice"),
    "some": (lambda x: x[1:3], "slice"),
    "stacked": (lambda x: lax.reshape(jnp.stack([x, x]), (8, 3, 6)), "reshape"),
    "by position": (lambda x: x * jnp.arange(4.0)[:, None, None], "mul"),
    "by constant": (lambda x: x[:, 0] + W[:4], "add"),
    "permuted": (lambda x: x[jnp.array([1, 0, 3, 2])], "gather"),
    "others": (lambda x: x[LOOK_UP(x) % 4], "gather"),
    "cumulative": (lambda x: jnp.cumsum(x, 0), "cumsum"),
    "sorted": (lambda x: jnp.sort(x, axis=0), "sort"),
    "transposed": (lambda x: x[:, :, :4] + x[:, :1, :4].T, "add"),
    "through": (lambda x: lax.scan(lambda h, x: (h + x,) * 2, W[:3], x)[1], "scan"),
    "loop": (lambda x: lax.while_loop(lambda x: x[0, 0, 0] < 9, jnp.cosh, x), "while"),
    "pooled": (lambda x: nn.max_pool(x.swapaxes(0, 1), (2,)), "reduce_window"),
    "random": (lambda x: x + jax.random.normal(KEY, x.shape), "random_bits"),
    "unknown": (lambda x: jnp.linalg.qr(x)[1], "qr"),
}  # fmt: skip


def proven(f, x):
    """What an output is found to be, and the program."""
    closed = _split.flatten(lambda x: [f(x)], [x], [False])
    of, _ = _examples.classify(closed.jaxpr, [_examples.Rows(0)], len(x))
    return of[closed.jaxpr.outvars[0]]


@pytest.mark.parametrize("name", APART)
def test_apart(name, quick_compilation):
    """Each entry depends on its own example, and on that alone: by replacing others."""
    f, x, other = APART[name], draw(4, 3, 6), draw(4, 3, 6)
    rows = proven(f, x)
    assert isinstance(rows, _examples.Rows), rows
    f = jax.jit(f)
    full = np.moveaxis(np.asarray(f(x)), rows.axis, 0)
    assert len(full) == 4 * rows.inner
    for k in range(4):
        alone = f(other.at[k].set(x[k]))
        alone = np.moveaxis(np.asarray(alone), rows.axis, 0)
        part = slice(k * rows.inner, (k + 1) * rows.inner)
        np.testing.assert_allclose(alone[part], full[part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name):
    f, primitive = TOGETHER[name]
    mixed = proven(f, draw(4, 3, 6))
    assert isinstance(mixed, _examples.Mixed), mixed
    assert mixed.reason.startswith(primitive), mixed.reason


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 7))
def test_narrowest_is_narrowest(random, n):
    """Against all sets of values of a random graph of equations."""
    size = {v: random.randint(1, 5) for v in range(n)}
    parents = {
        v: None
        if random.random() < 0.3
        else sorted(random.sample(range(v), random.randint(0, min(v, 3))))
        for v in range(n)
    }
    wanted = sorted(random.sample(range(n), random.randint(1, n)))

    def computed(kept):
        have = set()
        for v in range(n):
            cheap = parents[v] is not None and have.issuperset(parents[v])
            if v in kept or cheap:
                have.add(v)
        return have.issuperset(wanted)

    subsets = ([v for v in range(n) if bits >> v & 1] for bits in range(2**n))
    best = min(sum(map(size.get, kept)) for kept in subsets if computed(kept))
    found = _split._narrowest(wanted, parents.get, size.get)
    assert computed(found) and sum(map(size.get, found)) == best

"""Tiny Shakespeare from scratch, by a transformer that predicts the next character.

GELU by tanh, for all arms alike: the backward pass of the exact one is slow on CPUs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.cli._data import load_text

from ._workload import Workload
from .mnist_mlp import normal


# Layers, width, heads, characters in a row.
SIZES = {"small": (4, 128, 4, 64), "large": (6, 384, 6, 256)}
TEXT = "tinyshakespeare.txt"


def workload(data_dir: str | None, scale: str) -> Workload:
    layers, width, heads, context = SIZES[scale]
    text, about = load(data_dir)
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([alphabet[c] for c in text], np.int32)
    train, test = np.split(ids, [len(ids) - len(ids) // 10])
    loss = lambda params, batch: cross_entropy(params, batch, heads)
    return Workload(
        name="char_transformer",
        init=lambda seed: init(seed, len(alphabet), layers, width, context),
        loss=loss,
        batches=lambda seed, size, steps: rows(train, seed, size, steps, context),
        quality=minus_loss(loss, test, context),
        targets=(-2.1, -1.95) if scale == "small" else (-1.6, -1.5),
        batch_size=12 if scale == "small" else 64,
        learning_rate=4e-3 if scale == "small" else 1e-3,
        steps=1400 if scale == "small" else 5000,
        evaluations=40,
        description=f"transformer of {layers} layers of {width} on {about}",
        warmup=0.1,
        b2=0.99,
    )


def load(data_dir: str | None) -> tuple[str, str]:
    """Tiny Shakespeare, or else any text there, or what Python ships with."""
    if data_dir is None:
        print("data: Python's own help() (--data-dir reads *.txt)")
        return load_text(None)
    path = Path(data_dir) / TEXT
    return load_text(path if path.is_file() else data_dir)


def rows(
    ids: np.ndarray, seed: int, batch_size: int, steps: int, context: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of characters from random places, and the characters that follow them."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        start = rng.integers(0, len(ids) - context, (batch_size, 1))
        taken = ids[start + np.arange(context + 1)[None]]
        yield taken[:, :-1], taken[:, 1:]


def minus_loss(loss: Any, ids: np.ndarray, context: int, count: int = 256):
    """A function of params: minus the loss on rows spread evenly over the text."""
    most = (len(ids) - 1) // context
    count = min(count, most)
    start = (np.arange(count) * most // count)[:, None] * context
    taken = ids[start + np.arange(context + 1)[None]]
    parts = np.array_split(np.arange(count), max(count // 64, 1))
    run = jax.jit(loss)

    def quality(params):
        losses = [float(run(params, (taken[i, :-1], taken[i, 1:]))) for i in parts]
        return -float(np.average(losses, weights=[len(i) for i in parts]))

    return quality


def init(
    seed: int, characters: int, layers: int, width: int, context: int
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    matrix = lambda *shape, scale=0.02: normal(rng, shape, scale)
    norm = lambda: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    smaller = 0.02 / (2 * layers) ** 0.5  # of what is added to the residual stream
    blocks = {
        f"block_{i}": {
            "norm_0": norm(),
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width, scale=smaller),
            "norm_1": norm(),
            "up": matrix(width, 4 * width),
            "down": matrix(4 * width, width, scale=smaller),
        }
        for i in range(layers)
    }
    return {
        "embed": matrix(characters, width),
        "position": matrix(context, width),
        **blocks,
        "norm": norm(),
        "head": matrix(width, characters),
    }


def normalize(x: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * norm["scale"][None, None] + norm["bias"][None, None]


def apply(params: Any, ids: jax.Array, heads: int) -> jax.Array:
    x = params["embed"][ids] + params["position"][None, : ids.shape[1]]
    for i in range(sum(name.startswith("block_") for name in params)):
        block = params[f"block_{i}"]
        qkv = normalize(x, block["norm_0"]) @ block["qkv"]
        q, k, v = jnp.split(qkv.reshape(*ids.shape, heads, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ block["out"]
        hidden = normalize(x, block["norm_1"]) @ block["up"]
        x = x + jax.nn.gelu(hidden, approximate=True) @ block["down"]
    return normalize(x, params["norm"]) @ params["head"]


def cross_entropy(params: Any, batch: Any, heads: int) -> jax.Array:
    ids, following = batch
    logits = apply(params, ids, heads)
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

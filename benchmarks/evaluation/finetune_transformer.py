"""Fine-tuning (text): a transformer that knows Python source learns Shakespeare."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._pretraining import pretrained
from ._workload import shuffled, Workload
from .finetune_cnn import arms as arms


FILE = "tinyshakespeare.txt"
# The last: the best that full fine-tuning got in the grid, minus 0.1 point (small
# scale; 0.4513 with seed 1000).
TARGETS = (0.437, 0.4503)
CHARACTERS = 128  # ASCII
LAYERS, HEADS = 4, 4
HELD_OUT = 0.1  # of the text, its end


class Scale(NamedTuple):
    """What `--scale` changes."""

    width: int
    context: int
    source: int  # bytes of source code, of which each is read once in pretraining
    text: int | None  # characters of Shakespeare to tune on; None: all but the end
    steps: int  # of fine-tuning


SCALES = {
    "small": Scale(128, 64, 2_800_000, 200_000, 1600),
    "large": Scale(512, 256, 20_000_000, None, 5000),
}


def init(key: jax.Array, width: int, context: int) -> Any:
    """Params of a decoder of pre-norm blocks (RMSNorm, no biases)."""
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    normal = lambda scale, *shape: scale * jax.random.normal(next(keys), shape)
    matrix = lambda m, n, gain=1.0: normal(np.sqrt(gain / m), m, n)
    characters = normal(0.5, CHARACTERS, width)
    positions = normal(0.5, context, width)
    params: dict[str, Any] = {
        "embed_0": {"characters": characters, "positions": positions}
    }
    for i in range(1, LAYERS + 1):
        params[f"block_{i}"] = {
            "attention_norm": jnp.ones(width),
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width, 0.5 / LAYERS),
            "dense_norm": jnp.ones(width),
            "up": matrix(width, 4 * width, 2.0),
            "down": matrix(4 * width, width, 0.5 / LAYERS),
        }
    last = normal(0.02, width, CHARACTERS)
    params[f"head_{LAYERS + 1}"] = {"norm": jnp.ones(width), "kernel": last}
    return params


def apply(params: Any, text: jax.Array) -> jax.Array:
    """Logits of the next character, shape=(batch, context, 128), at each position."""
    x = params["embed_0"]["characters"][text] + params["embed_0"]["positions"]
    for i in range(1, LAYERS + 1):
        block = params[f"block_{i}"]
        x += _attention(block, _normalize(x, block["attention_norm"]))
        hidden = _normalize(x, block["dense_norm"]) @ block["up"]
        # ReLU takes two thirds of the time of GELU on CPUs, for all arms alike.
        x += jax.nn.relu(hidden) @ block["down"]
    last = params[f"head_{LAYERS + 1}"]
    return _normalize(x, last["norm"]) @ last["kernel"]


def _normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def _attention(block: Any, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = (x @ block["qkv"]).reshape(batch, length, HEADS, 3, width // HEADS)
    q, k, v = jnp.moveaxis(qkv, 3, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // HEADS)
    causal = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ block["out"]


def loss(params: Any, batch: Any) -> jax.Array:
    """Mean cross entropy; a batch is ids, characters and those that follow them."""
    _, text, following = batch
    logits = apply(params, text)
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def source_code(size: int) -> np.ndarray:
    """The first bytes of Python's standard library that are ASCII, as int32.

    The modules at the top of the running interpreter's library, sorted by name, then
    those one folder down.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    parts, found = [], 0
    skip = ("site-packages", "test", "tests", "idlelib")
    below = [p for p in library.glob("*/*.py") if p.parent.name not in skip]
    for path in (*sorted(library.glob("*.py")), *sorted(below)):
        code = np.frombuffer(path.read_bytes(), np.uint8)
        parts.append(code[(code < CHARACTERS) & (code != 13)])
        found += len(parts[-1])
        if found >= size:
            break
    return np.concatenate(parts)[:size].astype(np.int32)


def _windows(text: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples that do not overlap: characters, and those that follow them."""
    count = (len(text) - 1) // context
    cut = lambda start: text[start : start + count * context].reshape(count, context)
    return cut(0), cut(1)


def workload(
    data_dir: str | os.PathLike,
    scale: str = "small",
    cache_dir: str | os.PathLike | None = None,
) -> Workload:
    """The workload; pretrains at the first call.

    Args:
      data_dir: where ``tinyshakespeare.txt`` is.
      scale: ``"small"`` (a step takes some 25 ms on a CPU core, and the first 200,000
        characters are tuned on, so that a run of a minute sees each a few times) or
        ``"large"`` (all but the end).
      cache_dir: for the pretrained params, see `pretrained`.

    Returns:
      A `Workload` whose quality is accuracy, in [0, 1]: how many of the characters of
      the last tenth of the text are the ones thought most likely. Batches are ``(ids,
      characters, following characters)``; ids are those of the examples.

    Raises:
      ValueError: another scale.
      FileNotFoundError: there is no such file.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
    sizes, batch_size = SCALES[scale], 8
    text = np.frombuffer((Path(data_dir) / FILE).read_bytes(), np.uint8)
    text = text[text < CHARACTERS].astype(np.int32)
    end = len(text) - int(len(text) * HELD_OUT)
    x, y = _windows(text[: min(sizes.text or end, end)], sizes.context)
    test = _windows(text[end:], sizes.context)
    code = source_code(sizes.source)
    old_x, old_y = _windows(code, sizes.context)
    steps = len(old_x) // batch_size
    start = pretrained(
        f"transformer-{scale}",
        init(jax.random.key(0), sizes.width, sizes.context),
        loss,
        ((i, old_x[i], old_y[i]) for i in shuffled(0, len(old_x), batch_size, steps)),
        learning_rate=3e-3,
        steps=steps,
        data=(code,),
        warmup=steps // 20,
        cache_dir=cache_dir,
    )

    def batches(seed: int, batch_size: int, steps: int) -> Iterator[Any]:
        for ids in shuffled(seed, len(x), batch_size, steps):
            yield ids, x[ids], y[ids]

    @jax.jit
    def hits(params, text, following):
        return (apply(params, text).argmax(-1) == following).sum()

    def quality(params: Any) -> float:
        parts = range(0, len(test[0]), 128)  # at once, scores would take much memory
        total = sum(hits(params, *(t[i : i + 128] for t in test)) for i in parts)
        return int(total) / test[1].size

    return Workload(
        name="finetune_transformer",
        init=lambda seed: jax.tree.map(jnp.array, start),
        loss=loss,
        batches=batches,
        quality=quality,
        targets=TARGETS,
        batch_size=batch_size,
        learning_rate=3e-3,
        steps=sizes.steps,
        evaluations=10,
        examples=len(x),
        description=f"transformer of {LAYERS} blocks of width {sizes.width}, Python's "
        f"standard library to Tiny Shakespeare, {x.size:,} characters",
    )

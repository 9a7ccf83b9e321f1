"""Pretrained params for the fine-tuning workloads: trained then read from disk."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax


_DIRECTORY = Path(__file__).resolve().parent.parent / "results" / "pretrained"
_VARIABLE = "PRIORITYPROP_CACHE"
_VERSION = 1  # to be raised when a change here, or of a model, makes other params


def pretrained(
    name: str,
    params: Any,
    loss: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
    learning_rate: float,
    steps: int,
    data: Sequence[np.ndarray],
    warmup: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> Any:
    """Trains with Adam, or returns what an earlier call with equal arguments trained.

    After the warm-up the learning rate falls to zero along a cosine. The params depend
    on the arguments and on what computes; all arms start from the one file, so alike.

    Args:
      name: of the file.
      params: pytree of float arrays to start from.
      loss: ``loss(params, batch)``, jittable.
      batches: at least `steps` of them; read only if there is no file.
      learning_rate: its peak.
      steps: how many.
      data: what the batches are made from; other data make another file.
      warmup: steps in which the learning rate rises.
      cache_dir: where the files are; None: the environment variable
        ``PRIORITYPROP_CACHE``, or next to the results, where git ignores them.

    Returns:
      Params like those given, as NumPy arrays.

    Raises:
      ValueError: there are fewer batches than steps.
    """
    directory = Path(cache_dir or os.environ.get(_VARIABLE) or _DIRECTORY)
    shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(params)]
    settings = _VERSION, learning_rate, steps, warmup, shapes
    digest = hashlib.sha256(repr(settings).encode())
    for array in (*data, *jax.tree.leaves(params)):
        digest.update(np.ascontiguousarray(array).tobytes())
    path = directory / f"{name}-{digest.hexdigest()[:12]}.npz"
    treedef = jax.tree.structure(params)
    if path.exists():
        with np.load(path) as file:
            return treedef.unflatten([file[f"arr_{i}"] for i in range(len(shapes))])
    print(f"pretraining {name}: {steps:,} steps, once, into {path}", flush=True)
    params = _train(params, loss, batches, learning_rate, steps, warmup)
    leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, *leaves)
    unfinished.replace(path)  # so that no other process reads half of a file
    return treedef.unflatten(leaves)


def _train(params, loss, batches, learning_rate, steps, warmup):
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    if warmup:
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    tx = optax.adam(rate)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state, done = tx.init(params), 0
    for _, batch in zip(range(steps), batches, strict=False):
        # Waiting for each step keeps the queue, and with it the memory, short.
        params, state = jax.block_until_ready(step(params, state, batch))
        done += 1
    if done < steps:
        raise ValueError(f"batches has {done}, fewer than steps={steps}")
    return params

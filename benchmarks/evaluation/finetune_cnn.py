"""Fine-tuning (images): a CNN that knows five classes of CIFAR-10 learns the others."""

import collections
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from priorityprop_jax import infer_depths
from priorityprop_jax.presets import finetune

from ._policies import Arm, costs_of, first_batch, Program, Run, schedule
from ._pretraining import pretrained
from ._workload import shuffled, Workload


FILE = "cifar10_12k.npz"
# The last: what full fine-tuning gets at best, minus 0.1 point (small scale; 0.803 in
# the mean of seeds 1000 to 1002, no more with longer runs). One image is 0.1 point.
TARGETS = (0.79, 0.802)
CLASSES = 5
HELD_OUT = 200  # images of each class
GROUPS = 8  # of GroupNorm
MEAN, DEVIATION = 120.0, 64.0  # of a pixel, about


class Scale(NamedTuple):
    """What `--scale` changes."""

    widths: tuple[
        int, ...
    ]  # channels of the convolutions; every other halves the image
    passes: int  # over the first half of the classes, in pretraining
    steps: int  # of fine-tuning


SCALES = {
    "small": Scale((16, 32, 32, 64, 64, 128), 24, 960),
    "large": Scale((64, 128, 128, 256, 256, 512), 60, 3200),
}


def init(key: jax.Array, widths: tuple[int, ...]) -> Any:
    """Params of the network: convolutions, each with a GroupNorm, and a linear head."""
    params, channels = {}, 3
    for i, width in enumerate(widths):
        key, now = jax.random.split(key)
        shape = (3, 3, channels, width)
        kernel = jax.random.normal(now, shape) * np.sqrt(2 / (9 * channels))
        scale, bias = jnp.ones(width), jnp.zeros(width)
        params[f"conv_{i}"] = {"kernel": kernel, "scale": scale, "bias": bias}
        channels = width
    params[f"head_{len(widths)}"] = head(key, channels)
    return params


def head(key: jax.Array, channels: int) -> Any:
    """Params of a new last layer."""
    kernel = jax.random.normal(key, (channels, CLASSES)) * np.sqrt(1 / channels)
    return {"kernel": kernel, "bias": jnp.zeros(CLASSES)}


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Logits, shape=(batch, 5), of uint8 images, shape=(batch, 32, 32, 3)."""
    *convolutions, (_, last) = sorted(params.items())
    x = (images.astype(jnp.float32) - MEAN) / DEVIATION
    for i, (_, layer) in enumerate(convolutions):
        strides = (1 + i % 2,) * 2
        axes = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, layer["kernel"], strides, "SAME", dimension_numbers=axes
        )
        x = jax.nn.relu(_normalize(x) * layer["scale"] + layer["bias"])
    return x.mean((1, 2)) @ last["kernel"] + last["bias"]


def _normalize(x: jax.Array) -> jax.Array:
    """GroupNorm (Wu and He, 2018): of each example by itself, so it can be cached."""
    parts = x.reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
    mean = parts.mean((1, 3), keepdims=True)
    variance = jnp.square(parts).mean((1, 3), keepdims=True) - jnp.square(mean)
    return ((parts - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape)


def loss(params: Any, batch: Any) -> jax.Array:
    """Mean cross entropy; a batch is ids, images and labels."""
    _, images, labels = batch
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def workload(
    data_dir: str | os.PathLike,
    scale: str = "small",
    cache_dir: str | os.PathLike | None = None,
) -> Workload:
    """The workload; pretrains at the first call.

    Args:
      data_dir: where ``cifar10_12k.npz`` is: uint8 ``images`` (n, 32, 32, 3) and
        ``labels`` in 0 to 9.
      scale: ``"small"`` (a step takes some 20 ms on a CPU core) or ``"large"``.
      cache_dir: for the pretrained params, see `pretrained`.

    Returns:
      A `Workload` whose quality is accuracy, in [0, 1], on 200 images of each of the
      five new classes. Batches are ``(ids, images, labels)``; ids are those of the
      examples, for the prefix cache.

    Raises:
      ValueError: another scale.
      FileNotFoundError: there is no such file.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
    sizes = SCALES[scale]
    with np.load(Path(data_dir) / FILE) as file:
        images, labels = file["images"], file["labels"].astype(np.int32)
    old, new = labels < CLASSES, labels >= CLASSES
    before = images[old], labels[old]
    start = pretrained(
        f"cnn-{scale}",
        init(jax.random.key(0), sizes.widths),
        loss,
        _augmented(*before, batch_size=64, steps=sizes.passes * len(before[0]) // 64),
        learning_rate=3e-3,
        steps=sizes.passes * len(before[0]) // 64,
        data=before,
        cache_dir=cache_dir,
    )
    (x, y), (test_x, test_y) = _split(images[new], labels[new] - CLASSES)
    last = f"head_{len(sizes.widths)}"

    def fresh(seed: int) -> Any:
        new_head = head(jax.random.key(seed), sizes.widths[-1])
        return jax.tree.map(jnp.array, {**start, last: new_head})  # copies

    def batches(seed: int, batch_size: int, steps: int) -> Iterator[Any]:
        for ids in shuffled(seed, len(x), batch_size, steps):
            yield ids, x[ids], y[ids]

    hits = jax.jit(lambda params: (apply(params, test_x).argmax(-1) == test_y).mean())
    return Workload(
        name="finetune_cnn",
        init=fresh,
        loss=loss,
        batches=batches,
        quality=lambda params: float(hits(params)),
        targets=TARGETS,
        batch_size=32,
        learning_rate=4e-3,
        steps=sizes.steps,
        evaluations=20,
        examples=len(x),
        description=f"CNN of {len(sizes.widths)} convolutions, CIFAR-10 classes 0-4 "
        f"to 5-9, {len(x):,} images",
    )


def _split(images: np.ndarray, labels: np.ndarray) -> Any:
    """The last images of each class are held out."""
    by_class = [np.flatnonzero(labels == c) for c in range(CLASSES)]
    test = np.sort(np.concatenate([ids[-HELD_OUT:] for ids in by_class]))
    train = np.sort(np.concatenate([ids[:-HELD_OUT] for ids in by_class]))
    return (images[train], labels[train]), (images[test], labels[test])


def _augmented(
    images: np.ndarray, labels: np.ndarray, batch_size: int, steps: int
) -> Iterator[Any]:
    """Mirrored and shifted by up to four pixels, for pretraining."""
    random = np.random.default_rng(0)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2))
    for ids in shuffled(0, len(images), batch_size, steps):
        down, right = random.integers(0, 9, (2, batch_size))
        x = windows[ids, down, right].transpose(0, 2, 3, 1)
        mirrored = random.random(batch_size) < 0.5
        x = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
        yield ids, x, labels[ids]


# --- arms of this workload and of `finetune_transformer`


def arms() -> dict[str, Arm]:
    """`finetune`, and half of the layers frozen by hand, with a cache and without."""
    found = [
        tuning("finetune", cached=True, about="the preset"),
        tuning("finetune_uncached", cached=False, about="the preset without its cache"),
        tuning("last_half", _last_half, cached=False, about="the first half is frozen"),
        tuning("last_half_cached", _last_half, cached=True, about="and cached"),
    ]
    return {arm.name: arm for arm in found}


def tuning(
    name: str,
    active: Callable[[Workload, Any, Any], Any] | None = None,
    cached: bool = True,
    about: str = "",
) -> Arm:
    """Adam in `finetune`; `active`: (workload, params, batch) -> whom to train."""

    def start(workload, settings):
        params = jax.tree.map(jnp.copy, workload.init(settings.seed))
        costs = costs_of(workload, settings.batch_size)
        batch = first_batch(workload, settings)
        mask = None if active is None else active(workload, params, batch)
        preset = finetune(
            workload.loss,
            optax.adam(schedule(workload, settings)),
            params,
            batch,
            steps=settings.steps,
            num_examples=workload.examples if cached else None,
            active=mask,
            **({} if mask is None else {"least_saving": 0.0}),
        )
        # By mask, in how many steps; the same for all runs of this program.
        account: collections.Counter[Any] = collections.Counter()
        misses = 0

        def step(run, i, batch):
            nonlocal misses
            params, state, _ = preset.step(run.params, run.opt_state, batch[0], batch)
            plan = preset.plan
            account[plan and plan.active] += 1
            before, misses = (
                misses,
                plan.cache.stats.misses if plan and plan.cache else 0,
            )
            kind = plan and plan.active, misses > before
            return Run(params, state, run.steps + 1, kind)

        def flops(run):
            full = lambda mask: costs.full if mask is None else costs.flops(mask.tree)
            cache = preset.plan and preset.plan.cache
            saved = cache.stats.flops_saved if cache else 0.0
            return sum(n * full(mask) for mask, n in account.items()) - saved

        return Program(
            Run(params, preset.init(params)),
            step,
            lambda run: run.params,
            flops,
            lambda run: run.kind,
        )

    return Arm(name, start, about=about)


def _last_half(workload: Workload, params: Any, batch: Any) -> Any:
    """The leaves that are nearer to the loss than to the input."""
    depths = infer_depths(workload.loss, params, batch)
    half = (1 + max(jax.tree.leaves(depths))) // 2
    return jax.tree.map(lambda depth: bool(depth <= half), depths)

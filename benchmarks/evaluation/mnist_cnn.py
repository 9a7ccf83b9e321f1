"""MNIST from scratch, by three convolutions and a dense layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._workload import shuffled, Workload
from .mnist_mlp import accuracy, load_images, normal


# Channels; the last two convolutions halve the image.
CHANNELS = {"small": (16, 32, 64), "large": (64, 128, 256)}
STRIDES = (2, 2, 1)


def workload(data_dir: str | None, scale: str) -> Workload:
    images = load_images(data_dir)
    x, channels = images.train_images, CHANNELS[scale]
    return Workload(
        name="mnist_cnn",
        init=lambda seed: init(seed, x.shape[1:], channels, images.classes),
        loss=loss,
        batches=lambda seed, size, steps: (
            (x[i], images.train_labels[i]) for i in shuffled(seed, len(x), size, steps)
        ),
        quality=accuracy(apply, images.test_images, images.test_labels, 1000),
        targets=(0.985, 0.988),
        batch_size=128,
        learning_rate=3e-3,
        steps=1800,
        evaluations=40,
        examples=len(x),
        description=f"CNN of {channels} channels on {len(x):,} images",
    )


def init(
    seed: int, shape: tuple[int, ...], channels: tuple[int, ...], classes: int
) -> dict[str, Any]:
    """He initialization."""
    size, widths = shape[0], (shape[-1], *channels)
    shapes = [(3, 3, *widths[i : i + 2]) for i in range(len(channels))]
    for stride in STRIDES:
        size = -(-size // stride)
    shapes.append((size * size * channels[-1], classes))
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "w": normal(rng, s, (2 / math.prod(s[:-1])) ** 0.5),
            "b": jnp.zeros(s[-1]),
        }
        for i, s in enumerate(shapes)
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    for i, stride in enumerate(STRIDES):
        layer = params[f"layer_{i}"]
        strides, numbers = (stride, stride), ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, layer["w"], strides, "SAME", dimension_numbers=numbers
        )
        x = jax.nn.relu(x + layer["b"][None, None, None])
    last = params[f"layer_{len(STRIDES)}"]
    return x.reshape(len(x), -1) @ last["w"] + last["b"][None]


def loss(params: Any, batch: Any) -> jax.Array:
    x, labels = batch
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

"""MNIST from scratch, by a network of dense layers: 784-512-512-10, ReLU."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax.cli._data import Images, load_digits, load_mnist

from ._workload import shuffled, Workload


WIDTHS = {"small": (512, 512), "large": (4096, 4096, 4096)}


def workload(data_dir: str | None, scale: str) -> Workload:
    images = load_images(data_dir)
    x = images.train_images.reshape(len(images.train_labels), -1)
    test = images.test_images.reshape(len(images.test_labels), -1)
    sizes = [x.shape[1], *WIDTHS[scale], images.classes]
    return Workload(
        name="mnist_mlp",
        init=lambda seed: init(seed, sizes),
        loss=loss,
        batches=lambda seed, size, steps: (
            (x[i], images.train_labels[i]) for i in shuffled(seed, len(x), size, steps)
        ),
        quality=accuracy(apply, test, images.test_labels),
        targets=(0.975, 0.982),
        batch_size=128,
        learning_rate=4e-3,
        steps=2800,
        evaluations=50,
        examples=len(x),
        description=f"MLP {'-'.join(map(str, sizes))} on {len(x):,} images",
    )


def load_images(data_dir: str | None) -> Images:
    """MNIST, or scikit-learn's digits, which are smaller and fewer."""
    if data_dir is None:
        print("data: scikit-learn's digits (--data-dir reads MNIST in IDX format)")
        return load_digits()
    return load_mnist(data_dir)


def init(seed: int, sizes: list[int]) -> dict[str, Any]:
    """He initialization."""
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "w": normal(rng, sizes[i : i + 2], (2 / sizes[i]) ** 0.5),
            "b": jnp.zeros(sizes[i + 1]),
        }
        for i in range(len(sizes) - 1)
    }


def normal(rng: np.random.Generator, shape: Sequence[int], scale: float) -> jax.Array:
    """By NumPy, which compiles nothing."""
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def apply(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        x = x if i == 0 else jax.nn.relu(x)
        x = x @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"][None]
    return x


def loss(params: Any, batch: Any) -> jax.Array:
    x, labels = batch
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(apply: Any, images: np.ndarray, labels: np.ndarray, chunk: int = 2000):
    """A function of params: the share of images that are classified correctly."""
    parts = range(0, len(labels), chunk)
    correct = jax.jit(lambda params, x, y: jnp.sum(apply(params, x).argmax(-1) == y))

    def quality(params):
        found = [
            int(correct(params, images[i : i + chunk], labels[i : i + chunk]))
            for i in parts
        ]
        return sum(found) / len(labels)

    return quality

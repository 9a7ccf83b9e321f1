"""Four small models in flax linen, for images and, the transformer, for text.

Imported only where a model is made: it needs flax.
"""

from typing import Any

import jax
import jax.numpy as jnp


try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "the models need flax, which is not installed: "
        'pip install "priorityprop_jax[cli]"'
    ) from error


class MLP(nn.Module):
    """Dense layers on the pixels."""

    classes: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Convolutions that halve the image and double the channels, and a dense layer."""

    classes: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = nn.relu(nn.Conv(self.width * 2**i, (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(4 * self.width)(x))
        return nn.Dense(self.classes)(x)


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, around which the input is added."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x, train: bool):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        conv = lambda size, s: nn.Conv(self.features, size, strides=s, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.strides)(x)))
        y = norm()(conv((3, 3), 1)(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """He et al. (2016), three stages; `layers` is the number of blocks in each."""

    classes: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage in range(3):
            for i in range(self.layers):
                strides = 2 if stage and not i else 1
                x = ResidualBlock(self.width * 2**stage, strides)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class TransformerBlock(nn.Module):
    """Attention and a dense network, each behind a LayerNorm and added to its input."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, use_bias=False, name="qkv")(nn.LayerNorm()(x))
        q, k, v = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x += nn.Dense(width, name="out")(attended.reshape(x.shape))
        y = nn.Dense(4 * width, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(width, name="down")(nn.gelu(y))


class Transformer(nn.Module):
    """Of characters, predicts the next at each position; of an image, its class.

    An image is cut into patches, 4 x 4 of them (or the next number that divides it).
    """

    classes: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        is_text = x.ndim == 2
        if is_text:
            x = nn.Embed(self.classes, self.width, name="embed")(x)
        else:
            x = nn.Dense(self.width, name="embed")(_patches(x))
        scale = nn.initializers.normal(0.02)
        x += self.param("positions", scale, (1, *x.shape[1:]))
        for _ in range(self.layers):
            x = TransformerBlock(_heads(self.width), causal=is_text)(x)
        x = nn.LayerNorm()(x)
        return nn.Dense(self.classes, name="head")(x if is_text else x.mean(1))


def _patches(images: jax.Array) -> jax.Array:
    """(n, height, width, channels) to (n, patches, pixels of a patch)."""
    n, height, width, channels = images.shape
    rows, columns = (_divisor(size, 4) for size in (height, width))
    x = images.reshape(n, rows, height // rows, columns, width // columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, -1)


def _heads(width: int) -> int:
    """One for each 32 features, or the next smaller number that divides."""
    return next(n for n in range(max(width // 32, 1), 0, -1) if width % n == 0)


def _divisor(size: int, least: int) -> int:
    return next(i for i in range(min(least, size), size + 1) if size % i == 0)


# Class, and the width and layers it has unless told otherwise.
MODELS: dict[str, tuple[Any, int, int]] = {
    "mlp": (MLP, 256, 3),
    "cnn": (CNN, 16, 3),
    "resnet": (ResNet, 16, 1),
    "transformer": (Transformer, 64, 4),
}


def build(
    name: str, classes: int, width: int | None = None, layers: int | None = None
) -> nn.Module:
    """A model by its name.

    Args:
      name: ``"mlp"``, ``"cnn"``, ``"resnet"`` or ``"transformer"``.
      classes: how many; of text, how many characters there are.
      width: features of a layer, of convolutions those of the first; None: the usual.
      layers: hidden layers, convolutions, residual blocks in each of the three stages,
        or transformer blocks; None: the usual.

    Returns:
      The module. Only the ResNet asks whether it is in training.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.cli._models import build
      >>> model = build("mlp", classes=10, width=8, layers=1)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
      >>> model.apply(params, jnp.ones((3, 8, 8, 1))).shape
      (3, 10)
    """
    kind, usual_width, usual_layers = MODELS[name]
    return kind(classes, width or usual_width, layers or usual_layers)


def init(model: nn.Module, inputs: Any, seed: int) -> Any:
    """Its params, and statistics if it has any. Abstract `inputs` will do."""
    train: Any = {"train": False} if isinstance(model, ResNet) else {}
    example = jnp.zeros((1, *inputs.shape[1:]), inputs.dtype)
    run = jax.jit(lambda key, x: model.init(key, x, **train))
    return run(jax.random.key(seed), example)

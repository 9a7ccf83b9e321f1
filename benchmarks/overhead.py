"""What `priority_prop` costs a train step: `chain(priority_prop, adam)` over `adam`.

A 10M-parameter MLP at two batch sizes and a transformer of 200 leaves, whole train
steps with donated params and state, averaged over cycles. Target: 1.03. Clipping by the
global norm is there to compare with: it, too, needs all gradients before it can change
one.

So all gradients are in memory at once. XLA:CPU asks malloc for the memory of a step in
one piece, and from 32 MB on glibc returns it after each step and takes fresh pages for
the next. Where gradients make the difference, as in the MLP, most of what they cost is
these pages: about a microsecond each. All is measured again with glibc told to keep the
memory, as in

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 \\
    MALLOC_TOP_PAD_=268435456 python train.py

GPUs and TPUs have allocators of their own, which do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from _timing import (
    as_rows,
    Case,
    compare,
    cycle_of_steps,
    keep_memory,
    parser,
    print_table,
    write_json,
)
from prioritize_step import mlp

from priorityprop_jax import priority_prop


def mlp_loss(params, batch) -> jax.Array:
    """Mean squared output of the MLP."""
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        batch = jax.nn.relu(batch @ layer["kernel"] + layer["bias"])
    return jnp.mean(batch**2)


def transformer(layers: int = 20, width: int = 128) -> dict:
    """Parameters of a pre-norm transformer with ten leaves a layer."""

    def weights(key, *shape):
        return jax.random.normal(key, shape) / shape[0] ** 0.5

    def layer(key):
        q, k, v, o, up, down = jax.random.split(key, 6)
        square = {
            n: weights(s, width, width)
            for n, s in zip("qkvo", (q, k, v, o), strict=True)
        }
        return square | {
            "scale_1": jnp.ones(width),
            "scale_2": jnp.ones(width),
            "up": weights(up, width, 4 * width),
            "up_bias": jnp.zeros(4 * width),
            "down": weights(down, 4 * width, width),
            "down_bias": jnp.zeros(width),
        }

    keys = jax.random.split(jax.random.key(0), layers)
    return {f"Block_{i}": layer(key) for i, key in enumerate(keys)}


def transformer_loss(params, x) -> jax.Array:
    """Mean squared output; the activation is the cheap one."""

    def norm(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    for i in range(len(params)):
        p = params[f"Block_{i}"]
        h = norm(x, p["scale_1"])
        scores = jnp.einsum("bsd,btd->bst", h @ p["q"], h @ p["k"])
        attention = jax.nn.softmax(scores / h.shape[-1] ** 0.5)
        x = x + attention @ (h @ p["v"]) @ p["o"]
        h = jax.nn.relu(norm(x, p["scale_2"]) @ p["up"] + p["up_bias"])
        x = x + h @ p["down"] + p["down_bias"]
    return jnp.mean(x**2)


def train_step(tx: optax.GradientTransformation, loss: Callable, params, batch) -> Case:
    """A cycle of train steps."""

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return cycle_of_steps(step, params, tx.init(params), batch)


def main() -> None:
    args = parser(__doc__).parse_args()
    adam = optax.adam(1e-3)
    optimizers = {
        "adam": adam,
        "chain(priority_prop, adam)": optax.chain(priority_prop(0.5), adam),
        "chain(clip_by_global_norm, adam)": optax.chain(
            optax.clip_by_global_norm(1.0), adam
        ),
    }
    models = {
        "MLP, 10M parameters, batch 128": (mlp_loss, mlp(), (128, 1024)),
        "MLP, 10M parameters, batch 1024": (mlp_loss, mlp(), (1024, 1024)),
        "transformer, 200 leaves": (transformer_loss, transformer(), (4, 64, 128)),
    }
    rows = []
    for memory in ("malloc as it is", "memory kept"):
        if memory == "memory kept" and not keep_memory():
            print("no glibc to tell to keep memory")
            break
        for model, (loss, params, shape) in models.items():
            batch = jax.random.normal(jax.random.key(1), shape)
            timings = compare(
                {
                    name: train_step(tx, loss, params, batch)
                    for name, tx in optimizers.items()
                },
                rounds=args.rounds or 15,
            )
            print(f"{model}, {memory}")
            print_table(timings)
            rows += as_rows(timings, model=model, memory=memory)
    write_json("overhead", rows, args.out)


if __name__ == "__main__":
    main()

"""What `priority_prop` costs a train step: `chain(priority_prop, adam)` over `adam`.

A 10M-parameter MLP and a transformer of 200 leaves, whole train steps with donated
params and state, averaged over cycles. Target: 1.03. Clipping by the global norm is
there to compare with: it, too, needs all gradients before it can change one.

Then all gradients are in memory at once. XLA:CPU asks for that memory at each step, and
from 32 MB on glibc answers with fresh pages, which is most of what the MLP pays.
To measure without that:

    MALLOC_MMAP_THRESHOLD_=4294967295 MALLOC_TRIM_THRESHOLD_=4294967295 \\
    MALLOC_TOP_PAD_=268435456 python benchmarks/overhead.py --out warm.json
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
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    ours = optax.chain(priority_prop(0.5), adam)
    models = {
        "MLP, 10M parameters": (mlp_loss, mlp(), (128, 1024)),
        "transformer, 200 leaves": (transformer_loss, transformer(), (4, 64, 128)),
    }
    rows = []
    for model, (loss, params, shape) in models.items():
        batch = jax.random.normal(jax.random.key(1), shape)
        timings = compare(
            {
                "adam": train_step(adam, loss, params, batch),
                "chain(priority_prop, adam)": train_step(ours, loss, params, batch),
                "chain(clip_by_global_norm, adam)": train_step(
                    clipped, loss, params, batch
                ),
            },
            rounds=args.rounds or 15,
        )
        print(model)
        print_table(timings)
        rows += as_rows(timings, model=model)
    write_json("overhead", rows, args.out)


if __name__ == "__main__":
    main()

"""Data parallelism, once by the compiler and once by hand, with the same budget.

Under `jax.jit` with sharded arrays nothing is needed: gradients are global, and so is
the choice. Inside `jax.shard_map` every device computes on its own part of the batch;
`axis_name` averages what the priorities are made from, so that all choose alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from _data import argument_parser, batches, load_images
from priorityprop_jax import prioritize


jax.config.update("jax_num_cpu_devices", 4)  # before JAX looks for devices


def init(key, sizes):
    def layer(key, m, n):
        return {"w": jax.random.normal(key, (m, n)) * m**-0.5, "b": jnp.zeros((1, n))}

    keys = jax.random.split(key, len(sizes) - 1)
    return [layer(*args) for args in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def predict(params, images):
    x = images.reshape(len(images), -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, images, labels, axis_name):
    logits = predict(params, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def make_train_step(tx, axis_name=None):
    def train_step(params, opt_state, images, labels):
        grads = jax.grad(loss_fn)(params, images, labels, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return train_step


def main():
    args = argument_parser(__doc__).parse_args()
    steps = 30 if args.quick else 1000
    data = load_images(args.data_dir)
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    mesh = Mesh(np.array(devices), ("data",))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    print(f"{len(devices)} {devices[0].platform} devices")

    prioritized = functools.partial(prioritize, optax.adam(1e-3), budget=0.5)
    by_compiler, by_hand = prioritized(), prioritized(axis_name="data")
    by_hand_step = jax.shard_map(
        make_train_step(by_hand, "data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=(P(), P()),
    )
    sizes = [data.train_images[0].size, 128, 128, data.classes]
    for name, tx, train_step in [
        ("jit with NamedSharding", by_compiler, make_train_step(by_compiler)),
        ("shard_map with axis_name", by_hand, by_hand_step),
    ]:
        params = jax.device_put(init(jax.random.key(args.seed), sizes), replicated)
        opt_state = jax.jit(tx.init, out_shardings=replicated)(params)
        train_step = jax.jit(train_step, donate_argnums=(0, 1))
        size = 32 * len(devices)
        for batch in batches(*data[:2], size=size, steps=steps, seed=args.seed):
            batch = jax.device_put(batch, split)
            params, opt_state = train_step(params, opt_state, *batch)
            jax.block_until_ready(params)  # steps queued on one CPU can deadlock
        hits = predict(params, data.test_images).argmax(-1) == data.test_labels
        counts = optax.tree.get(opt_state, "counts")
        print(f"{name}: test accuracy {hits.mean():.2%}, updates {counts}")


if __name__ == "__main__":
    main()

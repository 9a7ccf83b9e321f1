"""A process that trains a small model, and goes on where the one before was stopped.

Run as ``python trainer_process.py DIRECTORY OUTPUT [deep|nnx] [replay] [i,n,port]``. It
saves nothing if DIRECTORY is empty; ``i,n,port`` makes it process i of n. It ends with
a line that says why, and, if all epochs are done, with the results in OUTPUT.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from priorityprop_jax import PriorityPropTrainer
from priorityprop_jax.training import ArrayLoader


EPOCHS, KEEP = 5, 2
SECONDS = 0.02  # a batch, so that there is time to be killed in


def make_data():
    x = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(np.int32)


class Slow:
    """A shuffled loader that takes its time; its last batch is a smaller one."""

    def __init__(self, seed):
        self._loader = ArrayLoader(make_data(), batch_size=8, seed=seed)

    def set_epoch(self, epoch):
        self._loader.set_epoch(epoch)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        for batch in self._loader:
            time.sleep(SECONDS)
            yield batch


def seeded():
    """A loader that knows nothing of epochs: a random stream from the first one on."""
    rng, (x, y) = np.random.default_rng(2), make_data()

    def epoch():
        for part in np.array_split(rng.permutation(len(x)), 7):
            time.sleep(SECONDS / 5)
            yield x[part], y[part]

    return epoch


def function(hidden):
    """A network with dropout, in plain JAX."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5
    sizes = ((6, 16), *[(16, 16)] * (hidden - 1), (16, 2))
    params = {f"w{i}": normal(*shape) for i, shape in enumerate(sizes)}

    def apply(params, x, train, key):
        for i in range(hidden):
            x = jnp.tanh(x @ params[f"w{i}"])
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, x.shape)
            x = jnp.where(kept, x / 0.8, 0) if train else x
        return x @ params[f"w{hidden}"]

    return params, apply


def module():
    """One with BatchNorm, as a module that has random streams of its own."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))

    return Network(nnx.Rngs(0))


def main(directory, output, *options):
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half of it
    hidden, every = (2, 2) if "deep" in options else (1, 5)
    process, devices = 0, {}
    for place in (x for x in options if "," in x):
        process, processes, port = map(int, place.split(","))
        jax.config.update("jax_num_cpu_devices", 1)
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(address, processes, process)
        mesh = Mesh(np.array(jax.devices()), ("data",))
        devices = {"mesh": mesh, "sharding": "fsdp", "mode": "dynamic"}
    trainer = PriorityPropTrainer(
        module() if "nnx" in options else function(hidden),
        optax.adam(0.01),
        optax.softmax_cross_entropy_with_integer_labels,
        total_budget=0.5,
        max_updates=4,
        recalc_every=4,
        checkpoint_dir=directory or None,
        save_every_steps=every,
        keep=KEEP,
        **devices,
    )
    loader = seeded() if "replay" in options else Slow(1 + process)
    resume = bool(directory)
    history = trainer.train(loader, EPOCHS, metrics="accuracy", resume=resume)
    print("ended:", history.stopped, trainer.step, flush=True)
    if history.stopped is None:
        np.savez(output, **results(trainer))


def results(trainer):
    tree = trainer.params, trainer.state, trainer.opt_state, dict(trainer.history)
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(path): x for path, x in named}
    arrays["cycles"] = np.array(str(trainer.history.cycles))
    arrays["spent"] = np.array(trainer.get_priority_report().savings.spent)
    is_key = lambda x: jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)

    def plain(x):
        x = jax.random.key_data(x) if is_key(x) else x
        return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)

    return {path: plain(x) for path, x in arrays.items() if "seconds" not in path}


if __name__ == "__main__":
    main(*sys.argv[1:])

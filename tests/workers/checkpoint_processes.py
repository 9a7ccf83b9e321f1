"""One of several processes that save together until one of them gets SIGTERM.

Run as ``python checkpoint_processes.py PROCESS PROCESSES PORT DIRECTORY``. It prints
the steps at which it saved, and what it restored.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from priorityprop_jax.training import Checkpoints
from priorityprop_jax.training._sigterm import stop_on_sigterm


MOST = 3000  # steps


def values(step):
    """What is to be saved after `step`, as NumPy arrays."""
    split = np.arange(8.0, dtype=np.float32).reshape(4, 2) + step
    return {"split": split, "whole": split[:, 0] + 1, "host": np.float64(step)}


def place(tree, mesh):
    """Parts of "split" are with one process each; "whole" is with all of them."""
    specs = {"split": P("i"), "whole": P()}
    make = lambda x, spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda index: x[index]
    )
    placed = {name: make(tree[name], spec) for name, spec in specs.items()}
    key = jax.random.key(int(tree["host"]))
    for name, keys, spec in (
        ("key", key, P()),
        ("keys", jax.random.split(key), P("i")),
    ):
        data = make(np.asarray(jax.random.key_data(keys)), spec)
        placed[name] = jax.random.wrap_key_data(data)
    return {**tree, **placed}


def local(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    parts = x.addressable_shards if isinstance(x, jax.Array) else [x]
    return [np.asarray(getattr(part, "data", part)).tolist() for part in parts]


def main(process, processes, port, directory):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(process), initialization_timeout=60
    )
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("i",), axis_types=types)
    increase = jax.jit(lambda x: x + 1, donate_argnums=0)
    steps, tree = [], place(values(0), mesh)
    saved = Checkpoints(directory, every_minutes=0.4 / 60, keep=2)
    with saved, stop_on_sigterm() as stop:
        for step in range(1, MOST):
            for name in ("split", "whole"):
                tree[name] = increase(tree[name])
            tree["host"], tree["key"] = (
                tree["host"] + 1,
                place(values(step), mesh)["key"],
            )
            if saved.maybe_save(step, tree, {"step": step}):
                steps.append(step)
            time.sleep(0.01 * (1 + int(process)))  # no two machines are alike
            if stop.is_set(step):
                break
        saved.save(step, tree, {"step": step})
        restored, meta = saved.restore(place(values(0), mesh))
    same = all(
        local(restored[name]) == local(x) and restored[name].sharding == x.sharding
        for name, x in tree.items()
        if isinstance(x, jax.Array)
    )
    out = {"steps": steps, "end": step, "meta": meta, "same": same}
    print(json.dumps({**out, "host": float(restored["host"])}), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

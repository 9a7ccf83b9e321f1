"""One of several processes that train together, each on data of its own.

Run as ``python two_processes.py PROCESS PROCESSES PORT OUTPUT``; the test imports
`by_compiler` and `by_hand` as well, to run both in one process and compare.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from priorityprop_jax import prioritize, priority_prop


STEPS = 6
SETTINGS = {"budget": 0.4, "max_updates": 6, "recalc_every": 4}
SHAPES = {"w1": (5, 8), "b1": (8,), "w2": (8, 6), "b2": (6,), "w3": (6, 2)}


def initial_params():
    rng = np.random.default_rng(0)
    make = lambda shape: rng.normal(size=shape).astype(np.float32)
    return {name: make(shape) for name, shape in SHAPES.items()}


def batch_of(process):
    """Inputs that only this process has; the others' are much larger or smaller."""
    x = np.random.default_rng(1 + process).normal(size=(STEPS, 4, 5))
    return (x * 10.0**process).astype(np.float32)


def loss_fn(params, x):
    x = jnp.tanh(x @ params["w1"] + params["b1"][None])
    x = jnp.tanh(x @ params["w2"] + params["b2"][None])
    return jnp.mean((x @ params["w3"] - 1.0) ** 2)


def make_mesh(devices):
    return jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=devices)


def run(mesh, tx, step, batches):
    """Quotas after each step and the last params, as each local device has them."""
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("i"))
    everywhere = lambda x: jax.make_array_from_callback(
        np.shape(x), replicated, lambda index: np.asarray(x)[index]
    )
    params = jax.tree.map(everywhere, initial_params())
    state = jax.jit(tx.init, out_shardings=replicated)(params)
    step, quotas = jax.jit(step), []
    for x in batches:
        x = jax.make_array_from_process_local_data(split, x)
        params, state = step(params, state, x)
        quotas.append(local(optax.tree.get(state, "quotas")))
    out = {name: local(x) for name, x in params.items()}
    return {"quotas": np.stack(quotas, axis=1), **out}


def local(x):
    return np.stack([np.asarray(shard.data) for shard in x.addressable_shards])


def by_compiler(mesh, batches):
    """jit over a global mesh: the gradients are those of the batch of all processes."""
    tx = prioritize(optax.adam(1e-2), **SETTINGS)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return run(mesh, tx, step, batches)


def by_hand(mesh, batches, axis_name="i"):
    """shard_map: each process has gradients of its own; magnitudes are averaged."""
    tx = priority_prop(**SETTINGS, axis_name=axis_name)

    def step(params, state, x):
        if hasattr(jax.lax, "pcast"):
            vary = lambda p: jax.lax.pcast(p, "i", to="varying")
        else:  # before JAX 0.9
            vary = lambda p: jax.lax.pvary(p, "i")
        params = jax.tree.map(vary, params)
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state)
        apply = lambda p, u: jax.lax.pmean(p - 1e-2 * u, "i")
        return jax.tree.map(apply, params, updates), state

    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("i")),
        out_specs=(P(), P()),
        check_vma=axis_name is not None,
    )
    return run(mesh, tx, step, batches)


def main(process, processes, port, output):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(process), initialization_timeout=60
    )
    assert jax.process_count() == int(processes) == jax.device_count()
    mesh, batches = make_mesh(jax.devices()), batch_of(int(process))
    results = {
        f"{run.__name__}/{name}": value
        for run in (by_compiler, by_hand)
        for name, value in run(mesh, batches).items()
    }
    np.savez(output, **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

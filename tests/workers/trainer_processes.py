"""One of several processes in which `PriorityPropTrainer` trains one model.

Run as ``python trainer_processes.py PROCESS PROCESSES PORT OUTPUT``; the test imports
`train` as well, to run it in one process, on the batches of all.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from priorityprop_jax.training._batches import ArrayLoader
from priorityprop_jax.training._trainer import PriorityPropTrainer


PROCESSES = 2
EXAMPLES, BATCH = 21, 8  # of each process, so that the last batch is smaller
EPOCHS = 3
RUNS = {"data parallel": None, "fsdp": "fsdp"}


def params():
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 16), "b1": (16,), "w2": (16, 16), "b2": (16,), "w3": (16, 3)}
    draw = lambda shape: rng.normal(size=shape).astype(np.float32) * 0.5
    return {name: draw(shape) for name, shape in shapes.items()}


def apply(params, x):
    for i in ("1", "2"):
        x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"][None])
    return x @ params["w3"]


def data_of(process):
    rng = np.random.default_rng(1 + process)
    x = (rng.normal(size=(EXAMPLES, 6)) * 3.0**process).astype(np.float32)
    return x, (x[:, 0] > 0) + (x[:, 1] > 1) * 1


def loader_of(process, shuffle=True):
    return ArrayLoader(data_of(process), BATCH, shuffle=shuffle, seed=process)


def train(mesh, loader, eval_data, sharding=None):
    """What there is to know of a run, for JSON."""
    trainer = PriorityPropTrainer(
        (params(), apply),
        optax.adam(1e-2),
        optax.softmax_cross_entropy_with_integer_labels,
        total_budget=0.5,
        max_updates=4,
        recalc_every=4,
        mode="dynamic",
        mesh=mesh,
        sharding=sharding,
    )
    history = trainer.train(loader, EPOCHS, eval_data=eval_data, metrics="accuracy")
    placed = {}
    if mesh is not None:
        placed = {k: str(tuple(p.sharding.spec)) for k, p in trainer.params.items()}
    columns = "loss", "accuracy", "eval_loss", "eval_accuracy", "step", "updates"
    evaluated = trainer.evaluate(eval_data, metrics="accuracy")
    inputs = [x for x, _ in eval_data]
    predicted = trainer.predict(inputs).tolist()
    extra = {"placed": placed, "evaluated": evaluated, "predicted": predicted}
    return {k: history[k] for k in columns} | extra


def refused(mesh, loader):
    """Why a loader cannot be trained with."""
    try:
        train(mesh, loader, loader)
    except ValueError as error:
        return str(error)


def main(process, processes, port, output):
    jax.config.update("jax_num_cpu_devices", 1)
    process = int(process)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), process, initialization_timeout=60
    )
    assert jax.process_count() == int(processes) == jax.device_count() == PROCESSES
    mesh = Mesh(np.array(jax.devices()), ("data",))
    own, plain = loader_of(process), loader_of(process, shuffle=False)
    results = {k: train(mesh, own, plain, sharding) for k, sharding in RUNS.items()}
    x, y = data_of(process)
    fewer = EXAMPLES - 8 * process
    results["fewer batches"] = refused(mesh, ArrayLoader((x[:fewer], y[:fewer]), BATCH))
    results["smaller batches"] = refused(mesh, ArrayLoader((x, y), BATCH - process))
    results["no mesh"] = refused(None, own)
    np.savez(output, json=json.dumps(results))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two processes train one model, as they would on two machines.

Each process holds one part of the data and takes half of each batch from it; gradients,
and with them who gets the budget, are those of the whole batch. Without arguments this
script starts both processes here. On machines of your own start it on each, with the
address of the first: `multi_process.py --address HOST:PORT --processes 2 --process 0`.
"""

import os
import socket
import subprocess
import sys
import time

import jax
import optax
from flax import nnx

from _data import argument_parser, load_images
from priorityprop_jax import ArrayLoader, PriorityPropTrainer


class MLP(nnx.Module):
    def __init__(self, features, classes, rngs):
        self.first = nnx.Linear(features, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.last = nnx.Linear(128, classes, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def train(args):
    """What each process does. Only the first two statements know of the others."""
    jax.distributed.initialize(args.address, args.processes, args.process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))

    data = load_images(args.data_dir)
    part = slice(args.process, None, args.processes)  # other examples in each process
    n = len(data.train_labels) // args.processes  # but as many
    train_part = data.train_images[part][:n], data.train_labels[part][:n]
    n = len(data.test_labels) // args.processes
    test_part = data.test_images[part][:n], data.test_labels[part][:n]

    features = data.train_images[0].size
    trainer = PriorityPropTrainer(
        MLP(features, data.classes, nnx.Rngs(args.seed)),  # the same in each process
        optax.adam(1e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        total_budget=0.5,
        mesh=mesh,
    )
    history = trainer.train(
        ArrayLoader(train_part, 64 // args.processes, seed=args.seed),
        epochs=2 if args.quick else 20,
        eval_data=ArrayLoader(test_part, 64, shuffle=False),
        metrics="accuracy",
    )
    # What one process prints, all have: the losses are those of the whole batches.
    print(
        f"process {args.process}: {len(train_part[1])} examples, loss "
        f"{history['loss'][-1]:.6f}, test accuracy {history['eval_accuracy'][-1]:.2%}, "
        f"updates {history['updates'][-1]}",
        flush=True,
    )
    jax.distributed.shutdown()


def start(processes):
    """Starts all of them here. If one fails, the others are ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--address", address, "--processes"]
    env = {k: v for k, v in os.environ.items() if "_proxy" not in k.lower()}
    env["JAX_PLATFORMS"] = "cpu"  # one device for each
    command += [str(processes), "--process"]
    children, codes = [], [None]
    try:
        for i in range(processes):
            children.append(subprocess.Popen([*command, str(i)], env=env))
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--address", help="of process 0; default: start all here")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", type=int, default=0)
    args = parser.parse_args()
    if args.address is None:
        start(args.processes)
    else:
        train(args)

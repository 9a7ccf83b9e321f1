"""What is trained: a `Workload`, and where to find the ones there are."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


# Each has a module of its name in this package, with a function
# `workload(data_dir, scale) -> Workload` and, if it wants arms of its own,
# a function `arms() -> dict[str, Arm]`.
WORKLOADS = (
    "mnist_mlp",
    "mnist_cnn",
    "char_transformer",
    "finetune_cnn",
    "finetune_transformer",
    "embedding",
)
SCALES = ("small", "large")


class Workload(NamedTuple):
    """A model, its data, and how good is good enough.

    Attributes:
      name: as in `WORKLOADS`.
      init: seed -> params; pretrained ones for fine-tuning.
      loss: (params, batch) -> the training loss; can be jitted.
      batches: (seed, batch_size, steps) -> an iterator over so many batches of NumPy
        arrays, the same ones for the same arguments.
      quality: params -> a number on held-out data; larger is better.
      targets: in units of quality, by rising difficulty.
      batch_size: of the tuned plain baseline.
      learning_rate: the middle of the grid.
      steps: the longest horizon of the grid.
      evaluations: how often quality is measured in a run, after the one at the start.
      examples: size of the training set, for arms that cache; None: not cacheable.
      description: a line.
      warmup: share of a run in which the learning rate rises, for all arms alike.
      decay: "linear" or "cosine", to zero at the end of each run.
      b2: of Adam, for all arms alike.
    """

    name: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any], Any]
    batches: Callable[[int, int, int], Iterator[Any]]
    quality: Callable[[Any], float]
    targets: tuple[float, ...]
    batch_size: int
    learning_rate: float
    steps: int
    evaluations: int
    examples: int | None = None
    description: str = ""
    warmup: float = 0.0
    decay: str = "linear"
    b2: float = 0.999


def load(
    name: str, data_dir: str | None, scale: str = "small"
) -> tuple[Workload, Mapping[str, Any]]:
    """A workload by its name, and the arms that only it has."""
    if name not in WORKLOADS:
        raise ValueError(f"WORKLOAD must be one of {', '.join(WORKLOADS)}, got {name}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    try:
        module = importlib.import_module(f"evaluation.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"evaluation.{name}":
            raise
        raise ValueError(f"there is no workload {name} in this checkout") from None
    arms = getattr(module, "arms", dict)()
    return module.workload(data_dir or os.environ.get("PRIORITYPROP_DATA"), scale), arms


def shuffled(seed: int, examples: int, batch_size: int, steps: int) -> Iterator[Any]:
    """The examples of each batch, reshuffled after each pass over all of them."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, int)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.append(order, rng.permutation(examples))
        chosen, order = order[:batch_size], order[batch_size:]
        yield chosen

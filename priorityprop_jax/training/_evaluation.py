"""A model that is not in training, over a loader."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ._batches import ArrayLoader, feed
from ._metrics import Background, Means
from ._objective import Objective, split_batch, Structure
from ._placement import Placement


def evaluate(
    objective: Objective,
    program: Callable[..., Any],
    model: tuple[Any, Any],
    loader: Any,
    placement: Placement,
    name: str,
) -> dict[str, float]:
    """Means of loss and metrics over the examples of a loader.

    Args:
      objective: the loss and the metrics.
      program: its `evaluate`, compiled.
      model: params and state.
      loader: of batches as in training.
      placement: where the params are.
      name: of the loader, for errors.
    """
    means, queue, names = Means(), Background(), []
    batches = feed(
        loader,
        placement,
        padded=lambda batch: objective.is_by_example(*model, batch, False),
        prepare=Structure(objective),
        name=name,
    )
    with contextlib.closing(batches):
        for batch in batches:
            names = names or objective.names(*model, batch.data, False)
            sums = program(*model, batch.data, batch.weights)
            placement.wait(sums)
            queue.push(None, sums)
            for _, sums in queue.pop():
                means.add(names, sums)
    for _, sums in queue.pop(everything=True):
        means.add(names, sums)
    return means.means()


def predict(
    program: Callable[..., Any],
    model: tuple[Any, Any],
    inputs: Any,
    batch_size: int,
    placement: Placement,
) -> Any:
    """The outputs for all examples, in order.

    Args:
      program: `Objective.predict`, compiled.
      model: params and state.
      inputs: an array or a mapping of arrays, of all examples; else a loader.
      batch_size: for arrays.
      placement: where the params are.
    """
    whole = _is_whole(inputs)
    loader = ArrayLoader(inputs, batch_size, shuffle=False) if whole else inputs
    prepare = None if whole else _inputs_of
    found, queue = [], Background()
    # Of what stands for no example nothing is kept.
    keep = lambda count, out: found.append(jax.tree.map(lambda x: x[:count], out))
    batches = feed(loader, placement, padded=True, prepare=prepare, name="inputs")
    with contextlib.closing(batches):
        for batch in batches:
            out = placement.local(program(*model, batch.data))
            queue.push(batch.count, out)
            for count, out in queue.pop():
                keep(count, out)
    for count, out in queue.pop(everything=True):
        keep(count, out)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _is_whole(inputs: Any) -> bool:
    """Whether it is arrays of all examples, no loader of batches."""
    parts = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return all(hasattr(x, "shape") and hasattr(x, "dtype") for x in parts)


def _inputs_of(batch: Any) -> Any:
    """Of a batch with labels, or without."""
    try:
        return split_batch(batch)[0]
    except ValueError:
        return batch

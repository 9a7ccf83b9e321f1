"""`PriorityPropTrainer`: model, optimizer and loss function in, a trained model out."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .._checks import check_count
from .._priority import DepthFactor
from .._scores import Score
from ..report import PriorityReport
from ..training._history import History
from ._budget import PriorityBudget


class PriorityPropTrainer:
    """Trains a model under a budget of updates.

    A plain loop around `PriorityBudget`, for batches of inputs and targets. For
    anything else, such as mixed precision, write the loop and use the budget.

    Args:
      model: called with the inputs. It stays where it is: inputs and targets are moved
        to the device of its parameters.
      optimizer: see `PriorityBudget`.
      loss_fn: ``loss_fn(outputs, targets)``, a scalar.
      total_budget: as `budget` of `PriorityBudget`: updates in a cycle, or a share.
      min_updates: see `PriorityBudget`, like all that follow.
      max_updates: see `PriorityBudget`.
      recalc_every: see `PriorityBudget`.
      magnitude: see `PriorityBudget`.
      score: see `PriorityBudget`.
      depth_factor: see `PriorityBudget`.
      depth_from: see `PriorityBudget`.
      depths: see `PriorityBudget`.
      seed: see `PriorityBudget`.
      skip: see `PriorityBudget`.

    Attributes:
      budget: the `PriorityBudget`. Between calls of `train` the optimizer is free.
      history: of all calls of `train`.

    Raises:
      ValueError, TypeError: as for `PriorityBudget`; `loss_fn` cannot be called.

    Examples:
      >>> import torch
      >>> from torch import nn
      >>> from torch.utils.data import DataLoader, TensorDataset
      >>> from priorityprop_jax.torch import PriorityPropTrainer
      >>> x = torch.randn(64, 3)
      >>> dataloader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
      >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
      >>> trainer = PriorityPropTrainer(
      ...     model=model,
      ...     optimizer=torch.optim.Adam(model.parameters(), lr=0.1),
      ...     loss_fn=nn.CrossEntropyLoss(),
      ...     total_budget=20,
      ... )
      >>> history = trainer.train(dataloader, epochs=10)
      >>> history["loss"][0] > history["loss"][-1], sum(history["updates"][-1])
      (True, 80)
      >>> trainer.get_priority_report().step
      40
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        total_budget: int | float | Callable[[int], Any] = 100,
        min_updates: int = 1,
        max_updates: int = 20,
        recalc_every: int = 10,
        *,
        magnitude: str = "l2",
        score: str | Score = "priority",
        depth_factor: float | DepthFactor | Mapping[str, float] = 1.0,
        depth_from: str = "loss",
        depths: str | Mapping[str, int] = "trace",
        seed: int = 0,
        skip: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be a function of outputs and targets, got {loss_fn!r}"
            )
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.budget = PriorityBudget(
            model,
            optimizer,
            total_budget,
            min_updates,
            max_updates,
            recalc_every,
            magnitude=magnitude,
            score=score,
            depth_factor=depth_factor,
            depth_from=depth_from,
            depths=depths,
            seed=seed,
            skip=skip,
        )
        self.budget.detach()
        self.history = History(self.budget.names)

    def train(self, dataloader: Iterable[Any], epochs: int = 10) -> History:
        """Trains for so many more epochs.

        Args:
          dataloader: any iterable of pairs ``(inputs, targets)``, gone through once in
            each epoch.
          epochs: their number.

        Returns:
          The `History`: by epoch ``"loss"``, the mean over the examples, and running
          totals ``"step"``, ``"seconds"`` and ``"updates"`` (a list, by parameter).

        Raises:
          ValueError: `epochs` is less than 1; `dataloader` has no batch (any more);
            the loss is no scalar.
          TypeError: a batch is no pair.
        """
        check_count("epochs", epochs, least=1)
        past = self.history["seconds"][-1] if self.history else 0.0
        start = time.perf_counter()
        try:
            for _ in range(epochs):
                self.model.train()
                loss = self._epoch(dataloader)
                self.history.append(
                    {
                        "epoch": len(self.history.get("epoch", [])),
                        "loss": loss,
                        "step": int(self.budget.state.step),
                        "seconds": past + time.perf_counter() - start,
                        "updates": self.budget.state.counts.tolist(),
                    }
                )
        finally:
            self.budget.detach()
        return self.history

    def get_priority_report(self) -> PriorityReport:
        """Who got which share of the budget; prints as a table."""
        return self.budget.report()

    def _epoch(self, dataloader: Iterable[Any]) -> float:
        """The mean loss. It stays on the device until the end: no step waits for it."""
        device = next(self.model.parameters()).device
        total, examples = torch.zeros((), device=device), 0
        for batch in _iterate(dataloader):
            inputs, targets = _move(_pair(batch), device)
            self.optimizer.zero_grad()
            with self.budget.step():
                loss = self.loss_fn(self.model(inputs), targets)
                if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                    what = getattr(loss, "shape", type(loss).__name__)
                    raise ValueError(f"loss_fn must return a scalar, got {what}")
                loss.backward()
                self.optimizer.step()
            n = len(targets) if getattr(targets, "ndim", 0) else 1
            total += n * loss.detach().reshape(())
            examples += n
            self._record_cycle()
        if not examples:
            raise ValueError(
                f"dataloader had no batch in epoch {len(self.history.get('epoch', []))}"
                f"; an iterator can be gone through only once"
            )
        return float(total) / examples

    def _record_cycle(self) -> None:
        state = self.budget.state
        cycle, r = divmod(int(state.step), np.size(state.rank))
        if r == 0 and self.history.wants_cycle(cycle - 1):
            vectors = (state.counts, state.quotas, state.scores)
            self.history.append_cycle(int(state.step), *(x.tolist() for x in vectors))


def _iterate(dataloader: Iterable[Any]) -> Iterator[Any]:
    """``iter(dataloader)``, which may start worker processes."""
    with warnings.catch_warnings():
        # JAX warns of each fork. It has nothing to do just now, and the workers of a
        # DataLoader do not use it.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        return iter(dataloader)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        what = type(batch).__name__
        if isinstance(batch, list | tuple):
            what += f" of {len(batch)}"
        raise TypeError(
            f"a batch must be a pair (inputs, targets), got a {what}; for others write "
            f"the loop and use PriorityBudget"
        )
    return batch[0], batch[1]


def _move(x: Any, device: torch.device) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {key: _move(value, device) for key, value in x.items()}
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return type(x)(_move(value, device) for value in x)
    return x

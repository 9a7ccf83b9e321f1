"""`PriorityBudget`: a block around a training step, in which parameters truly rest."""

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._priority import (
    check_settings,
    DepthFactor,
    init_priority,
    PriorityPropState,
    Settings,
)
from .._scores import Score
from ..report import priority_report, PriorityReport
from ._depths import depths_by_name, depths_by_use, Uses, watch
from ._magnitudes import sizes_of
from ._parameters import check_optimizer, Named, units_of
from ._policy import Policy, Row, Turn


_uncompiled: Any = torch.compiler.disable  # what it returns has no useful type


class _Block:
    """One ``with budget.step():``, and what it has to put back.

    `torch.compile` cannot follow in here: where it compiles a whole training step, that
    runs as it is, and what it calls is compiled.
    """

    def __init__(self, budget: "PriorityBudget"):
        self.budget = budget
        self.frozen: list[torch.Tensor] = []  # by us
        # Gradients kept from the optimizer, with their parameters.
        self.hidden: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.kept: dict[int, torch.Tensor] = {}  # gradients to be used again
        self.turn: Turn | None = None  # to be committed once the optimizer is done
        self.depth = 0  # of steps within steps
        self.repeating = self.stepped = False
        self.watching: contextlib.ExitStack | None = None

    @_uncompiled
    def __enter__(self) -> None:
        self.budget._open(self)

    @_uncompiled
    def __exit__(self, *error: Any) -> None:
        self.budget._close(self)
        if self.depth and error[0] is None:
            raise RuntimeError(
                "optimizer.step() failed in the block, which went on: let the error "
                "out of the block, or catch it outside, and begin another"
            )

    def hide(self, p: torch.Tensor) -> None:
        """Takes the gradient away, for a while."""
        if p.grad is not None:
            self.hidden.append((p, p.grad))
            p.grad = None

    def show(self) -> None:
        """Gives all gradients back."""
        for p, g in reversed(self.hidden):
            p.grad = g
        self.hidden.clear()


class PriorityBudget:
    """Spends a fixed budget of updates on the parameters with the highest priority.

    ::

        budget = PriorityBudget(model, optimizer, budget=0.5)
        for x, y in loader:
            with budget.step():
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()

    Scores, quotas and schedule are those of `priority_prop`; the updates are those of
    `prioritize`. In the block, parameters that are not due do not require a gradient:
    autograd leaves out their weight gradients, and the chain below the lowest active
    layer. Their ``.grad`` is None, so the optimizer leaves them and their state alone.
    A parameter that is due k times gets k steps of the optimizer from the same
    gradient. On the way out, also after an exception, all is as it was.

    The schedule moves with ``optimizer.step()``. A block without one, such as for a
    part of a batch whose gradients are accumulated, or where a `GradScaler` skips the
    step, leaves the schedule where it is: the next block has the same active
    parameters. After a block with a step, the gradients are set to None, as
    ``optimizer.zero_grad()`` does. ``optimizer.step()`` outside of a block is an error,
    see `detach`.

    The first step of each cycle computes all gradients. Where nobody is due at a step,
    one small parameter near the loss keeps requiring a gradient, which is not used, so
    that ``loss.backward()`` works.

    Args:
      model: an `nn.Module`, also in DDP (with ``find_unused_parameters=True``) or
        compiled (see `skip`); or named parameters. Those that the optimizer holds and
        that require a gradient now are the units; a shared one is one unit. What is
        frozen now stays frozen, and has no part in the budget.
      optimizer: any `torch.optim.Optimizer` that updates each parameter by itself. It
        must hold no parameter that `model` does not name.
      budget: see `priority_prop`. A schedule is called with the number of the step as
        an integer.
      min_updates: see `priority_prop`.
      max_updates: see `priority_prop`.
      recalc_every: see `priority_prop`.
      magnitude: see `priority_prop`.
      score: see `priority_prop`.
      depth_factor: see `priority_prop`; or factors by name.
      depth_from: see `priority_prop`.
      depths: ``"trace"``: by the order in which parameters are used in the first block,
        which runs without `torch.compile`, or with a warning by their names where that
        cannot be seen; ``"names"``; or depths by name, as from `infer_depths`.
      seed: see `priority_prop`.
      skip: whether resting parameters stop requiring a gradient. False: all gradients
        are computed, and the optimizer does not see those of what rests. That saves
        nothing of the backward pass, but it is one program for `torch.compile`, which
        otherwise compiles each set of resting parameters, and any DDP will do.

    Raises:
      ValueError, TypeError: an argument cannot be meant; the optimizer and the model do
        not share their parameters; a parameter is in two groups, sharded or lazy; DDP
        does not look for unused parameters.

    Examples:
      >>> import torch
      >>> from torch import nn
      >>> from priorityprop_jax.torch import PriorityBudget
      >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
      >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
      >>> budget = PriorityBudget(model, optimizer, budget=0.5)
      >>> for _ in range(20):
      ...     with budget.step():
      ...         loss = model(torch.ones(16, 3)).square().mean()
      ...         loss.backward()
      ...         optimizer.step()
      >>> report = budget.report()
      >>> report.updates, report.units, report.step
      (40, 4, 20)
    """

    def __init__(
        self,
        model: nn.Module | Named,
        optimizer: torch.optim.Optimizer,
        budget: int | float | Callable[[int], Any] = 100,
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
        check_optimizer(optimizer)
        units = units_of(model, optimizer)
        self._group = _process_group(model, skip)
        names = list(units)
        if isinstance(depth_factor, Mapping):
            depth_factor = _by_name("depth_factor", depth_factor, names)
        if not isinstance(depths, Mapping) and depths not in ("trace", "names"):
            raise ValueError(
                f"depths must be 'trace', 'names' or a depth for each name, got "
                f"{depths!r}"
            )
        self._uses = Uses(units.values()) if depths == "trace" else None
        if isinstance(depths, str):
            depths = depths_by_name(names)
        settings = Settings(
            budget,
            min_updates,
            max_updates,
            recalc_every,
            "leaf",
            magnitude,
            score,
            depth_factor,
            depth_from,
            _by_name("depths", depths, names),
            "argsort",
            None,
            seed,
        )
        self._settings = settings = check_settings(settings)
        self._device = jax.local_devices(backend="cpu")[0]
        self._params: Any = OrderedDict(
            (name, jax.ShapeDtypeStruct(tuple(p.shape), np.float32))
            for name, p in units.items()
        )
        with jax.default_device(self._device):
            state = init_priority(settings, self._params)
        self._policy = Policy(settings, names, state, self._device)
        self._units, self._optimizer = list(units.values()), optimizer
        self._skip = skip
        self._block: _Block | None = None
        self._hooks: list[Any] = []
        self._attach()

    @property
    def names(self) -> list[str]:
        """Of the parameters, in the order of all vectors in `state`."""
        return list(self._params)

    @property
    def state(self) -> PriorityPropState:
        """Step, counts, scores, quotas: the state of `priority_prop`, in NumPy."""
        return self._policy.state

    def active(self) -> dict[str, bool]:
        """Which parameters require a gradient in the next block."""
        return dict(zip(self._params, self._policy.active(), strict=True))

    def report(self) -> PriorityReport:
        """Who got which share of the budget, as from `priority_report`."""
        return priority_report(self.state, self._params)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model and the optimizer.

        Plain lists and numbers: for `torch.save`, also with ``weights_only=True``, or
        for `json.dumps`. Any place within a cycle will do.
        """
        return self._policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called.

        Args:
          state: what it returned.

        Raises:
          ValueError: it is of other parameters or another `recalc_every`.
          RuntimeError: called within a block.
        """
        if self._block is not None:
            raise RuntimeError("load_state_dict was called within budget.step()")
        self._policy.load_state_dict(state)
        self._uses = None  # the depths are in the state

    def detach(self) -> None:
        """Leaves the optimizer alone until the next block: it may step outside.

        Raises:
          RuntimeError: called within a block.
        """
        if self._block is not None:
            raise RuntimeError("detach was called within budget.step()")
        while self._hooks:
            self._hooks.pop().remove()

    def step(self) -> contextlib.AbstractContextManager[None]:
        """The block around a forward pass, a backward pass and ``optimizer.step()``.

        Returns:
          A context manager: ``with budget.step(): ...``.

        Raises:
          RuntimeError: on entering, if a block is open; from ``optimizer.step()``, if
            it is called outside, twice in a block, or before ``loss.backward()``; on
            leaving, if ``optimizer.step()`` failed and the block went on.
        """
        return _Block(self)

    def _open(self, block: _Block) -> None:
        if self._block is not None:
            raise RuntimeError(
                "budget.step() was entered within budget.step(): leave the first block "
                "before the next begins"
            )
        self._attach()
        resting = self._resting() if self._skip else ()
        self._block = block
        try:
            for i in resting:
                p = self._units[i]
                if p.requires_grad:
                    block.frozen.append(p)
                    p.requires_grad_(False)
            if self._uses is not None:
                block.watching = watch(self._uses)
        except BaseException:
            self._close(block)
            raise

    def _close(self, block: _Block) -> None:
        self._block = None
        if block.watching is not None:
            block.watching.close()
        for p in block.frozen:
            p.requires_grad_(True)
        block.show()
        if block.stepped:  # a gradient is used once
            for group in self._optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

    def _resting(self) -> list[int]:
        """Whose gradients are left out in this block."""
        resting = self._policy.resting()
        if len(resting) < len(self._units):
            return resting
        # Nothing would require a gradient, and loss.backward() would fail.
        state = self._policy.state
        cost = lambda i: (state.scores[i] <= 0, state.depths[i], self._units[i].numel())
        cheapest = min(resting, key=cost)
        return [i for i in resting if i != cheapest]

    def _attach(self) -> None:
        if self._hooks:
            return
        # The optimizer must not keep a budget alive that nobody has any more.
        of = weakref.ref(self)

        def before(optimizer, args, kwargs):
            if (budget := of()) is not None:
                budget._before(args, kwargs)

        def after(optimizer, args, kwargs):
            if (budget := of()) is not None:
                budget._after()

        self._hooks += [
            self._optimizer.register_step_pre_hook(before),
            self._optimizer.register_step_post_hook(after),
        ]

    @_uncompiled
    def _before(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before the optimizer's step: who gets how many updates."""
        block = self._block
        if block is None:
            raise RuntimeError(
                "optimizer.step() was called outside of `with budget.step():`; put the "
                "forward pass, loss.backward() and optimizer.step() inside, or call "
                "budget.detach() to use the optimizer without the budget"
            )
        if block.repeating:
            return
        if block.depth:  # a class that calls its parent's step, which has hooks, too
            block.depth += 1
            return
        if block.stepped:
            raise RuntimeError(
                "optimizer.step() was called twice in one block: the schedule has a "
                "block for each step"
            )
        if kwargs.get("closure") is not None or len(args) > 1 and args[1] is not None:
            raise TypeError(
                "optimizer.step(closure) is not supported: compute the gradients in "
                "the block, then call optimizer.step()"
            )
        if all(p.grad is None for p in self._units):
            raise RuntimeError(
                "optimizer.step() was called, but no parameter has a gradient: call "
                "loss.backward() in the block before it"
            )
        block.depth = 1
        # A fused optimizer is told to unscale by itself, and whether to skip.
        found = getattr(self._optimizer, "found_inf", None)
        if found is not None and bool(found):
            return
        block.turn = self._policy.turn(self._sizes)
        for i in block.turn.row.repeated:
            if (g := self._units[i].grad) is not None:
                block.kept[i] = g.clone()  # some optimizers write to it
        for i in block.turn.row.resting:
            block.hide(self._units[i])

    @_uncompiled
    def _after(self) -> None:
        """After the optimizer's step: the second and further updates of this step."""
        block = self._block
        if block is None or block.repeating:
            return
        block.depth -= 1
        if block.depth:
            return
        if block.turn is not None:  # else the step was skipped
            row = block.turn.row
            block.repeating = True
            try:
                for j in range(1, max(row.given) if row.repeated else 1):
                    self._repeat(block, row, j)
            finally:
                block.repeating = False
                block.show()
            self._policy.commit(block.turn)
        block.stepped = True

    def _repeat(self, block: _Block, row: Row, j: int) -> None:
        """A step of the optimizer for those who are due more than j updates."""
        due = {id(self._units[i]) for i in row.repeated if row.given[i] > j}
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in due:
                    block.hide(p)
        for i, g in block.kept.items():
            if row.given[i] > j:
                self._units[i].grad = g.clone()
        self._optimizer.step()

    def _sizes(self) -> np.ndarray:
        """Of all gradients; before the first, the depths are set."""
        self._set_depths()
        gradients = [p.grad for p in self._units]
        sizes = sizes_of(gradients, self._settings.magnitude, self._device)
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is not None:
            sizes = (sizes / float(scale)).astype(np.float32)
        if self._group is not None:  # so that all processes decide alike
            vector = torch.from_numpy(sizes).to(self._units[0].device)
            first = torch.distributed.get_global_rank(self._group, 0)
            torch.distributed.broadcast(vector, first, group=self._group)
            sizes = vector.cpu().numpy()
        return sizes

    def _set_depths(self) -> None:
        """From the order of use, if that is what is wanted, before the first quotas."""
        if self._uses is None:
            return
        first = [self._uses.first.get(id(p)) for p in self._units]
        depths, self._uses = depths_by_use(self.names, first), None
        if depths is None:
            warnings.warn(
                "depths are by the names of the parameters: no function of torch was "
                "seen to use one in the first block (torch.jit hides them); pass "
                "depths by name, or depths='names'",
                UserWarning,
                stacklevel=2,
            )
            return
        settings = self._settings._replace(
            depths=_by_name("depths", depths, self.names)
        )
        with warnings.catch_warnings(), jax.default_device(self._device):
            warnings.simplefilter("ignore")  # has been said
            new = init_priority(settings, self._params)
        self._policy.state = self.state._replace(depths=new.depths)


def _by_name(
    argument: str, given: Mapping[str, Any], names: Sequence[str]
) -> OrderedDict[str, Any]:
    for name in names:
        if name not in given:
            raise ValueError(f"{argument} has no entry for {name!r}")
    return OrderedDict((name, given[name]) for name in names)


def _process_group(model: Any, skip: bool) -> Any:
    """Of a model under DDP, which must be ready for parameters that rest."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    if not isinstance(model, DistributedDataParallel):
        return None
    if not skip:
        return model.process_group
    if model.static_graph:
        raise ValueError(
            "DistributedDataParallel has static_graph=True, but which parameters have "
            "gradients changes from step to step; leave it out, or pass skip=False"
        )
    if not model.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel must have find_unused_parameters=True: it waits "
            "for the gradients of all parameters otherwise, also of those that rest; "
            "or pass skip=False"
        )
    return model.process_group

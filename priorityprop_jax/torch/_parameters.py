"""Which parameters compete for the budget, by name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


Named = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_optimizer(optimizer: Any) -> None:
    """Raises unless this is an optimizer that updates each parameter by itself."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must update each parameter by itself; LBFGS takes all of them "
            "as one vector, of which no part can rest"
        )


def units_of(
    model: nn.Module | Named, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer holds and that require a gradient, by name.

    Raises:
      ValueError: the optimizer holds parameters that have no name, or none of the
        model's; one of them twice; or nothing that can be trained.
      TypeError: `model` is neither a module nor named parameters; a parameter is
        sharded, has no shape yet, or is no leaf.
    """
    named = _named(model)
    names = {id(p): name for name, p in reversed(named.items())}
    seen: dict[int, int] = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            place = f"optimizer.param_groups[{i}]['params'][{j}]"
            if id(p) in seen:
                who = repr(names[id(p)]) if id(p) in names else place
                raise ValueError(
                    f"{who} is in param_groups {seen[id(p)]} and {i} of the optimizer; "
                    f"a parameter must be in one group, once"
                )
            seen[id(p)] = i
    shared = {name: p for name, p in named.items() if id(p) in seen}
    if not shared:
        raise ValueError(
            f"the optimizer and the model share no parameters: the model has "
            f"{_few(named)}, and the optimizer holds none of them; make the optimizer "
            f"from model.parameters() of this very model"
        )
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"optimizer.param_groups[{i}]['params'][{j}], of shape "
                    f"{tuple(p.shape)}, is no parameter of the model, which has "
                    f"{_few(named)}; name all that the optimizer holds: "
                    f"PriorityBudget([*model.named_parameters(), ('name', parameter)], "
                    f"optimizer)"
                )
    units = {name: p for name, p in shared.items() if p.requires_grad}
    if not units:
        raise ValueError(
            f"nothing to train: none of {_few(shared)} requires a gradient"
        )
    for name, p in units.items():
        _check(name, p)
    return units


def _named(model: Any) -> dict[str, nn.Parameter]:
    if isinstance(model, nn.Module):
        return dict(unwrap(model).named_parameters())
    pairs = model.items() if isinstance(model, Mapping) else model
    allowed = (
        "model must be an nn.Module or named parameters, such as "
        "model.named_parameters()"
    )
    if isinstance(pairs, torch.Tensor) or not isinstance(pairs, Iterable):
        raise TypeError(f"{allowed}, got {type(model).__name__}")
    named: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], torch.Tensor)
        ):
            raise TypeError(f"{allowed}, got an entry of type {type(pair).__name__}")
        name, p = pair
        if id(p) in known:  # tied: one parameter, by its first name, as in torch
            continue
        if name in named:
            raise ValueError(f"two parameters are named {name!r}")
        known.add(id(p))
        named[name] = p
    return named


def _check(name: str, p: nn.Parameter) -> None:
    if nn.parameter.is_lazy(p):
        raise TypeError(
            f"{name!r} has no shape yet; call the model once before making the budget "
            f"and the optimizer"
        )
    kinds = {kind.__name__ for kind in type(p).__mro__}
    if "DTensor" in kinds or "FlatParameter" in kinds or hasattr(p, "_is_flat_param"):
        raise TypeError(
            f"{name!r} is sharded (FSDP, DTensor), which is not supported: a process "
            f"has but a part of its gradient"
        )
    if not p.is_leaf:
        raise TypeError(f"{name!r} is no leaf: it is computed from other tensors")


def _few(named: Mapping[str, Any]) -> str:
    names = [repr(name) for name in named]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

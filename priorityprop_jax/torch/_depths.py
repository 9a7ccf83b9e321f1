"""How far each parameter is from the loss: by the order in which they are used."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .._units import Layout, module_depths
from ._parameters import unwrap


class Uses(TorchFunctionMode):
    """Remembers when each parameter was first used, while it is on.

    A use is a function of torch with the parameter among its arguments and a result
    that needs a gradient. So reading a shape is none, nor is an update. Where gradients
    are off, as in the first pass of a checkpoint, any new tensor will do.

    Attributes:
      first: number of the use, by the `id` of the parameter.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        super().__init__()
        self.first: dict[int, int] = {}
        self._left = {id(p) for p in parameters}
        self._time = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._left:
            found = {id(x) for x in _tensors((args, kwargs))} & self._left
            if found and _is_use(func, result):
                self.first.update(dict.fromkeys(found, self._time))
                self._left -= found
                self._time += 1
        return result


def _is_use(func: Any, result: Any) -> bool:
    tensors = list(_tensors(result))
    if torch.is_grad_enabled():
        return any(x.requires_grad for x in tensors)
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(tensors) and not in_place and name != "__get__"  # an attribute


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from _tensors(y)


def depths_by_use(
    names: Sequence[str], first: Sequence[int | None]
) -> dict[str, int] | None:
    """Depths from the number of each parameter's first use; None if nothing was used.

    The parameters of a module share a depth, by the first use of any of them; those
    outside of all modules have one each. The last has depth 0, and so has what was not
    used: no gradient comes to it.
    """
    modules = [name.rpartition(".")[0] or name for name in names]
    when: dict[str, int] = {}
    for module, time in zip(modules, first, strict=True):
        if time is not None:
            when[module] = min(time, when.get(module, time))
    if not when:
        return None
    order = sorted(set(when.values()), reverse=True)
    place = {time: depth for depth, time in enumerate(order)}
    return {
        name: place[when[module]] if module in when else 0
        for name, module in zip(names, modules, strict=True)
    }


def depths_by_name(names: Sequence[str]) -> dict[str, int]:
    """Depths from the natural order of the names of the modules."""
    keys = tuple(tuple(name.split(".")) for name in names)
    none = tuple(() for _ in names)
    where = Layout(tuple(names), keys, none, none, tuple(range(len(names) + 1)))
    return dict(zip(names, np.asarray(module_depths(where)).tolist(), strict=True))


def watch(uses: Uses | None) -> contextlib.ExitStack:
    """A context in which `uses` are noted, also of what is compiled: it runs eagerly.

    Tracing by `torch.compile` would call the functions in an order of its own.
    """
    stack = contextlib.ExitStack()
    if uses is not None:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(uses)
    return stack


def infer_depths(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """How far each parameter is from the output: for ``PriorityBudget(depths=...)``.

    Calls ``model(*args, **kwargs)`` once, in evaluation mode, and notes the order in
    which the modules use their parameters.

    Args:
      model: may be compiled, but not a `torch.jit.ScriptModule`.
      *args: for the model; a batch of one example will do.
      **kwargs: for the model.

    Returns:
      The depth by name, for each parameter that requires a gradient. The parameters of
      a module share a depth; the last one used has depth 0.

    Raises:
      ValueError: no use of a parameter is seen, as in a `torch.jit.ScriptModule`.

    Examples:
      >>> import torch
      >>> from torch import nn
      >>> from priorityprop_jax.torch import infer_depths
      >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
      >>> infer_depths(net, torch.zeros(1, 3))
      {'0.weight': 1, '0.bias': 1, '2.weight': 0}
    """
    named = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    modes = {module: module.training for module in model.modules()}
    uses = Uses(named.values())
    try:
        model.eval()
        with torch.enable_grad(), watch(uses):
            model(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    depths = depths_by_use(list(named), [uses.first.get(id(p)) for p in named.values()])
    if depths is None:
        raise ValueError(
            "model was not seen to use a parameter that requires a gradient; in a "
            "torch.jit.ScriptModule that cannot be seen"
        )
    return depths

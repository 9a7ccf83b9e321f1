"""How large each gradient is: one float32 per parameter."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from .._scores import magnitudes


_MOST = float(np.finfo(np.float32).max)
_TOGETHER = 8  # gradients in one call of JAX


def sizes_of(
    gradients: Sequence[torch.Tensor | None], name: str, device: Any
) -> np.ndarray:
    """The magnitudes of gradients, NaN where one is not finite, 0 where there is none.

    What lies in the memory of the CPU is measured where it lies by the function that
    `priority_prop` uses, so that both get the same bits. Elsewhere torch measures, in
    float32 too, and one vector is transferred.

    Args:
      gradients: of any shapes and floating types.
      name: of the magnitude.
      device: a `jax.Device`, the CPU.

    Returns:
      shape=(gradients,), dtype=float32.
    """
    sizes = np.zeros(len(gradients), np.float32)
    here: dict[int, np.ndarray] = {}
    there: dict[int, torch.Tensor] = {}
    for i, g in enumerate(gradients):
        if g is None:
            continue
        if g.device.type == "cpu" and g.layout == torch.strided:
            here[i] = _view(g.detach())
        else:
            there[i] = _measure_there(g.detach(), name)
    # Alike ones together: models have many gradients, but few shapes.
    order = sorted(here, key=lambda i: (here[i].shape, here[i].dtype.str))
    parts = [order[i : i + _TOGETHER] for i in range(0, len(order), _TOGETHER)]
    with jax.default_device(device):
        found = [_measure_here([here[i] for i in part], name) for part in parts]
        # Waits for JAX, before torch may write to the gradients again.
        for part, values in zip(parts, jax.device_get(found), strict=True):
            sizes[part] = values
    if there:
        first = next(iter(there.values())).device
        vector = torch.stack([x.to(first) for x in there.values()])
        sizes[list(there)] = vector.cpu().numpy()
    return sizes


def _view(g: torch.Tensor) -> np.ndarray:
    """The same memory in NumPy, if NumPy knows the type."""
    if g.dtype in (torch.bfloat16, torch.float16):
        g = g.float()
    return g.resolve_conj().resolve_neg().numpy()


@functools.partial(jax.jit, static_argnums=1)
def _measure_here(gradients: list[jax.Array], name: str) -> jax.Array:
    return magnitudes(gradients, ((),) * len(gradients), name)


def _measure_there(g: torch.Tensor, name: str) -> torch.Tensor:
    """The same by torch, relative to the maximum, so that no square overflows."""
    n = max(g.numel(), 1)
    if g.layout != torch.strided:
        g = g.coalesce().values()
    size = g.abs().float().flatten()
    if not size.numel():
        return size.new_zeros(())
    peak = size.max()
    part = torch.nan_to_num(size / peak)
    match name:
        case "max":
            total = peak
        case "l1":
            total = peak * part.sum()
        case "mean":
            total = peak * (part.sum() / n)
        case "l2":
            total = peak * part.square().sum().sqrt()
        case _:
            total = peak * (part.square().sum() / n).sqrt()
    finite = torch.isfinite(size).all()
    return torch.where(finite, total.clamp(max=_MOST), torch.nan)

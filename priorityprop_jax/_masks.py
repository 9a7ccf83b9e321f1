"""Masks: which leaves are active. Static (Python bools) or dynamic (traced bools)."""

import dataclasses
from typing import Any

import jax
import numpy as np

from ._checks import is_traced
from ._units import match_prefix


# Of one leaf: a bool, a tuple of bools along its first axis, or an array of either.
LeafMask = bool | tuple[bool, ...] | jax.Array


@dataclasses.dataclass(frozen=True)
class StaticMask:
    """A pytree of Python bools that can be hashed: what `static_mask` makes.

    Two are equal if structure and bools are, so that one can be a static argument of
    `jax.jit` or a key of a dict.

    Attributes:
      leaves: a bool, or a tuple of bools along the first axis, for each leaf.
      treedef: the structure.

    Examples:
      >>> from priorityprop_jax import static_mask
      >>> hash(static_mask([True, False])) == hash(static_mask([True, False]))
      True
    """

    leaves: tuple[bool | tuple[bool, ...], ...]
    treedef: Any
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_hash", hash((self.leaves, self.treedef)))

    def __hash__(self) -> int:
        return self._hash  # is asked for several times at each training step

    def __reduce__(self) -> tuple[Any, ...]:
        return StaticMask, (self.leaves, self.treedef)  # hashes differ by process

    @property
    def tree(self) -> Any:
        """The pytree: Python bools, and NumPy vectors of bools."""
        arrays = [np.array(x) if isinstance(x, tuple) else x for x in self.leaves]
        return jax.tree.unflatten(self.treedef, arrays)


def static_mask(active: Any) -> StaticMask:
    """Reads a mask off the device, once, and makes it hashable.

    Args:
      active: pytree of bools (Python, NumPy or JAX, not traced), or of vectors of
        bools; such as `active` returns.

    Returns:
      A `StaticMask`, which `value_and_grad` takes as ``active=``.

    Raises:
      TypeError: a leaf is traced, or not a bool.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import static_mask
      >>> mask = static_mask({"a": jnp.bool_(True), "b": False})
      >>> mask.tree
      {'a': True, 'b': False}
      >>> mask == static_mask({"a": True, "b": False})
      True
    """
    if isinstance(active, StaticMask):
        return active
    pairs, treedef = jax.tree_util.tree_flatten_with_path(active)
    for path, x in pairs:
        if is_traced(x):
            raise TypeError(
                f"active{jax.tree_util.keystr(path)} is traced, so its value is not "
                f"known yet: call static_mask outside of jit, or pass the mask as it is"
            )
    on_host = jax.device_get([x for _, x in pairs])
    leaves: list[Any] = [
        _check(f"active{jax.tree_util.keystr(path)}", x, None)
        for (path, _), x in zip(pairs, on_host, strict=True)
    ]
    return StaticMask(tuple(leaves), treedef)


def leaf_masks(active: Any, params: Any) -> list[LeafMask]:
    """One mask for each leaf of `params`, from a pytree or a prefix of it.

    Raises:
      ValueError: `active` has another structure, or a vector of another length.
      TypeError: a leaf of `active` is not a bool.
    """
    if isinstance(active, StaticMask):
        active = active.tree
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    if active is None:
        return [True] * len(pairs)
    if jax.tree_util.all_leaves([active]):
        given = [active] * len(pairs)
    elif jax.tree.structure(active) == treedef:
        given = jax.tree.leaves(active)
    else:
        given = match_prefix("active", active, params)
    return [
        _check(f"active for params{jax.tree_util.keystr(path)}", mask, np.shape(p))
        for (path, p), mask in zip(pairs, given, strict=True)
    ]


def _check(where: str, mask: Any, shape: tuple[int, ...] | None) -> LeafMask:
    is_array = isinstance(mask, np.ndarray | np.generic | jax.Array)
    if not isinstance(mask, bool) and not (is_array and mask.dtype == np.bool_):
        kind = f"{mask.dtype} array" if is_array else type(mask).__name__
        raise TypeError(f"{where} must be a bool, got {mask!r} of type {kind}")
    if isinstance(mask, bool):
        return mask
    if mask.ndim > 1 or (mask.ndim and shape is not None and mask.shape != shape[:1]):
        allowed = "a vector"
        if shape is not None:
            allowed = f"a vector of length {shape[0]}" if shape else "nothing else"
        raise ValueError(
            f"{where} must be a scalar, or {allowed}, one bool for each entry of the "
            f"first axis, got shape {mask.shape}"
        )
    if isinstance(mask, jax.Array):
        return mask
    return tuple(map(bool, np.ravel(mask))) if mask.ndim else bool(mask)

"""From a pytree to named arrays on the host, and back, bit for bit.

Arrays are named by their paths, so that what is saved needs no structure of its own,
and an error can say where two structures differ.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Leaf(NamedTuple):
    """What is known of a leaf; in JSON a list."""

    path: str
    dtype: str
    shape: Sequence[int]
    key: str | None  # the kind of key, if of `jax.random`
    weak: bool  # of weak type, on which the program that takes it depends
    split: bool  # over processes
    crc: int | None


class Packed(NamedTuple):
    leaves: list[Leaf]
    arrays: dict[str, np.ndarray]
    split: dict[str, jax.Array]  # of which this process has but a part


def pack(tree: Any) -> Packed:
    """Copies of all arrays of a pytree, by path."""
    leaves = named(tree)
    values = {path: _without_keys(path, x) for path, x in leaves.items()}
    for x in values.values():
        if isinstance(x, jax.Array) and _is_whole(x):
            x.copy_to_host_async()
    packed = Packed([], {}, {})
    for path, x in values.items():
        key, weak = _kind(leaves[path]), bool(getattr(x, "weak_type", False))
        crc = None
        if split := not _is_whole(x):
            packed.split[path] = jnp.copy(x)  # the original may be donated
        else:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                x = x.addressable_data(0)
            x = np.array(x)  # np.asarray would be the device's own memory on the CPU
            crc = crc_of(x)
            if x.size:  # orbax takes no others
                packed.arrays[path] = x
        shape = list(np.shape(x))
        packed.leaves.append(
            Leaf(path, np.dtype(x.dtype).name, shape, key, weak, split, crc)
        )
    return packed


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, in their order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): x for path, x in pairs}


def _name(path: Any) -> str:
    """A path such as ``params['Dense_0']['kernel']``, the first part as it is."""
    if not path:
        return "(root)"
    first = getattr(path[0], "key", getattr(path[0], "name", None))
    if not isinstance(first, str):
        return jax.tree_util.keystr(path)
    return first + jax.tree_util.keystr(path[1:])


def _without_keys(path: str, x: Any) -> Any:
    if isinstance(x, jax.Array):
        return jax.random.key_data(x) if _kind(x) else x
    array = np.asarray(x)
    if array.dtype.kind in "OSUMm":
        raise TypeError(
            f"{path} cannot be saved in a checkpoint: it is no array of numbers but "
            f"{type(x).__name__} of dtype {array.dtype}"
        )
    return array


def _kind(x: Any) -> str | None:
    """The kind of a key of `jax.random`; None for anything else."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    return str(dtype)


def _is_whole(x: Any) -> bool:
    """Whether this process has all of it."""
    return (
        not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    )


def check_like(saved: Mapping[str, Leaf], wanted: Mapping[str, Any], what: str) -> None:
    """Raises at the first leaf that is wanted otherwise than it was saved.

    Args:
      saved: by path.
      wanted: arrays or the like, by path.
      what: is compared, for the error.

    Raises:
      ValueError: with that path.
    """
    where = f"{what} is of another model"
    # What a person knows best comes first.
    for path in sorted({**saved, **wanted}, key=lambda x: not x.startswith("params")):
        if path not in wanted:
            raise ValueError(f"{where}: it has {path}, which is not in this one")
        if path not in saved:
            raise ValueError(f"{where}: it lacks {path}, which is in this one")
        old, new = _describe(saved[path]), _describe(_like_leaf(path, wanted[path]))
        if old != new:
            raise ValueError(f"{where}: {path} was {old}, here it is {new}")


def _like_leaf(path: str, x: Any) -> Leaf:
    if key := _kind(x):
        # A key has further axes: those of the numbers behind it.
        data = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype)
        )
        return Leaf(path, data.dtype.name, list(data.shape), key, False, False, None)
    dtype = np.dtype(x.dtype) if hasattr(x, "dtype") else np.asarray(x).dtype
    return Leaf(path, dtype.name, list(np.shape(x)), None, False, False, None)


def _describe(leaf: Leaf) -> str:
    return f"{leaf.key or leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def place(value: Any, saved: Leaf, like: Any) -> Any:
    """A value of the same kind, at the same place, as `like`."""
    if isinstance(like, bool | int | float | complex):
        return type(like)(value.item())
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    committed = getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if committed else None
    if isinstance(value, jax.Array):  # restored in parts, each at its place
        return value if saved.key is None else _wrap(value, like)
    if sharding is not None and not sharding.is_fully_addressable:
        # The sharding of keys is right for their numbers: these are along a last axis.
        x = jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
        return x if saved.key is None else _wrap(x, like)
    if saved.weak and not value.ndim:
        x = jnp.asarray(value.item())
    else:
        x = jnp.array(value) if saved.key is None else _wrap(jnp.array(value), like)
    return x if sharding is None else jax.device_put(x, sharding)


def _wrap(data: jax.Array, like: Any) -> jax.Array:
    found = []  # of a ShapeDtypeStruct, too
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(data, impl=found[0])


def crc_of(x: np.ndarray) -> int:
    """A checksum of its bytes."""
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

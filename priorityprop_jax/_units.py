"""What gets counted: whole leaves, slices of leaves along some axes, or elements.

The one module that turns trees into vectors and back. Leaf and axis units lie in one
vector, in the order of `jax.tree.leaves` and then row-major; element units stay in
arrays shaped like their leaves. State is found by position alone: some frameworks
give `init` other paths than `update`.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


Axes = tuple[int, ...]
_TOGETHER = 16  # entries unstacked by one reduction


class Layout(NamedTuple):
    """Where the units of each leaf lie. Static: shapes and paths, no arrays."""

    paths: tuple[str, ...]  # for errors and reports
    keys: tuple[tuple, ...]  # paths without names that wrappers add
    shapes: tuple[tuple[int, ...], ...]  # of the leaves
    axes: tuple[Axes, ...] | None  # kept axes of each leaf; None: every element
    offsets: tuple[int, ...]  # first unit of each leaf, and the number of units

    @property
    def size(self) -> int:
        """Number of units."""
        return self.offsets[-1]

    @property
    def names(self) -> list[str]:
        """Of the leaves, for people: ``"Dense_0/kernel"``."""
        return ["/".join(map(str, key)) or "(root)" for key in self.keys]


def unit_axes(
    params: optax.Params, rule: Callable[[str, Any], Sequence[int]]
) -> optax.Params:
    """Make a `units` argument from a rule.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      rule: ``(path, leaf) -> axes to keep``, where the path is printed like
        ``"['Dense_0']['kernel']"``. ``()`` makes the leaf one unit, ``(0,)`` counts
        each row by itself.

    Returns:
      A pytree of tuples in the structure of `params`.

    Raises:
      ValueError: an axis is out of range or named twice.
      TypeError: the rule returns no sequence of integers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import unit_axes
      >>> params = {"embed": jnp.ones((5, 3)), "out": jnp.ones((3, 2))}
      >>> unit_axes(params, lambda path, leaf: (0,) if "embed" in path else ())
      {'embed': (0,), 'out': ()}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _check_axes(
            f"params{jax.tree_util.keystr(path)}",
            np.shape(leaf),
            rule(jax.tree_util.keystr(path), leaf),
        ),
        params,
    )


def layout(params: optax.Params, units: Any) -> Layout:
    """The units of a tree, checked."""
    keys, leaves, absent = _flatten(params)
    paths = tuple(f"params{_print(key)}" for key in keys)
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = jnp.result_type(leaf)
        if dtype == jax.dtypes.float0 or not jnp.issubdtype(dtype, jnp.inexact):
            name = "float0" if dtype == jax.dtypes.float0 else dtype.name
            raise TypeError(
                f"{path} has dtype {name}, which has no gradient to score; leave "
                f"it out with optax.masked or optax.partition"
            )
    shapes = tuple(np.shape(leaf) for leaf in leaves)
    if isinstance(units, str) and units == "element":
        axes, counts = None, [math.prod(shape) for shape in shapes]
    else:
        given = [()] * len(keys)
        if not isinstance(units, str) and keys:
            given = _broadcast("units", units, keys, absent, _is_axes)
        axes = tuple(map(_check_axes, paths, shapes, given))
        counts = [
            math.prod(s[a] for a in kept) for s, kept in zip(shapes, axes, strict=True)
        ]
    offsets = (0, *itertools.accumulate(counts))
    return Layout(paths, keys, shapes, axes, offsets)


def match_tree(argument: str, tree: Any, params: optax.Params) -> list[Any]:
    """The leaves of `tree`, which must have the structure of `params`."""
    keys, _, absent = _flatten(params)
    if not keys:
        return []
    found, leaves, _ = _flatten(tree)
    found_keys = [k for k in found if not _under(k, absent)]
    for a, b in itertools.zip_longest(keys, found_keys):
        if a != b:
            raise ValueError(
                f"{argument} must have the structure of the params: it "
                + _difference(a, b, keys, found_keys)
            )
    return [
        leaf for k, leaf in zip(found, leaves, strict=True) if not _under(k, absent)
    ]


def match_prefix(argument: str, prefix: Any, params: Any) -> list[Any]:
    """For each leaf of `params` the entry above it of a tree that may be a prefix."""
    keys, _, absent = _flatten(params)
    return _broadcast(argument, prefix, keys, absent, None)


def _difference(a: Any, b: Any, keys: Any, found: Any) -> str:
    if a is not None and a not in found:
        return f"has no entry for params{_print(a)}"
    if b is not None and b not in keys:
        return f"has an entry at {_print(b) or 'the root'} that the params have not"
    return f"has {_print(b)} where the params have {_print(a)}"


def check_layout(where: Layout, leaves: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises unless updates have the leaves and units that a state was made for.

    `shapes` are those of the state's counts.
    """
    names = ", ".join(where.paths[:3]) + (", ..." if len(where.paths) > 3 else "")
    if len(where.paths) != leaves:
        raise ValueError(
            f"the updates have {len(where.paths)} leaves ({names}), but the state was "
            f"initialized for {leaves}"
        )
    if where.axes is None:
        for path, shape, old in zip(where.paths, where.shapes, shapes, strict=True):
            if shape != old:
                raise ValueError(
                    f"{path} has shape {shape}, but the state was initialized for {old}"
                )
    elif shapes != [(where.size,)]:
        raise ValueError(
            f"the updates have {where.size} units ({names}), but the state was "
            f"initialized for {shapes}"
        )


def split(where: Layout, units: jax.Array) -> list[jax.Array]:
    """A vector over the units, cut into arrays that broadcast against the leaves."""
    assert where.axes is not None
    if not any(where.axes):
        return unstack(units)
    out = []
    for i, (shape, kept) in enumerate(zip(where.shapes, where.axes, strict=True)):
        part = units[where.offsets[i] : where.offsets[i + 1]]
        wide = [n if a in kept else 1 for a, n in enumerate(shape)]
        out.append(part.reshape(wide) if kept else part.reshape(()))
    return out


def unstack(x: jax.Array) -> list[jax.Array]:
    """``list(x)``, in a way that compiles fast.

    XLA:CPU fuses ``x[0]``, ``x[1]`` ... into what uses them, and then compiles as many
    kernels as there are leaves that differ in an index alone. One reduction with many
    results gives numbers that all those kernels take as an argument; and reductions
    that are alike, over rows of the same length, are compiled once.
    """
    n = len(x)
    if n <= _TOGETHER:
        return _unstack_row(x) if n else []
    padding = [(0, -n % _TOGETHER), *[(0, 0)] * (x.ndim - 1)]
    rows = jnp.pad(x, padding).reshape(-1, _TOGETHER, *x.shape[1:])
    return [entry for row in unstack(rows) for entry in _unstack_row(row)][:n]


def _unstack_row(x: jax.Array) -> list[jax.Array]:
    n, none = len(x), jnp.zeros_like(x)
    place = np.arange(n).reshape(n, *[1] * (x.ndim - 1))
    hot = [jnp.where(place == i, x, none) for i in range(n)]
    zeros = [jnp.zeros((), x.dtype)] * n
    return lax.reduce(hot, zeros, lambda a, b: list(map(operator.add, a, b)), (0,))


def unstack_together(vectors: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """The entries of several vectors: for each place those of all vectors."""
    columns, widths = [], []
    for x in vectors:
        new = _as_float32(x)
        columns += new
        widths.append(len(new))
    n = len(vectors[0])
    rows = unstack(jnp.stack(columns, axis=1)) if columns else [jnp.zeros(0)] * n
    out = []
    for i, row in enumerate(rows):
        at, entries = 0, []
        for x, width in zip(vectors, widths, strict=True):
            parts = [row[j] for j in range(at, at + width)]
            entries.append(_from_float32(parts, x.dtype) if width else x[i])
            at += width
        out.append(entries)
    return out


def _as_float32(x: jax.Array) -> list[jax.Array]:
    """Columns of float32 that hold `x` exactly; none where that cannot be."""
    if x.ndim != 1 or x.dtype in (jnp.float64, jnp.int64, jnp.uint32, jnp.uint64):
        return []
    if x.dtype == jnp.int32:
        return [(x >> 16).astype(jnp.float32), (x & 0xFFFF).astype(jnp.float32)]
    known = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.bool
    return [x.astype(jnp.float32)] if known else []


def _from_float32(columns: list[jax.Array], dtype: Any) -> jax.Array:
    if dtype == jnp.int32:
        high, low = (c.astype(jnp.int32) for c in columns)
        return high << 16 | low
    return columns[0] != 0 if dtype == jnp.bool else columns[0].astype(dtype)


def join(parts: Iterable[jax.Array]) -> jax.Array:
    """The vector over the units from one array per leaf, replicated."""
    vectors = [_replicate(p).reshape(-1) for p in parts]
    return jnp.concatenate(vectors) if vectors else jnp.zeros((0,), jnp.float32)


def per_leaf(where: Layout, values: jax.Array) -> jax.Array:
    """One value per leaf, repeated for each of its units."""
    counts = np.diff(where.offsets)
    return values[np.repeat(np.arange(len(counts)), counts)]


def shard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """A part of a vector, replicated, sharded explicitly where `like` is."""
    sharding = _explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def natural_key(key: tuple) -> tuple:
    """Sorts ``Dense_2`` before ``Dense_10``, and list entries by index."""
    return tuple(_natural(part) for part in key)


def module_depths(where: Layout) -> np.ndarray:
    """Distance of each leaf's module from the last one, in natural order of names."""
    modules = [key[:-1] if len(key) > 1 or _named(key) else key for key in where.keys]
    order = sorted(set(modules), key=natural_key)
    place = {module: len(order) - 1 - i for i, module in enumerate(order)}
    return np.array([place[m] for m in modules], np.int32)


def _named(key: tuple) -> bool:
    return not key or isinstance(key[-1], str)


def _natural(part: Any) -> tuple:
    if isinstance(part, int):
        return ((0, part, ""),)
    pieces = itertools.groupby(str(part), str.isdigit)
    joined = [(digits, "".join(group)) for digits, group in pieces]
    return tuple((0, int(s), "") if digits else (1, 0, s) for digits, s in joined)


def _replicate(x: jax.Array) -> jax.Array:
    """Explicitly sharded arrays must agree before they can be joined."""
    sharding = _explicit_sharding(x)
    if sharding is None:
        return x
    # With the array's own mesh: there need not be one in the context.
    replicated = jax.sharding.PartitionSpec(*[None] * x.ndim)
    return jax.sharding.reshard(
        x, jax.sharding.NamedSharding(sharding.mesh, replicated)
    )


def _explicit_sharding(x: jax.Array) -> Any:
    """The sharding that is part of the type of `x`, None where nothing is split."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    split = sharding is not None and any(axis is not None for axis in sharding.spec)
    return sharding if split else None


def _flatten(tree: Any) -> tuple[tuple[tuple, ...], list[Any], list[tuple]]:
    """Normalized keys and leaves, and the keys of what is masked out."""
    # MaskedNode is an empty tuple, too; others might be taken for axes to keep.
    absent = lambda x: x is None or (isinstance(x, tuple) and not x)
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=absent)[0]
    named = [(_normalize(path), leaf) for path, leaf in flat]
    present = [(k, leaf) for k, leaf in named if not absent(leaf)]
    keys = tuple(k for k, _ in present)
    return keys, [x for _, x in present], [k for k, x in named if absent(x)]


def _normalize(path: tuple) -> tuple:
    """Names and indices of a path; flax variables add a `.value` that others lack."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return tuple(
        next(
            getattr(part, field)
            for field in ("key", "idx", "name")
            if hasattr(part, field)
        )
        for part in path
    )


def _print(key: Any) -> str:
    return "".join(f"[{part!r}]" for part in key)


def _under(key: tuple, prefixes: list[tuple]) -> bool:
    return any(key[: len(prefix)] == prefix for prefix in prefixes)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(a, int) for a in x)


def _broadcast(argument, prefix, keys, absent, is_leaf) -> list[Any]:
    """For each key the entry of the prefix tree above it."""
    flat = jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_leaf)[0]
    entries = {_normalize(path): value for path, value in flat}
    used, out = set(), []
    for key in keys:
        above = [key[:n] for n in range(len(key), -1, -1) if key[:n] in entries]
        if not above:
            raise ValueError(f"{argument} has no entry for params{_print(key)}")
        used.add(above[0])
        out.append(entries[above[0]])
    for key in entries:
        if key not in used and not _under(key, absent):
            raise ValueError(
                f"{argument} has an entry at {_print(key)} that the params have not"
            )
    return out


def _check_axes(path: str, shape: tuple[int, ...], axes: Any) -> Axes:
    try:
        kept = tuple(int(a) for a in axes)
    except (TypeError, ValueError):
        raise TypeError(
            f"the axes to keep of {path} must be a tuple of ints, got {axes!r}"
        ) from None
    ndim = len(shape)
    wrapped = tuple(sorted(a % ndim for a in kept if -ndim <= a < ndim))
    if len(set(wrapped)) != len(kept):
        raise ValueError(
            f"the axes to keep of {path}, shape {shape}, must be different axes in "
            f"[{-ndim}, {ndim}), got {axes!r}"
        )
    return wrapped

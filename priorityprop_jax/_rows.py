"""The rows of a table that a batch touches: found, taken out, and put back.

A batch reads few rows of an embedding, yet the gradient of the table is as large as the
table. These functions make a small block of the rows that are read, to differentiate
and update in its place. With the table donated, nothing of its size is ever made.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._checks import check_count
from ._units import layout


_MOST = 2**31 - 1


class Rows(NamedTuple):
    """The rows that a batch touches, as `touched_rows` found them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import touched_rows
      >>> rows = touched_rows(jnp.array([[7, 2], [7, 5]]), num_rows=10)
      >>> print(rows.index[:3], rows.inverse.tolist(), rows.distinct, rows.missed)
      [2 5 7] [[2, 0], [2, 1]] 3 0
    """

    index: jax.Array  # rising, then beyond any table; shape=(capacity,), dtype=int32
    inverse: jax.Array  # where in `index` each id is; shape=ids.shape, dtype=int32
    distinct: jax.Array  # rows touched, capacity or not; shape=(), dtype=int32
    missed: jax.Array  # ids out of range or over capacity; shape=(), dtype=int32


def touched_rows(
    ids: jax.typing.ArrayLike, num_rows: int, capacity: int | None = None
) -> Rows:
    """Find the distinct rows of a table that a batch of ids reads.

    As in NumPy, ids from ``-num_rows`` to -1 count from the end. Others out of range
    touch no row and read NaN, as with `jax.numpy.take` (``table[ids]`` would clamp
    them: read the first or last row, and give it no gradient).

    Args:
      ids: integers of any shape and integer dtype, with repetitions.
      num_rows: rows of the table.
      capacity: places for distinct rows, a Python int; decides shapes. None: one for
        each id, which is always enough. With fewer, the work is less; where a batch
        touches more rows than that, the ids that found no place read NaN, so the loss
        is NaN, and `Rows.missed` counts them.

    Returns:
      `Rows`. Use ``rows.inverse`` in place of the ids, and ``take_rows(table, rows)``
      in place of the table.

    Raises:
      TypeError, ValueError: ids are no integers, or `num_rows` or `capacity` no
        positive ints.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import take_rows, touched_rows
      >>> table, ids = jnp.arange(10.0), jnp.array([4, 8, 4, -1])
      >>> rows = touched_rows(ids, num_rows=10)
      >>> print(take_rows(table, rows)[rows.inverse])
      [4. 8. 4. 9.]
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) and ids.size:
        raise TypeError(f"ids must be integers, got dtype {ids.dtype.name}")
    if capacity is None:
        capacity = max(ids.size, 1)
    check_count("num_rows", num_rows, least=1, most=_MOST // 2, static=True)
    check_count("capacity", capacity, least=1, most=_MOST // 2, static=True)
    return _find(ids, num_rows, capacity)


def take_rows(table: optax.Params, rows: Rows | Any) -> optax.Params:
    """Take out of a table the rows that a batch touches.

    Args:
      table: array, or pytree of arrays, of shape ``(num_rows, ...)``.
      rows: what `touched_rows` returned: one for all tables, or a pytree with one for
        each.

    Returns:
      The structure of `table`, of shape ``(capacity, ...)``; zeros where no row was
      needed, and NaN in the last place if an id found none (see `touched_rows`).
      Indexed with ``rows.inverse`` it gives what the table gives indexed with the ids.

    Raises:
      TypeError, ValueError: `rows` do not fit, or a leaf has no rows or no gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import take_rows, touched_rows
      >>> table = {"embed": jnp.arange(6.0).reshape(3, 2), "bias": jnp.arange(3.0)}
      >>> block = take_rows(table, touched_rows(jnp.array([2, 2, 1]), num_rows=3))
      >>> print(block["embed"][:2].tolist(), block["bias"])
      [[2.0, 3.0], [4.0, 5.0]] [1. 2. 0.]
    """

    def take(path, leaf, rows):
        del path
        block = gather(jnp.asarray(leaf), rows.index)
        n = block.shape[0]
        lost = (lax.iota(jnp.int32, n) == n - 1) & (rows.missed > 0)
        return jnp.where(against(lost, block), jnp.nan, block)

    return _map(take, table, rows)


def put_rows(
    table: optax.Params, rows: Rows | Any, block: optax.Params
) -> optax.Params:
    """Put rows back where `take_rows` took them; all others stay as they are.

    In place, if the table is donated to the compiled function (or carried by a loop).

    Args:
      table: array, or pytree of arrays, of shape ``(num_rows, ...)``.
      rows: what `touched_rows` returned: one for all tables, or a pytree with one for
        each.
      block: rows in the structure of `table`, of shape ``(capacity, ...)``.

    Returns:
      The table with those rows.

    Raises:
      TypeError, ValueError: `rows` or `block` do not fit the table.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import put_rows, take_rows, touched_rows
      >>> table = jnp.arange(5.0)
      >>> rows = touched_rows(jnp.array([3, 1, 3]), num_rows=5)
      >>> print(put_rows(table, rows, 10 * take_rows(table, rows)))
      [ 0. 10.  2. 30.  4.]
    """

    def put(path, leaf, rows, new):
        leaf, new = jnp.asarray(leaf), jnp.asarray(new)
        shape = rows.index.shape + leaf.shape[1:]
        if new.shape != shape or new.dtype != leaf.dtype:
            raise ValueError(
                f"block must have shape {shape} and dtype {leaf.dtype.name} at {path}, "
                f"got shape {new.shape} and dtype {new.dtype.name}"
            )
        return scatter(leaf, rows.index, new)

    return _map(put, table, rows, block)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _find(ids: jax.Array, num_rows: int, capacity: int) -> Rows:
    flat = _normalized(ids.reshape(-1), num_rows)
    # Strays are `num_rows` by now, so they come last.
    ordered, order = lax.sort((flat, lax.iota(jnp.int32, flat.size)), num_keys=1)
    first = jnp.concatenate([jnp.ones_like(ordered[:1]), jnp.diff(ordered)]) > 0
    place = jnp.cumsum(first, dtype=jnp.int32) - 1
    real = ordered < num_rows
    distinct = jnp.sum(first & real, dtype=jnp.int32)
    # Where an id finds no place, the last one is kept for NaN. (Without overflow it is
    # free then: there are fewer distinct ids than ids.)
    some_miss = jnp.any(~real) | (distinct > capacity)
    kept = real & (place < jnp.where(some_miss, capacity - 1, capacity))
    slot = jnp.where(kept, place, capacity - 1)
    # Distinct and rising to the end, so that scatters may rely on it.
    spare = beyond(capacity)
    return Rows(
        index=spare.at[jnp.where(kept, place, capacity)].set(ordered, mode="drop"),
        inverse=jnp.zeros_like(slot).at[order].set(slot).reshape(ids.shape),
        distinct=distinct,
        missed=jnp.sum(~kept, dtype=jnp.int32),
    )


def _normalized(ids: jax.Array, num_rows: int) -> jax.Array:
    """In [0, num_rows) as int32; `num_rows` for what is out of range."""
    if ids.dtype.itemsize < 4 or not jnp.issubdtype(ids.dtype, jnp.integer):
        ids = ids.astype(jnp.int32)  # that num_rows need not fit into
    valid = ids < num_rows
    if jnp.issubdtype(ids.dtype, jnp.signedinteger):
        valid &= ids >= -num_rows
    ids = jnp.where(valid, ids, 0).astype(jnp.int32)
    return jnp.where(valid, jnp.where(ids < 0, ids + num_rows, ids), num_rows)


def beyond(n: int) -> jax.Array:
    """Distinct indices, rising, that no table has."""
    return _MOST - n + lax.iota(jnp.int32, n)


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(
        mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
    )


def scatter(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    return x.at[index].set(
        new.astype(x.dtype), mode="drop", indices_are_sorted=True, unique_indices=True
    )


def against(row: jax.Array, block: jax.Array) -> jax.Array:
    """One entry per row, in a shape that broadcasts against a block."""
    return row.reshape(row.shape + (1,) * (block.ndim - 1))


def _map(function: Callable[..., Any], tree: Any, rows: Any, *rest: Any) -> Any:
    """``function(path, table, rows, ...)``, table by table."""
    paths, kind = layout(tree, "leaf").paths, jax.tree.structure(tree)
    leaves, found = jax.tree.leaves(tree), rows_of_each(rows, len(paths))
    others = [kind.flatten_up_to(x) for x in rest]
    for path, leaf in zip(paths, leaves, strict=True):
        check_table(path, jnp.shape(leaf))
    return kind.unflatten(map(function, paths, leaves, found, *others))


def rows_of_each(rows: Any, leaves: int) -> list[Rows]:
    """The `Rows` of each leaf."""
    if isinstance(rows, Rows):
        return [rows] * leaves
    found = jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Rows))
    if not all(isinstance(r, Rows) for r in found):
        raise TypeError(
            f"rows must be what touched_rows(ids, num_rows) returns, or a pytree of "
            f"that, got {rows!r}"
        )
    if len(found) != leaves:
        raise ValueError(
            f"rows must be one for all tables or one for each: there are {leaves} "
            f"tables, but {len(found)} rows"
        )
    return found


def check_table(path: str, shape: tuple[int, ...]) -> None:
    if not shape:
        raise ValueError(f"{path} has shape (), but a table needs rows: an axis 0")

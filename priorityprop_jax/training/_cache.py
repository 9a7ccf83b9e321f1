"""What resting first layers compute, kept for each example instead of done again."""

import math
import os
import pathlib
import shutil
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._checks import is_traced
from .._masks import leaf_masks, StaticMask
from ..propagation import _examples, _split


class Features(NamedTuple):
    """What a resting prefix computes for the examples of a batch: a pytree.

    Attributes:
      rows: arrays with one entry for each example along the first axis.
      shared: arrays that are the same for all examples.
    """

    rows: tuple[jax.Array, ...]
    shared: tuple[jax.Array, ...]


class CacheStats(NamedTuple):
    """What a cache has done so far.

    Attributes:
      hits: examples that were looked up (repetitions count).
      misses: examples that were computed.
      clears: how often all was forgotten, because what it was made of changed.
      bytes: size of what is kept at most, on the host or in the file.
      flops_saved: FLOPs of the prefix for all hits.
      flops_spent: FLOPs of the prefix for all misses, with what fills up a batch.
    """

    hits: int
    misses: int
    clears: int
    bytes: int
    flops_saved: float
    flops_spent: float


class _Program(NamedTuple):
    """The loss at one batch size."""

    closed: Any  # flat
    treedef: Any  # of what it returns
    cut: Any


class CachedPrefix:
    r"""Computes what resting first layers make of an example once, and keeps it.

    For fine-tuning with frozen layers at the bottom, and no dropout or augmentation
    below the first layer that is trained. The loss is traced and cut in two. Below the
    cut is what depends on resting leaves and on single examples only; of all such cuts
    (up to cheap equations, done again) it is the one with the fewest bytes. A step then
    costs the part above the cut:

        cache = CachedPrefix(loss, params, active, x, y, num_examples=len(xs))
        for ids in batches:
            x, y = xs[ids], ys[ids]
            features = cache(params, ids, x, y)  # on the host: looked up or computed
            params, opt_state = step(params, opt_state, features, x, y)

    where ``step``, jitted, takes gradients of ``cache.loss(params, features, x, y)``
    instead of ``loss(params, x, y)``. They are the same for active leaves, and zero for
    resting ones.

    **Right or refused.** That examples do not influence each other is proven from the
    jaxpr. Where a resting layer is applied to something that cannot be kept (random
    numbers, statistics of the batch, side effects), that is an error naming the leaf,
    the operation and its line. Dropout or batch statistics above all resting layers, or
    between them and the first active one, are fine: they stay in the loss. What the
    jaxpr cannot show is checked at each call: resting leaves that have changed clear
    the cache, examples that have changed (augmentation on the host) are an error.

    Args:
      loss: ``loss(params, *batch)`` -> any pytree of arrays, such as a scalar, or a
        scalar and metrics or new state.
      params: pytree of arrays.
      active: pytree of bools (no tracers), in the structure of ``params`` or a prefix
        of it, or a ``StaticMask``: the leaves that may be updated while this cache is
        used. All others rest.
      *batch: an example of the other arguments, pytrees of arrays. Its size is that of
        the batches in which missing examples are computed.
      num_examples: how many there are; ids are in ``[0, num_examples)``.
      in_axes: as in `jax.vmap`: the axis of the examples in each argument of ``batch``,
        or None for what is not per example, such as a key or the statistics of
        BatchNorm. What of the latter the prefix depends on is watched like params.
      limit_bytes: up to which size features are kept in memory; None for any size.
      path: of a file that does not exist yet, for features larger than that. It is
        mapped into memory, and not deleted afterwards.
      partial: where a resting layer cannot be kept, keep what is below it instead of
        raising. The steps then do the rest.
      verify: whether to check at each call that resting leaves, and the examples that
        were looked up, are what they were. It costs a pass over each.

    Attributes:
      frozen: paths of the resting leaves below the cut.
      stats: a `CacheStats`.

    Raises:
      ValueError: nothing to keep, something that must not be kept, a mask or ids of the
        wrong structure or shape, features over the limit without a path.
      TypeError: masks that are not bools or are traced, ids that are not integers.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from priorityprop_jax.training import CachedPrefix
      >>> def loss(params, x, y):
      ...     hidden = jnp.tanh(x @ params["first"])
      ...     return jnp.mean((hidden @ params["last"] - y) ** 2)
      >>> params = {"first": jnp.ones((3, 4)), "last": jnp.ones((4, 1))}
      >>> x, y = jnp.ones((5, 3)), jnp.zeros((5, 1))
      >>> active = {"first": False, "last": True}
      >>> cache = CachedPrefix(loss, params, active, x, y, num_examples=100)
      >>> cache.frozen
      ("params['first']",)
      >>> features = cache(params, np.arange(5), x, y)
      >>> grads = jax.grad(cache.loss)(params, features, x, y)
      >>> bool(jnp.allclose(grads["last"], jax.grad(loss)(params, x, y)["last"]))
      True
      >>> features = cache(params, np.arange(5), x, y)
      >>> cache.stats.hits, cache.stats.misses
      (5, 5)

      The moment a leaf of the prefix becomes active, the loss itself is the one to use:

      >>> cache.covers({"first": True, "last": True})
      False
      >>> cache.check({"first": True, "last": True})
      Traceback (most recent call last):
      ValueError: params['first'] is active now, but rested when the cache was made, ...
      >>> cache.stats.clears
      1
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        params: Any,
        active: Any,
        *batch: Any,
        num_examples: int,
        in_axes: int | None | Sequence[Any] = 0,
        limit_bytes: int | None = None,
        path: str | os.PathLike | None = None,
        partial: bool = False,
        verify: bool = True,
    ):
        if isinstance(num_examples, bool) or not isinstance(num_examples, int):
            raise TypeError(f"num_examples must be an int, got {num_examples!r}")
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self._fun, self._partial, self._verify = loss, partial, verify
        self._num_examples = num_examples
        pairs, self._treedef = jax.tree_util.tree_flatten_with_path(params)
        self._paths = [f"params{jax.tree_util.keystr(path)}" for path, _ in pairs]
        self._active = _mask(active, params)
        if not any(self._active):
            raise ValueError("active: no leaf is, so there is no step to save work in")
        self._in_axes = _per_argument(in_axes, batch)
        self._axes, self._names = _axes(self._in_axes, batch)
        given = jax.tree.leaves(batch)
        self._size = max(_size(given, self._axes, self._names), 2)
        inputs = [*map(_shape, jax.tree.leaves(params)), *map(_shape, given)]
        self._shapes = _resized(inputs, [None] * len(pairs) + self._axes, self._size)
        self._batch_treedef = jax.tree.structure(batch)
        # Traced at most once for each size of a batch.
        self._programs: dict[int, _Program] = {}
        self._cut = self._find_cut()
        first = self._program(self._size)
        self._programs[self._size] = first._replace(cut=self._cut)
        self._set_up(limit_bytes, path)

    def _find_cut(self) -> _split.Split:
        closed = self._program(self._size).closed
        values = []
        for path, is_active in zip(self._paths, self._active, strict=True):
            resting = _examples.Known(leaf=path)
            values.append(_examples.Active() if is_active else resting)
        for axis in self._axes:
            known = _examples.Known()
            values.append(known if axis is None else _examples.Rows(axis))
        cut = _split.split(closed, values, self._size)
        if cut.refusals and not self._partial:
            leaf, reason = cut.refusals[0]
            raise ValueError(
                f"{leaf} rests, but is applied to what cannot be kept for each "
                f"example: {reason}. With partial=True what is below is kept; or take "
                f"this leaf out of the resting ones; or run the layers in inference "
                f"mode"
            )
        n = len(self._paths)
        self.frozen = tuple(self._paths[k] for k in cut.reads if k < n)
        if not cut.rows or not self.frozen:
            lowest = next(
                p for p, a in zip(self._paths, self._active, strict=True) if a
            )
            raise ValueError(
                f"nothing to cache: below the first active layer there is no work of "
                f"resting layers for single examples (active are {lowest}"
                f"{', ...' if sum(self._active) > 1 else ''}). A prefix can be kept if "
                f"all leaves that the first layers use rest"
            )
        return cut

    def _set_up(self, limit_bytes: int | None, path: str | os.PathLike | None) -> None:
        closed = self._program(self._size).closed
        run = _split.prefix(closed, self._cut, self._size)
        read = [self._shapes[k] for k in self._cut.reads]
        self._prefix = jax.jit(run)
        costs = self._prefix.lower(*read).cost_analysis()
        flops = dict(costs or {}).get("flops", 0.0)
        self._flops = max(float(flops), 0.0)  # of a batch
        rows, _ = jax.eval_shape(run, *read)
        shapes = [(self._num_examples, *x.shape[1:]) for x in rows]
        dtypes = [np.dtype(x.dtype) for x in rows]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
        self._bytes = sum(sizes)
        if limit_bytes is None or self._bytes <= limit_bytes:
            # Pages of zeros take no memory before they are written to.
            make = lambda shape, dtype: np.zeros(shape, dtype)
            self._store = list(map(make, shapes, dtypes))
        else:
            self._store = _map_file(path, shapes, dtypes, sizes, limit_bytes)
        self._have = np.zeros(self._num_examples, bool)
        self._checksums = np.zeros(self._num_examples, np.uint32)
        self._shared: tuple[jax.Array, ...] = ()
        self._seen: list[Any] = []
        self._fingerprint: np.ndarray | None = None
        self._hits = self._misses = self._clears = self._batches = 0

    def _program(self, size: int) -> _Program:
        """The loss at a batch size."""
        if size not in self._programs:
            n = len(self._paths)
            treedef = None

            def flat(*leaves):
                nonlocal treedef
                params = jax.tree.unflatten(self._treedef, leaves[:n])
                batch = jax.tree.unflatten(self._batch_treedef, leaves[n:])
                out, treedef = jax.tree.flatten(self._fun(params, *batch))
                return out

            axes = [None] * n + self._axes
            shapes = _resized(self._shapes, axes, size)
            active = [*self._active, *[False] * len(self._axes)]
            closed = _split.flatten(flat, shapes, active)
            cut = self._cut if self._programs else None
            if cut is not None:
                cut = _split.match(self._programs[self._size].closed, cut, closed)
                if cut is None:
                    raise ValueError(
                        f"with a batch of {size} instead of {self._size} examples, the "
                        f"loss does not compute the same features: its prefix depends "
                        f"on the size. Pad the batch, or leave it out"
                    )
            self._programs[size] = _Program(closed, treedef, cut)
        return self._programs[size]

    @property
    def stats(self) -> CacheStats:
        """What the cache has done so far."""
        saved = self._hits * self._flops / self._size
        spent = self._batches * self._flops
        counts = self._hits, self._misses, self._clears, self._bytes
        return CacheStats(*counts, saved, spent)

    def clear(self) -> None:
        """Forgets all features; the next calls compute them anew."""
        self._have[:] = False
        self._shared, self._seen, self._fingerprint = (), [], None
        self._clears += 1

    def covers(self, active: Any) -> bool:
        """Whether the cache serves a step that updates these leaves.

        Args:
          active: pytree of bools, as for `CachedPrefix`.

        Returns:
          False if a leaf is active that was resting when the cache was made.
        """
        return not self._awake(active)

    def _awake(self, active: Any) -> list[str]:
        """The leaves that are active now and were not."""
        shapes = self._shapes[: len(self._paths)]
        mask = _mask(active, jax.tree.unflatten(self._treedef, shapes))
        triples = zip(self._paths, mask, self._active, strict=True)
        return [path for path, now, before in triples if now and not before]

    def check(self, active: Any) -> None:
        """Clears the cache and raises if a leaf of the prefix has become active.

        Args:
          active: pytree of bools, as for `CachedPrefix`.

        Raises:
          ValueError: a leaf is active that was resting when the cache was made.
        """
        if awake := self._awake(active):
            self.clear()
            raise ValueError(
                f"{', '.join(awake[:3])}{', ...' if len(awake) > 3 else ''} "
                f"{'is' if len(awake) == 1 else 'are'} active now, but rested when the "
                f"cache was made, which has been cleared: differentiate the loss "
                f"itself, or make a new CachedPrefix"
            )

    def __call__(
        self, params: Any, ids: Any, *batch: Any, active: Any = None
    ) -> Features:
        """Looks up the features of a batch, and computes what is missing.

        Runs on the host: not under `jax.jit`.

        Args:
          params: pytree of arrays.
          ids: integers, shape (batch,), in ``[0, num_examples)``; which examples these
            are. An id may be repeated.
          *batch: the other arguments of the loss; the batch may be of any size.
          active: what is active in this step, to be checked as by `check`; optional.

        Returns:
          `Features`, on the default device, for `CachedPrefix.loss`.

        Raises:
          ValueError: ids out of range or of another shape; an example that is not what
            it was when its features were computed.
          TypeError: ids that are not integers; traced arguments.
        """
        if active is not None:
            self.check(active)
        leaves = self._leaves(params, batch)
        if any(map(is_traced, (*leaves, ids))):
            raise TypeError(
                "the cache is looked up on the host: call it outside of jax.jit, and "
                "pass the features to the jitted step"
            )
        given = leaves[len(self._paths) :]
        size = _size(given, self._axes, self._names)
        ids = self._checked_ids(ids, size)
        watched = [leaves[k] for k in self._cut.reads if self._axis(k) is None]
        self._watch(watched)
        # The first occurrence of each id stands for all others in this batch.
        unique, first = np.unique(ids, return_index=True)
        missing = ~self._have[unique]
        sums = self._check_examples(leaves, ids) if self._verify else None
        fresh, positions = unique[missing], first[missing]
        outs: tuple[jax.Array, ...] = ()
        for start in range(0, len(fresh), self._size):
            part = slice(start, start + self._size)
            outs = self._compute(leaves, fresh[part], positions[part], size)
        if sums is not None:
            self._checksums[fresh] = sums[positions]
        self._misses += len(fresh)
        self._hits += size - len(fresh)
        whole = len(fresh) == size == self._size and np.array_equal(ids, fresh)
        if not whole:
            outs = tuple(jnp.asarray(np.asarray(x[ids])) for x in self._store)
        return Features(outs, self._shared)

    def _axis(self, k: int) -> int | None:
        n = len(self._paths)
        return self._axes[k - n] if k >= n else None

    def _leaves(self, params: Any, batch: Sequence[Any]) -> list[Any]:
        """All inputs of the program, flat and checked."""
        for name, tree, treedef in (
            ("params", params, self._treedef),
            ("batch", tuple(batch), self._batch_treedef),
        ):
            if jax.tree.structure(tree) != treedef:
                raise ValueError(
                    f"{name} must have the structure with which the cache was made, "
                    f"{treedef}, got {jax.tree.structure(tree)}"
                )
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(tuple(batch))]
        for k, (x, shape) in enumerate(zip(leaves, self._shapes, strict=True)):
            now, axis = _shape(x), self._axis(k)
            like = now.shape if axis is None else _without(now.shape, axis)
            allowed = shape.shape if axis is None else _without(shape.shape, axis)
            if now.dtype != shape.dtype or like != allowed:
                name = [*self._paths, *self._names][k]
                raise ValueError(
                    f"{name} has shape {now.shape} and dtype {now.dtype}; the cache "
                    f"was made for {shape.shape} and {shape.dtype}"
                    + ("" if axis is None else f", where axis {axis} may differ")
                )
        return leaves

    def _checked_ids(self, ids: Any, size: int) -> np.ndarray:
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"ids must be integers, got an array of {ids.dtype}")
        if ids.shape != (size,):
            raise ValueError(
                f"ids must have one entry for each example, shape ({size},), got "
                f"shape {ids.shape}"
            )
        outside = (ids < 0) | (ids >= self._num_examples)
        if outside.any():
            k = int(np.argmax(outside))
            raise ValueError(
                f"ids must be in [0, {self._num_examples}), num_examples, got "
                f"ids[{k}] = {ids[k]}"
            )
        return ids.astype(np.int64)

    def _watch(self, watched: Sequence[Any]) -> None:
        """Clears the cache if what the prefix is made of has changed."""
        if not self._verify and self._fingerprint is not None:
            return
        # Arrays of jax do not change. Weak, so as not to keep old params alive.
        same = len(self._seen) == len(watched) and all(
            ref() is x for ref, x in zip(self._seen, watched, strict=True)
        )
        if not same:
            now = np.asarray(_fingerprints(list(watched)))
            if self._fingerprint is not None:
                if not np.array_equal(now, self._fingerprint):
                    self.clear()
            self._fingerprint = now
            immutable = all(isinstance(x, jax.Array) for x in watched)
            self._seen = [weakref.ref(x) for x in watched] if immutable else []

    def _check_examples(self, leaves: Sequence[Any], ids: np.ndarray) -> np.ndarray:
        """Checksums of the examples of a batch, which those kept must have, too."""
        sums = np.zeros(len(ids), np.uint32)
        for k in self._cut.reads:
            axis = self._axis(k)
            if axis is None:
                continue
            rows = np.ascontiguousarray(np.moveaxis(np.asarray(leaves[k]), axis, 0))
            for i, row in enumerate(rows):
                sums[i] = zlib.crc32(row.tobytes(), int(sums[i]))
        expected = np.where(self._have[ids], self._checksums[ids], sums)
        _, first, which = np.unique(ids, return_index=True, return_inverse=True)
        expected = expected[first][which]
        if (changed := sums != expected).any():
            k = int(np.argmax(changed))
            raise ValueError(
                f"example {ids[k]} (ids[{k}]) is not what it was when its features "
                f"were computed: are there two examples with one id, or augmentation "
                f"before the loss? Then a prefix cannot be kept. verify=False turns "
                f"this check off"
            )
        return sums

    def _compute(
        self, leaves: Sequence[Any], ids: np.ndarray, positions: np.ndarray, size: int
    ) -> tuple[jax.Array, ...]:
        """Computes rows and stores them; always one batch, filled up with repeats."""
        filled = np.resize(positions, self._size)
        in_order = size == self._size and np.array_equal(filled, np.arange(size))
        read = []
        for k in self._cut.reads:
            axis = self._axis(k)
            if axis is None or in_order:
                read.append(leaves[k])
            else:
                read.append(np.take(np.asarray(leaves[k]), filled, axis))
        rows, shared = self._prefix(*read)
        for kept, x in zip(self._store, rows, strict=True):
            kept[ids] = np.asarray(x)[: len(ids)]
        self._have[ids] = True
        self._shared = tuple(shared)
        self._batches += 1
        return tuple(rows)

    def loss(self, params: Any, features: Features, *batch: Any) -> Any:
        """The loss, computed from features: what it returns, but without the prefix.

        To be jitted and differentiated; gradients of active leaves are those of the
        loss itself, and leaves that rested when the cache was made get zeros.

        Args:
          params: pytree of arrays.
          features: `Features` of the batch.
          *batch: the other arguments of the loss. Under `jax.jit` what only the prefix
            reads is not even sent to the device.

        Returns:
          What ``loss(params, *batch)`` returns.

        Raises:
          ValueError: features of another batch size, params or batch of other shapes.
        """
        leaves = self._leaves(params, batch)
        n = len(self._paths)
        size = _size(leaves[n:], self._axes, self._names)
        if not isinstance(features, Features):
            raise TypeError(
                f"features must be what the cache returns, Features, got "
                f"{type(features).__name__}"
            )
        if any(x.shape[0] != size for x in features.rows):
            raise ValueError(
                f"features are of {features.rows[0].shape[0]} examples, but the batch "
                f"has {size}"
            )
        closed, treedef, cut = self._program(size)
        run = _split.suffix(closed, cut, size)
        leaves = [
            x if k >= n or self._active[k] else lax.stop_gradient(x)
            for k, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, run(leaves, features.rows, features.shared))


def _mask(active: Any, params: Any) -> list[bool]:
    """Whether anything of each leaf is active."""
    tree = active.tree if isinstance(active, StaticMask) else active
    if any(map(is_traced, jax.tree.leaves(tree))):
        raise TypeError(
            "active is traced; a prefix is kept or not by the host: pass bools"
        )
    return [bool(np.any(mask)) for mask in leaf_masks(active, params)]


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x))


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _resized(
    shapes: Sequence[jax.ShapeDtypeStruct], axes: Sequence[int | None], size: int
) -> list[jax.ShapeDtypeStruct]:
    """The shapes with another number of examples."""
    return [
        x
        if axis is None
        else jax.ShapeDtypeStruct(
            (*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype
        )
        for x, axis in zip(shapes, axes, strict=True)
    ]


def _per_argument(in_axes: Any, batch: Sequence[Any]) -> tuple[Any, ...]:
    if in_axes is None or isinstance(in_axes, int):
        return (in_axes,) * len(batch)
    if not isinstance(in_axes, tuple | list) or len(in_axes) != len(batch):
        raise ValueError(
            f"in_axes must be an int, or have one entry for each of the {len(batch)} "
            f"arguments after params, got {in_axes!r}"
        )
    return tuple(in_axes)


def _axes(
    in_axes: Sequence[Any], batch: Sequence[Any]
) -> tuple[list[int | None], list[str]]:
    """The axis of the examples in each array of a batch, and what to call it."""
    axes, names = [], []
    for i, (axis, argument) in enumerate(zip(in_axes, batch, strict=True)):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(f"in_axes[{i}] must be an int or None, got {axis!r}")
        for path, x in jax.tree_util.tree_leaves_with_path(argument):
            name = f"batch[{i}]{jax.tree_util.keystr(path)}"
            shape = _shape(x).shape
            if axis is not None and not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{name} has shape {shape}, and no axis {axis} of examples: if it "
                    f"is not per example, in_axes[{i}] must be None"
                )
            axes.append(axis if axis is None else axis % len(shape))
            names.append(name)
    return axes, names


def _size(
    given: Sequence[Any], axes: Sequence[int | None], names: Sequence[str]
) -> int:
    """The number of examples in a batch."""
    sizes = {
        name: _shape(x).shape[axis]
        for x, axis, name in zip(given, axes, names, strict=True)
        if axis is not None
    }
    if not sizes:
        raise ValueError("the loss needs an argument per example: all in_axes are None")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the arguments differ in the number of examples: {sizes}")
    size = next(iter(sizes.values()))
    if not size:
        raise ValueError("the batch is empty")
    return size


def _map_file(
    path: str | os.PathLike | None,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[np.dtype],
    sizes: Sequence[int],
    limit_bytes: int,
) -> list[np.ndarray]:
    """Arrays that lie one after the other in a new file."""
    total = sum(sizes)
    need = f"features take {total:,} bytes, more than limit_bytes={limit_bytes:,}"
    if path is None:
        raise ValueError(f"{need}: pass path= for a file to keep them in")
    file = pathlib.Path(path)
    if file.exists():
        raise FileExistsError(f"path={str(file)!r} exists; {need} and need a new file")
    if (free := shutil.disk_usage(file.absolute().parent).free) < total:
        raise ValueError(f"{need}, and {str(file)!r} has room for {free:,} only")
    with open(file, "xb") as f:
        f.truncate(total)
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    return [
        np.memmap(file, dtype, "r+", offset, shape)
        for shape, dtype, offset in zip(shapes, dtypes, offsets, strict=True)
    ]


@jax.jit
def _fingerprints(arrays: Sequence[jax.Array]) -> jax.Array:
    """A number for each array, which changes if its bits do."""
    return jnp.stack([_hash(_words(x)) for x in arrays])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as integers; the two zeros count as one."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.where(x == 0, jnp.zeros_like(x), x)
    if not jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4:
        return x.astype(jnp.uint32).ravel()  # also integers of 4 bits
    width = x.dtype.itemsize * 8
    target = {8: jnp.uint8, 16: jnp.uint16}.get(width, jnp.uint32)
    return lax.bitcast_convert_type(x, target).astype(jnp.uint32).ravel()


def _hash(words: jax.Array) -> jax.Array:
    """The sum of words that were mixed with their positions (as in MurmurHash3).

    Mixing one word is a bijection: if a single one changes, then so does the sum.
    """
    position = lax.iota(jnp.uint32, words.size)
    x = (words ^ (position * np.uint32(0x9E3779B1))) * np.uint32(0xCC9E2D51)
    x = (x ^ (x >> 15)) * np.uint32(0x1B873593)
    return jnp.sum(x, dtype=jnp.uint32)

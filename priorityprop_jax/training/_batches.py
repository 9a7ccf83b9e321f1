"""From any iterable of batches to arrays on the devices, always in the same order."""

import base64
import contextlib
import io
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_count
from ._placement import batch_size, Placement


_ANEW = (
    "Give something that starts anew with each epoch: a list, a torch DataLoader, an "
    "ArrayLoader, or a function that returns such an iterator"
)


class ArrayLoader:
    """Batches of arrays in memory, in an order that depends on seed and epoch alone.

    Args:
      arrays: a pytree of arrays, such as ``(images, labels)``, of the same first axis.
      batch_size: examples in a batch.
      shuffle: whether each epoch has an order of its own.
      seed: of the shuffling.
      drop_last: whether to leave out a last batch that is smaller than the others.

    Raises:
      ValueError, TypeError: an argument cannot be meant; the arrays differ in their
        first axis, or there is nothing in them.

    Examples:
      >>> import numpy as np
      >>> loader = ArrayLoader((np.arange(5), np.arange(5) % 2), 2, shuffle=False)
      >>> [labels.tolist() for _, labels in loader]
      [[0, 1], [0, 1], [0]]
      >>> len(loader)
      3
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ):
        check_count("batch_size", batch_size, least=1)
        check_count("seed", seed, least=0, most=2**63 - 1)
        self.arrays = jax.tree.map(np.asarray, arrays)
        self._examples = agreed_size("arrays", self.arrays)
        if self._examples == 0:
            raise ValueError("arrays must hold at least one example, got none")
        self.batch_size, self.shuffle, self.seed = int(batch_size), shuffle, int(seed)
        self.drop_last, self.epoch = drop_last, 0
        if len(self) == 0:
            raise ValueError(
                f"batch_size={batch_size} is more than the {self._examples} examples, "
                f"so that with drop_last=True there would be no batch"
            )

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order the next iteration has."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(self._examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(self._examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        for i in range(len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield jax.tree.map(lambda x, chosen=chosen: x[chosen], self.arrays)


def length(loader: Any) -> int | None:
    """The number of batches of an epoch, or None where the loader does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        return None


# What comes out of a loader.


def to_numpy(batch: Any, name: str = "batch") -> Any:
    """A pytree of arrays: of NumPy, or of JAX where they were that already.

    Takes tensors of torch and TensorFlow, whatever else NumPy can make an array of, and
    lists of numbers inside of tuples, lists and dicts. Mappings become dicts.

    Raises:
      TypeError: something is no array of numbers; with its path.

    Examples:
      >>> to_numpy({"x": [1.0, 2.0], "n": 3})
      {'x': array([1., 2.]), 'n': array(3)}
    """
    if batch is None:
        return None
    if isinstance(batch, Mapping):
        return {k: _inner(x, f"{name}[{k!r}]") for k, x in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        pairs = zip(getattr(batch, "_fields", ()), batch, strict=True)
        return type(batch)(*(_inner(x, f"{name}.{k}") for k, x in pairs))
    if isinstance(batch, list | tuple):
        parts = [_inner(x, f"{name}[{i}]") for i, x in enumerate(batch)]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return _array(batch, name)


def _inner(x: Any, name: str) -> Any:
    return (
        _array(x, name) if isinstance(x, list) and _is_numbers(x) else to_numpy(x, name)
    )


def _is_numbers(x: Any) -> bool:
    if isinstance(x, list):
        return bool(x) and all(map(_is_numbers, x))
    return isinstance(x, bool | int | float | complex | np.generic)


def _is_plain(x: Any) -> bool:
    return type(x) is np.ndarray and x.dtype.kind in "biufc"


def _array(x: Any, name: str) -> Any:
    if isinstance(x, jax.Array) or _is_plain(x):
        return x
    try:
        if hasattr(x, "detach"):  # torch
            x = x.detach().cpu()
            brain = str(x.dtype) == "torch.bfloat16"  # which NumPy does not know
            x = x.float().numpy().astype(jnp.bfloat16) if brain else x.numpy()
        elif callable(getattr(x, "numpy", None)):  # TensorFlow
            x = x.numpy()
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be made an array: {error}") from error
    known = np.number, np.bool_
    if not any(jnp.issubdtype(array.dtype, kind) for kind in known):
        raise TypeError(
            f"{name} must be an array of numbers, got {type(x).__name__} of dtype "
            f"{array.dtype}: leave it out of the batches, or turn it into numbers"
        )
    return array


def agreed_size(name: str, batch: Any, scalars: bool = False) -> int:
    """The number of examples in each array of a pytree.

    Raises:
      ValueError: two differ, there is none, or one is a scalar, unless `scalars` are
        passed over.
    """
    found = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(found) == 1 and () not in found:
        return found.pop()[0]
    pairs = jax.tree_util.tree_flatten_with_path(batch)[0]
    sizes = []
    for path, x in pairs:
        path = f"{name}{jax.tree_util.keystr(path)}"
        if not np.ndim(x) and scalars:
            continue
        if not np.ndim(x):
            raise ValueError(f"{path} must have an axis of examples, got a scalar")
        sizes.append((path, np.shape(x)[0]))
        if sizes[-1][1] != sizes[0][1]:
            (first, n), (other, m) = sizes[0], sizes[-1]
            raise ValueError(
                f"there must be as many examples in each part, got {n} in {first} and "
                f"{m} in {other}"
            )
    if not sizes:
        raise ValueError(f"{name} must hold at least one array, got {batch!r}")
    return sizes[0][1]


def pad(batch: Any, size: int) -> tuple[Any, np.ndarray]:
    """The batch with its last example repeated up to `size`, and weights.

    Args:
      batch: a pytree of arrays that all have an axis of examples in front.
      size: how many examples to return, at least as many as there are.

    Returns:
      The batch, and float32 weights of shape (size,): 1 for examples, 0 for padding.
      Real examples are repeated, as a weight of 0 does not help against NaN.

    Raises:
      ValueError: the leaves differ in size, there are none, or they are too large.

    Examples:
      >>> import numpy as np
      >>> pad((np.arange(3), np.ones(3)), 4)
      ((array([0, 1, 2, 2]), array([1., 1., 1., 1.])),
       array([1., 1., 1., 0.], dtype=float32))
    """
    count = agreed_size("batch", batch)
    if not 0 < count <= size:
        raise ValueError(f"a batch of {count} examples cannot be padded to {size}")
    weights = (np.arange(size) < count).astype(np.float32)
    if count == size:
        return batch, weights
    index = np.minimum(np.arange(size), count - 1)
    return jax.tree.map(lambda x: np.asarray(x)[index], batch), weights


# Epochs, and where in them to start.


def epochs(
    loader: Any,
    start_epoch: int = 0,
    start_batch: int = 0,
    stop_epoch: int = 1,
    *,
    state: Any = None,
    states: bool = False,
    replay: bool = True,
    name: str = "dataloader",
) -> Generator[tuple[int, int, Any, Any]]:
    """What a loader yields, from a place in the middle on, as if from the beginning.

    How the loader is brought to that place: by `state`, if it has states; else by its
    ``set_epoch``, and the batches before `start_batch` are passed over; else all
    earlier epochs are gone through as well, so that what is random in them comes out
    the same if it was seeded alike. A ``set_epoch`` of a torch sampler is called, too.

    Args:
      loader: an iterable of batches, or a function that returns one for each epoch.
      start_epoch, start_batch: where to start, from 0.
      stop_epoch: the epoch before which to stop.
      state: what this function yielded with the last batch that was done.
      states: whether to ask the loader for its state after each batch.
      replay: False where this very loader has been through the earlier epochs already.
      name: what to call the loader in errors.

    Yields:
      (epoch, index, batch, state). The state is plain, for JSON; None if the loader
      has no ``state_dict`` and its iterator no ``get_state``.

    Raises:
      ValueError: an epoch has no batches, or fewer than have been done in it.
    """
    by_state = state is not None and _is_stateful(loader)
    by_epoch = callable(getattr(loader, "set_epoch", None))
    first = start_epoch if by_state or by_epoch or not replay else 0
    for epoch in range(first, stop_epoch):
        _set_epoch(loader, epoch)
        done = start_batch if epoch == start_epoch else 0
        index, saved = 0, None
        if epoch == start_epoch and by_state:
            index, saved = start_batch, state
        for iterator in _iterators(loader, saved):
            for batch in iterator:
                if epoch >= start_epoch and index >= done:
                    after = _get_state(loader, iterator, name) if states else None
                    yield epoch, index, batch, after
                index += 1
            if index:
                break
        if index == 0:
            raise ValueError(_why_empty(loader, epoch, name))
        if index < done:
            raise ValueError(
                f"{name} has {index} batches in epoch {epoch + 1}, of which {done} had "
                f"been done: to resume, the data have to be the same as before"
            )


def _iterators(loader: Any, state: Any) -> Iterator[Iterator[Any]]:
    """From the saved state on; then, should that have been the end, from the start."""
    if state is not None:
        saved = _decode(state)
        if _has(loader, "state_dict", "load_state_dict"):
            loader.load_state_dict(saved)
            yield iter(loader)
        else:
            iterator = iter(loader)
            iterator.set_state(saved)
            yield iterator
    yield iter(loader() if _is_factory(loader) else loader)


def _has(x: Any, *names: str) -> bool:
    return all(callable(getattr(x, name, None)) for name in names)


def _is_factory(loader: Any) -> bool:
    return callable(loader) and not hasattr(loader, "__iter__")


def _is_stateful(loader: Any) -> bool:
    if _is_factory(loader) or isinstance(loader, Iterator):
        return _has(loader, "state_dict", "load_state_dict")
    return _has(loader, "state_dict", "load_state_dict") or _has(
        iter(loader), "get_state", "set_state"
    )


def _set_epoch(loader: Any, epoch: int) -> None:
    inner = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    for x in (loader, *inner):
        if callable(set_epoch := getattr(x, "set_epoch", None)):
            set_epoch(epoch)
            return


def _get_state(loader: Any, iterator: Any, name: str) -> Any:
    if _has(loader, "state_dict", "load_state_dict"):
        state = loader.state_dict()
    elif _has(iterator, "get_state", "set_state"):
        state = iterator.get_state()
    else:
        return None
    try:
        return _encode(state)
    except TypeError as error:
        warnings.warn(
            f"the state of {name} cannot be saved ({error}): a resumed run will go "
            f"through the batches before it instead",
            stacklevel=2,
        )
        return None


def _why_empty(loader: Any, epoch: int, name: str) -> str:
    text = f"{name} gave no batch in epoch {epoch + 1}"
    if isinstance(loader, Iterator):
        kind = type(loader).__name__
        return (
            f"{text}: it is an iterator ({kind}), which can be gone through only once. "
            f"{_ANEW}"
        )
    if getattr(loader, "drop_last", False):
        return f"{text}: with drop_last=True, there are fewer examples than in a batch"
    return f"{text}: it is empty" if length(loader) == 0 else f"{text}"


def check_loader(loader: Any, epochs: int = 1, name: str = "dataloader") -> None:
    """Raises where it is plain that `loader` cannot give batches for so many epochs.

    Raises:
      TypeError: it is no iterable, or one of other things than batches.
      ValueError: it can be gone through only once, and there are several epochs.

    Examples:
      >>> check_loader(iter([1]), epochs=2)
      Traceback (most recent call last):
      ValueError: dataloader is an iterator (list_iterator), ...
    """
    kind = type(loader).__name__
    hint = f"for arrays: {name}=ArrayLoader((inputs, labels), batch_size=32)"
    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
    if isinstance(loader, str | bytes | Mapping) or is_array(loader):
        raise TypeError(f"{name} must be an iterable of batches, got {kind}; {hint}")
    if isinstance(loader, tuple) and loader and all(map(is_array, loader)):
        raise TypeError(
            f"{name} must be an iterable of batches, got a tuple of arrays, which is "
            f"one batch; {hint}"
        )
    if not callable(loader) and not hasattr(loader, "__iter__"):
        if any(t.__module__.startswith("torch.") for t in type(loader).__mro__):
            raise TypeError(
                f"{name} must be an iterable of batches, got {kind}, a data set: give "
                f"torch.utils.data.DataLoader(..., batch_size=32, shuffle=True)"
            )
        if not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"{name} must be an iterable of batches, got {loader!r}; {hint}"
            )
    builtin = type(loader).__module__ == "builtins"
    if epochs > 1 and isinstance(loader, Iterator) and builtin:
        raise ValueError(
            f"{name} is an iterator ({kind}), which can be gone through only once, and "
            f"there are {epochs} epochs. {_ANEW}"
        )


# States as JSON. No pickles: a checkpoint must not be able to run code.


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, np.generic):
        return _encode(x.item())
    if isinstance(x, bytes):
        return {"__bytes__": base64.b64encode(x).decode()}
    if hasattr(x, "detach"):
        return {"__tensor__": _encode(x.detach().cpu().numpy())["__array__"]}
    if isinstance(x, np.ndarray) and x.dtype != object:
        stream = io.BytesIO()
        np.save(stream, x, allow_pickle=False)
        return {"__array__": base64.b64encode(stream.getvalue()).decode()}
    if isinstance(x, tuple):
        return {"__tuple__": [_encode(y) for y in x]}
    if isinstance(x, list):
        return [_encode(y) for y in x]
    if isinstance(x, Mapping):
        return {"__dict__": [[_encode(k), _encode(y)] for k, y in x.items()]}
    raise TypeError(f"it holds a {type(x).__name__}")


def _decode(x: Any) -> Any:
    if isinstance(x, list):
        return [_decode(y) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, value),) = x.items()
    if kind == "__bytes__":
        return base64.b64decode(value)
    if kind == "__tuple__":
        return tuple(_decode(y) for y in value)
    if kind == "__dict__":
        return {_decode(k): _decode(y) for k, y in value}
    array = np.load(io.BytesIO(base64.b64decode(value)), allow_pickle=False)
    if kind == "__tensor__":
        import torch

        return torch.from_numpy(array)
    return array


# A thread that is ahead.


def prefetch(items: Iterable[Any], depth: int = 2) -> Generator[Any]:
    """The same items, of which up to `depth` are made ahead, in a thread.

    What is raised in the thread is raised here, after the items before it. When this
    generator is closed or forgotten, the thread ends as soon as it is done with the
    item it is at; nobody waits for it for long, should it never be.

    Args:
      items: an iterable; from the first item on it belongs to the thread.
      depth: 0 for no thread.

    Examples:
      >>> list(prefetch(range(3)))
      [0, 1, 2]
    """
    if depth == 0:
        yield from items
        return
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()
    arguments = items, ready, room, stop
    thread = threading.Thread(
        target=_work, args=arguments, name="prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            room.release()
            yield value
    finally:
        stop.set()
        room.release()
        if thread is not threading.current_thread():
            thread.join(timeout=2.0)


def _work(items: Iterable[Any], ready: Any, room: Any, stop: Any) -> None:
    try:
        iterator = iter(items)
        try:
            while True:
                room.acquire()
                if stop.is_set():
                    return
                ready.put(("item", next(iterator)))
        except StopIteration:
            ready.put(("end", None))
        finally:
            if isinstance(iterator, Generator):
                iterator.close()
    except BaseException as error:  # whatever it is, the other side waits for it
        ready.put(("error", error))


class Batch(NamedTuple):
    """What `feed` yields."""

    epoch: int  # from 0
    index: int  # in the epoch, from 0
    data: Any  # pytree of arrays on the devices
    weights: Any  # 1 for examples, 0 for padding, float32; None where nothing is padded
    count: int  # examples of this process, without padding
    last: bool  # whether the epoch ends with it
    size: int  # of padded batches up to now
    state: Any  # of the loader after this batch, for JSON, or None


def feed(
    loader: Any,
    placement: Placement,
    *,
    padded: bool | Callable[[Any], bool],
    start_epoch: int = 0,
    start_batch: int = 0,
    stop_epoch: int = 1,
    size: int = 0,
    state: Any = None,
    states: bool = False,
    replay: bool = True,
    prepare: Callable[[Any], Any] | None = None,
    name: str = "dataloader",
    depth: int = 2,
) -> Generator[Batch]:
    """The batches of some epochs, on the devices before they are needed.

    Args:
      loader: any iterable of batches, or a function that returns one for each epoch.
        What it yields is copied, as it may write to the same memory again; but for the
        arrays in a list or a tuple, and those of an `ArrayLoader`.
      placement: where to put them.
      padded: whether to pad them to the size of the largest so far, rounded up to a
        multiple of the devices, so that a smaller last one needs no other program. Or
        a function of the first batch that tells; called in the thread, after `prepare`.
      start_epoch, start_batch, stop_epoch, states, replay, name: as in `epochs`.
      size, state: to resume: those of the last batch that was done. In several
        processes there are no states.
      prepare: is applied to each batch of arrays, in the thread. One that it returns as
        it is stands for all further ones of the same structure, shapes and dtypes.
      depth: how many to prepare ahead. (One more is, to know which is the last.)

    Returns:
      A generator of `Batch`; to be closed where one stops before its end.

    Raises:
      TypeError, ValueError: `loader` cannot be one. When iterated: an epoch or a batch
        is empty; several processes do not have as many batches, of the same size.
    """
    check_loader(loader, stop_epoch - (0 if replay else start_epoch), name)

    def load() -> Generator[Batch]:
        largest, full, pads = size, None, padded
        known: _Known | None = None
        stays = type(loader) in (list, tuple, ArrayLoader)
        items = epochs(
            loader,
            start_epoch,
            start_batch,
            stop_epoch,
            state=state,
            # A checkpoint is of all processes, the state of a loader of one.
            states=states and jax.process_count() == 1,
            replay=replay,
            name=name,
        )
        with contextlib.closing(items):
            for epoch, index, raw, after in items:
                if known is not None and known.kind == _kind(raw):
                    data = raw if stays else jax.tree.map(np.array, raw)
                    weights, count = known.weights, known.count
                    yield Batch(
                        epoch, index, data, weights, count, False, largest, after
                    )
                    continue
                batch = to_numpy(raw)
                batch = batch if prepare is None else prepare(batch)
                count = batch_size(batch)
                if count == 0:
                    raise ValueError(
                        f"batch {index + 1} of epoch {epoch + 1} of {name} has no "
                        f"examples"
                    )
                if callable(pads):
                    pads = bool(pads(batch))
                weights = None
                if pads:
                    largest = _grow(largest, count, placement.multiple, name)
                    even = agreed_size("batch", batch) == largest
                    if even and full is not None and full.size == largest:
                        data, weights = placement.batch(batch), full
                    else:
                        data, weights = placement.batch(pad(batch, largest))
                        full = weights if even else full
                else:
                    data = placement.batch(batch)
                kind = (
                    _kind(raw) if placement.on_host and _is_same(raw, batch) else None
                )
                if kind is not None and kind == _kind(data):
                    known = _Known(kind, weights, count)
                yield Batch(epoch, index, data, weights, count, False, largest, after)

    def generate():
        items = prefetch(_mark_last(load()), depth)
        with contextlib.closing(items):
            for i, item in enumerate(items):
                if i == 0:  # nobody has anything else to do yet
                    known = length(loader)
                    placement.same("size of batches", item.size or item.count)
                    placement.same("number of batches", -1 if known is None else known)
                yield item

    return generate()


class _Known(NamedTuple):
    """What there is to know of a batch that went to the device as it came."""

    kind: Any
    weights: Any
    count: int


def _kind(batch: Any) -> Any:
    """Structure, shapes and dtypes of NumPy arrays; None if anything else is there."""
    leaves, structure = jax.tree.flatten(batch)
    if any(type(x) is not np.ndarray for x in leaves):
        return None
    return structure, [(x.shape, x.dtype) for x in leaves]


def _is_same(batch: Any, other: Any) -> bool:
    """Whether two pytrees hold the very same arrays."""
    ids = lambda tree: list(map(id, jax.tree.leaves(tree)))
    return ids(batch) == ids(other)


def _grow(largest: int, count: int, multiple: int, name: str) -> int:
    if count <= largest:
        return largest
    if largest and jax.process_count() > 1:
        raise ValueError(
            f"in several processes no batch of {name} may be larger than the first "
            f"one, got {count} examples after {largest}"
        )
    return -(-count // multiple) * multiple


def _mark_last(items: Generator[Batch]) -> Generator[Batch]:
    """Sets `last`; what is raised comes after the batches before it."""
    with contextlib.closing(items):
        held = next(items, None)
        while held is not None:
            try:
                following = next(items, None)
            except BaseException:
                yield held
                raise
            if following is None or following.epoch != held.epoch:
                held = held._replace(last=True)
            yield held
            held = following

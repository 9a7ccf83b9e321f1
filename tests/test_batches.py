"""Batches: the same from every kind of loader, in the same order after a restart."""

import collections
import contextlib
import gc
import itertools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import Mesh

from priorityprop_jax.training._batches import (
    ArrayLoader,
    check_loader,
    epochs,
    feed,
    length,
    pad,
    prefetch,
    to_numpy,
)
from priorityprop_jax.training._placement import batch_size, Placement


X = np.arange(10, dtype=np.float32).reshape(10, 1)
Y = np.arange(10, dtype=np.int32)
ONE = Placement()


def labels_of(batches):
    return [np.asarray(b[1]).tolist() for b in batches]


def loader(**kwargs):
    return ArrayLoader((X, Y), 4, **kwargs)


# Loaders of all kinds, each of which gives two epochs of three batches.


class Tensor:
    """Like one of TensorFlow's."""

    def __init__(self, x):
        self._x = x

    def numpy(self):
        return self._x


class Resumable:
    """A loader with an order of its own for each epoch, and a state, as torchdata's."""

    def __init__(self, batches):
        self.batches, self.epoch, self.at, self.seen = batches, 0, 0, 0

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.batches))
        while self.at < len(order):
            batch = self.batches[order[self.at]]
            self.at, self.seen = self.at + 1, self.seen + 1
            yield batch
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at, 3: (np.arange(2), b"\xff")}

    def load_state_dict(self, state):
        np.testing.assert_array_equal(state[3][0], np.arange(2))
        assert state[3][1] == b"\xff"
        self.epoch, self.at = state["epoch"], state["at"]


class GrainLike:
    """An iterable whose iterators have a state."""

    def __init__(self, batches):
        self.batches, self.made = batches, 0

    def __iter__(self):
        return GrainIterator(self)


class GrainIterator:
    def __init__(self, parent):
        self.parent, self.at = parent, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.parent.batches):
            raise StopIteration
        self.at += 1
        self.parent.made += 1
        return self.parent.batches[self.at - 1]

    def get_state(self):
        return json.dumps({"at": self.at}).encode()

    def set_state(self, state):
        self.at = json.loads(state)["at"]


class SelfSeeded:
    """Reshuffles with a generator of its own: only from the start is it the same."""

    def __init__(self, batches):
        self.batches, self.rng = batches, np.random.default_rng(0)

    def __iter__(self):
        return (self.batches[i] for i in self.rng.permutation(len(self.batches)))


def torch_loader(batches):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)


LOADERS = {
    "list": list,
    "ArrayLoader": lambda batches: loader(seed=3),
    "jax": lambda batches: [jax.tree.map(jnp.asarray, b) for b in batches],
    "function": lambda batches: lambda: iter(batches),
    "tensorflow": lambda batches: [tuple(map(Tensor, b)) for b in batches],
    "torch": torch_loader,
    "state": Resumable,
    "state of the iterator": GrainLike,
    "self-seeded": SelfSeeded,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("states", [False, True])
def test_every_loader_resumes_anywhere(kind, states):
    """After each of the batches of three epochs, with a new loader seeded alike."""
    make = lambda: LOADERS[kind](list(loader(shuffle=False)))
    run = lambda **kwargs: list(feed(make(), ONE, padded=True, stop_epoch=3, **kwargs))
    whole = run(states=states)
    assert [(b.epoch, b.index, b.last) for b in whole] == [
        (epoch, index, index == 2) for epoch in range(3) for index in range(3)
    ]
    for i, b in enumerate(whole):
        json.dumps(b.state)  # goes into a checkpoint
        start = (b.epoch + 1, 0) if b.last else (b.epoch, b.index + 1)
        names = "start_epoch", "start_batch"
        at = dict(zip(names, start, strict=True)) | {"size": b.size}
        rest = run(**at, state=json.loads(json.dumps(b.state)), states=states)
        places = [(b.epoch, b.index, b.last, b.count, b.size) for b in rest]
        assert places == [
            (b.epoch, b.index, b.last, b.count, b.size) for b in whole[i + 1 :]
        ]
        for one, other in zip(rest, whole[i + 1 :], strict=True):
            jax.tree.map(np.testing.assert_array_equal, one.data, other.data)
            np.testing.assert_array_equal(one.weights, other.weights)
    each = [sorted(np.asarray(b.data[1][: b.count]).tolist()) for b in whole[:3]]
    assert sorted(sum(each, [])) == list(range(10))


def test_a_state_saves_the_work():
    stateful = Resumable(list(loader(shuffle=False)))
    at = list(epochs(stateful, stop_epoch=2, states=True))[3][3]
    again = Resumable(list(loader(shuffle=False)))
    list(epochs(again, 1, 1, 2, state=at))
    assert again.seen == 2
    grain = GrainLike(list(loader(shuffle=False)))
    at = list(epochs(grain, states=True))[1][3]
    grain.made = 0
    assert [i for _, i, _, _ in epochs(grain, 0, 2, 2, state=at)] == [2, 0, 1, 2]
    assert grain.made == 4


def test_without_replay():
    """The loader is the one that the earlier epochs came from."""
    make = lambda: SelfSeeded(list(loader(shuffle=False)))
    one, whole = make(), list(epochs(make(), stop_epoch=3))
    parts = [list(epochs(one, i, 0, i + 1, replay=False)) for i in range(3)]
    assert [labels_of([b]) for _, _, b, _ in sum(parts, [])] == [
        labels_of([b]) for _, _, b, _ in whole
    ]
    once = iter(list(loader()))
    assert (
        len(
            list(
                feed(once, ONE, padded=True, start_epoch=4, stop_epoch=5, replay=False)
            )
        )
        == 3
    )


def test_sampler_is_told_the_epoch():
    class Loader(list):
        def __init__(self, *args):
            super().__init__(*args)
            self.sampler, self.told = self, []

        @property
        def set_epoch(self):  # of the sampler only
            raise AttributeError

    class Sampler:
        def __init__(self):
            self.told = []

        def set_epoch(self, epoch):
            self.told.append(epoch)

    batches = Loader([(X, Y)])
    batches.sampler = Sampler()
    assert len(list(epochs(batches, 1, 0, 3))) == 2
    assert batches.sampler.told == [0, 1, 2]  # and the first one is gone through


def test_state_that_cannot_be_saved():
    class Odd(list):
        def state_dict(self):
            return {"rng": object()}

        def load_state_dict(self, state):
            raise AssertionError

    odd = Odd(loader(shuffle=False))
    with pytest.warns(UserWarning, match="the state of dataloader cannot be saved"):
        states = [state for *_, state in epochs(odd, states=True)]
    assert states == [None] * 3
    assert len(list(epochs(odd, 0, 1, state=None))) == 2


def test_states_hold_tensors():
    torch = pytest.importorskip("torch")

    class Loader(list):
        def state_dict(self):
            return {"rng": torch.arange(3, dtype=torch.uint8), "f": [np.float32(0.1)]}

        def load_state_dict(self, state):
            assert torch.equal(state["rng"], self.state_dict()["rng"])
            assert np.float32(state["f"][0]) == np.float32(0.1)

    batches = Loader([(X, Y)])
    ((*_, state),) = epochs(batches, states=True)
    assert len(list(epochs(batches, 1, 0, 2, state=json.loads(json.dumps(state))))) == 1


# Empty, used up, not a loader.


def test_one_shot_iterators():
    once = (b for b in loader())
    with pytest.raises(ValueError, match="dataloader is an iterator .generator.*only"):
        feed(once, ONE, padded=True, stop_epoch=2)
    assert len(list(feed(once, ONE, padded=True))) == 3
    with pytest.raises(ValueError, match="eval_data gave no batch in epoch 1: .*only"):
        list(feed(once, ONE, padded=True, name="eval_data"))

    class Once:
        def __init__(self):
            self.rest = iter(loader())

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.rest)

    batches = feed(Once(), ONE, padded=True, stop_epoch=2)
    for _ in range(3):
        next(batches)
    message = "gave no batch in epoch 2: it is an iterator .Once.* an ArrayLoader"
    with pytest.raises(ValueError, match=message):
        next(batches)


class Dropping(list):
    drop_last = True


@pytest.mark.parametrize(
    ("empty", "message"),
    [
        ([], "dataloader gave no batch in epoch 1: it is empty"),
        (Dropping(), "with drop_last=True, there are fewer examples than in a batch"),
        (lambda: iter(()), "gave no batch in epoch 1"),
        ([(X[:0], Y[:0])], "batch 1 of epoch 1 of dataloader has no examples"),
    ],
)
def test_empty(empty, message):
    with pytest.raises(ValueError, match=message):
        list(feed(empty, ONE, padded=False))


def test_empty_later():
    again = iter([[(X, Y)], []])
    batches = feed(lambda: next(again), ONE, padded=True, stop_epoch=2)
    assert next(batches).count == 10
    with pytest.raises(ValueError, match="gave no batch in epoch 2"):
        next(batches)


def test_other_data_than_before():
    with pytest.raises(ValueError, match="has 3 batches in epoch 1, of which 5 had"):
        list(epochs(loader(), 0, 5))
    assert list(epochs(loader(), 0, 3)) == []  # all done


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (X, "got ndarray; for arrays: dataloader=ArrayLoader"),
        (jnp.ones(3), "an iterable of batches"),
        ((X, Y), "a tuple of arrays, which is one batch"),
        ({"x": X}, "got dict"),
        ("train", "got str"),
        (3, "got 3"),
        (None, "got None"),
    ],
)
def test_not_a_loader(wrong, message):
    with pytest.raises(TypeError, match=message):
        check_loader(wrong)


def test_torch_dataset_is_no_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    with pytest.raises(TypeError, match="TensorDataset, a data set: give .*DataLoader"):
        check_loader(data)


def test_length():
    assert length(loader()) == 3
    assert length(iter([])) is None


# ArrayLoader.


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 20), st.integers(1, 7), st.booleans(), st.integers(0, 9), st.data()
)
def test_array_loader(examples, size, drop, seed, data):
    x = {"a": np.arange(examples), "b": np.arange(examples) * 2.0}
    if drop and size > examples:
        with pytest.raises(ValueError, match="there would be no batch"):
            ArrayLoader(x, size, drop_last=True)
        return
    batches = ArrayLoader(x, size, seed=seed, drop_last=drop)
    epoch = data.draw(st.integers(0, 3))
    batches.set_epoch(epoch)
    seen = list(batches)
    assert len(seen) == len(batches)
    a = np.concatenate([b["a"] for b in seen])
    assert len(set(a.tolist())) == len(a) == (len(seen) * size if drop else examples)
    np.testing.assert_array_equal(np.concatenate([b["b"] for b in seen]), a * 2.0)
    again = ArrayLoader(x, size, seed=seed, drop_last=drop)
    list(again)  # what was done before does not matter
    again.set_epoch(epoch)
    np.testing.assert_array_equal(np.concatenate([b["a"] for b in again]), a)


def test_array_loader_epochs_differ():
    orders = []
    for seed in range(2):
        batches = loader(seed=seed)
        for epoch in range(3):
            batches.set_epoch(epoch)
            orders.append(tuple(np.concatenate(labels_of(batches))))
    assert len(set(orders)) == 6


@pytest.mark.parametrize(
    ("arrays", "kwargs", "error", "message"),
    [
        ((X, Y[:5]), {}, ValueError, r"10 in arrays\[0\] and 5 in arrays\[1\]"),
        ((X, 3), {}, ValueError, r"arrays\[1\] must have an axis of examples"),
        ((), {}, ValueError, "at least one array"),
        ((X[:0],), {}, ValueError, "at least one example"),
        ((X,), {"batch_size": 0}, ValueError, "batch_size must be in"),
        ((X,), {"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        ((X,), {"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_array_loader_bad(arrays, kwargs, error, message):
    with pytest.raises(error, match=message):
        ArrayLoader(arrays, **({"batch_size": 2} | kwargs))


# to_numpy, pad.


def test_to_numpy():
    Pair = collections.namedtuple("Pair", "x y")
    batch = Pair([[1, 2], [3, 4]], collections.UserDict(a=X, b=[Y, (1.5, None)]))
    out = to_numpy(batch)
    assert isinstance(out, Pair)
    np.testing.assert_array_equal(out.x, [[1, 2], [3, 4]])
    assert type(out.y) is dict and out.y["a"] is X and out.y["b"][0] is Y
    assert out.y["b"][1][0] == 1.5 and out.y["b"][1][1] is None
    top = to_numpy([[1.0, 2.0], [0, 1]])  # as inputs and labels
    assert [x.dtype for x in top] == [np.float64, np.int64]
    key = jax.random.key(0)
    assert to_numpy({"key": key})["key"] is key
    assert to_numpy([np.float32(2)])[0].shape == ()


def test_to_numpy_torch():
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    out = to_numpy([x, {"half": half, "on": torch.tensor([True])}])
    np.testing.assert_array_equal(out[0], np.arange(6.0).reshape(2, 3))
    assert out[1]["half"].dtype == jnp.bfloat16
    assert out[1]["half"].astype(float).tolist() == [1.5, -2.0]
    assert out[1]["on"].tolist() == [True]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, ["a", "b"]), r"batch\[1\]\[0\] must be an array of numbers, got str"),
        ({"x": np.array(["a"])}, r"batch\['x'\] must be .* dtype <U1: leave it out"),
        ((X, [[1, 2], [3]]), r"batch\[1\] cannot be made an array"),
        ([{"y": object()}], r"batch\[0\]\['y'\] must be an array .* got object"),
    ],
)
def test_to_numpy_bad(batch, message):
    with pytest.raises(TypeError, match=message):
        to_numpy(batch)


def test_pad():
    batch, weights = pad({"x": X[:3], "y": Y[:3]}, 5)
    assert batch["y"].tolist() == [0, 1, 2, 2, 2]
    assert batch["x"][:, 0].tolist() == [0, 1, 2, 2, 2]
    assert weights.dtype == np.float32 and weights.tolist() == [1, 1, 1, 0, 0]
    same, weights = pad((X, Y), 10)
    assert same[0] is X and weights.sum() == 10
    for bad, size, message in [
        ((X, Y[:4]), 12, r"10 in batch\[0\] and 4 in batch\[1\]"),
        ((X, np.float32(1)), 12, r"batch\[1\] must have an axis"),
        ((X,), 9, "10 examples cannot be padded to 9"),
        ((), 9, "at least one array"),
    ]:
        with pytest.raises(ValueError, match=message):
            pad(bad, size)
    assert batch_size((np.float32(1), X)) == 10
    assert batch_size(()) == 1


# feed.


def test_one_shape():
    """Smaller batches need no other program, and their padding has no weight."""
    batches = list(feed(loader(shuffle=False), ONE, padded=True))
    assert [b.data[0].shape for b in batches] == [(4, 1)] * 3
    assert [b.count for b in batches] == [4, 4, 2]
    assert [b.weights.sum() for b in batches] == [4, 4, 2]
    assert batches[0].weights is batches[1].weights
    total = sum(float((b.weights[:, None] * b.data[0]).sum()) for b in batches)
    assert total == X.sum()
    for b in batches:
        assert all(isinstance(x, np.ndarray) for x in (*b.data, b.weights))
    plain = list(feed(loader(shuffle=False), ONE, padded=False))
    assert [b.data[0].shape for b in plain] == [(4, 1), (4, 1), (2, 1)]
    assert {b.weights for b in plain} == {None}


def test_larger_later():
    growing = [(X[:n], Y[:n]) for n in (3, 5, 2, 6)]
    batches = list(feed(growing, ONE, padded=True))
    assert [b.size for b in batches] == [3, 5, 5, 6]
    assert [b.weights.sum() for b in batches] == [3, 5, 2, 6]
    (small,) = feed([(X[:2], Y[:2])], ONE, padded=True, size=6)  # resumed
    assert small.data[0].shape == (6, 1)


def test_sizes_are_multiples_of_the_devices():
    place = Placement(Mesh(np.array(jax.devices()[:4]), ("data",)))
    batches = list(feed([(X, Y), (X[:3], Y[:3])], place, padded=True))
    assert [b.data[0].shape for b in batches] == [(12, 1)] * 2
    assert [b.weights.sum() for b in batches] == [10, 3]
    for x in (*batches[0].data, batches[0].weights):
        assert len(x.sharding.device_set) == 4 and not x.is_fully_replicated
    plain = list(feed([(X[:8], Y[:8]), (X[:3], Y[:3])], place, padded=False))
    assert [b.data[0].is_fully_replicated for b in plain] == [False, True]


def test_prepare_and_padded_are_asked():
    threads, asked = set(), []

    def prepare(batch):
        threads.add(threading.current_thread())
        return {"inputs": batch[0]}

    def padded(batch):
        asked.append(batch)
        return True

    batches = list(feed(loader(), ONE, padded=padded, prepare=prepare))
    assert [set(b.data) for b in batches] == [{"inputs"}] * 3
    assert threading.current_thread() not in threads
    assert len(asked) == 1 and asked[0]["inputs"].shape == (4, 1)
    assert batches[-1].weights.sum() == 2

    def refuse(batch):
        raise TypeError("not this one")

    with pytest.raises(TypeError, match="not this one"):
        next(feed(loader(), ONE, padded=True, prepare=refuse))


def test_loader_may_use_its_memory_again():
    def reuse():
        buffer = np.empty(4, np.float32)
        for i in range(5):
            buffer[:] = i
            yield (buffer,)

    batches = list(feed(reuse, ONE, padded=True))
    assert [b.data[0].tolist() for b in batches] == [[i] * 4 for i in range(5)]


@pytest.mark.parametrize("padded", [True, False])
def test_batches_that_are_alike_are_not_looked_at_again(padded):
    """What stays in memory is not copied, and a change of kind is seen."""
    count = itertools.count()
    whole = [(X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]) for i in (0, 1)]
    narrow = X[:4].astype(np.float64), Y[:4].astype(np.int64)
    several = [*whole, narrow, *whole, (X[:2], Y[:2]), *whole]
    prepare = lambda batch: (next(count), batch)[1]
    for source, copied in [(several, False), (lambda: iter(several), True)]:
        found = list(feed(source, ONE, padded=padded, prepare=prepare))
        assert [b.count for b in found] == [4, 4, 4, 4, 4, 2, 4, 4]
        for batch, raw in zip(found, several, strict=True):
            n = len(raw[0])
            for x, y in zip(batch.data, raw, strict=True):
                assert x.dtype == jax.dtypes.canonicalize_dtype(y.dtype)
                assert np.array_equal(x[:n], y)
            assert not padded or batch.weights.sum() == n
        shared = [np.shares_memory(b.data[0], X) for b in found]
        assert shared[1] == shared[-1] == (not copied)
    assert next(count) < 2 * len(several)
    changed = lambda batch: (batch[0] + 1, batch[1])
    found = list(feed(whole, ONE, padded=padded, prepare=changed))
    assert np.array_equal(found[1].data[0], whole[1][0] + 1)


def test_structure_is_still_checked():
    """A batch of another structure than those that were alike before it."""

    def check(batch):
        if len(batch) != 2:
            raise ValueError("another structure")
        return batch

    batches = feed([(X, Y)] * 3 + [(X, Y, Y)], ONE, padded=True, prepare=check)
    with pytest.raises(ValueError, match="another structure"):
        list(batches)


# The thread.


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    if threads():
        gc.collect()
    assert wait_for(lambda: not threads())


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_prefetch_order(depth):
    assert list(prefetch(range(100), depth)) == list(range(100))
    assert list(prefetch([], depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_not_too_far_ahead(depth):
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    ahead = prefetch(items(), depth)
    for taken in range(1, 10):
        next(ahead)
        assert wait_for(lambda taken=taken: len(made) == taken + depth)
        time.sleep(0.01)
        assert len(made) == taken + depth
    ahead.close()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_prefetch_passes_errors_on(depth, error):
    def items():
        yield from range(3)
        raise error

    ahead, seen = prefetch(items(), depth), []
    with pytest.raises(type(error)) as caught:
        for x in ahead:
            seen.append(x)
    assert seen == [0, 1, 2]
    assert caught.value is error
    assert any(entry.name == "items" for entry in caught.traceback)  # where it was
    assert list(ahead) == []


def test_error_of_the_loader_comes_after_its_batches():
    def broken():
        yield X, Y
        yield X, Y
        raise OSError("disk is gone")

    batches = feed(lambda: broken(), ONE, padded=True)
    assert [next(batches).last for _ in range(2)] == [False, False]
    with pytest.raises(OSError, match="disk is gone"):
        next(batches)


@pytest.mark.parametrize("how", ["close", "forget", "break", "error"])
@pytest.mark.parametrize("taken", [1, 2, 5])
def test_prefetch_stops_early(how, taken):
    closed = threading.Event()

    def items():
        try:
            i = 0
            while True:
                yield (i := i + 1)
        finally:
            closed.set()

    ahead = prefetch(items())
    if how == "error":
        with pytest.raises(ZeroDivisionError), contextlib.closing(ahead):
            next(ahead)
            1 / 0  # noqa: B018
    elif how == "break":
        for i in ahead:
            if i == taken:
                break
    else:
        assert [next(ahead) for _ in range(taken)] == list(range(1, taken + 1))
    if how == "close":
        ahead.close()
    del ahead
    gc.collect()
    assert closed.wait(30)
    assert wait_for(lambda: not threads())


def test_prefetch_never_started():
    made = []
    ahead = prefetch(made.append(i) for i in range(3))
    ahead.close()
    assert made == [] and not threads()


def test_closing_does_not_wait_for_a_loader_that_hangs():
    let_go = threading.Event()

    def items():
        yield 1
        let_go.wait(60)
        yield 2

    ahead = prefetch(items())
    assert next(ahead) == 1
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(timeout=30)  # far more than it should take, and less than the loader
    assert not closing.is_alive()
    let_go.set()


def test_feed_stops_early():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield X, Y
        finally:
            closed.set()

    with contextlib.closing(feed(endless, ONE, padded=True)) as batches:
        for b in batches:
            if b.index == 3:
                break
    assert closed.wait(30)
    assert wait_for(lambda: not threads())

"""`PriorityPropTrainer` on many devices and in two processes: as on one device."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import test_examples
import test_processes
from priorityprop_jax.training._batches import ArrayLoader
from priorityprop_jax.training._trainer import PriorityPropTrainer
from workers import trainer_processes as worker


# Eight devices.


class Net(nn.Module):
    """With dropout, whose masks must not depend on where the examples are."""

    norm: bool

    @nn.compact
    def __call__(self, x, train: bool):
        # In front of a norm, a bias has a gradient of rounding errors only.
        x = nn.Dense(16, use_bias=not self.norm)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(8)(nn.relu(nn.Dense(16)(x)))


X = np.random.default_rng(0).normal(size=(43, 8)).astype(np.float32)
Y = (X[:, 0] > 0) + 2 * (X[:, 1] > 0)
COLUMNS = "loss", "accuracy", "eval_loss", "eval_accuracy"
SHARDINGS = {
    "data parallel": None,
    "fsdp": "fsdp",
    "rule": lambda path, leaf: P(None, "data") if leaf.ndim == 2 else P(),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def train(norm, mode, mesh=None, sharding=None):
    trainer = PriorityPropTrainer(
        Net(norm),
        optax.adam(1e-2),
        optax.softmax_cross_entropy_with_integer_labels,
        total_budget=0.5,
        max_updates=4,
        recalc_every=4,
        example_input=X[:1],
        mode=mode,
        mesh=mesh,
        sharding=sharding,
    )
    before = jax.tree.map(lambda x: x.sharding, (trainer.params, trainer.state))
    history = trainer.train(
        ArrayLoader((X, Y), 16),  # the last batch has 11 examples
        3,
        eval_data=ArrayLoader((X, Y), 16, shuffle=False),
        metrics="accuracy",
    )
    after = jax.tree.map(lambda x: x.sharding, (trainer.params, trainer.state))
    assert mesh is None or after == before
    return trainer, history


@functools.cache
def on_one_device(norm, mode):
    trainer, history = train(norm, mode)
    return jax.device_get((trainer.params, trainer.state)), history


def programs_of(step):
    return [step._dynamic] if step.mode == "dynamic" else step.variants.values()


@pytest.mark.parametrize(
    ("norm", "mode", "sharding"),
    [
        slow(False, "static", "data parallel"),
        (False, "static", "fsdp"),
        slow(False, "dynamic", "fsdp"),
        slow(False, "dynamic", "rule"),
        (True, "dynamic", "data parallel"),
        slow(True, "dynamic", "fsdp"),
    ],
)
def test_eight_devices(norm, mode, sharding, quick_compilation):
    """BatchNorm: batches are not padded, and the last is whole on each device."""
    expected, history = on_one_device(norm, mode)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    trainer, found = train(norm, mode, mesh, SHARDINGS[sharding])
    for name in COLUMNS:
        np.testing.assert_allclose(found[name], history[name], rtol=2e-5, err_msg=name)
    assert found["updates"] == history["updates"]
    assert len(set(found["updates"][-1])) > 1
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, jax.device_get((trainer.params, trainer.state)), expected)
    whole = [p.is_fully_replicated for p in jax.tree.leaves(trainer.params)]
    assert all(whole) == (sharding == "data parallel")
    sizes = 2 if norm else 1  # of batches
    assert {p._cache_size() for p in programs_of(trainer.train_step)} <= {1, sizes}
    predicted = trainer.predict(X)
    assert predicted.shape == (43, 8)


# Two processes.


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_processes, "WORKER", pathlib.Path(worker.__file__))
        for attempt in range(3):
            folder = tmp_path_factory.mktemp(f"trainer{attempt}")
            codes, logs = test_processes.run_processes(folder)
            if not any("address already in use" in log.lower() for log in logs):
                break  # else somebody was faster to take the free port
    assert codes == [0] * worker.PROCESSES, "\n".join(log[-3000:] for log in logs)
    files = (folder / f"{i}.npz" for i in range(worker.PROCESSES))
    return [json.loads(str(np.load(file)["json"])) for file in files]


@functools.cache
def in_one_process():
    """On the batches of both, put together."""

    def together(loaders):
        epochs = [[] for _ in range(worker.EPOCHS)]
        for epoch, batches in enumerate(epochs):
            for loader in loaders:
                loader.set_epoch(epoch)
            for parts in zip(*loaders, strict=True):
                batches.append(jax.tree.map(lambda *x: np.concatenate(x), *parts))
        return epochs

    of = range(worker.PROCESSES)
    epochs = iter(together([worker.loader_of(i) for i in of]))
    plain = together([worker.loader_of(i, shuffle=False) for i in of])[0]
    return worker.train(None, lambda: next(epochs), plain)


@pytest.mark.parametrize("run", worker.RUNS)
def test_two_processes(results, run):
    one, other = (r[run] for r in results)
    predicted = one.pop("predicted"), other.pop("predicted")
    assert one == other
    expected = in_one_process()
    for name in COLUMNS:
        np.testing.assert_allclose(one[name], expected[name], rtol=2e-5, err_msg=name)
    for name, value in expected["evaluated"].items():
        np.testing.assert_allclose(one["evaluated"][name], value, rtol=2e-5)
    assert one["step"] == [3, 6, 9]
    assert one["updates"] == expected["updates"]
    assert len(set(one["updates"][-1])) > 1
    split = [spec != "()" for spec in one["placed"].values()]
    assert any(split) == (run == "fsdp")
    # Each has the outputs for its own inputs: one batch of each, then the next ones.
    ends = [8, 16]
    batches = zip(*(np.split(np.array(p), ends) for p in predicted), strict=True)
    together = np.concatenate([part for parts in batches for part in parts])
    np.testing.assert_allclose(together, expected["predicted"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            "fewer batches",
            "same number of batches, got 3 in process 0 and 2 in process",
        ),
        ("smaller batches", "same size of batches, got 8 in process 0 and 7 in proc"),
        ("no mesh", "in several processes there has to be a mesh over all devices"),
    ],
)
def test_processes_that_do_not_agree(results, run, message):
    for r in results:
        assert message in r[run]


def test_example(tmp_path):
    done = test_examples.run_example("multi_process.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("process ")]
    (one, other) = (line.split(":")[1] for line in sorted(lines))
    assert one == other and "test accuracy" in one
    assert not list(tmp_path.iterdir())


def test_example_ends_all_when_one_fails(tmp_path):
    args = "multi_process.py", "--data-dir", str(tmp_path / "nothing")
    done = test_examples.run_example(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert "nothing is not a directory" in done.stderr

"""The fine-tuning workloads, on made-up data of a few kilobytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import (
    _policies,
    _pretraining,
    finetune_cnn,
    finetune_transformer,
)

from priorityprop_jax import backward_costs


pytestmark = pytest.mark.usefixtures("quick_compilation")

WORKLOADS = {"cnn": finetune_cnn, "transformer": finetune_transformer}
LEARNT = {"cnn": 0.6, "transformer": 0.35}  # a class has a fifth, a space less
SPEECH = "To be, or not to be: that is the question.\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Data in the formats that the workloads read."""
    path = tmp_path_factory.mktemp("data")
    labels = np.repeat(np.arange(10, dtype=np.uint8), 12)
    stripes = np.sin(0.25 * (1 + labels[:, None]) * np.arange(32))
    noise = np.random.default_rng(0).normal(size=(len(labels), 32, 32, 3))
    images = 128 + 80 * stripes[:, None, :, None] + 10 * noise
    np.savez(path / finetune_cnn.FILE, images=images.astype(np.uint8), labels=labels)
    (path / finetune_transformer.FILE).write_text(SPEECH * 60)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    scale = finetune_cnn.Scale((8, 8, 8), passes=3, steps=20)
    monkeypatch.setitem(finetune_cnn.SCALES, "small", scale)
    monkeypatch.setattr(finetune_cnn, "HELD_OUT", 4)
    scale = finetune_transformer.Scale(16, 8, source=800, text=1600, steps=20)
    monkeypatch.setitem(finetune_transformer.SCALES, "small", scale)
    with jax.numpy_rank_promotion("allow"):  # the models broadcast scales and biases
        yield


def make(name, directory):
    return WORKLOADS[name].workload(directory, "small", directory / "cache")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", WORKLOADS)
class TestWorkload:
    def test_pretrains_once(self, name, directory, monkeypatch):
        first = make(name, directory).init(0)
        monkeypatch.setattr(_pretraining, "_train", None)  # not to be called again
        assert_equal(make(name, directory).init(0), first)
        assert (directory / "cache" / ".gitignore").read_text() == "*\n"

    def test_params_may_be_given_up(self, name, directory):
        workload = make(name, directory)
        before = jax.tree.map(np.array, workload.init(0))
        for leaf in jax.tree.leaves(workload.init(0)):
            leaf.delete()
        assert_equal(workload.init(0), before)

    def test_batches(self, name, directory):
        workload = make(name, directory)
        steps = 2 * -(-workload.examples // 8)
        batches = list(workload.batches(3, 8, steps))
        assert_equal(batches, list(workload.batches(3, 8, steps)))
        assert len(batches) == steps
        seen = {}
        for ids, *examples in batches:
            for i, *example in zip(ids.tolist(), *examples, strict=True):
                assert_equal(seen.setdefault(i, example), example)  # for a cache
        assert sorted(seen) == list(range(workload.examples))

    def test_learns(self, name, directory):
        workload = make(name, directory)
        arm = _policies.ARMS["adam"]
        settings = _policies.Settings(1e-2, 60, 8, 0)
        program = arm.start(workload, settings)
        run = program.state
        for i, batch in enumerate(workload.batches(0, 8, 60)):
            run = program.step(run, i, batch)
        before, after = map(workload.quality, (workload.init(0), run.params))
        assert 0 <= before < after <= 1 and after > LEARNT[name]

    def test_refuses_a_scale(self, name, directory):
        with pytest.raises(ValueError, match="scale must be one of"):
            WORKLOADS[name].workload(directory, "tiny")


ARMS = [
    ("cnn", "finetune"),
    ("transformer", "finetune"),
    ("cnn", "last_half"),
    ("cnn", "last_half_cached"),
]


@pytest.mark.parametrize("name, arm", ARMS)
def test_arms(name, arm, directory):
    workload = make(name, directory)
    settings = _policies.Settings(1e-3, 40, 8, 0)
    program = WORKLOADS[name].arms()[arm].start(workload, settings)
    run = program.state
    batches = list(workload.batches(0, 8, 40))
    for i, batch in enumerate(batches):
        run = program.step(run, i, batch)
    costs = backward_costs(workload.loss, workload.init(0), batches[0])
    spent = program.flops(run)
    before, after = jax.tree.leaves(workload.init(0)), jax.tree.leaves(run.params)
    moved = [bool(jnp.any(x != y)) for x, y in zip(before, after, strict=True)]
    assert moved[-1]  # the head is the last
    if arm == "finetune":
        assert spent <= 40 * costs.full
    elif arm == "last_half":
        assert not all(moved)
        assert spent == pytest.approx(40 * costs.flops(np.array(moved)))
    else:  # with a cache, less than without
        assert spent < 0.95 * 40 * costs.flops(np.array(moved))


class TestPretrained:
    def pretrain(self, directory, **changes):
        x = np.arange(6, dtype=np.float32)
        settings = {
            "name": "line",
            "params": {"w": jnp.zeros(())},
            "loss": lambda params, x: jnp.mean((params["w"] * x - 3 * x) ** 2),
            "batches": [x] * 80,
            "learning_rate": 0.2,
            "steps": 80,
            "data": [x],
            "cache_dir": directory,
        }
        return _pretraining.pretrained(**{**settings, **changes})

    def test_trains(self, tmp_path):
        assert self.pretrain(tmp_path)["w"] == pytest.approx(3, abs=0.05)

    def test_files_are_told_apart_by_all_that_matters(self, tmp_path):
        changes = [{}, {"learning_rate": 0.1}, {"steps": 79}, {"warmup": 5}]
        changes += [{"data": [np.ones(6)]}, {"params": {"w": jnp.ones(())}}]
        for change in [*changes, *changes]:
            self.pretrain(tmp_path, **change)
        assert len(list(tmp_path.glob("*.npz"))) == len(changes)

    def test_where_the_files_are(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PRIORITYPROP_CACHE", str(tmp_path / "here"))
        self.pretrain(None)
        assert len(list((tmp_path / "here").glob("line-*.npz"))) == 1

    def test_refuses_too_few_batches(self, tmp_path):
        with pytest.raises(ValueError, match="batches has 3, fewer than steps=80"):
            self.pretrain(tmp_path, batches=[np.ones(6, np.float32)] * 3)
        assert not list(tmp_path.glob("*.npz"))


def test_source_code_is_ascii_of_the_size():
    code = finetune_transformer.source_code(100_000)
    assert code.shape == (100_000,) and code.dtype == np.int32
    text = bytes(code.astype(np.uint8)).decode("ascii")
    assert "import " in text and "\r" not in text
    assert finetune_transformer.source_code(50).tolist() == code[:50].tolist()


def test_attention_is_causal():
    params = finetune_transformer.init(jax.random.key(0), width=16, context=8)
    params["head_5"]["kernel"] = jnp.ones((16, 128)) * np.arange(128)
    text = np.arange(8)[None]
    changed = np.where(text == 5, 77, text)
    before, after = (finetune_transformer.apply(params, x) for x in (text, changed))
    np.testing.assert_allclose(before[:, :5], after[:, :5], rtol=1e-5)
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3

"""The published quick start, and the trainer around it."""

import os
import pathlib
import subprocess
import sys

import pytest


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bridge = pytest.importorskip("priorityprop_jax.torch")
data = pytest.importorskip("torch.utils.data")
nn = torch.nn


def loader(n=96, batch_size=32, features=784, classes=10, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(n, features)
    y = (x @ torch.randn(features, classes)).argmax(1)
    return data.DataLoader(data.TensorDataset(x, y), batch_size, **kwargs)


QUICK_START = """
from priorityprop_jax.torch import PriorityPropTrainer

model = nn.Sequential(
    nn.Linear(784, 256),
    nn.ReLU(),
    nn.Linear(256, 10)
)
optimizer = torch.optim.Adam(model.parameters())
loss_fn = nn.CrossEntropyLoss()

trainer = PriorityPropTrainer(
    model=model,
    optimizer=optimizer,
    loss_fn=loss_fn,
    total_budget=100,
    min_updates=1,
    max_updates=20,
    recalc_every=10
)

history = trainer.train(dataloader, epochs=10)
print(trainer.get_priority_report())
"""


# The published numbers ask for more updates than 4 parameters may get.
@pytest.mark.filterwarnings("ignore:budget=100 is more than max_updates=20")
def test_the_published_quick_start(capsys):
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "dataloader": loader()}
    exec(QUICK_START, names)
    history, printed = names["history"], capsys.readouterr().out
    assert history["epoch"] == list(range(10))
    assert history["step"] == list(range(3, 31, 3))
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["updates"][-1] == [60] * 4 and history.cycles["step"] == [10, 20, 30]
    assert "0.weight" in printed and "256x784" in printed
    assert "240 updates of 4 units in 30 steps" in printed


def small(**kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = dict(total_budget=8, recalc_every=4) | kwargs
    return bridge.PriorityPropTrainer(
        model, optimizer, nn.CrossEntropyLoss(), **settings
    )


def test_training_goes_on_where_it_was():
    batches = loader(features=6, classes=3)
    one, two = small(), small()
    one.train(batches, epochs=4)
    two.train(batches, epochs=1)
    two.model.eval()
    history = two.train(batches, epochs=3)
    assert two.model.training and history is two.history
    for column in ("epoch", "loss", "step", "updates"):
        assert history[column] == one.history[column]
    assert history["seconds"] == sorted(history["seconds"])
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)
    one.optimizer.step()  # free between calls


def test_the_loss_is_the_mean_over_examples():
    batches = [(torch.ones(n, 6), torch.zeros(n, dtype=torch.long)) for n in (4, 1)]
    trainer = small(min_updates=0)
    trainer.loss_fn = lambda outputs, targets: outputs.sum() * 0 + len(targets)
    history = trainer.train(batches, epochs=1)
    assert history["loss"] == [(4 * 4 + 1) / 5]


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "no batch in epoch 0"),
        ([torch.ones(2, 6)], TypeError, r"pair \(inputs, targets\), got a Tensor"),
        ([(1, 2, 3)], TypeError, "got a tuple of 3"),
    ],
)
def test_batches_that_cannot_be_meant(batches, error, match):
    trainer = small()
    with pytest.raises(error, match=match):
        trainer.train(batches, epochs=2)
    trainer.optimizer.step()  # free again


def test_bad_arguments():
    trainer = small()
    with pytest.raises(ValueError, match="epochs must be in"):
        trainer.train([], epochs=0)
    with pytest.raises(ValueError, match="iterator can be gone through only once"):
        trainer.train(iter(loader(features=6, classes=3)), epochs=2)
    trainer.loss_fn = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match=r"scalar, got torch.Size\(\[32\]\)"):
        trainer.train(loader(features=6, classes=3))
    assert all(p.requires_grad for p in trainer.model.parameters())
    with pytest.raises(TypeError, match="nn.Module, got dict"):
        bridge.PriorityPropTrainer({}, trainer.optimizer, trainer.loss_fn)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        bridge.PriorityPropTrainer(trainer.model, trainer.optimizer, "mse")


# Python 3.12 and later, for torch's own threads as well as for JAX's.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_of_a_data_loader():
    """They are forked, and use no JAX."""
    batches = loader(features=6, classes=3, num_workers=2)
    history = small().train(batches, epochs=2)
    assert history["step"] == [3, 6]


def test_the_example_runs(tmp_path):
    pytest.importorskip("sklearn")
    example = pathlib.Path(__file__).parents[1] / "examples" / "torch_quickstart.py"
    done = subprocess.run(
        [sys.executable, str(example), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PRIORITYPROP_DATA": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("scikit-learn's digits", "PriorityPropTrainer", "0.weight"):
        assert expected in done.stdout
    assert not list(tmp_path.iterdir())

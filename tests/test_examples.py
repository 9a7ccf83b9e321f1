"""Every example runs in its short form, on the data that it was asked to."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import _data
from test_cli_data import write_mnist


EXAMPLES = Path(_data.__file__).parent
# What each example has to print.
OUTPUT = {
    "01_quickstart.py": ["chain(priority_prop, adam)", "prioritize(adam)", "One run"],
    "02_linen_loop.py": ["restored", "step 50", "test accuracy"],
    "03_nnx_loop.py": ["step 30", "test accuracy"],
    "04_data_parallel.py": ["4 cpu devices", "NamedSharding", "shard_map"],
    "05_finetune.py": ["half of the FLOPs", "the same, cached", "One run each"],
    "06_char_transformer.py": ["stopped early", "a budget of 0.6", "It writes"],
    "07_tour.py": ["rested at the second step", "least share", "0.6 of the FLOPs"],
}


def run_example(name, *args, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "PRIORITYPROP_DATA"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick", *args],
        cwd=cwd,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_example_is_tested():
    assert sorted(path.name for path in EXAMPLES.glob("[0-9]*.py")) == sorted(OUTPUT)


@pytest.mark.parametrize("name", OUTPUT)
def test_example(name, tmp_path):
    done = run_example(name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("Python's own" if "char" in name else "scikit-learn's") in done.stdout
    for expected in OUTPUT[name]:
        assert expected in done.stdout
    assert "\r" not in done.stdout  # progress lines are for terminals
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


def test_example_says_what_is_missing(mnist, tmp_path):
    (mnist / "t10k-images-idx3-ubyte").unlink()
    done = run_example("01_quickstart.py", PRIORITYPROP_DATA=str(mnist), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {mnist} lacks files: looked for t10k-images")
    assert "Traceback" not in done.stderr


def test_environment_names_the_directory(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRIORITYPROP_DATA", str(mnist))
    assert len(_data.load_images().train_labels) == 70
    monkeypatch.setenv("PRIORITYPROP_DATA", str(tmp_path / "nothing"))
    assert len(_data.load_images(str(mnist)).train_labels) == 70  # the argument wins
    assert "digits" not in capsys.readouterr().out


def test_digits_are_for_no_directory_only(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PRIORITYPROP_DATA", raising=False)
    data = _data.load_images()
    assert "digits" in capsys.readouterr().out
    assert data.train_images.shape == (1438, 8, 8, 1)
    assert data.test_labels.shape == (359,)
    assert 0 == data.train_images.min() < data.train_images.max() == 1
    with pytest.raises(SystemExit, match="error: .* lacks files"):
        _data.load_images(str(tmp_path))
    assert "digits" not in capsys.readouterr().out


def test_batches_go_through_all_the_data():
    x, y = np.arange(10.0), np.arange(10)
    epochs = np.concatenate([y for _, y in _data.batches(x, y, 4, steps=5, seed=0)])
    for epoch in epochs.reshape(2, 10):
        assert sorted(epoch) == list(range(10))
    again = np.concatenate([x for x, _ in _data.batches(x, y, 4, steps=5, seed=0)])
    np.testing.assert_array_equal(again, epochs)

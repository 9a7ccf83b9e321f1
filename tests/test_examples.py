"""Every example runs in its short form, and the loader refuses what is not MNIST."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import _data


EXAMPLES = Path(_data.__file__).parent
# What each example has to print.
OUTPUT = {
    "01_quickstart.py": ["chain(priority_prop, adam)", "prioritize(adam)", "One run"],
    "02_linen_loop.py": ["restored", "step 50", "test accuracy"],
    "03_nnx_loop.py": ["step 30", "test accuracy"],
    "04_data_parallel.py": ["4 cpu devices", "NamedSharding", "shard_map"],
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
    assert "scikit-learn's digits" in done.stdout
    for expected in OUTPUT[name]:
        assert expected in done.stdout
    assert "\r" not in done.stdout  # progress lines are for terminals
    assert not list(tmp_path.iterdir())


def idx(array, code=0x08):
    """The bytes of an IDX file, written after the format's description."""
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


def images_of(n, side=8):
    return np.arange(n * side * side, dtype=np.uint8).reshape(n, side, side)


def labels_of(n):
    return np.arange(n, dtype=np.uint8) % 10


@pytest.fixture
def mnist(tmp_path):
    """A directory with a small MNIST: some files gzipped, some not, one misnamed."""
    train_images, train_labels, test_images, test_labels = _data.MNIST_FILES
    gzipped = gzip.compress(idx(images_of(70)))
    (tmp_path / f"{train_images}.gz").write_bytes(gzipped)
    (tmp_path / f"{train_labels}.gz").write_bytes(idx(labels_of(70)))
    (tmp_path / test_images).write_bytes(idx(images_of(20)))
    (tmp_path / test_labels).write_bytes(gzip.compress(idx(labels_of(20))))
    return tmp_path


def test_load_mnist(mnist):
    data = _data.load_mnist(mnist)
    expected = images_of(70)[..., None].astype(np.float32) / 255
    np.testing.assert_array_equal(data.train_images, expected)
    np.testing.assert_array_equal(data.train_labels, labels_of(70))
    np.testing.assert_array_equal(data.test_labels, labels_of(20))
    assert data.train_images.dtype == data.test_images.dtype == np.float32
    assert data.train_labels.dtype == np.int32
    assert data.test_images.shape == (20, 8, 8, 1)
    assert data.classes == 10


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


def test_missing_files_are_listed(mnist):
    (mnist / "t10k-images-idx3-ubyte").unlink()
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        _data.load_mnist(mnist)
    missing = "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, with .gz or without"
    assert str(error.value) == f"{mnist} lacks files: looked for {missing}"
    with pytest.raises(FileNotFoundError, match="nothing is not a directory"):
        _data.load_mnist(mnist / "nothing")


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")],
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 2, 3)])
def test_read_idx(tmp_path, code, dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    (tmp_path / "a").write_bytes(idx(array, code))
    read = _data.read_idx(tmp_path / "a")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


GOOD = idx(images_of(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated, 0 bytes hold no IDX header"),
        (GOOD[:3], "truncated, 3 bytes hold no IDX header"),
        (GOOD[:15], "truncated in the header, which has 16 bytes"),
        (GOOD[:-1], r"truncated, the shape \(3, 8, 8\).* 208 bytes, the file has 207"),
        (GOOD + b"\0", r"too long, the shape \(3, 8, 8\).* 208 bytes, .* has 209"),
        (b"\x01" + GOOD[1:], "not an IDX file, it starts with 0x01000803"),
        (b"\0\0\x0a" + GOOD[3:], "not an IDX file, it starts with 0x00000a03"),
        (b"<html>not found</html>", "not an IDX file, it starts with 0x3c68746d"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "truncated, the shape .* the file has 20"),
        (gzip.compress(GOOD)[:-9], "truncated or damaged gzip file"),
        (gzip.compress(GOOD)[:20] + b"\0" * 40, "truncated or damaged gzip file"),
        (gzip.compress(GOOD[:-1]), "truncated, the shape"),
    ],
)
def test_bad_idx_files(tmp_path, data, message):
    path = tmp_path / "bad-idx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        _data.read_idx(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-labels-idx1-ubyte", labels_of(19), "holds 20 images, .* 19 labels"),
        ("t10k-labels-idx1-ubyte", images_of(20), r"1 dimension.* \(20, 8, 8\)"),
        ("t10k-images-idx3-ubyte", labels_of(20), r"3 dimension.* shape \(20,\)"),
        ("t10k-images-idx3-ubyte", images_of(0), r"none of them 0.* \(0, 8, 8\)"),
    ],
)
def test_files_that_do_not_fit_together(mnist, name, array, message):
    (mnist / f"{name}.gz").unlink(missing_ok=True)
    (mnist / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match=message) as error:
        _data.load_mnist(mnist)
    assert str(mnist / name) in str(error.value)


def test_batches_go_through_all_the_data():
    x, y = np.arange(10.0), np.arange(10)
    epochs = np.concatenate([y for _, y in _data.batches(x, y, 4, steps=5, seed=0)])
    for epoch in epochs.reshape(2, 10):
        assert sorted(epoch) == list(range(10))
    again = np.concatenate([x for x, _ in _data.batches(x, y, 4, steps=5, seed=0)])
    np.testing.assert_array_equal(again, epochs)

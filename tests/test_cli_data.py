"""The readers of the original formats refuse what is damaged, and call nothing."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, strategies as st

from priorityprop_jax.cli import _data


def idx(array, code=0x08):
    """The bytes of an IDX file, written after the format's description."""
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


def images_of(n, side=8):
    return np.arange(n * side * side, dtype=np.uint8).reshape(n, side, side)


def labels_of(n):
    return np.arange(n, dtype=np.uint8) % 10


def write_mnist(directory):
    """A small MNIST: some files gzipped, some not, one misnamed."""
    train_images, train_labels, test_images, test_labels = _data.MNIST_FILES
    gzipped = gzip.compress(idx(images_of(70)))
    (directory / f"{train_images}.gz").write_bytes(gzipped)
    (directory / f"{train_labels}.gz").write_bytes(idx(labels_of(70)))
    (directory / test_images).write_bytes(idx(images_of(20)))
    (directory / test_labels).write_bytes(gzip.compress(idx(labels_of(20))))


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
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


def test_mnist_in_a_directory_of_data(tmp_path):
    (tmp_path / "mnist").mkdir()
    write_mnist(tmp_path / "mnist")
    data = _data.load("mnist", str(tmp_path), examples=50)
    assert [len(x) for x in (*data.train, *data.test)] == [50, 50, 20, 20]
    assert data.classes == 10
    assert "70 images, 20 more for testing; 50 are used" in data.about


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


# --- CIFAR-10


def of_python_2(rows, labels):
    """A batch as Python 2 pickled it: strings of bytes, and NumPy's old module."""
    n, width = rows.shape
    data = rows.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        + f"(I1\n(I{n}\nI{width}\nt".encode()
        + b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
        + b"I00\nT"
        + struct.pack("<i", len(data))
        + data
        + b"tb"
    )
    numbers = b"".join(f"I{label}\n".encode() for label in labels)
    return (
        b"\x80\x02}(U\x04data"
        + array
        + b"U\x06labels]("
        + numbers
        + b"eU\x0bbatch_label"
        b"U\x05train" + b"u."
    )


def cifar_rows(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072)).astype(np.uint8)


def of_python_3(rows, labels):
    return pickle.dumps({b"data": rows, b"labels": labels}, protocol=2)


@pytest.mark.parametrize("write", [of_python_2, of_python_3])
@pytest.mark.parametrize("below", [True, False])
def test_cifar_batches(tmp_path, write, below):
    directory = tmp_path / _data.CIFAR_DIRECTORY if below else tmp_path
    directory.mkdir(exist_ok=True)
    for i, name in enumerate(_data.CIFAR_FILES):
        (directory / name).write_bytes(write(cifar_rows(4, seed=i), [i, 9, 0, 1]))
    data = _data.load_cifar10(tmp_path)
    assert data.train_images.shape == (20, 32, 32, 3)
    assert data.test_images.shape == (4, 32, 32, 3)
    assert data.train_labels.tolist() == [x for i in range(5) for x in (i, 9, 0, 1)]
    # The first 1024 bytes of a row are the red of the pixels, row by row.
    pixel = data.train_images[7, 3, 5] * 255
    expected = cifar_rows(4, seed=1)[3, [3 * 32 + 5 + k * 1024 for k in range(3)]]
    np.testing.assert_allclose(pixel, expected, rtol=1e-6)


class Evil:
    def __reduce__(self):
        return print, ("called",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Ran out of input"),
        (b"<html>", "not a batch of CIFAR-10"),
        (pickle.dumps({b"data": Evil(), b"labels": []}), r"asks for builtins\.print"),
        (pickle.dumps({b"labels": [1]}), "not a batch of CIFAR-10"),
        (pickle.dumps([1, 2]), "not a batch of CIFAR-10"),
        (of_python_2(cifar_rows(3), [1, 2, 3])[:-30], "not a batch of CIFAR-10"),
        (
            of_python_3(cifar_rows(3), [1, 2]),
            r"n labels below 10, found uint8 .*\(2,\)",
        ),
        (of_python_3(cifar_rows(3), [1, 2, 10]), "labels below 10"),
        (
            of_python_3(cifar_rows(3)[:, :9], [1, 2, 3]),
            r"found uint8 of shape \(3, 9\)",
        ),
    ],
)
def test_bad_cifar_batches(tmp_path, data, message, capsys):
    path = tmp_path / "data_batch_1"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        _data.read_cifar_batch(path)
    assert str(error.value).startswith(f"{path}: ")
    assert capsys.readouterr().out == ""  # nothing in the file was called


def test_cifar_in_one_file(tmp_path):
    images = cifar_rows(12).reshape(12, 32, 32, 3)
    np.savez(tmp_path / _data.CIFAR_NPZ, images=images, labels=labels_of(12))
    data = _data.load_cifar10(tmp_path)
    np.testing.assert_array_equal(data.test_labels, [5, 1])  # the sixth, the twelfth
    assert data.train_images.shape == (10, 32, 32, 3)
    np.testing.assert_allclose(data.train_images[0] * 255, images[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images_of(2)}, "no file of images and labels"),
        ({"images": images_of(2), "labels": labels_of(2)}, "expected bytes of shape"),
        ({"images": np.array([{}]), "labels": labels_of(1)}, "no file of images"),
    ],
)
def test_bad_cifar_file(tmp_path, arrays, message):
    np.savez(tmp_path / _data.CIFAR_NPZ, **arrays)
    with pytest.raises(ValueError, match=message):
        _data.load_cifar10(tmp_path)
    (tmp_path / _data.CIFAR_NPZ).write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(ValueError, match="no file of images and labels"):
        _data.load_cifar10(tmp_path)


def test_no_cifar(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks files: .* cifar10_12k.npz"):
        _data.load_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing is not a directory"):
        _data.load_cifar10(tmp_path / "nothing")


# --- text


def test_text_of_a_directory(tmp_path):
    (tmp_path / "b.txt").write_text("zweiter", encoding="utf-8")
    (tmp_path / "a.txt").write_text("erste Zeile äöü", encoding="utf-8")
    (tmp_path / "c.md").write_text("not this")
    text, about = _data.load_text(tmp_path)
    assert text == "erste Zeile äöü\nzweiter"
    assert about == f"a.txt, b.txt from {tmp_path}, 23 characters"
    assert _data.load_text(tmp_path / "b.txt")[0] == "zweiter"


def test_text_without_a_directory():
    text, about = _data.load_text()
    assert len(text) > 100_000
    assert "Python's own help()" in about


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*.txt"):
        _data.load_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing is neither file nor"):
        _data.load_text(tmp_path / "nothing")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt: not a text in UTF-8"):
        _data.load_text(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 characters: .* at least 650"):
        _data.load("text", str(tmp_path))


@given(st.text(alphabet="abcdä\n", min_size=60, max_size=300), st.integers(1, 5))
def test_windows(text, context):
    data = _data.windows(text, context)
    alphabet = data.alphabet
    assert data.classes == len(alphabet) == len(set(text))
    read = lambda ids: "".join(alphabet[i] for i in ids.reshape(-1))
    start = len(text) - len(text) // 10
    for (inputs, labels), part in [
        (data.train, text[:start]),
        (data.test, text[start:]),
    ]:
        assert inputs.shape == labels.shape and inputs.shape[1] == context
        n = inputs.size
        assert read(inputs) == part[:n] and read(labels) == part[1 : n + 1]
        assert len(part) - 1 - n < context  # nothing is left that would fill a row


def test_enough_text_is_enough():
    least = 10 * (7 + 1)
    assert _data.windows("ab" * (least // 2), 7).test[0].shape == (1, 7)
    with pytest.raises(ValueError, match=f"at least {least}"):
        _data.windows("ab" * (least // 2 - 1), 7)

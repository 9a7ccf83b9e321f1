"""Real data from files in their original formats, or shipped with a dependency.

Without a directory there are the 1,797 scanned digits (8 x 8) of scikit-learn, and the
texts on the language that Python ships with. With one: MNIST, or what has its format,
such as Fashion-MNIST, gzipped or not; CIFAR-10; any text. Nothing is downloaded.
"""

import gzip
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
CIFAR_NPZ = "cifar10_12k.npz"
CIFAR_DIRECTORY = "cifar-10-batches-py"
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
# What `explain` takes where there are no files: shape of an image, classes.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
}
NAMES = (*SHAPES, "text")
VARIABLE = "PRIORITYPROP_DATA"


class Images(NamedTuple):
    """Images: float32 in [0, 1], shape=(n, height, width, channels); labels: int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        return 1 + int(max(self.train_labels.max(), self.test_labels.max()))


class Dataset(NamedTuple):
    """Pairs of inputs and labels, for training and for testing.

    Attributes:
      train: images and labels; or of texts, characters as int32 in rows, and the
        characters that follow them.
      test: the same.
      classes: how many labels there are; of texts, how many different characters.
      about: a line on where it is from.
      alphabet: of texts, the characters.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    about: str
    alphabet: str = ""


def load(
    name: str, data_dir: str | None, context: int = 64, examples: int | None = None
) -> Dataset:
    """The data of a name in `NAMES`.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"cifar10"`` or ``"text"``.
      data_dir: where its files are; None: what is shipped, if it is.
      context: characters in a row of text.
      examples: of the training data, take only so many.

    Returns:
      A `Dataset`.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a file is not what it should be.
      ImportError: scikit-learn is not installed.
    """
    if name == "text":
        text, about = load_text(data_dir)
        found = windows(text, context, f"text: {about}")
    else:
        readers = {"mnist": load_mnist, "cifar10": load_cifar10}
        if name == "digits":
            images, source = load_digits(), "scikit-learn"
        else:
            assert data_dir is not None
            images, source = readers[name](data_dir), str(data_dir)
        sizes = f"{len(images[1]):,} images, {len(images[3]):,} more for testing"
        about = f"{name} from {source}: {sizes}"
        found = Dataset(images[:2], images[2:], images.classes, about)
    if examples is not None:
        n = min(examples, len(found.train[0]))
        train = found.train[0][:n], found.train[1][:n]
        found = found._replace(train=train, about=f"{found.about}; {n:,} are used")
    return found


# --- images


def load_digits() -> Images:
    """scikit-learn's digits, a fifth of them for testing."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits are scikit-learn's, which is not installed: "
            'pip install "priorityprop_jax[examples]"'
        ) from error
    digits: Any = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    n = len(labels) // 5
    return Images(images[n:], labels[n:], images[:n], labels[:n])


def load_mnist(directory: str | Path) -> Images:
    """The four IDX files of MNIST in a directory, or in its subdirectory ``mnist``."""
    directory = Path(directory)
    below = directory / "mnist"
    places = [directory, below] if below.is_dir() else [directory]
    found = {}
    for name in MNIST_FILES:
        files = [p / n for p in places for n in (f"{name}.gz", name)]
        found[name] = next((path for path in files if path.is_file()), None)
    missing = [name for name, path in found.items() if path is None]
    if missing:
        what = "lacks files" if directory.is_dir() else "is not a directory"
        raise FileNotFoundError(
            f"{directory} {what}: looked for {', '.join(missing)}, with .gz or without"
        )
    train_images, train_labels, test_images, test_labels = found.values()
    train = read_pair(train_images, train_labels)
    return Images(*train, *read_pair(test_images, test_labels))


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that belong together."""
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, array, ndim in [(images_path, images, 3), (labels_path, labels, 1)]:
        if array.ndim != ndim or array.dtype != np.uint8 or not array.size:
            raise ValueError(
                f"{path}: expected bytes in {ndim} dimension(s), none of them 0, "
                f"found {array.dtype} of shape {array.shape}"
            )
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, but "
            f"{labels_path} holds {len(labels)} labels"
        )
    pixels = images[..., None].astype(np.float32) / 255
    return pixels, labels.astype(np.int32)


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one IDX file: two zeros, a type, the rank, the shape, the values."""
    data = read_bytes(Path(path))
    if len(data) < 4:
        raise ValueError(f"{path}: truncated, {len(data)} bytes hold no IDX header")
    zeros, code, ndim = struct.unpack(">HBB", data[:4])
    if zeros or code not in IDX_DTYPES:
        raise ValueError(f"{path}: not an IDX file, it starts with 0x{data[:4].hex()}")
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"{path}: truncated in the header, which has {start} bytes")
    shape = struct.unpack(f">{ndim}I", data[4:start])
    dtype = np.dtype(IDX_DTYPES[code])
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ValueError(
            f"{path}: {what}, the shape {shape} in its header "
            f"takes {expected} bytes, the file has {len(data)}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def read_bytes(path: Path) -> bytes:
    """A file, unpacked if it is gzipped."""
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":  # the content decides: some mirrors unpack a .gz
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file ({error})") from error


def load_cifar10(directory: str | Path) -> Images:
    """CIFAR-10: the original batches for Python, or 12,000 of its images in one file.

    Of the one file, every sixth image is for testing.
    """
    directory = Path(directory)
    for place in (directory / CIFAR_DIRECTORY, directory):
        if (place / CIFAR_FILES[0]).is_file():
            *train, test = (read_cifar_batch(place / name) for name in CIFAR_FILES)
            images, labels = map(np.concatenate, zip(*train, strict=True))
            return Images(images, labels, *test)
    path = directory / CIFAR_NPZ
    if not path.is_file():
        what = "lacks files" if directory.is_dir() else "is not a directory"
        raise FileNotFoundError(
            f"{directory} {what}: looked for {CIFAR_DIRECTORY}/{CIFAR_FILES[0]} and "
            f"{CIFAR_NPZ}"
        )
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: no file of images and labels ({error})") from error
    images, labels = _check_cifar(path, images, labels, (32, 32, 3))
    test = np.arange(len(labels)) % 6 == 5
    return Images(images[~test], labels[~test], images[test], labels[test])


def read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One of the original files: a pickled dict of rows of bytes and labels."""
    data = path.read_bytes()
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        rows, labels = batch[b"data"], np.array(batch[b"labels"])
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}: not a batch of CIFAR-10 ({error})") from error
    images, labels = _check_cifar(path, rows, labels, (3072,))
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays and what Python is made of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if name == "_reconstruct" and module.endswith(".multiarray"):
            # As pickled by any version of NumPy; its own is where this one is from.
            return np.zeros(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _check_cifar(
    path: Path, images: Any, labels: Any, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    good = images.dtype == np.uint8 and images.shape[1:] == shape and len(images)
    whole = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not (good and whole and labels.min() >= 0 and labels.max() < 10):
        raise ValueError(
            f"{path}: expected bytes of shape (n, {', '.join(map(str, shape))}) and n "
            f"labels below 10, found {images.dtype} of shape {images.shape} and "
            f"{labels.dtype} of shape {labels.shape}"
        )
    return images.astype(np.float32) / 255, labels.astype(np.int32)


# --- text


def load_text(directory: str | Path | None = None) -> tuple[str, str]:
    """The text of all ``*.txt`` in a directory, in the order of their names.

    Args:
      directory: may be one such file. None: what ``help()`` of Python knows about the
        language, some 450,000 characters.

    Returns:
      The text, and a line on where it is from.

    Raises:
      OSError: there is no such file.
      ValueError: a file is no text in UTF-8.
    """
    if directory is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return text, f"what Python's own help() says, {len(text):,} characters"
    directory = Path(directory)
    files = [directory] if directory.is_file() else sorted(directory.glob("*.txt"))
    if not files:
        what = "has no *.txt" if directory.is_dir() else "is neither file nor directory"
        raise FileNotFoundError(f"{directory} {what}")
    parts = []
    for path in files:
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8 ({error})") from error
    text, names = "\n".join(parts), ", ".join(path.name for path in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return text, f"{names}{more} from {directory}, {len(text):,} characters"


def windows(text: str, context: int, about: str = "") -> Dataset:
    """Rows of characters, and for each the one that follows.

    Args:
      text: any. Its last tenth is for testing.
      context: characters in a row.
      about: see `Dataset`.

    Returns:
      A `Dataset`; character k is the k-th of all that occur, in order.

    Raises:
      ValueError: the text is too short.

    Examples:
      >>> from priorityprop_jax.cli._data import windows
      >>> data = windows("abracadabra" * 4, context=2)
      >>> data.classes, data.train[0][0].tolist(), data.train[1][0].tolist()
      (5, [0, 1], [1, 4])
    """
    alphabet = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(alphabet)}
    ids = np.array([number[c] for c in text], np.int32)
    parts = np.split(ids, [len(ids) - len(ids) // 10])
    rows = [(len(part) - 1) // context for part in parts]
    if min(rows) < 1:
        least = 10 * (context + 1)
        raise ValueError(
            f"the text has {len(text):,} characters: for rows of {context}, of which a "
            f"tenth is for testing, at least {least:,} are needed"
        )

    def pairs(part: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        cut: Sequence[np.ndarray] = part[: n * context], part[1 : n * context + 1]
        return cut[0].reshape(n, context), cut[1].reshape(n, context)

    train, test = map(pairs, parts, rows)
    return Dataset(train, test, len(alphabet), about, alphabet)

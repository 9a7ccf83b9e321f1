"""Real images for the examples: scikit-learn's digits, or MNIST in its IDX format.

Without a directory the examples run on the 1,797 scanned digits (8 x 8) that
scikit-learn ships with. `--data-dir`, or else the environment variable
`PRIORITYPROP_DATA`, names a directory with the four files of MNIST, or of a data set in
the same format such as Fashion-MNIST, gzipped or not.
"""

import argparse
import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class Images(NamedTuple):
    """Images are float32 in [0, 1] of shape (n, height, width, 1), labels int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        return 1 + int(max(self.train_labels.max(), self.test_labels.max()))


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-dir", help="MNIST in IDX format (default: digits)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a test")
    return parser


def load_images(data_dir: str | None = None) -> Images:
    """The images the user asked for; the digits only if none were asked for."""
    directory = data_dir or os.environ.get("PRIORITYPROP_DATA")
    if not directory:
        print("data: scikit-learn's digits (--data-dir reads MNIST in IDX format)")
        return load_digits()
    try:
        images = load_mnist(directory)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"data: {len(images.train_labels):,} training images from {directory}")
    return images


def load_digits() -> Images:
    """scikit-learn's digits, a fifth of them for testing."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    n = len(labels) // 5
    return Images(images[n:], labels[n:], images[:n], labels[:n])


def load_mnist(directory: str | Path) -> Images:
    """The four IDX files of MNIST in `directory`."""
    directory = Path(directory)
    found = {}
    for name in MNIST_FILES:
        candidates = [directory / f"{name}.gz", directory / name]
        found[name] = next((path for path in candidates if path.is_file()), None)
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
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":  # the content decides: some mirrors unpack a .gz
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file ({error})") from error


def batches(
    images: np.ndarray, labels: np.ndarray, size: int, steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`steps` batches, reshuffled after each pass over the data."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, int)
    for _ in range(steps):
        while len(order) < size:
            order = np.append(order, rng.permutation(len(labels)))
        chosen, order = order[:size], order[size:]
        yield images[chosen], labels[chosen]

"""What the examples share: their arguments, real images, and batches of them.

Without a directory the examples run on the 1,797 scanned digits (8 x 8) that
scikit-learn ships with. `--data-dir`, or else the environment variable
`PRIORITYPROP_DATA`, names a directory with the four files of MNIST, or of a data set in
the same format such as Fashion-MNIST, gzipped or not.
"""

import argparse
import os
from collections.abc import Iterator

import numpy as np

from priorityprop_jax.cli._data import (
    Dataset,
    Images,
    load_digits,
    load_mnist,
    load_text,
    VARIABLE,
    windows,
)


def argument_parser(
    description: str | None, data: str = "MNIST in IDX format (default: digits)"
) -> argparse.ArgumentParser:
    """The arguments that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-dir", help=data)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a test")
    return parser


def load_images(data_dir: str | None = None) -> Images:
    """The images the user asked for; the digits only if none were asked for."""
    directory = data_dir or os.environ.get(VARIABLE)
    if not directory:
        print("data: scikit-learn's digits (--data-dir reads MNIST in IDX format)")
        return load_digits()
    try:
        images = load_mnist(directory)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"data: {len(images.train_labels):,} training images from {directory}")
    return images


def load_characters(data_dir: str | None, context: int) -> Dataset:
    """Rows of characters of the text the user asked for, or what Python ships with."""
    try:
        text, about = load_text(data_dir or os.environ.get(VARIABLE))
        data = windows(text, context)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"data: {about} (--data-dir reads *.txt)")
    return data


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

"""What is in the folder of a checkpoint, and how it is read.

<directory>/<step>/meta/metadata   JSON: what the run says of itself, and of each
                                   leaf its path, dtype, shape and checksum
                   tree/           the arrays, by path, as orbax writes them
                   split/          those of which each of several processes has a part
"""

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._savings import Savings
from ..report import LeafReport, PriorityReport
from ._checkpoint_leaves import crc_of, Leaf
from ._history import History


FORMAT = 1
_LENGTH = 300  # of a reason in a warning


class Checkpoint(NamedTuple):
    """One that has been read."""

    step: int
    meta: Any
    leaves: dict[str, Leaf]  # by path
    arrays: dict[str, np.ndarray]  # by path; none if only meta were asked for


class _Damaged(Exception):
    """A checkpoint that is not as it was written."""


class _Foreign(ValueError):
    """A checkpoint that is whole, but none of ours."""


def newest(
    directory: Any, arrays: bool
) -> tuple[Checkpoint | None, list[tuple[int, str]]]:
    """The newest checkpoint that can be read, and newer ones that cannot, and why."""
    damaged: list[tuple[int, str]] = []
    for step in reversed(find_steps(directory)):
        try:
            return read(directory, step, arrays), damaged
        except (PermissionError, MemoryError, _Foreign):
            raise
        except Exception as error:  # whatever orbax and tensorstore come upon
            damaged.append((step, reason_of(error)))
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
        raise ValueError(f"no checkpoint in {directory} can be read: {reasons}")
    return None, []


def read(directory: Any, step: int, arrays: bool) -> Checkpoint:
    """Reads the checkpoint of a step, and its arrays too if asked to.

    Raises:
      Exception: of many kinds, if it is damaged.
      ValueError: it is of another program or of a later version.
    """
    path = directory / str(step)
    saved = json.loads((path / "meta" / "metadata").read_text())
    if "format" not in saved:
        raise _Foreign(f"{path} is no checkpoint of a PriorityPropTrainer")
    if saved["format"] != FORMAT:
        raise _Foreign(
            f"{path} is of format {saved['format']}, and this version of "
            f"priorityprop_jax reads {FORMAT}"
        )
    meta = saved["meta"]
    if crc_of_meta(dump(meta), saved["leaves"]) != saved["crc"]:
        raise _Damaged("its metadata have changed since they were written")
    leaves = {leaf.path: leaf for leaf in map(Leaf._make, saved["leaves"])}
    found = _read_whole(path / "tree", leaves) if arrays else {}
    return Checkpoint(step, meta, leaves, found)


def _read_whole(path: Any, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """The arrays that a single process can read, checked."""
    whole = {name: leaf for name, leaf in leaves.items() if not leaf.split}
    full = [name for name, leaf in whole.items() if 0 not in leaf.shape]
    how = import_orbax().RestoreArgs(restore_type=np.ndarray)
    found = read_arrays(path, dict.fromkeys(full, how)) if full else {}
    for name, leaf in whole.items():
        if name not in full:
            found[name] = np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
        x = found[name]
        if (x.dtype.name, list(x.shape), crc_of(x)) != (
            leaf.dtype,
            leaf.shape,
            leaf.crc,
        ):
            raise _Damaged(f"{name} has changed since it was written")
    return found


def read_arrays(path: Any, how: dict[str, Any]) -> dict[str, Any]:
    """All arrays of a folder of orbax, each as its `RestoreArgs` say."""
    ocp = import_orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))


def find_steps(directory: Any) -> list[int]:
    """Of the checkpoints in a directory, the oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(x.name) for x in directory.iterdir() if x.name.isdecimal())


def as_path(directory: Any) -> Any:
    """Absolute, as orbax wants it; of etils where it is no local one."""
    if "://" in str(directory):
        from etils import epath

        return epath.Path(directory)
    return pathlib.Path(directory).expanduser().absolute()


def remove(path: Any) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    elif path.exists():
        path.unlink()


def crc_of_meta(text: str, leaves: Sequence[Any]) -> int:
    """A checksum of all that is in the file of JSON."""
    return zlib.crc32(f"{text}{json.dumps(leaves)}".encode())


def dump(meta: Any) -> str:
    """As JSON; a TypeError if it cannot be."""
    try:
        return json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must be something for JSON: {error}") from None


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or "no details"
    text = text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."
    return text if isinstance(error, _Damaged) else f"{type(error).__name__}: {text}"


def import_orbax() -> Any:
    """The module; an ImportError that says what to install if there is none."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "checkpoints need orbax: pip install 'priorityprop_jax[trainer]'"
        ) from error
    return ocp


def load_meta(directory: Any) -> Any:
    """What a run saved next to its arrays, from its newest good checkpoint.

    Only reads: also while the run is going on.

    Args:
      directory: the `checkpoint_dir` of a run, or the folder of one of its steps.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: there are some, but none can be read.

    Examples:
      >>> import tempfile
      >>> from priorityprop_jax.training._checkpoint import Checkpoints
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with Checkpoints(directory) as saved:
      ...         _ = saved.save(7, {"w": 1.0}, {"epoch": 2})
      ...     load_meta(directory)
      {'epoch': 2}
    """
    path = as_path(directory)
    if path.name.isdecimal() and (path / "meta").is_dir():
        try:
            return read(path.parent, int(path.name), arrays=False).meta
        except _Foreign:
            raise
        except (_Damaged, OSError, LookupError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
    found, _ = newest(path, arrays=False)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    return found.meta


def load_report(directory: Any) -> tuple[History, PriorityReport | None]:
    """History and report of a `PriorityPropTrainer`, from its newest checkpoint.

    Args:
      directory: its `checkpoint_dir`, or the folder of one of its steps.

    Returns:
      The history, and what `get_priority_report` returned at the time; None in its
      place if there was nothing to report yet.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: none can be read, or they are not of a `PriorityPropTrainer`.

    Examples:
      >>> import tempfile
      >>> from priorityprop_jax.training import Checkpoints, History, load_report
      >>> meta = {"history": History(paths=["w"]).to_dict(), "report": None}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with Checkpoints(directory) as saved:
      ...         _ = saved.save(7, {"w": 1.0}, meta)
      ...     load_report(directory)
      (History(name='', epochs=0, columns=[]), None)
    """
    meta = load_meta(directory)
    if not isinstance(meta, dict) or "history" not in meta:
        raise ValueError(
            f"the checkpoints in {directory} have no history: they are not of a "
            f"PriorityPropTrainer"
        )
    history, report = History.from_dict(meta["history"]), meta.get("report")
    return history, None if report is None else _report(report)


def _report(saved: Mapping[str, Any]) -> PriorityReport:
    """The report that `to_dict` wrote."""
    leaves = tuple(
        LeafReport(**{**leaf, "shape": tuple(leaf["shape"])})
        for leaf in saved["leaves"]
    )
    savings = saved["savings"]
    if savings is not None:
        notes = tuple(savings["notes"])
        known = {k: x for k, x in savings.items() if k != "speedup"}
        savings = Savings(**{**known, "notes": notes})
    names = "step", "recalc_every", "budget", "unspent"
    return PriorityReport(leaves, *(saved[k] for k in names), savings=savings)

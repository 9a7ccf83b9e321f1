"""Checkpoints: written in the background, whole or not at all; read back bit for bit.

orbax writes into a directory of another name and renames it when all is there, so a
process that is killed leaves either a checkpoint or none. What happens to files later
(a disk that loses data, a copy that was broken off) is found by checksums.
"""

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._checks import check_count, check_finite
from ._checkpoint_files import (
    as_path,
    Checkpoint,
    crc_of_meta,
    dump,
    find_steps,
    FORMAT,
    import_orbax,
    newest,
    read_arrays,
    reason_of,
    remove,
)
from ._checkpoint_leaves import check_like, Leaf, named, pack, Packed, place


_POLL = 1.0  # seconds between two looks at whether a save has failed
_FIRST_LOOK = 16  # steps until the first look at the clock in several processes
_TEMPORARY = ".orbax-checkpoint-tmp"

_log = logging.getLogger("priorityprop_jax")


class Checkpoints:
    """The checkpoints of a run in a directory: the newest few.

    A checkpoint is a pytree of arrays and a dict for JSON, at a step. Saving takes
    copies on the host and returns; a thread writes them. What goes wrong with the disk
    is a warning, and no reason to stop training: the checkpoints before stay.

    In several processes all of them make the same calls at the same steps, and the
    directory is one that all can see.

    Args:
      directory: where they are, a folder for each step; made if it does not exist.
      every_steps: `maybe_save` saves at multiples of this number of steps.
      every_minutes: and when so many minutes have passed since the last save.
      keep: how many to keep.

    Raises:
      ImportError: orbax is not installed.
      ValueError, TypeError: an argument cannot be meant.
      OSError: the directory cannot be made.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.training import Checkpoints
      >>> params = {"w": jnp.arange(3.0)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with Checkpoints(directory, every_steps=10) as saved:
      ...         for step in range(1, 25):
      ...             _ = saved.maybe_save(step, params, {"epoch": 1})
      ...         saved.wait()
      ...         print(saved.steps())
      ...         tree, meta = saved.restore(params)
      [10, 20]
      >>> print(tree["w"], meta)
      [0. 1. 2.] {'epoch': 1}
    """

    def __init__(
        self,
        directory: Any,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 3,
    ):
        import_orbax()
        if every_steps is not None:
            check_count("every_steps", every_steps, least=1, static=True)
        if every_minutes is not None:
            check_finite("every_minutes", every_minutes)
            if every_minutes <= 0:
                raise ValueError(f"every_minutes must be positive, got {every_minutes}")
        check_count("keep", keep, least=1, static=True)
        self.directory = as_path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(
                f"the directory for checkpoints must be a folder, {self.directory} is "
                f"a file"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep, self._clock = int(keep), _Clock(every_steps, every_minutes)
        self._manager: Any = None
        self._pending: int | None = None  # the step that is being written
        self._polled = 0.0
        self._found: Checkpoint | None = None
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet_orbax())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Saving.

    def maybe_save(
        self, step: int, tree: Any, meta: Mapping[str, Any] | Callable[[], Any]
    ) -> bool:
        """Saves if one is due; to be called after each step. Arguments as in `save`.

        Returns:
          Whether a save has begun.
        """
        self._poll()
        return self._clock.due(step) and self.save(step, tree, meta)

    def save(
        self, step: int, tree: Any, meta: Mapping[str, Any] | Callable[[], Any]
    ) -> bool:
        """Begins to save, due or not; waits for the save before to end.

        Args:
          step: how many steps have been taken.
          tree: a pytree of arrays, keys of `jax.random` and numbers. They may be
            donated, or written to, as soon as this returns.
          meta: anything that JSON has a form for; or a function without arguments that
            returns it, which is called only if there is something to save.

        Returns:
          Whether a save has begun: not where there is a checkpoint of this step, and
          not if it failed at once.

        Raises:
          TypeError: something in `tree` is no array, or in `meta` not for JSON.
        """
        check_count("step", step, least=0)
        self.wait()
        with contextlib.suppress(OSError):  # that it cannot be read comes up below
            if step in self.steps():
                return False
        self._found = None
        text = dump(meta() if callable(meta) else meta)
        packed = pack(tree)
        try:
            self._write(int(step), packed, text)
        except Exception as error:
            self._failed(int(step), error)
            return False
        finally:
            self._clock.restart(step)
        self._pending = int(step)
        return True

    def wait(self) -> None:
        """Waits until what is being saved is on disk, or has failed with a warning."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(step, error)

    def close(self) -> None:
        """Waits, and ends the threads. May be called again."""
        try:
            self.wait()
        finally:
            self._shut()
            self._quiet.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the directory, the oldest first."""
        return find_steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(self.steps(), default=None)

    def check_continues(self, step: int) -> None:
        """Raises unless a run that has taken `step` steps may go on saving here.

        Raises:
          FileExistsError: there are checkpoints of later steps, so of another run.
        """
        latest = self.latest
        if latest is not None and latest > step:
            raise FileExistsError(
                f"{self.directory} holds checkpoints up to step {latest}, and this run "
                f"is at step {step}: go on from them with resume=True, or choose "
                f"another directory"
            )

    def _write(self, step: int, packed: Packed, text: str) -> None:
        args = import_orbax().args
        meta = {
            "format": FORMAT,
            "meta": json.loads(text),
            "leaves": packed.leaves,
            "crc": crc_of_meta(text, packed.leaves),
        }
        items: dict[str, Any] = {"meta": args.JsonSave(meta)}
        if packed.arrays:
            items["tree"] = args.PyTreeSave(packed.arrays)
        if packed.split:
            items["split"] = args.PyTreeSave(packed.split)
        self._open().save(step, args=args.Composite(**items), force=True)

    def _open(self) -> Any:
        if self._manager is None:
            ocp = import_orbax()
            # Folders are made at once: threads that write would wait for minutes, also
            # at the end of Python, for one that cannot be made.
            at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
            # Also deletes what was left behind by a process that was killed.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                async_options=at_once,
            )
            self._manager = _manager_class()(self.directory, options=options)
        return self._manager

    def _shut(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()

    def _poll(self) -> None:
        """Tells of a failed save soon, and not only at the next one."""
        now = time.monotonic()
        if self._pending is None or now < self._polled or jax.process_count() > 1:
            return
        self._polled = now + _POLL
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _failed(self, step: int, error: Exception) -> None:
        # A manager that has failed forgets what it was about to delete. And what was
        # written so far would fill a full disk for good.
        self._shut()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                for path in self.directory.iterdir():
                    if path.name.startswith(f"{step}{_TEMPORARY}"):
                        remove(path)
        kept = "those before cannot be looked for"
        with contextlib.suppress(OSError):
            last = self.latest
            kept = (
                f"the last is of step {last}" if self.steps() else "there is none yet"
            )
            if last == step:
                kept = "it is there, but older ones could not be deleted"
        warnings.warn(
            f"saving the checkpoint of step {step} in {self.directory} failed, and "
            f"training goes on; {kept}. The reason: {reason_of(error)}",
            stacklevel=4,
        )

    # Restoring.

    def restore_meta(self) -> Any:
        """The `meta` of the newest good checkpoint, or None if there is no checkpoint.

        The arrays are read and checked as well, and kept for `restore`, which is then
        about the same checkpoint. Damaged ones are passed over with a warning, and
        renamed to ``damaged-<step>``, unless all are.

        Raises:
          ValueError: there are checkpoints, but none can be read.
        """
        self.wait()
        if self._found is None:
            self._found, damaged = newest(self.directory, arrays=True)
            self._put_aside([step for step, _ in damaged])
            for step, reason in damaged:
                warnings.warn(
                    f"the checkpoint of step {step} in {self.directory} is damaged and "
                    f"passed over, now damaged-{step}. The reason: {reason}",
                    stacklevel=2,
                )
        return None if self._found is None else self._found.meta

    def restore(self, like: Any) -> tuple[Any, Any] | None:
        """The newest good checkpoint: its tree and its meta; None if there is none.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the structure, shapes
            and dtypes of what was saved. What is restored is placed on the devices as
            they are: by their shardings if they are committed or name one; else on the
            default device; NumPy arrays and numbers stay on the host.

        Raises:
          ValueError: the checkpoint is of something else than `like`, with the first
            path that differs; or there are some, but none can be read.
        """
        self.restore_meta()
        found, self._found = self._found, None
        if found is None:
            return None
        wanted, saved = named(like), found.leaves
        what = f"the checkpoint of step {found.step} in {self.directory}"
        check_like(saved, wanted, what)
        arrays = found.arrays | self._read_split(found.step, saved, wanted)
        values = [place(arrays[path], saved[path], x) for path, x in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values), found.meta

    def _read_split(
        self, step: int, saved: dict[str, Leaf], like: dict[str, Any]
    ) -> dict[str, Any]:
        """Arrays of which each process had a part, in parts as `like` has them."""
        names = [path for path, leaf in saved.items() if leaf.split]
        if not names:
            return {}
        ocp = import_orbax()

        def how(path):
            sharding = getattr(like[path], "sharding", None)
            if sharding is None or sharding.is_fully_addressable:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            shape = tuple(saved[path].shape)
            return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape)

        path = self.directory / str(step) / "split"
        return read_arrays(path, {name: how(name) for name in names})

    def _put_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        self._shut()  # it knows them
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"damaged-{step}"
                remove(aside)
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints put aside")


def _manager_class() -> Any:
    class Manager(import_orbax().CheckpointManager):
        def reached_preemption(self, step: int) -> bool:
            """Leaves that to `stop_on_sigterm`.

            JAX makes processes agree on a step by the last one that each has asked
            about. orbax asks in its threads, about steps long past.
            """
            return False

    return Manager


class _Clock:
    """When a save is due."""

    def __init__(self, steps: int | None, minutes: float | None):
        self._steps, self._seconds = steps, None if minutes is None else 60.0 * minutes
        self._start: tuple[int, float] | None = None
        self._look = 0

    def restart(self, step: int) -> None:
        self._start, self._look = (step, time.monotonic()), step + _FIRST_LOOK

    def due(self, step: int) -> bool:
        if self._start is None:
            self.restart(step)
        late = self._seconds is not None and self._is_late(step, self._seconds)
        return late or (self._steps is not None and step % self._steps == 0)

    def _is_late(self, step: int, seconds: float) -> bool:
        first, start = self._start or (step, time.monotonic())
        elapsed = time.monotonic() - start
        if jax.process_count() == 1:
            return elapsed >= seconds
        # Clocks differ, and all must save at the same step: that of process 0 counts.
        # As all wait for it, it is asked rarely, when half of the time may be over.
        if step < self._look:
            return False
        from jax.experimental import multihost_utils

        elapsed = float(multihost_utils.broadcast_one_to_all(np.float32(elapsed)))
        done = max(step - first, 1)
        left = (seconds - elapsed) * done / max(elapsed, 1e-6)
        self._look = step + int(min(max(left, 1), max(done, _FIRST_LOOK)))
        return elapsed >= seconds


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """What orbax logs goes to our own log; failures are told of as warnings.

    Unless somebody turned up absl's verbosity, and wants to see it.
    """
    from absl import logging as absl_logging

    def keep(record: logging.LogRecord) -> bool:
        wanted = absl_logging.get_verbosity() > absl_logging.WARNING
        if wanted or "orbax" not in record.pathname:
            return True
        _log.debug("orbax: %s", record.getMessage())
        return False

    logger = absl_logging.get_absl_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

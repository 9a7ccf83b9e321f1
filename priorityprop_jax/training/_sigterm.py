"""The signal by which a machine asks its processes to end."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


class Stop:
    """Whether training is asked to stop; what `stop_on_sigterm` gives."""

    def __init__(self):
        self._set = False

    def set(self, *_: Any) -> None:
        """Asks."""
        self._set = True

    def is_set(self, step: int | None = None) -> bool:
        """Whether it is asked.

        Args:
          step: steps done. With it several processes agree on the step after which
            to stop; each has to ask after each step.
        """
        if not self._set and step is not None and jax.process_count() > 1:
            self._set = _agreed(step)
        return self._set


def _agreed(step: int) -> bool:
    from jax.experimental import multihost_utils

    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # the service was turned off
        return False


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """SIGTERM asks to stop, instead of ending the process, as long as this is open.

    Python delivers signals to the main thread alone: in others nothing is changed. In
    several processes JAX itself waits for the signal, unless its
    ``jax_enable_preemption_service`` is turned off.

    Examples:
      >>> import os, signal
      >>> with stop_on_sigterm() as stop:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     stop.is_set()
      True
    """
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.set)
    try:
        yield stop
    finally:
        # None: of somebody else than Python, who cannot be given it back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

"""A progress bar for terminals."""

import sys
import time
import warnings
from typing import Any

import jax


_SECONDS = 0.2  # between two looks of the bar; what is in between costs next to nothing
_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
_UNBOUND = "{desc} {n_fmt} steps, {elapsed}{postfix}"  # where the total is not known


class Progress:
    """A tqdm bar on stderr: epoch, step, loss, budget, FLOPs saved, time left.

    Quiet where stderr is no terminal, and in all processes but the first.

    Args:
      enabled: False for none at all.
      total: the number of steps, if known.
      epochs: the number of epochs, if known.
      initial: steps done before, in a resumed run.

    Examples:
      >>> bar = Progress(enabled=False, total=10)
      >>> bar.update(epoch=1, step=1, loss=0.5)
      >>> bar.close()
    """

    def __init__(
        self,
        enabled: bool = True,
        total: int | None = None,
        epochs: int | None = None,
        initial: int = 0,
    ):
        self._bar, self._epochs, self._next = None, epochs, 0.0
        if not enabled or not _is_terminal() or jax.process_index():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            warnings.warn(
                "there is no progress bar without tqdm: pip install "
                "'priorityprop_jax[trainer]', or turn it off by progress=False",
                stacklevel=2,
            )
            return
        self._bar = tqdm(
            total=total,
            initial=initial,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format=_UNBOUND if total is None else _FORMAT,
            mininterval=_SECONDS,
            leave=True,
        )
        self._done = initial

    @property
    def is_on(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def update(
        self,
        epoch: int,
        step: int,
        loss: float | None = None,
        budget_share: float | None = None,
        flops_saved: float | None = None,
    ) -> None:
        """Shows where training is; may be called at each step.

        Args:
          epoch: from 1.
          step: steps done, of the whole run.
          loss: as far as it is known; None leaves it out.
          budget_share: share of the updates of full training that were made, in [0, 1].
          flops_saved: share of the FLOPs of full training that were not spent.
        """
        if self._bar is None or (now := time.monotonic()) < self._next:
            return
        self._next = now + _SECONDS
        self._show(epoch, step, loss, budget_share, flops_saved)

    def _show(self, epoch, step, loss, budget_share, flops_saved) -> None:
        bar: Any = self._bar
        of = "" if self._epochs is None else f"/{self._epochs}"
        bar.set_description_str(f"epoch {epoch}{of}", refresh=False)
        parts = [f"loss {loss:.4g}"] if loss is not None else []
        parts += [f"budget {budget_share:.0%}"] if budget_share is not None else []
        parts += [f"FLOPs saved {flops_saved:.0%}"] if flops_saved is not None else []
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(step - self._done)
        bar.refresh()
        self._done = step

    def finish(self, epoch: int, step: int, *shown: float | None) -> None:
        """Like `update`, but shown in any case: at the end of an epoch."""
        if self._bar is not None:
            self._show(epoch, step, *(shown + (None,) * (3 - len(shown))))

    def write(self, line: str) -> None:
        """Prints a line above the bar; nothing where there is none."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is. May be called again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_terminal() -> bool:
    isatty = getattr(sys.stderr, "isatty", None)
    try:
        return isatty is not None and isatty()
    except ValueError:  # closed
        return False

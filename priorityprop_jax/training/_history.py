"""What happened in training, epoch by epoch."""

from collections.abc import Mapping, Sequence
from typing import Any


_ROWS = 512  # of the record of cycles
_FIELDS = ("step", "counts", "quotas", "scores")


class History(dict[str, list]):
    """A dict of lists with one entry for each epoch.

    ``"epoch"``; means over the epoch: ``"loss"`` and metrics, with ``"eval_"`` in front
    if of the evaluation (None where there was none); running totals at its end:
    ``"step"``, ``"seconds"``, ``"compile_seconds"`` (sum over threads),
    ``"flops_spent"``, ``"flops_full"`` (of training all leaves), ``"updates"`` (a list,
    by leaf), ``"skipped"`` (steps whose loss was not finite).

    Attributes:
      paths: of the leaves, such as ``"Dense_0/kernel"``.
      cycles: dict of lists ``"step"``, ``"counts"``, ``"quotas"``, ``"scores"``, with
        an entry for each cycle, at its end: a list by leaf, in the order of `paths`;
        ``counts`` are running totals. Where they get more than 512, every other
        one is dropped, and half as many kept from then on.
      name: of the run, for pictures of several.
      stopped: why before the last epoch: None, ``"target"``, ``"SIGTERM"`` or
        ``"callback"``.

    Examples:
      >>> from priorityprop_jax.training import History
      >>> history = History(paths=["w"], name="half")
      >>> history.append({"epoch": 0, "loss": 0.5})
      >>> history.append({"epoch": 1, "loss": 0.25, "eval_loss": 0.3})
      >>> history["loss"], history["eval_loss"]
      ([0.5, 0.25], [None, 0.3])
      >>> History.from_dict(history.to_dict()) == history
      True
    """

    def __init__(self, paths: Sequence[str] = (), name: str = ""):
        super().__init__()
        self.paths, self.name = list(paths), name
        self.stopped: str | None = None
        self.cycles: dict[str, list] = {field: [] for field in _FIELDS}
        self._stride = 1

    def __repr__(self) -> str:
        columns = ", ".join(self)
        return (
            f"History(name={self.name!r}, epochs={self._epochs}, columns=[{columns}])"
        )

    @property
    def _epochs(self) -> int:
        return max(map(len, self.values()), default=0)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds an epoch. Columns that it lacks get None; so do earlier epochs in new
        columns."""
        length = self._epochs
        for name in entry:
            self.setdefault(name, [None] * length)
        for name, column in self.items():
            column.append(entry.get(name))

    def wants_cycle(self, cycle: int) -> bool:
        """Whether the cycle of this number is one to be kept."""
        return cycle % self._stride == 0

    def append_cycle(
        self,
        step: int,
        counts: Sequence[float],
        quotas: Sequence[float],
        scores: Sequence[float],
    ) -> None:
        """Adds a cycle that `wants_cycle`.

        Args:
          step: steps so far.
          counts: updates so far, by leaf.
          quotas: of the cycle, by leaf.
          scores: of the cycle, by leaf.
        """
        values = step, list(counts), list(quotas), list(scores)
        for field, value in zip(_FIELDS, values, strict=True):
            self.cycles[field].append(value)
        if len(self.cycles["step"]) > _ROWS:
            self._stride *= 2
            # The kept are numbers 0, 1, 2.. times the stride: so stay the even ones.
            self.cycles = {field: rows[::2] for field, rows in self.cycles.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python, ready for `json.dumps`."""
        return {
            "epochs": {name: list(column) for name, column in self.items()},
            "cycles": {field: list(rows) for field, rows in self.cycles.items()},
            "paths": list(self.paths),
            "name": self.name,
            "stopped": self.stopped,
            "stride": self._stride,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "History":
        """The history that `to_dict` wrote.

        Args:
          saved: what it returned, also after a round through JSON.

        Raises:
          ValueError: it is something else.
        """
        missing = {"epochs", "cycles", "paths"} - set(saved)
        if missing:
            raise ValueError(
                f"not a saved History: it lacks {', '.join(map(repr, sorted(missing)))}"
            )
        history = cls(saved["paths"], saved.get("name", ""))
        history.update({name: list(x) for name, x in saved["epochs"].items()})
        history.cycles = {field: list(saved["cycles"][field]) for field in _FIELDS}
        history.stopped = saved.get("stopped")
        history._stride = int(saved.get("stride", 1))
        return history

    def to_pandas(self) -> Any:
        """The epochs as a `pandas.DataFrame`, with a column for each list.

        Of ``"updates"`` there is one for each leaf: ``"updates/<path>"``.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "History.to_pandas needs pandas: pip install pandas"
            ) from error
        table = {name: column for name, column in self.items() if name != "updates"}
        for i, path in enumerate(self.paths if "updates" in self else ()):
            table[f"updates/{path}"] = [row[i] for row in self["updates"]]
        return pd.DataFrame(table)

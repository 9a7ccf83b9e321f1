"""What of a trainer is saved: arrays as a tree, all else as plain Python.

Restored, it goes on with the bits that it would have had: the same data from the same
place, the same keys, and the same programs.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from .._costs import BackwardCosts
from ._history import History
from ._metrics import Account, Means


def tree_of(trainer: Any) -> dict[str, Any]:
    """The arrays."""
    names = "params", "state", "opt_state"
    return {name: getattr(trainer, name) for name in names}


def meta_of(trainer: Any) -> dict[str, Any]:
    """All else, ready for JSON. The trainer must have settled."""
    t = trainer
    return {
        "version": version("priorityprop_jax"),
        "step": t.step,
        "epoch": t.epoch,
        "place": t.place,
        "seed": t.seed,
        "paths": t.paths,
        "history": t.history.to_dict(),
        "means": t.means.sums,
        "totals": t.totals,
        "account": t.account.to_dict(),
        "train_step": t.train_step.state_dict(),
        "depths": None if t.depths is None else jax.tree.leaves(t.depths),
        "costs": _dump(t.costs),
        "schedule_costs": t.schedule_costs and _dump(t.schedule_costs),
        "report": t.get_priority_report().to_dict(),
    }


def check(trainer: Any, meta: Mapping[str, Any]) -> None:
    """Raises where a checkpoint is another run's.

    Raises:
      ValueError: it has other params, or another seed.
    """
    pairs = zip(meta["paths"], trainer.paths, strict=False)
    for theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"the checkpoint is of another model: it has params {theirs!r} where "
                f"this one has {ours!r}"
            )
    if len(meta["paths"]) != len(trainer.paths):
        raise ValueError(
            f"the checkpoint is of another model: it has {len(meta['paths'])} params, "
            f"this one has {len(trainer.paths)}"
        )
    if meta["seed"] != trainer.seed:
        raise ValueError(
            f"the checkpoint was made with seed={meta['seed']}, this trainer has "
            f"seed={trainer.seed}: the keys would be others"
        )


def restore(trainer: Any, saved: Any) -> bool:
    """Brings a trainer to where the newest checkpoint is.

    Args:
      trainer: to be changed; of the same model and arguments.
      saved: the `Checkpoints`.

    Returns:
      Whether there was one.

    Raises:
      ValueError: it is of another model, or of a trainer with another seed.
    """
    meta, t = saved.restore_meta(), trainer
    if meta is None:
        return False
    check(t, meta)
    depths = meta["depths"]
    if depths is not None:
        depths = jax.tree.unflatten(jax.tree.structure(t.params), depths)
    t.build_schedule(depths, _load(meta["costs"]), _load(meta["schedule_costs"]))
    tree, _ = saved.restore(tree_of(t))
    for name, value in tree.items():
        setattr(t, name, value)
    t.step, t.epoch, t.place = meta["step"], meta["epoch"], dict(meta["place"])
    t.totals, t.means = dict(meta["totals"]), Means(meta["means"])
    t.history = History.from_dict(meta["history"])
    t.account = Account(t.costs, meta["account"])
    t.resume_step(meta["train_step"])
    return True


def _dump(costs: BackwardCosts) -> dict[str, Any]:
    plain = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
    return {name: plain(x) for name, x in costs._asdict().items()}


def _load(saved: Mapping[str, Any] | None) -> BackwardCosts | None:
    if saved is None:
        return None
    n = len(saved["paths"])
    arrays: dict[str, Any] = {k: np.array(saved[k], float) for k in _ARRAYS}
    arrays["members"] = np.array(saved["members"], bool).reshape(-1, n)
    arrays["paths"] = tuple(saved["paths"])
    return BackwardCosts(**{**saved, **arrays})


_ARRAYS = ("weight", "groups", "traffic")

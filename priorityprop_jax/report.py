"""Who got what: the table of priorities, quotas and updates. Numbers only."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ._costs import BackwardCosts
from ._prioritize import PrioritizeState
from ._priority import by_leaf, find_state
from ._savings import leaf_maxima, Savings, savings_of
from ._units import layout, natural_key


_WHOLE = 40  # leaves up to this number are all printed
_TOP, _BOTTOM, _GROUPS, _WIDTH = 10, 5, 20, 48


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf of the params."""

    path: str  # names joined by "/"
    shape: tuple[int, ...]
    units: int
    depth: int  # 0 at the loss (or at the input, as depth_from says)
    score: float  # mean over the units, as of the last recalculation
    count: int  # updates so far, over all units
    quota: int  # updates in this cycle, over all units
    share: float  # of all updates so far
    nonfinite: int  # units found non-finite at the start of a cycle, so far


@dataclasses.dataclass(frozen=True)
class PriorityReport:
    """What `priority_report` found. Prints as a table, leaves by falling priority.

    Attributes:
      leaves: one `LeafReport` per leaf, the highest score first.
      step: calls of `update` so far.
      recalc_every: steps in a cycle.
      budget: updates handed out in this cycle, or to be handed out if it could.
      unspent: the part of `budget` that the bounds left unspent.
      savings: what training cost next to full training; None without `costs`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import priority_prop, priority_report
      >>> params = {"w": jnp.ones(3)}
      >>> report = priority_report(priority_prop(budget=5).init(params), params)
      >>> report.to_dict()["leaves"][0]["path"], report.updates
      ('w', 0)
    """

    leaves: tuple[LeafReport, ...]
    step: int
    recalc_every: int
    budget: int
    unspent: int
    savings: Savings | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(leaf.units for leaf in self.leaves)

    @property
    def updates(self) -> int:
        """Updates of units so far."""
        return sum(leaf.count for leaf in self.leaves)

    @property
    def nonfinite(self) -> int:
        """How often a unit's gradient was not finite at the start of a cycle."""
        return sum(leaf.nonfinite for leaf in self.leaves)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python, ready for `json.dumps`."""
        out = dataclasses.asdict(self)
        out["leaves"] = [
            {**leaf, "shape": list(leaf["shape"])} for leaf in out["leaves"]
        ]
        if self.savings is not None:
            notes, speedup = list(self.savings.notes), self.savings.speedup
            out["savings"] = {**out["savings"], "notes": notes, "speedup": speedup}
        totals = {name: getattr(self, name) for name in ("units", "updates")}
        return {**out, **totals, "nonfinite": self.nonfinite}

    def to_markdown(self) -> str:
        """All leaves as a Markdown table, and the totals in a line below."""
        rows = [[_escape(x.path), *_cells(x)[1:]] for x in self.leaves]
        rule = ["---", "---"] + ["---:"] * (len(_HEAD) - 2)
        lines = ["| " + " | ".join(cells) + " |" for cells in [_HEAD, rule, *rows]]
        return "\n".join([*lines, "", self._totals()])

    def to_pandas(self) -> Any:
        """All leaves as a `pandas.DataFrame`, a column per field.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "PriorityReport.to_pandas needs pandas: pip install pandas"
            ) from error
        fields = [field.name for field in dataclasses.fields(LeafReport)]
        rows = [[getattr(leaf, name) for name in fields] for leaf in self.leaves]
        return pd.DataFrame(rows, columns=fields)

    def html(
        self,
        path: str | os.PathLike[str],
        history: Mapping[str, Any] | None = None,
        runs: Mapping[str, Any] | None = None,
        gradient_norms: Any = None,
    ) -> None:
        """Write one page with a summary, the pictures of `plots`, and all leaves.

        The page needs nothing but itself: it opens from disk, in dark and in light,
        and prints. Equal reports give equal pages.

        Args:
          path: of the file to be written; one that exists is replaced.
          history: of the run, as in `plots.updates_over_time`. With it, the page has
            the updates over time.
          runs: histories by name, to be drawn side by side as in
            `plots.accuracy_against_flops`, with `history` if they lack it.
          gradient_norms: norm of each leaf's gradient, as in
            `plots.counts_against_scores`. Without them, scores are drawn.

        Raises:
          ImportError: matplotlib is not installed.
          KeyError, ValueError, TypeError: a history or `gradient_norms` is not as the
            functions of `plots` want it. Then nothing is written.

        Examples:
          >>> import tempfile, pathlib, jax.numpy as jnp
          >>> from priorityprop_jax import priority_prop, priority_report
          >>> params = {"Dense_0": {"w": jnp.ones(3)}, "Dense_1": {"w": jnp.ones(2)}}
          >>> report = priority_report(priority_prop(budget=5).init(params), params)
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     page = pathlib.Path(directory) / "report.html"
          ...     report.html(page)
          ...     page.read_text().startswith("<!DOCTYPE html>")
          True
        """
        from ._html import page  # draws: a report alone needs no matplotlib

        text = page(self, history, runs, gradient_norms)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    def __str__(self) -> str:
        if len(self.leaves) <= _WHOLE:
            body = table([_HEAD, *map(_cells, self.leaves)], left=2)
        else:
            body = self._abridged()
        return f"{body}\n{self._totals()}"

    def _abridged(self) -> str:
        groups = _groups(self.leaves)
        hidden = len(groups) - _GROUPS
        parts = [
            f"groups of leaves, by share of updates ({len(groups)}):",
            table([_GROUP_HEAD, *groups[:_GROUPS]]),
            *([f"... and {hidden} more groups"] if hidden > 0 else []),
            "",
            f"leaves with the highest and the lowest scores, of {len(self.leaves)}:",
            table(
                [
                    _HEAD,
                    *map(_cells, self.leaves[:_TOP]),
                    ["..."] * len(_HEAD),
                    *map(_cells, self.leaves[-_BOTTOM:]),
                ],
                left=2,
            ),
        ]
        return "\n".join(parts)

    def _totals(self) -> str:
        full = self.units * self.step
        share = f" ({self.updates / full:.1%} of updating all of them)" if full else ""
        lines = [
            f"{self.updates:,} updates of {self.units:,} units in {self.step:,} "
            f"steps{share}",
            f"this cycle of {self.recalc_every} steps: budget {self.budget:,}, "
            f"{self.unspent:,} unspent; non-finite gradients seen: {self.nonfinite:,}",
        ]
        if self.savings is not None:
            lines.append(str(self.savings))
        return "\n".join(lines)


def priority_report(
    opt_state: optax.OptState,
    params: optax.Params,
    index: int | None = None,
    *,
    costs: BackwardCosts | None = None,
    account: Mapping[Any, int] | None = None,
    cached: float = 0.0,
) -> PriorityReport:
    """Look up who got which share of the budget. Fetches the state to the host.

    Args:
      opt_state: the state of any chain or wrapper with one `priority_prop` or
        `prioritize` in it.
      params: the pytree that `init` was given; paths and shapes are used.
      index: which `PriorityPropState`, where there are several.
      costs: of the params, from `backward_costs`. Then the report has `savings`: the
        cost of training all leaves at every step, next to that of computing what was
        due. It is what was really saved if gradients came from a training step or a
        `value_and_grad` that leaves out the rest.
      account: in how many steps which mask was active: ``{mask: steps}``, with masks
        from `static_mask` or tuples with a bool for each leaf, such as the attributes
        ``account`` (what was due) and ``computed`` of a training step. Without it, the
        state knows this cycle, and of the past how often each unit was updated: the
        totals then are an estimate, that the sets of active leaves were nested
        throughout.
      cached: cost of the forward passes that cached activations made superfluous so
        far, in the unit of `costs`.

    Returns:
      A `PriorityReport`: prints as a table, and has `to_dict`, `to_markdown` and
      `to_pandas`.

    Raises:
      ValueError: `opt_state` holds no `PriorityPropState`, or several and no `index`
        was given, or one for another number of leaves; `costs` or `account` are for
        other params, or `cached` is more than all forward passes.
      TypeError: the keys of `account` are no masks, or its values no integers.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import priority_prop, priority_report
      >>> params = {"Dense_0": {"w": jnp.ones((4, 2))}, "Dense_1": {"w": jnp.ones(2)}}
      >>> tx = priority_prop(budget=10)
      >>> _, state = tx.update(params, tx.init(params))
      >>> print(priority_report(state, params))
      leaf       shape  depth  score  count  quota  share
      Dense_0/w  4x2        1   5.66      1      8  50.0%
      Dense_1/w  2          0   1.41      1      2  50.0%
      2 updates of 2 units in 1 steps (100.0% of updating all of them)
      this cycle of 10 steps: budget 10, 0 unspent; non-finite gradients seen: 0

      What this would save in a step that computes only what is due:

      >>> from priorityprop_jax import backward_costs
      >>> loss = lambda p, x: jnp.sum(x @ p["Dense_0"]["w"] @ p["Dense_1"]["w"])
      >>> costs = backward_costs(loss, params, jnp.ones((8, 4)))
      >>> savings = priority_report(state, params, costs=costs).savings
      >>> print(f"this cycle costs {savings.cycle:.0%} of full training")
      this cycle costs 84% of full training
    """
    state = jax.device_get(find_state(opt_state, params, index))
    where = layout(params, "leaf")
    counts = [int(x.sum(dtype=np.int64)) for x in by_leaf(state, state.counts)]
    quotas = [int(x.sum(dtype=np.int64)) for x in by_leaf(state, state.quotas)]
    # In float64: the sum of a leaf's scores may overflow where no score does.
    sums = [(x.sum(dtype=np.float64), x.size) for x in by_leaf(state, state.scores)]
    scores = [float(total / max(size, 1)) for total, size in sums]
    leaves = [
        LeafReport(
            path=name,
            shape=where.shapes[i],
            units=int(state.sizes[i]),
            depth=int(state.depths[i]),
            score=scores[i],
            count=counts[i],
            quota=quotas[i],
            share=counts[i] / max(sum(counts), 1),
            nonfinite=int(state.nonfinite[i]),
        )
        for i, name in enumerate(where.names)
    ]
    savings = None
    if costs is not None:
        savings = savings_of(
            costs,
            leaf_maxima(by_leaf(state, state.counts)),
            leaf_maxima(by_leaf(state, state.quotas)),
            np.ravel(state.rank),
            int(state.step),
            optimizer_rests=_rests(opt_state),
            account=account,
            cached=cached,
        )
    elif account is not None or cached:
        raise ValueError("account and cached need costs=backward_costs(...)")
    order = sorted(range(len(leaves)), key=lambda i: (-scores[i], i))
    return PriorityReport(
        leaves=tuple(leaves[i] for i in order),
        step=int(state.step),
        recalc_every=state.rank.size,
        budget=int(state.budget),
        unspent=max(int(state.budget) - sum(quotas), 0),
        savings=savings,
    )


def _rests(opt_state: optax.OptState) -> bool:
    """Whether resting leaves cost the optimizer nothing."""
    is_ours = lambda x: isinstance(x, PrioritizeState)
    return any(map(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)))


_HEAD = ["leaf", "shape", "depth", "score", "count", "quota", "share"]
_GROUP_HEAD = ["group", "leaves", "score", "count", "quota", "share"]


def _cells(leaf: LeafReport) -> list[str]:
    return [
        _shorten(leaf.path),
        "x".join(map(str, leaf.shape)) or "scalar",
        str(leaf.depth),
        f"{leaf.score:.3g}",
        f"{leaf.count:,}",
        f"{leaf.quota:,}",
        f"{leaf.share:.1%}",
    ]


def _shorten(path: str) -> str:
    if len(path) <= _WIDTH:
        return path
    keep = _WIDTH - 3
    return path[: keep // 3] + "..." + path[-(keep - keep // 3) :]


def _escape(path: str) -> str:
    """A path that stays within one cell of a Markdown table."""
    return " ".join(path.replace("|", "\\|").splitlines())


def _groups(leaves: Sequence[LeafReport]) -> list[list[str]]:
    """Leaves whose paths differ in numbers alone, together."""
    members: dict[str, list[LeafReport]] = {}
    for leaf in leaves:
        members.setdefault(re.sub(r"\d+", "*", leaf.path), []).append(leaf)
    share = {name: sum(x.share for x in group) for name, group in members.items()}
    order = sorted(members, key=lambda n: (-share[n], natural_key((n,))))
    return [
        [
            _shorten(name),
            str(len(members[name])),
            f"{np.mean([x.score for x in members[name]]):.3g}",
            f"{sum(x.count for x in members[name]):,}",
            f"{sum(x.quota for x in members[name]):,}",
            f"{share[name]:.1%}",
        ]
        for name in order
    ]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first row a head.

    Args:
      rows: of cells.
      left: how many columns are aligned to the left; the others are numbers.

    Returns:
      Lines without a last newline.

    Examples:
      >>> from priorityprop_jax.report import table
      >>> print(table([["run", "loss"], ["priority", "0.1"]]))
      run       loss
      priority   0.1
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

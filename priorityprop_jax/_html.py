"""One self-contained page about a report: sentences, pictures, the table of leaves."""

import base64
import html
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from . import plots
from ._savings import Savings


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import LeafReport, PriorityReport


_OPEN = 40  # leaves up to this number are shown at once, the rest on demand

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5f6368; --paper: #ffffff;
  --line: #d5d8dc; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a3a8ae; --paper: #16181b; --line: #3a3f45;
    --band: #1f2226; }
}
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
p, ul { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 4px; padding: 6px;
  box-sizing: border-box; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.4rem;
  max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.text, th.text { text-align: left; }
td.text { white-space: normal; }
td.path { font-family: ui-monospace, monospace; overflow-wrap: anywhere;
  min-width: 12rem; }
tbody tr:nth-child(even) { background: var(--band); }
summary { cursor: pointer; margin: 0.7rem 0; }
@media print {
  :root { --ink: #000000; --soft: #333333; --paper: #ffffff; --line: #bbbbbb;
    --band: #ffffff; }
  body { padding: 0; max-width: none; font-size: 11pt; }
  figure, tr { break-inside: avoid; }
  figure img { border: 0; padding: 0; max-height: 22cm; width: auto; }
  h2 { break-after: avoid; }
  .wide { overflow-x: visible; }
  table { font-size: 8.5pt; }
}
"""
# No scripts, no network, whatever a path or a name may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    report: "PriorityReport",
    history: Mapping[str, Any] | None = None,
    runs: Mapping[str, Any] | None = None,
    gradient_norms: Any = None,
) -> str:
    """The page, see `PriorityReport.html`."""
    runs = _all_runs(history, runs)
    parts = [
        "<h1>Who got the updates</h1>",
        *(f"<p>{_text(sentence)}</p>" for sentence in _summary(report)),
        *([_savings(report.savings)] if report.savings is not None else []),
        *([_runs(runs)] if runs else []),
        "<h2>Pictures</h2>",
        *_pictures(report, history, runs, gradient_norms),
        "<h2>Leaves</h2>",
        "<p>By falling score: the mean over the units of a leaf, as of the last "
        "recalculation. The quota is for this cycle; the share is of all updates so "
        "far.</p>",
        _leaves(report.leaves),
    ]
    head = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>PriorityProp: who got the updates</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
    ]
    return "\n".join([*head, *parts, "</body>", "</html>", ""])


def _all_runs(
    history: Mapping[str, Any] | None, runs: Mapping[str, Any] | None
) -> dict[str, Any]:
    found = dict(runs or {})
    if history is not None and not any(run is history for run in found.values()):
        name = str(getattr(history, "name", "") or "this run")
        while name in found:
            name += "'"
        found = {name: history, **found}
    return found


def _summary(report: "PriorityReport") -> list[str]:
    """What matters, in sentences."""
    leaves, steps = len(report.leaves), report.step
    units = "" if report.units == leaves else f" with {_count(report.units, 'unit')}"
    first = f"The model has {_count(leaves, 'leaf', 'leaves')}{units}. "
    if not steps:
        return [first + "No step of training is done yet."]
    share = report.updates / max(report.units * steps, 1)
    first += (
        f"In {_count(steps, 'step')} there were {_count(report.updates, 'update')}, "
        f"{share:.1%} of updating all of them at every step."
    )
    ranked = sorted(report.leaves, key=lambda leaf: -leaf.count)
    sentences = [first]
    if leaves > 1 and report.updates:
        top = ranked[0]
        few = _count(sum(leaf.count == 0 for leaf in ranked), "leaf", "leaves")
        none = f" {few} had no update at all." if not ranked[-1].count else ""
        sentences.append(
            f"The largest share went to {top.path} ({top.share:.1%}), the smallest to "
            f"{ranked[-1].path} ({ranked[-1].share:.1%}).{none}"
        )
    handed = report.budget - report.unspent
    left = f", and the bounds left {report.unspent:,} unspent" if report.unspent else ""
    sentences.append(
        f"This cycle of {_count(report.recalc_every, 'step')} has a budget of "
        f"{_count(report.budget, 'update')}; {handed:,} are handed out{left}."
    )
    bad = report.nonfinite
    sentences.append(
        f"{_count(bad, 'gradient')} of a unit {'was' if bad == 1 else 'were'} not "
        "finite at the start of a cycle."
        if bad
        else "All gradients were finite at the start of each cycle."
    )
    return sentences


def _savings(savings: Savings) -> str:
    """The account: sentences, a table of what was saved, and the notes."""
    unit, steps = savings.unit, _count(savings.steps, "step")
    share = savings.spent / savings.full if savings.full else 1.0
    rest = savings.traffic_full - savings.traffic_spent
    idle = rest / savings.traffic_full if savings.traffic_full else 0.0
    sentences = [
        f"Training all leaves for {steps} costs {_cost(savings.full, unit)}. What was "
        f"due cost {_cost(savings.spent, unit)}, {share:.1%} of that: full training "
        f"costs {savings.speedup:.2f} times as much.",
        "This is the exact sum over the steps."
        if savings.exact
        else "This is an estimate from the counts of the leaves.",
    ]
    if savings.cycle is not None:
        sentences.append(
            f"This cycle costs {savings.cycle:.1%} of full training. For what it "
            f"selects, no way of computing gains more than {savings.bound:.2f} times."
        )
    rows = [
        ("weight gradients that were left out", savings.by_resting),
        ("the backward pass below the lowest active layer", savings.by_truncation),
        ("forward passes that were cached", savings.by_caching),
    ]
    body = [[(name, "text"), f"{part:.1%}"] for name, part in rows]
    body.append([("in all", "text"), f"{1 - share:.1%}"])
    head = [("saved by", "text"), "share of full training"]
    traffic = (
        f"The optimizer moved {_bytes(savings.traffic_spent)} of "
        f"{_bytes(savings.traffic_full)}: {idle:.1%} saved."
    )
    notes = "".join(f"<li>{_text(note)}</li>" for note in savings.notes)
    return "\n".join(
        [
            "<h2>Savings</h2>",
            f"<p>{_text(' '.join(sentences))}</p>",
            _table(head, body),
            f"<p>{_text(traffic)}</p>",
            *([f"<ul>{notes}</ul>"] if notes else []),
        ]
    )


def _runs(runs: Mapping[str, Any]) -> str:
    """Where each run ended."""
    metric = _metric(runs)
    label = metric.replace("_", " ") if metric else "metric"
    body = []
    for name, run in runs.items():
        columns = run.get("epochs", run)
        last = lambda key, columns=columns: _last(columns.get(key))
        spent, full = last("flops_spent"), last("flops_full")
        share = f"{spent / full:.1%}" if spent is not None and full else "–"
        epochs = max(map(len, _lists(columns)), default=0)
        cells = [
            f"{epochs:,}",
            *(_short(last(key)) for key in ("step", "loss")),
            *([_short(last(metric))] if metric and metric != "loss" else []),
            _cost(spent, "flops") if spent is not None else "–",
            share,
            _short(last("seconds")),
            _short(last("skipped")),
        ]
        body.append([(name, "text"), *cells])
    head = [
        ("run", "text"),
        *("epochs", "steps", "loss"),
        *([label] if metric and metric != "loss" else []),
        *("cost", "share of full", "seconds", "steps skipped"),
    ]
    return "<h2>Runs, at their ends</h2>\n" + _table(head, body)


def _pictures(
    report: "PriorityReport",
    history: Mapping[str, Any] | None,
    runs: Mapping[str, Any],
    gradient_norms: Any,
) -> list[str]:
    """Each with what it shows."""
    metric = _metric(runs)
    unit = report.savings.unit if report.savings is not None else "flops"
    cost = "FLOPs" if unit == "flops" else unit
    counted = [leaf for leaf in report.leaves if leaf.units == 1]
    units = {leaf.path: leaf.units for leaf in report.leaves}
    many = any(number != 1 for number in units.values())
    quotas = np.array([leaf.quota for leaf in counted], np.int64)
    paths = [leaf.path for leaf in counted]
    scores = "their scores" if gradient_norms is None else "the norms of gradients"
    found = [
        (
            lambda: plots.budget_share(report),
            "Share of each layer in the updates so far, in this cycle's quotas, and in "
            "the units. A bar beyond the line is a layer that got more than an even "
            "split would give it.",
        )
    ]
    if history is not None:
        past = history
        found.append(
            (
                lambda: plots.updates_over_time(past, units if many else None),
                "How often each leaf was updated, from the first step to the last; "
                "white where it rested all the time.",
            )
        )
    found.append(
        (
            lambda: plots.counts_against_scores(report, gradient_norms),
            f"Updates of the leaves against {scores}.",
        )
    )
    if counted or not report.leaves:
        left = len(report.leaves) - len(counted)
        more = f" {_count(left, 'leaf', 'leaves')} of many units left out."
        found.append(
            (
                lambda: plots.cycle(quotas, report.recalc_every, paths),
                "Which leaves are due at which step of this cycle, and how many times. "
                "All leaves with a quota are due at step 0." + (more if left else ""),
            )
        )
    if metric is not None:
        found.append(
            (
                lambda: plots.accuracy_against_flops(runs, metric, cost),
                "What was reached for which cost. Further to the upper left is better, "
                "or to the lower left if it is a loss.",
            )
        )
    return [_picture(draw, caption) for draw, caption in found]


def _picture(draw: "Callable[[], Figure]", caption: str) -> str:
    """The figure as an image inside of the page, always black on white."""
    plots.require()
    import matplotlib

    buffer = io.BytesIO()
    # The user's style is for the user's figures. The salt is for ids, which would be
    # random without it.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "priorityprop"
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = draw()
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" width="{width}" '
        f'height="{height}" alt="{_text(caption)}">\n'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _metric(runs: Mapping[str, Any]) -> str | None:
    """What all runs have over their costs, an accuracy if they can."""
    columns = [run.get("epochs", run) for run in runs.values()]
    if not columns or None in [_last(run.get("flops_spent")) for run in columns]:
        return None  # nobody knows the cost
    known = [key for key in columns[0] if all(key in run for run in columns)]
    measured = [key for key in known if key.startswith("eval_")]
    good = [key for key in measured if "accuracy" in key]
    plain = [key for key in known if key == "loss"]
    return next(iter([*good, *measured, *plain]), None)


def _leaves(leaves: "Sequence[LeafReport]") -> str:
    if len(leaves) <= _OPEN:
        return _leaf_table(leaves)
    rest = f"The other {len(leaves) - _OPEN:,} leaves"
    return "\n".join(
        [
            f"<p>The {_OPEN} leaves with the highest scores:</p>",
            _leaf_table(leaves[:_OPEN]),
            f"<details><summary>{rest}</summary>",
            _leaf_table(leaves[_OPEN:]),
            "</details>",
        ]
    )


def _leaf_table(leaves: "Sequence[LeafReport]") -> str:
    head = [("leaf", "text"), ("shape", "text"), *"units depth score updates".split()]
    head += ["quota", "share", "not finite"]
    body = [
        [
            (leaf.path, "text path"),
            ("×".join(map(str, leaf.shape)) or "scalar", "text"),
            f"{leaf.units:,}",
            f"{leaf.depth:,}",
            f"{leaf.score:.3g}",
            f"{leaf.count:,}",
            f"{leaf.quota:,}",
            f"{leaf.share:.1%}",
            f"{leaf.nonfinite:,}",
        ]
        for leaf in leaves
    ]
    return _table(head, body)


def _table(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
    """Cells are texts, or pairs of a text and a class."""

    def cell(tag: str, content: Any) -> str:
        text, name = content if isinstance(content, tuple) else (content, "")
        scope = ' scope="col"' if tag == "th" else ""
        kind = f' class="{name}"' if name else ""
        return f"<{tag}{scope}{kind}>{_text(text)}</{tag}>"

    row = lambda tag, cells: f"<tr>{''.join(cell(tag, c) for c in cells)}</tr>"
    return "\n".join(
        [
            '<div class="wide"><table>',
            f"<thead>{row('th', head)}</thead>",
            "<tbody>",
            *(row("td", cells) for cells in body),
            "</tbody></table></div>",
        ]
    )


def _text(text: Any) -> str:
    """Safe in a page, between tags and in attributes."""
    return html.escape(plots.printable(str(text)))


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _cost(value: float, unit: str) -> str:
    if unit != "flops":
        return f"{value:,.4g} {unit}"
    scale, prefix = plots.prefix_of(value)
    return f"{value / scale:,.3g} {prefix}FLOPs"


def _bytes(value: float) -> str:
    scale, prefix = plots.prefix_of(value)
    return f"{value / scale:,.3g} {prefix}B"


def _lists(columns: Mapping[str, Any]) -> list[Any]:
    """The columns of epochs; a dict like a `History` may hold other things, too."""
    return [
        column
        for name, column in columns.items()
        if isinstance(column, list | tuple) and name != "paths"
    ]


def _last(column: Any) -> float | None:
    """The last value that there is."""
    if not isinstance(column, list | tuple | np.ndarray):
        return None
    known = [x for x in column if x is not None and not math.isnan(x)]
    return float(known[-1]) if known else None


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"

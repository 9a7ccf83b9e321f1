"""Draws who got what. Every function returns a figure and shows nothing.

What is drawn is in the data units of its axes, so that figures can be changed further.
Leaves are in the natural order of their paths, from the top. Colors go from light to
dark with the value, and lines differ in color, style and marker, so that nothing is
lost in print or to the colour-blind.
"""

import importlib.util
import math
import os.path
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TYPE_CHECKING

import jax
import numpy as np

from ._checks import check_count
from ._schedule import schedule
from ._units import layout, natural_key


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import PriorityReport


_ROWS = 256  # more leaves than that share rows
_LABELS = 48  # more rows than that share labels
_BARS = 40
_NAMED = 10  # points up to this number have a legend
_CELLS = 24  # rows and columns up to this number have their numbers written in
_WIDTH = 36  # of a path, in letters
_SMALL = 8  # font size
_LEGEND: dict[str, Any] = dict(fontsize=_SMALL, frameon=False)

# Okabe and Ito's, without the yellow, which print loses.
_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9".split()
_MARKERS = "o s ^ D v P X * < >".split()
_LINES = ["-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2))]


def updates_over_time(
    history: Mapping[str, Any], units: Mapping[str, int] | None = None
) -> "Figure":
    """Draws how often each leaf was updated, from the first step to the last.

    Args:
      history: a `History`, or a dict like it, with ``paths`` (a string for each leaf)
        and ``cycles``, a dict of the lists ``step`` (ascending) and ``counts`` (for
        each of these steps, the updates of each leaf up to it).
      units: number of units of each leaf, by path. With it, updates are per unit.

    Returns:
      A heat map: a row for each leaf (for groups of leaves, their mean, if there are
      more than 256), a column for each recorded span of steps, in updates per step.
      What was not updated at all is white.

    Raises:
      KeyError: `history` has no ``paths`` or ``cycles``, or `units` lacks a path.
      ValueError: the lists do not fit together, or steps or counts fall.
      ImportError: matplotlib is not installed.

    Examples:
      >>> from priorityprop_jax import plots
      >>> cycles = {"step": [10, 20, 30], "counts": [[10, 1], [15, 2], [19, 9]]}
      >>> figure = plots.updates_over_time({"paths": ["a/w", "b/w"], "cycles": cycles})
      >>> figure.axes[0].get_xlabel()
      'training step'
    """
    paths = [str(path) for path in _part(history, "paths")]
    steps, counts = _recorded(_part(history, "cycles"), len(paths))
    if not paths or not steps.size:
        return _nothing("No cycle of training is recorded yet.")
    spans = np.diff(steps, prepend=0)
    updates = np.diff(counts, axis=0, prepend=0)
    keep = spans > 0
    edges = np.concatenate([[0], steps[keep]])
    rates = updates[keep] / spans[keep][:, None]
    if units is not None:
        rates = rates / np.maximum(_by_path("units", units, paths), 1)
    if not keep.any():
        return _nothing("No cycle of training is recorded yet.")
    rows = _rows(paths)
    drawn = np.stack([rates[:, members].mean(axis=1) for members in rows.members])
    figure = _figure(7.5, _height(len(rows.members)))
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(drawn) + 1) - 0.5,
        np.ma.masked_equal(drawn, 0),
        cmap=_colormap(),
        norm=_color_norm(drawn),
        rasterized=True,
    )
    _label_rows(axes, rows)
    axes.set_xlabel("training step")
    _whole_ticks(axes.xaxis)
    title = "Updates of each leaf over time"
    axes.set_title(title if rows.single else f"{title} (means of groups)", loc="left")
    per = "updates per step" if units is None else "updates per step and unit"
    _color_bar(figure, axes, mesh, f"{per}\n(white: none)")
    return figure


def budget_share(report: "PriorityReport") -> "Figure":
    """Draws which layer got which share of the budget.

    A layer is what the paths of leaves name but for their last part. If there are more
    than 40, neighbours share a bar.

    Args:
      report: from `priority_report`.

    Returns:
      A bar for each layer's share of all updates so far, a diamond for its share of
      this cycle's quotas, and a line for its share of all units, which is what an even
      split would give it. In percent.

    Raises:
      ImportError: matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import plots, priority_prop, priority_report
      >>> params = {"Dense_0": {"w": jnp.ones(3)}, "Dense_1": {"w": jnp.ones(2)}}
      >>> state = priority_prop(budget=5).init(params)
      >>> figure = plots.budget_share(priority_report(state, params))
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['Dense_0', 'Dense_1']
    """
    if not report.leaves:
        return _nothing("There are no leaves.")
    layers: dict[str, list[int]] = {}
    for i, leaf in enumerate(report.leaves):
        layers.setdefault(leaf.path.rpartition("/")[0] or leaf.path, []).append(i)
    groups = _fold(list(layers), _BARS)
    members = list(layers.values())
    where = [[i for j in group.members for i in members[j]] for group in groups]

    def shares(name):
        values = np.array([getattr(leaf, name) for leaf in report.leaves], float)
        return np.array([100 * values[i].sum() for i in where]) / max(values.sum(), 1)

    count, quota, even = map(shares, ("count", "quota", "units"))
    figure = _figure(7.5, _height(len(groups)) + 0.4)
    axes = figure.subplots()
    y = np.arange(len(groups))
    label = f"of all {report.updates:,} updates so far"
    axes.barh(y, count, height=0.7, color="#56B4E9", label=label)
    label = f"of the {sum(x.quota for x in report.leaves):,} handed out in this cycle"
    style: dict[str, Any] = dict(linestyle="none", color="black")
    style |= dict(zorder=3, clip_on=False)
    axes.plot(quota, y, marker="D", markersize=4, label=label, **style)
    label = f"an even split over all units ({report.units:,})"
    size = max(4.0, min(14.0, 300 / len(groups)))
    style |= dict(color="#D55E00", markeredgewidth=2)
    axes.plot(even, y, marker="|", markersize=size, label=label, **style)
    _label_y(axes, y, [group.name for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, 1.08 * max(map(np.max, (count, quota, even)))))
    axes.set_xlabel("share (%)")
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("Share of each layer in the budget", loc="left")
    handles = [*axes.containers, *axes.lines]
    figure.legend(handles=handles, loc="outside lower left", **_LEGEND)
    return figure


def counts_against_scores(
    report: "PriorityReport", gradient_norms: Any = None
) -> "Figure":
    """Draws the updates of each leaf against its score, or against its gradient.

    Args:
      report: from `priority_report`.
      gradient_norms: pytree of scalars with the structure of the params, or a dict
        with a scalar for each path of the report, such as ``"Dense_0/kernel"``: the
        norm of each leaf's gradient. Without it, the scores of the report are drawn.

    Returns:
      A point for each leaf, dark where it is far from the loss; axes are logarithmic
      where values spread over more than a factor of 50, with a place for zeros. Leaves
      whose score is not finite are left out, and counted below the title.

    Raises:
      ValueError: `gradient_norms` lacks a leaf, or has one that is no scalar.
      TypeError: it has a leaf that is no floating number.
      ImportError: matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import plots, priority_prop, priority_report
      >>> params = {"Dense_0": {"w": jnp.ones(3)}, "Dense_1": {"w": jnp.ones(2)}}
      >>> report = priority_report(priority_prop(budget=5).init(params), params)
      >>> norms = {"Dense_0": {"w": 0.5}, "Dense_1": {"w": 2.0}}
      >>> plots.counts_against_scores(report, norms).axes[0].get_xlabel()
      'norm of the gradient'
    """
    if not report.leaves:
        return _nothing("There are no leaves.")
    order = _natural_order([leaf.path for leaf in report.leaves])
    leaves = [report.leaves[i] for i in order]
    if gradient_norms is None:
        x, label = np.array([leaf.score for leaf in leaves], float), "score"
    else:
        x = _norms(gradient_norms, [leaf.path for leaf in leaves])
        label = "norm of the gradient"
    many = any(leaf.units != 1 for leaf in leaves)
    y = np.array([leaf.count / max(leaf.units, 1) for leaf in leaves])
    depth = np.array([leaf.depth for leaf in leaves])
    drawn = np.isfinite(x)
    if not drawn.any():
        return _nothing(f"No leaf has a {label} that is finite.")
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    if len(leaves) <= _NAMED:
        names = short_paths([leaf.path for leaf in leaves])
        for i in np.flatnonzero(drawn):
            color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
            (point,) = axes.plot(x[i], y[i], linestyle="none", alpha=0.9, color=color)
            point.set(marker=marker, markersize=7, label=_plain(names[i]))
        figure.legend(loc="outside right upper", **_LEGEND)
    else:
        points = axes.scatter(
            x[drawn],
            y[drawn],
            c=depth[drawn],
            cmap=_colormap(),
            s=min(30, max(6, 6000 / len(leaves))),
            alpha=0.8,
            edgecolors="black",
            linewidths=min(0.4, 80 / len(leaves)),
            rasterized=len(leaves) > 500,
        )
        bar = figure.colorbar(points, ax=axes, label="depth of the leaf")
        _whole_ticks(bar.ax.yaxis)
    _scale(axes.xaxis, x[drawn])
    _scale(axes.yaxis, y[drawn])
    axes.set_xlabel(label)
    axes.set_ylabel("updates so far" + (" per unit" if many else ""))
    if not many and axes.get_yscale() == "linear":
        _whole_ticks(axes.yaxis)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    lines = [f"Updates of each leaf against its {label}"]
    correlation = _rank_correlation(x[drawn], y[drawn])
    if math.isfinite(correlation):
        lines.append(f"rank correlation {correlation:.2f}")
    if not drawn.all():
        left = int((~drawn).sum())
        lines.append(f"{left:,} of {len(leaves):,} leaves left out: {label} not finite")
    axes.set_title("\n".join(lines), loc="left", fontsize=10)
    return figure


def cycle(
    quotas: Any, recalc_every: int, paths: Sequence[str] | None = None
) -> "Figure":
    """Draws who is due at which step of a cycle, and how many times.

    Args:
      quotas: updates of each leaf or other unit in the cycle; shape=(units,),
        integers.
      recalc_every: number of steps in a cycle.
      paths: name of each unit. By default their positions.

    Returns:
      A heat map: a row for each unit (for groups of units, their mean, if there are
      more than 256), a column for each step; multiplicities are written into the cells
      if these are large enough. Who is not due is white.

    Raises:
      ValueError: a negative quota, another number of paths than of quotas, or
        `recalc_every` below 1.
      TypeError: quotas or `recalc_every` are no integers.
      ImportError: matplotlib is not installed.

    Examples:
      >>> from priorityprop_jax import plots
      >>> figure = plots.cycle([1, 3, 6], 4, ["a/w", "b/w", "c/w"])
      >>> print(figure.axes[0].images[0].get_array().filled(0))
      [[1. 0. 0. 0.]
       [1. 1. 1. 0.]
       [2. 1. 2. 1.]]
    """
    check_count("recalc_every", recalc_every, least=1, static=True)
    quotas = np.asarray(quotas)
    if quotas.ndim != 1:
        raise ValueError(f"quotas must have one axis, got shape {quotas.shape}")
    if not quotas.size:
        return _nothing("There are no leaves.")
    if quotas.dtype.kind not in "iu":
        raise TypeError(f"quotas must be integers, got dtype {quotas.dtype}")
    if quotas.min() < 0:
        raise ValueError(f"quotas must be >= 0, got {quotas.min()}")
    if paths is None:
        paths = [str(i) for i in range(quotas.size)]
    if len(paths) != quotas.size:
        raise ValueError(f"{len(paths)} paths for {quotas.size} quotas")
    times = np.asarray(schedule(quotas.astype(np.int32), recalc_every), float)
    rows = _rows([str(path) for path in paths])
    drawn = np.stack([times[:, members].mean(axis=1) for members in rows.members])
    whole, most = rows.single, max(int(drawn.max()), 1)
    figure = _figure(7.5, _height(len(drawn)))
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_equal(drawn, 0),
        cmap=_colormap(most if whole and most <= 10 else 256),
        norm=_step_norm(most) if whole and most <= 10 else _color_norm(drawn),
        aspect="auto",
        interpolation="nearest",
    )
    if whole and len(drawn) <= _CELLS and recalc_every <= _CELLS:
        for i, r in np.argwhere(drawn):
            # Light letters where the colors are darker than their middle.
            ink = (
                "white" if float(np.asarray(image.norm(drawn[i, r]))) > 0.5 else "black"
            )
            style: dict[str, Any] = dict(ha="center", va="center", color=ink)
            axes.text(r, i, f"{drawn[i, r]:.0f}", fontsize=_SMALL, **style)
    if len(drawn) <= _LABELS:
        axes.hlines(np.arange(len(drawn) - 1) + 0.5, -0.5, recalc_every - 0.5, "0.85")
    _label_rows(axes, rows)
    axes.set_xlabel("step of the cycle (0 is the full one)")
    _whole_ticks(axes.xaxis)
    title = "Who is due at which step of a cycle"
    axes.set_title(title if whole else f"{title} (means of groups)", loc="left")
    bar = _color_bar(figure, axes, image, "updates at this step\n(white: none)")
    if whole:
        ticks = range(1, most + 1, max(1, -(-most // 10)))
        bar.set_ticks(list(ticks))
        bar.minorticks_off()
    return figure


def accuracy_against_flops(
    histories: Mapping[str, Any], metric: str = "eval_accuracy", unit: str = "FLOPs"
) -> "Figure":
    """Draws what each run reached for which cost, side by side.

    Args:
      histories: `History` or a dict like it by the name of the run, with the list
        `metric` and the list ``flops_spent``, the cost up to the end of each epoch.
        Epochs that lack one (None or NaN) have no point. A single history will do.
      metric: what is drawn upwards. An accuracy is drawn in percent.
      unit: of the cost, ``"FLOPs"`` or ``"ms"``.

    Returns:
      A line with markers for each run, over the cost so far. The axis is logarithmic
      if the costs spread over more than a factor of 50.

    Raises:
      KeyError: a run has no such metric or no ``flops_spent``.
      ValueError: these lists differ in length.
      ImportError: matplotlib is not installed.

    Examples:
      >>> from priorityprop_jax import plots
      >>> full = {"eval_accuracy": [0.8, 0.9], "flops_spent": [2e9, 4e9]}
      >>> half = {"eval_accuracy": [0.7, 0.9], "flops_spent": [1e9, 2e9]}
      >>> figure = plots.accuracy_against_flops({"full": full, "half": half})
      >>> figure.axes[0].get_xlabel()
      'cost so far (GFLOPs)'
    """
    if not all(isinstance(run, Mapping) for run in histories.values()):
        histories = {str(getattr(histories, "name", None) or "run"): histories}
    lines = {name: _curve(name, run, metric) for name, run in histories.items()}
    costs = np.concatenate([np.zeros(0), *(x for x, _ in lines.values())])
    if not costs.size:
        return _nothing(f"No run has {metric} at a known cost yet.")
    figure = _figure(7.5, 4.4)
    axes = figure.subplots()
    percent = "accuracy" in metric.lower()
    names = short_paths([str(name) for name in lines])
    for i, (x, y) in enumerate(lines.values()):
        # Marker and color have no common factor: 70 pairs, and as many lines.
        axes.plot(
            x,
            100 * y if percent else y,
            color=_COLORS[i % len(_COLORS)],
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle=_LINES[i % len(_LINES)],
            markersize=5,
            linewidth=1.6,
            markevery=max(1, len(x) // 15),
            label=_plain(names[i]),
        )
    scale, prefix = prefix_of(float(np.median(costs)))
    _scale(axes.xaxis, costs, zero=True)
    _divided(axes.xaxis, scale)
    name = f"{prefix}{unit}" if unit == "FLOPs" else f"{scale:.0e} {unit}"
    axes.set_xlabel(f"cost so far ({name if scale != 1 else unit})")
    label = metric.replace("_", " ")
    axes.set_ylabel(f"{label} (%)" if percent else label)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{label.capitalize()} against cost", loc="left")
    if len(lines) > 4:
        figure.legend(loc="outside right upper", **_LEGEND)
    else:
        axes.legend()
    return figure


def short_paths(paths: Sequence[str], width: int = _WIDTH) -> list[str]:
    """Shortens paths in the middle, so that different ones stay different.

    Args:
      paths: such as ``"encoder/layer_3/attention/query/kernel"``.
      width: letters at most, at least 12.

    Returns:
      A label for each path, all of them different: if paths are equal, with a number.
      What cannot be printed is escaped.

    Examples:
      >>> from priorityprop_jax.plots import short_paths
      >>> long = "encoder/layer_{}/attention/query/dense/kernel"
      >>> short_paths([long.format(3), long.format(14)], width=24)
      ['encod…ayer_3/a…se/kernel', 'encod…ayer_14/a…e/kernel']
    """
    check_count("width", width, least=12)
    clean = [printable(path) for path in paths]
    labels = [_cut(path, width) for path in clean]
    alike: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        alike.setdefault(label, []).append(i)
    for members in alike.values():
        group = sorted({clean[i] for i in members})
        if len(group) > 1:
            for i in members:
                labels[i] = _cut_around(clean[i], group, width)
    taken: set[str] = set()
    for i, label in enumerate(labels):
        number = 1
        while labels[i] in taken:
            number += 1
            end = f" ({number})"
            labels[i] = _cut(label, width - len(end)) + end
        taken.add(labels[i])
    return labels


def _cut(path: str, width: int) -> str:
    """The path without its middle. What is last says most, so it keeps more."""
    if len(path) <= width:
        return path
    head = (width - 1) // 3
    return f"{path[:head]}…{path[head + 1 - width :]}"


def _cut_around(path: str, group: Sequence[str], width: int) -> str:
    """The path without most of what it shares with the others of its group."""
    first = len(os.path.commonprefix(group))
    last = len(os.path.commonprefix([other[::-1] for other in group]))
    last = min(last, len(path) - first, *(len(other) - first for other in group))
    end = len(path) - last
    # All that differs is kept if it fits, with some of what stands around it.
    room = width - 2 - (end - first)
    if room < 2:
        return _cut(path, width)
    head = min(room // 4, first)
    before = min(room // 4, first - head)
    rest = room - head - before
    tail = min(rest - rest // 4, last)
    after = min(rest - tail, last - tail)
    left, right = path[:head], path[len(path) - tail :]
    middle = path[first - before : end + after]
    left = left + ("…" if first - before > head else path[head : first - before])
    right = ("…" if end + after < len(path) - tail else "") + right
    return left + middle + right


def printable(text: str) -> str:
    """The text in one line, without what no font or file can hold."""
    if text.isprintable():
        return text
    safe = lambda c: c if c.isprintable() else ascii(c)[1:-1]
    return "".join(map(safe, text))


def _plain(label: str) -> str:
    """A label that is no formula, and that a legend does not take to be hidden."""
    label = label.replace("$", r"\$")
    return "\u200b" + label if label.startswith("_") else label


def _part(history: Mapping[str, Any], name: str) -> Any:
    """What is an attribute of a `History`, and an item of a dict like it."""
    if hasattr(history, name):
        return getattr(history, name)
    if name not in history:
        raise KeyError(f"history has no {name!r}; it has {sorted(history)}")
    return history[name]


def _recorded(cycles: Mapping[str, Any], leaves: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps, and the updates up to each, (records, leaves)."""
    for name in ("step", "counts"):
        if name not in cycles:
            raise KeyError(f"history's cycles have no {name!r}: {sorted(cycles)}")
    steps = np.array(cycles["step"], np.int64)
    if len(cycles["counts"]) != steps.size:
        lengths = f"{len(cycles['counts'])} counts for {steps.size} steps"
        raise ValueError(f"history's cycles have {lengths}")
    for row in cycles["counts"]:
        if len(row) != leaves:
            counts = f"counts of {len(row)} leaves for {leaves} paths"
            raise ValueError(f"history's cycles have {counts}")
    counts = np.array(cycles["counts"], np.int64).reshape(steps.size, leaves)
    for name, values in {"step": steps, "counts": counts}.items():
        if (np.diff(values, axis=0, prepend=0) < 0).any():
            raise ValueError(f"history's cycles: {name} must not fall")
    return steps, counts


def _by_path(name: str, values: Mapping[str, Any], paths: Sequence[str]) -> np.ndarray:
    for path in paths:
        if path not in values:
            raise KeyError(f"{name} has no {path!r}; it has {sorted(values)[:8]}")
    return np.array([values[path] for path in paths], float)


def _norms(norms: Any, paths: Sequence[str]) -> np.ndarray:
    """A number for each path, from a pytree or a dict by path."""
    names = layout(norms, "leaf").names
    values = dict(zip(names, jax.tree.leaves(norms), strict=True))
    for path in paths:
        if path not in values:
            known = ", ".join(map(repr, list(values)[:8])) or "nothing"
            raise ValueError(f"gradient_norms has no {path!r}; it has {known}")
        if np.size(values[path]) != 1:
            raise ValueError(
                f"gradient_norms[{path!r}] must be a scalar, the norm of the leaf's "
                f"gradient, got shape {np.shape(values[path])}"
            )
    values = jax.device_get(values)
    return np.array([np.asarray(values[path], float).item() for path in paths])


def _curve(
    name: str, run: Mapping[str, Any], metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Cost so far and metric of the epochs that have one."""
    run = run.get("epochs", run)  # a History, or what its to_dict gives
    for key in (metric, "flops_spent"):
        if key not in run:
            raise KeyError(f"run {name!r} has no {key!r}; it has {sorted(run)}")
    number = lambda values: [math.nan if v is None else v for v in values]
    y = np.array(number(run[metric]), float)
    x = np.array(number(run["flops_spent"]), float)
    if x.shape != y.shape:
        lengths = f"{y.size} values of {metric} for {x.size} of flops_spent"
        raise ValueError(f"run {name!r} has {lengths}")
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if (np.diff(x) < 0).any():
        raise ValueError(
            f"run {name!r}: flops_spent is a running total and cannot fall"
        )
    return x, y


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, with mean ranks for ties; NaN where it has no meaning."""
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan

    def ranks(values):
        _, where, number = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(number) - (number - 1) / 2)[where]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


class _Group(NamedTuple):
    """Neighbours in the natural order of paths: what has a prefix, or a run of it."""

    members: list[int]
    first: str
    last: str = ""  # last part of a run's last path

    @property
    def name(self) -> str:
        return f"{self.first} to {self.last}" if self.last else self.first


class _Rows(NamedTuple):
    """Rows of a heat map from the top, and the labels at their left."""

    members: list[list[int]]  # of each row
    labels: list[str]
    spans: list[tuple[int, int]]  # rows of each label: from, to (without)
    single: bool  # a row is a leaf


def _natural_order(paths: Sequence[str]) -> list[int]:
    keys = [natural_key(tuple(path.split("/"))) for path in paths]
    return sorted(range(len(paths)), key=lambda i: (keys[i], i))


def _fold(paths: Sequence[str], most: int, ordered: bool = False) -> list[_Group]:
    """At most so many groups of neighbours: modules, or runs of them.

    Modules are taken at the finest level that there is room for. If that is much less
    than the room, then runs of equal length of the next level within each module.
    """
    order = list(range(len(paths))) if ordered else _natural_order(paths)
    if len(paths) <= most:
        return [_Group([i], paths[i]) for i in order]
    parts = [path.split("/") for path in paths]

    def level(k: int) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for i in order:
            found.setdefault(tuple(parts[i][:k]), []).append(i)
        return found

    k = max(k for k in range(max(map(len, parts)) + 1) if len(level(k)) <= most)
    coarse = level(k)
    if 4 * len(coarse) >= most:
        return [_Group(members, "/".join(key)) for key, members in coarse.items()]
    # Equal paths are leaves of their own at the last level.
    deepest = k >= max(map(len, parts))
    fine = level(k + 1)
    if deepest:
        fine = {tuple([*parts[i], str(i)]): [i] for i in order}
    runs: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key in fine:
        runs.setdefault(key[:k], []).append(key)
    length = next(
        n
        for n in range(1, len(fine) + 1)
        if sum(-(-len(keys) // n) for keys in runs.values()) <= most
    )
    groups = []
    for keys in runs.values():
        pieces = -(-len(keys) // length)
        cuts = [len(keys) * i // pieces for i in range(pieces + 1)]
        for run in (keys[a:b] for a, b in zip(cuts, cuts[1:], strict=False)):
            last = run[-1][-1] if len(run) > 1 else ""
            members = [i for key in run for i in fine[key]]
            groups.append(_Group(members, "/".join(run[0]), last))
    return groups


def _rows(paths: Sequence[str]) -> _Rows:
    groups = _fold(paths, _ROWS)
    labels, spans, start = [], [], 0
    for label in _fold([group.first for group in groups], _LABELS, ordered=True):
        stop = label.members[-1] + 1
        end = groups[stop - 1]
        if len(label.members) == 1:
            label = end
        elif label.last and end.last:  # a run of runs
            label = label._replace(last=end.last)
        labels.append(label.name)
        spans.append((start, stop))
        start = stop
    members = [group.members for group in groups]
    return _Rows(members, labels, spans, len(groups) == len(paths))


def require() -> None:
    """Raises unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "priorityprop_jax.plots needs matplotlib: "
            'pip install "priorityprop_jax[plots]"'
        )


def _figure(width: float, height: float) -> "Figure":
    require()
    from matplotlib.figure import Figure

    # Without pyplot: nothing is kept after the figure goes, nothing is shown.
    return Figure(figsize=(width, height), layout="constrained")


def _nothing(message: str) -> "Figure":
    """A picture that says why there is none."""
    figure = _figure(7.5, 1.2)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", style="italic")
    return figure


def _height(rows: int) -> float:
    """Inches: labels need 0.19 each; what is not labeled can be thinner."""
    return 1.5 + 0.19 * min(max(rows, 4), 42)


def _label_rows(axes: Any, rows: _Rows) -> None:
    """Labels at the left. Where a label is for many rows, lines show for which."""
    axes.set_ylim(len(rows.members) - 0.5, -0.5)
    if len(rows.labels) == len(rows.members):
        _label_y(axes, np.arange(len(rows.labels)), rows.labels)
        return
    # The large groups first; small ones go without where there is no room.
    room = len(rows.members) / 62  # labels would fit
    kept: dict[int, float] = {}
    for i in sorted(range(len(rows.spans)), key=lambda i: np.subtract(*rows.spans[i])):
        middle = (sum(rows.spans[i]) - 1) / 2
        if all(abs(middle - other) >= room for other in kept.values()):
            kept[i] = middle
    shown = sorted(kept)
    _label_y(axes, np.array([kept[i] for i in shown]), [rows.labels[i] for i in shown])
    axes.set_yticks([start - 0.5 for start, _ in rows.spans[1:]], minor=True)
    axes.tick_params("y", which="major", length=0, pad=12)
    axes.tick_params("y", which="minor", length=10, width=0.5)


def _label_y(axes: Any, y: np.ndarray, paths: Sequence[str]) -> None:
    axes.set_yticks(y, short_paths(paths), fontsize=_SMALL)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _scale(axis: Any, values: np.ndarray, zero: bool = False) -> None:
    """A logarithmic axis if values need one, with a place for zeros."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    set_limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    if (values < 0).any():
        return
    if high / low <= 50:
        top = values.max()
        if zero or values.min() < 0.5 * top or not top:
            set_limits(-0.04 * top if top else -0.05, 1.06 * top if top else 1.0)
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**d for d in decades][:: -(-len(decades) // 7)]
    threshold = 10.0 ** decades[0]
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    if (values == 0).any():
        set_scale("symlog", linthresh=threshold, linscale=0.5)
        ticks = [0.0, *ticks]
        bottom = -0.3 * threshold
    else:
        set_scale("log")
        bottom = low / (high / low) ** 0.04
    set_limits(bottom, high * (high / low) ** 0.04)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def prefix_of(value: float) -> tuple[float, str]:
    names = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    thousands = int(math.log10(value) // 3) if value >= 1 else 0
    thousands = min(thousands, len(names) - 1)
    return 1000.0**thousands, names[thousands]


def _divided(axis: Any, scale: float) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / scale:,.6g}"))


def _colormap(steps: int = 256) -> Any:
    """Light is little, dark is much: viridis, less what white is hardly told from."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colors = colormaps["viridis_r"](np.linspace(0.2, 1.0, steps))
    return ListedColormap(colors).with_extremes(bad="white")


def _color_norm(values: np.ndarray) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.0, 1.0)
    if positive.size and high / low > 100:
        return LogNorm(low, high)
    return Normalize(0.0, high)


def _step_norm(most: int) -> Any:
    """Of colors for 1 to `most`, each its own."""
    from matplotlib.colors import Normalize

    return Normalize(0.5, most + 0.5)


def _color_bar(figure: Any, axes: Any, drawn: Any, label: str) -> Any:
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, shrink=1.0, aspect=30)
    bar.set_label(label, fontsize=_SMALL + 1)
    return bar

"""Pictures: what is drawn is what was given, every label is there and its own."""

import dataclasses
import io
import json
import re
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax import plots, PriorityReport
from priorityprop_jax._savings import cycle_masks
from priorityprop_jax._schedule import ranking
from priorityprop_jax.report import LeafReport


pytest.importorskip("matplotlib")

SIZES = [1, 4, 48, 49, 200, 2000]
all_sizes = pytest.mark.parametrize("n", SIZES)
FLAT = [f"w{i}" for i in range(700)]


def paths(n):
    """In the order of a pytree's leaves, where block_10 is before block_2."""
    names = [
        f"net/stage_{i // 400}/block_{i % 400 // 16}/conv_{i % 16 // 2}/{kind}"
        for i, kind in zip(range(n), ["bias", "kernel"] * n, strict=False)
    ]
    return sorted(names)


def report(n, *, units=1, recalc_every=10, **changed):
    random = np.random.default_rng(n)
    counts, quotas = random.integers(0, 300, n), random.integers(0, 20, n)
    leaves = [
        LeafReport(
            path=path,
            shape=(3, 4),
            units=units,
            depth=n - 1 - i,
            score=float(random.exponential()),
            count=int(counts[i]),
            quota=int(quotas[i]),
            share=counts[i] / max(counts.sum(), 1),
            nonfinite=0,
        )
        for i, path in enumerate(paths(n))
    ]
    leaves = [dataclasses.replace(leaf, **changed) for leaf in leaves]
    leaves = tuple(sorted(leaves, key=lambda leaf: -leaf.score))
    return PriorityReport(leaves, 100, recalc_every, int(quotas.sum()), 0)


def history(names, cycles=7, span=10):
    random = np.random.default_rng(len(names))
    updates = random.integers(0, 5, (cycles, len(names)))
    steps = [span * (i + 1) for i in range(cycles)]
    counts = np.cumsum(updates, axis=0).tolist()
    return {"paths": names, "cycles": {"step": steps, "counts": counts}}, updates


def drawn(figure):
    """The figure as bytes, which also shows that it can be drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def natural(names):
    """Numbers by their value; independent of the package's own keys."""
    number = lambda s: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", s)]
    return sorted(names, key=lambda name: [number(part) for part in name.split("/")])


def message(figure):
    (axes,) = figure.axes
    return " ".join(text.get_text() for text in axes.texts)


# Updates over time.


@all_sizes
def test_heat_map_draws_the_updates_of_each_leaf(n):
    names = paths(n)
    given, updates = history(names)
    figure = plots.updates_over_time(given)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    data = mesh.get_array().filled(0)
    rows = [names.index(name) for name in natural(names)]
    if n <= 256:
        np.testing.assert_allclose(data, updates.T[rows] / 10)
        assert "means" not in axes.get_title("left")
    else:  # a row is a mean of neighbours; all blocks have 16 leaves
        means = updates.T[rows].reshape(-1, 16, 7).mean(axis=1)
        np.testing.assert_allclose(data, means / 10)
        assert "means of groups" in axes.get_title("left")
    if n <= 48:
        assert labels(axes) == natural(names)
    found = labels(axes)
    assert len(set(found)) == len(found) <= 48
    assert axes.get_xlabel() == "training step"
    assert axes.yaxis_inverted()
    np.testing.assert_array_equal(axes.get_xlim(), [0, 70])
    assert figure.axes[1].get_ylabel().startswith("updates per step")
    assert drawn(figure)


def test_heat_map_of_uneven_spans():
    cycles = {"step": [10, 20, 60], "counts": [[10, 0], [10, 5], [50, 5]]}
    figure = plots.updates_over_time({"paths": ["a", "b"], "cycles": cycles})
    (mesh,) = figure.axes[0].collections
    np.testing.assert_allclose(mesh.get_array().filled(0), [[1, 0, 1], [0, 0.5, 0]])
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 20, 60])
    resting = np.ma.getmaskarray(mesh.get_array())
    assert resting.tolist() == [[False, True, False], [True, False, True]]
    assert tuple(mesh.get_cmap().get_bad()) == (1, 1, 1, 1)  # white


def test_heat_map_starts_before_the_first_step():
    cycles = {"step": [0, 10], "counts": [[0], [5]]}
    figure = plots.updates_over_time({"paths": ["a"], "cycles": cycles})
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().filled(0).tolist() == [[0.5]]


def test_heat_map_per_unit():
    cycles = {"step": [10], "counts": [[40, 10]]}
    given = {"paths": ["a", "b"], "cycles": cycles}
    figure = plots.updates_over_time(given, units={"a": 4, "b": 1})
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().filled(0).tolist() == [[1.0], [1.0]]
    assert "per step and unit" in figure.axes[1].get_ylabel()
    with pytest.raises(KeyError, match="units has no 'b'"):
        plots.updates_over_time(given, units={"a": 4})


def test_heat_map_is_logarithmic_where_rates_spread():
    from matplotlib.colors import LogNorm

    def norm(large):
        cycles = {"step": [10], "counts": [[1, large]]}
        given = {"paths": ["a", "b"], "cycles": cycles}
        return plots.updates_over_time(given).axes[0].collections[0].norm

    assert isinstance(norm(1000), LogNorm)
    assert not isinstance(norm(20), LogNorm)


@pytest.mark.parametrize(
    "given",
    [
        {"paths": ["a"], "cycles": {"step": [], "counts": []}},
        {"paths": [], "cycles": {"step": [10], "counts": [[]]}},
        {"paths": ["a"], "cycles": {"step": [0], "counts": [[0]]}},
    ],
)
def test_empty_history_is_a_picture_that_says_so(given):
    figure = plots.updates_over_time(given)
    assert message(figure) == "No cycle of training is recorded yet."
    assert drawn(figure)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"cycles": {}}, KeyError, "no 'paths'"),
        ({"paths": ["a"]}, KeyError, "no 'cycles'"),
        ({"paths": ["a"], "cycles": {"step": [1]}}, KeyError, "no 'counts'"),
        (
            {"paths": ["a"], "cycles": {"step": [1, 2], "counts": [[1]]}},
            ValueError,
            "1 counts for 2 steps",
        ),
        (
            {"paths": ["a"], "cycles": {"step": [1], "counts": [[1, 2]]}},
            ValueError,
            "counts of 2 leaves for 1 paths",
        ),
        (
            {"paths": ["a"], "cycles": {"step": [1, 2], "counts": [[3], [2]]}},
            ValueError,
            "counts must not fall",
        ),
        (
            {"paths": ["a"], "cycles": {"step": [2, 1], "counts": [[1], [2]]}},
            ValueError,
            "step must not fall",
        ),
    ],
)
def test_wrong_history(given, error, words):
    with pytest.raises(error, match=words):
        plots.updates_over_time(given)


def test_history_with_attributes():
    class Attributes(dict):
        paths = ["a"]
        cycles = {"step": [4], "counts": [[2]]}

    figure = plots.updates_over_time(Attributes())
    assert figure.axes[0].collections[0].get_array().tolist() == [[0.5]]


# Shares.


@all_sizes
def test_shares_of_layers_add_up(n):
    given = report(n)
    figure = plots.budget_share(given)
    axes = figure.axes[0]
    layers = {}
    for leaf in given.leaves:
        layers.setdefault(leaf.path.rpartition("/")[0], []).append(leaf)
    bars = [bar.get_width() for bar in axes.containers[0]]
    quota, even = (line.get_xdata() for line in axes.lines)
    for values in (bars, quota, even):
        assert sum(values) == pytest.approx(100)
    if len(layers) <= 40:
        assert labels(axes) == natural(layers)
        for i, name in enumerate(natural(layers)):
            count = sum(leaf.count for leaf in layers[name])
            assert bars[i] == pytest.approx(100 * count / given.updates)
            assert even[i] == pytest.approx(100 * len(layers[name]) / n)
    assert len(set(labels(axes))) == len(bars) <= 40
    assert axes.get_xlabel() == "share (%)"
    assert len(figure.legends[0].get_texts()) == 3
    assert drawn(figure)


def test_shares_before_the_first_step():
    figure = plots.budget_share(report(4, count=0, quota=0))
    assert [bar.get_width() for bar in figure.axes[0].containers[0]] == [0, 0]
    assert drawn(figure)


def test_no_leaves():
    empty = PriorityReport((), 0, 10, 0, 0)
    for figure in (
        plots.budget_share(empty),
        plots.counts_against_scores(empty),
        plots.cycle([], 10),
    ):
        assert message(figure) == "There are no leaves."


# Counts and scores.


@all_sizes
def test_points_are_scores_and_counts(n):
    given = report(n)
    figure = plots.counts_against_scores(given)
    axes = figure.axes[0]
    wanted = sorted((leaf.score, leaf.count) for leaf in given.leaves)
    if n <= 10:
        found = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(names) == sorted(paths(n))
        looks = {(line.get_marker(), line.get_color()) for line in axes.lines}
        assert len(looks) == n
    else:
        found = axes.collections[0].get_offsets()
        assert figure.axes[1].get_ylabel() == "depth of the leaf"
    np.testing.assert_allclose(sorted(map(tuple, found)), wanted)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("score", "updates so far")
    assert drawn(figure)


def test_points_per_unit():
    figure = plots.counts_against_scores(report(4, units=5, count=15))
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [3, 3, 3, 3]
    assert figure.axes[0].get_ylabel() == "updates so far per unit"


def test_gradient_norms_by_path_or_as_a_tree():
    given = report(4)
    flat = {path: float(i) for i, path in enumerate(paths(4))}
    tree = {}
    for path, value in flat.items():
        inner = tree
        *parents, last = path.split("/")
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = jnp.float32(value)
    figures = [plots.counts_against_scores(given, norms) for norms in (flat, tree)]
    for figure in figures:
        points = {
            line.get_label(): line.get_xdata()[0] for line in figure.axes[0].lines
        }
        assert points == flat
        assert figure.axes[0].get_xlabel() == "norm of the gradient"


def test_wrong_gradient_norms():
    given = report(4)
    flat = {path: 1.0 for path in paths(4)}
    first = paths(4)[0]
    with pytest.raises(ValueError, match=f"gradient_norms has no '{first}'"):
        plots.counts_against_scores(given, {"x": 1.0})
    with pytest.raises(ValueError, match=r"must be a scalar.*shape \(3,\)"):
        plots.counts_against_scores(given, {**flat, first: np.ones(3)})
    with pytest.raises(TypeError, match="int32"):
        plots.counts_against_scores(given, {**flat, first: np.int32(1)})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [4, 200])
def test_scores_that_are_not_finite_are_counted(n, bad):
    given = report(n)
    leaves = [dataclasses.replace(given.leaves[0], score=bad), *given.leaves[1:]]
    figure = plots.counts_against_scores(dataclasses.replace(given, leaves=leaves))
    axes = figure.axes[0]
    points = len(axes.lines) if n == 4 else len(axes.collections[0].get_offsets())
    assert points == n - 1
    assert f"1 of {n} leaves left out" in axes.get_title("left")
    assert drawn(figure)
    figure = plots.counts_against_scores(report(n, score=bad))
    assert message(figure) == "No leaf has a score that is finite."


def test_axes_are_logarithmic_where_it_helps():
    def scales(values):
        given = report(4)
        pairs = zip(given.leaves, values, strict=True)
        leaves = [dataclasses.replace(a, score=b, count=int(b)) for a, b in pairs]
        figure = plots.counts_against_scores(dataclasses.replace(given, leaves=leaves))
        assert drawn(figure)
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        assert low < min(values) and max(values) < high
        return axes.get_xscale(), axes.get_yscale()

    assert scales([1, 2, 3, 49]) == ("linear", "linear")
    assert scales([1, 20, 300, 4000]) == ("log", "log")
    assert scales([0, 20, 300, 40000]) == ("symlog", "symlog")
    assert scales([0, 0, 0, 0]) == ("linear", "linear")
    assert scales([1e-30, 1, 1e3, 1e8])[0] == "log"
    assert scales([-1, 1, 1e3, 1e8])[0] == "linear"  # a score of one's own


def test_rank_correlation():
    scipy = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, (2, 50)).astype(float)  # with ties
    wanted = scipy.spearmanr(x, y).statistic
    assert plots._rank_correlation(x, y) == pytest.approx(wanted)
    assert np.isnan(plots._rank_correlation(x, np.ones(50)))


# The schedule.


@pytest.mark.parametrize("recalc_every", [1, 3, 10, 300])
def test_cycle_draws_the_schedule(recalc_every):
    quotas = [0, 1, 2, 3, 7, 2 * recalc_every]
    figure = plots.cycle(quotas, recalc_every, list("abcdef"))
    axes = figure.axes[0]
    data = axes.images[0].get_array().filled(0)
    assert data.shape == (6, recalc_every)
    np.testing.assert_array_equal(data.sum(axis=1), quotas)
    due = cycle_masks(np.array(quotas), ranking(recalc_every))[1:]  # the first is full
    np.testing.assert_array_equal(data.T[1:] > 0, due)
    assert labels(axes) == list("abcdef")
    assert axes.get_xlabel().startswith("step of the cycle")
    if recalc_every <= 24:
        found = {
            (int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text())
            for t in axes.texts
        }
        assert found == {(i, r): data[i, r] for i, r in np.argwhere(data)}
    else:
        assert not axes.texts
    assert drawn(figure)


@all_sizes
def test_cycle_of_many_leaves(n):
    names = paths(n)
    quotas = np.random.default_rng(n).integers(0, 20, n)
    figure = plots.cycle(quotas, 8, names)
    axes = figure.axes[0]
    data = axes.images[0].get_array().filled(0)
    rows = [names.index(name) for name in natural(names)]
    if n <= 256:
        np.testing.assert_array_equal(data.sum(axis=1), quotas[rows])
    else:
        means = quotas[rows].reshape(-1, 16).mean(axis=1)
        np.testing.assert_allclose(data.sum(axis=1), means)
    assert len(set(labels(axes))) == len(labels(axes)) <= 48
    assert drawn(figure)


def test_cycle_without_quotas():
    assert drawn(plots.cycle([0, 0], 4))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (([1], 0), ValueError, "recalc_every"),
        (([1], 2.0), TypeError, "recalc_every"),
        (([-1], 2), ValueError, "quotas must be >= 0, got -1"),
        (([0.5], 2), TypeError, "quotas must be integers"),
        (([[1]], 2), ValueError, "one axis"),
        (([1, 2], 2, ["a"]), ValueError, "1 paths for 2 quotas"),
    ],
)
def test_wrong_cycle(arguments, error, words):
    with pytest.raises(error, match=words):
        plots.cycle(*arguments)


# Runs.


def run(accuracy, spent, **more):
    return {"eval_accuracy": accuracy, "flops_spent": spent, **more}


def test_runs_side_by_side():
    runs = {
        f"run {i}": run([0.5, None, 0.9], [(i + 1) * 1e9 * e for e in (1, 2, 3)])
        for i in range(9)
    }
    figure = plots.accuracy_against_flops(runs)
    axes = figure.axes[0]
    assert len(axes.lines) == 9
    for i, line in enumerate(axes.lines):
        np.testing.assert_allclose(line.get_ydata(), [50, 90])
        np.testing.assert_allclose(line.get_xdata(), [(i + 1) * 1e9, (i + 1) * 3e9])
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in axes.lines}
    assert len(looks) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert axes.get_xlabel() == "cost so far (GFLOPs)"
    assert axes.get_ylabel() == "eval accuracy (%)"
    assert drawn(figure)


def test_one_history_will_do():
    figure = plots.accuracy_against_flops(run([0.5], [1e9]))
    assert len(figure.axes[0].lines) == 1
    assert drawn(figure)


def test_saved_history():
    saved = json.loads(json.dumps({"epochs": run([0.5], [1e9]), "paths": []}))
    (line,) = plots.accuracy_against_flops({"saved": saved}).axes[0].lines
    assert line.get_ydata().tolist() == [50]


def test_other_metrics_and_units():
    runs = {"a": {"loss": [2.0, 1.0], "flops_spent": [10.0, 20.0]}}
    axes = plots.accuracy_against_flops(runs, "loss", unit="ms").axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 1]
    assert axes.get_ylabel() == "loss"
    assert axes.get_xlabel() == "cost so far (ms)"


def test_costs_that_spread_are_logarithmic():
    runs = {"a": run([0.5, 0.6], [1e6, 2e6]), "b": run([0.5, 0.6], [1e9, 2e9])}
    figure = plots.accuracy_against_flops(runs)
    assert figure.axes[0].get_xscale() == "log"
    assert drawn(figure)


def test_empty_runs():
    for runs in ({}, {"a": run([], [])}, {"a": run([None, np.nan], [1e9, 2e9])}):
        figure = plots.accuracy_against_flops(runs)
        assert message(figure) == "No run has eval_accuracy at a known cost yet."


def test_wrong_runs():
    with pytest.raises(KeyError, match="run 'a' has no 'eval_accuracy'"):
        plots.accuracy_against_flops({"a": {"flops_spent": []}})
    with pytest.raises(KeyError, match="run 'a' has no 'flops_spent'"):
        plots.accuracy_against_flops({"a": {"eval_accuracy": []}})
    with pytest.raises(ValueError, match="1 values of eval_accuracy for 2"):
        plots.accuracy_against_flops({"a": run([0.5], [1, 2])})
    with pytest.raises(ValueError, match="running total"):
        plots.accuracy_against_flops({"a": run([0.5, 0.6], [2, 1])})


# Labels and groups.

part = st.text("ab01_$ é", min_size=1, max_size=12)
many_paths = st.lists(st.lists(part, max_size=6).map("/".join), max_size=60)


@hypothesis.given(many_paths, st.integers(12, 40))
@hypothesis.settings(deadline=None, max_examples=200)
def test_short_paths_are_short_and_differ(names, width):
    short = plots.short_paths(names, width)
    assert len(set(short)) == len(short) == len(names)
    assert all(len(label) <= width for label in short)
    for name, label in zip(names, short, strict=True):
        if len(name) <= width and names.count(name) == 1:
            # Only what looks like another label is changed.
            assert label == name or name in short


def test_short_paths_keep_what_differs():
    names = [f"encoder/layers/layer_{i}/attention/query/kernel" for i in range(120)]
    short = plots.short_paths(names, 32)
    for i, label in enumerate(short):
        assert f"_{i}/" in label and label.endswith("kernel")
        assert label.startswith("enc") and len(label) <= 32
    assert plots.short_paths(["a\nb", "a\x00b", "\ud800"]) == [
        r"a\nb",
        r"a\x00b",
        r"\ud800",
    ]
    with pytest.raises(ValueError, match="width"):
        plots.short_paths([], 3)


@hypothesis.given(many_paths, st.integers(1, 20))
@hypothesis.settings(deadline=None, max_examples=200)
def test_groups_hold_each_leaf_once(names, most):
    groups = plots._fold(names, most)
    members = [i for group in groups for i in group.members]
    assert len(groups) <= max(most, 0) and all(group.members for group in groups)
    assert members == plots._natural_order(names)


def test_flat_names_are_grouped_evenly():
    groups = plots._fold(FLAT, 40)
    sizes = {len(group.members) for group in groups}
    assert len(groups) > 30 and max(sizes) - min(sizes) <= 1
    assert groups[0].name == "w0 to w16"
    found = labels(plots.cycle([1] * len(FLAT), 4, FLAT).axes[0])  # of runs of runs
    assert found[0].startswith("w0 to w") and found[-1].endswith(" to w699")
    assert all(label.count(" to ") == 1 for label in found)


def test_strange_paths_are_drawn_as_they_are():
    names = ["$x_1^", "__hidden__", "a\nb", "x" * 200, "_", "<b>&amp;"]
    given, _ = history(names)
    figures = [plots.updates_over_time(given), plots.cycle([1] * 6, 4, names)]
    for figure in figures:
        assert drawn(figure)
        assert {"$x_1^", "__hidden__", r"a\nb"} <= set(labels(figure.axes[0]))
    runs = {name: run([0.5], [1e9]) for name in names}
    figure = plots.accuracy_against_flops(runs)
    assert drawn(figure)
    assert len(figure.legends[0].get_texts()) == len(names)


# What a figure leaves behind.


def test_figures_are_deterministic_and_nothing_is_global():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules

    def all_figures():
        given, _ = history(paths(20))
        return [
            plots.updates_over_time(given),
            plots.budget_share(report(20)),
            plots.counts_against_scores(report(20)),
            plots.cycle(range(20), 10),
            plots.accuracy_against_flops({"a": run([0.5, 0.6], [1e9, 2e9])}),
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = ([drawn(x) for x in all_figures()] for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "priorityprop_jax\[plots\]"'):
        plots.cycle([1, 2], 3)


def test_colors_get_darker_with_the_value():
    colors = plots._colormap()(np.linspace(0, 1, 50))[:, :3]
    luminance = colors**2.2 @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) < 0).all()
    assert luminance[0] < 0.7  # told from white

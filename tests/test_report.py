"""What `priority_report` says, next to sums that are made without it."""

import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import helpers
from priorityprop_jax import (
    prioritize,
    priority_prop,
    priority_report,
    PriorityPropState,
)


RECALC = 4
PARAMS = {
    "Dense_0": {"bias": np.ones(4), "kernel": np.ones((3, 4))},
    "Dense_1": {"bias": np.ones(()), "kernel": np.ones((4, 2))},
}
PATHS = ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"]
UNITS = {"leaf": [1, 1, 1, 1], "axis": [4, 3, 1, 4], "element": [4, 12, 1, 8]}
HEAD = ["leaf", "shape", "depth", "score", "count", "quota", "share"]

all_units = pytest.mark.parametrize("units", UNITS)


def budget(step):
    """Half of everything; in the third cycle more than `max_updates` allows."""
    return jnp.where(step < 2 * RECALC, 0.5, 1.0)


@functools.cache
def transformation(units):
    return priority_prop(
        budget,
        max_updates=3,
        recalc_every=RECALC,
        units=helpers.units_of(units, PARAMS),
        depth_factor=0.0,
    )


def gradients(step):
    return helpers.random_like(jax.tree.map(jnp.float32, PARAMS), step)


def times(update, gradient, units):
    """How many updates the units of a leaf got, read off the update itself."""
    m = np.round(np.asarray(update) / np.asarray(gradient)).astype(int)
    np.testing.assert_allclose(update, m * np.asarray(gradient), rtol=1e-6)
    if units == "element":
        return m.sum()
    rows = m.reshape(len(m) if units == "axis" and m.ndim else 1, -1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].sum()


@functools.cache
def trained(units):
    """The states after each of three cycles' steps, and the updates of each leaf."""
    tx = transformation(units)
    states, given = [tx.init(gradients(0))], []
    for step in range(3 * RECALC):
        g = gradients(step)
        updates, state = tx.update(g, states[-1])
        states.append(state)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(g), strict=True)
        given.append([times(u, x, units) for u, x in pairs])
    return states, np.array(given)


def by_path(report, name):
    """One field of all leaves, in the order of the params."""
    found = {leaf.path: getattr(leaf, name) for leaf in report.leaves}
    assert len(found) == len(report.leaves)
    return [found[path] for path in PATHS]


# Numbers


@all_units
@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_counts_and_quotas_are_those_of_the_updates(units, step):
    states, given = trained(units)
    report = priority_report(states[step], PARAMS)
    cycle = (step - 1) // RECALC
    counts, quotas = given[:step].sum(0), given[cycle * RECALC :][:RECALC].sum(0)
    assert by_path(report, "count") == counts.tolist()
    assert by_path(report, "quota") == quotas.tolist()
    np.testing.assert_allclose(by_path(report, "share"), counts / counts.sum())
    assert sum(leaf.share for leaf in report.leaves) == pytest.approx(1)
    assert report.updates == counts.sum()
    assert (report.step, report.recalc_every) == (step, RECALC)


@all_units
def test_what_the_bounds_leave_unspent(units):
    states, _ = trained(units)
    n = sum(UNITS[units])
    half, full = (priority_report(states[i], PARAMS) for i in (5, 9))
    assert (half.budget, half.unspent) == (n * RECALC // 2, 0)
    assert (full.budget, full.unspent) == (n * RECALC, n * (RECALC - 3))
    assert sum(leaf.quota for leaf in full.leaves) == 3 * n


@all_units
def test_units_and_scores(units):
    """Norms over a unit, as no unit had an update before; their mean over a leaf."""
    report = priority_report(trained(units)[0][1], PARAMS)
    assert by_path(report, "units") == UNITS[units] and report.units == sum(
        UNITS[units]
    )
    shapes = [np.shape(x) for x in jax.tree.leaves(PARAMS)]
    assert by_path(report, "shape") == shapes
    assert by_path(report, "depth") == [1, 1, 0, 0]
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients(0))]
    expected = [
        np.mean(np.linalg.norm(g.reshape(n, -1), axis=1))
        for g, n in zip(leaves, UNITS[units], strict=True)
    ]
    np.testing.assert_allclose(by_path(report, "score"), expected, rtol=1e-6)


@all_units
def test_sorted_by_priority(units):
    for state in trained(units)[0][1::3]:
        scores = [leaf.score for leaf in priority_report(state, PARAMS).leaves]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 4


def test_equal_scores_in_the_order_of_the_params():
    report = priority_report(trained("leaf")[0][0], PARAMS)
    assert [leaf.path for leaf in report.leaves] == PATHS


@all_units
def test_nonfinite_gradients_seen(units):
    """They are counted in units, get the minimum, and leave the others alone."""
    tx, g = transformation(units), gradients(0)
    bad = g["Dense_0"]["kernel"].at[1, 2].set(jnp.nan).at[2, 0].set(-jnp.inf)
    g["Dense_0"]["kernel"] = bad
    _, state = tx.update(g, tx.init(g))
    report = priority_report(state, PARAMS)
    seen = {"leaf": 1, "axis": 2, "element": 2}[units]
    assert by_path(report, "nonfinite") == [0, seen, 0, 0]
    assert report.nonfinite == seen
    assert f"non-finite gradients seen: {seen}" in str(report)
    assert np.isfinite(by_path(report, "score")).all()
    assert by_path(report, "count")[1] == UNITS[units][1] - seen
    if units == "leaf":
        assert by_path(report, "quota")[1] == 1
    for _ in range(RECALC):  # to the first step of the next cycle
        _, state = tx.update(g, state)
    assert priority_report(state, PARAMS).nonfinite == 2 * seen


@all_units
def test_before_the_first_step(units):
    report = priority_report(trained(units)[0][0], PARAMS)
    assert by_path(report, "units") == UNITS[units]
    assert (report.step, report.updates, report.budget, report.unspent) == (0, 0, 0, 0)
    zeros = {"score": 0.0, "count": 0, "quota": 0, "share": 0.0, "nonfinite": 0}
    for name, value in zeros.items():
        assert by_path(report, name) == [value] * 4
    assert "0 updates of" in str(report)


# Any number of leaves


def random_state(tx, params, seed=0):
    """A state of `tx` with counts, quotas and scores out of a hat."""
    rng = np.random.default_rng(seed)
    state = tx.init(params)
    mine = helpers.ours(state)
    draw = lambda x: rng.integers(1, 200, x.shape).astype(x.dtype)
    filled = mine._replace(
        step=np.int32(150),
        counts=jax.tree.map(draw, mine.counts),
        quotas=jax.tree.map(draw, mine.quotas),
        scores=jax.tree.map(lambda x: rng.random(x.shape, np.float32), mine.scores),
        nonfinite=draw(mine.nonfinite),
        budget=np.int32(10**6),
    )
    is_ours = lambda x: isinstance(x, PriorityPropState)
    return jax.tree.map(lambda x: filled if is_ours(x) else x, state, is_leaf=is_ours)


def shapes(names):
    """Nested params, no arrays: ``a/b`` is b in a."""
    out = {}
    for name in names:
        *modules, last = name.split("/")
        node = functools.reduce(lambda d, k: d.setdefault(k, {}), modules, out)
        node[last] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    return out


def report_of(names):
    params = shapes(names)
    return priority_report(random_state(priority_prop(budget=0.5), params), params)


PARTS = ("attn/key", "attn/out", "attn/query", "attn/value", "mlp/down", "mlp/up")
DEEP = [f"block_{i}/{part}/kernel" for i in range(333) for part in PARTS]
DEEP += ["embed/table", "head/kernel"]


@functools.cache
def deep_report():
    assert len(DEEP) == 2000
    return report_of(DEEP)


def rows_of(text):
    return [re.split(r"\s{2,}", line) for line in text.splitlines()]


def test_four_leaves_as_a_table():
    """All leaves, in aligned columns, with the numbers of the report."""
    report = priority_report(trained("axis")[0][11], PARAMS)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 4 + 2
    assert max(map(len, lines)) <= 88
    head, *rows = rows_of("\n".join(lines[:5]))
    assert head == HEAD
    for row, leaf in zip(rows, report.leaves, strict=True):
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        assert row[:3] == [leaf.path, shape, str(leaf.depth)]
        assert float(row[3]) == pytest.approx(leaf.score, rel=0.01)
        assert [int(x) for x in row[4:6]] == [leaf.count, leaf.quota]
        assert float(row[6].removesuffix("%")) == pytest.approx(
            100 * leaf.share, abs=0.05
        )
    # Names start, and numbers end, in the same column.
    starts = [[m.start() for m in re.finditer(r"\S+", x)] for x in lines[:5]]
    ends = [[m.end() for m in re.finditer(r"\S+", x)] for x in lines[:5]]
    assert len({tuple(s[:2]) for s in starts}) == 1
    assert len({tuple(e[2:]) for e in ends}) == 1
    n = sum(UNITS["axis"])
    assert f"{report.updates} updates of {n} units in 11 steps" in lines[5]
    assert f"({report.updates / (11 * n):.1%} of" in lines[5]
    assert f"budget {4 * n}, {n} unspent" in lines[6]


def test_two_thousand_leaves_are_abridged():
    """Top and bottom, and groups whose sums are those of all leaves."""
    report = deep_report()
    text = str(report)
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 110
    for leaf in (*report.leaves[:10], *report.leaves[-5:]):
        assert re.search(rf"^{leaf.path} .* {leaf.quota} ", text, re.M), leaf.path
    assert len(re.findall(r"^block_\d+/", text, re.M)) <= 15
    shown = {row[0]: row[1:] for row in rows_of(text) if len(row) == 6}
    assert shown.pop("group") == ["leaves", "score", "count", "quota", "share"]
    assert len(shown) == len(PARTS) + 2
    for part in PARTS:
        pattern = re.compile(rf"block_\d+/{part}/kernel")
        own = [leaf for leaf in report.leaves if pattern.fullmatch(leaf.path)]
        count = f"{sum(leaf.count for leaf in own):,}"
        quota = f"{sum(leaf.quota for leaf in own):,}"
        row = shown[f"block_*/{part}/kernel"]
        assert row[0] == "333" and row[2:4] == [count, quota]
        score = np.mean([leaf.score for leaf in own])
        assert float(row[1]) == pytest.approx(score, rel=0.01)
    shares = [float(row[4].removesuffix("%")) for row in shown.values()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_two_thousand_groups_are_abridged_too():
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [f"{x}{y}{z}" for x in letters for y in letters for z in letters[:3]]
    report = report_of(names[:2000])
    text = str(report)
    assert len(text.splitlines()) <= 60
    assert "(2000)" in text and "... and 1980 more groups" in text
    # The largest shares come first.
    best = max(report.leaves, key=lambda leaf: leaf.share)
    first = next(row for row in rows_of(text) if len(row) == 6 and row[0] != "group")
    assert first[5] == f"{best.share:.1%}"


@pytest.mark.parametrize("n", [40, 41])
def test_where_abridging_starts(n):
    names = [f"layer_{i}/kernel" for i in range(n)]
    report = report_of(names)
    shown = [name for name in names if re.search(rf"^{name} ", str(report), re.M)]
    assert len(shown) == (n if n == 40 else 15)
    assert len(report.to_markdown().splitlines()) == n + 5
    assert len(report.to_dict()["leaves"]) == len(report.to_pandas()) == n


def test_long_names_are_shortened_in_the_middle():
    name = "outermost/" + "/".join(f"inner_{i}" for i in range(20)) + "/kernel"
    report = report_of([name, "b"])
    assert report.leaves[0].path == name or report.leaves[1].path == name
    assert max(map(len, str(report).splitlines())) <= 110
    assert re.search(r"^outermost.*\.\.\..*inner_19/kernel ", str(report), re.M)
    assert name in report.to_markdown()


# Other forms


def test_to_dict_is_json():
    for report in (deep_report(), priority_report(trained("element")[0][9], PARAMS)):
        found = report.to_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        for name in ("step", "recalc_every", "budget", "unspent", "units"):
            assert found[name] == getattr(report, name)
        assert found["updates"] == sum(leaf.count for leaf in report.leaves)
        assert found["nonfinite"] == sum(leaf.nonfinite for leaf in report.leaves)
        for entry, leaf in zip(found["leaves"], report.leaves, strict=True):
            assert entry == dataclasses.asdict(leaf) | {"shape": list(leaf.shape)}


def cells_of(line):
    """Of a row of Markdown, as GitHub reads it: an escaped bar is text."""
    assert line.startswith("| ") and line.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def check_markdown(report):
    table, below = report.to_markdown().split("\n\n")
    head, rule, *rows = map(cells_of, table.splitlines())
    assert head == HEAD
    assert all(re.fullmatch("---:?", cell) for cell in rule)
    assert {len(row) for row in (head, rule, *rows)} == {len(HEAD)}
    assert [row[0].replace("\\|", "|") for row in rows] == [
        leaf.path for leaf in report.leaves
    ]
    assert [row[4] for row in rows] == [f"{leaf.count:,}" for leaf in report.leaves]
    assert below in str(report)


def test_to_markdown_is_a_table():
    check_markdown(priority_report(trained("axis")[0][6], PARAMS))
    check_markdown(deep_report())


def test_to_markdown_escapes_names():
    check_markdown(report_of(["a|b/kernel", "c", "|"]))


def test_to_pandas():
    report = deep_report()
    frame = report.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    names = [field.name for field in dataclasses.fields(report.leaves[0])]
    assert list(frame.columns) == names
    assert len(frame) == 2000
    assert frame["count"].sum() == report.updates
    assert frame["score"].is_monotonic_decreasing
    assert frame["share"].sum() == pytest.approx(1)
    kinds = {"path": "OU", "shape": "O", "score": "f", "share": "f"}
    assert all(frame[n].dtype.kind in kinds.get(n, "i") for n in names)
    assert frame["shape"][0] == (2, 3)


def test_without_pandas(monkeypatch):
    """All the rest works, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    report = priority_report(trained("leaf")[0][1], PARAMS)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        report.to_pandas()
    assert str(report) and report.to_markdown() and report.to_dict()


@pytest.mark.parametrize("units", ["axis", "element"])
def test_large_numbers(units):
    """Sums go beyond float32 and int32; counts are exact."""
    params = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)}
    tx = priority_prop(
        budget=0.5, units=helpers.units_of(units, params), max_updates=1000
    )
    state = tx.init(params)
    full = lambda tree, value: jax.tree.map(
        lambda x: np.full(x.shape, value, x.dtype), tree
    )
    state = state._replace(
        scores=full(state.scores, 3e38), counts=full(state.counts, 2**31 - 1)
    )
    report = priority_report(state, params)
    n = {"axis": 3, "element": 6}[units]
    assert report.leaves[0].score == pytest.approx(3e38)
    assert report.updates == n * (2**31 - 1)
    json.dumps(report.to_dict(), allow_nan=False)
    assert f"{n * (2**31 - 1):,} updates" in str(report)


# Any state


def check_same(report, expected):
    assert dataclasses.astuple(report) == dataclasses.astuple(expected)


SHARE = {"budget": 0.5, "recalc_every": RECALC}
WRAPPERS = {
    "chain": lambda tx: optax.chain(
        optax.clip(1.0), optax.chain(tx, optax.scale(1.0)), optax.adam(0.1)
    ),
    "named_chain": lambda tx: optax.named_chain(("a", optax.adam(0.1)), ("b", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda _: "a", params),
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@all_units
def test_inside_wrappers(wrapper, units):
    tx = priority_prop(**SHARE, units=helpers.units_of(units, PARAMS))
    params = jax.tree.map(jnp.float32, PARAMS)
    expected = priority_report(random_state(tx, params), params)
    found = priority_report(random_state(WRAPPERS[wrapper](tx), params), params)
    check_same(found, expected)
    assert found.updates > 0


@all_units
def test_state_of_prioritize(units):
    settings = SHARE | {"units": helpers.units_of(units, PARAMS)}
    params = jax.tree.map(jnp.float32, PARAMS)
    around = prioritize(optax.adam(0.1), **settings, resting="decay")
    expected = priority_report(random_state(priority_prop(**settings), params), params)
    check_same(priority_report(random_state(around, params), params), expected)


def test_masked_params_are_left_out():
    """The params are given as the transformation saw them."""
    params = jax.tree.map(jnp.float32, PARAMS)
    tx = optax.masked(priority_prop(**SHARE), {"Dense_0": False, "Dense_1": True})
    state = random_state(tx, params)
    masked = params | {"Dense_0": optax.MaskedNode()}
    report = priority_report(state, masked)
    assert sorted(leaf.path for leaf in report.leaves) == PATHS[2:]
    check_same(priority_report(state, params | {"Dense_0": None}), report)
    with pytest.raises(ValueError, match=r"params has 4 leaves.* for 2;.*MaskedNode"):
        priority_report(state, params)


def test_index_chooses_among_several():
    params = jax.tree.map(jnp.float32, PARAMS)
    parts = {"a": priority_prop(**SHARE), "b": prioritize(optax.sgd(0.1), **SHARE)}
    tx = optax.partition(parts, {"Dense_0": "a", "Dense_1": "b"})
    state = tx.init(params)
    first = params | {"Dense_1": optax.MaskedNode()}
    second = params | {"Dense_0": optax.MaskedNode()}
    paths = lambda report: [leaf.path for leaf in report.leaves]
    for index, masked, expected in (
        (0, first, PATHS[:2]),
        (1, second, PATHS[2:]),
        (-1, second, PATHS[2:]),
    ):
        assert paths(priority_report(state, masked, index=index)) == expected
    with pytest.raises(ValueError, match=r"holds 2 .*index=0\.\.1"):
        priority_report(state, params)
    with pytest.raises(ValueError, match=r"index must be in \[0, 2\).*got 2"):
        priority_report(state, first, index=2)


def test_no_state_and_other_params():
    with pytest.raises(ValueError, match="holds no PriorityPropState"):
        priority_report(optax.adam(0.1).init(PARAMS), PARAMS)
    state = priority_prop(**SHARE).init(jax.tree.map(jnp.float32, PARAMS))
    with pytest.raises(ValueError, match="params has 2 leaves.* for 4"):
        priority_report(state, PARAMS["Dense_0"])


@pytest.mark.parametrize("units", ["leaf", "element"])
@pytest.mark.parametrize("params", [{}, (), None, {"a": {}, "b": None}])
def test_empty_trees(params, units):
    tx = priority_prop(**SHARE, units=units)
    report = priority_report(tx.init(params), params)
    assert report.leaves == () and report.units == report.updates == 0
    assert len(str(report).splitlines()) == 3
    assert report.to_dict()["leaves"] == []
    assert len(report.to_markdown().splitlines()) == 5
    assert report.to_pandas().empty


@pytest.mark.parametrize("units", ["leaf", "element"])
def test_single_arrays_and_arrays_of_nothing(units):
    root = jax.ShapeDtypeStruct((3,), jnp.float32)
    tx = priority_prop(**SHARE, units=units)
    report = priority_report(random_state(tx, root), root)
    assert [leaf.path for leaf in report.leaves] == ["(root)"]
    assert report.leaves[0].share == 1
    nothing = {"a": jnp.ones((0, 3)), "b": jnp.ones(2)}
    report = priority_report(random_state(tx, nothing), nothing)
    empty = next(leaf for leaf in report.leaves if leaf.path == "a")
    assert empty.units == (0 if units == "element" else 1)
    assert (empty.shape, np.isfinite(empty.score)) == ((0, 3), True)


def test_flax_states():
    """Of nnx, where the state is made of variables, and of linen's TrainState."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(priority_prop(**SHARE, units="element"), optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    report = priority_report(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert [(x.path, x.units) for x in report.leaves] == [("bias", 2), ("kernel", 6)]
    params = jax.tree.map(jnp.float32, PARAMS)
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    report = priority_report(train_state.opt_state, train_state.params)
    assert [leaf.path for leaf in report.leaves] == PATHS

"""The page: valid, alone, safe, the same each time, and with the numbers given."""

import base64
import dataclasses
import html.parser
import re
import sys
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import optax
import pytest

from priorityprop_jax import (
    backward_costs,
    make_train_step,
    prioritize,
    priority_prop,
    priority_report,
    PriorityReport,
)
from priorityprop_jax.report import LeafReport


pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br", "hr", "link", "input"}
NASTY = ["<script>alert(1)</script>", 'a"b', "x&y", "a\nb", "\ud800", "$x$"]


class Page(html.parser.HTMLParser):
    """Checks nesting; keeps tables, images and texts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.images, self.tables = [], [], [], []
        self.rows, self.text, self.cell = [], [], None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] in ("p", "li", "figcaption", "summary"):
            self.text.append(data)


def read(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    return Page(text), text


def leaf(path, **changed):
    fields = dict(units=1, depth=0, score=1.5, count=3, quota=2, share=0.5, nonfinite=0)
    return LeafReport(path=path, shape=(3, 4), **{**fields, **changed})


def report(*leaves, step=10, **changed):
    return PriorityReport(leaves, step, 4, 8, 1, **changed)


TWO = report(leaf("a/w", count=4), leaf("b/w", count=2, score=0.0))
CYCLES = {"step": [5, 10], "counts": [[2, 1], [4, 2]]}
HISTORY = {
    "paths": ["a/w", "b/w"],
    "cycles": CYCLES,
    "epoch": [0, 1],
    "step": [5, 10],
    "loss": [2.0, 1.5],
    "eval_loss": [2.5, 2.0],
    "eval_accuracy": [0.5, None],
    "seconds": [1.5, 2.5],
    "flops_spent": [1e9, 2e9],
    "flops_full": [2e9, 4e9],
    "updates": [[2, 1], [4, 2]],
    "skipped": [0, 1],
}


def test_page_has_all_that_was_given(tmp_path):
    TWO.html(tmp_path / "page.html", HISTORY)
    page, _ = read(tmp_path / "page.html")
    assert len(page.images) == 5
    runs, leaves = page.tables
    assert [row[0] for row in leaves] == ["leaf", "a/w", "b/w"]
    row = dict(zip(leaves[0], leaves[1], strict=True))
    assert row["shape"] == "3×4"
    assert (row["score"], row["updates"], row["share"]) == ("1.5", "4", "50.0%")
    row = dict(zip(runs[0], runs[1], strict=True))
    assert row["run"] == "this run"
    assert (row["epochs"], row["steps"], row["seconds"]) == ("2", "10", "2.5")
    assert (row["cost"], row["share of full"]) == ("2 GFLOPs", "50.0%")
    assert (row["eval accuracy"], row["loss"]) == ("0.5", "1.5")
    assert row["steps skipped"] == "1"
    text = " ".join(page.text)
    assert "The model has 2 leaves. In 10 steps there were 6 updates, 30.0%" in text
    assert "a/w (50.0%)" in text
    assert "All gradients were finite" in text


def test_page_of_a_report_alone(tmp_path):
    TWO.html(str(tmp_path / "page.html"))
    page, _ = read(tmp_path / "page.html")
    assert len(page.images) == 3  # no history: nothing over time, no runs
    assert len(page.tables) == 1


def test_page_before_the_first_step_and_of_nothing(tmp_path):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    fresh = priority_report(priority_prop(budget=5).init(params), params)
    for given in (fresh, report(step=0)):
        given.html(tmp_path / "page.html")
        page, _ = read(tmp_path / "page.html")
        assert "No step of training is done yet." in " ".join(page.text)
        assert len(page.images) == 3


def test_page_with_an_empty_history(tmp_path):
    empty = {"paths": [], "cycles": {"step": [], "counts": []}}
    TWO.html(tmp_path / "page.html", empty)
    page, _ = read(tmp_path / "page.html")
    assert len(page.images) == 4  # says that nothing is recorded; no costs, no runs


def test_page_needs_nothing_but_itself(tmp_path):
    TWO.html(tmp_path / "page.html", HISTORY, {"full": HISTORY})
    page, text = read(tmp_path / "page.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert not [a for _, attrs in page.tags for a in attrs if a in ("href", "onload")]
    policy = [attrs for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy[0]["content"].startswith("default-src 'none'")
    for image in page.images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert image["alt"]
        for node in root.iter():  # nothing is loaded from elsewhere
            for name, value in node.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    assert style.count("{") == style.count("}")


def test_pages_are_equal(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        TWO.html(tmp_path / "a.html", HISTORY)  # the user's style stays the user's
        assert dict(matplotlib.rcParams) == before
    TWO.html(tmp_path / "b.html", HISTORY)
    pages = [(tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_paths_and_names_are_escaped(tmp_path):
    given = report(*map(leaf, NASTY))
    cycles = {"step": [5], "counts": [[1] * len(NASTY)]}
    past = {**HISTORY, "paths": NASTY, "cycles": cycles}
    given.html(tmp_path / "page.html", past, {"<b>&": HISTORY})
    page, text = read(tmp_path / "page.html")
    assert "<script" not in text and "<b>" not in text
    names = [row[0] for row in page.tables[-1][1:]]
    assert names == [*NASTY[:3], r"a\nb", r"\ud800", "$x$"]
    assert [row[0] for row in page.tables[0][1:]] == ["this run", "<b>&"]


def test_savings_and_their_notes(tmp_path):
    params = {"in": jnp.ones((4, 3)), "out": jnp.ones((3, 1))}
    loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"]) ** 2)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    costs = backward_costs(loss, params, x)
    tx = prioritize(optax.sgd(0.1), budget=0.5, recalc_every=4)
    step, state = make_train_step(loss, tx), tx.init(params)
    for _ in range(8):
        params, state, _ = step(params, state, x)
    given = priority_report(state, params, costs=costs, account=step.account)
    savings = given.savings
    assert savings is not None
    given.html(tmp_path / "page.html")
    page, _ = read(tmp_path / "page.html")
    rows = dict(page.tables[0][1:])
    assert rows["weight gradients that were left out"] == f"{savings.by_resting:.1%}"
    assert rows["in all"] == f"{1 - savings.spent / savings.full:.1%}"
    text = " ".join(page.text)
    assert f"{savings.speedup:.2f} times as much" in text and "exact sum" in text
    notes = dataclasses.replace(savings, notes=("Never <cut>.",), exact=False)
    dataclasses.replace(given, savings=notes).html(tmp_path / "page.html")
    page, _ = read(tmp_path / "page.html")
    assert "Never <cut>." in page.text
    assert "estimate" in " ".join(page.text)


def test_many_leaves(tmp_path):
    leaves = [leaf(f"block_{i}/w", score=float(-i), count=i) for i in range(300)]
    report(*leaves).html(tmp_path / "page.html")
    page, text = read(tmp_path / "page.html")
    first, rest = page.tables
    assert (len(first), len(rest)) == (41, 261)
    assert [row[0] for row in first[1:] + rest[1:]] == [x.path for x in leaves]
    assert "<summary>The other 260 leaves</summary>" in text


def test_leaves_of_many_units(tmp_path):
    report(leaf("a", units=3), leaf("b")).html(tmp_path / "page.html")
    page, _ = read(tmp_path / "page.html")
    assert "2 leaves with 4 units" in " ".join(page.text)
    assert "1 leaf of many units left out." in " ".join(page.text)
    report(leaf("a", units=3)).html(tmp_path / "page.html")  # no schedule to draw
    page, _ = read(tmp_path / "page.html")
    assert len(page.images) == 2


def test_runs_side_by_side(tmp_path):
    without = {k: v for k, v in HISTORY.items() if k != "eval_accuracy"}
    TWO.html(tmp_path / "page.html", HISTORY, {"mine": HISTORY, "other": without})
    page, _ = read(tmp_path / "page.html")
    assert [row[0] for row in page.tables[0][1:]] == ["mine", "other"]  # each once
    assert "eval loss" in page.tables[0][0]  # what both have
    saved = {"epochs": HISTORY, "cycles": CYCLES, "paths": ["a/w", "b/w"]}
    TWO.html(tmp_path / "page.html", saved, {"this run": HISTORY})
    page, _ = read(tmp_path / "page.html")
    assert [row[0] for row in page.tables[0][1:]] == ["this run'", "this run"]
    assert len(page.images) == 5


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(KeyError, match="cycles"):
        TWO.html(tmp_path / "page.html", {"paths": ["a/w", "b/w"]})
    with pytest.raises(ValueError, match="gradient_norms has no 'a/w'"):
        TWO.html(tmp_path / "page.html", gradient_norms={"a": 1.0})
    assert not list(tmp_path.iterdir())


def test_gradient_norms(tmp_path):
    TWO.html(tmp_path / "page.html", gradient_norms={"a": {"w": 1.0}, "b": {"w": 2.0}})
    page, _ = read(tmp_path / "page.html")
    assert any("norms of gradients" in image["alt"] for image in page.images)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('"priorityprop_jax[plots]"')):
        TWO.html(tmp_path / "page.html")

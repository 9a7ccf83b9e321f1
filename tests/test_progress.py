"""The bar: there for terminals, quiet elsewhere, and cheap."""

import io
import re
import sys
import types

import pytest

from priorityprop_jax.training import _progress
from priorityprop_jax.training._progress import Progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def replace_stderr(monkeypatch, stream):
    """For this module alone; that of `sys` is pytest's, anew before each test."""
    monkeypatch.setattr(_progress, "sys", types.SimpleNamespace(stderr=stream))


@pytest.fixture
def terminal(monkeypatch):
    pytest.importorskip("tqdm")
    stream = Stream(True)
    replace_stderr(monkeypatch, stream)
    monkeypatch.setattr(_progress, "_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def run(bar, steps=3):
    for step in range(1, steps + 1):
        bar.update(1, step, loss=0.25, budget_share=0.5, flops_saved=0.41)
    bar.write("a line")
    bar.close()
    bar.close()


def test_terminal(terminal):
    run(Progress(total=10, epochs=2))
    text = terminal.getvalue()
    last = text.split("\r")[-1]
    assert re.search(r"epoch 1/2 \|.*\| 3/10 steps, [\d:?]+ left, loss 0.25, ", text)
    assert "budget 50%, FLOPs saved 41%" in last
    assert "a line\n" in text
    assert text.endswith("\n")


def test_nothing_known(terminal):
    bar = Progress()
    bar.update(1, 1)
    bar.finish(1, 2, 0.5)
    bar.close()
    last = terminal.getvalue().split("\r")[-1]
    assert re.match(r"epoch 1 2 steps, [\d:]+, loss 0.5\s*$", last)


def test_resumed(terminal):
    bar = Progress(total=10, initial=6)
    bar.update(2, 7)
    bar.close()
    assert "7/10 steps" in terminal.getvalue()


def test_update_is_rare_but_the_end_is_shown(terminal, monkeypatch):
    monkeypatch.setattr(_progress, "_SECONDS", 3600.0)
    bar = Progress(total=100)
    for step in range(1, 100):
        bar.update(1, step, loss=1.0)
    assert terminal.getvalue().count("loss") == 1
    bar.finish(1, 100, 2.0)
    bar.close()
    assert "100/100" in terminal.getvalue() and "loss 2" in terminal.getvalue()


class Closed(Stream):
    def isatty(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize(
    ("stream", "enabled"),
    [(Stream(False), True), (Stream(True), False), (Closed(True), True), (None, True)],
)
def test_quiet(stream, enabled, monkeypatch):
    replace_stderr(monkeypatch, stream)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # is not even looked for
    run(Progress(enabled, total=10))
    assert stream is None or stream.getvalue() == ""


def test_only_the_first_process(terminal, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    run(Progress(total=10))
    assert terminal.getvalue() == ""


def test_without_tqdm(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.warns(UserWarning, match=r"priorityprop_jax\[trainer\]"):
        bar = Progress(total=10)
    run(bar)
    assert terminal.getvalue() == ""

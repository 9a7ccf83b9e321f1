"""`History`: columns of equal length, JSON and back, a record that stays small."""

import json

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from priorityprop_jax.training._history import History


NAMES = st.sampled_from(["loss", "accuracy", "eval_loss", "eval_accuracy", "step"])
ENTRIES = st.lists(st.dictionaries(NAMES, st.integers(-5, 5), min_size=1), max_size=6)


@given(entries=ENTRIES)
def test_columns_are_as_long_as_there_were_epochs(entries):
    history = History(["w"])
    for entry in entries:
        history.append(entry)
    names = set().union(*entries)
    assert set(history) == names
    for name in names:
        assert history[name] == [entry.get(name) for entry in entries]


@given(
    entries=ENTRIES, cycles=st.integers(0, 5), stopped=st.sampled_from([None, "target"])
)
def test_json_and_back(entries, cycles, stopped):
    history = History(["a/w", "b"], name="a run")
    for entry in entries:
        history.append(entry)
    for i in range(cycles):
        history.append_cycle(10 * i, [i, 2 * i], [1, 2], [0.5, 0.25])
    history.stopped = stopped
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history and again.to_dict() == history.to_dict()
    assert (again.paths, again.name, again.stopped) == (["a/w", "b"], "a run", stopped)


@pytest.mark.parametrize("restart", [False, True])
def test_the_record_of_cycles_is_thinned(restart):
    history, asked = History(["w"]), 0
    for cycle in range(5000):
        if history.wants_cycle(cycle):
            asked += 1
            history.append_cycle(10 * (cycle + 1), [cycle], [1], [0.0])
        assert len(history.cycles["step"]) <= 512
        if restart and cycle == 2222:
            history = History.from_dict(history.to_dict())
    assert history.cycles["counts"] == [[c] for c in range(0, 5000, 16)]
    assert history.cycles["step"] == [10 * (c + 1) for c in range(0, 5000, 16)]
    assert asked < 512 + 4 * 256


def test_pandas():
    history = History(["a/w", "b"])
    history.append({"epoch": 0, "loss": 1.0, "updates": [3, 1]})
    history.append({"epoch": 1, "loss": 0.5, "updates": [6, 2], "eval_loss": 0.7})
    frame = history.to_pandas()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 2
    assert frame["updates/a/w"].tolist() == [3, 6]
    assert frame["updates/b"].tolist() == [1, 2]
    assert frame["eval_loss"].isna().tolist() == [True, False]
    assert len(History(["w"]).to_pandas()) == 0


def test_something_else_is_no_history():
    with pytest.raises(ValueError, match="lacks 'cycles', 'paths'"):
        History.from_dict({"epochs": {}})

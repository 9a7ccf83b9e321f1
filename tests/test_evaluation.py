"""The evaluation's harness, on a net that trains in no time; no clock is asserted."""

import argparse
import itertools
import json
import math
from types import SimpleNamespace

import evaluate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation import (
    _policies,
    _records,
    _runner,
    _statistics,
    _tables,
    _workload,
    char_transformer,
    mnist_cnn,
    mnist_mlp,
)
from evaluation._policies import ARMS, Settings
from evaluation._records import Key
from evaluation._runner import Step
from scipy import stats


def make_workload(**changes):
    """A plane through three layers, from points with labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    workload = _workload.Workload(
        name="mnist_mlp",  # one that the command knows
        init=lambda seed: mnist_mlp.init(seed, [6, 8, 8, 2]),
        loss=mnist_mlp.loss,
        batches=lambda seed, size, steps: (
            (x[i], y[i]) for i in _workload.shuffled(seed, len(x), size, steps)
        ),
        quality=mnist_mlp.accuracy(mnist_mlp.apply, x, y),
        targets=(0.6, 0.8),
        batch_size=32,
        learning_rate=1e-2,
        steps=30,
        evaluations=3,
    )
    return workload._replace(**changes)


def key(policy, purpose="test", **settings):
    given = {"learning_rate": 1e-2, "steps": 30, "batch_size": 32, "seed": 0}
    return Key("mnist_mlp", "small", policy, purpose, Settings(**{**given, **settings}))


def record(policy="adam", seed=0, seconds=(1.0, 2.0), quality=(0.7, 0.9), **changes):
    """A line as if from a run of two evaluations."""
    points = enumerate(zip(seconds, quality, strict=True), 1)
    return {
        "workload": "mnist_mlp",
        "scale": "small",
        "policy": policy,
        "purpose": "test",
        "seed": seed,
        "config": {"learning_rate": 0.1, "steps": 10, "batch_size": 32},
        "targets": [0.6, 0.8],
        "curve": [[5 * k, s, 2 * s, 100.0 * s, q, 0.5] for k, (s, q) in points],
        "diverged": False,
        "totals": {
            "cpu_s": seconds[-1],
            "wall_s": 2 * seconds[-1],
            "flops": 200.0,
            "compile_cpu_s": 0.0,
            "evaluation_s": 0.0,
        },
        **changes,
    }


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    """The setting would outlive the tests."""
    monkeypatch.setattr(_runner, "keep_memory", lambda: None)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `evaluate.py` on the small workload; returns what is on file."""
    monkeypatch.setattr(_workload, "load", lambda *_: (make_workload(), {}))

    def call(*argv):
        evaluate.main([*argv, "--core", "any", "--out", str(tmp_path)])
        return _records.read(tmp_path / "mnist_mlp.jsonl")

    return call


# --- the command


@pytest.mark.usefixtures("quick_compilation")
def test_run_resumes_after_a_line_that_was_cut_off(command, tmp_path, capsys):
    run = ("run", "mnist_mlp", "--policies", "adam,adam_default", "--seeds", "0-1")
    before = command(*run, "--steps", "20")
    assert [(r["policy"], r["seed"]) for r in before] == [
        ("adam", 0),
        ("adam_default", 0),
        ("adam", 1),
        ("adam_default", 1),
    ]
    path = tmp_path / "mnist_mlp.jsonl"
    path.write_bytes(path.read_bytes()[:-50])
    capsys.readouterr()
    after = command(*run, "--steps", "20")
    assert capsys.readouterr().out.count("on file") == 3
    assert [_records.key_of(r) for r in after] == [_records.key_of(r) for r in before]
    assert after[:3] == before[:3]
    # The same run gives the same curve, but for the clock.
    untimed = lambda r: [(p[0], *p[3:]) for p in r["curve"]]
    assert untimed(after[3]) == untimed(before[3])
    for line in path.read_bytes().splitlines():
        json.loads(line)  # nothing of the half line is left


def test_tune_then_run_takes_the_winner(command, monkeypatch):
    def fake(workload, arm, key):
        """Better and slower for larger rates and more steps."""
        rate, steps = key.settings[:2]
        config_names = ("learning_rate", "steps", "batch_size")
        quality, seconds = (0.2, 20 * rate + steps / 30), (0.5, steps * (1 + 50 * rate))
        line = record(arm.name, key.settings.seed, seconds, quality)
        config = dict(zip(config_names, key.settings, strict=False))
        return {**line, "purpose": key.purpose, "config": config}

    monkeypatch.setattr(_runner, "run", fake)
    tuned = command("tune", "mnist_mlp", "--policies", "adam,adam_default")
    assert len(tuned) == 9 + 3  # the default learning rate has only horizons
    assert {r["config"]["learning_rate"] for r in tuned if "def" in r["policy"]} == {
        1e-3
    }
    assert {r["purpose"] for r in tuned} == {"tune"}
    assert {r["seed"] for r in tuned} == {evaluate.TUNING_SEED}
    best = Settings(1e-2, 21, 32, evaluate.TUNING_SEED)  # 0.9: 0.2 + 0.7
    assert _records.winner([r for r in tuned if r["policy"] == "adam"], 0.8) == best
    (done,) = command("run", "mnist_mlp", "--policies", "adam", "--seeds", "3")[12:]
    assert _records.key_of(done).settings == best._replace(seed=3)


@pytest.mark.usefixtures("quick_compilation")
def test_horizons_are_stretched_to_the_flops_of_the_baseline(command):
    tune = ("tune", "mnist_mlp", "--steps", "20", "--learning-rates", "0.01")
    command(*tune, "--policies", "adam,freezeout")
    match = ("run", "mnist_mlp", "--match-flops", "--seeds", "0")
    adam, _, done = command(*match, "--policies", "freezeout")
    assert done["purpose"] == "match" and done["config"]["steps"] > 20
    spent, one_step = done["totals"]["flops"], adam["totals"]["flops"] / 20
    assert abs(spent - adam["totals"]["flops"]) < 2 * one_step
    with pytest.raises(SystemExit, match="needs tuning runs of random"):
        command(*match, "--policies", "random")


@pytest.mark.usefixtures("quick_compilation")
def test_tables_and_pictures_come_from_the_lines(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command("run", "mnist_mlp", "--policies", "muon,adam", "--seeds", "0-1")
    capsys.readouterr()
    command("table", "mnist_mlp")
    out = capsys.readouterr().out
    assert out.index("| adam |") < out.index("| muon |")
    assert "To quality 0.8" in out and "4 runs" in out
    command("plot", "mnist_mlp")
    assert (tmp_path / "mnist_mlp.png").read_bytes().startswith(b"\x89PNG")


def test_each_scale_has_its_own_targets(tmp_path):
    large = {**record(), "scale": "large", "targets": [0.25]}
    for line in (record(), large):
        _records.append(tmp_path / "embedding.jsonl", line)
    for scale, targets in [("small", (0.6, 0.8)), ("large", (0.25,))]:
        args = argparse.Namespace(workload="embedding", scale=scale, out=tmp_path)
        ((name, found, aims),) = evaluate._workloads(args)
        assert (name, len(found), aims) == ("embedding", 1, targets)
        assert found[0]["scale"] == scale


@pytest.mark.parametrize(
    "argv, message",
    [
        (("run", "mnist_mlp", "--policies", "adam,best"), "unknown best"),
        (
            ("run", "mnist_mlp", "--policies", "adam", "--steps", "1,2"),
            r"takes one steps for all seeds, got \[1, 2\]",
        ),
        (("table", "mnist_mlp"), "has no runs"),
    ],
)
def test_bad_arguments_are_named(command, argv, message):
    with pytest.raises(SystemExit, match=message):
        command(*argv)


@pytest.mark.parametrize(
    "name, scale, message",
    [("mnist", "small", "WORKLOAD must be one of"), ("mnist_mlp", "huge", "'huge'")],
)
def test_unknown_workloads_are_named(name, scale, message):
    with pytest.raises(ValueError, match=message):
        _workload.load(name, None, scale)


def test_seeds_and_grid_are_parsed():
    assert evaluate.seeds("0-2,7") == [0, 1, 2, 7]
    args = evaluate.arguments().parse_args(
        "tune mnist_mlp --policies adam --learning-rates 1e-3,0.1 --steps 5".split()
    )
    assert (args.learning_rates, args.steps) == ([1e-3, 0.1], [5])
    assert args.seeds == [evaluate.TUNING_SEED]


# --- arms


SLOW = (
    "prioritize_50",
    "taylor",
    "random",
    "no_count",
    "no_depth",
    "cyclic",
    "muon",
    "priority_prop",
)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "name",
    [
        *("adam", "costs_65", "freezeout", "autofreeze"),
        "schedule_free_adamw",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_an_arm_trains_and_counts_its_flops(name):
    found = _runner.run(make_workload(steps=60), ARMS[name], key(name, steps=60))
    assert [point[0] for point in found["curve"]] == [0, 20, 40, 60]
    assert found["curve"][-1][4] > 0.6
    assert not found["diverged"]
    for a, b in itertools.pairwise(found["curve"]):
        assert b[1] > a[1] and b[2] > a[2] and b[3] > a[3]
    totals = found["totals"]
    full = _policies.costs_of(make_workload(), 32).full
    assert totals["flops"] <= 60 * full * 1.000001
    assert (totals["flops"] < 59 * full) == (
        name not in ("adam", "priority_prop", "schedule_free_adamw", "muon")
    )
    assert totals["xla_flops"] > 0.9 * totals["flops"]
    assert totals["compiled_steps"] > 0
    json.dumps(found, allow_nan=False)


def test_account_agrees_with_the_compiler_where_matmuls_dominate():
    workload = make_workload(init=lambda seed: mnist_mlp.init(seed, [6, 64, 64, 2]))
    sgd = _policies.plain("sgd", lambda w, s: optax.sgd(s.learning_rate))
    settings = Settings(0.01, 3, 256, 0)
    totals = _runner.run(workload, sgd, key("sgd", **settings._asdict()))["totals"]
    params = workload.init(0)
    optimizer = 2 * sum(x.size for x in jax.tree.leaves(params))
    expected = 3 * (_policies.costs_of(workload, 256).full + optimizer)
    assert totals["xla_flops"] == pytest.approx(expected, rel=0.03)


@pytest.mark.usefixtures("quick_compilation")
def test_freezeout_is_adam_until_a_layer_freezes_and_then_leaves_it_alone():
    workload = make_workload(warmup=0.1)
    settings = Settings(1e-2, 20, 32, 0)
    layer = np.array(_policies._groups(workload, settings))
    ends = np.rint(20 * _policies.freeze_times(3, 0.5))
    assert ends.tolist() == [10, 14, 20]  # cubes of .794, .897, 1

    params = workload.init(0)
    tx = optax.scale_by_adam()
    state, leaves = tx.init(params), jax.tree.leaves(params)
    program = ARMS["freezeout"].start(workload, settings)
    run, differentiate = program.state, jax.jit(jax.grad(workload.loss))
    for i, batch in enumerate(workload.batches(0, 32, 20)):
        run = program.step(run, i, batch)
        gradient = differentiate(params, batch)
        updates, state = tx.update(gradient, state)
        rate = [
            1e-2 * min((i + 1) / 2, 1) * 0.5 * (1 + math.cos(math.pi * i / ends[k]))
            if i < ends[k]
            else 0.0
            for k in layer
        ]
        moved = [
            p - r * u
            for p, r, u in zip(leaves, rate, jax.tree.leaves(updates), strict=True)
        ]
        leaves = moved
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
        for a, b in zip(jax.tree.leaves(program.params(run)), leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert run.steps == {0: 10, 1: 4, 2: 6}
    costs = _policies.costs_of(workload, 32)
    expected = 10 * costs.full + 4 * costs.flops(layer >= 1)
    assert program.flops(run) == expected + 6 * costs.flops(layer >= 2)


@pytest.mark.usefixtures("quick_compilation")
def test_autofreeze_freezes_from_the_input_on_and_never_the_last_layer():
    workload = make_workload()
    settings = Settings(1e-2, 60, 32, 0)
    program = ARMS["autofreeze"].start(workload, settings)
    run, seen = program.state, []
    for i, batch in enumerate(workload.batches(0, 32, 60)):
        run = program.step(run, i, batch)
        seen.append(run.frozen)
    assert seen == sorted(seen) and 0 < seen[-1] <= 2
    assert seen[:6] == [0] * 6  # the first decision has nothing to compare with
    assert set(run.trained) | set(run.resting) == set(range(6))


@pytest.mark.slow
def test_cyclic_trains_one_layer_at_a_time():
    settings = Settings(1e-2, 150, 32, 0)
    workload = make_workload()
    layer = np.array(_policies._groups(workload, settings))
    program = ARMS["cyclic"].start(workload, settings)
    run, before = program.state, jax.tree.leaves(program.params(program.state))
    before = [np.array(x) for x in before]
    for i, batch in enumerate(workload.batches(0, 32, 150)):
        run = program.step(run, i, batch)
        if i % 50 == 49:
            after = [np.array(x) for x in jax.tree.leaves(program.params(run))]
            moved = [(a != b).any() for a, b in zip(after, before, strict=True)]
            assert (np.array(moved) == (layer == i // 50)).all()
            before = after


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_learning_rate_rises_and_ends_at_zero(decay):
    workload = make_workload(warmup=0.1, decay=decay)
    rate = _policies.schedule(workload, Settings(0.5, 100, 32, 0))
    values = np.array([rate(i) for i in range(101)])
    assert values[0] == pytest.approx(0.05) and values[10] == 0.5
    assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()
    assert values[100] == pytest.approx(0.0, abs=1e-7)


def test_a_run_that_breaks_down_ends_early_and_counts_as_a_miss():
    broken = make_workload(quality=lambda params: math.nan)
    found = _runner.run(broken, ARMS["adam"], key("adam"))
    assert found["diverged"] and len(found["curve"]) == 2
    assert _records.time_to(found, -1e9) is None
    assert _records.final_quality(found) == -math.inf


# --- the clock


def test_steps_that_compile_count_as_the_median_of_their_kind():
    steps = [
        Step(9.0, 10.0, "a", True),
        Step(1.0, 2.0, "a", False),
        Step(3.0, 4.0, "a", False),
        Step(1.2, 2.2, "a", False),
        Step(7.0, 8.0, "b", True),  # no other of its kind: the dearest median
        Step(0.5, 0.6, "c", False),
    ]
    clock = _runner.without_compilation(steps)
    np.testing.assert_allclose(np.diff([0, *clock.cpu_s]), [1.2, 1, 3, 1.2, 1.2, 0.5])
    np.testing.assert_allclose(np.diff([0, *clock.wall_s]), [2.2, 2, 4, 2.2, 2.2, 0.6])
    assert clock.compiled == 2
    assert clock.compile_cpu_s == pytest.approx(9 - 1.2 + 7 - 1.2)
    assert clock.compile_wall_s == pytest.approx(10 - 2.2 + 8 - 2.2)


def test_compiling_is_noticed():
    found, double = _runner._compilations(), jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    before = len(found)
    double(x)
    after = len(found)
    double(x)
    assert before < after == len(found)


@pytest.mark.parametrize(
    "steps, evaluations, expected",
    [(10, 5, [2, 4, 6, 8, 10]), (7, 3, [3, 5, 7]), (2, 9, [1, 2]), (5, 0, [5])],
)
def test_quality_is_measured_evenly_and_at_the_end(steps, evaluations, expected):
    assert _runner.evaluation_steps(steps, evaluations) == expected


# --- lines on file


def test_time_to_target_is_that_of_the_first_evaluation_that_meets_it():
    found = record(seconds=(1.0, 2.0, 3.0), quality=(0.7, None, 0.7))
    assert _records.time_to(found, 0.7) == (1.0, 2.0, 100.0, 5)
    assert _records.time_to(found, 0.71) is None
    late = record(seconds=(1.0, 2.0, 3.0), quality=(0.5, 0.9, 0.6))
    assert _records.time_to(late, 0.8) == (2.0, 4.0, 200.0, 10)


def test_a_line_without_its_end_of_line_is_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    for seed in range(2):
        _records.append(path, record(seed=seed))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    _records.append(path, record(seed=2, quality=(0.1, math.nan)))
    assert [r["seed"] for r in _records.read(path)] == [0, 1, 2]
    assert _records.read(path)[2]["curve"][1][4] is None


def tuning(rate, seconds, quality, seed=1000):
    config = {"learning_rate": rate, "steps": 10, "batch_size": 32}
    line = record("adam", seed, seconds, quality, config=config)
    return {**line, "purpose": "tune"}


def test_the_winner_reaches_the_target_most_often_then_fastest_then_best():
    slow, fast = tuning(1.0, (1, 4), (0.1, 0.9)), tuning(2.0, (1, 3), (0.1, 0.8))
    miss, worse = tuning(3.0, (1, 2), (0.1, 0.79)), tuning(4.0, (1, 1), (0.1, 0.7))
    rate = lambda records, target=0.8: _records.winner(records, target).learning_rate
    assert rate([slow, fast, miss, worse]) == 2.0
    assert rate([miss, worse]) == 3.0
    assert rate([miss, worse], 0.05) == 3.0  # a tie in time
    unlucky = [fast, tuning(2.0, (1, 3), (0.1, 0.2), seed=1001)]
    assert rate([*unlucky, slow, tuning(1.0, (1, 5), (0.1, 0.9), seed=1001)]) == 1.0
    both = [slow, tuning(1.0, (1, 5), (0.1, 0.2), seed=1001)]
    assert rate([*both, fast]) == 1.0  # of which there is one seed only
    lucky = tuning(5.0, (1, 2), (0.9, 0.7))  # and has lost it again
    assert rate([slow, lucky]) == 1.0 and rate([miss, lucky]) == 3.0
    assert _records.winner([record()], 0.8) is None  # not a tuning run
    assert _records.winner([miss], 0.8).seed == 1000


# --- statistics


@pytest.mark.parametrize("seed", range(5))
def test_welch_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, 5 + seed), rng.normal(0, 3, 7)
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.9)
    found = _statistics.welch(list(a), list(b), 0.9)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert _statistics.mean(list(a))[:2] == pytest.approx((a.mean(), stats.sem(a)))


def test_ratio_is_of_geometric_means_and_turns_round():
    found = _statistics.ratio([2.0, 8.0, 4.0], [1.0, 2.0, 2.0])
    assert found.difference == pytest.approx(4 / 4 ** (1 / 3))
    back = _statistics.ratio([1.0, 2.0, 2.0], [2.0, 8.0, 4.0])
    assert (1 / back.low, 1 / back.high) == pytest.approx((found.high, found.low))
    assert back.p == pytest.approx(found.p)


def test_a_single_number_has_no_error():
    assert math.isnan(_statistics.mean([1.0]).error)
    found = _statistics.ratio([2.0], [1.0, 1.0])
    assert found.difference == 2.0 and math.isnan(found.low) and math.isnan(found.p)
    assert math.isnan(_statistics.mean([]).mean)


# --- tables


def test_a_miss_counts_with_all_that_was_spent_and_is_shown():
    base = [record(seed=s, seconds=(1.0, 4.0 + 0.1 * s)) for s in range(3)]
    fast = [record("fast", s, (1.0, 2.0 + 0.1 * s)) for s in range(3)]
    low = [*fast[:2], record("fast", 2, (1.0, 3.0), (0.7, 0.79))]
    found, sign = _tables.speed_up(base, fast, 0.8)
    assert sign == "=" and found.low > 1
    assert _tables.verdict(found, sign) == "faster"
    found, sign = _tables.speed_up(base, low, 0.8)
    expected = math.exp(
        np.mean(np.log([4.0, 4.1, 4.2])) - np.mean(np.log([2.0, 2.1, 3.0]))
    )
    assert sign == "<" and found.difference == pytest.approx(expected)
    assert _tables.verdict(found, sign) == "misses"
    assert _tables.speed_up(low, base, 0.8)[1] == ">"
    assert _tables.verdict(*_tables.speed_up(low, low, 0.8)) == "both miss"
    assert _tables.verdict(*_tables.speed_up(fast, base, 0.8)) == "slower"
    assert _tables.verdict(*_tables.speed_up(base, base, 0.8)) == "no difference shown"
    text = _tables.time_table([*low, *base], 0.8)
    lines = text.splitlines()
    assert lines[2].startswith("| adam | 0.1 | 10 | 3 of 3 | 4.10 ± 0.06 | 1 |")
    assert lines[3].startswith("| fast | 0.1 | 10 | 2 of 3 | 2.05 ± 0.05 | ≤1.")


def test_tables_take_the_settings_used_last():
    old = record(config={"learning_rate": 9.0, "steps": 9, "batch_size": 9})
    found = _tables.by_policy([old, record(seed=1), record(seed=2)], "test", "small")
    assert [r["seed"] for r in found["adam"]] == [1, 2]
    assert _tables.by_policy([old], "match", "small") == {}


def test_a_table_is_written_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- end -->\n")
    assert _tables.write(path, "x", r"new \1")
    expected = "a\n<!-- table: x -->\nnew \\1\n<!-- end -->\nb\n<!-- end -->\n"
    assert path.read_text() == expected
    assert not _tables.write(path, "y", "new")


# --- workloads


def test_batches_are_the_same_for_the_same_seed_and_see_all_examples():
    first, again = (list(_workload.shuffled(3, 10, 4, 5)) for _ in range(2))
    assert np.array_equal(first, again)
    assert sorted(np.concatenate(first)) == sorted([*range(10), *range(10)])
    assert not np.array_equal(first, list(_workload.shuffled(4, 10, 4, 5)))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("module", [mnist_mlp, mnist_cnn, char_transformer])
def test_workloads_run_without_files(module, monkeypatch, capsys):
    if module is not char_transformer:
        pytest.importorskip("sklearn")
    monkeypatch.setitem(char_transformer.SIZES, "small", (1, 8, 2, 16))
    workload = module.workload(None, "small")
    assert "data:" in capsys.readouterr().out
    params = workload.init(0)
    batch, same = (next(iter(workload.batches(0, 4, 1))) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, same))
    gradient = jax.jit(jax.grad(workload.loss))(params, batch)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(g).all() and jnp.any(g != 0), path
    assert workload.quality(params) < workload.targets[0]
    depths = _policies._groups(workload, Settings(0.1, 1, 4, 0))
    assert min(depths) == 0 and len(set(depths)) >= 3


def test_the_transformer_does_not_see_what_follows():
    params = char_transformer.init(0, 5, 2, 8, 6)
    ids = np.arange(12).reshape(2, 6) % 5
    changed = ids.copy()
    changed[:, 4:] = 0
    apply = jax.jit(lambda ids: char_transformer.apply(params, ids, 2))
    a, b = apply(ids), apply(changed)
    np.testing.assert_allclose(a[:, :4], b[:, :4], rtol=1e-6)
    assert not np.allclose(a[:, 4:], b[:, 4:])


def test_loading_reports_the_first_batch_as_the_runs_own():
    workload = make_workload()
    settings = SimpleNamespace(seed=5, batch_size=8)
    first = _policies.first_batch(workload, settings)
    assert np.array_equal(first[0], next(workload.batches(5, 8, 30))[0])

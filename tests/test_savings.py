"""The savings account, next to sums over the steps themselves."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import helpers
from priorityprop_jax import (
    active,
    prioritize,
    priority_prop,
    priority_report,
    static_mask,
)
from priorityprop_jax._costs import BackwardCosts
from priorityprop_jax._savings import account_masks, cycle_masks, savings_of
from priorityprop_jax._schedule import ranking
from references import exact_schedule


CYCLE = 4
NAMES = ("embed", "layer_0", "layer_1", "layer_2", "layer_3", "head")
PARAMS = {name: np.ones((3, 2), np.float32) for name in NAMES}


def net(names=NAMES):
    """A net of equal layers, the one at the input first: f = 1 for each."""
    n = len(names)
    pieces = max(n - 1, 0)
    # Piece i is the chain through layer i + 1; all below need it.
    members = np.arange(n)[None] <= np.arange(pieces)[:, None]
    paths = tuple(f"params[{name!r}]" for name in names)
    return BackwardCosts(
        paths, float(n), np.ones(n), np.ones(pieces), members, np.full(n, 7.0)
    )


def in_params_order(costs):
    """The same for a dict of params, whose leaves are sorted by name."""
    order = np.argsort(NAMES)
    return costs._replace(
        paths=tuple(costs.paths[i] for i in order),
        weight=costs.weight[order],
        members=costs.members[:, order],
        traffic=costs.traffic[order],
    )


COSTS = in_params_order(net())
TRANSFORMATIONS = {
    "priority_prop": lambda **kw: priority_prop(
        recalc_every=CYCLE, max_updates=CYCLE, **kw
    ),
    "prioritize": lambda **kw: prioritize(
        optax.sgd(0.1), recalc_every=CYCLE, max_updates=CYCLE, **kw
    ),
}


@functools.cache
def train(name):
    """The states before and after each of ten steps, and the masks of these."""
    tx = TRANSFORMATIONS[name](budget=9, min_updates=0)
    params = jax.tree.map(jnp.asarray, PARAMS)
    states, masks = [tx.init(params)], []
    update = jax.jit(tx.update)
    for step in range(10):
        masks.append(static_mask(active(states[-1], params)))
        states.append(update(helpers.random_like(params, step), states[-1], params)[1])
    return states, masks


def after(name, steps):
    states, masks = train(name)
    return states[steps], masks[:steps]


def account_of(masks):
    return {mask: masks.count(mask) for mask in masks}


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_an_account_gives_the_sum_over_all_steps(name, steps):
    state, masks = after(name, steps)
    found = priority_report(state, PARAMS, costs=COSTS, account=account_of(masks))
    savings = found.savings
    assert savings.exact and savings.steps == steps
    assert savings.full == steps * COSTS.full
    spent = sum(COSTS.flops(mask.leaves) for mask in masks)
    assert savings.spent == pytest.approx(spent)
    saved = savings.by_resting + savings.by_truncation + savings.by_caching
    assert savings.full * (1 - saved) == pytest.approx(spent)
    rests = sum(not on for mask in masks for on in mask.leaves)
    assert savings.by_resting * savings.full == pytest.approx(rests)
    # Seven bytes each, where the optimizer rests, too.
    idle = 7 * rests * (name == "prioritize")
    assert savings.traffic_spent == pytest.approx(savings.traffic_full - idle)
    assert any("prioritize" in note for note in savings.notes) is (
        name == "priority_prop"
    )


@pytest.mark.parametrize("steps", range(1, CYCLE + 1))
def test_without_an_account_the_first_cycle_is_exact(steps):
    state, masks = after("prioritize", steps)
    estimate = priority_report(state, PARAMS, costs=COSTS).savings
    exact = priority_report(
        state, PARAMS, costs=COSTS, account=account_of(masks)
    ).savings
    assert not estimate.exact
    assert estimate.spent == pytest.approx(exact.spent)
    assert "estimated from the counts" in str(estimate)
    assert "estimated" not in str(exact)


def test_this_cycle():
    state, masks = after("prioritize", 2 * CYCLE)
    savings = priority_report(state, PARAMS, costs=COSTS).savings
    cost = sum(COSTS.flops(mask.leaves) for mask in masks[-CYCLE:])
    assert savings.cycle == pytest.approx(cost / (CYCLE * COSTS.full))
    assert 1 <= 1 / savings.cycle <= savings.bound <= COSTS.full / COSTS.forward


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(1, 9))
def test_masks_of_a_cycle_are_those_of_the_schedule(quotas, cycle):
    found = cycle_masks(np.array(quotas), ranking(cycle))
    expected = np.array(exact_schedule(quotas, cycle)).reshape(cycle, 3) > 0
    np.testing.assert_array_equal(found[1:], expected[1:])
    assert found[0].all()


def savings_with(quotas, cycle=10, costs=None, step=5, **kwargs):
    costs = net() if costs is None else costs
    quotas = np.array(quotas)
    counts = np.minimum(quotas, step)
    args = costs, counts, quotas, ranking(cycle), step
    return savings_of(*args, **{"optimizer_rests": True, **kwargs})


# Formulas of a net of equal layers: C(S) = 1 + (above min S) + |S|, in shares.


def test_embedding_that_never_rests():
    costs = net([f"l{i}" for i in range(100)])
    savings = savings_with([10] + [1] * 99, costs=costs)
    (note,) = savings.notes
    assert note == (
        "params['l0'] is active at every step: the chain is never cut; at most 1.5x."
    )
    # A full step, and nine of forward, chain and one weight: 100 + 99 + 1.
    assert savings.bound == pytest.approx(10 * 299 / (299 + 9 * 200))
    assert 1 / savings.cycle == pytest.approx(savings.bound)


def test_far_leaves_that_share_the_blame():
    # Two towers, of which each is most of the way down but not all of it.
    members = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
    groups = np.array([5.0, 5.0, 1.0])
    paths = ("params['a']", "params['b']", "params['c']")
    towers = BackwardCosts(paths, 10.0, np.ones(3), groups, members, np.ones(3))
    savings = savings_with([10, 10, 1], costs=towers)
    (note,) = savings.notes
    assert note.startswith("Some leaf far from the loss is active at every step")
    assert note.endswith(f"at most {24 / 21:.1f}x.")
    # Where one of them rests, its tower is cut.
    assert savings_with([10, 1, 1], costs=towers).notes == ()


def test_everything_active():
    savings = savings_with([10] * 6)
    assert savings.notes == ("All leaves are active at every step: nothing is saved.",)
    assert savings.cycle == savings.bound == 1


def test_every_step_the_first_of_a_cycle():
    savings = savings_with([1] * 6, cycle=1)
    assert "nothing is saved" in savings.notes[0]
    assert savings.cycle == savings.bound == savings.speedup == 1


def test_only_the_last_layer():
    savings = savings_with([1, 1, 1, 1, 1, 10])
    assert savings.notes == ()
    # 6 for the forward pass and 1 for the weight, of 17; in nine of ten steps.
    assert savings.cycle == pytest.approx((17 + 9 * 7) / 170)
    assert savings.bound == pytest.approx(170 / (17 + 9 * 7))


def test_scattered_and_suffix_save_in_different_ways():
    scattered = savings_with([10, 1, 1, 1, 1, 1], step=10)
    assert scattered.by_truncation == 0 and scattered.by_resting > 0
    suffix = savings_with([1, 1, 1, 10, 10, 10], step=10)
    assert suffix.by_truncation > 0 and suffix.by_resting > 0


def test_before_the_first_step():
    tx = TRANSFORMATIONS["prioritize"](budget=9)
    savings = priority_report(tx.init(PARAMS), PARAMS, costs=COSTS).savings
    assert savings.cycle is None and savings.full == savings.spent == 0
    assert savings.speedup == 1 and savings.bound == COSTS.full / COSTS.forward
    assert "this cycle" not in str(savings)


def test_no_leaves():
    tx = TRANSFORMATIONS["prioritize"](budget=1.0)
    savings = priority_report(tx.init({}), {}, costs=net(())).savings
    assert savings.speedup == savings.bound == 1


def test_cached_forward_passes():
    savings = savings_with([1, 1, 1, 10, 10, 10], step=10, cached=27.0)
    plain = savings_with([1, 1, 1, 10, 10, 10], step=10)
    assert savings.spent == plain.spent - 27
    assert savings.by_caching == pytest.approx(27 / 170)


def test_an_account_of_some_of_the_steps():
    account = {(True,) * 6: 1, (False,) * 5 + (True,): 3}
    savings = savings_with([1] * 6, account=account)
    assert savings.steps == 4 and savings.spent == 17 + 3 * 7
    assert savings.notes[0] == "The account has 4 of 5 steps."


def test_vectors_of_bools_count_where_any_is_active():
    mask = static_mask({"a": np.array([False, True]), "b": np.array([False, False])})
    masks, steps = account_masks({mask: 3}, 2)
    assert masks.tolist() == [[True, False]] and steps.tolist() == [3]
    assert account_masks({}, 2)[0].shape == (0, 2)


def test_in_the_report():
    state, masks = after("prioritize", 6)
    report = priority_report(state, PARAMS, costs=COSTS, account=account_of(masks))
    for text in (str(report), report.to_markdown()):
        assert text.endswith(str(report.savings))
        assert "full training 102 FLOPs in 6 steps" in text
    found = report.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["savings"]["spent"] == report.savings.spent
    assert found["savings"]["speedup"] == report.savings.speedup
    assert priority_report(state, PARAMS).to_dict()["savings"] is None
    timed = COSTS._replace(unit="ms")
    assert "102 ms" in str(priority_report(state, PARAMS, costs=timed))


@pytest.mark.parametrize(
    "error, match, kwargs",
    [
        (
            ValueError,
            "costs are those of 5 leaves.*params have 6",
            {"costs": net("abcde")},
        ),
        (ValueError, "need costs=", {"account": {}}),
        (ValueError, "need costs=", {"cached": 1.0}),
        (ValueError, "has 1 leaves", {"costs": COSTS, "account": {(True,): 1}}),
        (TypeError, "keys of account must be", {"costs": COSTS, "account": {"a": 1}}),
        (
            TypeError,
            "count steps in integers, got 0.5",
            {"costs": COSTS, "account": {(True,) * 6: 0.5}},
        ),
        (
            ValueError,
            "count steps from 0 on, got -1",
            {"costs": COSTS, "account": {(True,) * 6: -1}},
        ),
        (ValueError, "cached must be between 0 and", {"costs": COSTS, "cached": 1e9}),
    ],
)
def test_bad_input(error, match, kwargs):
    state, _ = after("prioritize", 1)
    with pytest.raises(error, match=match):
        priority_report(state, PARAMS, **kwargs)

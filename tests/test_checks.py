"""Bad arguments of both transformations: named, with the value and what is allowed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import prioritize, priority_prop


BOTH = pytest.mark.parametrize(
    "make",
    [priority_prop, functools.partial(prioritize, optax.adam(1e-3))],
    ids=["priority_prop", "prioritize"],
)


@BOTH
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            dict(min_updates=3, max_updates=2),
            ValueError,
            "min_updates=3 > max_updates=2",
        ),
        (dict(min_updates=-1), ValueError, r"min_updates must be in \[0, .*got -1"),
        (dict(max_updates=0), ValueError, r"max_updates must be in \[1, .*got 0"),
        (dict(min_updates=1.0), TypeError, "min_updates must be an integer, got 1.0"),
        (dict(max_updates="9"), TypeError, "max_updates must be an integer, got '9'"),
        (dict(min_updates=True), TypeError, "min_updates must be an integer, got True"),
        (
            dict(max_updates=2**31),
            ValueError,
            "max_updates must be in .*got 2147483648",
        ),
        (dict(recalc_every=0), ValueError, r"recalc_every must be in \[1, .*got 0"),
        (dict(recalc_every=-10), ValueError, r"recalc_every must be in \[1, .*got -10"),
        (
            dict(recalc_every=10.0),
            TypeError,
            "recalc_every must be an integer, got 10.0",
        ),
        (
            dict(recalc_every=True),
            TypeError,
            "recalc_every must be an integer, got True",
        ),
        (
            dict(recalc_every=None),
            TypeError,
            "recalc_every must be an integer, got None",
        ),
        (dict(seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (
            dict(depth_factor=math.nan),
            ValueError,
            "depth_factor must be finite, got nan",
        ),
        (
            dict(depth_factor=math.inf),
            ValueError,
            "depth_factor must be finite, got inf",
        ),
        (
            dict(depth_factor=-1.0),
            ValueError,
            "depth_factor must be at least 0, got -1",
        ),
        (dict(depth_factor="2"), TypeError, "depth_factor must be a number, got '2'"),
        (dict(depth_factor=True), TypeError, "depth_factor must be a number, got True"),
    ],
)
def test_numbers(make, settings, error, match):
    with pytest.raises(error, match=match):
        make(0.5, **settings)


@BOTH
@pytest.mark.parametrize(
    ("settings", "known", "nearest"),
    [
        (dict(units="leafs"), ["leaf", "element"], "leaf"),
        (dict(units="elements"), ["leaf", "element"], "element"),
        (dict(magnitude="l3"), ["l2", "l1", "mean", "rms", "max"], "l"),
        (dict(magnitude="RMS"), ["l2", "l1", "mean", "rms", "max"], None),
        (dict(score="gradients"), ["priority", "gradient", "uniform"], "gradient"),
        (dict(score="cyclical"), ["random", "cyclic", "ucb"], "cyclic"),
        (dict(depth_from="losses"), ["loss", "input"], "loss"),
        (dict(allocation="arg_sort"), ["argsort", "bisect"], "argsort"),
        (dict(allocation="??"), ["argsort", "bisect"], None),
    ],
)
def test_unknown_names_list_the_known_and_the_nearest(make, settings, known, nearest):
    ((argument, value),) = settings.items()
    with pytest.raises(ValueError, match=f"^{argument} must be one of") as e:
        make(0.5, **settings)
    message = str(e.value)
    assert repr(value) in message
    assert all(repr(name) in message for name in known)
    assert ("did you mean" in message) == (nearest is not None)
    assert nearest is None or f"did you mean '{nearest}" in message


@BOTH
@pytest.mark.parametrize("argument", ["magnitude", "score", "depth_from", "allocation"])
@pytest.mark.parametrize("value", [None, 3, lambda x: x])
def test_names_that_are_no_names(make, argument, value):
    with pytest.raises(TypeError, match=f"^{argument} must be one of .*, got "):
        make(0.5, **{argument: value})


@BOTH
def test_functions_are_told_how_to_be_wrapped(make):
    rule = lambda depths, most: depths
    with pytest.raises(TypeError, match=r"depth_factor.*wrap it: DepthFactor\("):
        make(0.5, depth_factor=rule)
    with pytest.raises(TypeError, match=r"units.*unit_axes\(params, rule\)"):
        make(0.5, units=lambda path, leaf: ())


@BOTH
@pytest.mark.parametrize(
    ("argument", "wrong", "right"), [("recalc_every", 5, 5), ("units", 1, (0,))]
)
def test_what_must_be_static_under_inject_hyperparams(make, argument, wrong, right):
    """All numbers are traced there, defaults too, unless they are named static."""

    def build(budget, recalc_every=10, units="leaf"):
        return make(budget, recalc_every=recalc_every, units=units)

    params = [np.ones(3, np.float32)]
    others = tuple({"recalc_every", "units"} - {argument})
    injected = optax.inject_hyperparams(build, static_args=others)
    with pytest.raises(TypeError) as e:
        injected(0.5, **{argument: wrong}).init(params)
    assert str(e.value).startswith(argument)
    assert f"static_args=('{argument}',)" in str(e.value)
    injected = optax.inject_hyperparams(build, static_args=(*others, argument))
    state = injected(0.5, **{argument: right}).init(params)
    assert optax.tree.get(state, "rank").size == (
        5 if argument == "recalc_every" else 10
    )
    assert optax.tree.get(state, "quotas").size == (3 if argument == "units" else 1)


@BOTH
def test_numbers_may_be_traced(make):
    params = [np.ones(2, np.float32)]

    def init(budget, low, high, factor):
        return make(budget, low, high, depth_factor=factor).init(params)

    jax.eval_shape(init, 0.5, 1, 20, 1.0)
    with pytest.raises(TypeError, match="min_updates must be an integer scalar"):
        jax.eval_shape(init, 0.5, 1.0, 20, 1.0)
    factors = lambda f: make(0.5, depth_factor=[f]).init(params)
    jax.eval_shape(factors, 2.0)


def test_what_is_specific_to_prioritize():
    with pytest.raises(
        ValueError, match="resting must be .*'keep'.*did you mean 'decay'"
    ):
        prioritize(optax.adam(1e-3), resting="decays")
    with pytest.raises(TypeError, match="resting must be one of .*got None"):
        prioritize(optax.adam(1e-3), resting=None)
    for inner in (None, 0.1, optax.adam):
        with pytest.raises(TypeError, match="inner must be an optax.Gradient.*got"):
            prioritize(inner)


PARAMS = {
    "a": np.ones(2, np.float32),
    "b": {"bias": np.ones(3, np.float32), "kernel": np.ones((2, 3), np.float32)},
}


@BOTH
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_leaves_without_gradients_are_named(make, dtype):
    params = {**PARAMS, "c": np.ones(2, dtype)}
    with pytest.raises(TypeError, match=rf"\['c'\] has dtype {dtype}.*optax.masked"):
        make(0.5).init(params)


@BOTH
def test_float0_gradients_are_named(make):
    params = {"a": 1.0, "n": 3}
    tx = optax.masked(make(0.5), {"a": True, "n": False})
    state = tx.init(params)
    del state
    state = make(0.5).init({"a": jnp.float32(1), "n": jnp.float32(1)})
    g = jax.grad(lambda p: 2.0 * p["a"], allow_int=True)(params)
    with pytest.raises(TypeError, match=r"\['n'\] has dtype float0"):
        make(0.5).update(g, state)


@BOTH
@pytest.mark.parametrize(
    ("depths", "match"),
    [
        ({"a": 1, "b": {"bias": 0}}, r"no entry for params\['b'\]\['kernel'\]"),
        ({"a": 1, "b": 0}, r"no entry for params\['b'\]\['bias'\]"),
        (
            {"a": 1, "b": {"bias": 0, "kernel": 0}, "c": 2},
            r"entry at \['c'\] that the params have not",
        ),
        ([1, 0, 0], r"no entry for params\['a'\]"),
    ],
)
def test_depths_of_another_structure(make, depths, match):
    with pytest.raises(ValueError, match=rf"^depths must have .*{match}"):
        make(0.5, depths=depths).init(PARAMS)
    factors = jax.tree.map(float, depths)
    with pytest.raises(ValueError, match=rf"^depth_factor must have .*{match}"):
        make(0.5, depth_factor=factors).init(PARAMS)


@BOTH
@pytest.mark.parametrize("bad", [1.5, -1, True, "1"])
def test_depths_must_be_integers(make, bad):
    depths = {"a": 0, "b": {"bias": 1, "kernel": bad}}
    match = rf"the depth of params\['b'\]\['kernel'\] must .*got {bad!r}"
    with pytest.raises((TypeError, ValueError), match=match):
        make(0.5, depths=depths).init(PARAMS)


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, True, "1"])
def test_factors_must_be_finite_and_not_negative(make, bad):
    factors = {"a": 1.0, "b": {"bias": 1.0, "kernel": bad}}
    match = rf"the depth factor of params\['b'\]\['kernel'\] must .*got {bad!r}"
    with pytest.raises((TypeError, ValueError), match=match):
        make(0.5, depth_factor=factors).init(PARAMS)


@BOTH
def test_updates_of_another_tree(make):
    state = make(0.5).init(PARAMS)
    for fewer in ({"a": PARAMS["a"]}, {}):
        with pytest.raises(ValueError, match="the updates have . leaves.* for 3"):
            make(0.5).update(fewer, state)
    with pytest.raises(ValueError, match="the updates have 4 leaves.* for 3"):
        make(0.5).update({**PARAMS, "c": np.ones(2)}, state)
    with pytest.raises(ValueError, match="recalc_every=10, but .*recalc_every=5"):
        make(0.5).update(PARAMS, make(0.5, recalc_every=5).init(PARAMS))


def test_params_of_another_shape():
    tx = prioritize(optax.adam(1e-3), 0.5)
    other = {**PARAMS, "b": {**PARAMS["b"], "kernel": np.ones((3, 2), np.float32)}}
    with pytest.raises(ValueError, match=r"params must match.*\['b'\]\['kernel'\]"):
        tx.update(PARAMS, tx.init(PARAMS), other)

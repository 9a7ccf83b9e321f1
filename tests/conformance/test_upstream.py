"""optax's own cross-cutting tests, run as installed, on our transformations.

optax parametrizes its tests by lists that absl expands when a class is created; the
undecorated bodies stay reachable, and take the optimizer as an argument. Which of
them are called here:

=====================================  ==============================================
`optax/contrib/_common_test.py`        extra args, convergence, inject_hyperparams,
                                       dtypes, MultiSteps, stability of the state,
                                       schedules; also under contrib's mechanize,
                                       schedule_free and reduce_on_plateau
`optax/_src/alias_test.py`             the same, complex numbers, no recompilation
`optax/_src/float64_test.py`           float32 and float64 in one tree
`optax/_src/sharding_test.py`          abstract init, explicit sharding, eager and jit
`optax/_src/transform_test.py`         scalers
`optax/transforms/_accumulation_test`  MultiSteps with mixed precision
`optax/transforms/_masking_test.py`    masks, as trees, functions, prefixes, nested
`optax/transforms/_conditionality_..`  apply_if_finite
=====================================  ==============================================

Not run, and why:

* `alias_test.test_explicit_dtype`: about `mu_dtype` and `accumulator_dtype`, which we
  do not have; its optimizers are named in its body.
* `contrib/_sharding_test.py`: not in the wheel; `_src/sharding_test.py` is the same
  for our purpose.
* `sharding_test.test_microbatch_with_explicit_sharding`: has no optimizer.
* In `_masking_test` and `_conditionality_test` the tests that build their own
  transformation (`test_mask_fn`, `test_update_requires_params`, `conditionally_*`,
  `test_apply_if_finite_pmap`, ...): ours takes no part. The same uses are in
  `test_wrappers.py`.
* Convergence under `mechanize` and `reduce_on_plateau`, which is about them.
* Rosenbrock's function with half of a budget over single coordinates: Adam on one
  coordinate at a time ends near its minimum, not within 3 %.

Most of these problems are a single array, so a budget of one half means every second
step for leaf units. The convergence tests take 10 to 30 thousand steps; two are run
by default. Those and all other combinations are slow.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax._src import alias

import helpers
from priorityprop_jax import prioritize, priority_prop


with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one module builds a deprecated optimizer
    patch.setenv("XLA_FLAGS", "")  # and sets this, for all child processes
    newer = "tests that optax has had since 0.2.6"
    pytest.importorskip("optax._src.sharding_test", reason=newer)
    from optax._src import alias_test, float64_test, sharding_test, transform_test
    from optax.contrib import _common_test
    from optax.transforms import (
        _accumulation_test,
        _conditionality_test,
        _masking_test,
    )


SHARE = {"budget": 0.5, "recalc_every": 4, "max_updates": 4}
FULL = {"budget": 1.0, "recalc_every": 4, "min_updates": 4, "max_updates": 4}


# Factories as optax's tests want them: the learning rate first, annotated; all that
# inject_hyperparams must not turn into arrays is fixed.


def before_adam(learning_rate: optax.ScalarOrSchedule, budget: float = 0.5):
    """Two units to an array, each with zeros at every other step."""
    own = priority_prop(**SHARE | {"budget": budget}, units="element")
    return optax.chain(own, optax.adam(learning_rate))


def after_adam(learning_rate: optax.ScalarOrSchedule, budget: float = 0.5):
    own = priority_prop(**SHARE | {"budget": budget})
    return optax.chain(optax.adam(learning_rate), own)


def around_adam(learning_rate: optax.ScalarOrSchedule, budget: float = 0.5):
    return prioritize(optax.adam(learning_rate), **SHARE | {"budget": budget})


def around_adamw(learning_rate: optax.ScalarOrSchedule, budget: float = 0.5):
    inner = optax.adamw(learning_rate, weight_decay=1e-5)
    settings = SHARE | {"budget": budget, "max_updates": 6, "units": "element"}
    return prioritize(inner, **settings, resting="decay")


def around_momentum(learning_rate: optax.ScalarOrSchedule, budget: float = 0.5):
    inner = optax.sgd(learning_rate, momentum=0.9)
    return prioritize(inner, **SHARE | {"budget": budget, "allocation": "bisect"})


RATES = {
    before_adam: 0.1,
    after_adam: 0.1,
    around_adam: 0.1,
    around_adamw: 0.1,
    around_momentum: 1e-3,
}


def slow_unless(condition, *values):
    name = "-".join(map(_name, values))
    return helpers.slow_unless(condition, *values, id=name)


def _name(value):
    if isinstance(value, tuple):
        return "-".join(map(_name, value)) or "all"
    return getattr(value, "__name__", None) or str(value)


def factories(*fast):
    return pytest.mark.parametrize(
        "factory", [slow_unless(f in fast, f) for f in RATES]
    )


@pytest.fixture
def subject(factory, monkeypatch):
    """Makes a factory known to optax's tests by name, and describes it to them."""
    name = "subject_under_test"
    monkeypatch.setattr(alias, name, factory, raising=False)
    return {"opt_name": name, "opt_kwargs": {"learning_rate": RATES[factory]}}


@pytest.fixture
def upstream():
    """``call(TestClass, "test_name", arguments...)`` runs one body of a test."""
    before = jax.config.jax_enable_x64

    def call(cls, test, *args, **kwargs):
        names = [n for n in dir(cls) if n.startswith(test)]
        (body,) = {
            inspect.unwrap(getattr(cls, n))
            for n in names
            if inspect.unwrap(getattr(cls, n)).__name__ == test
        }
        case = cls(names[0])
        case.setUp()
        try:
            body(case, *args, **kwargs)
        finally:
            jax.config.update("jax_enable_x64", before)
            case.tearDown()
            case.doCleanups()

    return call


# Functions, as pytest would run a class that it finds here.
contrib = lambda: _common_test.ContribTest
of_alias = lambda: alias_test.AliasTest
ALONE = {"wrapper_name": None, "wrapper_kwargs": None}
WRAPPED = {
    "mechanize": {"weight_decay": 0.0},
    "schedule_free": {"learning_rate": 1e-2},
    "reduce_on_plateau": {},
}


def test_bodies_are_found_and_can_fail(upstream):
    """A transformation that does nothing does not pass."""
    broken = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, **extra: (updates, optax.ScaleState()),
    )
    with pytest.raises(AssertionError):
        upstream(_masking_test.MaskedTest, "test_nested_mask", lambda: broken)


@pytest.mark.usefixtures("allocation")
@factories(before_adam, around_adamw)
def test_extra_args(factory, subject, upstream):
    del factory
    upstream(
        contrib(), "test_optimizers_accept_extra_args", **subject, **ALONE, wrap=False
    )


@pytest.mark.usefixtures("allocation")
@factories(around_momentum)
def test_extra_args_of_alias(factory, subject, upstream):
    del factory
    upstream(of_alias(), "test_optimizers_accept_extra_args", **subject)


PARABOLA, ROSENBROCK = alias_test._setup_parabola, alias_test._setup_rosenbrock
CONTRIB_ROSENBROCK = _common_test._setup_rosenbrock
MATRIX, MIXED = (
    _common_test._setup_matrix_parabola,
    _common_test._setup_mixed_tensor_target,
)


def check_valley(factory, target, subject):
    """Adam on one coordinate at a time does not settle in a narrow valley."""
    if target not in (ROSENBROCK, CONTRIB_ROSENBROCK):
        return
    if factory is before_adam:
        subject["opt_kwargs"]["budget"] = 1.0
    if factory is around_adamw:
        pytest.skip("no full budget either: a unit can have 6 of 4 steps")


@pytest.mark.parametrize(
    ("factory", "target", "dtype"),
    [
        slow_unless((f, t, d) == (around_adam, PARABOLA, "complex64"), f, t, d)
        for f in RATES
        for t in (PARABOLA, ROSENBROCK)
        for d in ("float32", "complex64")
    ],
)
def test_optimization(factory, target, dtype, subject, upstream):
    """10,000 steps to the minimum, with no recompilation after the first."""
    check_valley(factory, target, subject)
    upstream(
        of_alias(),
        "test_optimization",
        **subject,
        target=target,
        dtype=getattr(jnp, dtype),
    )


@pytest.mark.parametrize(
    ("factory", "target"),
    [
        slow_unless((f, t) == (before_adam, MIXED), f, t)
        for f in RATES
        for t in (CONTRIB_ROSENBROCK, MATRIX, MIXED)
    ],
)
def test_optimizers(factory, target, subject, upstream):
    """30,000 steps in one scan; arrays of one and two dimensions."""
    check_valley(factory, target, subject)
    upstream(
        contrib(), "test_optimizers", **subject, **ALONE, target=target, dtype="float32"
    )


@pytest.mark.usefixtures("allocation")
@factories(after_adam, around_adam)
def test_inject_hyperparams(factory, subject, upstream):
    del factory
    test = "test_optimizers_can_be_wrapped_in_inject_hyperparams"
    upstream(of_alias(), test, **subject)


@factories()
def test_inject_hyperparams_of_contrib(factory, subject, upstream):
    del factory
    test = "test_optimizers_can_be_wrapped_in_inject_hyperparams"
    subject["opt_kwargs"]["budget"] = 0.75
    upstream(contrib(), test, **subject)


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@factories(around_adamw)
def test_preserve_dtype(factory, dtype, subject, upstream):
    del factory
    upstream(of_alias(), "test_preserve_dtype", **subject, dtype=dtype)


@pytest.mark.parametrize("wrapper", WRAPPED)
@factories()
def test_preserve_dtype_when_wrapped(factory, wrapper, subject, upstream):
    del factory
    kwargs = {"wrapper_name": wrapper, "wrapper_kwargs": WRAPPED[wrapper]}
    upstream(contrib(), "test_preserve_dtype", **subject, **kwargs, dtype="float32")
    upstream(
        contrib(), "test_gradient_accumulation", **subject, **kwargs, dtype="float32"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@factories()
def test_gradient_accumulation(factory, dtype, subject, upstream):
    del factory
    upstream(of_alias(), "test_gradient_accumulation", **subject, dtype=dtype)
    upstream(contrib(), "test_gradient_accumulation", **subject, dtype=dtype)


DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize(
    ("factory", "dtype"),
    [
        slow_unless(
            (f, d) in ((around_adamw, "float64"), (before_adam, "complex128")), f, d
        )
        for f in RATES
        for d in DTYPES
    ],
)
def test_state_shape_dtype_shard_stability(factory, dtype, subject, upstream):
    del factory
    test = "test_state_shape_dtype_shard_stability"
    upstream(of_alias(), test, **subject, dtype=getattr(jnp, dtype))


@pytest.mark.usefixtures("allocation")
@factories(around_adam)
def test_learning_rate_schedules(factory, subject, upstream):
    del factory
    test = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"
    upstream(contrib(), test, **subject, **ALONE)


@pytest.mark.usefixtures("allocation")
@factories(before_adam, around_adamw)
def test_mixed_float32_and_float64(factory, upstream):
    kwargs = {"learning_rate": RATES[factory]}
    upstream(
        float64_test.Float64Test, "test_mixed_dtype_input_outputs", factory, kwargs
    )


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize(
    ("factory", "test"),
    [
        slow_unless(t.endswith("input") or f in (before_adam, around_adamw), f, t)
        for f in RATES
        for t in (
            "test_init_with_abstract_input",
            "test_state_sharding_type_init_match_update",
            "test_state_sharding_type_preserved_with_jit",
        )
    ],
)
def test_sharding(factory, test, upstream, monkeypatch):
    """The versions are compared as strings: "0.10" is "less" than "0.7.2"."""
    monkeypatch.setattr(jax, "__version__", "0.9.9")
    upstream(sharding_test.ShardingTest, test, factory(RATES[factory]))


@pytest.mark.usefixtures("allocation")
@factories(before_adam, around_adam)
def test_scalers(factory, upstream):
    build = functools.partial(factory, RATES[factory])
    build.__name__ = factory.__name__
    upstream(transform_test.TransformTest, "test_scalers", build)


@factories()
def test_multi_steps_mixed_precision(factory, subject, upstream):
    del factory
    test = "test_multi_steps_mixed_precision"
    upstream(_accumulation_test.AccumulationTest, test, **subject)


# With a full budget ours are plain SGD, which these tests ask for.


def full_leaf():
    return prioritize(optax.sgd(1.0), **FULL)


def full_with_state():
    return prioritize(optax.sgd(1.0, momentum=0.0), **FULL, units="element")


def full_in_front():
    return optax.chain(priority_prop(**FULL), optax.sgd(1.0))


BUILDERS = (full_leaf, full_with_state, full_in_front)
MASKS = (
    ("test_masked", False),
    ("test_masked", True),
    ("test_prefix_mask",),
    ("test_nested_mask",),
)


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize(
    ("builder", "test"),
    [
        slow_unless((b, t) == (full_leaf, MASKS[0]) or b is full_in_front, b, t)
        for b in BUILDERS
        for t in MASKS
    ],
)
def test_masks(builder, test, upstream):
    upstream(_masking_test.MaskedTest, test[0], builder, *test[1:])


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize("builder", BUILDERS)
def test_apply_if_finite(builder, upstream):
    """Also that NaN gets through in the end: nobody asked us to stop it."""
    upstream(_conditionality_test.ConditionalityTest, "test_apply_if_finite", builder)

"""Tables for the conformance suite: trees, transformations, and how to run them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import prioritize, priority_prop, PriorityPropState, unit_axes


# Half of everything in cycles of 4 steps: feasible for any number of units. A unit
# can get more updates than a cycle has steps, so that some steps hold two.
SHORT = {"budget": 0.5, "max_updates": 6, "recalc_every": 4}
INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.01, 0.001, 20)),
}
UNITS = ("leaf", "axis", "element")


class Subject(NamedTuple):
    """A transformation under test: how to build one for a tree like `like`."""

    build: Callable[..., optax.GradientTransformationExtraArgs]
    needs_params: bool = False


def units_of(kind: str, like: Any) -> Any:
    """The `units` argument: rows, where leaves have rows, for ``"axis"``."""
    if kind != "axis":
        return kind
    return unit_axes(like, lambda path, leaf: (0,) if np.shape(leaf) else ())


def _priority(units, allocation, like, **settings):
    return priority_prop(
        **(SHORT | settings), units=units_of(units, like), allocation=allocation
    )


def _chained(units, before, like, **settings):
    parts = [_priority(units, "argsort", like, **settings), INNER["adam"]()]
    return optax.chain(*(parts if before else parts[::-1]))


def _prioritized(inner, units, resting, like, **settings):
    return prioritize(
        INNER[inner](),
        **(SHORT | settings),
        units=units_of(units, like),
        resting=resting,
        allocation="bisect" if units == "element" else "argsort",
    )


def _subjects():
    part = functools.partial
    for units in UNITS:
        for allocation in ("argsort", "bisect"):
            name = f"priority_prop-{units}-{allocation}"
            yield name, Subject(part(_priority, units, allocation))
        yield f"priority_prop>adam-{units}", Subject(part(_chained, units, True))
        yield f"adam>priority_prop-{units}", Subject(part(_chained, units, False))
        for inner in INNER:
            for resting in ("keep", "decay", "reset"):
                name = f"prioritize-{inner}-{units}-{resting}"
                build = part(_prioritized, inner, units, resting)
                yield name, Subject(build, inner == "adamw")
        build = part(_prioritized, "adam", units, "keep", magnitude="taylor")
        yield f"prioritize-adam-{units}-taylor", Subject(build)


SUBJECTS = dict(_subjects())
# One of each kind; and fewer, for what is alike for all kinds.
CORE = (
    "priority_prop-leaf-argsort",
    "priority_prop-axis-bisect",
    "priority_prop-element-argsort",
    "priority_prop>adam-element",
    "adam>priority_prop-leaf",
    "prioritize-sgd-axis-keep",
    "prioritize-adam-leaf-decay",
    "prioritize-adam-element-keep",
    "prioritize-adamw-leaf-reset",
    "prioritize-adamw-element-decay",
)
FEW = (
    "priority_prop-axis-argsort",
    "priority_prop>adam-element",
    "prioritize-adam-leaf-decay",
    "prioritize-adamw-element-reset",
)


# What is left of `CORE` without those whose neighbors compile much the same.
MOST = tuple(
    name
    for name in CORE
    if name
    not in (
        "adam>priority_prop-leaf",
        "prioritize-adam-element-keep",
        "prioritize-adamw-leaf-reset",
    )
)


def slow_unless(condition, *values, **kwargs):
    """A parameter, marked as slow where the condition does not hold."""
    marks = () if condition else (pytest.mark.slow,)
    return pytest.param(*values, marks=marks, **kwargs)


def subjects(fast=FEW, slow=CORE):
    """Parametrizes a test: over `fast`, and when slow over the rest of `slow`."""
    names = [*fast, *(name for name in slow if name not in fast)]
    return pytest.mark.parametrize("name", [slow_unless(n in fast, n) for n in names])


def model(dtype=jnp.float32):
    """Params of two dense layers, the first without a bias."""
    shapes = {
        "Dense_0": {"kernel": (3, 4)},
        "Dense_1": {"kernel": (4, 2), "bias": (2,)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    return random_like(
        jax.tree.map(lambda s: jnp.zeros(s, dtype), shapes, is_leaf=is_shape), 99
    )


def random_like(tree: Any, seed: int) -> Any:
    """Normal numbers, other scales in other leaves; no zeros."""
    rng = np.random.default_rng(seed)

    def draw(x):
        out = rng.normal(size=np.shape(x)) * rng.uniform(0.1, 10.0)
        if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            out = out + 1j * rng.normal(size=np.shape(x))
        return jnp.asarray(out, jnp.result_type(x))

    return jax.tree.map(draw, tree)


def gradients(like: Any, steps: int) -> list[Any]:
    """Other gradients at every step."""
    return [random_like(like, seed) for seed in range(steps)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """Params that can be called, as in equinox."""

    w: Any
    inner: Any

    def __call__(self, x):
        return self.w * x


TREES = {
    "array": lambda: jnp.ones((3,)),
    "scalar": lambda: jnp.float32(2.0),
    "scalars": lambda: [jnp.float32(2.0), (jnp.float32(3.0), jnp.ones((1,)))],
    "zero-size": lambda: {"a": jnp.ones((0, 3)), "b": jnp.ones((2,))},
    "only zero-size": lambda: {"a": jnp.ones((0,))},
    "int keys": lambda: {10: jnp.ones((2,)), 9: {1: jnp.ones((2, 2))}},
    "None leaves": lambda: {"a": None, "b": jnp.ones((2, 3)), "c": [None, jnp.ones(3)]},
    "masked": lambda: {"a": optax.MaskedNode(), "b": jnp.ones((2, 3))},
    "callable": lambda: Module(
        jnp.ones((2,)), {"module": Module(jnp.ones((2, 2)), ())}
    ),
    "nnx": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "nothing but masked": lambda: {"a": optax.MaskedNode(), "b": None},
}
EMPTY = {"dict": {}, "tuple": (), "None": None, "nested": {"a": [], "b": ()}}


def run(tx, params, grads, jit=jax.jit):
    """Trains; returns the updates of all steps, the last params and state."""
    state, update, out = tx.init(params), jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out, params, state


def kinds(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types, for comparison."""
    leaves, treedef = jax.tree.flatten(tree)
    described = [
        (x.shape, jnp.dtype(x.dtype).name, bool(getattr(x, "weak_type", False)))
        for x in leaves
    ]
    return treedef, described


def ours(state: Any) -> PriorityPropState:
    """The one `PriorityPropState` in a state."""
    is_ours = lambda x: isinstance(x, PriorityPropState)
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    return found


def quick_vector(scores, budget, low, high, method, few):
    """Stands in for the exact allocation, which takes seconds to compile.

    For tests that ask how a transformation fits together with others, not what the
    quotas are.
    """
    del method, few
    share = scores / jnp.maximum(jnp.sum(scores), jnp.finfo(jnp.float32).tiny)
    return jnp.clip(jnp.round(share * budget), low, high).astype(jnp.int32)


def quick_leaves(scores, budget, low, high, few):
    """`quick_vector` over many arrays."""
    del few
    total = sum((jnp.sum(s) for s in scores), jnp.float32(0))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    quotas = [jnp.clip(jnp.round(s / total * budget), low, high) for s in scores]
    return [q.astype(jnp.int32) for q in quotas]

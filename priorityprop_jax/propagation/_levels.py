"""One of a few programs for a traced mask, by how far down the active leaves lie.

A program that serves all masks keeps what the backward pass of any of them may need,
and has conditionals everywhere; both keep XLA from fusing. So where all leaves are
active, or none but some near the loss, a program for just that takes over. Which one is
decided by a conditional around the whole of the forward and the backward pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from .._flops import flops_of
from ._interpreter import jaxpr_of, Program
from ._rules import Operation


# Shares of the FLOPs of the forward pass that come after the beginning of a level.
# Each repeats that pass, which takes its time to compile: operations it may have.
_SHARES = {1 / 2: 100, 1 / 16: 2000}
_LEAST = 1e6  # FLOPs of a forward pass; for fewer it is not worth to compile more


def choose(
    program: Program, predicates: Sequence[Any], run: Callable[[list[Any]], Any]
) -> Any:
    """What `run` returns for the predicates, from a program that knows more of them.

    Args:
      program: the forward pass.
      predicates: for each argument whether it is active: True, or a traced bool, or a
        vector of them.
      run: ``(predicates) -> pytree of arrays``, the same types for all predicates.
    """
    traced = [i for i, p in enumerate(predicates) if p is not True]
    equations = [step.operation.equations for step in program.steps]
    costs = [sum(map(_flops, eqns)) for eqns in equations]
    # All devices, or none, have to run a collective. Effects may have an order.
    effects = any(eqn.effects for eqns in equations for eqn in eqns)
    small, large = sum(costs) < _LEAST, len(costs) > max(_SHARES.values())
    if not traced or effects or small or large:
        return run(list(predicates))
    starts = [_start(program, i) for i in range(program.inputs)]
    levels, conditions = [list(predicates)], []
    for place in _places(program, sorted(set(starts)), costs):
        below = [i for i in traced if starts[i] < place]
        if below and len(below) == sum(s < place for s in starts):
            levels.append(
                [False if i in below else p for i, p in enumerate(predicates)]
            )
            conditions.append(_any([predicates[i] for i in below]))
    # Whether any of those rests, or any is active that has to rest in a level.
    asked = [_any([jnp.logical_not(predicates[i]) for i in traced]), *conditions]
    index = jnp.where(asked[0], 1 + sum(jnp.logical_not(c) for c in conditions), 0)
    programs = [[True] * len(predicates), *levels]
    return lax.switch(index, [functools.partial(run, known) for known in programs])


def _places(
    program: Program, starts: Sequence[int], costs: Sequence[float]
) -> list[int]:
    """Where levels begin, each at the first use of a leaf.

    No bias, as what is added to the output of a layer belongs to that.
    """
    steps = program.steps
    known = [s for s in starts if s < len(steps) and not _adds(steps[s].operation)]
    if not known:
        return []
    left = np.cumsum(costs[::-1])[::-1]  # of a step and those after it
    found = [
        next((s for s in known if left[s] <= share * left[0]), known[-1])
        for share, most in _SHARES.items()
        if len(steps) <= most
    ]
    return sorted(set(found))


def _adds(op: Operation) -> bool:
    return op.name in ("add", "add_any", "sub")


def _start(program: Program, argument: int) -> int:
    """The step in which an argument first meets data; their number if it never does."""
    for i, step in enumerate(program.steps):
        op = step.operation
        if any(op.given) and any(d >> argument & 1 for d in op.depends):
            return i
    return len(program.steps)


def _flops(eqn: Any) -> float:
    """Those of an equation, with the jaxprs inside of it."""
    inner = [
        jaxpr_of(x)
        for x in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(jaxpr_of(x), "eqns")
        )
        if hasattr(jaxpr_of(x), "eqns")
    ]
    if not inner:
        return flops_of(eqn)
    times = eqn.params.get("length", 1)
    return times * sum(_flops(e) for jaxpr in inner for e in jaxpr.eqns)


def _any(predicates: Sequence[Any]) -> jax.Array:
    return _any_of(jnp.concatenate([jnp.ravel(p) for p in predicates]))


@custom_vmap
def _any_of(flags: jax.Array) -> jax.Array:
    return jnp.any(flags)


@_any_of.def_vmap
def _any_of_batch(axis_size: int, in_batched: Any, flags: jax.Array) -> Any:
    """For a batch of masks, one level that suffices for all.

    A conditional stays one then, instead of both of its branches being run.
    """
    del axis_size, in_batched
    return _any_of(jnp.ravel(flags)), False

"""The costs of a backward pass in milliseconds, from programs that are run.

A compiled program cannot be asked which of its parts took how long: fusions belong to
no equation. So what is timed are whole programs, for growing sets of leaves, and their
differences are handed out in proportion to FLOPs.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from ._checks import is_traced


_LEVELS = 8  # programs to compile, at most, next to the forward pass


def measure_costs(
    costs: Any,
    loss: Callable[..., Any],
    params: optax.Params,
    arrays: Sequence[Any],
    has_aux: bool,
    runs: int,
    optimizer: optax.GradientTransformation | None,
) -> Any:
    """Turns the FLOPs of `BackwardCosts` into milliseconds, see `backward_costs`.

    Args:
      costs: what is known from the jaxpr.
      loss: ``loss(leaves, arrays)``, with the leaves of the params.
      params: pytree of arrays.
      arrays: all further arrays.
      has_aux: whether `loss` returns a pair.
      runs: how often each program runs; the fastest counts.
      optimizer: timed on its own, where given.

    Returns:
      The same structure in milliseconds.

    Raises:
      ValueError: a leaf or an array is a `jax.ShapeDtypeStruct` or a tracer.
    """
    leaves = jax.tree.leaves(params)
    for leaf in [*leaves, *arrays]:
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf):
            raise ValueError(f"measure runs fun and needs arrays, got {leaf!r}")
    masks = growing_sets(costs)
    programs = [_variant(loss, leaves, mask, has_aux) for mask in masks]
    calls: list[Callable[[], Any]] = []
    calls += [partial(program, leaves, arrays) for program in programs]
    if optimizer is not None:
        calls.append(_update(optimizer, params))
    fastest = _fastest(calls, runs)
    times = np.maximum.accumulate(fastest[: len(masks)])  # what is more takes longer
    timed = spread(costs, masks, times)
    if optimizer is not None:
        share = costs.traffic / max(costs.traffic.sum(), 1e-30)
        timed = timed._replace(weight=timed.weight + fastest[-1] * share)
    return timed


def growing_sets(costs: Any) -> list[np.ndarray]:
    """Masks from none to all leaves, with an equal share of the FLOPs added by each."""
    order = np.lexsort((np.arange(len(costs.paths)), costs.chain))
    masks = [np.zeros(len(costs.paths), bool)]
    for i in order:
        masks.append(masks[-1].copy())
        masks[-1][i] = True
    flops = np.array([costs.flops(mask) for mask in masks])
    steps = np.linspace(flops[0], flops[-1], _LEVELS + 1)
    chosen = np.unique(np.searchsorted(flops, steps * (1 - 1e-12)))
    return [masks[i] for i in np.union1d(chosen, [0, len(masks) - 1])]


def spread(costs: Any, masks: Sequence[np.ndarray], times: np.ndarray) -> Any:
    """Hands out the times of growing sets to what each adds, in proportion to FLOPs."""
    weight, groups = np.zeros_like(costs.weight), np.zeros_like(costs.groups)
    levels = zip(masks[:-1], masks[1:], np.diff(times), strict=True)
    for before, after, ms in levels:
        fresh = after & ~before
        runs = (costs.members & after).any(1) & ~(costs.members & before).any(1)
        scale = ms / max(costs.flops(after) - costs.flops(before), 1e-30)
        weight[fresh] = costs.weight[fresh] * scale
        groups[runs] = costs.groups[runs] * scale
    forward = float(times[0])
    return costs._replace(forward=forward, weight=weight, groups=groups, unit="ms")


def _variant(
    loss: Callable[..., Any], leaves: Sequence[Any], mask: np.ndarray, has_aux: bool
) -> Callable[..., Any]:
    """The compiled value and gradients of the leaves in `mask`."""

    def value_and_grad(leaves, arrays):
        def of_active(active):
            left = iter(active)
            pairs = zip(leaves, mask, strict=True)
            return loss([next(left) if on else x for x, on in pairs], arrays)

        active = [x for x, on in zip(leaves, mask, strict=True) if on]
        if not active:
            return of_active(active)
        return jax.value_and_grad(of_active, has_aux=has_aux)(active)

    return jax.jit(value_and_grad)


def _update(
    optimizer: optax.GradientTransformation, params: optax.Params
) -> Callable[[], Any]:
    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Any values do as gradients.
    return partial(update, params, optimizer.init(params), params)


def _fastest(calls: Sequence[Callable[[], Any]], runs: int) -> np.ndarray:
    """(calls,) milliseconds. Runs take turns, to meet the same disturbances."""
    for call in calls:
        jax.block_until_ready(call())  # compiles
    found = np.full(len(calls), np.inf)
    for _ in range(runs):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[i] = min(found[i], 1e3 * (time.perf_counter() - start))
    return found

"""What resting saves in the optimizer: `prioritize(adam)` over plain `optax.adam`.

Optimizer updates (params and state donated) of a 10M-parameter MLP with half of the
parameters resting, and with none resting, averaged over a cycle with its recalculation;
compile time for 200 leaves. Targets: 0.60, 1.05, 2.5.

The last rows of the compile times are there to compare with: what else is wrapped
around Adam, the exact allocation alone, and the least that `prioritize` can be, an Adam
in which each leaf is told whether it rests.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _timing import (
    as_rows,
    Case,
    compare,
    cycle_of_steps,
    parser,
    print_table,
    write_json,
)

from priorityprop_jax import allocate, prioritize, Score


def mlp(width: int = 1024, layers: int = 10) -> dict:
    """Parameters of a plain MLP, about ``layers * width**2`` of them."""
    keys = jax.random.split(jax.random.key(0), layers)
    return {
        f"Dense_{i}": {
            "kernel": jax.random.normal(key, (width, width)) / width**0.5,
            "bias": jnp.zeros(width),
        }
        for i, key in enumerate(keys)
    }


def optimizer_step(tx: optax.GradientTransformation, params) -> Case:
    """A cycle of updates by the same gradients."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.01), params)
    return cycle_of_steps(step, params, tx.init(params), grads)


def every_other_layer() -> Score:
    """All of the budget to the leaves of every other layer: the rest really rests."""
    return Score(
        lambda _: (),
        lambda x, state: ((x.index % 4 < 2).astype(jnp.float32), state),
    )


def compile_seconds(
    cases: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int
) -> dict[str, float]:
    """Trace, lower and compile: the median, all functions in turns."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (function, arguments) in cases.items():
            jax.clear_caches()
            gc.collect()
            start = time.perf_counter()
            jax.jit(function).lower(*arguments).compile()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def least(grads, mu, nu, counts, due):
    """Adam leaf by leaf, with a count for each, and some that rest. No allocation."""

    def leaf(g, m, v, n, on):
        choose = lambda new, old: jax.lax.select_n(on, old, new)
        m = choose(0.9 * m + 0.1 * g, m)
        v = choose(0.999 * v + 0.001 * g**2, v)
        first, second = m / (1 - 0.9**n), v / (1 - 0.999**n)
        u = -1e-3 * first / (jnp.sqrt(second) + 1e-8)
        return choose(u, jnp.zeros_like(u)), m, v

    return list(map(leaf, grads, mu, nu, counts, due))


def main() -> None:
    args = parser(__doc__).parse_args()
    adam, params = optax.adam(1e-3), mlp()
    cases = {
        "adam": adam,
        "prioritize, half resting": prioritize(
            adam, 0.5, 0, 10, score=every_other_layer()
        ),
        "prioritize, none resting": prioritize(adam, 1.0, 1, 10, score="uniform"),
        "prioritize, full budget": prioritize(adam, 1.0, 10, 10),
        # As above; but with max_updates > recalc_every there can be two in one step.
        "half resting, max_updates=20": prioritize(
            adam, 0.5, 0, 20, score=every_other_layer()
        ),
        "none resting, max_updates=20": prioritize(adam, 1.0, 1, 20, score="uniform"),
    }
    timings = compare(
        {name: optimizer_step(tx, params) for name, tx in cases.items()},
        rounds=args.rounds or 40,
        sample_seconds=0.5,
    )
    print_table(timings)

    leaves = {
        f"Dense_{i}": {"w": jnp.ones((128, 256)), "b": jnp.ones(256)}
        for i in range(100)
    }
    arrays = jax.tree.leaves(leaves)
    numbers, flags = [jnp.float32(1)] * 200, [jnp.array(True)] * 200
    update = lambda tx: (tx.update, (leaves, tx.init(leaves), leaves))
    seconds = compile_seconds(
        {
            "adam": update(adam),
            "prioritize": update(prioritize(adam, 0.5, max_updates=10)),
            "prioritize, max_updates=20": update(prioritize(adam, 0.5)),
            "MultiSteps(adam)": update(optax.MultiSteps(adam, 2)),
            "apply_if_finite(adam)": update(optax.apply_if_finite(adam, 3)),
            "allocate, 200 units": (allocate, (jnp.ones(200), 1000)),
            "adam with leaves that rest": (
                least,
                (arrays, arrays, arrays, numbers, flags),
            ),
        },
        rounds=7,
    )
    print("\ncompile time for 200 leaves")
    rows = as_rows(timings)
    for name, value in seconds.items():
        ratio = value / seconds["adam"]
        print(f"{name:26}  {value:5.2f} s  {ratio:.2f}")
        rows.append({"name": f"compile: {name}", "seconds": value, "ratio": ratio})
    write_json("prioritize_step", rows, args.out)


if __name__ == "__main__":
    main()

"""Rows of an embedding as units: what a step costs, by the number of rows.

Tables of 10^4, 10^5 and 10^6 rows of 32, batches of 256 ids drawn by Zipf's law. Params
and state are donated, and the ids change from step to step. Compared, on one core:

* adam: `optax.adam` on the dense gradient of the table;
* prioritize: `prioritize(adam, 0.5, units=(0,))`: rows as units, all of them scored;
* rows: `row_sparse(adam)`: the rows that the batch touches, and no others;
* rows, half: the same for the better half of those rows.

A sample is ten steps. "step" is a whole train step: look-up, loss, gradient, update.
"optimizer" is the update alone, of gradients that are there already: dense ones, or
those of the touched rows (putting rows back into the table is part of it). Ratios are
to adam, within a round.
"""

import os


os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
)

import functools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _timing import (  # noqa: E402
    as_rows,
    Case,
    compare,
    parser,
    print_table,
    write_json,
)

from priorityprop_jax import (  # noqa: E402
    prioritize,
    put_rows,
    row_sparse,
    take_rows,
    touched_rows,
)


WIDTH, BATCH, STEPS = 32, 256, 10  # a cycle of prioritize, with its recalculation


def zipf(rows: int, exponent: float = 1.0) -> list[jax.Array]:
    """Batches of ids; the r-th most frequent has a share in proportion to 1/r."""
    shares = np.cumsum(1.0 / np.arange(1, rows + 1) ** exponent)
    draws = np.random.default_rng(0).random((STEPS, BATCH)) * shares[-1]
    return [jnp.asarray(ids, jnp.int32) for ids in np.searchsorted(shares, draws)]


def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(table[ids] - 1.0))


def turns(
    step: Callable[..., Any], rows: int, init: Callable[[jax.Array], Any], inputs: list
) -> Case:
    """A cycle of steps that pass table and state on, each with the next input."""
    held: list[Any] = [None]
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def start():
        table = jnp.zeros((rows, WIDTH))
        return table, init(table)

    def cycle():
        for i in range(STEPS):
            held[0] = compiled(*held[0], *inputs[i % len(inputs)])
        return held[0]

    def renew():
        if held[0] is None:  # once: at 10^6 rows, it takes as long as the steps
            held[0] = start()
            jax.block_until_ready(cycle())

    return Case(cycle, (), compiled, (*jax.eval_shape(start), *inputs[0]), renew)


def dense(tx: optax.GradientTransformation, rows: int, whole: bool) -> Case:
    def update(table, state, grads):
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    def step(table, state, ids):
        return update(table, state, jax.grad(loss)(table, ids))

    batches = zipf(rows)
    if whole:
        return turns(step, rows, tx.init, [(ids,) for ids in batches])
    grads = jax.jit(jax.grad(loss))(jnp.zeros((rows, WIDTH)), batches[0])
    return turns(update, rows, tx.init, [(grads,)])


def sparse(tx: optax.GradientTransformationExtraArgs, rows: int, whole: bool) -> Case:
    def update(table, state, touched, grads, block):
        updates, state = tx.update(grads, state, block, rows=touched)
        block = optax.apply_updates(block, updates)
        return put_rows(table, touched, block), state

    def differentiate(table, ids):
        touched = touched_rows(ids, rows)
        block = take_rows(table, touched)
        return touched, jax.grad(loss)(block, touched.inverse), block

    def step(table, state, ids):
        return update(table, state, *differentiate(table, ids))

    batches = zipf(rows)
    if whole:
        return turns(step, rows, tx.init, [(ids,) for ids in batches])
    found = functools.partial(jax.jit(differentiate), jnp.zeros((rows, WIDTH)))
    return turns(update, rows, tx.init, [found(ids) for ids in batches])


def cases(rows: int, whole: bool) -> dict[str, Case]:
    adam = optax.adam(1e-3)
    rests = prioritize(adam, 0.5, 0, 10, units=(0,))
    return {
        "adam": dense(adam, rows, whole),
        "prioritize": dense(rests, rows, whole),
        "rows": sparse(row_sparse(adam), rows, whole),
        "rows, half": sparse(row_sparse(adam, 0.5), rows, whole),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    arguments.add_argument("--parts", nargs="+", default=["step", "optimizer"])
    args = arguments.parse_args()
    found = []
    for rows in args.rows:
        for part in args.parts:
            print(f"\n{rows:,} rows, {part}, ten times")
            timings = compare(
                cases(rows, part == "step"),
                rounds=args.rounds or (5 if rows > 10**5 else 10),
            )
            print_table(timings)
            by_name = {t.name: t for t in timings}
            for name in ("rows", "rows, half"):
                ratio = 1 / by_name[name].ratio.median
                print(f"{name}: {ratio:.0f} times as fast as adam")
            found += as_rows(timings, rows=rows, part=part, steps=STEPS)
    write_json("embedding_rows", found, args.out)


if __name__ == "__main__":
    main()

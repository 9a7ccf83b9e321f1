"""What `PriorityPropTrainer` costs over a loop that is written by hand.

An epoch of a perceptron at some 2 ms a step, from batches of NumPy arrays to the mean
of the losses, by:

* by hand: a jitted function with `jax.value_and_grad` and `optax.adam`, and a loop that
  waits for nothing until the end of the epoch;
* trainer: `PriorityPropTrainer` with ``total_budget=None``: all leaves at every step;
* by hand, half: the same loop around `make_train_step` and `prioritize` with half of
  the budget, in static mode;
* trainer, half: `PriorityPropTrainer` with that same transformation.

The trainer is given a loss per example, so that it weighs them, as batches could be
padded. It looks at each loss, 10 to 20 steps later, and keeps history and account. What
is compared is measured in turns; the ratio is to the loop of the same kind. Last, for
comparison, the trainer in dynamic mode.

Memory: 10^5 steps of a small model, with the bytes of all arrays of JAX that are alive
and the resident set of the process at ten points.

Targets: a ratio of at most 1.03; memory flat.
"""

import gc
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import (
    as_rows,
    Case,
    compare,
    keep_memory,
    parser,
    Quartiles,
    ratio,
    write_json,
)

from priorityprop_jax import make_train_step, prioritize, PriorityPropTrainer


SIZES = (64, 256, 256, 256, 10)
BATCH = 640
STEPS = 200  # in an epoch
TARGET = 1.03
PAIRS = {"trainer": "by hand", "trainer, half": "by hand, half"}


def init(sizes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def layer(m, n):
        w = rng.normal(size=(m, n)) * m**-0.5
        return {"w": w.astype(np.float32), "b": np.zeros(n, np.float32)}

    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return {f"layer_{i}": layer(m, n) for i, (m, n) in enumerate(pairs)}


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        x = x if i == 0 else jax.nn.relu(x)
        x = x @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"]
    return x


losses = optax.softmax_cross_entropy_with_integer_labels


def loss_fn(params: dict[str, Any], x: jax.Array, labels: jax.Array) -> jax.Array:
    return losses(apply(params, x), labels).mean()


def batches_of(sizes: tuple[int, ...], batch: int, count: int) -> list:
    rng = np.random.default_rng(1)
    draw = lambda: rng.normal(size=(batch, sizes[0])).astype(np.float32)
    labels = lambda: rng.integers(0, sizes[-1], batch).astype(np.int32)
    return [(draw(), labels()) for _ in range(count)]


def full_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params, opt_state, x, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


class Loop(NamedTuple):
    """One epoch, on from the one before; and the same state somewhere else in memory.

    Where params and state happen to lie makes a step faster or slower, and while they
    are donated they stay there.
    """

    epoch: Callable[[], float]
    move: Callable[[], None]


def by_hand(step: Callable[..., Any], tx: Any, batches: list) -> Loop:
    params = jax.tree.map(jnp.asarray, init(SIZES))
    held = [(params, tx.init(params))]

    def move():
        held[0] = jax.block_until_ready(jax.tree.map(jnp.copy, held[0]))

    def epoch():
        params, opt_state = held[0]
        losses = []
        for batch in batches:
            params, opt_state, loss = step(params, opt_state, *batch)
            losses.append(getattr(loss, "loss", loss))
        held[0] = jax.block_until_ready((params, opt_state))
        return float(np.mean(jax.device_get(losses)))

    return Loop(epoch, move)


def by_trainer(
    batches: list, tx: optax.GradientTransformation, **settings: Any
) -> Loop:
    model = init(SIZES), apply
    trainer = PriorityPropTrainer(model, tx, losses, progress=False, **settings)

    def epoch():
        loss = trainer.train(batches, 1)["loss"][-1]
        jax.block_until_ready((trainer.params, trainer.opt_state))
        return loss

    def move():
        held = trainer.params, trainer.opt_state
        held = jax.block_until_ready(jax.tree.map(jnp.copy, held))
        trainer.params, trainer.opt_state = held

    return Loop(epoch, move)


def measure_steps(rounds: int) -> tuple[list[dict[str, Any]], bool]:
    batches = batches_of(SIZES, BATCH, STEPS)
    adam = optax.adam(1e-3)
    half = prioritize(optax.adam(1e-3), budget=0.5)
    step = full_step(adam)
    params = init(SIZES)
    compiled = step, (params, adam.init(params), *batches[0])
    loops = {
        "by hand": by_hand(step, adam, batches),
        "trainer": by_trainer(batches, adam, total_budget=None),
        "by hand, half": by_hand(make_train_step(loss_fn, half), half, batches),
        "trainer, half": by_trainer(batches, half),
        "trainer, half, dynamic": by_trainer(batches, half, mode="dynamic"),
    }
    for loop in loops.values():
        for _ in range(2):  # the masks of a few cycles, and their programs
            loop.epoch()
    cases = {
        name: Case(loop.epoch, (), *compiled, renew=loop.move)
        for name, loop in loops.items()
    }
    timings = {t.name: t for t in compare(cases, rounds)}
    width, rows, ok = max(map(len, timings)), [], True
    print(f"{'':{width}}  {'a step':>9}  {'ratio':>6}  quartiles")
    for name, timing in timings.items():
        seconds = Quartiles(*(s / STEPS for s in timing.seconds))
        to = PAIRS.get(name, name if name in PAIRS.values() else "by hand, half")
        found = ratio(timing, timings[to])
        print(
            f"{name:{width}}  {seconds.median * 1e3:6.3f} ms  {found.median:6.3f}  "
            f"{found.low:.3f}..{found.high:.3f}  to {to}",
            flush=True,
        )
        met = found.median <= TARGET if name in PAIRS else None
        ok = ok and met is not False
        timing = timing._replace(seconds=seconds, ratio=found)
        rows += as_rows([timing], kind="step", to=to, steps=STEPS, met=met)
    return rows, ok


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(steps: int) -> tuple[list[dict[str, Any]], bool]:
    """At ten points of a run, from the first tenth on."""
    sizes = (8, 16, 16, 4)
    batches = batches_of(sizes, 16, 100)
    trainer = PriorityPropTrainer(
        (init(sizes), apply),
        optax.adam(1e-3),
        losses,
        total_budget=0.5,
        progress=False,
    )
    rows: list[dict[str, Any]] = []
    epochs = steps // len(batches)
    points = {epochs * i // 10 for i in range(1, 11)}

    def look(trainer, event):
        if event.kind == "epoch" and event.epoch + 1 in points:
            gc.collect()
            arrays = jax.live_arrays()
            row = {
                "kind": "memory",
                "step": event.step,
                "arrays": len(arrays),
                "live_bytes": sum(x.nbytes for x in arrays),
                "resident_bytes": resident(),
            }
            rows.append(row)
            print(
                f"{row['step']:>8,} steps  {row['arrays']:4} arrays  "
                f"{row['live_bytes'] / 1e3:9.1f} kB  "
                f"{row['resident_bytes'] / 1e6:8.1f} MB resident",
                flush=True,
            )

    trainer.train(batches, epochs, callbacks=look)
    live = [row["live_bytes"] for row in rows]
    grown = rows[-1]["resident_bytes"] - statistics.median(
        row["resident_bytes"] for row in rows[:3]
    )
    per_step = grown / (rows[-1]["step"] - rows[1]["step"])
    print(
        f"live arrays {min(live)}..{max(live)} bytes; the resident set grew by "
        f"{per_step:.1f} bytes a step"
    )
    rows.append({"kind": "growth", "resident_bytes_per_step": per_step})
    return rows, max(live) <= 1.01 * live[0]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--memory-steps", type=int, default=100_000)
    args = arguments.parse_args()
    rows, flat = measure_memory(args.memory_steps)  # before it is told to keep it
    keep_memory()
    more, fast = measure_steps(args.rounds or 30)
    print(f"ratio at most {TARGET}: {fast}; live arrays flat: {flat}")
    path = write_json("trainer", rows + more, args.out)
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""An embedding and hardly anything else: what a bag of ids is about, of ten topics.

Ids follow Zipf's law. Each has a hidden vector, and the topic of a bag is read off the
mean of those of its ids; so every row of the table is worth learning, and rare ones are
seen a few times in a run. Fresh examples at each step; held-out ones are other draws.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax import (
    prioritize,
    put_rows,
    row_sparse,
    take_rows,
    touched_rows,
)

from ._policies import (
    Arm,
    compiled_flops,
    costs_of,
    CYCLE,
    plain,
    Program,
    Run,
    schedule,
    Settings,
)
from ._workload import Workload


ROWS = {"small": 10**5, "large": 10**6}
STEPS = {"small": 2000, "large": 500}
TARGETS = {"small": (0.65, 0.7), "large": (0.5, 0.53)}
WIDTH, BAG, TOPICS, HIDDEN, HELD_OUT = 32, 8, 10, 8, 10_000


def workload(data_dir: str | None, scale: str) -> Workload:
    del data_dir  # planted
    rows = ROWS[scale]
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
    topics = rng.normal(size=(HIDDEN, TOPICS)).astype(np.float32)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, topics): id k has a share of about 1 / (k + 1)."""
        ids = ((rows + 1) ** rng.random((n, BAG)) - 1).astype(np.int32)
        ids = np.minimum(ids, rows - 1)
        labels = (hidden[ids].mean(axis=1) @ topics).argmax(axis=1)
        return ids, labels.astype(np.int32)

    def batches(seed: int, batch_size: int, steps: int) -> Iterator[Any]:
        rng = np.random.default_rng([1, seed])
        return (draw(rng, batch_size) for _ in range(steps))

    held_out = draw(np.random.default_rng([2]), HELD_OUT)
    correct = jax.jit(
        lambda params, ids, y: jnp.mean(apply(params, ids).argmax(-1) == y)
    )
    return Workload(
        name="embedding",
        init=lambda seed: init(seed, rows),
        loss=loss,
        batches=batches,
        quality=lambda params: float(correct(params, *held_out)),
        targets=TARGETS[scale],
        batch_size=256,
        learning_rate=3e-2,
        steps=STEPS[scale],
        evaluations=40,
        description=f"bags of {BAG} ids, embedding of {rows:,} x {WIDTH}",
    )


def init(seed: int, rows: int) -> dict[str, Any]:
    embed, out = jax.random.split(jax.random.key(seed))
    return {
        "embed": 0.01 * jax.random.normal(embed, (rows, WIDTH)),
        "out": {
            "w": jax.random.normal(out, (WIDTH, TOPICS)) / WIDTH**0.5,
            "b": jnp.zeros(TOPICS),
        },
    }


def apply(params: Any, ids: jax.Array) -> jax.Array:
    bag = params["embed"][ids].mean(axis=-2)
    return bag @ params["out"]["w"] + params["out"]["b"][None]


def loss(params: Any, batch: Any) -> jax.Array:
    ids, labels = batch
    logits = apply(params, ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- arms


def arms() -> dict[str, Arm]:
    """By rows; the dense baseline is `adam`, an arm of all workloads."""
    found = (
        plain("prioritize_rows", _prioritize, about="rows as units, all scored, 50 %"),
        by_rows("rows", _adam, about="row_sparse: Adam of touched rows"),
        *(
            by_rows(f"rows_{b}", _adam, b / 100, about=f"the best {b} % of those rows")
            for b in (75, 50, 25)
        ),
        by_rows("rows_random_50", _adam, 0.5, "random", "half of them, drawn"),
        by_rows("rows_adagrad", _adagrad, about="row_sparse: Adagrad of touched rows"),
        by_rows("lazy_adam", _lazy_adam, about="LazyAdam, SparseAdam: global bias"),
    )
    return {arm.name: arm for arm in found}


def by_rows(
    name: str,
    optimizer: Callable[[Workload, Settings], optax.GradientTransformation],
    budget: float | None = None,
    score: str = "priority",
    about: str = "",
) -> Arm:
    """Touched rows by `row_sparse`, the rest by the same optimizer as it is."""

    def start(workload, settings):
        params = jax.tree.map(jnp.array, workload.init(settings.seed))
        inner, seed = optimizer(workload, settings), settings.seed
        parts = {
            "rows": row_sparse(inner, budget, score=score, seed=seed),
            "dense": inner,
        }
        tx = optax.partition(parts, {"embed": "rows", "out": "dense"})
        rows = params["embed"].shape[0]

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, opt_state, batch):
            ids, labels = batch
            touched = touched_rows(ids, rows)
            block = {**params, "embed": take_rows(params["embed"], touched)}
            grads = jax.grad(workload.loss)(block, (touched.inverse, labels))
            updates, opt_state = tx.update(grads, opt_state, block, rows=touched)
            new = optax.apply_updates(block, updates)
            table = put_rows(params["embed"], touched, new["embed"])
            return {**new, "embed": table}, opt_state

        def step(run, i, batch):
            del i
            return Run(*update(run.params, run.opt_state, batch), run.steps + 1)

        full = costs_of(workload, settings.batch_size).full
        return Program(
            Run(params, tx.init(params)),
            step,
            lambda run: run.params,
            lambda run: run.steps * full,
            xla_flops=lambda run, batch: (
                run.steps * compiled_flops(update, run.params, run.opt_state, batch)
            ),
        )

    return Arm(name, start, about=about)


def _adam(workload: Workload, settings: Settings) -> optax.GradientTransformation:
    return optax.adam(schedule(workload, settings))


def _adagrad(workload: Workload, settings: Settings) -> optax.GradientTransformation:
    """Its steps shrink from the first on: ten times the rate is as much."""
    rate = schedule(workload, settings)
    return optax.adagrad(lambda step: 10 * rate(step), 0.0, eps=1e-16)


def _prioritize(workload: Workload, settings: Settings) -> Any:
    units = {"embed": (0,), "out": ()}
    return prioritize(
        _adam(workload, settings), 0.5, 0, CYCLE, recalc_every=CYCLE, units=units
    )


def _lazy_adam(workload: Workload, settings: Settings) -> Any:
    """Adam whose bias is corrected by the step, not by a row's own updates."""
    rate, b1, b2 = schedule(workload, settings), 0.9, 0.999

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return zeros(), zeros()

    def update(updates, state, params=None):
        del params
        mu, nu = state
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, nu, updates)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mu, nu)
        return updates, (mu, nu)

    def scale(step):
        return -rate(step) * jnp.sqrt(1 - b2 ** (step + 1)) / (1 - b1 ** (step + 1))

    moments = optax.GradientTransformation(init, update)
    return optax.chain(moments, optax.scale_by_schedule(scale))

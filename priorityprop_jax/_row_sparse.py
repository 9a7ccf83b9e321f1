"""`row_sparse`: an optimizer of rows, of which all but those a batch touches rest."""

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._checks import check_count, check_name
from ._leafwise import of_the_step
from ._rows import (
    against,
    beyond,
    check_table,
    gather,
    Rows,
    rows_of_each,
    scatter,
)
from ._scores import MAGNITUDES, magnitudes, Score, ScoreInputs, SCORES
from ._units import layout


_MOST = 2**31 - 1
_NAMES = ("priority", "gradient", "random", "ucb")  # "cyclic" needs all rows


class RowSparseState(NamedTuple):
    """The state of `row_sparse`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from priorityprop_jax import row_sparse
      >>> state = row_sparse(optax.adam(1e-3)).init({"embed": jnp.ones((5, 2))})
      >>> print(state.counts["embed"])
      [0 0 0 0 0]
    """

    step: jax.Array  # calls of update so far; shape=(), dtype=int32
    counts: Any  # updates of each row; like the params, shape=(rows,), dtype=int32
    inner: Any  # like the params, with a state of `inner` for each: shape=(rows, ...)


def row_sparse(
    inner: optax.GradientTransformation,
    budget: int | float | None = None,
    *,
    magnitude: str = "l2",
    score: str | Score = "priority",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Update only the rows that a batch touches, each with an optimizer of its own.

    Every row has its own state of `inner`: a row that is not touched rests for real
    (no moment decays, no weight decay), and Adam's bias correction counts the row's
    own updates. Learning-rate schedules in `inner` follow the global step (recognized:
    optax's schedules, and `optax.inject_hyperparams`). With a `budget`, of the touched
    rows only those with the highest score are updated; by default

    .. math::
      score_u = |g_u| / (1 + count_u)

    The work is proportional to the capacity of `touched_rows`, and that of `inner` to
    the budget; neither depends on the number of rows, if the state is donated. A
    dense optimizer goes through all rows, and so does `prioritize` with rows as units.

    .. note::
      The "lazy" Adam of TensorFlow Addons (`LazyAdam`) and PyTorch (`SparseAdam`)
      updates the touched rows, too, but corrects the bias by the global step. A row
      first seen late then has moments of one gradient, and no correction: its first
      step is :math:`(1 - b_1) / \sqrt{1 - b_2} = 3.2` times the learning rate. Here it
      is the learning rate.

    Args:
      inner: any optax transformation of one array; it is shown one row at a time (by
        `jax.vmap`). What couples rows belongs in front: a chain with
        `optax.clip_by_global_norm` clips by the very norm of the dense gradients.
      budget: rows updated in one step, of all tables together. A Python int: at most so
        many. A float in (0, 1]: that share of the rows that the batch touches, rounded
        up. None: all of them.
      magnitude: size of a row's gradient, see `priority_prop`.
      score: "priority", "gradient", "random" or "ucb", as in `priority_prop`, or a
        `Score` without state; asked at each step, of the touched rows alone. Ties go to
        the lower row.
      seed: an integer, for "random".

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `RowSparseState`. Its `init`
      takes the tables (a pytree of arrays of shape ``(num_rows, ...)``); its `update`
      the gradients of the block that `take_rows` returned, the state, the block as the
      params, and ``rows=`` what `touched_rows` returned (one for all tables, or a
      pytree with one for each). The updates are those of the block, negative zeros for
      rows that rest. With a budget, rows with a gradient that is not finite rest.

    Raises:
      TypeError, ValueError: an argument cannot be meant; in `init` and `update`, where
        shapes and `rows` do not fit or a leaf has no rows or no gradient.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from priorityprop_jax import put_rows, row_sparse, take_rows, touched_rows
      >>> table, ids = jnp.zeros((1000, 4)), jnp.array([3, 14, 15, 3])
      >>> tx = row_sparse(optax.adam(0.1), budget=2)
      >>> loss = lambda embed, ids: jnp.sum((embed[ids] - 1.0) ** 2)
      >>> def step(table, state, ids):
      ...     rows = touched_rows(ids, num_rows=1000)
      ...     block = take_rows(table, rows)
      ...     grads = jax.grad(loss)(block, rows.inverse)
      ...     updates, state = tx.update(grads, state, block, rows=rows)
      ...     block = optax.apply_updates(block, updates)
      ...     return put_rows(table, rows, block), state
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> state = tx.init(table)
      >>> for _ in range(3):
      ...     table, state = step(table, state, ids)
      >>> print(state.counts[jnp.array([3, 14, 15, 16])])
      [3 2 1 0]

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015 (bias correction:
      section 3); `torch.optim.SparseAdam
      <https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html>`_.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner must be an optax.GradientTransformation, got {inner!r}; for "
            f"example row_sparse(optax.adam(1e-3))"
        )
    _check_budget(budget)
    check_name("magnitude", magnitude, MAGNITUDES)
    check_count("seed", seed, least=-(2**31))
    if not isinstance(score, Score):
        check_name("score", score, _NAMES)
        score = SCORES[score]
    elif jax.tree.leaves(score.init(jnp.zeros((1,)))):
        raise ValueError("score must have no state: not all rows are seen at each step")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        where = layout(params, "leaf")
        for path, shape in zip(where.paths, where.shapes, strict=True):
            check_table(path, shape)
        return RowSparseState(
            step=jnp.zeros([], jnp.int32),
            counts=jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.int32), params),
            inner=jax.tree.map(functools.partial(_init_table, inner), params),
        )

    def update_fn(updates, state, params=None, *, rows=None, **extra_args):
        paths, kind = layout(updates, "leaf").paths, jax.tree.structure(updates)
        step = optax.safe_increment(state.step)
        if not paths:
            return updates, state._replace(step=step)
        if rows is None:
            raise ValueError(
                "update needs the rows that the gradients belong to: "
                "tx.update(grads, state, block, rows=touched_rows(ids, num_rows))"
            )
        counts = kind.flatten_up_to(state.counts)
        states = kind.flatten_up_to(state.inner)
        found = rows_of_each(rows, len(paths))
        grads = [jnp.asarray(g) for g in jax.tree.leaves(updates)]
        blocks = [None] * len(paths) if params is None else jax.tree.leaves(params)
        if len(blocks) != len(paths):
            raise ValueError(
                f"params must match the updates, which have {len(paths)} leaves, got "
                f"{len(blocks)}"
            )
        for values in zip(paths, grads, blocks, found, strict=True):
            _check_block(*values)
        real = [r.index < c.size for r, c in zip(found, counts, strict=True)]
        chosen, sizes = real, [None] * len(paths)
        if budget is not None:
            rules = magnitude, score, seed
            scores = _scores(*rules, grads, found, counts, real, state.step)
            chosen, most = _best(scores, real, budget)
            sizes = [min(most, g.shape[0]) for g in grads]
        update = functools.partial(_update_table, inner, extra_args)
        out = map(update, grads, blocks, counts, states, found, chosen, sizes)
        updates, counts, states = map(kind.unflatten, zip(*out, strict=True))
        return updates, state._replace(step=step, counts=counts, inner=states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_table(inner: optax.GradientTransformation, leaf: Any) -> Any:
    """One state of `inner` for each row, and one for all of what counts steps."""
    row = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    one = jax.eval_shape(inner.init, row)
    axes = [None if of_step else 0 for of_step in of_the_step(one)]
    init = lambda p: jax.tree.leaves(inner.init(p))
    values = jax.vmap(init, out_axes=axes)(leaf)
    strong = [lax.convert_element_type(x, x.dtype) for x in values]
    return jax.tree.unflatten(jax.tree.structure(one), strong)


def _update_table(
    inner: optax.GradientTransformationExtraArgs,
    extra_args: dict[str, Any],
    grads: jax.Array,
    block: jax.Array | None,
    counts: jax.Array,
    state: Any,
    rows: Rows,
    chosen: jax.Array,
    size: int | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """(updates, counts, state); `size`: at most so many are chosen, None: all rows."""
    n, g, p = grads.shape[0], grads, grads if block is None else block
    place, index = None, rows.index
    if size is not None:
        (place,) = jnp.nonzero(chosen, size=size, fill_value=n)
        # Distinct and rising, also beyond the end where fewer were chosen.
        spare = n + lax.iota(jnp.int32, size)
        place = jnp.where(place < n, place.astype(jnp.int32), spare)
        index = jnp.where(place < n, gather(index, place), beyond(size))
        g, p = gather(g, place), gather(p, place)
    values, kind = jax.tree.flatten(state)
    of_step = of_the_step(state)
    own = [gather(x, index) for x, s in zip(values, of_step, strict=True) if not s]
    shared = [x for x, s in zip(values, of_step, strict=True) if s]

    def one(g: Any, own: Any, p: Any) -> Any:
        mine, ours = iter(own), iter(shared)
        before = kind.unflatten(next(ours if s else mine) for s in of_step)
        params = None if block is None else p
        update, after = inner.update(g, before, params, **extra_args)
        after = list(zip(jax.tree.leaves(after), of_step, strict=True))
        return update, [x for x, s in after if not s], [x for x, s in after if s]

    update, own, shared = jax.vmap(one, in_axes=0, out_axes=(0, 0, None))(g, own, p)
    mine, ours = iter(own), iter(shared)
    after = [
        next(ours).astype(x.dtype) if s else scatter(x, index, next(mine))
        for x, s in zip(values, of_step, strict=True)
    ]
    number = jnp.minimum(gather(counts, index), _MOST - 1) + 1
    rest = lax.neg(jnp.zeros((n, *update.shape[1:]), update.dtype))
    if place is None:
        update = jnp.where(against(chosen, update), update, rest)
    else:
        update = scatter(rest, place, update)
    return update, scatter(counts, index, number), kind.unflatten(after)


def _scores(
    magnitude: str,
    score: Score,
    seed: int,
    grads: list[jax.Array],
    found: list[Rows],
    counts: list[jax.Array],
    real: list[jax.Array],
    step: jax.Array,
) -> jax.Array:
    """Of all touched rows of all tables; -1 where there is no row, or no number."""
    sizes = magnitudes(grads, [(0,)] * len(grads), magnitude)
    usable = jnp.concatenate(real) & jnp.isfinite(sizes)
    sizes = jnp.where(usable, sizes, 0.0)
    index = [r.index for r in found]
    *starts, units = np.cumsum([0, *(c.size for c in counts)])
    scores, _ = score.update(
        ScoreInputs(
            magnitudes=sizes,
            counts=jnp.concatenate(list(map(gather, counts, index))),
            depth_factors=jnp.ones((1,), jnp.float32),
            index=jnp.concatenate(
                [
                    i.astype(jnp.uint32) + np.uint32(k)
                    for i, k in zip(index, starts, strict=True)
                ]
            ),
            units=int(units),
            offset=0,
            peak=jnp.max(sizes, initial=0),
            cycle=step,
            step=step,
            seed=seed,
        ),
        (),
    )
    if jnp.shape(scores) != sizes.shape:
        raise ValueError(
            f"score must return one score per touched row, shape {sizes.shape}, got "
            f"shape {jnp.shape(scores)}"
        )
    good = jnp.isfinite(scores) & (scores > 0)
    scores = jnp.where(good, scores, 0.0).astype(jnp.float32)
    return jnp.where(usable, scores, -1.0)


def _best(
    scores: jax.Array, real: list[jax.Array], budget: int | float
) -> tuple[list[jax.Array], int]:
    """Which rows of each block are updated, and how many at most."""
    if isinstance(budget, numbers.Integral):
        most = min(int(budget), scores.size)
        limit = most
    else:
        # The rounding error of a share like 0.1 is no reason for one more.
        share = np.float32(budget * (1 - 1e-6))
        most = max(math.ceil(share * scores.size), 1)
        touched = sum(jnp.sum(r, dtype=jnp.int32) for r in real)
        limit = jnp.ceil(share * touched).astype(jnp.int32)
    best, at = lax.top_k(scores, most)
    chosen = (best >= 0) & (lax.iota(jnp.int32, most) < limit)
    chosen = jnp.zeros(scores.shape, bool).at[at].set(chosen, unique_indices=True)
    ends = np.cumsum([r.size for r in real])[:-1]
    return jnp.split(chosen, ends), most


def _check_block(path: str, grads: jax.Array, block: Any, rows: Rows) -> None:
    n = rows.index.size
    if grads.shape[:1] != (n,):
        raise ValueError(
            f"the gradient of {path} must have one row for each of {n} places, got "
            f"shape {grads.shape}: differentiate with respect to "
            f"take_rows(table, rows), not to the table"
        )
    if block is not None and jnp.shape(block) != grads.shape:
        raise ValueError(
            f"params must be the block that take_rows returned, of shape {grads.shape} "
            f"at {path}, got shape {jnp.shape(block)}"
        )


def _check_budget(budget: Any) -> None:
    """Raises unless `budget` is None, a positive int or a float in (0, 1]."""
    if budget is None:
        return
    allowed = (
        "budget must be None (all touched rows), a positive int (rows per step), or a "
        "float in (0, 1] (a share of the touched rows)"
    )
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"{allowed}; it decides shapes, got {budget!r}")
    most = math.inf if isinstance(budget, numbers.Integral) else 1.0
    if not 0 < float(budget) <= most:
        raise ValueError(f"{allowed}, got {budget!r}")

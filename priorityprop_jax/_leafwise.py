"""An optimizer's update, taken apart: one function per leaf of the params.

`inner.update` is traced once, for all leaves together, and its equations are sorted by
the leaf that they depend on. What depends on no leaf is shared: Adam's `count`, and the
bias corrections made from it. An optimizer that couples leaves cannot be sorted; it is
shown one leaf at a time, with all others masked out.

Shared state becomes vectors with an entry per leaf, because leaves no longer step
together. What follows the global step (learning-rate schedules) stays as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._slices import CAPTURED, NOTHING, SHARED, trace


_STEP = CAPTURED  # owner of what follows the global step
_SCHEDULES = (optax.ScaleByScheduleState,)
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
# Cheap enough to be computed for a leaf that rests, if that saves an array.
_ELEMENTWISE = frozenset(
    "abs add add_any and broadcast_in_dim clamp convert_element_type copy div eq exp "
    "ge gt integer_pow is_finite jit le log log1p lt max min mul ne neg not or pjit "
    "pow rsqrt select_n sign sqrt square stop_gradient sub tanh".split()
)


class Leafwise(NamedTuple):
    """`inner.update` of one step, by leaf. States are lists of arrays."""

    own: list[list[jax.Array]]  # the state of each leaf alone
    shared: list[jax.Array]  # what all leaves share; shape=(leaves, ...)
    # Of one leaf: shared state -> after one update, and the factors used in it.
    advance: Callable[[list], tuple[list, list]]
    # (leaf, gradient, own, factors, param) -> (update, own)
    update: Callable[[int, Any, list, list, Any], tuple[Any, list]]
    # The state after that alone.
    move: Callable[[int, Any, list, list, Any], list]
    # The update alone, from the own state *after* it; None where it takes the old one.
    late_update: Callable[[int], Callable[[Any, list, list, Any], Any] | None]
    dtype: Callable[[int], Any]  # of the update of a leaf
    fresh: Callable[[int, Any], tuple[list, list]]  # own and shared, at the start
    collect: Callable[[list[list], list], Any]  # (own, shared) -> the inner state


def init_inner(inner: optax.GradientTransformation, params: optax.Params) -> Any:
    """The state of `inner`, with an entry per leaf of what is shared."""
    state = inner.init(params)
    n = len(jax.tree.leaves(params))
    values = []
    for x, owner in zip(jax.tree.leaves(state), _owners(inner, params), strict=True):
        if owner == SHARED:
            x = jnp.broadcast_to(x, (n, *jnp.shape(x)))
        values.append(x if owner == _STEP else lax.convert_element_type(x, x.dtype))
    return jax.tree.unflatten(jax.tree.structure(state), values)


def update_together(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """`inner` itself, bit for bit, where no leaf ever rests."""
    owners, kind = _owners(inner, updates), jax.tree.structure(state)
    values = jax.tree.leaves(state)
    plain = [
        x[0] if owner == SHARED else x for x, owner in zip(values, owners, strict=True)
    ]
    updates, state = inner.update(updates, kind.unflatten(plain), params, **extra_args)
    new = [
        jnp.broadcast_to(x, old.shape) if owner == SHARED else x
        for x, old, owner in zip(jax.tree.leaves(state), values, owners, strict=True)
    ]
    return updates, kind.unflatten(new)


def leafwise(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> Leafwise:
    """Takes one call of `inner.update` apart."""
    call = _Call(
        inner,
        _owners(inner, updates),
        jax.tree.structure(updates),
        jax.tree.structure(state),
        jax.tree.leaves(updates),
        jax.tree.leaves(state),
        None if params is None else jax.tree.leaves(params),
        extra_args,
    )
    return _by_equations(call) or _by_masks(call)


class _Call(NamedTuple):
    inner: optax.GradientTransformationExtraArgs
    owners: tuple[int, ...]  # of each leaf of the inner state
    kind: Any  # treedef of the updates
    state_kind: Any  # treedef of the inner state
    grads: list[jax.Array]
    values: list[jax.Array]  # leaves of the inner state
    params: list[jax.Array] | None
    extra_args: dict[str, Any]

    def parts(self, values: Sequence[Any], *present: int) -> dict[int, list[Any]]:
        """The leaves of a state by owner; others than `present` are masked out."""
        owners = [o for o in self.owners if not present or o in present]
        out = {o: [] for o in present or (SHARED, _STEP, *range(len(self.grads)))}
        for x, owner in zip(values, owners, strict=True):
            out[owner].append(x)
        return out

    def place(self, parts: dict[int, list[Any]]) -> list[Any]:
        """The leaves of a state from their owners' parts, others masked out."""
        held = {owner: iter(part) for owner, part in parts.items()}
        return [next(held[o]) if o in held else optax.MaskedNode() for o in self.owners]

    def only(self, i: int | None, value: Any) -> Any:
        """A tree like the updates in which one leaf, or none, is not masked out."""
        return self.kind.unflatten(
            value if i == j else optax.MaskedNode() for j in range(self.kind.num_leaves)
        )

    def update(self, grads: Any, values: list[Any], params: Any) -> tuple[Any, Any]:
        """`inner.update` with a flat state."""
        state = self.state_kind.unflatten(values)
        params = None if self.params is None else params
        return self.inner.update(grads, state, params, **self.extra_args)

    def fresh(self, i: int, p: Any) -> tuple[list, list]:
        """What leaf `i` alone, and what all leaves, start with."""
        state = self.inner.init(self.only(i, p))
        parts = self.parts(jax.tree.leaves(state), i, SHARED, _STEP)
        return parts[i], parts[SHARED]


def _by_equations(call: _Call) -> Leafwise | None:
    """From one trace; None where its equations couple leaves."""
    n, m = len(call.grads), len(call.values)
    leaves = range(n)
    alone = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    state = [
        alone(x) if owner == SHARED else x
        for x, owner in zip(call.values, call.owners, strict=True)
    ]

    def flat(inputs):
        trees = call.kind.unflatten(inputs[:n]), call.kind.unflatten(inputs[n + m :])
        params = None if call.params is None else trees[1]
        return jax.tree.leaves(call.update(trees[0], inputs[n : n + m], params))

    inputs = [*call.grads, *state, *(call.params or call.grads)]
    program = trace(flat, inputs, [*leaves, *call.owners, *leaves])
    if program is None or len(program.jaxpr.outvars) != n + m:
        return None
    ins, outs = program.jaxpr.invars, program.jaxpr.outvars
    for v, owner in zip(outs, [*leaves, *call.owners], strict=True):
        if program.group(v) > owner or 0 <= program.group(v) != owner:
            return None
    grads, params, updates = ins[:n], ins[n + m :], outs[:n]
    values, old, new = map(call.parts, (call.values, ins[n : n + m], outs[n:]))

    # From the outside in: of a leaf, of what leaves share, of the step.
    slices = [program.cut([updates[i], *new[i]], known=SHARED) for i in leaves]
    moves = [program.cut(new[i], known=SHARED) for i in leaves]
    used = dict.fromkeys(v for part in slices for v in part.inputs)
    factors = [v for v in used if program.group(v) == SHARED]
    shared = program.cut([*new[SHARED], *factors], known=CAPTURED)
    used |= dict.fromkeys(shared.inputs)
    wanted = [v for v in used if program.group(v) == CAPTURED]
    step = program.cut([*new[_STEP], *wanted], known=NOTHING)
    known = program.captured | dict(zip(old[_STEP], values[_STEP], strict=True))
    known_after = step(known)
    of_step = known_after[: len(new[_STEP])]
    known = dict(zip(wanted, known_after[len(of_step) :], strict=True))

    def advance(before):
        out = shared(known | dict(zip(old[SHARED], before, strict=True)))
        return _cast(out[: len(before)], before), out[len(before) :]

    def given(i, g, state, own, mids, p):
        values = known | dict(zip([*state, *factors], [*own, *mids], strict=True))
        return values | {params[i]: p, grads[i]: g}

    def update(i, g, own, mids, p):
        u, *after = slices[i](given(i, g, old[i], own, mids, p))
        return u, _cast(after, own)

    def move(i, g, own, mids, p):
        return _cast(moves[i](given(i, g, old[i], own, mids, p)), own)

    @functools.cache
    def late_update(i):
        part = program.cut([updates[i]], known=SHARED, stop=new[i])
        same = all(
            a is not b and program.group(b) == i and a.aval.dtype == b.aval.dtype
            for a, b in zip(old[i], new[i], strict=True)
        )
        cheap = all(eqn.primitive.name in _ELEMENTWISE for eqn in part.equations)
        if not (same and cheap) or set(part.inputs) & set(old[i]):
            return None
        return lambda g, own, mids, p: part(given(i, g, new[i], own, mids, p))[0]

    def collect(own, shared):
        parts = dict(enumerate(own)) | {SHARED: shared, _STEP: of_step}
        return call.state_kind.unflatten(call.place(parts))

    return Leafwise(
        own=[values[i] for i in leaves],
        shared=values[SHARED],
        advance=advance,
        update=update,
        move=move,
        late_update=late_update,
        dtype=lambda i: updates[i].aval.dtype,
        fresh=call.fresh,
        collect=collect,
    )


def _by_masks(call: _Call) -> Leafwise:
    """From calls with all leaves but one masked out. All state is a leaf's own."""
    parts = call.parts(call.values)
    shared, of_step = parts[SHARED], parts[_STEP]
    alone = [len(parts[i]) for i in range(len(call.grads))]

    def update(i, g, own, mids, p):
        del mids
        before = {i: own[: alone[i]], SHARED: own[alone[i] :], _STEP: of_step}
        grads, params = call.only(i, g), call.only(i, p)
        updates, state = call.update(grads, call.place(before), params)
        after = call.parts(jax.tree.leaves(state), i, SHARED, _STEP)
        return jax.tree.leaves(updates)[0], _cast([*after[i], *after[SHARED]], own)

    def dtype(i):
        p = None if call.params is None else call.params[i]
        values = call.grads[i], parts[i] + [x[i] for x in shared], p
        return jax.eval_shape(
            lambda g, own, p: update(i, g, own, [], p)[0], *values
        ).dtype

    def fresh(i, p):
        mine, ours = call.fresh(i, p)
        return [*mine, *ours], []

    def collect(own, _):
        # What belongs to the step is moved by an update of nothing.
        empty = call.only(None, None)
        before = call.place({SHARED: [x[0] for x in shared], _STEP: of_step})
        state = jax.tree.leaves(call.update(empty, before, empty)[1])
        after = call.parts(state, SHARED, _STEP)
        after |= {i: part[: alone[i]] for i, part in enumerate(own)}
        entries = (part[alone[i] :] for i, part in enumerate(own))
        after[SHARED] = list(map(jnp.stack, zip(*entries, strict=True)))
        return call.state_kind.unflatten(call.place(after))

    return Leafwise(
        own=[parts[i] + [x[i] for x in shared] for i in range(len(call.grads))],
        shared=[],
        advance=lambda _: ([], []),
        update=update,
        move=lambda *x: update(*x)[1],
        late_update=lambda _: None,
        dtype=dtype,
        fresh=fresh,
        collect=collect,
    )


def _cast(new: list[Any], old: list[Any]) -> list[jax.Array]:
    return [lax.convert_element_type(x, y.dtype) for x, y in zip(new, old, strict=True)]


def _owners(inner: optax.GradientTransformation, tree: Any) -> tuple[int, ...]:
    """For each leaf of the inner state the leaf of the params that it belongs to.

    Found by asking which state is there when half of the leaves are masked out, once
    for each binary digit of a leaf's number. Shapes alone, nothing is computed.
    """
    shapes = tuple(
        jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))
        for x in jax.tree.leaves(tree)
    )
    return _owners_by_shape(inner.init, jax.tree.structure(tree), shapes)


@functools.lru_cache(maxsize=64)
def _owners_by_shape(init: Callable, kind: Any, shapes: tuple) -> tuple[int, ...]:
    def present(keep: Callable[[int], int]) -> Any:
        masked = [s if keep(i) else optax.MaskedNode() for i, s in enumerate(shapes)]
        return jax.eval_shape(init, kind.unflatten(masked))

    def paths(state: Any) -> list[Any]:
        return [p for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]

    full = present(lambda i: 1)
    always = set(paths(present(lambda i: 0)))
    digits = [
        set(paths(present(lambda i, b=b: i >> b & 1)))
        for b in range((len(shapes) - 1).bit_length())
    ]
    owners = []
    for path, of_step in zip(paths(full), of_the_step(full), strict=True):
        leaf = sum(1 << b for b, seen in enumerate(digits) if path in seen)
        shared = _STEP if of_step else SHARED
        owners.append(shared if path in always else leaf)
    return tuple(owners)


def of_the_step(state: Any) -> list[bool]:
    """Which state counts steps of training: that of schedules, not of leaves."""

    def mark(node):
        if isinstance(node, _INJECTED):
            marked = jax.tree.map(lambda _: True, node._replace(inner_state=()))
            return marked._replace(inner_state=walk(node.inner_state))
        return jax.tree.map(lambda _: isinstance(node, _SCHEDULES), node)

    def walk(tree):
        known = (*_SCHEDULES, *_INJECTED)
        return jax.tree.map(mark, tree, is_leaf=lambda x: isinstance(x, known))

    return jax.tree.leaves(walk(state))

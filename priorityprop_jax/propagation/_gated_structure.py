"""Gated rules for checkpoints and loops: gated passes inside of a node."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._blocks import (
    gated_vjp,
    given_messages,
    Graph,
    graph_of,
    is_scalar,
    Message,
    Needs,
    Predicate,
    send,
    typed,
)
from ._interpreter import (
    barrier,
    build,
    build_body,
    forward,
    jaxpr_of,
    keep,
    Kept,
    Loop,
    loop_of,
    Program,
    trace,
)
from ._rules import (
    cotangents,
    differentiable,
    is_inexact,
    Operation,
    Rule,
    Saved,
    type_of,
    VJP,
    zeros_of,
)


def _opaque_backward(
    op: Operation, residuals: Any, messages: list[Message | None]
) -> list[Message | None]:
    """What is no business of ours: the whole of it along with what it follows."""
    graph, places = graph_of(messages), differentiable(op)
    silent = [m is None for m in messages]

    def run(read, arrived):
        del read
        given = given_messages(silent, arrived)
        sent = VJP.backward(op, residuals, given)
        return [sent[i] for i in places]

    return send(op, graph, messages, run, places, [])


def _predicates_of(graph: Graph, op: Operation, rows: Sequence[int]) -> list[Any]:
    """Whether anything is active that an input was computed from, for each input.

    By rows for those in `rows`, if they are an argument whose predicate is a vector.
    """
    needs = Needs(graph.predicates, op.depends)
    return [
        graph.predicates[d.bit_length() - 1]
        if i in rows and _is_own(op, i)
        else needs(d)
        for i, d in enumerate(op.depends)
    ]


def _is_own(op: Operation, i: int) -> bool:
    """Whether an input is one of the arguments."""
    return op.aligned[i] and op.depends[i].bit_count() == 1


def _exact(graph: Graph, op: Operation, rows: Sequence[int]) -> list[int]:
    """The inputs whose messages are zero where they rest, given these predicates."""
    return [
        i
        for i in differentiable(op)
        if _is_own(op, i) and (i in rows or is_scalar(graph, op.depends[i]))
    ]


def _remat_forward(op: Operation, *inputs: Any) -> tuple[Sequence[Any], Any]:
    if op.params.get("policy") is not None:
        return VJP.forward(op, *inputs)
    return op.bind(*inputs), list(inputs)


def _remat_backward(op: Operation, residuals: Any, messages: list) -> list:
    if op.params.get("policy") is not None:  # what to save is the user's choice
        return _opaque_backward(op, residuals, messages)
    graph, places = graph_of(messages), differentiable(op)
    graph.store(residuals)
    silent = [m is None for m in messages]

    def run(read, arrived):
        depends = [1 << i if d else 0 for i, d in enumerate(op.depends)]
        program = build(op.params["jaxpr"], depends, op.rules, op.given)
        inputs = residuals
        if op.params.get("prevent_cse", True):
            inputs = barrier(inputs)
        _, inner = forward(program, inputs)
        given = given_messages(silent, arrived)
        found = gated_vjp(program, inner, given, _predicates_of(graph, op, places))
        return [
            zeros_of(op.inputs[i]) if found[i] is None else found[i] for i in places
        ]

    return send(op, graph, messages, run, places, _exact(graph, op, places))


class _Scanned(NamedTuple):
    """What is known about a scan while tracing."""

    program: Program
    loop: Loop
    kept: Kept
    saved: tuple[Any, ...]  # types of what a step could save
    used: tuple[int, ...]  # of these, what is read


def _scan_forward(op: Operation, *inputs: Any) -> tuple[list[Any], Any]:
    loop = loop_of(op)
    program = build_body(op, loop)
    consts, carry, xs = loop.split(inputs)
    found = []

    def step(carry, x, used=None):
        out, residuals = forward(program, [*consts, *carry, *x])
        saved, kept = keep(residuals, consts)
        found[:] = [kept]
        saved = saved if used is None else [saved[i] for i in used]
        return out[: loop.carry], (out[loop.carry :], saved)

    row = [type_of(jax.typeof(x), rows=True) for x in xs]
    _, (_, shapes) = jax.eval_shape(step, carry, row)
    used = _used(op, program, loop, found[0], consts, shapes)
    body = functools.partial(step, used=used)
    carry, (ys, saved) = lax.scan(body, carry, xs, **loop.options)
    static = _Scanned(program, loop, found[0], tuple(shapes), used)
    return [*carry, *ys], Saved((list(consts), saved), static)


def _used(op, program, loop, kept, consts, shapes) -> tuple[int, ...]:
    """Which of the arrays that a step could save are read on the way back."""
    outputs = [_unbatched(op, i) for i in range(len(op.outputs))]
    wanted = [
        is_inexact(t) and bool(program.depends[i])
        for t, i in zip(outputs, program.outputs, strict=True)
    ]

    def back(saved, predicates, messages):
        residuals = kept.restore(consts, saved)
        given = iter(messages)
        full = [next(given) if w else None for w in wanted]
        return gated_vjp(program, residuals, full, predicates)

    messages = [type_of(t) for t, w in zip(outputs, wanted, strict=True) if w]
    predicates = [jax.ShapeDtypeStruct((), jnp.bool)] * program.inputs
    closed, _ = trace(back, shapes, predicates, messages)
    jaxpr = jaxpr_of(closed)
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in jaxpr.outvars}
    return tuple(i for i, v in enumerate(jaxpr.invars[: len(shapes)]) if id(v) in read)


def _unbatched(op: Operation, i: int) -> Any:
    t = op.outputs[i]
    n = loop_of(op).carry
    return type_of(t, rows=i >= n)


def _scan_backward(op: Operation, residuals: Saved, messages: list) -> list:
    graph, places = graph_of(messages), differentiable(op)
    silent = [m is None for m in messages]

    def run(read, arrived):
        del read
        given = given_messages(silent, arrived)
        found = _scan_back(op, residuals, given, _predicates_of(graph, op, rows))
        return [found[i] for i in places]

    loop = loop_of(op)
    rows = range(loop.consts + loop.carry, len(op.inputs))
    return send(op, graph, messages, run, places, _exact(graph, op, rows))


def _scan_back(
    op: Operation, residuals: Saved, messages: list, predicates: list[Predicate]
) -> list[Any]:
    """The cotangents of the inputs of a scan: a scan in the other direction."""
    (consts, saved), known = residuals.arrays, residuals.static
    program, loop = known.program, known.loop
    n, m = loop.consts, loop.carry
    length = loop.options["length"]
    of_consts, of_carry, of_xs = loop.split(predicates)
    # Rows: the predicate of each step. What is carried into a step matters if anything
    # is active in earlier ones, or before the loop.
    rows = {
        n + m + j: p for j, p in enumerate(of_xs) if not isinstance(p, bool) and p.ndim
    }
    below = _below(of_consts, of_carry, of_xs, length, loop.options["reverse"])
    inside = [
        is_inexact(t) and bool(program.depends[i]) for i, t in enumerate(op.inputs)
    ]
    carried = [i for i in range(m) if inside[n + i]]
    summed = [i for i in range(n) if inside[i]]
    outs = [is_inexact(t) for t in op.outputs]
    full = cotangents(op.outputs, messages)
    last = [full[i] for i in carried]
    ys = [full[m + j] if outs[m + j] else None for j in range(len(full) - m)]

    def body(state, x):
        carry, total = state
        saved_now, ys_now, rows_now, below_now = x
        # Zeros, each an array of its own, stand for what nothing reads.
        places = [zeros_of(t) for t in known.saved]
        for i, value in zip(known.used, saved_now, strict=True):
            places[i] = value
        restored = known.kept.restore(consts, places)
        given: list[Any] = [None] * m
        for i, ct in zip(carried, carry, strict=True):
            given[i] = ct
        given += ys_now
        now = list(predicates)
        for i, p in zip(rows, rows_now, strict=True):
            now[i] = p
        for i in range(n, n + m):
            now[i] = below_now if inside[i] else False
        found = gated_vjp(program, restored, given, now)
        carry = [_or_zeros(found[n + i], op.inputs[n + i]) for i in carried]
        total = [
            _accumulate(predicates[i], t, found[i])
            for i, t in zip(summed, total, strict=True)
        ]
        out = [
            _or_zeros(found[n + m + j], type_of(op.inputs[n + m + j], rows=True))
            if inside[n + m + j]
            else None
            for j in range(len(of_xs))
        ]
        return (carry, total), out

    start = last, [zeros_of(op.inputs[i]) for i in summed]
    options = loop.options | {"reverse": not loop.options["reverse"]}
    xs = saved, ys, list(rows.values()), below
    (carry, total), out = lax.scan(body, start, xs, **options)
    result: list[Any] = [None] * len(op.inputs)
    for i, x in zip(summed, total, strict=True):
        result[i] = x
    for i, x in zip(carried, carry, strict=True):
        result[n + i] = x
    result[n + m :] = out
    return result


def _or_zeros(x: Any, kind: Any) -> Any:
    return zeros_of(kind) if x is None else typed(x, kind)


def _accumulate(predicate: Predicate, total: Any, more: Any) -> Any:
    if more is None or predicate is False:
        return total
    if predicate is True:
        return total + more
    return lax.cond(predicate, lambda a, b: a + b, lambda a, b: a, total, more)


def _below(of_consts, of_carry, of_xs, length: int, reverse: bool) -> Any:
    """For each step whether anything before it is active: a vector."""
    either = lambda ps: functools.reduce(jnp.logical_or, ps, jnp.zeros((), bool))
    first = either([_as_bool(p) for p in of_carry])
    each = either(
        [jnp.broadcast_to(_as_bool(p), (length,)) for p in of_xs]
        + [jnp.broadcast_to(_as_bool(p), (length,)) for p in of_consts]
    )
    each = jnp.broadcast_to(each, (length,)).astype(jnp.int32)
    each = each[::-1] if reverse else each
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), lax.cummax(each)])[:length]
    before = before[::-1] if reverse else before
    return (before > 0) | first


def _as_bool(p: Predicate) -> jax.Array:
    return jnp.asarray(p, bool)


OPAQUE = Rule(VJP.forward, _opaque_backward)
CHECKPOINT = Rule(_remat_forward, _remat_backward)
SCAN = Rule(_scan_forward, _scan_backward)

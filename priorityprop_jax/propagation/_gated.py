"""The rules behind `value_and_grad(..., active=...)` where the mask is traced.

Messages are nodes of the graph in `_blocks`, which is evaluated when all are known.
Only operations in which a parameter meets data open a block: the weight gradient has
the parameter as its key, the message to the data what those were computed from. All
else goes along with what it follows, so that XLA can fuse it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._blocks import (
    add,
    gated_vjp,
    given_messages,
    graph_of,
    is_scalar,
    Message,
    narrowest,
    Predicate,
)
from ._gated_structure import CHECKPOINT, OPAQUE, SCAN
from ._interpreter import build, forward, jaxpr_of, STOP, trace
from ._levels import choose
from ._rules import (
    cotangents,
    differentiable,
    MISSING,
    Operation,
    part,
    Rule,
    Rules,
    zeros_like,
)


# Where a parameter meets data. Linear in each input.
_MEETING = frozenset("dot_general conv_general_dilated gather ragged_dot".split())
# Zero stays zero on the way back.
_LINEAR = frozenset(
    "neg convert_element_type reshape broadcast_in_dim transpose squeeze expand_dims"
    " slice rev copy copy_p real imag reduce_precision reduce_sum".split()
)
# Cheap enough to be computed again.
_AGAIN = (_LINEAR - {"reduce_sum"}) | frozenset(
    "add add_any sub mul div max min abs select_n concatenate pad integer_pow square"
    " clamp conj complex pvary sharding_constraint tile dynamic_slice rem tag".split()
)
_CHEAP = _AGAIN | frozenset(
    "reduce_sum reduce_max reduce_min split optimization_barrier is_finite eq ne lt le"
    " gt ge and or not xor iota".split()
)
# Not to be computed again. The derivative of these is found from the result.
_FROM_RESULT: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda ct, y: ct * y,
    "tanh": lambda ct, y: (ct + ct * y) * (1 - y),
    "logistic": lambda ct, y: ct * y * (1 - y),
    "sqrt": lambda ct, y: ct * (0.5 / y),
}
_TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p tanh sin cos tan logistic erf erfc erf_inv rsqrt sqrt"
    " cbrt pow atan2 asin acos atan sinh cosh asinh acosh atanh lgamma digamma cumsum"
    " reduce_prod reduce_window_sum reduce_window_max reduce_window".split()
)


class _Values(NamedTuple):
    """What an operation remembers."""

    inputs: list[Any]
    outputs: list[Any]


def _plain_forward(op: Operation, *inputs: Any) -> tuple[list[Any], _Values]:
    outputs = op.bind(*inputs)
    return outputs, _Values(list(inputs), list(outputs))


def _plain_backward(
    op: Operation, values: _Values, messages: list[Message | None]
) -> list[Message | None]:
    graph, places = graph_of(messages), differentiable(op)
    if op.name in _AGAIN:
        graph.note(op, values.inputs, *values.outputs)
    sent: list[Message | None] = [None] * len(op.inputs)
    if not places:
        return sent
    groups = [(narrowest(messages), places)]
    if op.name in _MEETING:
        graph.store([*values.inputs, *values.outputs])
        groups = _by_key(op, places, groups[0][0])
    arrived = [m for m in messages if m is not None]
    for key, some in groups:
        run = functools.partial(_pull, op, values, some, [m is None for m in messages])
        node = graph.node(key, arrived, run)
        zero_stays = op.name in _LINEAR and all(m.exact for m in arrived)
        for index, i in enumerate(some):
            alone = key == op.depends[i] and key.bit_count() == 1
            exact = zero_stays or (alone and is_scalar(graph, key))
            sent[i] = Message(graph, node, index, op.inputs[i], op.depends[i], exact)
    return sent


def _by_key(op: Operation, places: list[int], key: int) -> list[tuple[int, list[int]]]:
    """Each parameter by itself; then the data, all together."""
    weights = [i for i in places if not op.given[i]]
    data = [i for i in places if op.given[i]]
    groups = [(op.depends[i], [i]) for i in weights]
    if len(data) == 1 and data[0] in places:
        key = op.depends[data[0]]
    return groups + ([(key, data)] if data else [])


def _pull(
    op: Operation,
    values: _Values,
    places: list[int],
    silent: list[bool],
    read: Callable[[Any], Any],
    arrived: list[Any],
) -> list[Any]:
    """Cotangents of some inputs from those of the outputs."""
    from_result = _FROM_RESULT.get(op.name)
    if from_result is not None and op.inputs[0].dtype.kind != "c":
        return [from_result(arrived[0], read(values.outputs[0]))]
    full = cotangents(op.outputs, given_messages(silent, arrived))
    simple = _SIMPLE.get(op.name)
    if simple is not None:
        found = simple(op, full[0], lambda i: read(values.inputs[i]), places)
        if found is not None:
            return found
    inputs = [read(x) for x in values.inputs]
    _, vjp = jax.vjp(part(op, inputs, places), *(inputs[i] for i in places))
    return list(_canonically(vjp, full) if "conv" in op.name else vjp(full))


def _canonically(function: Callable[..., Any], *args: Any) -> Any:
    """A function, its convolutions in the one order of axes that XLA:CPU is fast in.

    At the top of a program XLA brings them into that order, but not in a conditional.
    """
    closed, kind = trace(function, *args)
    leaves = jax.tree.leaves(args)
    program = build(closed, [1] * len(leaves), _CANONICAL)
    return jax.tree.unflatten(kind, forward(program, leaves)[0])


def _canonical_convolution(op: Operation, x: Any, w: Any) -> tuple[list[Any], None]:
    params = dict(op.params)
    given = params.pop("dimension_numbers")
    axes = tuple(range(1, len(given.lhs_spec) - 1))
    last, spatial = len(axes) + 1, tuple(a - 1 for a in axes)
    usual = lax.ConvDimensionNumbers(
        lhs_spec=(0, last, *axes),
        rhs_spec=(last, last - 1, *spatial),
        out_spec=(0, last, *axes),
    )

    def move(x, old, new):
        return lax.transpose(x, [old[new.index(a)] for a in range(x.ndim)])

    out = lax.conv_general_dilated_p.bind(
        move(x, given.lhs_spec, usual.lhs_spec),
        move(w, given.rhs_spec, usual.rhs_spec),
        dimension_numbers=usual,
        **params,
    )
    return [move(out, usual.out_spec, given.out_spec)], None


# The most frequent operations, written out, as tracing a VJP of each takes its time.
_Simple = Callable[[Operation, Any, Callable[[int], Any], list[int]], list[Any] | None]


def _same_shape(op: Operation, places: list[int]) -> bool:
    out = op.outputs[0]
    return all(
        op.inputs[i].shape == out.shape and op.inputs[i].dtype == out.dtype
        for i in places
    )


def _pull_add(op, ct, read, places):
    del read
    return [ct for _ in places] if _same_shape(op, places) else None


def _pull_sub(op, ct, read, places):
    del read
    if not _same_shape(op, places):
        return None
    return [ct if i == 0 else lax.neg(ct) for i in places]


def _pull_mul(op, ct, read, places):
    if not _same_shape(op, [*places, 0, 1]) or op.outputs[0].dtype.kind == "c":
        return None
    return [lax.mul(ct, _like(read(1 - i), ct)) for i in places]


def _like(x: Any, ct: Any) -> Any:
    return lax.convert_element_type(x, ct.dtype) if x.dtype != ct.dtype else x


_SIMPLE: dict[str, _Simple] = {
    "add": _pull_add,
    "add_any": _pull_add,
    "sub": _pull_sub,
    "mul": _pull_mul,
}


def _custom_forward(op: Operation, *inputs: Any) -> Any:
    """A function with a derivative of its own: elementwise, or none of our business."""
    return (PLAIN if _is_cheap(op) else OPAQUE).forward(op, *inputs)


def _custom_backward(op: Operation, residuals: Any, messages: list) -> list:
    rule = PLAIN if _is_cheap(op) else OPAQUE
    return list(rule.backward(op, residuals, messages))


def _is_cheap(op: Operation) -> bool:
    return _all_cheap(jaxpr_of(op.params["call_jaxpr"]))


def _all_cheap(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            if not _all_cheap(jaxpr_of(eqn.params["jaxpr"])):
                return False
        elif name not in _CHEAP and name not in _TRANSCENDENTAL:
            return False
    return True


PLAIN = Rule(_plain_forward, _plain_backward)
_CANONICAL = Rules(
    {"conv_general_dilated": Rule(_canonical_convolution, MISSING.backward)},
    default=MISSING,
)

GATED = Rules(
    by_name=dict.fromkeys(_CHEAP | _TRANSCENDENTAL | _MEETING, PLAIN)
    | dict.fromkeys(("sign", "floor", "ceil", "round"), STOP)  # flat everywhere
    | dict.fromkeys(("remat", "remat2", "checkpoint"), CHECKPOINT)
    | {
        "scan": SCAN,
        "custom_jvp_call": Rule(_custom_forward, _custom_backward),
        "cond": OPAQUE,
        "while": OPAQUE,
    },
    default=OPAQUE,
    add=add,
)


def gated_value_and_grad(
    fun: Callable[[list[Any]], tuple[Any, Any]],
    leaves: Sequence[Any],
    masks: Sequence[Predicate],
) -> tuple[Any, Any, list[Any]]:
    """Value, aux and gradients of a function of arrays; one program for all masks.

    Args:
      fun: ``(leaves) -> (value, aux)``.
      leaves: inexact arrays.
      masks: for each whether it is active: a bool, a traced bool, or a vector of either
        for the entries of its first axis.
    """
    predicates = [np.array(m) if isinstance(m, tuple) else m for m in masks]
    predicates = [
        jnp.asarray(p) if isinstance(p, np.ndarray) else p for p in predicates
    ]
    closed, kind = trace(fun, list(leaves))
    values = [jnp.asarray(x) for x in leaves]
    everything = [1 << i for i in range(len(leaves))]
    program = build(closed, everything, GATED)
    convolves = any("conv_general" in s.operation.name for s in program.steps)
    if convolves:  # in conditionals the forward pass, too, has to be canonical
        usual = build(closed, everything, _CANONICAL)
        closed, _ = trace(lambda xs: forward(usual, xs)[0], values)
        program = build(closed, everything, GATED)

    def run(predicates):
        if all(p is True for p in predicates):
            return _ungated(closed, values, convolves)
        depends = [int(p is not False) << i for i, p in enumerate(predicates)]
        part = program if depends == everything else build(closed, depends, GATED)
        outputs, residuals = forward(part, values)
        messages = [jnp.ones_like(outputs[0])] + [None] * (len(outputs) - 1)
        return outputs, gated_vjp(part, residuals, messages, predicates)

    def typed(predicates):
        outputs, found = run(predicates)
        return outputs, [
            zeros_like(p) if g is None else _as_weak_as(g, p)
            for g, p in zip(found, leaves, strict=True)
        ]

    outputs, gradients = choose(program, predicates, typed)
    value, aux = jax.tree.unflatten(kind, outputs)
    return value, aux, gradients


def _ungated(
    closed: Any, values: Sequence[Any], convolves: bool
) -> tuple[list[Any], list[Any]]:
    """The outputs of a program, and the gradients of the first by all inputs."""
    program = build(closed, [0] * len(values), GATED)

    def first(values):
        outputs, _ = forward(program, values)
        return outputs[0], outputs

    def gradients(values):
        (_, outputs), found = jax.value_and_grad(first, has_aux=True)(values)
        return outputs, found

    return _canonically(gradients, values) if convolves else gradients(values)


def _as_weak_as(x: jax.Array, like: jax.Array) -> jax.Array:
    if not jax.typeof(like).weak_type or jax.typeof(x).weak_type:
        return x
    return lax.convert_element_type_p.bind(
        x, new_dtype=x.dtype, weak_type=True, sharding=None
    )

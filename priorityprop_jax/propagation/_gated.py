"""The rules behind `value_and_grad(..., active=...)` where the mask is traced.

Messages are nodes of a graph that is evaluated when all are known. Each knows its
*key*: the set of arguments for whose sake it is computed. Nodes of one key make a
block, and a block is one `lax.cond`: it runs if any argument of the key is active.

Only operations in which a parameter meets data open a block: the weight gradient has
the parameter as its key, the message to the data what those were computed from. All
else goes along with what it follows, so that XLA can fuse it. Results of operations
that cost little are not handed to a block but computed in it again, as XLA would do.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._units import unstack_together
from ._interpreter import (
    backward,
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
    part,
    Rule,
    Rules,
    Saved,
    type_of,
    VJP,
    zeros_of,
)


# For each argument whether it is active: known, or traced; a vector goes by rows.
Predicate = Any

# Where a parameter meets data. Linear in each input.
_MEETING = frozenset("dot_general conv_general_dilated gather ragged_dot".split())
# Cheap enough to be computed twice.
_LINEAR = frozenset(
    "neg convert_element_type reshape broadcast_in_dim transpose squeeze expand_dims"
    " reduce_sum slice rev copy copy_p real imag reduce_precision".split()
)
_CHEAP = _LINEAR | frozenset(
    "add add_any sub mul div max min abs sign select_n concatenate pad integer_pow"
    " square clamp stop_gradient conj complex pvary sharding_constraint split tile"
    " dynamic_slice rem floor ceil round is_finite eq ne lt le gt ge and or not xor"
    " iota reduce_max reduce_min tag optimization_barrier custom_jvp_call jit".split()
)
# Elementwise, but not worth computing twice; with the derivative from the result.
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
_DEEPEST = 8  # conditionals inside of each other
_LARGEST_CONE = 2, 16  # arrays to read and operations to run, to compute a value again


class _Values(NamedTuple):
    """What an operation remembers."""

    inputs: list[Any]
    outputs: list[Any]


class _Node:
    """A part of the backward pass: from messages to an operation to those it sends."""

    def __init__(self, key: int, sources: list["_Message"], run: Callable, number: int):
        self.key, self.sources, self.run, self.number = key, sources, run, number


class _Message(NamedTuple):
    """One of the results of a node."""

    graph: "_Graph"
    node: _Node
    index: int
    kind: Any  # type of the value it is sent to
    depends: int  # the arguments that value was computed from; part of the node's key
    exact: bool  # zero wherever these rest


class _Graph:
    """The backward pass of one program."""

    def __init__(self, predicates: Sequence[Predicate]):
        self.predicates = list(predicates)
        self.nodes: list[_Node] = []
        self.made: dict[int, tuple[Operation, list[Any]]] = {}  # by id of the result
        self.held: list[Any] = []  # whose ids must stay theirs
        self.stored: set[int] = set()  # ids of what is in memory anyway

    def node(self, key: int, sources: list[_Message], run: Callable) -> _Node:
        """Adds a node."""
        self.nodes.append(_Node(key, sources, run, len(self.nodes)))
        return self.nodes[-1]

    def note(self, op: Operation, values: _Values) -> None:
        """Remembers how a value was computed."""
        self.held.append(values)
        taken = set(map(id, values.inputs))
        for y in values.outputs:
            if id(y) not in taken:
                self.made[id(y)] = op, values.inputs


def _narrowest(messages: Sequence[_Message | None]) -> int:
    """The smallest key: what was made in that block needs no other."""
    keys = [m.node.key for m in messages if m is not None]
    return min(keys, key=lambda key: (key.bit_count(), key))


def _graph_of(messages: Sequence[_Message | None]) -> _Graph:
    return next(m.graph for m in messages if m is not None)


def _plain_forward(op: Operation, *inputs: Any) -> tuple[list[Any], _Values]:
    outputs = op.bind(*inputs)
    return outputs, _Values(list(inputs), list(outputs))


def _plain_backward(
    op: Operation, values: _Values, messages: list[_Message | None]
) -> list[_Message | None]:
    graph, places = _graph_of(messages), differentiable(op)
    graph.note(op, values)
    sent: list[_Message | None] = [None] * len(op.inputs)
    if not places:
        return sent
    groups = [(_narrowest(messages), places)]
    if op.name in _MEETING:
        graph.stored.update(map(id, [*values.inputs, *values.outputs]))
        groups = _by_key(op, places, groups[0][0])
    elif op.name not in _CHEAP:
        graph.stored.update(map(id, values.outputs))
    arrived = [m for m in messages if m is not None]
    for key, some in groups:
        run = functools.partial(_pull, op, values, some, [m is None for m in messages])
        node = graph.node(key, arrived, run)
        zero_stays = op.name in _LINEAR and all(m.exact for m in arrived)
        for index, i in enumerate(some):
            alone = key == op.depends[i] and key.bit_count() == 1
            exact = zero_stays or (alone and _is_scalar(graph, key))
            sent[i] = _Message(graph, node, index, op.inputs[i], op.depends[i], exact)
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
    waiting = iter(arrived)
    full = cotangents(op.outputs, [None if s else next(waiting) for s in silent])
    simple = _SIMPLE.get(op.name)
    if simple is not None:
        found = simple(op, full[0], lambda i: read(values.inputs[i]), places)
        if found is not None:
            return found
    inputs = [read(x) for x in values.inputs]
    _, vjp = jax.vjp(part(op, inputs, places), *(inputs[i] for i in places))
    return list(vjp(full))


def _opaque_backward(
    op: Operation, residuals: Any, messages: list[_Message | None]
) -> list[_Message | None]:
    """What is no business of ours: the whole of it along with what it follows."""
    graph, places = _graph_of(messages), differentiable(op)
    silent = [m is None for m in messages]

    def run(read, arrived):
        del read
        waiting = iter(arrived)
        given = [None if s else next(waiting) for s in silent]
        sent = VJP.backward(op, residuals, given)
        return [sent[i] for i in places]

    return _send(op, graph, messages, run, places, [])


def _send(op, graph, messages, run, places, exact) -> list[_Message | None]:
    """The messages of a node that goes along with what it follows."""
    node = graph.node(_narrowest(messages), [m for m in messages if m is not None], run)
    sent: list[_Message | None] = [None] * len(op.inputs)
    for index, i in enumerate(places):
        kind, depends = op.inputs[i], op.depends[i]
        sent[i] = _Message(graph, node, index, kind, depends, i in exact)
    return sent


def _add(a: _Message, b: _Message) -> _Message:
    node = a.graph.node(
        _narrowest([a, b]), [a, b], lambda read, arrived: [arrived[0] + arrived[1]]
    )
    return a._replace(node=node, index=0, exact=a.exact and b.exact)


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


# Evaluation.


class _Block(NamedTuple):
    """Nodes of one key."""

    key: int
    nodes: list[_Node]
    # What later blocks and results use of these, with the last block that does.
    shown: dict[tuple[_Node, int], tuple[_Message, int]]


def _evaluate(graph: _Graph, results: Sequence[_Message | None]) -> list[Any]:
    """The values of messages."""
    needed, waiting = set(), [m.node for m in results if m is not None]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [m.node for m in node.sources]
    parts = _group([node for node in graph.nodes if node in needed])
    place = {node: i for i, (_, nodes) in enumerate(parts) for node in nodes}
    blocks = [_Block(key, nodes, {}) for key, nodes in parts]
    uses = [(place[n], n.sources) for n in place] + [(len(blocks), results)]
    for i, sources in sorted(uses, key=lambda use: use[0]):
        for m in sources:
            if m is not None and place[m.node] != i:
                blocks[place[m.node]].shown[m.node, m.index] = m, i
    run = _Run(graph, blocks, _Needs(graph.predicates, [b.key for b in blocks]))
    values = run(0, len(blocks), {})
    return [None if m is None else values[m.node, m.index] for m in results]


class _Run:
    """Blocks one after the other, those whose key is part of another's inside of it.

    So a chain that is cut leaves nothing behind: what comes below is in the branch that
    is not taken, and no zeros have to be handed on. But each level hands down all that
    is read below, so there is a limit.
    """

    def __init__(self, graph: _Graph, blocks: list[_Block], needs: "_Needs"):
        self.graph, self.blocks, self.needs = graph, blocks, needs

    def __call__(self, start: int, stop: int, values: dict) -> dict:
        """All that the blocks from `start` to `stop` show."""
        values, i = dict(values), start
        while i < stop:
            block, end = self.blocks[i], i + 1
            on = self.needs(block.key)
            if not isinstance(on, bool):
                end = min(self._extent(i, 1)[0], stop)
            shown = {
                name: m
                for b in self.blocks[i:end]
                for name, (m, last) in b.shown.items()
                if last >= end
            }
            if on is True:
                found = self._one(block, values, lambda x: x)
            elif on is False or not shown:
                found = {name: zeros_of(m.kind) for name, m in shown.items()}
            else:
                names = list(shown)
                results = lax.cond(
                    on,
                    functools.partial(self._taken, i, end, values, shown),
                    lambda shown=shown: [zeros_of(m.kind) for m in shown.values()],
                )
                found = dict(zip(names, results, strict=True))
            values |= found
            i = end
        return values

    def _extent(self, i: int, depth: int) -> tuple[int, bool]:
        """Where the blocks inside of one end, and whether for lack of depth."""
        end = i + 1
        while end < len(self.blocks) and not self.blocks[end].key & ~self.blocks[i].key:
            if depth == _DEEPEST:
                return end, True
            end, full = self._extent(end, depth + 1)
            if full:
                return end, True
        return end, False

    def _one(self, block: _Block, values: dict, read: Callable) -> dict:
        messages = [m for m, _ in block.shown.values()]
        found = _run(block.nodes, messages, values, read)
        return dict(zip(block.shown, found, strict=True))

    def _taken(self, i: int, end: int, values: dict, shown: dict) -> list[Any]:
        """What the true branch returns."""
        values = values | self._one(self.blocks[i], values, _Reader(self.graph))
        values = self(i + 1, end, values)
        return [_typed(values[name], m.kind) for name, m in shown.items()]


def _typed(x: Any, kind: Any) -> Any:
    return x if x.dtype == kind.dtype else lax.convert_element_type(x, kind.dtype)


def _group(nodes: list[_Node]) -> list[tuple[int, list[_Node]]]:
    """Nodes of one key together, as far as what they need comes before."""
    waiting = {n: len({m.node for m in n.sources}) for n in nodes}
    users: dict[_Node, list[_Node]] = {n: [] for n in nodes}
    for n in nodes:
        for source in {m.node for m in n.sources}:
            users[source].append(n)
    ready = [n for n in nodes if not waiting[n]]
    blocks = []
    while ready:
        key = min(ready, key=lambda n: n.number).key
        block = []
        now = [n for n in ready if n.key == key]
        ready = [n for n in ready if n.key != key]
        while now:
            n = min(now, key=lambda n: n.number)
            now.remove(n)
            block.append(n)
            for user in users[n]:
                waiting[user] -= 1
                if not waiting[user]:
                    (now if user.key == key else ready).append(user)
        blocks.append((key, block))
    return blocks


def _run(nodes, messages, values, read) -> list[Any]:
    """The nodes of a block, and of their results those that `messages` names."""
    local: dict[_Node, list[Any]] = {}

    def value(m):
        return local[m.node][m.index] if m.node in local else values[m.node, m.index]

    for node in nodes:
        local[node] = node.run(read, [value(m) for m in node.sources])
    return [value(m) for m in messages]


class _Reader:
    """Reads values of the forward pass in a block: from memory, or computed again."""

    def __init__(self, graph: _Graph):
        self.graph, self.again = graph, {}
        self.cones: dict[int, tuple[frozenset[int], int]] = {}

    def __call__(self, x: Any) -> Any:
        if self._cone(x)[1] == 0:
            return x
        if id(x) not in self.again:
            op, inputs = self.graph.made[id(x)]
            outputs = op.bind(*map(self, inputs))
            # Only operations with one result are computed again.
            self.again[id(x)] = outputs[0]
        return self.again[id(x)]

    def _cone(self, x: Any) -> tuple[frozenset[int], int]:
        """What has to be read and how much to be run for a value; 0 if it is read."""
        if id(x) not in self.cones:
            self.cones[id(x)] = self._find(x)
        return self.cones[id(x)]

    def _find(self, x: Any) -> tuple[frozenset[int], int]:
        alone = frozenset([id(x)]), 0
        made = self.graph.made.get(id(x))
        if made is None or id(x) in self.graph.stored:
            return alone
        op, inputs = made
        if (
            op.name not in _CHEAP
            or len(op.outputs) != 1
            or op.name.startswith("reduce_")
        ):
            return alone
        size = math.prod(op.outputs[0].shape)
        cones = [self._cone(y) for y, k in zip(inputs, op.inputs, strict=True)]
        large = [
            c
            for c, k in zip(cones, op.inputs, strict=True)
            if 8 * math.prod(k.shape) > size
        ]
        read = frozenset().union(*(c[0] for c in large))
        run = 1 + sum(c[1] for c in cones)
        arrays, operations = _LARGEST_CONE
        return (read, run) if len(read) <= arrays and run <= operations else alone


class _Needs:
    """Whether anything of a set of arguments is active: a bool, or a traced one."""

    def __init__(self, predicates: Sequence[Predicate], keys: Sequence[int]):
        self.always = sum(1 << i for i, p in enumerate(predicates) if p is True)
        self.traced = [i for i, p in enumerate(predicates) if not isinstance(p, bool)]
        self.known: dict[int, Any] = {}
        members = sum(1 << i for i in self.traced)
        for key in keys:
            if not key & self.always and key & members:
                self.known[key & members] = None
        self.members = members
        if not self.known:
            return
        some = [_any(predicates[i]) for i in self.traced]
        if len(self.known) <= 3 or len(some) == 1:
            found = [
                functools.reduce(
                    jnp.logical_or,
                    [p for i, p in zip(self.traced, some, strict=True) if key >> i & 1],
                )
                for key in self.known
            ]
        else:  # all at once, not an operation for each pair
            table = np.array(
                [[key >> i & 1 for i in self.traced] for key in self.known]
            )
            hits = jnp.any(table.astype(bool) & jnp.stack(some)[None], axis=1)
            found = [row[0] for row in unstack_together([hits])]
        self.known = dict(zip(self.known, found, strict=True))

    def __call__(self, key: int) -> Any:
        if key & self.always:
            return True
        return self.known.get(key & self.members, False)


def _any(predicate: Predicate) -> jax.Array:
    return jnp.any(predicate) if jnp.ndim(predicate) else jnp.asarray(predicate)


def _gated_vjp(
    program: Program,
    residuals: Sequence[Any],
    messages: Sequence[Any],
    predicates: Sequence[Predicate],
) -> list[Any]:
    """Cotangents of the arguments from those of the outputs; zero for what rests."""
    graph = _Graph(predicates)
    sent = [
        None
        if m is None
        else _Message(
            graph,
            graph.node(program.depends[i], [], lambda read, arrived, m=m: [m]),
            0,
            m,
            program.depends[i],
            False,
        )
        for i, m in zip(program.outputs, messages, strict=True)
    ]
    results = backward(program, residuals, sent)
    found = _evaluate(graph, results)
    return [
        None if m is None else _mask(x, p, m.exact)
        for x, p, m in zip(found, predicates, results, strict=True)
    ]


def _mask(x: Any, predicate: Predicate, exact: bool) -> Any:
    """Zeros where the predicate says so, if they are not there already."""
    if isinstance(predicate, bool):
        return x if predicate else jnp.zeros_like(x)
    if exact:
        return x
    on = jnp.reshape(
        predicate, jnp.shape(predicate) + (1,) * (x.ndim - jnp.ndim(predicate))
    )
    return jnp.where(on, x, jnp.zeros_like(x))


# Bodies of loops, checkpoints: gated passes inside of one node.


def _custom_forward(op: Operation, *inputs: Any) -> tuple[Sequence[Any], Any]:
    """A function with a derivative of its own: elementwise, or none of our business."""
    return (_plain_forward if _is_cheap(op) else VJP.forward)(op, *inputs)


def _custom_backward(op: Operation, residuals: Any, messages: list) -> list:
    rule = _plain_backward if _is_cheap(op) else _opaque_backward
    return rule(op, residuals, messages)


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


def _predicates_of(graph: _Graph, op: Operation, rows: Sequence[int]) -> list[Any]:
    """Whether anything is active that an input was computed from, for each input.

    By rows for those in `rows`, if they are an argument whose predicate is a vector.
    """
    needs = _Needs(graph.predicates, op.depends)
    return [
        graph.predicates[d.bit_length() - 1]
        if i in rows and _is_own(op, i)
        else needs(d)
        for i, d in enumerate(op.depends)
    ]


def _is_own(op: Operation, i: int) -> bool:
    """Whether an input is one of the arguments."""
    return op.aligned[i] and op.depends[i].bit_count() == 1


def _exact(graph: _Graph, op: Operation, rows: Sequence[int]) -> list[int]:
    """The inputs whose messages are zero where they rest, given these predicates."""
    return [
        i
        for i in differentiable(op)
        if _is_own(op, i) and (i in rows or _is_scalar(graph, op.depends[i]))
    ]


def _is_scalar(graph: _Graph, depends: int) -> bool:
    predicate = graph.predicates[depends.bit_length() - 1]
    return isinstance(predicate, bool) or not jnp.ndim(predicate)


def _remat_forward(op: Operation, *inputs: Any) -> tuple[Sequence[Any], Any]:
    if op.params.get("policy") is not None:
        return VJP.forward(op, *inputs)
    return op.bind(*inputs), list(inputs)


def _remat_backward(op: Operation, residuals: Any, messages: list) -> list:
    if op.params.get("policy") is not None:  # what to save is the user's choice
        return _opaque_backward(op, residuals, messages)
    graph, places = _graph_of(messages), differentiable(op)
    graph.stored.update(map(id, residuals))
    silent = [m is None for m in messages]

    def run(read, arrived):
        depends = [1 << i if d else 0 for i, d in enumerate(op.depends)]
        program = build(op.params["jaxpr"], depends, op.rules, op.given)
        inputs = residuals
        if op.params.get("prevent_cse", True):
            inputs = lax.optimization_barrier(inputs)
        _, inner = forward(program, inputs)
        waiting = iter(arrived)
        given = [
            None if s or not is_inexact(t) else next(waiting)
            for s, t in zip(silent, op.outputs, strict=True)
        ]
        found = _gated_vjp(program, inner, given, _predicates_of(graph, op, places))
        return [
            zeros_of(op.inputs[i]) if found[i] is None else found[i] for i in places
        ]

    return _send(op, graph, messages, run, places, _exact(graph, op, places))


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
        return _gated_vjp(program, residuals, full, predicates)

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
    graph, places = _graph_of(messages), differentiable(op)
    silent = [m is None for m in messages]

    def run(read, arrived):
        del read
        waiting = iter(arrived)
        given = [None if s else next(waiting) for s in silent]
        found = _scan_back(op, residuals, given, _predicates_of(graph, op, rows))
        return [found[i] for i in places]

    loop = loop_of(op)
    rows = range(loop.consts + loop.carry, len(op.inputs))
    return _send(op, graph, messages, run, places, _exact(graph, op, rows))


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
        # What nothing reads has no value, but an identity, as all else.
        places: list[Any] = [type_of(t) for t in known.saved]
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
        found = _gated_vjp(program, restored, given, now)
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
    return zeros_of(kind) if x is None else _typed(x, kind)


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


PLAIN = Rule(_plain_forward, _plain_backward)
OPAQUE = Rule(VJP.forward, _opaque_backward)
_REMAT = Rule(_remat_forward, _remat_backward)

GATED = Rules(
    by_name=dict.fromkeys((_CHEAP | _TRANSCENDENTAL | _MEETING) - {"jit"}, PLAIN)
    | dict.fromkeys(("remat", "remat2", "checkpoint"), _REMAT)
    | {
        "scan": Rule(_scan_forward, _scan_backward),
        "custom_jvp_call": Rule(_custom_forward, _custom_backward),
        "cond": OPAQUE,
        "while": OPAQUE,
    },
    default=OPAQUE,
    add=_add,
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
    program = build(closed, [1 << i for i in range(len(leaves))], GATED)
    outputs, residuals = forward(program, [jnp.asarray(x) for x in leaves])
    messages = [jnp.ones_like(outputs[0])] + [None] * (len(outputs) - 1)
    found = _gated_vjp(program, residuals, messages, predicates)
    value, aux = jax.tree.unflatten(kind, outputs)
    gradients = [
        zeros_like(p) if g is None else _as_weak_as(g, p)
        for g, p in zip(found, leaves, strict=True)
    ]
    return value, aux, gradients


def zeros_like(x: Any) -> jax.Array:
    """Zeros of the shape, dtype, weakness and sharding of an array."""
    return lax.full_like(x, 0)


def _as_weak_as(x: jax.Array, like: jax.Array) -> jax.Array:
    if not jax.typeof(like).weak_type or jax.typeof(x).weak_type:
        return x
    return lax.convert_element_type_p.bind(
        x, new_dtype=x.dtype, weak_type=True, sharding=None
    )

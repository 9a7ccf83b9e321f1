"""The backward pass as a graph of nodes, evaluated in blocks behind conditionals.

Each node knows its *key*: the set of arguments for whose sake it is computed. Nodes of
one key make a block, and a block is one `lax.cond`: it runs if any argument of the key
is active. Blocks whose key is a part of another's are inside of its conditional.
Results of operations that cost little are not handed to a block but computed in it
again, as XLA would do.
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
from ._interpreter import backward, Program
from ._rules import Operation, zeros_of


# For each argument whether it is active: known, or traced; a vector goes by rows.
Predicate = Any

_DEEPEST = 8  # conditionals inside of each other
_LARGEST_CONE = 2, 16  # arrays to read and operations to run, to compute a value again


class Node:
    """A part of the backward pass: from messages to an operation to those it sends."""

    def __init__(self, key: int, sources: list["Message"], run: Callable, number: int):
        self.key, self.sources, self.run, self.number = key, sources, run, number


class Message(NamedTuple):
    """One of the results of a node."""

    graph: "Graph"
    node: Node
    index: int
    kind: Any  # type of the value it is sent to
    depends: int  # the arguments that value was computed from; part of the node's key
    exact: bool  # zero wherever these rest


class Graph:
    """The backward pass of one program."""

    def __init__(self, predicates: Sequence[Predicate]):
        self.predicates = list(predicates)
        self.nodes: list[Node] = []
        self.made: dict[int, tuple[Operation, list[Any]]] = {}  # by id of the result
        self.held: list[Any] = []  # whose ids must stay theirs
        self.stored: set[int] = set()  # ids of what is in memory anyway

    def node(self, key: int, sources: list[Message], run: Callable) -> Node:
        """Adds a node."""
        self.nodes.append(Node(key, sources, run, len(self.nodes)))
        return self.nodes[-1]

    def note(self, op: Operation, inputs: list[Any], output: Any) -> None:
        """Remembers how to compute a value again."""
        self.held += [*inputs, output]
        if all(output is not x for x in inputs):
            self.made[id(output)] = op, inputs

    def store(self, values: Sequence[Any]) -> None:
        """Remembers what is in memory anyway."""
        self.held += values
        self.stored.update(map(id, values))


def narrowest(messages: Sequence[Message | None]) -> int:
    """The smallest key: what was made in that block needs no other."""
    keys = [m.node.key for m in messages if m is not None]
    return min(keys, key=lambda key: (key.bit_count(), key))


def graph_of(messages: Sequence[Message | None]) -> Graph:
    """The graph that messages belong to."""
    return next(m.graph for m in messages if m is not None)


def given_messages(silent: Sequence[bool], arrived: Sequence[Any]) -> list[Any]:
    """What has arrived at the outputs of an operation, with None where nothing has."""
    waiting = iter(arrived)
    return [None if s else next(waiting) for s in silent]


def add(a: Message, b: Message) -> Message:
    """The sum of two messages to one value."""
    node = a.graph.node(
        narrowest([a, b]), [a, b], lambda read, arrived: [arrived[0] + arrived[1]]
    )
    return a._replace(node=node, index=0, exact=a.exact and b.exact)


def send(op, graph, messages, run, places, exact) -> list[Message | None]:
    """The messages of a node that goes along with what it follows."""
    node = graph.node(narrowest(messages), [m for m in messages if m is not None], run)
    sent: list[Message | None] = [None] * len(op.inputs)
    for index, i in enumerate(places):
        kind, depends = op.inputs[i], op.depends[i]
        sent[i] = Message(graph, node, index, kind, depends, i in exact)
    return sent


class _Block(NamedTuple):
    """Nodes of one key."""

    key: int
    nodes: list[Node]
    # What later blocks and results use of these, with the last block that does.
    shown: dict[tuple[Node, int], tuple[Message, int]]


def _evaluate(graph: Graph, results: Sequence[Message | None]) -> list[Any]:
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
    run = _Run(graph, blocks, Needs(graph.predicates, [b.key for b in blocks]))
    values = run(0, len(blocks), {})
    return [None if m is None else values[m.node, m.index] for m in results]


class _Run:
    """Blocks one after the other, those whose key is part of another's inside of it.

    So a chain that is cut leaves nothing behind: what comes below is in the branch that
    is not taken, and no zeros have to be handed on. But each level hands down all that
    is read below, so there is a limit.
    """

    def __init__(self, graph: Graph, blocks: list[_Block], needs: "Needs"):
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
        return [typed(values[name], m.kind) for name, m in shown.items()]


def typed(x: Any, kind: Any) -> Any:
    """A cotangent in the dtype of what it is sent to."""
    return x if x.dtype == kind.dtype else lax.convert_element_type(x, kind.dtype)


def _group(nodes: list[Node]) -> list[tuple[int, list[Node]]]:
    """Nodes of one key together, as far as what they need comes before."""
    waiting = {n: len({m.node for m in n.sources}) for n in nodes}
    users: dict[Node, list[Node]] = {n: [] for n in nodes}
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
    local: dict[Node, list[Any]] = {}

    def value(m):
        return local[m.node][m.index] if m.node in local else values[m.node, m.index]

    for node in nodes:
        local[node] = node.run(read, [value(m) for m in node.sources])
    return [value(m) for m in messages]


class _Reader:
    """Reads values of the forward pass in a block: from memory, or computed again."""

    def __init__(self, graph: Graph):
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


class Needs:
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


def gated_vjp(
    program: Program,
    residuals: Sequence[Any],
    messages: Sequence[Any],
    predicates: Sequence[Predicate],
) -> list[Any]:
    """Cotangents of the arguments from those of the outputs; zero for what rests."""
    graph = Graph(predicates)
    sent = [
        None
        if m is None
        else Message(
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


def is_scalar(graph: Graph, depends: int) -> bool:
    """Whether an argument is active or not as a whole."""
    predicate = graph.predicates[depends.bit_length() - 1]
    return isinstance(predicate, bool) or not jnp.ndim(predicate)

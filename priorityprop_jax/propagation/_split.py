"""A traced loss, split in two: what rests and can be kept per example, and the rest.

The *prefix* computes, from resting leaves and the inputs of one example, values that no
step of training changes. The *suffix* is the loss with those values as inputs. Between
them lies the *frontier*: of all sets of values that separate the two, the one with the
fewest bytes, where cheap equations (elementwise, views, reductions) may be computed
again. By the max-flow min-cut theorem (Ford & Fulkerson, 1956) a flow finds it, with
the bytes of a value as its capacity; of equals the one closest to the loss is taken.
"""

import enum
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.extend.source_info_util as source_info_util
import jax.numpy as jnp
import numpy as np

from ._examples import (
    Active,
    called,
    classify,
    ELEMENTWISE,
    Known,
    Mixed,
    REDUCTIONS,
    Refusal,
    Rows,
    Value,
    VIEWS,
)


# Primitives worth keeping the results of: lifted out of rematerialized functions.
_WORK = frozenset("conv_general_dilated dot_general scan while cond sort fft".split())
_REMAT = frozenset("checkpoint remat remat2".split())


class Place(NamedTuple):
    """Output `output` of equation `equation`."""

    equation: int
    output: int


class Split(NamedTuple):
    """Where a program is cut. Equations and inputs are meant by number."""

    rows: tuple[Place, ...]  # of the frontier, one entry for each example
    layouts: tuple[Rows, ...]  # of these
    shared: tuple[Place, ...]  # of the frontier, the same for all examples
    prefix: tuple[int, ...]  # equations
    suffix: tuple[int, ...]
    reads: tuple[int, ...]  # inputs that the prefix depends on
    refusals: tuple[Refusal, ...]


def flatten(
    function: Callable[..., Any], inputs: Sequence[Any], active: Sequence[bool]
) -> Any:
    """Traces a function of arrays, and what it calls as part of it.

    Jitted functions are inlined. A function with a derivative of its own stays whole if
    it takes anything active. Of a rematerialized one, work that needs nothing active
    is done outside, and the rest is rematerialized as before.

    Args:
      function: of arrays, to a list of arrays.
      inputs: arrays, or their shapes and dtypes.
      active: which of the inputs are.

    Returns:
      A closed jaxpr.
    """
    closed = jax.make_jaxpr(function)(*inputs)
    inline = lambda *xs: _inline(closed.jaxpr, closed.consts, xs, active)[0]
    return jax.make_jaxpr(inline)(*inputs)


def _inline(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    active: Sequence[bool],
    caller: Any = None,
) -> tuple[list[Any], list[bool]]:
    """Evaluates a jaxpr with its calls inlined: outputs, and which are active."""
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True)
    )
    flags = dict(zip(jaxpr.invars, active, strict=True))
    read = lambda atoms: [values[v] if isinstance(v, jex.Var) else v.val for v in atoms]
    is_active = lambda v: isinstance(v, jex.Var) and flags.get(v, False)
    for eqn in jaxpr.eqns:
        of_inputs = [is_active(v) for v in eqn.invars]
        given = read(eqn.invars)
        custom = eqn.primitive.name.startswith("custom_")
        if caller and not source_info_util.summarize(eqn.source_info):
            # What jax has traced before does not know for whom.
            eqn = eqn.replace(source_info=caller.source_info)
        inner = called(eqn)
        if inner is None or (custom and any(of_inputs)):
            outs = _evaluate(jaxpr, [eqn], eqn.invars, eqn.outvars)(given)
            of_outs = [any(of_inputs)] * len(outs)
        else:
            own = _consts(eqn)
            if eqn.primitive.name in _REMAT and any(of_inputs):
                outs, of_outs = _remat(eqn, inner, own, given, of_inputs)
            else:
                outs, of_outs = _inline(inner, own, given, of_inputs, eqn)
        values.update(zip(eqn.outvars, outs, strict=True))
        flags.update(zip(eqn.outvars, of_outs, strict=True))
    return read(jaxpr.outvars), [is_active(v) for v in jaxpr.outvars]


def _consts(eqn: Any) -> Sequence[Any]:
    """The constants of the jaxpr that an equation calls."""
    closed = (x for x in eqn.params.values() if hasattr(x, "eqns"))
    return getattr(next(closed), "consts", ())


def _evaluate(
    jaxpr: Any, equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[[Sequence[Any]], list[Any]]:
    """The function from some variables of a jaxpr to others."""
    taken = {v: k for k, v in enumerate(inputs) if isinstance(v, jex.Var)}
    part = jaxpr.replace(
        constvars=[], invars=list(taken), outvars=list(outputs), eqns=list(equations)
    )
    function = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))
    return lambda values: function(*(values[k] for k in taken.values()))


def _remat(
    eqn: Any,
    inner: Any,
    consts: Sequence[Any],
    given: Sequence[Any],
    active: list[bool],
) -> tuple[list[Any], list[bool]]:
    """Evaluates a rematerialized function, resting work outside of it."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    inline = lambda *xs: _inline(inner, consts, xs, active, eqn)[0]
    closed = jax.make_jaxpr(inline)(*shapes)
    jaxpr = closed.jaxpr
    flags = dict(zip(jaxpr.invars, active, strict=True))
    is_active = lambda v: isinstance(v, jex.Var) and flags.get(v, False)
    for e in jaxpr.eqns:
        flags.update(dict.fromkeys(e.outvars, any(map(is_active, e.invars))))
    outs = [is_active(v) for v in jaxpr.outvars]
    resting = [e for e in jaxpr.eqns if not any(map(is_active, e.invars))]
    if not any(e.primitive.name in _WORK for e in resting):
        return _evaluate(inner, [eqn], eqn.invars, eqn.outvars)(given), outs
    values = dict(zip(jaxpr.invars, given, strict=True))
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    made = list(dict.fromkeys(v for e in resting for v in e.outvars))
    before = _evaluate(jaxpr, resting, list(values), made)
    values.update(zip(made, before(list(values.values())), strict=True))
    rest = [e for e in jaxpr.eqns if any(map(is_active, e.invars))]
    atoms = [*jaxpr.outvars, *(v for e in rest for v in e.invars)]
    atoms = dict.fromkeys(v for v in atoms if isinstance(v, jex.Var))
    read = [v for v in atoms if v in values]
    after = _evaluate(jaxpr, rest, read, jaxpr.outvars)
    kept = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    return jax.checkpoint(after, **kept)([values[v] for v in read]), outs


def split(closed: Any, values: Sequence[Value], size: int) -> Split:
    """Finds the frontier of a flat program.

    Args:
      closed: as `flatten` returns it.
      values: what its inputs are.
      size: how many examples the batch has, at least 2.

    Returns:
      A `Split`, without rows if there is nothing to keep.
    """
    jaxpr = closed.jaxpr
    made_by = _makers(jaxpr)
    effectful = [k for k, eqn in enumerate(jaxpr.eqns) if eqn.effects]
    ends = [*jaxpr.outvars, *(v for k in effectful for v in jaxpr.eqns[k].invars)]
    live = sorted({*_between(jaxpr, ends)[0], *effectful})
    of, refusals = classify(jaxpr, values, size, live)
    kind = lambda v: of[v] if isinstance(v, jex.Var) else Known()
    made = lambda v: isinstance(v, jex.Var) and v in made_by
    makes = lambda k: [of[v] for v in jaxpr.eqns[k].outvars] or [Mixed("")]

    def parents(cheap, what, v):
        """What a value is cheap to compute from, next to inputs; None if it is not."""
        eqn = jaxpr.eqns[made_by[v]]
        if eqn.primitive.name in cheap or (
            eqn.primitive.name == "gather" and isinstance(kind(eqn.invars[0]), Known)
        ):
            return [u for u in eqn.invars if made(u) and isinstance(kind(u), what)]
        return None

    later = [k for k in live if isinstance(makes(k)[0], Mixed | Active)]
    read = [v for k in later for v in jaxpr.eqns[k].invars] + list(jaxpr.outvars)
    wanted = [v for v in read if made(v) and isinstance(kind(v), Rows)]
    cheap = ELEMENTWISE | VIEWS | REDUCTIONS
    rows = _narrowest(wanted, partial(parents, cheap, Rows), _bytes)
    suffix = {*_between(jaxpr, ends, rows)[0], *effectful}
    # Numbers made of resting leaves alone, unless that is as cheap as reading them.
    read = list(jaxpr.outvars) + [
        v
        for k in sorted(suffix)
        if not isinstance(makes(k)[0], Known)
        for v in jaxpr.eqns[k].invars
    ]
    wanted = [v for v in read if made(v) and isinstance(kind(v), Known)]
    shared = _narrowest(wanted, partial(parents, ELEMENTWISE | VIEWS, Known), _bytes)
    suffix = {*_between(jaxpr, ends, [*rows, *shared])[0], *effectful}
    prefix, inputs = _between(jaxpr, [*rows, *shared])
    numbers = {v: k for k, v in enumerate(jaxpr.invars)}
    place = lambda v: Place(made_by[v], jaxpr.eqns[made_by[v]].outvars.index(v))
    layouts = tuple(of[v] for v in rows)
    return Split(
        tuple(map(place, rows)),
        layouts,  # pyright: ignore[reportArgumentType]
        tuple(map(place, shared)),
        tuple(sorted(prefix)),
        tuple(sorted(suffix)),
        tuple(sorted(numbers[v] for v in inputs if v in numbers)),
        tuple(refusals),
    )


def _bytes(v: Any) -> int:
    return max(v.aval.size * v.aval.dtype.itemsize, 1)


def _makers(jaxpr: Any) -> dict[Any, int]:
    return {v: k for k, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}


def _between(
    jaxpr: Any, targets: Iterable[Any], stop: Collection[Any] = ()
) -> tuple[set[int], set[Any]]:
    """The equations from inputs or `stop` to `targets`; and the inputs read."""
    made_by, numbers, inputs, seen = _makers(jaxpr), set(), set(), set(stop)
    waiting = list(targets)
    while waiting:
        v = waiting.pop()
        if not isinstance(v, jex.Var) or v in seen:
            continue
        seen.add(v)
        if v in made_by:
            numbers.add(made_by[v])
            waiting += jaxpr.eqns[made_by[v]].invars
        else:
            inputs.add(v)
    return numbers, inputs


def _narrowest(
    wanted: Iterable[Any],
    parents: Callable[[Any], list[Any] | None],
    capacity: Callable[[Any], int],
) -> list[Any]:
    """The fewest bytes from which all of `wanted` can be computed cheaply.

    A value is a pipe, from a tap if it is not cheap, else from its operands. What is
    wanted ends in a drain.
    """
    tap, drain, unlimited = "tap", "drain", float("inf")
    left: dict[Any, dict[Any, float]] = {tap: {}, drain: {}}

    def pipe(a, b, room):
        left.setdefault(a, {}).setdefault(b, 0)
        left[a][b] = room
        left.setdefault(b, {}).setdefault(a, 0)

    waiting = list(dict.fromkeys(wanted))
    for v in waiting:
        pipe((v, "out"), drain, unlimited)
    seen = dict.fromkeys(waiting)  # in an order that is that of every other trace
    while waiting:
        v = waiting.pop()
        pipe((v, "in"), (v, "out"), capacity(v))
        operands = parents(v)
        if operands is None:
            pipe(tap, (v, "in"), unlimited)
        for u in operands or ():
            pipe((u, "out"), (v, "in"), unlimited)
            if u not in seen:
                seen[u] = None
                waiting.append(u)
    while path := _path(left, tap, drain):
        room = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= room
            left[b][a] += room
    drained = _reaching(left, drain)
    return [v for v in seen if (v, "out") in drained and (v, "in") not in drained]


def _path(left: dict[Any, dict[Any, float]], start: Any, end: Any) -> list[Any]:
    """The shortest path with room on it, as pairs of nodes."""
    before, queue = {start: None}, deque([start])
    while queue and end not in before:
        a = queue.popleft()
        for b, room in left[a].items():
            if room > 0 and b not in before:
                before[b] = a
                queue.append(b)
    path, b = [], end
    while before.get(b) is not None:
        path.append((before[b], b))
        b = before[b]
    return path


def _reaching(left: dict[Any, dict[Any, float]], end: Any) -> set[Any]:
    """The nodes from which there is room to the end."""
    found, waiting = {end}, [end]
    while waiting:
        b = waiting.pop()
        for a in left[b]:  # pipes go both ways, with room 0 against the flow
            if left[a][b] > 0 and a not in found:
                found.add(a)
                waiting.append(a)
    return found


def prefix(closed: Any, cut: Split, size: int) -> Callable[..., tuple[list, list]]:
    """The function from the inputs in `cut.reads` to the frontier: rows, and shared.

    Rows have the axis of the examples first.
    """
    jaxpr = closed.jaxpr
    ends = [jaxpr.eqns[k].outvars[j] for k, j in (*cut.rows, *cut.shared)]
    inputs = [jaxpr.invars[k] for k in cut.reads]
    equations = [jaxpr.eqns[k] for k in cut.prefix]
    function = _evaluate(jaxpr, equations, [*jaxpr.constvars, *inputs], ends)
    n = len(cut.rows)

    def run(*values):
        outs = function([*closed.consts, *values])
        pairs = zip(outs[:n], cut.layouts, strict=True)
        return [_to_front(x, layout, size) for x, layout in pairs], outs[n:]

    return run


def suffix(closed: Any, cut: Split, size: int) -> Callable[..., list[Any]]:
    """The function from all inputs, rows and shared values to the outputs."""
    jaxpr = closed.jaxpr
    frontier = [jaxpr.eqns[k].outvars[j] for k, j in (*cut.rows, *cut.shared)]
    inputs = [*jaxpr.constvars, *frontier, *jaxpr.invars]
    equations = [jaxpr.eqns[k] for k in cut.suffix]
    function = _evaluate(jaxpr, equations, inputs, jaxpr.outvars)

    def run(values, rows, shared):
        shapes = [v.aval.shape for v in frontier]
        restored = [
            _from_front(x, layout, shape)
            for x, layout, shape in zip(rows, cut.layouts, shapes, strict=False)
        ]
        return function([*closed.consts, *restored, *shared, *values])

    return run


def _to_front(x: Any, layout: Rows, size: int) -> Any:
    x = jnp.moveaxis(x, layout.axis, 0)
    return x if layout.inner == 1 else x.reshape(size, layout.inner, *x.shape[1:])


def _from_front(x: Any, layout: Rows, shape: Sequence[int]) -> Any:
    if layout.inner != 1:
        x = x.reshape(-1, *x.shape[2:])
    x = jnp.moveaxis(x, 0, layout.axis)
    assert x.shape == tuple(shape), (x.shape, shape)
    return x


def match(one: Any, cut: Split, other: Any) -> Split | None:
    """The same cut of the program of the same function at another batch size.

    Values are the same if they are computed by the same operations from the same inputs
    and numbers, whatever the shapes. The batch size itself may be such a number: then
    what was computed for batches of one size is wrong for another.

    Returns:
      None if `other` does not compute the values of the frontier.
    """
    frontier = (*cut.rows, *cut.shared)
    marks = _marks(one.jaxpr, one.consts)
    wanted = [marks[one.jaxpr.eqns[k].outvars[j]] for k, j in frontier]
    jaxpr, places = other.jaxpr, {}
    marks = _marks(jaxpr, other.consts)
    for k, eqn in enumerate(jaxpr.eqns):
        for j, v in enumerate(eqn.outvars):
            places.setdefault(marks[v], Place(k, j))
    if not places.keys() >= set(wanted):
        return None
    found = [places[mark] for mark in wanted]
    effectful = [k for k, eqn in enumerate(jaxpr.eqns) if eqn.effects]
    ends = [*jaxpr.outvars, *(v for k in effectful for v in jaxpr.eqns[k].invars)]
    numbers = _between(jaxpr, ends, [jaxpr.eqns[k].outvars[j] for k, j in found])[0]
    n = len(cut.rows)
    return cut._replace(
        rows=tuple(found[:n]),
        shared=tuple(found[n:]),
        prefix=(),  # always computed by the first program
        suffix=tuple(sorted({*numbers, *effectful})),
    )


# Parameters of equations that say how long the axis of the examples is.
_SIZES = frozenset("limit_indices new_sizes shape sharding sizes slice_sizes".split())
_PLAIN = bool | int | float | str | tuple | np.dtype | enum.Enum | None


def _marks(jaxpr: Any, consts: Sequence[Any] = ()) -> dict[Any, int]:
    """A number for each variable that stands for how it is computed."""
    marks: dict[Any, int] = {v: hash(("input", k)) for k, v in enumerate(jaxpr.invars)}
    marks.update(zip(jaxpr.constvars, map(_constant, consts), strict=False))
    mark = lambda v: marks[v] if isinstance(v, jex.Var) else _constant(v.val)
    for eqn in jaxpr.eqns:
        settings = [(k, _setting(x)) for k, x in eqn.params.items() if k not in _SIZES]
        what = eqn.primitive.name, tuple(settings), tuple(map(mark, eqn.invars))
        marks.update((v, hash((what, j))) for j, v in enumerate(eqn.outvars))
    return marks


def _constant(x: Any) -> int:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    return hash(("constant", x.shape, str(x.dtype), zlib.crc32(x.tobytes())))


def _setting(x: Any) -> Any:
    """What counts of a parameter of an equation."""
    inner = getattr(x, "jaxpr", x)
    if isinstance(inner, jex.Jaxpr):
        marks = _marks(inner, getattr(x, "consts", ()))
        mark = lambda v: marks[v] if isinstance(v, jex.Var) else _constant(v.val)
        return tuple(map(mark, inner.outvars))
    if isinstance(x, tuple) and any(hasattr(y, "eqns") for y in x):
        return tuple(map(_setting, x))
    return repr(x) if isinstance(x, _PLAIN) else type(x).__name__

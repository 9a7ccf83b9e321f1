"""Walks a jaxpr forward and remembers; walks it back and passes messages on.

`build` flattens a jaxpr into the steps of a `Program`, deciding on a rule for each;
`forward` and `backward` run it. Both are plain loops over traceable operations, so that
programs run under jit, vmap, scan and shard_map, and inside of each other: loops and
branches are rules (at the end of this file) with programs for their bodies.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._rules import (
    axes_of,
    conform,
    is_inexact,
    merge,
    MISSING,
    Operation,
    Rule,
    Rules,
    Saved,
    type_of,
    types_of,
    VJP,
)


_HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_JAX = os.path.join(os.path.dirname(os.path.abspath(jax.__file__)), "")

# What a call calls, by the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
# With derivatives of their own: walked through only where no rule would use these.
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_ALIGNED = frozenset(
    "convert_element_type copy copy_p reduce_precision pvary"
    " sharding_constraint".split()
)
_FLAT = frozenset("sign floor ceil round".split())  # no derivative to speak of


class Step(NamedTuple):
    """An operation, and where its values are."""

    operation: Operation
    rule: Rule | None  # None if no message comes past
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """A jaxpr with a rule for each operation. Values have numbers, inputs first."""

    steps: tuple[Step, ...]
    inputs: int
    outputs: tuple[int, ...]
    constants: dict[int, Any]  # the values of literals and of what was captured
    depends: dict[int, int]  # sets of inputs; see Operation
    rules: Rules


def propagate(
    fun: Callable[..., Any],
    rules: Rules | None = None,
    data: int | Sequence[int] = (),
) -> Callable[..., tuple[Any, Callable[[Any], Any]]]:
    """Runs a function forward, and messages through it back to its arguments.

    With the default rules messages are cotangents and this is `jax.vjp`; see `Rules`
    for others. Works under `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.shard_map`.

    Calls (jit), `jax.lax.scan`, `jax.lax.cond`, `jax.checkpoint` are walked through,
    unless the rule set has rules for them; branches and checkpoints are computed again
    on the way back. Functions with derivatives of their own (custom_jvp, custom_vjp)
    are left to the default rule, if there is one, and else walked through. Messages
    cannot pass a `jax.lax.while_loop`.

    Args:
      fun: a function of pytrees of arrays, returning one.
      rules: the rule set. By default ordinary gradients.
      data: the positions of the arguments that are data, no parameters. Messages are
        sent to both; rules can tell them apart, see `Operation.given`.

    Returns:
      ``run(*args) -> (outputs, back)``. ``back`` takes one message for each array of
      the outputs, in their structure, None for none, and returns one for each array of
      ``args``, in the structure of the tuple of them, None for none.

    Raises:
      ValueError: from ``run``: `data` names an argument that is not there, or
        `Rules.group` is not a grouping.
      NotImplementedError: from ``back``: a message reaches an operation without a rule.
        Names the operation and where it is in the program.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.propagation import propagate
      >>> value, back = propagate(lambda p: jnp.sin(p["a"]) * p["b"])(
      ...     {"a": jnp.array(0.0), "b": jnp.array(3.0)}
      ... )
      >>> (messages,) = back(1.0)
      >>> print(messages["a"], messages["b"])
      3.0 0.0
    """
    rules = Rules() if rules is None else rules
    data = (data,) if isinstance(data, int) else tuple(data)

    def run(*args):
        leaves, treedef = jax.tree.flatten(args)
        for i in data:
            if not -len(args) <= i < len(args):
                raise ValueError(f"data has {i}, but there are {len(args)} arguments")
        known = {i % len(args) for i in data}
        given = [i in known for i, x in enumerate(args) for _ in jax.tree.leaves(x)]
        closed, kind = trace(lambda xs: fun(*jax.tree.unflatten(treedef, xs)), leaves)
        wanted = [is_inexact(v.aval) for v in jaxpr_of(closed).invars]
        depends = [int(w) << i for i, w in enumerate(wanted)]
        given = [g or not w for g, w in zip(given, wanted, strict=True)]
        program = build(closed, depends, rules, given)
        outputs, residuals = forward(program, leaves)

        def back(messages):
            flat = kind.flatten_up_to(messages)
            return jax.tree.unflatten(treedef, backward(program, residuals, flat))

        return jax.tree.unflatten(kind, outputs), back

    return run


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of a function, and the structure of what it returns."""
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    return closed, jax.tree.structure(shapes)


def jaxpr_of(closed: Any) -> Any:
    """The jaxpr itself, of one that may be closed."""
    return getattr(closed, "jaxpr", closed)


def build(
    closed: Any,
    depends: Sequence[int],
    rules: Rules,
    given: Sequence[bool] | None = None,
) -> Program:
    """Flattens a jaxpr and finds a rule for each operation.

    Args:
      closed: a jaxpr with its constants.
      depends: for each input a set (bits) of what messages shall be sent to; 0 if none.
      rules: the rule set.
      given: for each input whether it is data; by default those without `depends`.
    """
    builder = _Builder(rules)
    jaxpr = jaxpr_of(closed)
    if given is None:
        given = [not d for d in depends]
    inputs = [
        builder.new(d, g, aligned=True) for d, g in zip(depends, given, strict=True)
    ]
    outputs = builder.walk(jaxpr, getattr(closed, "consts", ()), inputs)
    return Program(
        tuple(builder.steps),
        len(inputs),
        tuple(outputs),
        builder.constants,
        builder.depends,
        rules,
    )


class _Builder:
    """A program in the making."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.depends: dict[int, int] = {}
        self.given: dict[int, bool] = {}
        self.aligned: dict[int, bool] = {}

    def new(self, depends: int, given: bool, aligned: bool = False) -> int:
        number = len(self.depends)
        self.depends[number] = depends
        self.given[number], self.aligned[number] = given, aligned
        return number

    def constant(self, value: Any, given: bool) -> int:
        number = self.new(0, given)
        self.constants[number] = value
        return number

    def walk(self, jaxpr: Any, consts: Sequence[Any], inputs: list[int]) -> list[int]:
        """Adds the equations of a jaxpr; returns the numbers of its outputs."""
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = self.constant(value, given=True)
        literals: dict[int, int] = {}  # by identity, as they need not be hashable

        def number(atom):
            if isinstance(atom, jex.Var):
                return numbers[atom]
            if id(atom) not in literals:
                literals[id(atom)] = self.constant(_number(atom.val), given=False)
            return literals[id(atom)]

        for name, equations in self._groups(jaxpr.eqns):
            if len(equations) == 1:
                (eqn,) = equations
                ins = [number(atom) for atom in eqn.invars]
                outs = self._equation(jaxpr, eqn, ins)
                numbers.update(zip(eqn.outvars, outs, strict=True))
            else:
                free, made = _ends(jaxpr, equations)
                op = self._operation(
                    name,
                    "",
                    {},
                    jaxpr,
                    equations,
                    free,
                    made,
                    [numbers[v] for v in free],
                )
                rule = self.rules.find(name, "") or self.rules.default or MISSING
                outs = self._step(op, rule, [numbers[v] for v in free])
                numbers.update(zip(made, outs, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _groups(self, eqns: Sequence[Any]) -> Sequence[tuple[str, Sequence[Any]]]:
        if self.rules.group is None:
            return [("", (eqn,)) for eqn in eqns]
        groups = [(name, tuple(part)) for name, part in self.rules.group(list(eqns))]
        found = [eqn for _, part in groups for eqn in part]
        if sorted(map(id, found)) != sorted(map(id, eqns)):
            raise ValueError("Rules.group must return each equation in one group")
        later = {v for eqn in eqns for v in eqn.outvars}
        for eqn in found:
            if any(isinstance(v, jex.Var) and v in later for v in eqn.invars):
                raise ValueError(
                    "Rules.group must return equations in an order in which they can "
                    f"run; {eqn.primitive.name} at {_where(eqn)} comes too early"
                )
            later.difference_update(eqn.outvars)
        return [(name, part) for name, part in groups if part]

    def _equation(self, jaxpr: Any, eqn: Any, ins: list[int]) -> list[int]:
        name, label = eqn.primitive.name, _label(eqn)
        rule = self.rules.find(name, label)
        called = _CALLS.get(name)
        if called is None and name in _CUSTOM and self.rules.default is None:
            called = _CUSTOM[name]
        if rule is None and called is not None:
            inner = eqn.params[called]
            return self.walk(jaxpr_of(inner), getattr(inner, "consts", ()), ins)
        free, eqn = _apart(eqn)
        op = self._operation(
            name, label, eqn.params, jaxpr, (eqn,), free, eqn.outvars, ins
        )
        rule = rule or _STRUCTURE.get(name) or self.rules.default or MISSING
        return self._step(op, rule, ins)

    def _operation(self, name, label, params, jaxpr, equations, free, made, ins):
        """An operation with the values `free` (None: a literal), numbered `ins`."""
        variables = [v for v in free if v is not None]
        closed = jex.ClosedJaxpr(
            jaxpr.replace(
                constvars=[], invars=variables, outvars=list(made), eqns=list(equations)
            ),
            (),
        )
        function = jex.jaxpr_as_fun(closed)

        def bind(*inputs):
            known = zip(inputs, free, strict=True)
            return function(*(x for x, v in known if v is not None))

        values = [
            self.constants.get(i) if v is None else v.aval
            for i, v in zip(ins, free, strict=True)
        ]
        types = tuple(
            jax.typeof(x) if v is None else x for x, v in zip(values, free, strict=True)
        )
        return Operation(
            name=name,
            label=label,
            params=params,
            inputs=types,
            outputs=tuple(v.aval for v in made),
            depends=tuple(self.depends[i] for i in ins),
            given=tuple(self.given[i] for i in ins),
            aligned=tuple(self.aligned[i] for i in ins),
            bind=bind,
            equations=tuple(equations),
            where=_where(equations[-1]),
            rules=self.rules,
        )

    def _step(self, op: Operation, rule: Rule, ins: list[int]) -> list[int]:
        depends = functools.reduce(lambda a, b: a | b, op.depends, 0)
        if rule is STOP or (rule is VJP and op.name in _FLAT):
            depends = 0
        given = any(op.given)
        aligned = op.name in _ALIGNED and op.aligned[0]
        outs = [
            self.new(depends if is_inexact(t) else 0, given, aligned)
            for t in op.outputs
        ]
        self.steps.append(Step(op, rule if depends else None, tuple(ins), tuple(outs)))
        return outs


def _number(x: Any) -> Any:
    """A literal as something to compute with: some of jax's own are not."""
    known = isinstance(x, int | float | complex | np.generic | np.ndarray | jax.Array)
    return x if known else np.asarray(x)


def _ends(jaxpr: Any, equations: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What equations take from outside, and what they make that is used outside."""
    inside = {id(eqn) for eqn in equations}
    made = {v for eqn in equations for v in eqn.outvars}
    taken = [v for eqn in equations for v in eqn.invars if isinstance(v, jex.Var)]
    others = [eqn.invars for eqn in jaxpr.eqns if id(eqn) not in inside]
    used = {v for vs in [*others, jaxpr.outvars] for v in vs if isinstance(v, jex.Var)}
    free = list(dict.fromkeys(v for v in taken if v not in made))
    return free, [v for eqn in equations for v in eqn.outvars if v in used]


def _apart(eqn: Any) -> tuple[list[Any], Any]:
    """A variable for each input (None: a literal), and the equation in these.

    Where one value is two inputs, messages to each are to be told apart.
    """
    variables = [v if isinstance(v, jex.Var) else None for v in eqn.invars]
    known = [v for v in variables if v is not None]
    if len(set(known)) == len(known):
        return variables, eqn
    types = [jax.ShapeDtypeStruct((), jnp.float32)] * len(known)
    others = iter(jaxpr_of(jax.make_jaxpr(lambda *xs: xs)(*types)).invars)
    fresh = []
    for v in known:
        w = next(others)
        w.aval = v.aval
        fresh.append(w)
    fresh = iter(fresh)
    invars = [next(fresh) if isinstance(v, jex.Var) else v for v in eqn.invars]
    eqn = eqn.replace(invars=invars)
    return [v if isinstance(v, jex.Var) else None for v in invars], eqn


def _label(eqn: Any) -> str:
    """What the user called it: a function, or a tag."""
    name = eqn.params.get("name")
    if isinstance(name, str):
        return name
    inner = eqn.params.get(_CUSTOM.get(eqn.primitive.name, ""))
    info = getattr(jaxpr_of(inner), "debug_info", None)
    return getattr(info, "func_name", "") if inner is not None else ""


def _where(eqn: Any) -> str:
    """The innermost line of the user's program that an equation comes from."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", None) or ():
        name = frame.file_name
        if not name.startswith((_HERE, _JAX)) and "importlib" not in name:
            return f"{name}:{frame.line_num}"
    return ""


def forward(program: Program, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The outputs, and what each step remembers."""
    values = dict(enumerate(inputs)) | program.constants
    residuals = []
    for op, rule, ins, outs in program.steps:
        arguments = [values[i] for i in ins]
        if rule is None:
            found, residual = op.bind(*arguments), None
        else:
            found, residual = rule.forward(op, *arguments)
            _check(op, "outputs", found, outs)
        residuals.append(residual)
        values.update(zip(outs, found, strict=True))
    return [values[i] for i in program.outputs], residuals


def backward(
    program: Program, residuals: Sequence[Any], messages: Sequence[Any]
) -> list[Any]:
    """From one message for each output to one for each input; None for none."""
    pending: dict[int, Any] = {}

    def send(number, message):
        if message is None or not program.depends[number]:
            return
        if number in pending:
            message = program.rules.add(pending[number], message)
        pending[number] = message

    for number, message in zip(program.outputs, messages, strict=True):
        send(number, message)
    for step, residual in zip(
        reversed(program.steps), reversed(residuals), strict=True
    ):
        arrived = [pending.pop(i, None) for i in step.outputs]
        if step.rule is None or all(m is None for m in arrived):
            continue
        sent = step.rule.backward(step.operation, residual, arrived)
        _check(step.operation, "messages", sent, step.inputs)
        for number, message in zip(step.inputs, sent, strict=True):
            send(number, message)
    return [pending.get(i) for i in range(program.inputs)]


def _check(op: Operation, what: str, found: Sequence[Any], places: Sequence[int]):
    if len(found) != len(places):
        raise ValueError(
            f"the rule for {op} must return {len(places)} {what}, got {len(found)}"
        )


# Rules for structure: the bodies of loops and branches are programs themselves.


class Loop(NamedTuple):
    """The parts of a scan."""

    body: Any
    consts: int
    carry: int
    options: dict[str, Any]  # for jax.lax.scan

    def split(self, xs: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Inputs as constants, carry and what is scanned over."""
        a, b = self.consts, self.consts + self.carry
        return list(xs[:a]), list(xs[a:b]), list(xs[b:])


def loop_of(op: Operation) -> Loop:
    """Reads the parameters of a scan, which differ between versions of jax."""
    p = op.params
    if "ft_in" in p:
        consts, carry = (len(part) for part in p["ft_in"].unpack()[:2])
    else:
        consts, carry = p["num_consts"], p["num_carry"]
    options = {name: p[name] for name in ("length", "reverse", "unroll")}
    return Loop(p["jaxpr"], consts, carry, options)


def build_body(op: Operation, loop: Loop) -> Program:
    """The body of a scan. Messages reach what is carried if any later one needs it."""
    wanted = [bool(d) for d in op.depends]
    consts, carry, xs = loop.split(op.given)
    given = [*consts, *[True] * len(carry), *xs]
    while True:
        depends = [int(w) << i for i, w in enumerate(wanted)]
        program = build(loop.body, depends, op.rules, given)
        reached = [bool(program.depends[i]) for i in program.outputs[: loop.carry]]
        found = list(wanted)
        for i, r in enumerate(reached, loop.consts):
            found[i] |= r
        if found == wanted:
            return program
        wanted = found


class Kept(NamedTuple):
    """What the steps of a loop remember: where each array is found."""

    places: tuple[tuple[str, int], ...]  # ("const", i) or ("saved", i)
    treedef: Any

    def restore(self, consts: Sequence[Any], saved: Sequence[Any]) -> Any:
        """The residuals of one step."""
        sources = {"const": consts, "saved": saved}
        return jax.tree.unflatten(
            self.treedef, [sources[kind][i] for kind, i in self.places]
        )


def keep(residuals: Any, consts: Sequence[Any]) -> tuple[list[Any], Kept]:
    """The arrays that a step must save: each once, and none that is a constant."""
    known = {id(x): ("const", i) for i, x in enumerate(consts)}
    leaves, treedef = jax.tree.flatten(residuals)
    saved, places = [], []
    for x in leaves:
        if id(x) not in known:
            known[id(x)] = ("saved", len(saved))
            saved.append(x)
        places.append(known[id(x)])
    return saved, Kept(tuple(places), treedef)


def _scan_forward(op: Operation, *inputs: Any) -> tuple[list[Any], Any]:
    loop = loop_of(op)
    program = build_body(op, loop)
    consts, carry, xs = loop.split(inputs)
    found = []

    def body(carry, x):
        out, residuals = forward(program, [*consts, *carry, *x])
        saved, kept = keep(residuals, consts)
        found[:] = [kept]
        return out[: loop.carry], (out[loop.carry :], saved)

    carry, (ys, saved) = lax.scan(body, carry, xs, **loop.options)
    return [*carry, *ys], Saved((consts, saved), (program, loop, found[0]))


def _scan_backward(op: Operation, residuals: Saved, messages: list[Any]) -> list[Any]:
    (consts, saved), (program, loop, kept) = residuals.arrays, residuals.static
    last, ys = messages[: loop.carry], messages[loop.carry :]
    n = loop.consts

    def once(carry, saved, y):
        restored = kept.restore(consts, saved)
        out = backward(program, restored, [*carry, *y])
        return out[:n], out[n : n + loop.carry], out[n + loop.carry :]

    row = lambda x: type_of(jax.typeof(x), rows=True)
    rows = jax.tree.map(row, (saved, ys))
    kinds = types_of(last)
    while True:  # until what is carried no longer changes its structure
        sums, sent, _ = jax.eval_shape(once, kinds, *rows)
        joined = [merge(a, b) for a, b in zip(kinds, sent, strict=True)]
        if joined == kinds:
            break
        kinds = joined

    def body(state, x):
        carry, total = state
        new, carry, out = once(carry, *x)
        carry = [conform(m, k) for m, k in zip(carry, kinds, strict=True)]
        total = [
            None if k is None else op.rules.add(t, conform(m, k))
            for t, m, k in zip(total, new, sums, strict=True)
        ]
        total = [conform(m, k) for m, k in zip(total, sums, strict=True)]
        return (carry, total), out

    start = (
        [conform(m, k) for m, k in zip(last, kinds, strict=True)],
        [conform(None, k) for k in sums],
    )
    options = loop.options | {"reverse": not loop.options["reverse"]}
    (carry, total), out = lax.scan(body, start, (saved, ys), **options)
    return [*total, *carry, *out]


def _again_forward(op: Operation, *inputs: Any) -> tuple[list[Any], Any]:
    return op.bind(*inputs), inputs


def barrier(inputs: Sequence[Any]) -> list[Any]:
    """Keeps XLA from seeing that what is computed from these was computed before."""
    out, alike = list(inputs), {}
    for i, x in enumerate(inputs):
        alike.setdefault(axes_of(jax.typeof(x)), []).append(i)
    # Apart, as together all would vary over the mesh axes that any of them varies over.
    for places in alike.values():
        held = lax.optimization_barrier([inputs[i] for i in places])
        for i, x in zip(places, held, strict=True):
            out[i] = x
    return out


def _remat_backward(op: Operation, inputs: Any, messages: list[Any]) -> list[Any]:
    program = build(op.params["jaxpr"], op.depends, op.rules, op.given)
    if op.params.get("prevent_cse", True):
        inputs = barrier(inputs)
    _, residuals = forward(program, inputs)
    return backward(program, residuals, messages)


def _cond_backward(op: Operation, inputs: Any, messages: list[Any]) -> list[Any]:
    index, *operands = inputs
    programs = [
        build(branch, op.depends[1:], op.rules, op.given[1:])
        for branch in op.params["branches"]
    ]

    def back(program, operands, messages):
        _, residuals = forward(program, operands)
        return backward(program, residuals, messages)

    found = [
        jax.eval_shape(functools.partial(back, p), operands, messages) for p in programs
    ]
    kinds = functools.reduce(
        lambda a, b: [merge(x, y) for x, y in zip(a, b, strict=True)], found
    )

    def branch(program, operands, messages):
        sent = back(program, operands, messages)
        return [conform(m, k) for m, k in zip(sent, kinds, strict=True)]

    branches = [functools.partial(branch, p) for p in programs]
    return [None, *lax.switch(_index(index), branches, operands, messages)]


def _index(index: Any) -> jax.Array:
    return jnp.asarray(index).astype(jnp.int32)


def _while_backward(op: Operation, residuals: Any, messages: list[Any]) -> list[Any]:
    del residuals, messages
    raise NotImplementedError(
        f"messages cannot pass {op}: nobody knows how often it runs; use jax.lax.scan"
    )


_REMAT = Rule(_again_forward, _remat_backward)
STOP = Rule(MISSING.forward, MISSING.backward)  # no message comes past
_STRUCTURE = {
    "scan": Rule(_scan_forward, _scan_backward),
    "cond": Rule(_again_forward, _cond_backward),
    "remat": _REMAT,
    "remat2": _REMAT,
    "checkpoint": _REMAT,
    "stop_gradient": STOP,
    "while": Rule(MISSING.forward, _while_backward),
}

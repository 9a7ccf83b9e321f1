"""What a rule is: how a message passes an operation on its way back.

A message can be anything: a cotangent, a relevance, a pair of a cotangent and a cost
per sample, or a node of a graph that is evaluated later. Only rules look into messages;
the interpreter hands them on, and adds them up where a value was used more than once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Operation(NamedTuple):
    """An equation of a jaxpr, or several that a rule set treats as one.

    Attributes:
      name: of the primitive (``"dot_general"``), or of the group.
      label: what the user called it: the name of a `tag` or of a called function.
      params: of the primitive.
      inputs: the type of each input, with ``shape`` and ``dtype``; literals included.
      outputs: the type of each output.
      depends: for each input, a set (bit i of an int) of the arguments of the function
        from which it was computed. 0 if no message to it is of use.
      given: for each input, whether anything else than those and numbers went into it:
        whether it is data, and no parameter.
      aligned: for each input, whether it is an argument, or one cast to another type.
        In the body of a loop or branch the arguments are those of the body, here and
        in `depends`.
      bind: computes the outputs, a list, from the inputs.
      equations: of the jaxpr.
      where: file and line in the user's program, as far as known.
      rules: the rule set in force.
    """

    name: str
    label: str
    params: Mapping[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    depends: tuple[int, ...]
    given: tuple[bool, ...]
    aligned: tuple[bool, ...]
    bind: Callable[..., list[Any]]
    equations: tuple[Any, ...]
    where: str
    rules: "Rules"

    @property
    def wanted(self) -> tuple[int, ...]:
        """The inputs to which messages are of use."""
        return tuple(i for i, d in enumerate(self.depends) if d)

    def __str__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"{self.name}{label}" + (f" at {self.where}" if self.where else "")


class Rule(NamedTuple):
    """How messages pass one kind of operation.

    Attributes:
      forward: ``(operation, *inputs) -> (outputs, residuals)``: a list of arrays, and a
        pytree of arrays to remember.
      backward: ``(operation, residuals, messages) -> messages``: from one message per
        output to one per input, both lists, with None for none.
    """

    forward: Callable[..., tuple[Sequence[Any], Any]]
    backward: Callable[[Operation, Any, list[Any]], Sequence[Any]]


def add_messages(a: Any, b: Any) -> Any:
    """The sum of two messages of one structure."""
    return jax.tree.map(jnp.add, a, b)


def _vjp_forward(op: Operation, *inputs: Any) -> tuple[list[Any], Any]:
    places = differentiable(op)
    if not places:
        return op.bind(*inputs), None
    outputs, vjp = jax.vjp(part(op, inputs, places), *(inputs[i] for i in places))
    return outputs, vjp


def _vjp_backward(op: Operation, vjp: Any, messages: list[Any]) -> list[Any]:
    out: list[Any] = [None] * len(op.inputs)
    if vjp is None:
        return out
    found = vjp(cotangents(op.outputs, messages))
    for i, message in zip(differentiable(op), found, strict=True):
        out[i] = message
    return out


VJP = Rule(_vjp_forward, _vjp_backward)


def differentiable(op: Operation) -> list[int]:
    """The inputs to which cotangents can be sent, and are of use."""
    return [i for i in op.wanted if is_inexact(op.inputs[i])]


def part(
    op: Operation, inputs: Sequence[Any], places: Sequence[int]
) -> Callable[..., list[Any]]:
    """The operation as a function of some of its inputs."""

    def function(*some):
        full = list(inputs)
        for i, x in zip(places, some, strict=True):
            full[i] = x
        return op.bind(*full)

    return function


def cotangents(types: Sequence[Any], messages: Sequence[Any]) -> list[Any]:
    """Messages as what a vjp takes: zeros for None."""
    return [
        np.zeros(t.shape, jax.dtypes.float0)
        if not is_inexact(t)
        else zeros_of(t)
        if m is None
        else m
        for t, m in zip(types, messages, strict=True)
    ]


def is_inexact(x: Any) -> bool:
    """Whether a value is one that can have a gradient."""
    return jnp.issubdtype(x.dtype, np.inexact)


def zeros_of(kind: Any) -> jax.Array:
    """Zeros of a type: its shape, dtype, sharding, and the axes it varies over."""
    return jax.lax.full_like(type_of(kind), 0)


def zeros_like(x: Any) -> jax.Array:
    """Zeros of the shape, dtype, weakness and sharding of an array."""
    return jax.lax.full_like(x, 0)


def type_of(kind: Any, rows: bool = False) -> jax.ShapeDtypeStruct:
    """A type as jax takes it; or that of the entries along the first axis."""
    shape, sharding = kind.shape, getattr(kind, "sharding", None)
    if getattr(getattr(sharding, "mesh", None), "empty", True):
        sharding = None
    if rows:
        shape = shape[1:]
        if sharding is not None:
            spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    axes, options = axes_of(kind), {}
    if axes and hasattr(kind, "manual_axis_type"):
        options["manual_axis_type"] = kind.manual_axis_type
    elif axes:  # before jax 0.10
        options["vma"] = axes
    return jax.ShapeDtypeStruct(shape, kind.dtype, sharding=sharding, **options)


def axes_of(kind: Any) -> frozenset:
    """The mesh axes that a value varies over inside of shard_map."""
    if hasattr(kind, "manual_axis_type"):
        return frozenset(getattr(kind.manual_axis_type, "varying", ()))
    return frozenset(getattr(kind, "vma", None) or ())


def vary(x: jax.Array, axes: frozenset) -> jax.Array:
    """Lets a value vary over mesh axes, as its type inside of shard_map."""
    missing = tuple(sorted(axes - axes_of(jax.typeof(x))))
    if not missing:
        return x
    cast = getattr(jax.lax, "pcast", None)  # before jax 0.9 it is called pvary
    if cast is not None:
        return cast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009


class Rules(NamedTuple):
    """Which rule applies to which operation.

    Attributes:
      by_name: rules by the name of the primitive or group, or by name and label,
        ``"tag:pixels"`` or ``"custom_jvp_call:relu"``, which take precedence.
      default: for all others: the VJP of the primitive. With None they are an error,
        once a message reaches them; calls, loops and branches are then walked through.
      add: the sum of two messages to one value. Zeros should change nothing: they stand
        for no message where loops and branches need one.
      group: ``(equations) -> [(name, equations), ...]``: the equations of a jaxpr in an
        order in which they can run, those together that are one operation. Groups of
        one keep the name of their primitive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import propagation
      >>> rules = propagation.Rules()  # ordinary gradients
      >>> run = propagation.propagate(lambda x, w: jnp.sum(x * w), rules)
      >>> value, back = run(jnp.arange(3.0), 2.0)
      >>> print(value, *back(1.0))
      6.0 [2. 2. 2.] 3.0
    """

    by_name: Mapping[str, Rule] = {}
    default: Rule | None = VJP
    add: Callable[[Any, Any], Any] = add_messages
    group: Callable[[Sequence[Any]], Sequence[tuple[str, Sequence[Any]]]] | None = None

    def find(self, name: str, label: str) -> Rule | None:
        """The rule for an operation by name; not the default one."""
        return self.by_name.get(f"{name}:{label}", self.by_name.get(name))


def _no_rule(op: Operation, residuals: Any, messages: list[Any]) -> list[Any]:
    del residuals, messages
    raise NotImplementedError(
        f"no rule for {op}; add one to Rules.by_name, or give Rules a default"
    )


MISSING = Rule(lambda op, *inputs: (op.bind(*inputs), None), _no_rule)


def merge(a: Any, b: Any) -> Any:
    """The type of a message that is of type a or of type b, where None is none.

    Raises:
      TypeError: they have different structures.
    """
    if a is None or b is None:
        return b if a is None else a
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise TypeError(
            f"messages to one value must have one structure, got "
            f"{jax.tree.structure(a)} and {jax.tree.structure(b)}"
        )
    return jax.tree.map(_join_types, a, b)


def _join_types(a: Any, b: Any) -> Any:
    shape = np.broadcast_shapes(a.shape, b.shape)
    dtype = jnp.promote_types(a.dtype, b.dtype)
    wider = a if axes_of(a) >= axes_of(b) else b
    same = wider.shape == shape and wider.dtype == dtype
    return wider if same else type_of(wider).update(shape=shape, dtype=dtype)


def types_of(tree: Any) -> Any:
    """The types of the arrays in a tree."""
    return jax.tree.map(lambda x: type_of(jax.typeof(x)), tree)


def conform(message: Any, like: Any) -> Any:
    """A message in the type that was found by `merge`: zeros for None."""
    if like is None:
        return None
    if message is None:
        return jax.tree.map(zeros_of, like)
    return jax.tree.map(_conform_array, message, like)


def _conform_array(x: Any, like: Any) -> jax.Array:
    x = jnp.broadcast_to(jnp.asarray(x, like.dtype), like.shape)
    return vary(x, axes_of(like))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Saved:
    """Arrays to remember, and what is known about them while tracing."""

    arrays: Any
    static: Any = dataclasses.field(metadata={"static": True})

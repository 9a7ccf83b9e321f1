"""The equations of a function, sorted by the group of inputs that they depend on.

A traced function can so be cut into pieces that compute some of its values from
others. Groups have numbers: `NOTHING` for what is made from no input, `CAPTURED`,
`SHARED`, then from 0 on groups that must not meet (the leaves of a tree of params).
"""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax


NOTHING, CAPTURED, SHARED = -3, -2, -1
MET = 2**31  # of two groups from 0 on


class Slice(NamedTuple):
    """The equations that lead from some values to others."""

    inputs: list[Any]
    equations: list[Any]
    function: Callable[..., list[Any]]

    def __call__(self, values: dict[Any, Any]) -> list[Any]:
        return self.function(*(values[v] for v in self.inputs))


class Program(NamedTuple):
    """A traced function, flat."""

    jaxpr: Any
    captured: dict[Any, Any]  # values of what it closed over
    groups: dict[Any, int]
    made_by: dict[Any, int]  # variable -> number of the equation

    def group(self, atom: Any) -> int:
        """What a value depends on."""
        return self.groups[atom] if isinstance(atom, jex.Var) else NOTHING

    def cut(
        self, targets: Sequence[Any], known: int, stop: Collection[Any] = ()
    ) -> Slice:
        """What leads to `targets` from inputs, `stop`, and groups up to `known`.

        What is made from nothing, zeros shaped like a leaf, is made where it is used.
        """
        inputs, numbers, seen = [], set(), set()
        waiting = list(targets)
        while waiting:
            v = waiting.pop()
            if not isinstance(v, jex.Var) or v in seen:
                continue
            seen.add(v)
            made_by = self.made_by.get(v)
            if made_by is None or v in stop or NOTHING < self.groups[v] <= known:
                inputs.append(v)
            else:
                numbers.add(made_by)
                waiting += self.jaxpr.eqns[made_by].invars
        equations = [self.jaxpr.eqns[k] for k in sorted(numbers)]
        return _slice(self.jaxpr, inputs, targets, equations)


def _slice(jaxpr: Any, inputs: list, targets: Sequence, equations: list) -> Slice:
    part = jaxpr.replace(
        constvars=[], invars=inputs, outvars=list(targets), eqns=equations
    )
    return Slice(inputs, equations, jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ())))


def trace(
    function: Callable[[list[Any]], list[Any]], inputs: list[Any], groups: Sequence[int]
) -> Program | None:
    """Traces a function of a list of arrays; None where it has side effects."""
    closed = jax.make_jaxpr(function)(inputs)
    if any(map(_is_call, closed.jaxpr.eqns)):
        # Of a function that was jitted the equations, too, belong to several groups.
        inline = functools.partial(_inline, closed.jaxpr, closed.consts)
        closed = jax.make_jaxpr(inline)(inputs)
    jaxpr = closed.jaxpr
    if jaxpr.effects:
        return None
    of = dict.fromkeys(jaxpr.constvars, CAPTURED)
    of |= zip(jaxpr.invars, groups, strict=True)
    equations, inverses = [], {}
    for eqn in jaxpr.eqns:
        if _divides_by_number(eqn) and of[eqn.invars[1]] == SHARED:
            number = eqn.invars[1]
            if number not in inverses:
                equations.append(_inverse(number))
                inverses[number] = equations[-1].outvars[0]
                of[inverses[number]] = SHARED
            factors = [eqn.invars[0], inverses[number]]
            times = _product()
            eqn = eqn.replace(
                primitive=times.primitive, params=times.params, invars=factors
            )
        met = {of[v] for v in eqn.invars if isinstance(v, jex.Var)}
        several = len([g for g in met if g >= 0]) > 1
        of |= dict.fromkeys(eqn.outvars, MET if several else max(met, default=NOTHING))
        equations.append(eqn)
    jaxpr = jaxpr.replace(eqns=equations)
    made_by = {v: k for k, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    captured = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    return Program(jaxpr, captured, of, made_by)


def _divides_by_number(eqn: Any) -> bool:
    """Whether an array is divided by a scalar that is computed.

    XLA multiplies by the inverse instead. Where that is done before, the inverses of
    all leaves are one vector, and not one more program for each leaf to compile.
    """
    if eqn.primitive is not lax.div_p or not isinstance(eqn.invars[1], jex.Var):
        return False
    array, number = (v.aval for v in eqn.invars)
    floating = jnp.issubdtype(number.dtype, jnp.floating)
    return floating and array.ndim > 0 and number.ndim == 0


def _inverse(number: Any) -> Any:
    """An equation for ``1 / number``."""
    (eqn,) = jax.make_jaxpr(lambda x: lax.div(np.ones((), x.dtype), x))(
        jax.ShapeDtypeStruct((), number.aval.dtype)
    ).eqns
    return eqn.replace(invars=[eqn.invars[0], number])


@functools.cache
def _product() -> Any:
    """An equation for a product, whose parameters differ between versions of jax."""
    return jax.make_jaxpr(lambda x: lax.mul(x, x))(np.float32(1)).eqns[0]


def _is_call(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit") and len(eqn.outvars) > 1


def _inline(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, and jitted functions with several results as part of it."""
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True)
    )
    read = lambda atoms: [values[v] if isinstance(v, jex.Var) else v.val for v in atoms]
    for call, run in itertools.groupby(jaxpr.eqns, _is_call):
        for equations in [[e] for e in run] if call else [list(run)]:
            made = [v for eqn in equations for v in eqn.outvars]
            if call:
                inner = equations[0].params["jaxpr"]
                called, captured = getattr(inner, "jaxpr", inner), inner.consts
                out = _inline(called, captured, read(equations[0].invars))
            else:
                taken = dict.fromkeys(
                    v for eqn in equations for v in eqn.invars if isinstance(v, jex.Var)
                )
                free = [v for v in taken if v in values]
                out = _slice(jaxpr, free, made, equations)(values)
            values |= zip(made, out, strict=True)
    return read(jaxpr.outvars)

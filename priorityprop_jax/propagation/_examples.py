"""What a traced function computes for each example apart from the others.

A walk through a jaxpr that follows the axis of the examples. What it calls `Rows` is
proven: entry i of such a value depends on example i and on nothing of the others. The
rules are a list of what is known to be harmless; what is not on it counts as `Mixed`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.extend.source_info_util as source_info_util


class Known(NamedTuple):
    """Made from resting leaves and constants: the same at every step."""

    uniform: frozenset[int] = frozenset()  # axes along which all entries are equal
    leaf: str | None = None  # path of a resting leaf that it depends on


class Rows(NamedTuple):
    """One entry for each example: entry k along `axis` belongs to k // inner."""

    axis: int
    inner: int = 1


class Mixed(NamedTuple):
    """Needs no active leaf, but depends on more than one example, or on chance."""

    reason: str


class Active(NamedTuple):
    """Depends on an active leaf."""


Value = Known | Rows | Mixed | Active


class Refusal(NamedTuple):
    """A resting leaf that is applied to a mixed value."""

    leaf: str
    reason: str


ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e"
    " bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy"
    " copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt"
    " igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max"
    " min mul ne neg nextafter not one_minus_square or polygamma population_count pow"
    " pvary real reduce_precision regularized_incomplete_beta rem round rsqrt select_n"
    " sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign"
    " sin sinh sqrt square stop_gradient sub tan tanh xor zeta".split()
)
REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
    " reduce_xor".split()
)
VIEWS = frozenset(
    "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice iota pad reshape"
    " rev slice split squeeze stack transpose unstack".split()
)
_CUMULATIVE = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
_WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum".split())
# Equations that only call a jaxpr on their own operands.
CALLS = frozenset(
    "checkpoint closed_call core_call custom_jvp_call custom_vjp_call"
    " custom_vjp_call_jaxpr jit pjit remat remat2".split()
)
_RANDOM = ("random_", "rng_", "threefry")


def called(eqn: Any) -> Any | None:
    """The jaxpr of an equation that only calls one."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = (getattr(x, "jaxpr", x) for x in eqn.params.values())
    return next((x for x in inner if isinstance(x, jex.Jaxpr)), None)


def where(eqn: Any) -> str:
    """The primitive of an equation and the line of source that it comes from."""
    line = source_info_util.summarize(eqn.source_info)
    return eqn.primitive.name + (f" at {line}" if line else "")


def classify(
    jaxpr: Any, values: Sequence[Value], size: int, numbers: Iterable[int] | None = None
) -> tuple[dict[Any, Value], list[Refusal]]:
    """What each variable of a jaxpr is.

    Args:
      jaxpr: an open jaxpr.
      values: what its inputs are.
      size: how many examples the batch has, at least 2.
      numbers: of the equations to look at; all if None.

    Returns:
      A `Value` for each variable, and the resting leaves applied to mixed values.
    """
    of: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, Known())
    of.update(zip(jaxpr.invars, values, strict=True))
    refusals = []
    for k in range(len(jaxpr.eqns)) if numbers is None else numbers:
        eqn = jaxpr.eqns[k]
        given = [_value(of, v) for v in eqn.invars]
        outs = _apply(eqn, given, size)
        of.update(zip(eqn.outvars, outs, strict=True))
        mixed = next((v for v in outs if isinstance(v, Mixed)), None)
        leaf = next((v.leaf for v in given if isinstance(v, Known) and v.leaf), None)
        if mixed and leaf:
            refusals.append(Refusal(leaf, mixed.reason))
    return of, refusals


def _value(of: dict[Any, Value], atom: Any) -> Value:
    return of[atom] if isinstance(atom, jex.Var) else Known()


def _apply(eqn: Any, given: Sequence[Any], size: int) -> list[Any]:
    """What the outputs of an equation are."""
    n = len(eqn.outvars)
    if any(isinstance(v, Active) for v in given):
        return [Active()] * n
    if mixed := next((v for v in given if isinstance(v, Mixed)), None):
        return [mixed] * n
    name = eqn.primitive.name
    outs: Any = None
    if eqn.effects:
        outs = "has side effects"
    elif name.startswith(_RANDOM):
        outs = "draws random numbers"
    elif name in _NESTED or name in CALLS:
        outs = _NESTED.get(name, _call)(eqn, given, size)
    elif not any(isinstance(v, Rows) for v in given):
        uniform = _uniform(eqn, given)
        leaf = next((v.leaf for v in given if isinstance(v, Known) and v.leaf), None)
        outs = [Known(uniform, leaf)] * n
    elif rule := _rule(name):
        outs = rule(eqn, given, size)
    else:
        outs = "is not known to treat each example by itself"
    if isinstance(outs, str):
        return [Mixed(f"{where(eqn)} {outs}")] * n
    mixed = next((v for v in outs if isinstance(v, Mixed)), None)
    if mixed and " at " not in mixed.reason:  # of a function of jax, traced before
        mixed = Mixed(f"{mixed.reason}, in {where(eqn)}")
    # Only all of an equation can be kept.
    return [mixed] * n if mixed else outs


# ---- values that are the same for all examples


def _uniform(eqn: Any, given: Sequence[Any]) -> frozenset[int]:
    """The axes along which the output has equal entries, of inputs that are `Known`."""
    name, params = eqn.primitive.name, eqn.params
    if len(eqn.outvars) != 1:
        return frozenset()
    out = eqn.outvars[0].aval.shape
    axes = [
        (v.aval.shape, g.uniform)
        for v, g in zip(eqn.invars, given, strict=True)
        if isinstance(g, Known) and v.aval.shape
    ]
    if name == "iota":
        return frozenset(range(len(out))) - {params["dimension"]}
    if name == "broadcast_in_dim":
        shape, uniform = axes[0] if axes else ((), frozenset())
        source = {b: k for k, b in enumerate(params["broadcast_dimensions"])}
        fresh = lambda k: k not in source or shape[source[k]] != out[k]
        return frozenset(k for k in range(len(out)) if fresh(k) or source[k] in uniform)
    if not axes:
        return frozenset()
    shape, uniform = axes[0]
    if name in ELEMENTWISE and all(len(s) == len(out) for s, _ in axes):
        level = lambda k: all(k in u or s[k] == 1 for s, u in axes)
        return frozenset(filter(level, range(len(out))))
    if len(uniform) == len(shape) and name in ("reshape", "slice"):
        return frozenset(range(len(out)))
    if name in REDUCTIONS:
        kept = [k for k in range(len(shape)) if k not in params["axes"]]
        return frozenset(new for new, old in enumerate(kept) if old in uniform)
    if name == "dot_general" and len(axes) == 2:
        left, right = (u for _, u in axes)
        batched = zip(*params["dimension_numbers"][1], strict=True)
        level = [a in left and b in right for a, b in batched]
        level += [k in left for k in _free(eqn, 0)] + [
            k in right for k in _free(eqn, 1)
        ]
        return frozenset(k for k, yes in enumerate(level) if yes)
    if name == "transpose":
        return frozenset(k for k, p in enumerate(params["permutation"]) if p in uniform)
    if name in ("squeeze", "reshape"):
        long = lambda s: [k for k, n in enumerate(s) if n > 1]
        if [shape[k] for k in long(shape)] == [out[k] for k in long(out)]:
            pairs = zip(long(shape), long(out), strict=True)
            return frozenset(new for old, new in pairs if old in uniform)
    return frozenset()


# ---- rules: what an equation makes of rows


_Outs = list[Any] | str
_OTHER = "meets a value that differs along the axis of the examples but is not theirs"


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _rows(given: Sequence[Any]) -> Rows | None:
    """The layout that all values with rows share; None if there is more than one."""
    found = {v for v in given if isinstance(v, Rows)}
    return found.pop() if len(found) == 1 else None


def _fits(v: Value, rows: Rows) -> bool:
    return v == rows if isinstance(v, Rows) else rows.axis in getattr(v, "uniform", ())


def _elementwise(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows = _rows(given)
    if rows is None:
        return _OTHER
    out = _shape(eqn.outvars[0])
    for v, g in zip(eqn.invars, given, strict=True):
        shape = _shape(v)
        if not shape:
            continue
        if len(shape) != len(out) or any(
            a not in (1, b) for a, b in zip(shape, out, strict=True)
        ):
            return "changes shape"
        # Axes of length 1 are broadcast.
        one = isinstance(g, Known) and shape[rows.axis] == 1
        if not one and not _fits(g, rows):
            return _OTHER
    return [rows]


def _without(rows: Rows, axes: Iterable[int]) -> Rows:
    return rows._replace(axis=rows.axis - sum(a < rows.axis for a in axes))


def _reduce(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    (rows,) = given
    axes = eqn.params["axes"]
    if rows.axis in axes:
        return "reduces over the examples"
    return [_without(rows, axes)]


def _broadcast(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    return [given[0]._replace(axis=eqn.params["broadcast_dimensions"][given[0].axis])]


def _transpose(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    return [given[0]._replace(axis=eqn.params["permutation"].index(given[0].axis))]


def _squeeze(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    return [_without(given[0], eqn.params["dimensions"])]


def _reshape(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    if eqn.params.get("dimensions") is not None:
        return "transposes and reshapes at once"
    # In row-major order an example is one block within each entry of the axes before.
    before = math.prod(_shape(eqn.invars[0])[: given[0].axis])
    new = _shape(eqn.outvars[0])
    for axis, length in enumerate(new):
        if math.prod(new[:axis]) == before and length and length % size == 0:
            return [Rows(axis, length // size)]
    return "splits or merges the axis of the examples"


def _along(*names: str) -> Callable[..., _Outs]:
    """A rule for what works along an axis: any other than that of the examples."""

    def rule(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
        rows = _rows(given)
        if rows is None or not all(_fits(g, rows) for g in given):
            return _OTHER
        axes = next((eqn.params[name] for name in names if name in eqn.params), None)
        last = len(_shape(eqn.invars[0])) - 1  # top_k has no choice in old versions
        axes = last if axes is None else axes
        if rows.axis in (axes if isinstance(axes, tuple) else (axes,)):
            return "works along the axis of the examples"
        return [rows] * len(eqn.outvars)

    return rule


def _slice(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    axis = given[0].axis
    strides = eqn.params["strides"]
    if (
        _shape(eqn.outvars[0])[axis] != _shape(eqn.invars[0])[axis]
        or (strides or [1] * (axis + 1))[axis] != 1
    ):
        return "takes some of the examples"
    return [given[0]]


def _pad(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows, number = given
    if not isinstance(rows, Rows) or not isinstance(number, Known):
        return _OTHER
    if tuple(eqn.params["padding_config"][rows.axis]) != (0, 0, 0):
        return "pads the axis of the examples"
    return [rows]


def _dynamic_slice(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows, *starts = given
    if not isinstance(rows, Rows) or not all(isinstance(v, Known) for v in starts):
        return _OTHER
    if eqn.params["slice_sizes"][rows.axis] != _shape(eqn.invars[0])[rows.axis]:
        return "takes some of the examples"
    return [rows]


def _dynamic_update_slice(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows = _rows(given)
    if rows is None or not all(_fits(v, rows) for v in given[:2]):
        return _OTHER
    if not all(isinstance(v, Known) for v in given[2:]):
        return _OTHER
    if _shape(eqn.invars[0])[rows.axis] != _shape(eqn.invars[1])[rows.axis]:
        return "writes to some of the examples"
    return [rows]


def _window(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    axis, p = given[0].axis, eqn.params
    sizes = "window_dimensions window_strides base_dilation window_dilation".split()
    if any(p[s][axis] != 1 for s in sizes) or tuple(p["padding"][axis]) != (0, 0):
        return "has a window over several examples"
    return [given[0]]


def _free(eqn: Any, side: int) -> list[int]:
    """The axes of an operand of a dot_general that its output has, too."""
    contracted, batched = (pair[side] for pair in eqn.params["dimension_numbers"])
    axes = range(len(_shape(eqn.invars[side])))
    return [k for k in axes if k not in contracted and k not in batched]


def _dot_general(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    contracted, batched = eqn.params["dimension_numbers"]
    mine = next(k for k in (0, 1) if isinstance(given[k], Rows))
    rows, other = given[mine], given[1 - mine]
    axis = rows.axis
    if axis in contracted[mine]:
        return "sums over the examples"
    if axis in batched[mine]:
        k = list(batched[mine]).index(axis)
        if not _fits(other, Rows(batched[1 - mine][k], rows.inner)):
            return _OTHER
        return [rows._replace(axis=k)]
    if not isinstance(other, Known):
        return "multiplies examples with each other"
    offset = len(batched[0]) + (len(_free(eqn, 0)) if mine else 0)
    return [rows._replace(axis=offset + _free(eqn, mine).index(axis))]


def _conv(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows, kernel = given
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(rows, Rows) or not isinstance(kernel, Known):
        return _OTHER
    if rows.axis != numbers.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        return "convolves along the axis of the examples"
    return [rows._replace(axis=numbers.out_spec[0])]


def _gather(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    operand, indices = given
    numbers = eqn.params["dimension_numbers"]
    rank = len(_shape(eqn.outvars[0]))
    batch = [k for k in range(rank) if k not in numbers.offset_dims]
    paired = dict(
        zip(
            numbers.start_indices_batching_dims,
            numbers.operand_batching_dims,
            strict=True,
        )
    )
    if isinstance(indices, Rows):
        if indices.axis >= len(_shape(eqn.invars[1])) - 1:
            return "indexes with several examples at once"
        if indices.axis in paired:
            if not _fits(operand, Rows(paired[indices.axis], indices.inner)):
                return _OTHER
        elif not isinstance(operand, Known):
            return "takes entries of other examples"
        return [indices._replace(axis=batch[indices.axis])]
    axis = operand.axis
    if axis in paired.values():
        k = next(k for k, other in paired.items() if other == axis)
        if k not in indices.uniform:
            return _OTHER
        return [operand._replace(axis=batch[k])]
    if (
        axis in numbers.start_index_map
        or axis in numbers.collapsed_slice_dims
        or eqn.params["slice_sizes"][axis] != _shape(eqn.invars[0])[axis]
    ):
        return "takes some of the examples"
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [operand._replace(axis=numbers.offset_dims[_without(operand, gone).axis])]


def _unstack(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    if given[0].axis == eqn.params["axis"]:
        return "takes some of the examples"
    return [_without(given[0], [eqn.params["axis"]])] * len(eqn.outvars)


def _stack(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    rows = _rows(given)
    if rows is None or not all(_fits(g, rows) for g in given):
        return _OTHER
    return [rows._replace(axis=rows.axis + (eqn.params["axis"] <= rows.axis))]


def _barrier(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    return list(given)


_RULES: dict[str, Callable[..., _Outs]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension"),
    "conv_general_dilated": _conv,
    "device_put": _barrier,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "slice": _slice,
    "sort": _along("dimension"),
    "split": _along("axis"),
    "stack": _stack,  # this, and unstack, from JAX 0.12 on
    "squeeze": _squeeze,
    "tag": lambda eqn, given, size: [given[0]],
    "top_k": _along("axis"),
    "transpose": _transpose,
    "unstack": _unstack,
}


def _rule(name: str) -> Callable[..., _Outs] | None:
    if name in ELEMENTWISE:
        return _elementwise
    if name in REDUCTIONS:
        return _reduce
    if name in _CUMULATIVE:
        return _along("axis")
    return _window if name in _WINDOWS else _RULES.get(name)


# ---- equations with jaxprs of their own


def _outputs(jaxpr: Any, given: Sequence[Any], size: int) -> list[Any]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    of, _ = classify(jaxpr, given, size)
    return [_value(of, v) for v in jaxpr.outvars]


def _call(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    return _outputs(called(eqn), given, size)


def _join(a: Value, b: Value) -> Value | None:
    """What holds of both; None if nothing does."""
    if isinstance(a, Mixed) or isinstance(b, Mixed):
        return a if isinstance(a, Mixed) else b
    if isinstance(a, Known) and isinstance(b, Known):
        return Known(a.uniform & b.uniform, a.leaf or b.leaf)
    rows = a if isinstance(a, Rows) else b
    assert isinstance(rows, Rows)
    return rows if _fits(a, rows) and _fits(b, rows) else None


def _settle(
    body: Callable[[list[Any]], list[Any]], carry: list[Any]
) -> list[Any] | None:
    """What the carry of a loop is in the end, and what else its body puts out."""
    while True:
        outs = body(carry)
        joined = [_join(*pair) for pair in zip(carry, outs, strict=False)]
        if None in joined:
            return None
        if joined == carry:
            return [*joined, *outs[len(joined) :]]
        carry = joined


_LOOP = "is a loop whose state cannot be told apart by example"


def _scan(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        consts, n = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    else:
        consts, n = eqn.params["num_consts"], eqn.params["num_carry"]
    if any(isinstance(v, Rows) and v.axis == 0 for v in given[consts + n :]):
        return "steps through the examples"
    xs = [_shift(v, -1) for v in given[consts + n :]]
    body = lambda carry: _outputs(
        eqn.params["jaxpr"], [*given[:consts], *carry, *xs], size
    )
    outs = _settle(body, list(given[consts : consts + n]))
    return _LOOP if outs is None else outs[:n] + [_shift(v, 1) for v in outs[n:]]


def _shift(v: Value, by: int) -> Value:
    if isinstance(v, Rows):
        return v._replace(axis=v.axis + by)
    if isinstance(v, Known):
        return v._replace(uniform=frozenset(k + by for k in v.uniform if k + by >= 0))
    return v


def _while(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_body = given[first : first + consts]
    body = lambda carry: _outputs(eqn.params["body_jaxpr"], [*of_body, *carry], size)
    outs = _settle(body, list(given[first + consts :]))
    if outs is None:
        return _LOOP
    (goes_on,) = _outputs(eqn.params["cond_jaxpr"], [*given[:first], *outs], size)
    return outs if isinstance(goes_on, Known) else "loops until all examples are done"


def _cond(eqn: Any, given: Sequence[Any], size: int) -> _Outs:
    if not isinstance(given[0], Known):
        return "branches on an example"
    outs, *others = (_outputs(b, given[1:], size) for b in eqn.params["branches"])
    for other in others:
        joined = [_join(*pair) for pair in zip(outs, other, strict=True)]
        if None in joined:
            return "has branches that arrange the examples differently"
        outs = joined
    leaf = given[0].leaf
    return [
        v._replace(leaf=v.leaf or leaf) if isinstance(v, Known) else v for v in outs
    ]


_NESTED: dict[str, Callable[..., _Outs]] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

"""How far each parameter is from the output, read off the computation itself.

The one idea: a depth is a longest path, and longest paths are what reverse-mode
differentiation computes when sums become maxima and products become sums (the max-plus
algebra; Baccelli et al., Synchronization and Linearity, 1992). So this is a small
`jax.vjp` of jaxprs. Walking forward, every value gets a *role* (parameter or data) and
every equation a *pull* from the distances of its outputs to those of its inputs: data
that meet a parameter are one layer further away. Distances are `(values, columns)`. The
columns do not interact, so the pull of an identity is the matrix of longest paths.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax


# Where data come from, by increasing claim to be what the model is applied to.
_NOWHERE, _CREATED, _CAPTURED, _GIVEN = -1, 0, 1, 2
# Stages of a value before any of these: untouched by a parameter, and a parameter.
_RAW, _PARAMETER = -2, -1


class _Role(NamedTuple):
    """What a value is: a parameter to data from elsewhere with an origin above `stage`.

    Parameters times raw data, elementwise, are still parameters (a kernel and its mask,
    a scale and running statistics), except to those data: hence `sources`. A look-up or
    matmul of the two is data; but if the raw data are constants, not to what is given.
    """

    stage: int
    origin: int  # the highest origin of the data from which it was computed
    sources: frozenset  # those data


_CONSTANT = _Role(_RAW, _NOWHERE, frozenset())
# What walking gives: the roles of the outputs, and the pull.
_Walked = tuple[Sequence[_Role], Callable[[np.ndarray], np.ndarray]]

# A parameter that joins data like this is no layer: a bias, a position, a class token.
_JOINING = frozenset(
    "add add_any sub concatenate select_n pad scatter scatter-add"
    " dynamic_update_slice".split()
)
# Each is a layer, but what it makes of a parameter and raw data is still a parameter.
_MODULATING = frozenset("mul div pow max min rem atan2 dynamic_slice".split())
# Operands that travel in one equation without meeting each other.
_SEPARATE = frozenset(
    "optimization_barrier device_put psum psum2 psum_invariant pmax pmin pvary"
    " pbroadcast".split()
)


def infer_depths(
    fun: Callable[..., Any], params: optax.Params, *args: Any, **kwargs: Any
) -> Any:
    r"""Infers how many layers lie between each parameter and the output.

    The computation is traced, not executed, and names do not matter, so this works for
    flax, equinox, haiku or plain functions. The depth of a parameter is

    .. math::
        d(p) = \max_{\text{paths from } p \text{ to the output}}
            \#\{\text{layers on the path after the one that } p \text{ belongs to}\}

    where a *layer* is an operation in which a parameter, or something computed from
    parameters alone, meets data: a matmul, a convolution, an embedding look-up, the
    scale of a normalization; any operation but the following.

    * A parameter added to data (or subtracted, concatenated, selected) belongs to the
      layer that made the data: bias, position embedding or class token share the depth
      of the layer below them. The last layer has depth 0.
    * Data are array arguments (also frozen weights), what ``fun`` captures or creates,
      and all that follows. Their products (attention, gates, dropout) are no layers. A
      parameter times raw data stays a parameter to other data (masks, running means).
    * ``lax.scan`` counts each iteration: a scanned stack of L layers is L layers deep,
      and its weights, like those of a recurrent network, have the depth of their first
      use. ``lax.cond`` counts its deepest branch, ``lax.while_loop`` one iteration.

    Args:
      fun: A model or its loss. All arrays in what it returns are output.
      params: A pytree of parameters; ``jax.ShapeDtypeStruct`` will do for any array.
      *args: Further arguments of ``fun``. What is no array reaches it as it is.
      **kwargs: Further keyword arguments, likewise (``train=True``).

    Returns:
      A pytree like ``params`` with an ``int`` for each floating or complex array, and
      ``None`` for all other leaves, as ``equinox.filter`` leaves them. Parameters that
      never reach the output are named in a ``UserWarning`` and get depth 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import infer_depths
      >>> def model(params, x):
      ...     hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
      ...     return hidden @ params["out"]
      >>> layer = {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4))}
      >>> params = {"in": layer, "out": jnp.ones((4, 2))}
      >>> infer_depths(model, params, jnp.ones((5, 3)))
      {'in': {'b': 1, 'w': 1}, 'out': 0}
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    arrays = [leaf for _, leaf in pairs if _is_array(leaf)]
    found = iter(_distances(_trace(fun, params, args, kwargs), arrays))
    distances = [next(found) if _is_array(leaf) else None for _, leaf in pairs]
    paths = [f"params{jax.tree_util.keystr(path)}" for path, _ in pairs]
    if unreached := list(compress(paths, (d == -np.inf for d in distances))):
        message = "These parameters never reach the output of fun, and get depth 0: "
        warnings.warn(message + ", ".join(unreached), stacklevel=2)
    depths = [None if d is None else int(max(d, 0)) for d in distances]
    return jax.tree.unflatten(treedef, depths)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _trace(fun: Callable[..., Any], *call: Any) -> Any:
    """The jaxpr of `fun` from its array arguments to the arrays that it returns."""
    leaves, treedef = jax.tree.flatten(call)

    def fun_of_arrays(*arrays):
        left = iter(arrays)
        merged = [next(left) if _is_array(leaf) else leaf for leaf in leaves]
        params, args, kwargs = jax.tree.unflatten(treedef, merged)
        return list(filter(_is_array, jax.tree.leaves(fun(params, *args, **kwargs))))

    return jax.make_jaxpr(fun_of_arrays)(*filter(_is_array, leaves)).jaxpr


def _distances(jaxpr: Any, arrays: Sequence[Any]) -> list[float | None]:
    """How far the first inputs of `jaxpr`, which are `arrays`, are from its outputs."""
    # Integers among the params (keys, counters, tables) are data like any other.
    trainable = [jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays]
    roles = [_data(var, _GIVEN) for var in jaxpr.invars]
    for i in np.flatnonzero(trainable):
        roles[i] = _CONSTANT._replace(stage=_PARAMETER)
    _, pull = _walk(jaxpr, roles)
    found = pull(np.zeros((len(jaxpr.outvars), 1)))[:, 0].tolist()
    return [d if flag else None for d, flag in zip(found, trainable, strict=False)]


def _data(source: Any, origin: int) -> _Role:
    return _Role(_RAW, origin, frozenset([source]))


def _join(*roles: _Role) -> _Role:
    origin = max(role.origin for role in roles)
    sources = (role.sources for role in roles if role.origin == origin)
    return _Role(max(role.stage for role in roles), origin, frozenset().union(*sources))


def _meets(param: _Role, data: _Role) -> bool:
    is_param_to = lambda a, b: _RAW < a.stage < b.origin and not b.sources <= a.sources
    # Two values can be parameters to each other (two scales, each times an input of its
    # own). Then the less processed one is the parameter, and of equals neither is.
    outdone = data.stage <= param.stage and is_param_to(data, param)
    return is_param_to(param, data) and not outdone


def _walk(jaxpr: Any, roles: Sequence[_Role]) -> _Walked:
    """The roles of the outputs of `jaxpr`, and its pull."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # it may be closed
    known = {var: _data(var, _CAPTURED) for var in jaxpr.constvars}
    known.update(zip(jaxpr.invars, roles, strict=True))

    def role_of(atom):
        if not isinstance(atom, jex.Literal):
            return known[atom]
        # Under jax_use_simplified_jaxpr_constants, captured arrays are literals.
        return _data(id(atom.val), _CAPTURED) if np.shape(atom.val) else _CONSTANT

    tape = []
    for eqn in jaxpr.eqns:
        outs, pull = _apply(eqn, [role_of(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, outs, strict=True))
        tape.append((eqn, pull))
    return [role_of(atom) for atom in jaxpr.outvars], partial(_rewind, jaxpr, tape)


def _rewind(jaxpr: Any, tape: list, out: np.ndarray) -> np.ndarray:
    """The pull of a jaxpr: the pulls of its equations, last one first."""
    distance = defaultdict(lambda: np.full(out.shape[1], -np.inf))
    # Keys are ids because literals, which receive distances too, need not be hashable.
    read = lambda atoms: [distance[id(atom)] for atom in atoms]

    def send(atoms, rows):
        for atom, row in zip(atoms, rows, strict=True):
            distance[id(atom)] = np.maximum(distance[id(atom)], row)

    send(jaxpr.outvars, out)
    for eqn, pull in reversed(tape):
        if np.max(read(eqn.outvars), initial=-np.inf) > -np.inf:
            send(eqn.invars, pull(np.stack(read(eqn.outvars))))
    return np.reshape(read(jaxpr.invars), (-1, out.shape[1]))


def _apply(eqn: Any, roles: Sequence[_Role]) -> _Walked:
    name = eqn.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, roles)
    if name in _SEPARATE:
        return roles, lambda out: out
    arity = lambda call: (len(call.invars), len(call.outvars))
    for called in (getattr(value, "jaxpr", value) for value in eqn.params.values()):
        # Calls (jit, remat, custom_vjp, ...) pass on just the operands that they have;
        # not so equations with kernels or combiners (pallas_call, scatter).
        if isinstance(called, jex.Jaxpr) and arity(called) == arity(eqn):
            return _walk(called, roles)
    return _operation(eqn, roles)


def _operation(eqn: Any, roles: Sequence[_Role]) -> _Walked:
    name = eqn.primitive.name
    met = [any(_meets(param, data) for param in roles) for data in roles]
    layers = np.array(met, float)[:, None] * (name not in _JOINING)
    pull = lambda out: out.max(0) + layers
    joined = _join(_CONSTANT, *roles)
    # Random numbers are noise, whoever gave the key: not what the model is applied to.
    if joined == _CONSTANT or name.startswith(("random_", "threefry")):
        # A scalar is a coefficient; an array can be all the data that the program has.
        is_array = lambda v: getattr(v.aval, "ndim", 0) > 0
        made = [_data(v, _CREATED) if is_array(v) else _CONSTANT for v in eqn.outvars]
        return made, pull
    if any(met) and name not in _JOINING | _MODULATING:
        stage_after = lambda data: data.origin if data.stage <= _PARAMETER else _GIVEN
        stages = map(stage_after, compress(roles, met))
        joined = joined._replace(stage=max(joined.stage, *stages))
    return [joined] * len(eqn.outvars), pull


def _settle(jaxpr: Any, consts: Any, carry: Any, xs: Any = ()) -> _Walked:
    """The walk through the body of a loop, with the roles its carry has in the end."""
    while True:
        outs, pull = _walk(jaxpr, [*consts, *carry, *xs])
        joined = [_join(*pair) for pair in zip(carry, outs, strict=False)]
        if joined == list(carry):
            return [*joined, *outs[len(joined) :]], pull
        carry = joined


def _scan(eqn: Any, roles: Sequence[_Role]) -> _Walked:
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        consts, n = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    else:
        consts, n = eqn.params["num_consts"], eqn.params["num_carry"]
    carry, xs = slice(consts, consts + n), slice(consts + n, None)
    inputs = roles[:consts], roles[carry], roles[xs]
    outs, pull_body = _settle(eqn.params["jaxpr"], *inputs)

    def pull(out):
        paths = pull_body(np.where(np.eye(len(out)), 0, -np.inf))
        times = lambda p, d: np.stack([(p + col).max(1) for col in d.T], axis=1)
        distance, farthest, before = out, np.full_like(out, -np.inf), np.empty(0)
        for _ in range(eqn.params["length"]):
            if np.array_equal(distance, before):
                break  # and so would be all the others
            farthest, before = np.maximum(farthest, distance), distance
            distance = np.concatenate([times(paths[carry], distance), out[n:]])
        rows = times(paths, farthest)
        rows[carry] = distance[:n]
        return rows

    return outs, pull


def _while(eqn: Any, roles: Sequence[_Role]) -> _Walked:
    first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    inputs = roles[first : first + consts], roles[first + consts :]
    outs, pull_body = _settle(eqn.params["body_jaxpr"], *inputs)

    def pull(out):
        rows = pull_body(out)
        rows[consts:] = np.maximum(rows[consts:], out)
        return np.pad(rows, ((first, 0), (0, 0)), constant_values=-np.inf)

    return outs, pull


def _cond(eqn: Any, roles: Sequence[_Role]) -> _Walked:
    walks = [_walk(branch, roles[1:]) for branch in eqn.params["branches"]]
    outs = [_join(*same) for same in zip(*(outs for outs, _ in walks), strict=True)]

    def pull(out):
        rows = np.maximum.reduce([pull(out) for _, pull in walks])
        return np.concatenate([out.max(0, keepdims=True), rows])

    return outs, pull


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}

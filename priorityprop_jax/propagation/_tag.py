"""Marks values for rules: an identity that a rule can find by its name.

The primitive does nothing, but it stays in the jaxpr: through jit, vmap, scan and
shard_map, and under differentiation, where its tangents are those of the value.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ._rules import Operation


_Tree = TypeVar("_Tree")


class _Info(NamedTuple):
    """What a tag says next to its name; arrays are inputs of the operation."""

    treedef: Any
    leaves: tuple[Hashable, ...]  # _ARRAY where it is an array

    def __repr__(self) -> str:  # as seen in a jaxpr
        return repr(jax.tree.unflatten(self.treedef, self.leaves))


class _Array:
    """Stands for an array."""

    def __repr__(self) -> str:
        return "array"


_ARRAY = _Array()


def tag(x: _Tree, name: str, /, **info: Any) -> _Tree:
    """Marks a value so that rules can find it; returns it as it is.

    The operation has the name ``"tag"`` and the label `name`: `Rules.by_name` may have
    a rule for ``"tag"`` or, for this one alone, ``"tag:<name>"``. Its first input is
    the value, followed by the arrays in `info`; see `tag_info`. Without a rule,
    messages pass unchanged, as do derivatives.

    Args:
      x: an array or a pytree of them; each leaf is an operation of its own.
      name: the label.
      **info: pytrees to be read by the rule. Their arrays may be traced, and have an
        axis of examples under `jax.vmap`; messages can be sent to them, too. All else
        has to be hashable.

    Returns:
      `x`, as jax arrays.

    Raises:
      TypeError: the name is not a string, or something in `info` is neither an array
        nor hashable.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.propagation import (
      ...     propagate, Rule, Rules, tag, tag_info
      ... )
      >>> def forward(op, x, *arrays):
      ...     return [x], (x, arrays)
      >>> def clip(op, saved, messages):
      ...     info = tag_info(op, *saved)
      ...     kept = jnp.clip(messages[0], -info["limit"], info["limit"])
      ...     return [kept, None]
      >>> run = propagate(
      ...     lambda x: jnp.sum(tag(x, "state", limit=jnp.array(1.0)) ** 2),
      ...     Rules({"tag:state": Rule(forward, clip)}),
      ... )
      >>> _, back = run(jnp.array([0.2, 3.0]))
      >>> print(*back(1.0))
      [0.4 1. ]
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a tag must be a string, got {name!r}")
    paths, treedef = jax.tree_util.tree_flatten_with_path(info)
    arrays = []
    leaves = []
    for path, leaf in paths:
        if isinstance(leaf, jax.Array | np.ndarray):
            arrays.append(jnp.asarray(leaf))
            leaves.append(_ARRAY)
            continue
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"info{jax.tree_util.keystr(path)} of tag {name!r} must be an array or "
                f"hashable, got {leaf!r}"
            ) from None
        leaves.append(leaf)
    params = {"name": name, "info": _Info(treedef, tuple(leaves))}
    mark = lambda leaf: _TAG.bind(jnp.asarray(leaf), *arrays, **params)
    return jax.tree.map(mark, x)


def tag_info(operation: Operation, x: Any, arrays: Sequence[Any]) -> dict[str, Any]:
    """What was said about a tagged value, for rules.

    Args:
      operation: a tag.
      x: the value; ignored, so that what a rule has saved can be handed on as it is.
      arrays: the other inputs of the operation.

    Returns:
      The keyword arguments of `tag`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.propagation import (
      ...     propagate, Rule, Rules, tag, tag_info, VJP
      ... )
      >>> def forward(op, x, *arrays):
      ...     print(op.label, float(tag_info(op, x, arrays)["scale"]))
      ...     return VJP.forward(op, x, *arrays)
      >>> rules = Rules({"tag": Rule(forward, VJP.backward)})
      >>> run = propagate(lambda x: tag(x, "state", scale=jnp.array(0.5)), rules)
      >>> _ = run(1.0)
      state 0.5
    """
    del x
    info, rest = operation.params["info"], iter(arrays)
    leaves = [next(rest) if v is _ARRAY else v for v in info.leaves]
    return jax.tree.unflatten(info.treedef, leaves)


def _jvp(primals, tangents, **params):
    # The tangent goes unmarked: a rule is for the value, and sees it once.
    return _TAG.bind(*primals, **params), tangents[0]


def _transpose(cotangent, x, *arrays, **params):
    del x, params
    return [cotangent, *(None for _ in arrays)]


def _batch(operands, axes, **params):
    """All with the axis of the examples in front, so that rules find it there."""
    (size,) = {x.shape[k] for x, k in zip(operands, axes, strict=True) if k is not None}
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if k is None else jnp.moveaxis(x, k, 0)
        for x, k in zip(operands, axes, strict=True)
    ]
    return _TAG.bind(*moved, **params), 0


_TAG = Primitive("tag")
_TAG.def_impl(lambda x, *arrays, **params: x)
_TAG.def_abstract_eval(lambda x, *arrays, **params: x)
ad.primitive_jvps[_TAG] = _jvp
ad.primitive_transposes[_TAG] = _transpose
batching.primitive_batchers[_TAG] = _batch
mlir.register_lowering(_TAG, lambda context, x, *arrays, **params: [x])

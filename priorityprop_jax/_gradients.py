"""`value_and_grad` and `grad`: jax's, plus `active`, and without the work it saves."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._masks import leaf_masks, LeafMask
from .propagation._gated import gated_value_and_grad
from .propagation._rules import zeros_like


def value_and_grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """The value of a function, and its gradient with respect to active leaves only.

    `jax.value_and_grad`, except that the function it returns takes one keyword more:
    ``active=``, a pytree of bools in the structure of the params (of a tuple of them,
    if `argnums` is a sequence) or a prefix of it. Leaves with False rest: they get
    zeros, and what only their gradients need is left out of the backward pass: their
    weight gradients, and all of it below the lowest active layer.

    * Python or NumPy bools, or a `static_mask`, are **static**. Only the active subtree
      is differentiated, so nothing is saved for resting layers. Saves the most; under
      `jax.jit` each mask is a program of its own.
    * JAX arrays are **dynamic**. One program serves all masks: `jax.lax.cond` around
      each part of the backward pass, the false branch being zeros. For masks that
      change inside of jit, scan, pmap or shard_map; what the backward pass may need is
      saved in any case. So next to it, behind a conditional around forward and backward
      pass, there are a program for masks in which all are active, and one or two for
      those in which only leaves near the loss are; unless `fun` is small, or has side
      effects or collectives. Under `jax.vmap` over the mask, one of these programs runs
      for all members, and both branches of each conditional in it.

    For leaves that are stacked for a `jax.lax.scan`, a bool may be a vector with one
    for each entry of the first axis; the work in the scan is then left out layer by
    layer.

    Args:
      fun: returns a real scalar, or a pair of it and anything else, if `has_aux`.
      argnums: which positional arguments to differentiate with respect to.
      has_aux: whether `fun` returns a pair.

    Returns:
      ``f(*args, active=None, **kwargs) -> (value, gradient)``, or
      ``((value, aux), gradient)``; None means all. The gradient has the structure,
      shapes and dtypes of the params, for active leaves the values of `jax.grad`.

    Raises:
      TypeError, ValueError: in jax's words, what `jax.value_and_grad` raises; `active`
        has another structure than the params, or other leaves than bools.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import value_and_grad
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x * p["in"]) * p["out"])
      >>> params = {"in": jnp.array(0.0), "out": jnp.array(2.0)}
      >>> value, gradient = value_and_grad(loss)(
      ...     params, jnp.ones(3), active={"in": True, "out": False}
      ... )
      >>> print(value, gradient["in"], gradient["out"])
      0.0 6.0 0.0
    """
    jax.value_and_grad(fun, argnums, has_aux)  # raises if this cannot be meant
    signature = _with_active(fun)

    @functools.wraps(fun)
    def value_and_grad_f(*args, active=None, **kwargs):
        params, call = _select_arguments(fun, argnums, args, kwargs)
        leaves, treedef = jax.tree.flatten(params)
        masks = leaf_masks(active, params)
        _check_dtypes(leaves)
        dynamic = not all(isinstance(m, bool) for m in masks)

        def flat(leaves):
            out = call(jax.tree.unflatten(treedef, leaves))
            if dynamic and not _has_value(out, has_aux):
                jax.value_and_grad(lambda _: out, has_aux=has_aux)(0.0)  # raises
            return out if has_aux else (out, None)

        value, aux, gradients = _by_leaf(flat, leaves, masks)
        gradient = jax.tree.unflatten(treedef, gradients)
        return ((value, aux) if has_aux else value), gradient

    return _sign(value_and_grad_f, signature)


def grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """The gradient of a function with respect to active leaves only.

    `jax.grad`, with one keyword more, ``active=``: see `value_and_grad`.

    Args:
      fun: as for `value_and_grad`.
      argnums: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.

    Returns:
      ``f(*args, active=None, **kwargs) -> gradient``, or ``(gradient, aux)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import grad
      >>> g = grad(lambda p: p["a"] * p["b"])
      >>> params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
      >>> out = g(params, active={"a": True, "b": False})
      >>> print(out["a"], out["b"])
      3.0 0.0
    """
    value_and_grad_f = value_and_grad(fun, argnums, has_aux)

    @functools.wraps(fun)
    def grad_f(*args, active=None, **kwargs):
        value, gradient = value_and_grad_f(*args, active=active, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return _sign(grad_f, _with_active(fun))


def _with_active(fun: Callable) -> inspect.Signature | None:
    """The signature of `fun` with ``active``, which `jax.jit` looks up by name."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):  # builtins may have none
        return None
    known = list(signature.parameters.values())
    if "active" in signature.parameters:
        raise ValueError(
            "fun has a parameter named 'active', which is what the function returned "
            "here takes the mask by; rename it, or bind it with functools.partial in a "
            "function of other parameters"
        )
    active = inspect.Parameter("active", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(known) - sum(p.kind is inspect.Parameter.VAR_KEYWORD for p in known)
    return signature.replace(parameters=[*known[:at], active, *known[at:]])


def _sign(function: Callable, signature: inspect.Signature | None) -> Callable:
    if signature is not None:
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _select_arguments(
    fun: Callable, argnums: int | Sequence[int], args: tuple, kwargs: dict
) -> tuple[Any, Callable[[Any], Any]]:
    """The arguments to differentiate with respect to, and a function of them alone."""
    single = not isinstance(argnums, Sequence)
    numbers = [argnums] if single else list(argnums)
    if any(not -len(args) <= i < len(args) for i in numbers):
        jax.grad(fun, argnums)(*args, **kwargs)  # raises, in jax's words
    numbers = [i % len(args) for i in numbers]

    def call(params):
        full = list(args)
        for i, p in zip(numbers, [params] if single else params, strict=True):
            full[i] = p
        return fun(*full, **kwargs)

    return args[numbers[0]] if single else tuple(args[i] for i in numbers), call


def _check_dtypes(leaves: list[Any]) -> None:
    for x in leaves:
        try:
            ok = jnp.issubdtype(jnp.result_type(x), np.inexact)
        except TypeError:
            ok = False
        if not ok:
            jax.grad(lambda _: 0.0)(x)  # raises, in jax's words


def _has_value(out: Any, has_aux: bool) -> bool:
    """Whether `jax.value_and_grad` would take this for a value (and aux)."""
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            return False
        out = out[0]
    if out is None or not jax.tree_util.all_leaves([out]):
        return False
    try:
        return not jnp.shape(out) and jnp.issubdtype(jnp.result_type(out), np.floating)
    except TypeError:
        return False


def _by_leaf(
    fun: Callable[[list[Any]], tuple[Any, Any]],
    leaves: list[Any],
    masks: list[LeafMask],
) -> tuple[Any, Any, list[Any]]:
    """Value, aux, and one gradient for each leaf."""
    masks = [all(m) if isinstance(m, tuple) and all(m) == any(m) else m for m in masks]
    wanted = [i for i, m in enumerate(masks) if m is not False]

    def of_wanted(parts):
        full = list(leaves)
        for i, x in zip(wanted, parts, strict=True):
            full[i] = x
        return fun(full)

    parts = [leaves[i] for i in wanted]
    if all(masks[i] is True for i in wanted):
        (value, aux), found = jax.value_and_grad(of_wanted, has_aux=True)(parts)
    else:
        kept = [masks[i] for i in wanted]
        value, aux, found = gated_value_and_grad(of_wanted, parts, kept)
    gradients = [zeros_like(x) for x in leaves]
    for i, g in zip(wanted, found, strict=True):
        gradients[i] = g
    return value, aux, gradients

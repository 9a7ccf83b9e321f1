"""Models of all kinds in one functional form.

A `Functional` has what is trained (`params`), what else changes (`state`: statistics of
BatchNorm, random streams of an nnx module), and pure functions of the two. Nothing
behind this file needs to know which library a model is from.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


# By these names a model is told whether it is being trained, and their negations.
_TRAIN = ("train", "training", "is_training")
_EVAL = ("deterministic", "use_running_average", "eval", "inference")
_KEY = ("key", "rng", "rng_key")
# Collections that a module writes for whoever asks, not for its next call.
_PASSING = ("intermediates", "perturbations", "params")


class Functional(NamedTuple):
    """A model as pure functions of what is trained and of what else changes.

    Attributes:
      kind: ``"nnx"``, ``"linen"`` or ``"function"``.
      params: pytree of floating arrays.
      state: pytree of arrays; ``{}`` if the model has none.
      bind: ``bind(params, state, train, key) -> model``, to be called as
        ``model(inputs)``; for nnx, the module.
      state_of: the new state, from a model that has been called.
      write_back: ``write_back(params, state)``: into the user's own object.
      couples_examples: whether in training the output for an example depends on the
        others of its batch, as with BatchNorm.
    """

    kind: str
    params: Any
    state: Any
    bind: Callable[[Any, Any, bool, jax.Array], Any]
    state_of: Callable[[Any], Any]
    write_back: Callable[[Any, Any], None]
    couples_examples: bool

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array
    ) -> tuple[Any, Any]:
        """The outputs, and the new state."""
        model = self.bind(params, state, train, key)
        outputs = model(inputs)
        return outputs, self.state_of(model)


class BoundModel:
    """A linen module or a function, with params: what a loss function is given.

    Attributes:
      params: what is being trained.
      state: what else changes; replaced at each call.
      train: whether it is being trained.
    """

    def __init__(self, call: Callable[..., Any], params: Any, state: Any, train: bool):
        self.params, self.state, self.train, self._call = params, state, train, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for these arguments, which the model gets as they are."""
        outputs, self.state = self._call(self.params, self.state, *args, **kwargs)
        return outputs


def as_functional(
    model: Any, params: Any = None, example_input: Any = None, seed: int = 0
) -> Functional:
    """Brings an nnx module, a linen module or a function into functional form.

    Args:
      model: a `flax.nnx.Module`; a `flax.linen.Module`; a pair ``(params, apply_fn)``
        with ``apply_fn(params, inputs)``; or such an ``apply_fn`` alone. A function or
        a linen module is told whether it is in training by its argument ``train``,
        ``training``, ``is_training`` or ``deterministic``, and a function gets a key by
        its argument ``key`` or ``rng``, where it has one.
      params: for linen, what ``init`` returned; for a function, its params.
      example_input: for linen without `params`: an array (or its shape) to call
        ``init`` with.
      seed: for linen without `params`.

    Returns:
      A `Functional`, whose arrays are those of the model: copy before donating.

    Raises:
      TypeError: `model` is none of these, or a leaf of the params is no floating array.
      ValueError: there is nothing to train, or an argument is missing or useless.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.training._models import as_functional
      >>> model = as_functional(({"w": jnp.ones((2, 1))}, lambda p, x: x @ p["w"]))
      >>> key = jax.random.key(0)
      >>> args = model.params, model.state, jnp.ones((3, 2))
      >>> outputs, state = model.apply(*args, train=True, key=key)
      >>> outputs.shape, state
      ((3, 1), {})
    """
    if isinstance(model, tuple) and len(model) == 2 and callable(model[1]):
        if params is not None:
            raise ValueError(
                "params came twice: in model=(params, apply_fn), and alone"
            )
        params, model = model
        found = _from_function(model, params)
    elif _is_a(model, "flax.nnx.module", "Module"):
        if params is not None:
            raise ValueError("an nnx module holds its params: leave out params=")
        found = _from_nnx(model)
    elif _is_a(model, "flax.linen.module", "Module"):
        found = _from_linen(model, params, example_input, seed)
    elif callable(model) and params is not None:
        found = _from_function(model, params)
    else:
        raise TypeError(
            "model must be a flax.nnx.Module, a flax.linen.Module, or a pair (params, "
            f"apply_fn), got {type(model).__name__}"
            + ("; for a function give params=, too" if callable(model) else "")
        )
    _check_params(found.params)
    return found


def _copy(x: Any) -> jax.Array:
    return x.copy() if isinstance(x, jax.Array) else jnp.array(x)


def _is_a(model: Any, module: str, name: str) -> bool:
    """Whether it is one of flax's, without importing flax."""
    kinds = type(model).__mro__
    return any(k.__name__ == name and k.__module__ == module for k in kinds)


def _check_params(params: Any) -> None:
    pairs = jax.tree_util.tree_leaves_with_path(params)
    if not pairs:
        raise ValueError(
            "the model has no trainable parameters: no flax.nnx.Param of a floating "
            "type, or an empty params"
        )
    for path, leaf in pairs:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            where, what = jax.tree_util.keystr(path), dtype or type(leaf).__name__
            raise TypeError(
                f"params{where} must be a floating array, as all of params is trained, "
                f"got {what}; keep what is not trained elsewhere"
            )


# --- nnx


def _from_nnx(module: Any) -> Functional:
    from flax import nnx

    def trained(path, x):
        of_type = isinstance(x, nnx.Param)
        leaves = jax.tree.leaves(x)
        return of_type and all(jnp.issubdtype(v.dtype, jnp.inexact) for v in leaves)

    def copies(train):
        copy = nnx.merge(*nnx.split(module))
        copy.train() if train else copy.eval()
        return nnx.split(copy, trained, ...)

    graphs, (_, params, rest) = (copies(False)[0], copies(True)[0]), copies(True)
    params_def, params_keys, rest_def, rest_keys = *_keys(params), *_keys(rest)

    def bind(params, state, train, key):
        del key  # an nnx module has streams of its own, in its state
        arrays = _get(params, params_keys), _get(state, rest_keys)
        states = params_def.unflatten(arrays[0]), rest_def.unflatten(arrays[1])
        return nnx.merge(graphs[train], *states)

    def state_of(model):
        _, _, rest = nnx.split(model, trained, ...)
        found = dict(_pairs(rest))  # may have more by now: what was sown, say
        return _nest((k, found[k]) for k in rest_keys)

    def write_back(params, state):
        arrays = _get(params, params_keys), _get(state, rest_keys)
        for treedef, leaves in zip((params_def, rest_def), arrays, strict=True):
            nnx.update(module, treedef.unflatten(map(_copy, leaves)))

    coupled = any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(module))
    trees = _nest(_pairs(params)), _nest(_pairs(rest))
    return Functional("nnx", *trees, bind, state_of, write_back, coupled)


def _pairs(state: Any) -> list[tuple[tuple, Any]]:
    """Leaves with paths of plain names, without the variables around them."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    plain = lambda k: getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))
    names = lambda path: (plain(k) for k in path if getattr(k, "name", "") != "value")
    return [(tuple(names(path)), x) for path, x in flat]


def _keys(state: Any) -> tuple[Any, list[tuple]]:
    return jax.tree.structure(state), [key for key, _ in _pairs(state)]


def _nest(pairs: Iterable[tuple[tuple, Any]]) -> dict:
    tree: dict = {}
    for key, x in pairs:
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = x
    return tree


def _get(tree: Any, keys: list[tuple]) -> list[Any]:
    found = []
    for key in keys:
        node = tree
        for name in key:
            node = node[name]
        found.append(node)
    return found


# --- linen


def _from_linen(module: Any, params: Any, example: Any, seed: int) -> Functional:
    from flax import core, linen as nn

    says = _train_argument(type(module).__call__)
    call = lambda train: says(train) if says else {}
    if params is None and example is None:
        raise ValueError(
            "a linen module needs example_input=, an array to initialize it with, or "
            "params=, what its init returned"
        )
    if params is None:
        rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed + 1)}
        init = lambda x: module.init(rngs, x, **call(False))
        shapes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        params = jax.jit(init)(shapes)
    variables = core.unfreeze(nn.meta.unbox(params))
    if not (isinstance(variables, Mapping) and "params" in variables):
        variables = {"params": variables}
    state = {k: v for k, v in variables.items() if k not in _PASSING}

    def bind(params, state, train, key):
        kwargs, mutable = call(train), list(state) if train else False
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}

        def run(params, state, *args, **given):
            out = module.apply(
                {"params": params, **state},
                *args,
                rngs=rngs,
                mutable=mutable,
                **{**kwargs, **given},
            )
            if mutable is False:
                return out, state
            outputs, new = out
            return outputs, {**state, **core.unfreeze(new)}

        return BoundModel(run, params, state, train)

    nothing = lambda params, state: None
    coupled = "batch_stats" in state
    get = lambda model: model.state
    params = variables["params"]
    return Functional("linen", params, state, bind, get, nothing, coupled)


def _train_argument(function: Callable[..., Any]) -> Callable | None:
    """How to tell this function whether it is in training: ``train -> kwargs``."""
    names = _parameters(function)
    for name in _TRAIN:
        if name in names:
            return lambda train, name=name: {name: train}
    for name in _EVAL:
        if name in names:
            return lambda train, name=name: {name: not train}
    return None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some callables have no signature
        return ()


# --- functions


def _from_function(apply_fn: Callable[..., Any], params: Any) -> Functional:
    says, names = _train_argument(apply_fn), _parameters(apply_fn)
    takes_key = next((name for name in _KEY if name in names), None)

    def bind(params, state, train, key):
        kwargs = says(train) if says else {}
        if takes_key:
            kwargs[takes_key] = key
        run = lambda p, s, *args, **given: (
            apply_fn(p, *args, **{**kwargs, **given}),
            s,
        )
        return BoundModel(run, params, state, train)

    nothing = lambda params, state: None
    get = lambda model: model.state
    return Functional("function", params, {}, bind, get, nothing, False)

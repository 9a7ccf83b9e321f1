"""What a step computes: the loss of a batch, and sums from which means are made.

The sums are one float32 vector: how many examples, then what they add to the loss and
to each metric. Padding has weight zero.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._batches import agreed_size
from ._models import Functional
from ._placement import batch_size


_INPUTS, _LABELS = ("inputs", "x", "image"), ("labels", "y", "label")
_KEYS = ("rng", "key", "rngs")
# Names of sums that are no metrics.
EXAMPLES, STEPS = "(examples)", "(steps)"
# What else there is in a history.
TAKEN = (
    *("loss", "epoch", "step", "seconds", "compile_seconds", "flops_spent"),
    *("flops_full", "updates", "skipped"),
)


def accuracy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest output is the label's, for each example.

    Args:
      outputs: scores of the classes, shape=(..., classes), or, in the shape of
        `labels`, one score for each: positive means yes.
      labels: integers of shape=(...,), or one-hot vectors; or, for scores of
        yes and no, 0 or 1.

    Returns:
      shape=(...,), dtype=float32.

    Raises:
      ValueError: the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.training._objective import accuracy
      >>> print(accuracy(jnp.array([[0.1, 0.9], [2.0, 1.0]]), jnp.array([1, 1])))
      [1. 0.]
    """
    if outputs.shape[:-1] == labels.shape and outputs.ndim:
        right = outputs.argmax(-1) == labels
    elif outputs.shape == labels.shape and outputs.shape[-1] > 1 and outputs.ndim > 1:
        right = outputs.argmax(-1) == labels.argmax(-1)
    elif outputs.shape == labels.shape:
        right = (outputs > 0) == (labels > 0.5)
    else:
        raise ValueError(
            f"accuracy: outputs of shape {outputs.shape} do not fit to labels of shape "
            f"{labels.shape}; labels must be integers of shape {outputs.shape[:-1]}, "
            f"or one-hot of shape {outputs.shape}"
        )
    return right.astype(jnp.float32)


METRICS = {"accuracy": accuracy}


def resolve_metrics(metrics: Any) -> dict[str, Callable[..., Any]]:
    """Metrics by name, from a name, a function, a sequence of these, or a mapping.

    Args:
      metrics: as the user gave it.

    Returns:
      Functions ``(outputs, labels) -> per example or scalar``, by name.

    Raises:
      ValueError: a name that is not known, taken, or came twice.
      TypeError: something that is neither a name nor a function.

    Examples:
      >>> from priorityprop_jax.training._objective import resolve_metrics
      >>> list(resolve_metrics(["accuracy"]))
      ['accuracy']
    """
    if metrics is None:
        return {}
    if isinstance(metrics, str) or callable(metrics):
        metrics = [metrics]
    if isinstance(metrics, Mapping):
        pairs = list(metrics.items())
    else:
        pairs = [
            (m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__), m)
            for m in metrics
        ]
    found: dict[str, Callable[..., Any]] = {}
    for name, function in pairs:
        if isinstance(function, str):
            if function not in METRICS:
                raise ValueError(
                    f"metrics: {function!r} is not known, only "
                    f"{', '.join(map(repr, METRICS))}; or give a function of "
                    f"(outputs, labels)"
                )
            function = METRICS[function]
        if not callable(function):
            raise TypeError(
                f"metrics: {name!r} must be a function (outputs, labels), got "
                f"{function!r}"
            )
        if name in found or name in TAKEN:
            raise ValueError(f"metrics: the name {name!r} is taken, give a mapping")
        found[name] = function
    return found


def takes_model(loss_fn: Callable[..., Any]) -> bool:
    """Whether it is ``(model, batch, rng)``, else ``(logits, labels)``.

    Raises:
      TypeError: it is neither.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return False
    named = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    needed = sum(p.default is p.empty for p in named)
    third = named[2].name if len(named) > 2 else ""
    if needed == 3 or (needed < 3 and third in _KEYS):
        return True
    if needed <= 2 <= len(named):
        return False
    raise TypeError(
        f"loss_fn must be loss_fn(logits, labels) or loss_fn(model, batch, rng), got "
        f"a function of ({', '.join(p.name for p in named)})"
    )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels.

    Raises:
      ValueError: the structure is none that is known.
    """
    if isinstance(batch, Mapping):
        inputs = [k for k in _INPUTS if k in batch]
        labels = [k for k in _LABELS if k in batch]
        if len(inputs) == len(labels) == 1:
            return batch[inputs[0]], batch[labels[0]]
        got = f"a mapping with the keys {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1]
        got = f"a {type(batch).__name__} of {len(batch)}"
    else:
        shape = getattr(batch, "shape", None)
        got = f"an array of shape {shape}" if shape is not None else repr(type(batch))
    raise ValueError(
        f"for a loss_fn(logits, labels) a batch must be (inputs, labels), or a mapping "
        f"with one of {_INPUTS} and one of {_LABELS}; got {got}. For other batches "
        f"give a loss_fn(model, batch, rng)"
    )


class Objective(NamedTuple):
    """The loss function and the metrics of a model, as pure functions.

    Attributes:
      model: in functional form.
      loss_fn: as the user gave it.
      with_model: whether `loss_fn` is ``(model, batch, rng)``.
      metrics: ``(outputs, labels) -> per example or scalar``, by name.
      dtype: in which to compute, or None.
      seed: of the keys.
      hold: keeps a new state where the old one was; see `Placement.hold`.
    """

    model: Functional
    loss_fn: Callable[..., Any]
    with_model: bool
    metrics: dict[str, Callable[..., Any]]
    dtype: Any
    seed: int
    hold: Callable[[Any], Any] = lambda state: state

    def train(
        self, params: Any, state: Any, batch: Any, weights: Any, step: Any
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        """The loss, and the new state with the sums: what `make_train_step` is given.

        A step whose loss is not finite leaves the state as it was, and adds nothing.

        Args:
          params: of the model.
          state: of the model.
          batch: as it came from the loader, on the device.
          weights: (examples,) float32, zero for padding; None: all count the same.
          step: number of the step, from which its key is made.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        loss, new, sums = self._run(params, state, batch, weights, True, key)
        ok = jnp.isfinite(loss)
        vector = jnp.stack([sums[name] for name in sorted(sums)])
        state = self.hold(_keep(ok, new, state))
        return loss, (state, jnp.where(ok, vector, 0.0))

    def evaluate(self, params: Any, state: Any, batch: Any, weights: Any) -> jax.Array:
        """The sums of a batch, of a model that is not in training."""
        key = jax.random.key(self.seed)
        sums = self._run(params, state, batch, weights, False, key)[2]
        return jnp.stack([sums[name] for name in sorted(sums)])

    def names(self, params: Any, state: Any, batch: Any, train: bool) -> list[str]:
        """Of the sums, in their order. Traces, and so checks, the whole."""
        key = jax.random.key(self.seed)
        run = lambda p, s, b: self._run(p, s, b, None, train, key)[2]
        return sorted(jax.eval_shape(run, params, state, batch))

    def predict(self, params: Any, state: Any, inputs: Any) -> Any:
        """The outputs of a model that is not in training."""
        key = jax.random.key(self.seed)
        params, inputs = _cast((params, inputs), self.dtype)
        outputs, _ = self.model.apply(params, state, inputs, train=False, key=key)
        return _uncast(outputs, self.dtype)

    def is_by_example(self, params: Any, state: Any, batch: Any, train: bool) -> bool:
        """Whether loss and metrics come for each example, so that padding can be told.

        Raises:
          ValueError: one is neither a scalar nor an array with an entry per example.
        """
        if self.with_model:
            return False
        n, key = agreed_size("batch", batch, scalars=True), jax.random.key(self.seed)
        run = lambda p, s, b: self._values(p, s, b, train, key)[0]
        shapes = jax.eval_shape(run, params, state, batch)
        for name, shape in shapes.items():
            if shape.ndim and shape.shape[0] != n:
                raise ValueError(
                    f"{name} must be a scalar, or have an entry for each of the {n} "
                    f"examples, got shape {shape.shape}"
                )
        return all(shape.ndim for shape in shapes.values())

    def _values(self, params, state, batch, train, key):
        """Loss and metrics as they come, and the new state."""
        inputs, labels = split_batch(batch)
        params, inputs = _cast((params, inputs), self.dtype)
        outputs, state = self.model.apply(params, state, inputs, train=train, key=key)
        outputs = _uncast(outputs, self.dtype)
        values = {"loss": jnp.asarray(self.loss_fn(outputs, labels))}
        for name, metric in self.metrics.items():
            values[name] = jnp.asarray(metric(outputs, labels))
        return values, state

    def _run(self, params, state, batch, weights, train, key):
        if self.with_model:
            params = _cast(params, self.dtype)
            model_key, loss_key = jax.random.split(key)
            model = self.model.bind(params, state, train, model_key)
            values = self._check(self.loss_fn(model, batch, loss_key))
            state = self.model.state_of(model)
        else:
            values, state = self._values(params, state, batch, train, key)
        if weights is None:
            weights = jnp.ones((batch_size(batch),), jnp.float32)
        total = jnp.sum(weights)
        sums = {name: _sum(value, weights) for name, value in values.items()}
        loss = values["loss"] if not values["loss"].ndim else sums["loss"] / total
        return loss, state, {EXAMPLES: total, STEPS: jnp.ones(()), **sums}

    def _check(self, value: Any) -> dict[str, jax.Array]:
        """Loss and metrics from what a loss function of three arguments returned."""
        loss, metrics = value if isinstance(value, tuple) else (value, {})
        if not isinstance(metrics, Mapping):
            raise TypeError(
                "loss_fn(model, batch, rng) must return a scalar or (scalar, metrics), "
                f"metrics a dict of scalars, got {type(metrics).__name__}"
            )
        values = {"loss": loss, **metrics}
        for name, x in values.items():
            if jnp.ndim(x):
                raise ValueError(
                    f"loss_fn(model, batch, rng) must return scalars, got {name!r} of "
                    f"shape {jnp.shape(x)}"
                )
        if taken := [name for name in metrics if name in TAKEN]:
            raise ValueError(f"the name {taken[0]!r} of a metric is taken, use another")
        return {name: jnp.asarray(x) for name, x in values.items()}


def _sum(value: jax.Array, weights: jax.Array) -> jax.Array:
    value = value.astype(jnp.float32)
    if not value.ndim:
        return value * jnp.sum(weights)
    by_example = value.reshape(value.shape[0], -1).mean(1)
    # What padding computes may be anything.
    return jnp.sum(jnp.where(weights > 0, by_example * weights, 0.0))


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, tree)


def _uncast(tree: Any, dtype: Any) -> Any:
    return tree if dtype is None else _cast(tree, jnp.float32)


def _keep(ok: jax.Array, new: Any, old: Any) -> Any:
    """The new state, in the types of the old, or the old."""

    def choose(a, b):
        if not jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a = a.astype(b.dtype)
        return jnp.where(ok, a, b)

    return jax.tree.map(choose, new, old)


class Structure:
    """Remembers the structure of the first batch, and compares the others with it."""

    def __init__(self, objective: Objective):
        self._two = not objective.with_model
        self._first: Any = None

    def __call__(self, batch: Any) -> Any:
        """The batch as it came.

        Raises:
          ValueError: it has another structure than the first one, or than is needed.
        """
        structure = jax.tree.structure(batch)
        if self._first is None:
            if self._two:
                split_batch(batch)
                agreed_size("batch", batch, scalars=True)
            self._first = structure
        elif structure != self._first:
            raise ValueError(
                f"batches must have one structure: {_differ(self._first, structure)}"
            )
        return batch


def _differ(first: Any, other: Any) -> str:
    """The first path that is in only one of the two."""
    paths = []
    for treedef in (first, other):
        tree = treedef.unflatten(range(treedef.num_leaves))
        pairs = jax.tree_util.tree_leaves_with_path(tree)
        paths.append([jax.tree_util.keystr(path) for path, _ in pairs])
    for path in paths[1]:
        if path not in paths[0]:
            return f"batch{path} was not in the first one"
    for path in paths[0]:
        if path not in paths[1]:
            return f"batch{path} was in the first one, and is missing in a later one"
    return f"the first one was {first}, a later one {other}"

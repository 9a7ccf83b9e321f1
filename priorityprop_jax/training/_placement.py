"""Where params, optimizer state and batches lie: one device, many, many processes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
    SingleDeviceSharding,
)


NAMES = (None, "replicated", "fsdp")


class Placement:
    """Puts params, optimizer state and batches where a mesh and a sharding say.

    Batches are split along the first axis of the mesh. In several processes each has
    batches of its own, parts of the global one; params have to be the same in all.

    Args:
      mesh: a `jax.sharding.Mesh` over all devices that take part. None: one device.
      sharding: of the params. None or ``"replicated"``: whole on each device.
        ``"fsdp"``: each leaf split along its largest axis that the first axis of the
        mesh divides; whole, if there is none. Else a pytree of
        `jax.sharding.PartitionSpec` or `jax.sharding.NamedSharding`, with the structure
        of the params or a prefix of it, or a function of (path, leaf) that returns one,
        where a path looks like ``"['Dense_0']['kernel']"``.

    Raises:
      TypeError, ValueError: an argument cannot be meant; with ``sharding`` there is no
        mesh.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jax.sharding import Mesh
      >>> mesh = Mesh(np.array(jax.devices()), ("data",))
      >>> place = Placement(mesh, "fsdp")
      >>> params = place.tree({"w": jnp.ones((3, 4 * mesh.size)), "b": jnp.ones(())})
      >>> tuple(params["w"].sharding.spec), tuple(params["b"].sharding.spec)
      ((None, 'data'), ())
    """

    def __init__(self, mesh: Mesh | None = None, sharding: Any = None):
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh such as jax.make_mesh((8,), "
                f"('data',)), got {mesh!r}"
            )
        if isinstance(sharding, str) and sharding not in NAMES:
            raise ValueError(
                f"sharding must be None, 'replicated', 'fsdp', a pytree of "
                f"PartitionSpec, or a function of (path, leaf), got {sharding!r}"
            )
        if mesh is None and sharding not in (None, "replicated"):
            mesh = _find_mesh(sharding)
        if mesh is None and jax.process_count() > 1:
            raise ValueError(
                "in several processes there has to be a mesh over all devices, such "
                "as mesh=jax.make_mesh((jax.device_count(),), ('data',))"
            )
        self.mesh, self.sharding = mesh, sharding
        # Of this thread; batches are put in another one.
        self._device = _default_device()
        if mesh is None:
            here = self._device or jax.local_devices()[0]
            self._whole = SingleDeviceSharding(here)
            return
        if jax.sharding.get_abstract_mesh().empty:
            # A model is not written for shardings that are part of types, unless
            # somebody says so with jax.set_mesh.
            kinds = (AxisType.Auto,) * len(mesh.axis_names)
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
        self.mesh = mesh
        self._whole = NamedSharding(mesh, P())
        self._split = NamedSharding(mesh, P(mesh.axis_names[0]))

    def __repr__(self) -> str:
        mesh = self.mesh and dict(self.mesh.shape)
        return f"Placement(mesh={mesh}, sharding={self.sharding!r})"

    @property
    def multiple(self) -> int:
        """What the size of a batch of this process is a multiple of, to be split."""
        if self.mesh is None:
            return 1
        here = {
            d for d in self.mesh.devices.flat if d.process_index == jax.process_index()
        }
        along_first = self.mesh.devices.reshape(self.mesh.devices.shape[0], -1)
        return max(1, sum(any(d in here for d in row) for row in along_first))

    def shardings(self, params: optax.Params) -> Any:
        """A pytree like `params` of the sharding of each leaf.

        Raises:
          ValueError: `sharding` does not fit to the params, with the path and the axis.
        """
        pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path) for path, _ in pairs]
        specs = self._specs(params, paths, [leaf for _, leaf in pairs])
        return treedef.unflatten(specs)

    def state_shardings(self, opt_state: Any, params: optax.Params) -> Any:
        """A pytree like `opt_state` of shardings.

        What has the path and the shape of a param is placed like it: moments, and the
        counts and quotas of ``units="element"``. All else is replicated: numbers, and
        the vectors of the schedule, which every device needs whole.

        Args:
          opt_state: the state, or its shapes by `jax.eval_shape`.
          params: the params it belongs to.
        """
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        shardings = jax.tree.leaves(self.shardings(params))
        known = {
            (_names(path), np.shape(leaf)): sharding
            for (path, leaf), sharding in zip(paths, shardings, strict=True)
        }

        def find(path, leaf):
            names, shape = _names(path), np.shape(leaf)
            ends = (names[i:] for i in range(len(names) + 1))
            found = (known[end, shape] for end in ends if (end, shape) in known)
            return next(found, self._whole)

        return jax.tree_util.tree_map_with_path(find, opt_state)

    def tree(self, params: optax.Params) -> Any:
        """A copy of `params` on the devices; may be donated without harm to the old."""
        return self._put(params, self.shardings(params))

    def replicate(self, tree: Any) -> Any:
        """A copy of `tree`, whole on each device."""
        return self._put(tree, jax.tree.map(lambda _: self._whole, tree))

    def init(self, tx: optax.GradientTransformation, params: optax.Params) -> Any:
        """`tx.init`, each part where `state_shardings` says, no memory shared.

        Args:
          tx: an optax transformation.
          params: as they came from `tree`.
        """
        if self.mesh is None:
            given = {id(p) for p in jax.tree.leaves(params)}
            copy = lambda x: jnp.copy(x) if id(x) in given else x
            # Python numbers would be other types for jit than what a step returns.
            return jax.tree.map(lambda x: jnp.asarray(copy(x)), tx.init(params))
        shardings = self.state_shardings(jax.eval_shape(tx.init, params), params)
        init = lambda params: jax.tree.map(jnp.copy, tx.init(params))
        return jax.jit(init, out_shardings=shardings)(params)

    def state(self, opt_state: Any, params: optax.Params) -> Any:
        """A copy of an optimizer state, each part where `state_shardings` says."""
        return self._put(opt_state, self.state_shardings(opt_state, params))

    def constrain(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The same transformation, with updates and state kept where they belong.

        Left alone, the compiler may place what a step returns in another way than what
        it was given. Then the next call is compiled anew, and rounds differently.
        """
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return tx
        extended = optax.with_extra_args_support(tx)

        def update(updates, state, params=None, **extra):
            updates, state = extended.update(updates, state, params, **extra)
            like = updates if params is None else params
            keep = jax.lax.with_sharding_constraint
            updates = keep(updates, self.shardings(like))
            return updates, keep(state, self.state_shardings(state, like))

        return optax.GradientTransformationExtraArgs(tx.init, update)

    def hold(self, tree: Any) -> Any:
        """Inside of a program: the same values, to be whole on each device."""
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._whole)

    @property
    def shares_threads(self) -> bool:
        """Whether the devices are parts of one CPU."""
        if self.mesh is None or self.mesh.size == 1:
            return False
        return self.mesh.devices.flat[0].platform == "cpu"

    def wait(self, step: Any) -> None:
        """Waits for a step where the devices are parts of one CPU.

        They share its threads, and steps queued behind one another can take all of them
        while they wait for each other. Other devices are not waited for.
        """
        if self.shares_threads:
            jax.block_until_ready(step)

    @property
    def on_host(self) -> bool:
        """Whether batches stay where they are, as the only device is the CPU."""
        default = self.mesh is None and self._device is None
        return default and jax.default_backend() == "cpu"

    def batch(self, batch: Any) -> Any:
        """A batch on the devices, split along the first axis of its leaves.

        Where the only device is the CPU, NumPy arrays: jitted functions take these as
        fast as any, and `jax.device_put` takes as long as ten calls of one.

        A batch whose size cannot be split evenly is put whole on each device, and so is
        a leaf whose first axis is not as long as `batch_size` says.

        Args:
          batch: a pytree of NumPy or JAX arrays; in several processes the part of the
            global batch that this one has.

        Raises:
          ValueError: in several processes, the size is no multiple of that of the
            devices here.
        """
        if self.on_host:
            return jax.tree.map(_own_on_host, batch)
        if self.mesh is None:
            return _own(batch, self._device)
        size = batch_size(batch)
        even = size % self.multiple == 0
        if not even and jax.process_count() > 1:
            raise ValueError(
                f"in several processes the batch of each has to be a multiple of "
                f"{self.multiple}, the number of its devices along "
                f"{self.mesh.axis_names[0]!r}, got {size} examples: use drop_last=True "
                f"or a loss per example, so that batches can be padded"
            )

        def put(x):
            if even and np.ndim(x) and x.shape[0] == size:
                if jax.process_count() == 1:
                    return _own(x, self._split)
                return jax.make_array_from_process_local_data(
                    self._split, _narrow(np.array(x))
                )
            return _global(x, self._whole)

        return jax.tree.map(put, batch)

    def local(self, outputs: Any) -> Any:
        """What belongs to the examples of this process: arrays like those of a batch.

        In one process that is all. In several all have to call this.
        """
        if jax.process_count() == 1:
            return outputs

        def part(x):
            rows = {s.index[0].start or 0: s.data for s in x.addressable_shards}
            return np.concatenate([np.asarray(rows[i]) for i in sorted(rows)])

        split = jax.jit(lambda x: x, out_shardings=self._split)(outputs)
        return jax.tree.map(part, split)

    def same(self, name: str, value: int) -> None:
        """Raises a ValueError unless all processes have the same value; waits for all.

        To be called where it does no harm to wait, before the first step, say.
        """
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        values = multihost_utils.process_allgather(np.int32(value)).ravel().tolist()
        if len(set(values)) > 1:
            other = next(i for i, x in enumerate(values) if x != values[0])
            raise ValueError(
                f"all processes must have the same {name}, got {values[0]} in process "
                f"0 and {values[other]} in process {other}"
            )

    def _put(self, tree: Any, shardings: Any) -> Any:
        if self.mesh is None:
            copy = lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x
            return _own(jax.tree.map(copy, tree), self._device)
        return jax.tree.map(_global, tree, shardings)

    def _specs(self, params: Any, paths: list[str], leaves: list) -> list:
        if self.mesh is None:
            return [self._whole] * len(leaves)
        if self.sharding is None or self.sharding == "replicated":
            return [self._whole] * len(leaves)
        if isinstance(self.sharding, str):  # "fsdp"
            specs = [_fsdp(np.shape(leaf), self.mesh) for leaf in leaves]
        elif callable(self.sharding):
            rule: Callable = self.sharding
            specs = [rule(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        else:
            specs = _broadcast(self.sharding, params)
        return [
            _check(path, np.shape(leaf), spec, self.mesh)
            for path, leaf, spec in zip(paths, leaves, specs, strict=True)
        ]


def batch_size(batch: Any) -> int:
    """The number of examples: the size that most leaves have as their first axis.

    Where as many have another size, that of the first of them; 1 if there are none.

    Examples:
      >>> import numpy as np
      >>> batch_size({"x": np.ones((3, 2)), "y": np.ones(3), "weights": np.ones(5)})
      3
    """
    sizes = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    return max(sizes, key=sizes.count, default=1)


def _default_device() -> Any:
    """The one that was set, by `jax.default_device` for example, or None."""
    device = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P | NamedSharding)


def _find_mesh(sharding: Any) -> Mesh:
    """That of the NamedShardings in a pytree."""
    leaves = jax.tree.leaves(sharding, is_leaf=_is_spec) if sharding else []
    found = [x.mesh for x in leaves if isinstance(x, NamedSharding)]
    if not found or not isinstance(found[0], Mesh):
        raise ValueError(
            f"sharding={sharding!r} needs a mesh: give one, such as "
            f"mesh=jax.make_mesh((jax.device_count(),), ('data',))"
        )
    return found[0]


def _fsdp(shape: Sequence[int], mesh: Mesh) -> P:
    axis = mesh.axis_names[0]
    even = [i for i, n in enumerate(shape) if n and n % mesh.shape[axis] == 0]
    if not even:
        return P()
    largest = max(even, key=lambda i: shape[i])  # the first of equals
    return P(*[axis if i == largest else None for i in range(largest + 1)])


def _broadcast(specs: Any, params: Any) -> list:
    """The specs of a prefix, one for each leaf of the params."""
    flat, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)
    try:
        parts = treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"sharding must have the structure of the params or a prefix of it: {error}"
        ) from None
    return [
        spec
        for spec, part in zip(flat, parts, strict=True)
        for _ in jax.tree.leaves(part)
    ]


def _check(path: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> NamedSharding:
    if not _is_spec(spec):
        raise TypeError(
            f"the sharding of params{path} must be a PartitionSpec or a NamedSharding, "
            f"got {spec!r}"
        )
    spec = P() if spec is None else getattr(spec, "spec", spec)
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding of params{path} of shape {shape} has {len(spec)} axes: "
            f"{spec}"
        )
    for i, names in enumerate(spec):
        if names is None or names is P.UNCONSTRAINED:
            continue
        names = names if isinstance(names, tuple) else (names,)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"the sharding of params{path} names the axis {name!r}, the mesh "
                    f"has {', '.join(map(repr, mesh.axis_names))}"
                )
        count = math.prod(mesh.shape[name] for name in names)
        if shape[i] % count:
            raise ValueError(
                f"axis {i} of params{path} of shape {shape} cannot be split over "
                f"{count} devices, as {spec} says"
            )
    return NamedSharding(mesh, spec)


def _names(path: tuple) -> tuple:
    """Of a path; flax variables add a `.value` that others lack."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    fields = "key", "idx", "name"
    return tuple(
        next((getattr(k, f) for f in fields if hasattr(k, f)), str(k)) for k in path
    )


def _own(x: Any, where: Any) -> Any:
    """On the devices, in memory that the loader does not use for its next batch.

    XLA may take the memory of a NumPy array as it is, also with ``may_alias=False``.
    """
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf if isinstance(leaf, jax.Array) else np.array(leaf), where
        ),
        x,
    )


def _own_on_host(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else _narrow(np.array(x))


def _narrow(x: np.ndarray) -> np.ndarray:
    """As JAX would do it: to 32 bits, unless 64 were asked for."""
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def _global(x: Any, sharding: Any) -> jax.Array:
    """A new array that all processes have a part of, from a value that all have."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _global(jax.random.key_data(x), _for_data(sharding, x.ndim))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(x)
    if jax.process_count() == 1:
        # With may_alias=False, too, memory may be shared: with what is on a device
        # already, and between devices where a NumPy array lies as XLA likes it.
        return jnp.copy(jax.device_put(x, sharding))
    value = _narrow(np.asarray(x))
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index].copy()
    )


def _for_data(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """Of the numbers behind keys, which have a further axis."""
    spec = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec) + 1)
    return NamedSharding(sharding.mesh, P(*spec))

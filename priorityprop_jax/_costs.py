"""What each leaf's weight gradient, and the chain down to it, costs.

The one idea: trace `jax.value_and_grad` once, for all leaves, and ask of every equation
which of the results need it. What the loss needs is the forward pass. Of the rest, an
equation runs if and only if a leaf that needs it is active, so equations with equal
sets of leaves make one piece of the chain, and the cost of any selection is a sum.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_count
from ._flops import flops_of, MOVES
from ._measured import measure_costs


# What may stand between the gradient of a weight and the product that makes it.
_FINISHING = MOVES | frozenset(
    "convert_element_type add_any pass psum psum2 psum_invariant reduce_scatter".split()
)
_PRODUCTS = frozenset(
    "dot_general ragged_dot_general conv_general_dilated scatter-add".split()
)


class BackwardCosts(NamedTuple):
    """What `backward_costs` found. Prints as a table, in the order of the leaves.

    The column `share` is what the backward pass costs if a leaf alone is trained, as a
    share of the cost of training all.

    Training the leaves in a set S costs `forward`, plus `weight` of each leaf in S,
    plus each piece of the chain that a leaf in S needs. For a plain net of layers l
    with forward FLOPs f_l this is the textbook's
    :math:`\\sum_l f_l + \\sum_{l > \\min S} f_l + \\sum_{l \\in S} f_l`.

    Attributes:
      paths: the leaves, as in ``params['Dense_0']['kernel']``.
      forward: cost of the forward pass.
      weight: (leaves,) cost of each leaf's own gradient: the product of activations
        and messages, and what follows it.
      groups: (groups,) cost of each piece of the chain.
      members: (groups, leaves) bool: a piece runs if and only if one of its members is
        active.
      traffic: (leaves,) bytes that the optimizer reads and writes for each leaf.
      unit: of all costs, ``"flops"`` or ``"ms"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import backward_costs
      >>> loss = lambda params, x: jnp.sum(x @ params["in"] @ params["out"])
      >>> params = {"in": jnp.ones((8, 4)), "out": jnp.ones((4, 2))}
      >>> print(backward_costs(loss, params, jnp.ones((16, 8))))
      leaf           weight FLOPs  chain FLOPs  traffic bytes  share
      params['in']          1,024          256            896  45.0%
      params['out']           256            0            224   9.0%
      forward 1,311 FLOPs, training all leaves 2,847 (2.17x)
    """

    paths: tuple[str, ...]
    forward: float
    weight: np.ndarray
    groups: np.ndarray
    members: np.ndarray
    traffic: np.ndarray
    unit: str = "flops"

    @property
    def chain(self) -> np.ndarray:
        """(leaves,) Cost of the chain from the loss down to each leaf.

        With `weight`, it is all the backward work if that leaf alone is trained.
        """
        return self.groups @ self.members

    @property
    def full(self) -> float:
        """Cost of the forward pass and the gradients of all leaves."""
        return self.flops(np.ones(len(self.paths), bool))

    def flops(self, active: Any) -> float:
        """Cost of the forward pass and the gradients of the active leaves.

        Args:
          active: (leaves,) bool, or a pytree of bools with one for each leaf.

        Returns:
          The cost, in `unit`: FLOPs, or milliseconds if that is what was measured.

        Raises:
          ValueError: there are more or fewer bools than leaves.
          TypeError: they are no bools.
        """
        parts = [np.ravel(leaf) for leaf in jax.tree.leaves(active)]
        mask = np.concatenate(parts) if parts else np.zeros(0, bool)
        if mask.dtype != bool:
            raise TypeError(f"active must hold bools, got {active!r}")
        if mask.size != len(self.paths):
            raise ValueError(
                f"active must hold a bool for each of the {len(self.paths)} leaves, "
                f"got {mask.size}"
            )
        runs = (self.members & mask).any(axis=1)
        return float(self.forward + self.weight[mask].sum() + self.groups[runs].sum())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python, ready for `json.dumps`."""
        out = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in self._asdict().items()
        }
        out["paths"] = list(self.paths)
        return {**out, "chain": self.chain.tolist(), "full": self.full}

    def __str__(self) -> str:
        unit = "FLOPs" if self.unit == "flops" else self.unit
        number = (lambda x: f"{x:,.0f}") if unit == "FLOPs" else (lambda x: f"{x:.3f}")
        head = ["leaf", f"weight {unit}", f"chain {unit}", "traffic bytes", "share"]
        full, chain = self.full, self.chain
        rows = [head]
        for i, path in enumerate(self.paths):
            costs = number(self.weight[i]), number(chain[i])
            share = (self.weight[i] + chain[i]) / max(full, 1e-30)
            rows.append([path, *costs, f"{self.traffic[i]:,.0f}", f"{share:.1%}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            padded = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
        ratio = full / max(self.forward, 1e-30)
        total = f"training all leaves {number(full)} ({ratio:.2f}x)"
        return "\n".join([*lines, f"forward {number(self.forward)} {unit}, {total}"])


def backward_costs(
    fun: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    has_aux: bool = False,
    state_per_param: float = 2,
    measure: int = 0,
    optimizer: optax.GradientTransformation | None = None,
    **kwargs: Any,
) -> BackwardCosts:
    """Finds what each leaf's gradient, and the chain of messages down to it, costs.

    `fun` is differentiated and traced, not executed. FLOPs follow XLA's own counting
    (`HloCostAnalysis`): ``2 m k n`` for a matmul, the positions inside the image for a
    convolution, one for each element of elementwise operations, integer ones included,
    none for moving data and for transcendental functions, of which XLA keeps a count of
    its own. `BackwardCosts.flops` thus predicts ``cost_analysis()["flops"]`` of a
    program that is compiled for just the active leaves, but for two things:

    * ``lax.scan`` counts all its iterations, where XLA counts one. ``lax.while_loop``,
      whose iterations nobody knows, counts one. ``lax.cond`` counts the branch that is
      dearest when all leaves are trained.
    * What a backend rewrites is not seen. XLA's fusions compute some elementwise
      operations twice: below 2 % where matmuls or convolutions dominate. XLA:CPU drops
      recomputations of ``jax.checkpoint`` that it finds equal to the first computation
      (they count here), and makes depthwise convolutions dense.

    Inside ``shard_map``, costs are those of one device. Opaque kernels (Pallas, foreign
    calls) count one FLOP for each element of their output.

    Args:
      fun: ``fun(params, *args, **kwargs)``, the scalar loss, or ``(loss, aux)``.
      params: pytree of floating arrays; ``jax.ShapeDtypeStruct`` will do.
      *args: further arguments of `fun`, likewise. What is no array reaches it as it is.
      has_aux: whether `fun` returns a pair. What `aux` needs is part of the forward
        pass.
      state_per_param: arrays of the parameter's shape and type in the optimizer's
        state, for `traffic`. The optimizer is taken to read the gradient, and to read
        and write the parameter and each such array, once: 7 arrays for Adam (2), 5
        with momentum (1), 3 for plain SGD (0).
      measure: if positive, run compiled programs on this device, each this many times,
        and return milliseconds: the forward pass, and the gradients of up to eight
        growing sets of leaves, from those at the loss to all. What a set adds to the
        one before it is spread over what is new in it, in proportion to FLOPs. The
        fastest of the interleaved runs counts. `params` and arguments must be arrays.
      optimizer: with `measure`, also time its update (and the addition to the params);
        this is added to `weight`, in proportion to `traffic`.
      **kwargs: further keyword arguments of `fun`.

    Returns:
      `BackwardCosts`: prints as a table. A leaf that never reaches the loss costs
      nothing.

    Raises:
      TypeError: a leaf of the params is not a floating array, or `fun` does not return
        a scalar (in jax's words).
      ValueError: an argument is out of bounds, or `measure` without arrays.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax import backward_costs
      >>> def loss(params, x):
      ...     for w in params:
      ...         x = x @ w
      ...     return jnp.sum(x)
      >>> layers = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4
      >>> costs = backward_costs(loss, layers, jnp.ones((32, 64)))
      >>> last = costs.flops([False, False, False, True])
      >>> print(f"training the last layer only: {last / costs.full:.0%} of all")
      training the last layer only: 45% of all
    """
    check_count("measure", measure, least=0)
    if state_per_param < 0:
        raise ValueError(f"state_per_param must be >= 0, got {state_per_param!r}")
    if optimizer is not None and not measure:
        raise ValueError("optimizer is only timed with measure=, a number of runs")
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(f"params{jax.tree_util.keystr(path)}" for path, _ in pairs)
    leaves = [leaf for _, leaf in pairs]
    for path, leaf in zip(paths, leaves, strict=True):
        _check_leaf(path, leaf)
    rest, rest_def = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in rest if _is_array(leaf)]

    def loss(leaves, arrays):
        left = iter(arrays)
        merged = [next(left) if _is_array(leaf) else leaf for leaf in rest]
        args, kwargs = jax.tree.unflatten(rest_def, merged)
        return fun(jax.tree.unflatten(treedef, leaves), *args, **kwargs)

    graph, needs = _trace(loss, leaves, arrays, has_aux)
    forward, weight, groups, members = _attribute(graph, needs, len(leaves))
    nbytes = [np.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in leaves]
    traffic = np.array(nbytes, float) * (3 + 2 * state_per_param)
    costs = BackwardCosts(paths, forward, weight, groups, members, traffic)
    if measure:
        return measure_costs(costs, loss, params, arrays, has_aux, measure, optimizer)
    return costs


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _check_leaf(path: str, leaf: Any) -> None:
    if isinstance(leaf, float | complex):
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        got = repr(leaf) if dtype is None else f"{dtype}{list(leaf.shape)}"
        raise TypeError(
            f"{path} must be a floating array, got {got}: what is not trained is a "
            "further argument of fun"
        )


class _Graph(NamedTuple):
    """All equations, those of inner jaxprs included. A node is made after its inputs.

    Only the carry of a loop also depends on a later node, its value after the body.
    """

    names: list[str]
    flops: list[float]
    inputs: list[list[int]]

    def add(self, name: str, flops: float, inputs: Sequence[int]) -> int:
        self.names.append(name)
        self.flops.append(flops)
        self.inputs.append(list(inputs))
        return len(self.names) - 1


def _trace(
    loss: Callable[..., Any], leaves: list, arrays: list, has_aux: bool
) -> tuple[_Graph, list[list[int]]]:
    """The graph of loss and gradients, and which of its nodes these are, loss first."""
    grad = jax.value_and_grad(loss, has_aux=has_aux, allow_int=False)
    # The leaf that needs a result is its position among the gradients.
    traced = jax.make_jaxpr(lambda leaves, arrays: grad(leaves, arrays)[::-1])
    jaxpr = traced(leaves, arrays).jaxpr
    graph = _Graph([], [], [])
    source = lambda _: graph.add("source", 0.0, [])
    outs = _inline(graph, jaxpr, list(map(source, jaxpr.invars)), 1)
    return graph, [outs[len(leaves) :], *([out] for out in outs[: len(leaves)])]


def _inline(graph: _Graph, jaxpr: Any, inputs: list[int], times: float) -> list[int]:
    """Adds all equations of `jaxpr`; returns the nodes of its outputs."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # it may be closed
    known = {var: graph.add("source", 0.0, []) for var in jaxpr.constvars}
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def node(atom):
        literal = isinstance(atom, jex.Literal)
        return graph.add("source", 0.0, []) if literal else known[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(graph, eqn, [node(atom) for atom in eqn.invars], times)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [node(atom) for atom in jaxpr.outvars]


def _apply(graph: _Graph, eqn: Any, inputs: list[int], times: float) -> list[int]:
    name = eqn.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](graph, eqn, inputs, times)
    arity = lambda call: (len(call.invars), len(call.outvars))
    for called in (getattr(value, "jaxpr", value) for value in eqn.params.values()):
        # Calls (jit, remat, custom_vjp, ...) have just the operands of what they call;
        # not so equations with kernels or combiners (pallas_call, scatter).
        if isinstance(called, jex.Jaxpr) and arity(called) == arity(eqn):
            return _inline(graph, called, inputs, times)
    made = graph.add(name, flops_of(eqn) * times, inputs)
    return [made] * len(eqn.outvars)


def _scan(graph: _Graph, eqn: Any, inputs: list[int], times: float) -> list[int]:
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        consts, n = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    else:
        consts, n = eqn.params["num_consts"], eqn.params["num_carry"]
    carry = [graph.add("pass", 0.0, [i]) for i in inputs[consts : consts + n]]
    body = [*inputs[:consts], *carry, *inputs[consts + n :]]
    times = times * eqn.params["length"]
    outs = _inline(graph, eqn.params["jaxpr"], body, times)
    for before, after in zip(carry, outs, strict=False):
        graph.inputs[before].append(after)
    return outs


def _while(graph: _Graph, eqn: Any, inputs: list[int], times: float) -> list[int]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, rest = inputs[:n_cond], inputs[n_cond:]
    carry = [graph.add("pass", 0.0, [i]) for i in rest[n_body:]]
    goes_on = _inline(graph, eqn.params["cond_jaxpr"], [*consts, *carry], times)
    outs = _inline(graph, eqn.params["body_jaxpr"], [*rest[:n_body], *carry], times)
    for before, after in zip(carry, outs, strict=True):
        graph.inputs[before].append(after)
    # There may be no iteration, and whether there is one must be known.
    pairs = zip(outs, rest[n_body:], strict=True)
    return [graph.add("pass", 0.0, [*pair, *goes_on]) for pair in pairs]


def _cond(graph: _Graph, eqn: Any, inputs: list[int], times: float) -> list[int]:
    spans, outs = [], []
    for branch in eqn.params["branches"]:
        first = len(graph.names)
        outs.append(_inline(graph, branch, inputs[1:], times))
        spans.append(range(first, len(graph.names)))
    dearest = max(spans, key=lambda span: sum(graph.flops[i] for i in span))
    for i in (i for span in spans if span is not dearest for i in span):
        graph.flops[i] = 0.0
    same = zip(*outs, strict=True)
    return [graph.add("pass", 0.0, [inputs[0], *nodes]) for nodes in same]


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}


def _needed_by(graph: _Graph, needs: list[list[int]]) -> list[int]:
    """Which results need each node, as bits: 1 for the loss, 2 for the first leaf."""
    needed = [0] * len(graph.names)
    for bit, nodes in enumerate(needs):
        for i in nodes:
            needed[i] |= 1 << bit
    changed = True
    while changed:  # again only for loops
        changed = False
        for i in range(len(needed) - 1, -1, -1):
            for j in graph.inputs[i]:
                if needed[i] & ~needed[j]:
                    needed[j] |= needed[i]
                    changed = changed or j >= i
    return needed


def _attribute(
    graph: _Graph, needs: list[list[int]], n: int
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The forward pass, the leaves' own gradients, and the pieces of the chain."""
    needed = _needed_by(graph, needs)
    own = [_own_gradient(graph, needed, bit, needs[bit]) for bit in range(1, n + 1)]
    weight = np.array([sum(graph.flops[i] for i in nodes) for nodes in own], float)
    done = set().union(*own)
    forward, pieces = 0.0, {}
    for i, bits in enumerate(needed):
        if bits & 1:
            forward += graph.flops[i]
        elif bits and graph.flops[i] and i not in done:
            pieces[bits >> 1] = pieces.get(bits >> 1, 0.0) + graph.flops[i]
    members = [[bool(bits >> i & 1) for i in range(n)] for bits in pieces]
    groups = np.array(list(pieces.values()), float)
    return forward, weight, groups, np.array(members, bool).reshape(len(pieces), n)


def _own_gradient(graph: _Graph, needed: list[int], bit: int, ends: list[int]) -> set:
    """The last steps to a leaf's gradient: the product and what follows it.

    Only what no other result needs. Further up it is the chain, even where this leaf is
    the lowest and no other needs that piece.
    """
    found, ahead = set(), [(end, False) for end in ends]
    while ahead:
        i, summed = ahead.pop()
        if i in found or needed[i] != 1 << bit:
            continue
        name = graph.names[i]
        if name in _FINISHING or name == "reduce_sum":
            found.add(i)
            sums = summed or name == "reduce_sum"
            ahead += [(j, sums) for j in graph.inputs[i]]
        # A sum of products is a scale's gradient; of a matmul's output, a bias's.
        elif name == "mul" or (name in _PRODUCTS and not summed):
            found.add(i)
    return found

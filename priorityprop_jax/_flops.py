"""How many FLOPs an equation of a jaxpr has, as XLA counts them.

The rules are those of `xla::HloCostAnalysis`, and for what XLA:CPU expands into other
operations (random bits, pooling's gradient, sorting), what it expands them to.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


# XLA has a count of its own for these ("transcendentals"), apart from FLOPs.
_TRANSCENDENTAL = frozenset(
    "exp exp2 log log1p expm1 tanh sin cos tan sqrt rsqrt cbrt pow erf atan2".split()
)
# Moving, naming or making values without arithmetic.
MOVES = frozenset(
    "reshape squeeze expand_dims broadcast_in_dim transpose slice dynamic_slice gather"
    " concatenate split pad iota rev copy copy_p dynamic_update_slice scatter real imag"
    " bitcast_convert_type device_put sharding_constraint optimization_barrier name"
    " random_wrap random_unwrap random_seed stop_gradient pvary pbroadcast all_gather"
    " ppermute all_to_all layout_constraint reshard mesh_cast empty".split()
)
# FLOPs per element of the output; all others have one.
_PER_ELEMENT = {
    **dict.fromkeys(_TRANSCENDENTAL | MOVES, 0.0),
    "logistic": 3.0,
    "erf_inv": 37.0,
    # Threefry: integer operations for each word of 32 bits.
    **dict.fromkeys(("random_bits", "random_split", "random_fold_in"), 47.0),
    "threefry2x32": 94.0,  # two words
}


def flops_of(eqn: Any) -> float:
    """FLOPs of one equation of a jaxpr, of whose inner jaxprs nothing is known.

    Args:
      eqn: a `jax.extend.core.JaxprEqn`.

    Returns:
      The number that XLA's cost analysis has for it, on CPU where backends differ.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax._flops import flops_of
      >>> jaxpr = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr
      >>> flops_of(jaxpr.eqns[0])
      48.0
    """
    name = eqn.primitive.name
    for start, count in _COUNTS.items():
        if name.startswith(start):
            return float(count(eqn))
    return _PER_ELEMENT.get(name, 1.0) * _size(eqn.outvars[0]) if eqn.outvars else 0.0


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _convert(eqn: Any) -> float:
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return _size(eqn.outvars[0]) * (before != after)


def _round(eqn: Any) -> float:
    kept, full = eqn.params, jnp.finfo(eqn.invars[0].aval.dtype)
    rounds = kept["exponent_bits"] < full.nexp or kept["mantissa_bits"] < full.nmant
    return _size(eqn.outvars[0]) * rounds


def _power(eqn: Any) -> float:
    exponent = abs(eqn.params["y"])
    squarings, products = exponent.bit_length() - 1, exponent.bit_count() - 1
    inverse = eqn.params["y"] < 0
    return _size(eqn.outvars[0]) * max(squarings + products + inverse, 0)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(shape[i] for i in contracted)


def _ragged_dot(eqn: Any) -> float:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    bound = {*contracted, *batch, *numbers.rhs_group_dimensions}
    shape = eqn.invars[1].aval.shape
    free = math.prod(n for i, n in enumerate(shape) if i not in bound)
    return 2 * _size(eqn.invars[0]) * free  # each row meets one of the groups


def _convolution(eqn: Any) -> float:
    """Products of the kernel with the image, not with padding or with holes."""
    p, out = eqn.params, eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    image, kernel = (var.aval.shape for var in eqn.invars)
    products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    products *= kernel[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(p["padding"]):
        size, holes = image[numbers.lhs_spec[2 + i]], p["lhs_dilation"][i]
        at = np.arange(out[numbers.out_spec[2 + i]])[:, None] * p["window_strides"][i]
        at = at + np.arange(kernel[numbers.rhs_spec[2 + i]]) * p["rhs_dilation"][i]
        inside = (at - low >= 0) & (at - low <= (size - 1) * holes)
        products *= int((inside & ((at - low) % holes == 0)).sum())
    return 2 * products


def _windows(eqn: Any) -> float:
    window = math.prod(eqn.params["window_dimensions"])
    return (window - 1) * _size(eqn.outvars[0])


def _unpool(eqn: Any) -> float:
    # Which element of a window was selected takes comparisons of values and places.
    window = eqn.params["window_dimensions"]
    return ((7 + len(window)) * (math.prod(window) - 1) + 1) * _size(eqn.invars[0])


def _cumulate(eqn: Any) -> float:
    return _size(eqn.outvars[0]) * (eqn.outvars[0].aval.shape[eqn.params["axis"]] - 1)


def _sort(eqn: Any) -> float:
    size = _size(eqn.outvars[0])
    return size * math.ceil(math.log2(max(size, 1)))


_fewer = lambda eqn: _size(eqn.invars[0]) - _size(eqn.outvars[0])

# By how the name starts; the first that fits.
_COUNTS: dict[str, Callable[[Any], float]] = {
    "convert_element_type": _convert,
    "integer_pow": _power,
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scatter-": lambda eqn: _size(eqn.invars[2]),
    "scatter_": lambda eqn: _size(eqn.invars[2]),
    "reduce_window": _windows,
    "select_and_scatter_add": _unpool,
    "reduce_precision": _round,
    "reduce_": _fewer,
    "arg": lambda eqn: 9 * _fewer(eqn),
    "cum": _cumulate,
    "sort": _sort,
}

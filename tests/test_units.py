"""From trees to units and back, and the depth that names tell."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import unit_axes
from priorityprop_jax._units import (
    check_layout,
    join,
    layout,
    match_tree,
    module_depths,
    per_leaf,
    split,
    unstack_together,
)
from references_cycle import units_of


PARAMS = {
    "embed": np.arange(15.0, dtype=np.float32).reshape(5, 3),
    "out": {"bias": np.ones(2, np.float32), "kernel": np.ones((3, 2), np.float32)},
}


@pytest.mark.parametrize(
    ("units", "counts"),
    [
        ("leaf", [1, 1, 1]),
        ("element", [15, 2, 6]),
        ((), [1, 1, 1]),
        ({"embed": (0,), "out": ()}, [5, 1, 1]),
        ({"embed": (0, 1), "out": {"bias": (0,), "kernel": (-1,)}}, [15, 2, 2]),
        ({"embed": (1, 0), "out": (0,)}, [15, 2, 3]),
    ],
)
def test_how_many_units(units, counts):
    where = layout(PARAMS, units)
    assert np.diff(where.offsets).tolist() == counts
    assert where.size == sum(counts)
    assert where.paths == (
        "params['embed']",
        "params['out']['bias']",
        "params['out']['kernel']",
    )


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 2), (2, 0), (0, 1, 2)])
def test_order_of_units_is_row_major(axes):
    """Each unit is written with its own number, then looked up in the leaf."""
    leaf = np.zeros((2, 3, 4), np.float32)
    params = [leaf, np.zeros(2, np.float32)]
    where = layout(params, [axes, ()])
    numbers = jnp.arange(where.size, dtype=jnp.float32)
    parts = split(where, numbers)
    spread = np.broadcast_to(parts[0], leaf.shape)
    for number, unit in enumerate(units_of(spread, tuple(sorted(axes)))):
        assert (unit == number).all()
    assert parts[1].shape == ()
    np.testing.assert_array_equal(join(parts), numbers)


def test_one_value_for_each_unit_of_a_leaf():
    where = layout(PARAMS, {"embed": (0,), "out": {"bias": (), "kernel": (0,)}})
    got = per_leaf(where, jnp.array([7.0, 8.0, 9.0]))
    np.testing.assert_array_equal(got, [7.0] * 5 + [8.0] + [9.0] * 3)


def test_absent_leaves_are_no_units():
    params = {"a": None, "b": np.ones(3), "c": optax.MaskedNode(), "d": np.ones(2)}
    assert layout(params, "leaf").size == 2
    assert layout(params, "element").size == 5
    # Axes given for what is absent do no harm.
    where = layout(params, {"a": (0,), "b": (0,), "c": (0,), "d": ()})
    assert np.diff(where.offsets).tolist() == [3, 1]


@pytest.mark.parametrize("params", [{}, (), [], None, {"a": None}])
@pytest.mark.parametrize("units", ["leaf", "element", {"a": (0,)}])
def test_nothing_to_count(params, units):
    assert layout(params, units).size == 0


@pytest.mark.parametrize("params", [np.float32(1), np.ones(3), {0: np.ones(2)}])
def test_one_leaf(params):
    assert layout(params, "leaf").size == 1
    assert layout(params, ()).size == 1
    assert layout(params, "element").size == math.prod(
        np.shape(jax.tree.leaves(params)[0])
    )


def test_scalars_and_zero_size():
    params = [np.float32(1), np.ones((0, 3)), np.ones((2, 0))]
    assert layout(params, "leaf").size == 3
    assert layout(params, "element").size == 1
    assert layout(params, [(), (1,), (0,)]).size == 1 + 3 + 2


def test_shapes_suffice():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert layout(shapes, "element") == layout(PARAMS, "element")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_leaves_without_a_gradient(dtype):
    with pytest.raises(
        TypeError, match=rf"\['out'\]\['step'\] has dtype {dtype}.*mask"
    ):
        layout({"a": np.ones(2), "out": {"step": np.ones(2, dtype)}}, "leaf")


def test_float0():
    g = jax.grad(lambda p: 2.0 * p["a"], allow_int=True)({"a": 1.0, "n": 3})
    with pytest.raises(TypeError, match=r"\['n'\] has dtype float0"):
        layout(g, "leaf")


def test_rule_sees_path_and_leaf():
    seen = {}

    def rule(path, leaf):
        seen[path] = leaf.shape
        return range(leaf.ndim - 1)

    assert unit_axes(PARAMS, rule) == {
        "embed": (0,),
        "out": {"bias": (), "kernel": (0,)},
    }
    assert seen == {
        "['embed']": (5, 3),
        "['out']['bias']": (2,),
        "['out']['kernel']": (3, 2),
    }


def test_rule_gives_back_what_layout_takes():
    units = unit_axes(PARAMS, lambda path, leaf: (-1,))
    assert np.diff(layout(PARAMS, units).offsets).tolist() == [3, 2, 2]


@pytest.mark.parametrize("axes", [(2,), (-3,), (0, 0), (0, -2)])
def test_axes_out_of_range(axes):
    match = r"\['embed'\], shape \(5, 3\), must be different axes in \[-2, 2\)"
    with pytest.raises(ValueError, match=match):
        unit_axes(PARAMS, lambda path, leaf: axes if "embed" in path else ())
    with pytest.raises(ValueError, match=match):
        layout(PARAMS, {"embed": axes, "out": ()})


@pytest.mark.parametrize("axes", [1, None, "rows", (0.5, "x")])
def test_axes_of_the_wrong_type(axes):
    with pytest.raises(TypeError, match=r"\['embed'\] must be a tuple of ints"):
        unit_axes(PARAMS, lambda path, leaf: axes)


def test_units_of_another_structure():
    with pytest.raises(
        ValueError, match=r"units has no entry for .*\['out'\]\['bias'\]"
    ):
        layout(PARAMS, {"embed": (0,), "out": {"kernel": ()}})
    with pytest.raises(ValueError, match=r"units has an entry at \['typo'\]"):
        layout(PARAMS, {"embed": (0,), "out": (), "typo": (0,)})


def test_match_tree_orders_leaves_as_the_params():
    assert match_tree(
        "depths", {"out": {"kernel": 1, "bias": 2}, "embed": 3}, PARAMS
    ) == [
        3,
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"embed": 1, "out": {"kernel": 1}}, r"no entry for params\['out'\]\['bias'\]"),
        ({"embed": 1, "out": 1}, r"no entry for params\['out'\]\['bias'\]"),
        (
            {"embed": 1, "out": {"bias": 1, "gain": 2, "kernel": 1}},
            r"entry at \['out'\]\['gain'\]",
        ),
        ([1, 2, 3], r"no entry for params\['embed'\]"),
    ],
)
def test_the_first_path_that_differs(tree, match):
    with pytest.raises(ValueError, match=r"depths must have the structure.*" + match):
        match_tree("depths", tree, PARAMS)


def test_updates_must_be_those_of_the_state():
    where = layout(PARAMS, "element")
    check_layout(where, 3, [(5, 3), (2,), (3, 2)])
    with pytest.raises(ValueError, match="3 leaves .*but the state was .* for 2"):
        check_layout(where, 2, [(5, 3), (2,)])
    with pytest.raises(
        ValueError, match=r"\['out'\]\['bias'\] has shape \(2,\).*\(4,\)"
    ):
        check_layout(where, 3, [(5, 3), (4,), (3, 2)])
    with pytest.raises(ValueError, match="3 units"):
        check_layout(layout(PARAMS, "leaf"), 3, [(4,)])


def depths(params):
    return module_depths(layout(params, "leaf")).tolist()


def module(*names):
    return {name: np.ones(1) for name in names}


def test_leaves_of_a_module_share_a_depth_and_names_sort_naturally():
    params = {f"Dense_{i}": module("bias", "kernel") for i in (0, 1, 10, 2)}
    # jax's order: Dense_0, Dense_1, Dense_10, Dense_2.
    assert depths(params) == [3, 3, 2, 2, 0, 0, 1, 1]


def test_lists_by_index():
    assert depths([module("w") for _ in range(12)]) == list(range(11, -1, -1))
    assert depths([np.ones(1) for _ in range(12)]) == list(range(11, -1, -1))


def test_int_keys_are_numbers():
    params = {i: module("w") for i in (10, 9, 100)}
    assert depths(params) == [2, 1, 0]  # 9, 10, 100


def test_nested_modules():
    block = lambda: {"attn": module("k", "q"), "mlp": module("w")}
    params = {"Block_10": block(), "Block_9": block(), "Embed": module("e")}
    # Block_9 attn, mlp; Block_10 attn, mlp; Embed
    assert depths(params) == [2, 2, 1, 4, 4, 3, 0]


def test_tuples_and_attributes():
    Layer = collections.namedtuple("Layer", ["kernel", "bias"])
    params = (Layer(np.ones(1), np.ones(1)), Layer(np.ones(1), np.ones(1)))
    assert depths(params) == [1, 1, 0, 0]


@pytest.mark.parametrize(("params", "expected"), [({}, []), (np.ones(2), [0])])
def test_without_modules(params, expected):
    assert depths(params) == expected


def test_flat_dicts_are_one_module():
    assert depths(module("a", "b")) == [0, 0]


def test_nnx_state_has_the_depths_of_its_plain_arrays():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(*[nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(11)])
    state = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(state)
    assert depths(state) == depths(plain) == sorted(depths(plain), reverse=True)
    assert max(depths(state)) == 10
    assert layout(state, "leaf").keys == layout(plain, "leaf").keys


@pytest.mark.parametrize("n", [3, 16, 17, 70, 300])
def test_entries_of_several_vectors(n):
    """Whatever the dtype, to the bit; also more of them than one reduction takes."""
    spread = np.linspace(-1e30, 1e30, n).astype(np.float32)
    spread[:3] = [np.inf, -np.inf, np.nan]
    vectors = [
        jnp.asarray(spread),
        jnp.asarray(spread).astype(jnp.bfloat16),
        jnp.arange(n) % 3 == 0,
        jnp.asarray(np.linspace(-(2**31), 2**31 - 1, n).astype(np.int32)),
        jnp.arange(n, dtype=jnp.uint32) + jnp.uint32(2**32 - n),
        jax.random.split(jax.random.key(0), n),
        jnp.arange(2 * n).reshape(n, 2),
    ]
    rows = jax.jit(unstack_together)(vectors)
    assert len(rows) == n
    for i, row in enumerate(rows):
        for entry, x in zip(row, vectors, strict=True):
            assert entry.dtype == x.dtype and entry.shape == x.shape[1:]
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                entry, x = jax.random.key_data(entry), jax.random.key_data(x)
            if x.dtype == jnp.bfloat16:  # NumPy does not know its NaN
                entry, x = entry.astype(jnp.float32), x.astype(jnp.float32)
            np.testing.assert_array_equal(entry, x[i])


def test_entries_can_be_differentiated():
    slope = jax.grad(
        lambda x: sum((i + 1) * e for i, (e,) in enumerate(unstack_together([x])))
    )
    np.testing.assert_array_equal(slope(jnp.ones(4)), [1, 2, 3, 4])

"""Which rows a batch touches; taking them out of a table and putting them back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from priorityprop_jax._rows import put_rows, take_rows, touched_rows


pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = 12
TABLE = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)


@st.composite
def batches(draw):
    """(ids, capacity): in range or not, repeated or not, too many or not."""
    n = draw(st.sampled_from([0, 1, 5, 12]))  # few shapes, as each is compiled
    ids = draw(st.lists(st.integers(-ROWS - 3, ROWS + 3), min_size=n, max_size=n))
    return ids, draw(st.sampled_from([None, 1, 4, 15]))


@functools.partial(jax.jit, static_argnums=1)
def run(ids, capacity):
    rows = touched_rows(ids, ROWS, capacity)
    block = take_rows(jnp.asarray(TABLE), rows)
    put = put_rows(jnp.asarray(TABLE), rows, block + 1)
    return rows, block, block[rows.inverse], put


def reads(ids, capacity):
    """What each id should read: its row, or None if it finds no place."""
    rows = [i % ROWS if -ROWS <= i < ROWS else None for i in ids]
    distinct = sorted({r for r in rows if r is not None})
    capacity = max(len(ids), 1) if capacity is None else capacity
    if None in rows or len(distinct) > capacity:
        distinct = distinct[: capacity - 1]
    return [r if r in distinct else None for r in rows]


@settings(max_examples=100, deadline=None)
@given(batches())
def test_reads_what_the_table_reads_or_nan(batch):
    ids, capacity = batch
    rows, block, got, put = run(jnp.array(ids, jnp.int32), capacity)
    expected = reads(ids, capacity)
    index, n = np.asarray(rows.index), rows.index.size
    assert n == (max(len(ids), 1) if capacity is None else capacity)
    assert (np.diff(index.astype(np.int64)) > 0).all()  # as the scatters are promised
    found = sorted({r for r in expected if r is not None})
    assert index[: len(found)].tolist() == found
    assert (index[len(found) :] >= 2**31 - 1 - n).all()
    assert rows.missed == expected.count(None)
    assert rows.distinct == len({i % ROWS for i in ids if -ROWS <= i < ROWS})
    for vector, row in zip(got, expected, strict=True):
        want = np.full(3, np.nan) if row is None else TABLE[row]
        np.testing.assert_array_equal(vector, want)
    if None not in expected:  # a sum over the block is not spoilt
        assert np.isfinite(block).all()
    want = TABLE.copy()
    want[found] += 1
    np.testing.assert_array_equal(put, want)


def test_gradients_are_summed_as_for_the_dense_table():
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(-ROWS, ROWS, size=(40, 5)))  # each row many times
    weights = jnp.asarray(rng.normal(size=(40, 5, 3)), jnp.float32)
    loss = lambda table, ids: jnp.sum(jnp.sin(table[ids]) * weights)
    dense = jax.jit(jax.grad(loss))(jnp.asarray(TABLE), ids)
    rows = touched_rows(ids, ROWS)
    block = take_rows(jnp.asarray(TABLE), rows)
    grads = jax.jit(jax.grad(loss))(block, rows.inverse)
    sparse = put_rows(jnp.zeros_like(dense), rows, grads)
    np.testing.assert_array_equal(sparse, dense)


def test_an_id_without_a_place_has_no_gradient():
    ids = jnp.array([1, ROWS, 3, -ROWS - 1])
    rows = touched_rows(ids, ROWS)
    block = take_rows(jnp.asarray(TABLE), rows)

    def loss(block):
        read = block[rows.inverse]
        return jnp.sum(jnp.where(jnp.isnan(read), 0.0, 2.0 * read))

    grads = jax.grad(loss)(block)
    put = put_rows(jnp.zeros((ROWS, 3)), rows, grads)
    assert np.flatnonzero(np.any(put != 0, axis=1)).tolist() == [1, 3]
    assert (put[jnp.array([1, 3])] == 2.0).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_integers_of_all_sizes(dtype):
    ids = np.array([3, 100, 3], dtype)
    rows = touched_rows(ids, num_rows=70_000)  # more than some of them can count to
    assert rows.index[:2].tolist() == [3, 100] and rows.missed == 0
    most = np.array([np.iinfo(dtype).max], dtype)
    fits = int(most[0]) < 70_000
    assert touched_rows(most, num_rows=70_000).missed == (not fits)
    if np.iinfo(dtype).min < 0:
        assert touched_rows(np.array([-2], dtype), 70_000).index[0] == 69_998


def test_64_bit_ids_do_not_wrap_around(x64):
    if not x64:
        pytest.skip("there are none")
    ids = jnp.array([2**32 + 1, 5, -(2**40)], jnp.int64)
    rows = touched_rows(ids, num_rows=10)
    assert (int(rows.missed), int(rows.distinct), int(rows.index[0])) == (2, 1, 5)
    assert rows.index.dtype == rows.inverse.dtype == rows.missed.dtype == jnp.int32


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (4,), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    tables = {
        "vector": jnp.arange(ROWS, dtype=dtype),
        "cube": jnp.arange(ROWS * 4, dtype=dtype).reshape(ROWS, 2, 2),
    }
    ids = jnp.asarray(np.random.default_rng(2).integers(0, ROWS, shape))
    rows = touched_rows(ids, ROWS)
    assert rows.inverse.shape == shape
    block = take_rows(tables, rows)
    for name, table in tables.items():
        read = block[name][rows.inverse]
        assert block[name].dtype == dtype
        np.testing.assert_array_equal(read, table[ids])
    put = put_rows(tables, rows, jax.tree.map(lambda x: -x, block))
    for name, table in tables.items():
        sign = np.ones(ROWS)
        sign[np.ravel(ids)] = -1
        want = np.asarray(table, np.float32) * sign.reshape(
            (-1,) + (1,) * (table.ndim - 1)
        )
        np.testing.assert_array_equal(put[name].astype(jnp.float32), want)


def test_an_empty_list_of_ids():
    rows = touched_rows([], num_rows=4)  # NumPy calls it float
    assert rows.inverse.shape == (0,) and rows.distinct == rows.missed == 0
    table = jnp.ones((4, 2))
    put = put_rows(table, rows, take_rows(table, rows) + 1)
    np.testing.assert_array_equal(put, table)


def test_each_table_has_its_own_rows():
    tables = {"a": jnp.arange(5.0), "b": jnp.arange(9.0) * 10}
    rows = {
        "a": touched_rows(jnp.array([4, 1]), 5),
        "b": touched_rows(jnp.array([8, 8, 2]), 9),
    }
    block = take_rows(tables, rows)
    assert block["a"].tolist() == [1.0, 4.0]
    assert block["b"].tolist() == [20.0, 80.0, 0.0]
    put = put_rows(tables, rows, jax.tree.map(jnp.zeros_like, block))
    assert put["a"].tolist() == [0.0, 0.0, 2.0, 3.0, 0.0]
    assert np.flatnonzero(put["b"]).tolist() == [1, 3, 4, 5, 6, 7]


def test_compiled_once_and_under_vmap():
    traces = []

    @jax.jit
    def read(ids):
        traces.append(1)
        rows = touched_rows(ids, ROWS, capacity=4)
        return take_rows(jnp.asarray(TABLE), rows)[rows.inverse]

    batches = jnp.array([[1, 5, 1], [0, 0, 0], [2, -1, 11]])
    one_by_one = [read(ids) for ids in batches]
    assert len(traces) == 1
    np.testing.assert_array_equal(jax.vmap(read)(batches), jnp.stack(one_by_one))
    np.testing.assert_array_equal(one_by_one, TABLE[np.asarray(batches)])


GOOD = touched_rows(jnp.array([1, 2]), ROWS)
ERRORS = {
    "ids must be integers, got dtype float32": lambda: touched_rows(jnp.ones(2), 3),
    r"num_rows must be in \[1, .*got 0": lambda: touched_rows(jnp.array([0]), 0),
    "num_rows must be an integer, got 2.0": lambda: touched_rows(jnp.array([0]), 2.0),
    r"capacity must be in \[1, .*got 0": lambda: touched_rows(jnp.array([0]), 3, 0),
    "capacity decides shapes and must be a Python int": lambda: jax.jit(
        lambda n: touched_rows(jnp.array([0]), 3, n)
    )(2),
    r"params\['a'\] has shape \(\), but a table needs rows": lambda: take_rows(
        {"a": jnp.ones(())}, GOOD
    ),
    r"params\['a'\] has dtype int32, which has no gradient": lambda: take_rows(
        {"a": jnp.arange(ROWS)}, GOOD
    ),
    r"rows must be what touched_rows\(ids, num_rows\) returns": lambda: take_rows(
        TABLE, jnp.array([1, 2])
    ),
    "there are 1 tables, but 2 rows": lambda: take_rows(TABLE, [GOOD, GOOD]),
    "there are 1 tables, but 0 rows": lambda: take_rows(TABLE, None),
    r"block must have shape \(2, 3\) and dtype float32 at params, got": lambda: (
        put_rows(TABLE, GOOD, TABLE)
    ),
    "got shape .2, 3. and dtype bfloat16": lambda: put_rows(
        TABLE, GOOD, jnp.ones((2, 3), jnp.bfloat16)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message]()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax._slices import CAPTURED, MET, NOTHING, SHARED, trace


def example(captured):
    def function(inputs):
        a, b, count = inputs
        factor = 1.0 - 0.9**count
        return [
            captured * a / factor,
            jnp.sin(b) + jnp.ones(3),
            count + 1,
            jnp.zeros(3),
            a @ b,
        ]

    inputs = [jnp.arange(3.0), jnp.ones(3), jnp.float32(2)]
    return function, inputs, trace(function, inputs, [0, 1, SHARED])


def test_values_are_grouped_by_what_they_depend_on():
    _, _, program = example(jnp.arange(1.0, 4.0))
    found = [program.group(v) for v in program.jaxpr.outvars]
    assert found == [0, 1, SHARED, NOTHING, MET]
    assert {program.groups[v] for v in program.captured} <= {CAPTURED}


@pytest.mark.parametrize("output", [0, 1, 2, 3, 4])
def test_a_slice_computes_what_the_function_does(output):
    captured = jnp.arange(1.0, 4.0)
    function, inputs, program = example(captured)
    expected = function(inputs)[output]
    part = program.cut([program.jaxpr.outvars[output]], known=NOTHING)
    values = dict(zip(program.jaxpr.invars, inputs, strict=True)) | program.captured
    np.testing.assert_allclose(part(values)[0], expected, rtol=1e-6)


def test_a_slice_takes_only_what_it_needs():
    _, _, program = example(jnp.arange(1.0, 4.0))
    a, b, count = program.jaxpr.invars
    outs = program.jaxpr.outvars
    assert program.cut([outs[1]], known=NOTHING).inputs == [b]
    assert program.cut([outs[2]], known=NOTHING).inputs == [count]
    # What is shared is known: the factor comes in, and its equations stay out.
    part = program.cut([outs[0]], known=SHARED)
    assert a in part.inputs and count not in part.inputs
    assert all(e.primitive.name in ("mul", "div") for e in part.equations)
    assert program.cut([outs[0]], known=NOTHING, stop=[outs[0]]).equations == []


def test_a_function_with_side_effects_is_left_alone():
    def shout(inputs):
        jax.debug.print("{}", inputs[0])
        return inputs

    assert trace(shout, [jnp.ones(3)], [0]) is None


def test_equations_of_a_jitted_function_are_told_apart():
    @jax.jit
    def scaled(a, b, count):
        return a / (1.0 - 0.9**count), jnp.sin(b) / count

    def function(inputs):
        a, b = scaled(*inputs)
        return [*scaled(a, b, inputs[2] + 1), a * 2]

    inputs = [jnp.arange(3.0), jnp.ones(3), jnp.float32(2)]
    program = trace(function, inputs, [0, 1, SHARED])
    outs = program.jaxpr.outvars
    assert [program.group(v) for v in outs] == [0, 1, 0]
    values = dict(zip(program.jaxpr.invars, inputs, strict=True))
    for out, expected in zip(outs, function(inputs), strict=True):
        found = program.cut([out], known=NOTHING)(values)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_division_by_a_shared_number_is_a_product_with_its_inverse():
    function, inputs, program = example(jnp.arange(1.0, 4.0))
    divided = [e for e in program.jaxpr.eqns if e.primitive.name == "div"]
    assert [e.outvars[0].aval.shape for e in divided] == [()]
    out = program.jaxpr.outvars[0]
    part = program.cut([out], known=SHARED)
    assert divided[0].outvars[0] in part.inputs


def test_divisions_by_other_numbers_stay():
    def function(inputs):
        a, scale, count = inputs
        return [a / scale, a / count, a / 3.0, a / a, count / 3]

    inputs = [jnp.arange(1.0, 4.0), jnp.float32(2), jnp.float32(3)]
    program = trace(function, inputs, [0, 0, SHARED])
    names = [e.primitive.name for e in program.jaxpr.eqns]
    assert names.count("mul") == 1
    values = dict(zip(program.jaxpr.invars, inputs, strict=True))
    found = program.cut(program.jaxpr.outvars, known=NOTHING)(values)
    for x, y in zip(found, function(inputs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)

"""Eight devices on any machine, and no silent broadcasting; nothing else is global."""

import jax
import pytest


jax.config.update("jax_num_cpu_devices", 8)  # child processes do not inherit it
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def quick_compilation():
    """Leaves out most of XLA's optimizations: up to half of the time to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    """Runs the test without and with 64-bit types."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", before)

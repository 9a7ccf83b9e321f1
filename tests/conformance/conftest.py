"""Programs here run for a few steps of a few numbers: what takes time is to compile."""

import jax
import pytest

import helpers
from priorityprop_jax import _priority


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Leaves out most of XLA's optimizations: a quarter of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def allocation(request, monkeypatch):
    """Puts a stand-in in the place of the exact allocation, unless the test is slow."""
    if request.node.get_closest_marker("slow"):
        return "exact"
    monkeypatch.setattr(_priority, "allocate_vector", helpers.quick_vector)
    monkeypatch.setattr(_priority, "allocate_leaves", helpers.quick_leaves)
    return "quick"

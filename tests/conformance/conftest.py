"""Programs here run for a few steps of a few numbers: what takes time is to compile."""

import pytest

import helpers
from priorityprop_jax import _priority


@pytest.fixture(autouse=True)
def always_quick(quick_compilation):
    """In all tests of this directory."""
    del quick_compilation


@pytest.fixture
def allocation(request, monkeypatch):
    """Puts a stand-in in the place of the exact allocation, unless the test is slow."""
    if request.node.get_closest_marker("slow"):
        return "exact"
    monkeypatch.setattr(_priority, "allocate_vector", helpers.quick_vector)
    monkeypatch.setattr(_priority, "allocate_leaves", helpers.quick_leaves)
    return "quick"

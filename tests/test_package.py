"""What a user meets first: the import, the names, their documentation."""

import importlib.metadata
import inspect
import json
import subprocess
import sys
import types

import pytest

import priorityprop_jax


PUBLIC = {
    name: value
    for name, value in vars(priorityprop_jax).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}


def test_import_is_light():
    def loaded_by(imports):
        code = f"import json, sys, {imports}; print(json.dumps(list(sys.modules)))"
        output = subprocess.check_output([sys.executable, "-c", code], text=True)
        return {name.partition(".")[0] for name in json.loads(output)}

    loaded = loaded_by("priorityprop_jax")
    heavy = {
        "chex",
        "equinox",
        "flax",
        "matplotlib",
        "orbax",
        "pandas",
        "torch",
        "tqdm",
    }
    assert {"jax", "optax", "priorityprop_jax"} <= loaded
    assert not heavy & (loaded - loaded_by("jax, optax"))  # old optax imports chex


def test_version():
    version = importlib.metadata.version("priorityprop_jax")
    assert priorityprop_jax.__version__ == version


def test_core_names_are_public():
    assert {
        "active",
        "allocate",
        "infer_depths",
        "prioritize",
        "priority_prop",
        "priority_report",
        "PriorityPropState",
        "schedule",
        "Score",
        "unit_axes",
    } <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name):
    docstring = PUBLIC[name].__doc__ or ""
    assert ">>>" in docstring, f"{name} has no example in its docstring"
    assert docstring.strip().partition("\n\n")[0].endswith("."), name


@pytest.mark.parametrize(
    "name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
)
def test_public_function_is_typed(name):
    signature = inspect.signature(PUBLIC[name])
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter.name

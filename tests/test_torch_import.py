"""Life without torch, whether it is installed or not."""

import subprocess
import sys
import textwrap


HIDDEN = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Hide())
"""


def test_without_torch_the_error_says_what_to_install():
    code = HIDDEN + textwrap.dedent(
        """
        import priorityprop_jax
        assert priorityprop_jax.allocate([1.0], 3).tolist() == [3]
        try:
            import priorityprop_jax.torch
        except ImportError as error:
            assert 'pip install "priorityprop_jax[torch]"' in str(error), error
        else:
            raise AssertionError("torch was not hidden")
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

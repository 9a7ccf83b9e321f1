"""What a command prints: tables or JSON on stdout, all else on stderr."""

import json
import math
import sys
from typing import Any


class Output:
    """Where results and remarks go.

    Args:
      as_json: whether results are JSON.
      quiet: whether remarks are left out; warnings and errors are not.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.as_json, self.quiet = as_json, quiet

    def remark(self, line: str) -> None:
        """A line for people, such as progress."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show_warning(self, message: Any, *where: Any) -> None:
        """In place of `warnings.showwarning`, which shows a line of code, too."""
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    def result(self, found: dict[str, Any], text: str) -> None:
        """The same result, in one form or the other.

        Args:
          found: as plain Python.
          text: for people.
        """
        print(json.dumps(plain(found), indent=2) if self.as_json else text)


def plain(x: Any) -> Any:
    """As JSON knows it, which has no infinity and no NaN: these become null.

    Examples:
      >>> from priorityprop_jax.cli._output import plain
      >>> plain({"loss": float("nan"), 1: (2, True)})
      {'loss': None, '1': [2, True]}
    """
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if hasattr(x, "tolist"):  # a number or an array of NumPy
        return plain(x.tolist())
    return x

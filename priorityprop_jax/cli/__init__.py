"""The command line, thin over the library: `priorityprop train|report|explain`.

Results go to stdout, as tables or, with ``--json``, as one JSON document; everything
else goes to stderr. The exit code is 0 if all went well, 1 if the run failed, 2 if the
arguments cannot be meant, 130 after Ctrl-C and 143 after SIGTERM.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from ._arguments import parser, UsageError
from ._output import Output


FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments, without the name of the program; None: those of the process.

    Returns:
      The exit code.

    Raises:
      SystemExit: argparse has printed a help or an error.

    Examples:
      >>> from priorityprop_jax.cli import main
      >>> main(["explain", "--data", "digits", "--model", "mlp", "--width", "8"])
      digits, mlp: 754 params in 8 leaves, batches of 64...
      0
    """
    args = parser().parse_args(argv)
    out = Output(args.json, getattr(args, "quiet", False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as what is deprecated
            for kind in (UserWarning, RuntimeWarning):
                warnings.simplefilter("default", kind)
            warnings.showwarning = out.show_warning
            # Imported only now: a help or a wrong argument need neither flax nor data.
            command = importlib.import_module(f"{__name__}._{args.command}")
            code = command.run(args, out)
        sys.stdout.flush()
        return code
    except UsageError as error:
        hint = f"see priorityprop {args.command} --help"
        return _fail(f"{_line(error)} ({hint})", USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read has enough; nothing must be written at the exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.traceback:
            raise
        expected = isinstance(error, OSError | ValueError | ImportError)
        name = "" if expected else f"{type(error).__name__}: "
        return _fail(name + _line(error), FAILED)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__

"""The arguments of the commands, and what they may be."""

import argparse
import difflib
import os
from importlib.metadata import version
from typing import Any

from .._scores import SCORES
from ._data import NAMES, VARIABLE


FULL = "full"
ARMS = (FULL, *SCORES)
MODELS = ("mlp", "cnn", "resnet", "transformer")
# Steps of a usual size: what these optimizers are mostly given for small networks.
OPTIMIZERS = {
    "adam": 1e-3,
    "adamw": 1e-3,
    "lion": 1e-4,
    "momentum": 0.05,
    "sgd": 0.1,
}
EPOCHS = {"digits": 20, "mnist": 3, "cifar10": 5, "text": 2}
MODEL_OF = {"digits": "cnn", "mnist": "cnn", "cifar10": "resnet", "text": "transformer"}

_TRAIN = """\
examples:
  priorityprop train
      a CNN on scikit-learn's digits, half of the updates
  priorityprop train --budget 0.25 --compare full,random --html report.html
      the same start and data for three runs, a table and a page
  priorityprop train --data mnist --data-dir ~/mnist --model mlp --budget 0.6 \\
      --budget-of flops
      60 % of the FLOPs of full training
  priorityprop train --data text --data-dir ~/books --checkpoint-dir run1 --resume
      a transformer on all *.txt; goes on where it was stopped, if it was
  priorityprop train --json --quiet | jq '.runs[].eval_accuracy'
"""
_EXPLAIN = """\
examples:
  priorityprop explain --data mnist --model mlp
      what each depth costs, and what leaving out the rest could save at most
  priorityprop explain --data text --width 128 --layers 8 --budget 0.6
      whether 60 % of the FLOPs is a budget that can be kept
"""
_REPORT = """\
examples:
  priorityprop report run1
  priorityprop report run1 --html report.html
  priorityprop report run1 --json | jq '.runs[].report.savings.speedup'
"""
_ABOUT = """\
exit codes: 0 all went well, 1 the run failed, 2 the arguments cannot be meant,
130 stopped by Ctrl-C, 143 by SIGTERM
"""


class UsageError(Exception):
    """Arguments that cannot be meant, found after argparse: exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """In one line, without all the options there are."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    Returns:
      It sets ``command``, ``json`` and ``traceback``, and what a command has.
    """
    top = _Parser(
        prog="priorityprop",
        description="Train under a budget of updates, and see who got them.",
        epilog=f"priorityprop COMMAND --help has the options, and examples.\n{_ABOUT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _train(_command(commands, "train", "train a model under a budget", _TRAIN))
    _report(_command(commands, "report", "who got what, of a checkpoint", _REPORT))
    _explain(
        _command(
            commands,
            "explain",
            "depths, costs and the most that can be saved, before training",
            _EXPLAIN,
        )
    )
    return top


def _version() -> str:
    return f"priorityprop_jax {version('priorityprop_jax')}"


def _command(
    commands: Any, name: str, about: str, examples: str
) -> argparse.ArgumentParser:
    sub = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"{examples}\n{_ABOUT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--json", action="store_true", help="print JSON, not tables")
    sub.add_argument(
        "--traceback", action="store_true", help="of an error, show all there is"
    )
    return sub


def _train(sub: argparse.ArgumentParser) -> None:
    _data_and_model(sub)
    group = sub.add_argument_group("training")
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam"
    )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in OPTIMIZERS.items())
    group.add_argument(
        "--learning-rate", type=positive, metavar="X", help=f"default: {rates}"
    )
    epochs = ", ".join(f"{name} {n}" for name, n in EPOCHS.items())
    group.add_argument("--epochs", type=count, metavar="N", help=f"default: {epochs}")
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of start and data order"
    )
    group = sub.add_argument_group("budget")
    group.add_argument(
        "--budget",
        type=budget,
        default=0.5,
        metavar="B",
        help="a share of full training, such as 0.5 (the default), or an integer: "
        "updates in a cycle",
    )
    group.add_argument(
        "--budget-of",
        choices=("updates", "flops", "ms"),
        default="updates",
        help="what the share is of; flops: by counting; ms: by measuring",
    )
    group.add_argument(
        "--score",
        type=arm,
        default="priority",
        metavar="NAME",
        help=f"who comes first: {', '.join(SCORES)}; or full, for all at every step "
        "(default: priority)",
    )
    group.add_argument(
        "--compare",
        type=arms,
        default=(),
        metavar="A,B",
        help="further runs, by the names of their scores (or full), from the same "
        "start on the same data",
    )
    for name, kind, usual in [("min", natural, 1), ("max", count, 20)]:
        group.add_argument(
            f"--{name}-updates",
            type=kind,
            default=usual,
            metavar="N",
            help=f"of a leaf in a cycle (default: {usual})",
        )
    _cycle(group)
    group.add_argument(
        "--transformation",
        choices=("prioritize", "chain"),
        default="prioritize",
        help="rest fully, or scale the updates in a chain (default: prioritize)",
    )
    group.add_argument(
        "--mode",
        choices=("auto", "static", "dynamic"),
        help="how work is left out: static compiles a program for each set of leaves, "
        "which pays in long runs; dynamic one for all. Default: auto; for the digits, "
        "where runs take seconds, dynamic",
    )
    group.add_argument(
        "--on-nonfinite",
        choices=("raise", "skip"),
        default="raise",
        help="where a loss is not finite: fail, or leave out the step and count it",
    )
    group = sub.add_argument_group("output")
    group.add_argument("--html", metavar="PATH", help="write a page with pictures")
    group.add_argument("--checkpoint-dir", metavar="DIR", help="where to save")
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint there"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a --checkpoint-dir")
    sub.add_argument("--html", metavar="PATH", help="write a page with pictures")


def _explain(sub: argparse.ArgumentParser) -> None:
    _data_and_model(sub)
    group = sub.add_argument_group("budget")
    group.add_argument(
        "--budget",
        type=share,
        metavar="B",
        help="a share of the FLOPs of full training: can it be kept?",
    )
    _cycle(group)


def _cycle(group: Any) -> None:
    group.add_argument(
        "--recalc-every",
        type=count,
        default=10,
        metavar="N",
        help="steps in a cycle (default: 10)",
    )


def _data_and_model(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("data and model")
    group.add_argument(
        "--data", choices=NAMES, default="digits", help="default: digits"
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the files are: MNIST in IDX format; CIFAR-10 (the batches for "
        f"Python, or cifar10_12k.npz); *.txt. Default: ${VARIABLE}, if set. The digits "
        "are scikit-learn's; text without a directory is Python's own help()",
    )
    group.add_argument(
        "--examples", type=count, metavar="N", help="train on the first N only"
    )
    group.add_argument(
        "--context",
        type=count,
        default=64,
        metavar="N",
        help="characters in a row of text (default: 64)",
    )
    group.add_argument(
        "--model",
        choices=MODELS,
        help="default: cnn, for CIFAR-10 resnet, for text "
        "transformer (the only one for text)",
    )
    group.add_argument("--width", type=count, metavar="N", help="features of a layer")
    group.add_argument("--layers", type=count, metavar="N", help="or blocks")
    group.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="default: 64"
    )


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on the data.

    Args:
      args: of `train` or `explain`.

    Returns:
      The same, with `data_dir` and `model` as they will be used.

    Raises:
      UsageError: arguments that do not go together.
    """
    if args.model is None:
        args.model = MODEL_OF[args.data]
    if args.data == "text" and args.model != "transformer":
        raise UsageError(f"--model {args.model} is for images; for text: transformer")
    if args.data == "digits":
        if args.data_dir is not None:
            raise UsageError(
                "--data digits is what scikit-learn ships with and has no --data-dir; "
                "for files: --data mnist, cifar10 or text"
            )
    elif args.data_dir is None:
        args.data_dir = os.environ.get(VARIABLE) or None
    return args


# --- types


def count(text: str) -> int:
    """A positive integer."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer from 0 on."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not (text.isdecimal() and least <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(
            f"must be an integer from {least} on, got {text!r}"
        )
    return int(text)


def positive(text: str) -> float:
    """A positive number."""
    value = _float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share in (0, 1], got {text!r}")
    return value


def budget(text: str) -> int | float:
    """An integer is a number of updates in a cycle, else a share."""
    if text.isdecimal() and 1 <= int(text) < 2**31:
        return int(text)
    if "." not in text or not 0 < _float(text) <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a share in (0, 1] such as 0.5 (1.0 is all), or a positive "
            f"integer, updates in a cycle, got {text!r}"
        )
    return float(text)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def arm(text: str) -> str:
    """The name of a score, or of full training."""
    if text not in ARMS:
        near = difflib.get_close_matches(text, ARMS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(ARMS)}, got {text!r}{hint}"
        )
    return text


def arms(text: str) -> tuple[str, ...]:
    """Names, with commas between them."""
    return tuple(dict.fromkeys(arm(name.strip()) for name in text.split(",")))

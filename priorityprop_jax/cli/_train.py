"""`priorityprop train`: one run under a budget, or several from the same start.

What is compared has the same params at the start and the same batches in the same
order; runs differ in who is updated.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax

from ..report import PriorityReport, table
from ..training import ArrayLoader, History, PriorityPropTrainer
from ._arguments import complete, EPOCHS, FULL, OPTIMIZERS, UsageError
from ._data import Dataset, load, VARIABLE
from ._output import Output


Runs = dict[str, tuple[History, PriorityReport]]

TERMINATED = 143
_EVAL_BATCH = 256


def run(args: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Returns:
      The exit code.

    Raises:
      UsageError: arguments that do not go together.
      OSError, ValueError: the data cannot be read, the page cannot be written.
    """
    complete(args)
    _check(args)
    if args.html is not None:
        check_page(args.html)
    data = load(args.data, args.data_dir, args.context, args.examples)
    out.remark(data.about)
    epochs = args.epochs or EPOCHS[args.data]
    runs: Runs = {}
    for name, trainer in _trainers(args, data).items():
        if sys.stderr.isatty():  # above the bar; else each line of progress says it
            out.remark(f"{name}:")
        history = _train(trainer, name, data, epochs, args, out)
        runs[name] = history, trainer.get_priority_report()
        if history.stopped == "SIGTERM":
            out.remark("stopped by SIGTERM")
            break
    _, report = next(iter(runs.values()))
    found = {
        "command": "train",
        "data": args.data,
        "about": data.about,
        "model": args.model,
        "optimizer": args.optimizer,
        "budget": args.budget,
        "budget_of": args.budget_of,
        "seed": args.seed,
        "runs": summaries(runs),
        "html": args.html,
        "device": jax.devices()[0].device_kind,
        "versions": {x: version(x) for x in ("priorityprop_jax", "jax", "optax")},
    }
    out.result(found, _text(found, report, len(data.test[0])))
    if args.html is not None:
        write_page(args.html, runs, out)
    stopped = any(history.stopped == "SIGTERM" for history, _ in runs.values())
    return TERMINATED if stopped else 0


def _check(args: argparse.Namespace) -> None:
    if args.data in ("mnist", "cifar10") and args.data_dir is None:
        raise UsageError(f"--data {args.data} needs --data-dir, or ${VARIABLE}")
    if args.resume and args.checkpoint_dir is None:
        raise UsageError("--resume needs --checkpoint-dir, where to resume from")
    if args.min_updates > args.max_updates:
        raise UsageError(
            f"--min-updates {args.min_updates} is more than --max-updates "
            f"{args.max_updates}"
        )
    if args.budget_of != "updates" and isinstance(args.budget, int):
        raise UsageError(
            f"--budget-of {args.budget_of} needs a share such as --budget 0.5, got "
            f"{args.budget}, which is a number of updates"
        )


def check_page(path: str) -> None:
    """Raises before any work is done, where a page could not be written after it.

    Raises:
      OSError: there is no such directory.
      ImportError: matplotlib is not installed.
    """
    directory = Path(path).parent
    if not directory.is_dir():
        raise FileNotFoundError(f"--html {path}: there is no directory {directory}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"--html {path}: this is a directory")
    try:
        import matplotlib as matplotlib
    except ImportError as error:
        raise ImportError(
            "--html needs matplotlib, which is not installed: "
            'pip install "priorityprop_jax[plots]"'
        ) from error


def write_page(path: str, runs: Runs, out: Output) -> None:
    """Writes the page of the first run, with all of them side by side."""
    history, report = next(iter(runs.values()))
    histories = {name: history for name, (history, _) in runs.items()}
    report.html(path, history=history, runs=histories)
    out.remark(f"wrote {path}")


def _trainers(args: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """A trainer for each run, by name. Wrong arguments are found before all training.

    Raises:
      UsageError: the budget cannot be meant.
    """
    from . import _models

    model = _models.build(args.model, data.classes, args.width, args.layers)
    variables = _models.init(model, data.train[0], args.seed)
    optimizer = _optimizer(args.optimizer, args.learning_rate)
    names = dict.fromkeys((args.score, *args.compare))
    trainers = {}
    for name in names:
        directory = args.checkpoint_dir
        if directory is not None and len(names) > 1:
            directory = os.path.join(directory, name)
        full = name == FULL
        try:
            trainers[name] = PriorityPropTrainer(
                model,
                optimizer,
                optax.softmax_cross_entropy_with_integer_labels,
                None if full else args.budget,
                args.min_updates,
                args.max_updates,
                args.recalc_every,
                params=variables,
                transformation=args.transformation,
                score="priority" if full else name,
                costs=None if full or args.budget_of == "updates" else args.budget_of,
                mode=_mode(args, full),
                on_nonfinite=args.on_nonfinite,
                seed=args.seed,
                checkpoint_dir=directory,
                progress=not args.quiet,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
    return trainers


def _mode(args: argparse.Namespace, full: bool) -> str:
    if full:  # a single program in any case, and then the one without conditionals
        return "auto"
    return args.mode or ("dynamic" if args.data == "digits" else "auto")


def _optimizer(name: str, learning_rate: float | None) -> Any:
    rate = learning_rate or OPTIMIZERS[name]
    if name == "momentum":
        return optax.sgd(rate, momentum=0.9)
    return getattr(optax, name)(rate)


def _train(
    trainer: Any,
    name: str,
    data: Dataset,
    epochs: int,
    args: argparse.Namespace,
    out: Output,
) -> History:
    # A new loader for each run, with the order of all others. Batches of one size: of
    # a model with BatchNorm, which cannot be padded, another size is another program.
    size = min(args.batch_size, len(data.train[0]))
    loader = ArrayLoader(data.train, size, seed=args.seed, drop_last=True)
    tests = ArrayLoader(data.test, _EVAL_BATCH, shuffle=False)

    def tell(trainer: Any, event: Any) -> None:
        if event.kind == "epoch" and not sys.stderr.isatty():
            out.remark(
                f"{name}: epoch {event.epoch + 1}/{epochs}, "
                f"loss {event.metrics['loss']:.4f}, "
                f"test accuracy {event.metrics['eval_accuracy']:.2%}"
            )

    return trainer.train(
        loader,
        epochs,
        eval_data=tests,
        metrics="accuracy",
        callbacks=tell,
        resume=args.resume,
        name=name,
    )


_KEPT = ("loss", "accuracy", "eval_loss", "eval_accuracy", "step", "seconds")
_TOTALS = ("compile_seconds", "flops_spent", "flops_full", "skipped")


def summaries(runs: Runs) -> list[dict[str, Any]]:
    """Runs in numbers, ready for JSON."""
    return [_summary(name, *both) for name, both in runs.items()]


def _summary(name: str, history: History, report: PriorityReport) -> dict[str, Any]:
    """A run in numbers: those of the last epoch, and all of them."""
    last = {key: (history.get(key) or [None])[-1] for key in (*_KEPT, *_TOTALS)}
    full = report.units * report.step
    return {
        "name": name,
        "epochs": len(history.get("epoch", ())),
        **last,
        "updates": report.updates,
        "updates_share": report.updates / full if full else None,
        "flops_share": _ratio(last["flops_spent"], last["flops_full"]),
        "stopped": history.stopped,
        "history": dict(history),
        "report": report.to_dict(),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """Runs side by side, as a table.

    Args:
      runs: as `summaries` returns them.
    """
    head = ["run", "test accuracy", "test loss", "updates", "of full"]
    rows = [[*head, "FLOPs", "of full", "seconds", "compiling"]]
    for one in runs:
        form = lambda key, spec, one=one: (
            "-" if one[key] is None else format(one[key], spec)
        )
        rows.append(
            [
                one["name"],
                form("eval_accuracy", ".2%"),
                form("eval_loss", ".4f"),
                form("updates", ","),
                form("updates_share", ".1%"),
                form("flops_spent", ".3g"),
                form("flops_share", ".1%"),
                form("seconds", ".1f"),
                form("compile_seconds", ".1f"),
            ]
        )
    return table(rows)


def _text(found: dict[str, Any], report: PriorityReport, tests: int) -> str:
    runs = found["runs"]
    # Numbers next to each other mislead where nothing is said about chance.
    each = "one run each" if len(runs) > 1 else "one run"
    of_accuracy = (
        "accuracy is that of the next character"
        if found["data"] == "text"
        else f"one of the {tests:,} test images is {1 / tests:.2%} of accuracy"
    )
    lines = [
        f"{found['data']}, {found['model']}, {found['optimizer']}",
        "",
        comparison(runs),
        f"{each}, seed {found['seed']}, on {found['device']}; {of_accuracy}",
        "seconds: with compiling, of which those of all threads are added up",
        "",
        f"{runs[0]['name']} gave its updates to:",
        str(report),
    ]
    if skipped := sum(one["skipped"] or 0 for one in runs):
        lines.append(f"steps skipped for a loss that was not finite: {skipped:,}")
    return "\n".join(lines)

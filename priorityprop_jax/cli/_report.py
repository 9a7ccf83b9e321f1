"""`priorityprop report`: who got what in a run that was saved. Needs no model."""

import argparse
from pathlib import Path
from typing import Any

from ..report import PriorityReport, table
from ..training import History, load_report
from ._output import Output
from ._train import check_page, comparison, Runs, summaries, write_page


def run(args: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Returns:
      The exit code.

    Raises:
      OSError: there is no checkpoint.
      ValueError: it is not from training.
    """
    if args.html is not None:
        check_page(args.html)
    runs = _load(args.checkpoint)
    found = {
        "command": "report",
        "checkpoint": args.checkpoint,
        "runs": summaries(runs),
        "html": args.html,
    }
    history, report = next(iter(runs.values()))
    text = f"{_epochs(history)}\n\n{report}" if len(history) else str(report)
    if len(runs) > 1:
        first = f"{next(iter(runs))}:\n{text}"
        text = f"{comparison(found['runs'])}\n\n{first}"
    out.result(found, text)
    if args.html is not None:
        write_page(args.html, runs, out)
    return 0


def _load(directory: str) -> Runs:
    """The run of a directory; or runs, where each that was compared has its own."""
    try:
        return {Path(directory).resolve().name: _load_one(directory)}
    except FileNotFoundError as error:
        runs = {}
        path = Path(directory)
        for below in sorted(path.iterdir()) if path.is_dir() else ():
            try:
                runs[below.name] = _load_one(str(below))
            except OSError:  # none, or no directory
                continue
        if not runs:
            raise error
        return runs


def _load_one(directory: str) -> tuple[History, PriorityReport]:
    history, report = load_report(directory)
    if report is None:
        raise ValueError(f"{directory}: saved before anything was trained")
    return history, report


_SHOWN = (
    ("step", ",d"),
    ("loss", ".4f"),
    ("accuracy", ".2%"),
    ("eval_loss", ".4f"),
    ("eval_accuracy", ".2%"),
    ("seconds", ".1f"),
    ("flops_spent", ".3g"),
)


def _epochs(history: History) -> str:
    """The epochs as a table."""
    shown = [(name, form) for name, form in _SHOWN if name in history]
    rows = [["epoch", *(name.replace("_", " ") for name, _ in shown)]]
    for i, epoch in enumerate(history["epoch"]):
        values: list[Any] = [(history[name][i], form) for name, form in shown]
        cells = ["-" if x is None else format(x, form) for x, form in values]
        rows.append([str(epoch + 1), *cells])
    return table(rows, left=0)

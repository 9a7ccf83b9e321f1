"""Does it pay? Trains workloads under many policies, and compares what it took.

    python benchmarks/evaluate.py tune mnist_mlp --policies adam,prioritize_50
    python benchmarks/evaluate.py run mnist_mlp --policies adam,prioritize_50
    python benchmarks/evaluate.py table mnist_mlp
    python benchmarks/evaluate.py plot

Each finished run is a line in `results/evaluation/WORKLOAD.jsonl`; what is there is not
run again, so that the same command goes on after a crash. `README.md`, next to this
file, has the protocol.
"""

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


TUNING_SEED = 1000
RATES, HORIZONS = (1 / 3, 1.0, 3.0), (0.5, 0.7, 1.0)  # times the workload's own


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    pin(args.core)
    # After the above, which jax reads when it starts.
    commands = {"tune": tune, "run": run, "table": table, "plot": plot}
    try:
        commands[args.command](args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--scale", choices=("small", "large"), default="small")
    shared.add_argument("--data-dir", help="default: the variable PRIORITYPROP_DATA")
    shared.add_argument("--out", help="directory of the results")
    core = "the core to run on, or 'any' (all cores, all threads)"
    shared.add_argument("--core", default="0", help=core)
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("workload")
    training.add_argument("--policies", required=True, help="names, with commas")
    rates = "instead of the grid, or of the tuned one; with commas"
    training.add_argument("--learning-rates", type=numbers(float), help=rates)
    training.add_argument("--steps", type=numbers(int), help="horizons; as above")
    training.add_argument("--batch-sizes", type=numbers(int), help="as above")
    add = lambda name, *parents: commands.add_parser(name, parents=parents)
    one = add("tune", shared, training)
    one.add_argument("--seeds", type=seeds, default=[TUNING_SEED])
    one = add("run", shared, training)
    one.add_argument("--seeds", type=seeds, default=list(range(5)), help="as 0-4 or 7")
    match = "stretch each horizon to the FLOPs of tuned plain Adam"
    one.add_argument("--match-flops", action="store_true", help=match)
    one = add("table", shared)
    one.add_argument("workload", nargs="?")
    one.add_argument("--write", action="store_true", help="into README.md")
    one = add("plot", shared)
    one.add_argument("workload", nargs="?")
    one.add_argument("--policies", help="names, with commas (default: all)")
    return parser


def numbers(kind: Any) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"{kind.__name__}s"  # argparse names it in its errors
    return parse


def seeds(text: str) -> list[int]:
    """``"0-2,7"`` is 0, 1, 2 and 7."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def pin(core: str) -> None:
    """One core, one thread; before jax is imported."""
    if core == "any":
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core)})


class Job:
    """What the command line asks for: a workload, arms, and where lines go."""

    def __init__(self, args: argparse.Namespace):
        from evaluation import _policies, _records, _workload

        self.records, self.args = _records, args
        self.workload, own = _workload.load(args.workload, args.data_dir, args.scale)
        known = {**_policies.ARMS, **own}
        names = args.policies.split(",")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"--policies: unknown {', '.join(unknown)}; there are "
                f"{', '.join(known)}"
            )
        self.arms = [known[name] for name in names]
        self.path = _records.path_of(args.workload, args.out)
        self.Settings = _policies.Settings

    def on_file(self, policy: str | None = None) -> list[dict[str, Any]]:
        """Runs at this scale."""
        return [
            record
            for record in self.records.read(self.path)
            if record["scale"] == self.args.scale and policy in (None, record["policy"])
        ]

    def tuned(self, policy: str) -> Any:
        target = self.workload.targets[-1]
        return self.records.winner(self.on_file(policy), target)

    def train(self, plans: Iterator[tuple[Any, str, Any]]) -> None:
        """Runs those (arm, purpose, settings) that are not on file."""
        from evaluation._runner import run

        done = {self.records.key_of(record) for record in self.on_file()}
        for arm, purpose, settings in plans:
            args = self.args
            key = self.records.Key(
                args.workload, args.scale, arm.name, purpose, settings
            )
            what = (
                f"{arm.name} seed {settings.seed} rate {settings.learning_rate:.3g} "
                f"steps {settings.steps} batch {settings.batch_size}"
            )
            if key in done:
                print(f"{what}: on file", flush=True)
                continue
            done.add(key)
            record = run(self.workload, arm, key)
            self.records.append(self.path, record)
            totals, last = record["totals"], self.records.final_quality(record)
            reached = [
                f"{t.cpu_s:.1f}" if (t := self.records.time_to(record, x)) else "-"
                for x in self.workload.targets
            ]
            print(
                f"{what}: quality {last:.4f}, CPU s {totals['cpu_s']:.1f}, to targets "
                f"{' '.join(reached)}, compile {totals['compile_cpu_s']:.1f}, "
                f"evaluation {totals['evaluation_s']:.1f}",
                flush=True,
            )


def tune(args: argparse.Namespace) -> None:
    """The same grid for all; seeds outside, then settings, arms inside."""
    job = Job(args)
    workload = job.workload
    rates = args.learning_rates or [r * workload.learning_rate for r in RATES]
    horizons = args.steps or [round(h * workload.steps) for h in HORIZONS]
    sizes = args.batch_sizes or [workload.batch_size]

    def plans():
        grid = itertools.product(args.seeds, sizes, horizons, rates, job.arms)
        for seed, size, steps, rate, arm in grid:
            if arm.learning_rate is not None:
                if rate != rates[0]:
                    continue
                rate = arm.learning_rate
            yield arm, "tune", job.Settings(rate, steps, size, seed)

    job.train(plans())
    for arm in job.arms:
        print(f"{arm.name}: the winner is {job.tuned(arm.name)}")


def run(args: argparse.Namespace) -> None:
    """At the tuned settings, unless others are given; seeds outside, arms inside."""
    job = Job(args)
    settings = {arm.name: _settings(job, arm) for arm in job.arms}

    def plans():
        for seed, arm in itertools.product(args.seeds, job.arms):
            purpose = "match" if args.match_flops else "test"
            yield arm, purpose, settings[arm.name]._replace(seed=seed)

    job.train(plans())


def _settings(job: Job, arm: Any) -> Any:
    """What a policy is run with."""
    args, workload, tuned = job.args, job.workload, job.tuned(arm.name)
    if tuned is None:
        print(f"note: {arm.name} is not tuned, so it gets the workload's own settings")
        rate = arm.learning_rate or workload.learning_rate
        tuned = job.Settings(rate, workload.steps, workload.batch_size, TUNING_SEED)
    for name, option in (
        ("learning_rate", args.learning_rates),
        ("steps", args.steps),
        ("batch_size", args.batch_sizes),
    ):
        if option is not None:
            if len(option) > 1:
                raise ValueError(f"run takes one {name} for all seeds, got {option}")
            tuned = tuned._replace(**{name: option[0]})
    if not args.match_flops:
        return tuned
    aim, has = (_flops_per_step(job, name) for name in ("adam", arm.name))
    base = job.tuned("adam").steps
    return tuned._replace(steps=max(1, round(base * aim / has)))


def _flops_per_step(job: Job, policy: str) -> float:
    """Of the tuning run that won, by our account."""
    tuned = job.tuned(policy)
    for record in job.on_file(policy):
        key = job.records.key_of(record)
        if key.purpose == "tune" and key.settings == tuned:
            return record["totals"]["flops"] / tuned.steps
    raise ValueError(f"--match-flops needs tuning runs of {policy}: run tune first")


def _workloads(args: argparse.Namespace) -> Iterator[tuple[str, list, Any]]:
    """Name, runs on file and targets of what there are results of at this scale."""
    from evaluation import _records, _workload

    for name in [args.workload] if args.workload else _workload.WORKLOADS:
        path = _records.path_of(name, args.out)
        records = [r for r in _records.read(path) if r["scale"] == args.scale]
        if records:
            yield name, records, tuple(records[-1]["targets"])
        elif args.workload:
            raise ValueError(f"{path} has no runs at the scale {args.scale!r}")


def _marked(name: str, scale: str) -> str:
    return name if scale == "small" else f"{name}-{scale}"


def table(args: argparse.Namespace) -> None:
    from evaluation import _tables

    for name, records, targets in _workloads(args):
        text = _tables.report(records, targets, args.scale)
        print(f"## {name}\n\n{text}\n")
        readme = Path(__file__).with_name("README.md")
        marker = _marked(name, args.scale)
        if args.write and not _tables.write(readme, marker, text):
            print(f"note: README.md has no marker for {marker}")


def plot(args: argparse.Namespace) -> None:
    from evaluation import _plots, _records

    policies = args.policies and args.policies.split(",")
    for name, records, targets in _workloads(args):
        path = _records.path_of(_marked(name, args.scale), args.out).with_suffix(".png")
        if not any(r["purpose"] == "test" for r in records):
            print(f"{name}: no runs on file")
            continue
        _plots.quality_against_compute(records, targets, path, args.scale, policies)
        print(path)


if __name__ == "__main__":
    main()

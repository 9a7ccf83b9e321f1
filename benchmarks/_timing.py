"""Timing for all benchmarks: what is compared is measured in turns, in one run.

The speed of a machine drifts by more than the differences of interest, so cases are
interleaved, and ratios are taken within a round before they are summarised.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


_HERE = Path(__file__).resolve().parent
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "priorityprop_jax")


class Case(NamedTuple):
    """A function and the arguments to time it with (not donated).

    A function that is not jitted itself, because it passes donated state on from call
    to call, names the jitted one inside, and arguments to compile that for; `renew` is
    called before each sample.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    jitted: Callable[..., Any] | None = None
    jitted_arguments: tuple[Any, ...] = ()
    renew: Callable[[], Any] = lambda: None


def cycle_of_steps(
    step: Callable[..., Any],
    params: Any,
    state: Any,
    *arguments: Any,
    steps: int = 10,
) -> Case:
    """Ten calls of ``step(params, state, ...)``, both donated and passed on.

    Each sample has params and state of its own: where in memory they happen to lie
    makes a step faster or slower by a third. For long steps, `steps` may be fewer.
    """
    start = params, state
    held = [jax.tree.map(jnp.copy, start)]
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def cycle(*arguments):
        for _ in range(steps):
            held[0] = compiled(*held[0], *arguments)
        return held[0]

    def renew():
        held[0] = jax.tree.map(jnp.copy, start)
        held[0] = jax.block_until_ready(compiled(*held[0], *arguments))
        for _ in range(steps - 1):  # so that a sample begins with a cycle
            held[0] = compiled(*held[0], *arguments)
        jax.block_until_ready(held[0])

    return Case(cycle, arguments, compiled, (*start, *arguments), renew)


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


class Timing(NamedTuple):
    """What `compare` found out about one case."""

    name: str
    compile_seconds: float  # trace, lower and compile
    flops: float | None  # of one call, as counted by the compiler
    seconds: Quartiles  # of one call
    ratio: Quartiles  # to the first case, within a round
    rounds: int
    calls: int  # in each round
    samples: tuple[float, ...] = ()  # seconds of one call, by round


def compare(
    cases: Mapping[str, Case], rounds: int = 20, sample_seconds: float = 0.02
) -> list[Timing]:
    """Times functions made by `jax.jit` against the first of them, in turns.

    Args:
      cases: the functions by name; the first is what the others are compared to.
      rounds: how often each case is sampled. Every other round runs backwards, so
        that no case always follows the same one.
      sample_seconds: a sample repeats short calls for at least this long.

    Returns:
      One `Timing` per case, in order.

    Examples:
      >>> f, g = jax.jit(jnp.sort), jax.jit(jnp.argsort)
      >>> print_table(compare({"sort": Case(f, (x,)), "argsort": Case(g, (x,))}))
    """
    compiled = {name: _compile(case) for name, case in cases.items()}
    calls = {}
    for name, case in cases.items():
        _sample(case, 1)  # jit compiles once more, into its own cache
        once = max(_sample(case, 1), 1e-7)
        calls[name] = max(1, math.ceil(sample_seconds / once))
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in list(cases)[:: -1 if i % 2 else 1]:
            samples[name].append(_sample(cases[name], calls[name]))
    base = next(iter(samples.values()))
    return [
        Timing(
            name,
            *compiled[name],
            seconds=_quartiles(seconds),
            ratio=_quartiles([s / b for s, b in zip(seconds, base, strict=True)]),
            rounds=rounds,
            calls=calls[name],
            samples=tuple(seconds),
        )
        for name, seconds in samples.items()
    ]


def ratio(timing: Timing, base: Timing) -> Quartiles:
    """Of the times of two cases of one `compare`, within a round."""
    return _quartiles(
        [s / b for s, b in zip(timing.samples, base.samples, strict=True)]
    )


def _compile(case: Case) -> tuple[float, float | None]:
    start = time.perf_counter()
    function, arguments = case.function, case.arguments
    if case.jitted is not None:
        function, arguments = case.jitted, case.jitted_arguments
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    return seconds, cost.get("flops")


def _sample(case: Case, calls: int) -> float:
    """Seconds per call."""
    case.renew()
    start = time.perf_counter()
    for _ in range(calls):
        result = case.function(*case.arguments)
        jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _quartiles(x: Sequence[float]) -> Quartiles:
    if len(x) == 1:
        return Quartiles(x[0], x[0], x[0])
    return Quartiles(*statistics.quantiles(x, n=4, method="inclusive"))


def print_table(timings: Sequence[Timing]) -> None:
    """Prints a line for each case; the spread is that of the middle half."""
    width = max(len(t.name) for t in timings)
    print(f"{'':{width}}  {'compile':>9}  {'run':>10}  {'ratio':>6}  quartiles")
    for t in timings:
        print(
            f"{t.name:{width}}  {t.compile_seconds:7.2f} s  "
            f"{t.seconds.median * 1e3:7.3f} ms  {t.ratio.median:6.3f}  "
            f"{t.ratio.low:.3f}..{t.ratio.high:.3f}",
            flush=True,
        )


def as_rows(timings: Sequence[Timing], **labels: Any) -> list[dict[str, Any]]:
    """Timings as plain dicts for `write_json`, each with the `labels`."""
    rows = []
    for timing in timings:
        row = timing._asdict()
        del row["samples"]
        row["seconds"] = timing.seconds._asdict()
        row["ratio"] = timing.ratio._asdict()
        rows.append({**labels, **row})
    return rows


def write_json(
    name: str, rows: Sequence[Mapping[str, Any]], out: str | Path | None = None
) -> Path:
    """Writes `rows` and what they ran on to ``results/<name>.json``, or to `out`."""
    path = Path(out) if out is not None else _HERE / "results" / f"{name}.json"
    record = {"benchmark": name, **environment(), "rows": list(rows)}
    if record["dirty"]:
        print("note: the checkout has changes that are in no commit")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Versions, device, and the state of the checkout."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "host_cpus": os.cpu_count(),
            "machine": platform.machine(),
        },
        "settings": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "XLA_", "JAX_"))
        },
        "commit": _git("rev-parse", "--verify", "HEAD") or None,
        "dirty": _git("status", "--porcelain", "--", ".", ":!benchmarks/results") != "",
    }


def _git(*arguments: str) -> str | None:
    """What git says, or None outside of a checkout or before the first commit."""
    command = ["git", "-C", str(_HERE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def keep_memory() -> bool:
    """Tells glibc to keep freed memory for the next step; whether there is a glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    settings = {mmap_threshold: 2**30, trim_threshold: 2**30, top_pad: 2**28}
    return all([mallopt(*setting) for setting in settings.items()])


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--rounds", type=int, help="samples of each case")
    result.add_argument("--out", help="where to write the JSON")
    return result

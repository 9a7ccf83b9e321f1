"""Runs an arm on a workload, and keeps the time.

The clock of a run is the CPU time of the process (and, next to it, the time on the
wall) in its steps, each waited for. Batches are made, params judged and programs
compiled outside of it, on clocks of their own. A step in which something compiled is
counted with the median of the steps of its kind in this run; what it took longer is
time to compile.
"""

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
from _timing import environment, keep_memory

from ._policies import Arm
from ._records import CURVE, Key
from ._workload import Workload


class Step(NamedTuple):
    """What one step took."""

    cpu_s: float
    wall_s: float
    kind: Hashable
    compiled: bool


class Clock(NamedTuple):
    """What steps took, without compiling."""

    cpu_s: list[float]  # up to the end of each step
    wall_s: list[float]
    compile_cpu_s: float
    compile_wall_s: float
    compiled: int  # steps in which something compiled


@functools.cache
def _compilations() -> list[float]:
    """Seconds of everything that jax has traced, lowered or compiled from now on."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if "/compile/" in event:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def without_compilation(steps: Sequence[Step]) -> Clock:
    """Steps that compiled are counted like the median of those of their kind.

    Where all steps of a kind compiled, like the median of the dearest kind; where all
    steps did, there is nothing to compare with, and they are counted in full.
    """
    kinds: dict[Hashable, list[Step]] = {}
    for step in steps:
        if not step.compiled:
            kinds.setdefault(step.kind, []).append(step)
    usual = {
        kind: (
            statistics.median(s.cpu_s for s in group),
            statistics.median(s.wall_s for s in group),
        )
        for kind, group in kinds.items()
    }
    dearest = max(usual.values(), default=None)
    cpu, wall, extra, compiled = [0.0], [0.0], [0.0, 0.0], 0
    for step in steps:
        took = step.cpu_s, step.wall_s
        if step.compiled and dearest is not None:
            counted = usual.get(step.kind, dearest)
            counted = min(counted[0], took[0]), min(counted[1], took[1])
            extra = [e + t - c for e, t, c in zip(extra, took, counted, strict=True)]
            took = counted
        compiled += step.compiled
        cpu.append(cpu[-1] + took[0])
        wall.append(wall[-1] + took[1])
    return Clock(cpu[1:], wall[1:], extra[0], extra[1], compiled)


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """After which steps quality is measured: evenly spaced, the last one included."""
    count = max(1, min(evaluations, steps))
    return sorted({-(-steps * (k + 1) // count) for k in range(count)})


def run(workload: Workload, arm: Arm, key: Key) -> dict[str, Any]:
    """Trains once, from start to end, and returns what is to be put on file.

    Args:
      workload: what is trained.
      arm: who trains.
      key: what the run is; its settings are those that are used.

    Returns:
      A dict for JSON: the `key` in words, the `curve` (a row of `CURVE` for each
      evaluation, the first before any step), totals, and the environment. A run whose
      quality is not a finite number ends there and is marked as `diverged`.
    """
    settings, compilations = key.settings, _compilations()
    keep_memory()
    _forget_peak()
    loss = jax.jit(workload.loss)
    program = arm.start(workload, settings)
    state, steps, points = program.state, [], []
    data_s = evaluation_s = 0.0
    batch = None

    def measure(step):
        nonlocal evaluation_s
        start = time.perf_counter()
        params = program.params(state)
        quality = float(workload.quality(params))
        at = None if batch is None else float(loss(params, batch))
        points.append((step, program.flops(state), quality, at))
        evaluation_s += time.perf_counter() - start
        return math.isfinite(quality)

    measure(0)
    wanted = set(evaluation_steps(settings.steps, workload.evaluations))
    source = iter(workload.batches(settings.seed, settings.batch_size, settings.steps))
    for i in range(settings.steps):
        start = time.perf_counter()
        batch = next(source)
        data_s += time.perf_counter() - start
        before = len(compilations)
        cpu, wall = time.process_time(), time.perf_counter()
        state = jax.block_until_ready(program.step(state, i, batch))
        took = time.process_time() - cpu, time.perf_counter() - wall
        steps.append(Step(*took, program.kind(state), len(compilations) > before))
        if i + 1 in wanted and not measure(i + 1):
            break
    clock = without_compilation(steps)
    curve = [
        (step, *((clock.cpu_s[step - 1], clock.wall_s[step - 1]) if step else (0, 0)))
        for step, *_ in points
    ]
    peak = _peak()  # before anything is compiled to be counted
    return {
        "workload": key.workload,
        "scale": key.scale,
        "policy": key.policy,
        "purpose": key.purpose,
        "seed": settings.seed,
        "config": {
            "learning_rate": settings.learning_rate,
            "steps": settings.steps,
            "batch_size": settings.batch_size,
        },
        "targets": workload.targets,
        "columns": CURVE,
        "curve": [
            [*_rounded(a), b[1], *_rounded(b[2:])]
            for a, b in zip(curve, points, strict=True)
        ],
        "diverged": len(steps) < settings.steps or not math.isfinite(points[-1][2]),
        "totals": {
            "cpu_s": clock.cpu_s[-1],
            "wall_s": clock.wall_s[-1],
            "compile_cpu_s": clock.compile_cpu_s,
            "compile_wall_s": clock.compile_wall_s,
            "compiled_steps": clock.compiled,
            "evaluation_s": evaluation_s,
            "data_s": data_s,
            "flops": program.flops(state),
            "xla_flops": program.xla_flops(state, batch),
            "kinds": len({step.kind for step in steps}),
            "peak_resident_bytes": peak,
        },
        **environment(),
    }


def _rounded(numbers: Sequence[Any]) -> list[Any]:
    """Six digits are more than any clock here has."""
    return [x if x is None else float(f"{x:.6g}") for x in numbers]


def _forget_peak() -> None:
    """Gives freed memory back and starts the peak anew, where the system can."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak() -> int | None:
    """The most memory this process had at once, data and programs included."""
    try:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith("VmHWM")]
    except OSError:
        return None
    return int(lines[0][1]) * 1024 if lines else None

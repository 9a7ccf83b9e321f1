"""Lines on file: one for each finished run, appended in one go.

What cannot be read (a last line that was cut off when the machine went down) is not a
run; it is taken off before the next line is written.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._policies import Settings


RESULTS = Path(__file__).resolve().parents[1] / "results" / "evaluation"
PURPOSES = ("tune", "test", "match")  # match: test, stretched to the baseline's FLOPs
CURVE = ("step", "cpu_s", "wall_s", "flops", "quality", "loss")


class Key(NamedTuple):
    """What makes a run a different one."""

    workload: str
    scale: str
    policy: str
    purpose: str
    settings: Settings


def key_of(record: Mapping[str, Any]) -> Key:
    config = record["config"]
    settings = Settings(
        config["learning_rate"], config["steps"], config["batch_size"], record["seed"]
    )
    return Key(
        record["workload"],
        record["scale"],
        record["policy"],
        record["purpose"],
        settings,
    )


def path_of(workload: str, out: str | os.PathLike | None = None) -> Path:
    return Path(out or RESULTS) / f"{workload}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """All runs on file; what is cut off is left out."""
    return list(_complete(path))


def _complete(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        if _is_whole(line):
            yield json.loads(line)
        else:
            print(f"note: {path}, line {number} is not whole, and left out")


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line and waits until it is on disk; a cut-off line makes room for it."""
    line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of on closing
        file.seek(0)
        text = file.read()
        last = text[text.rfind(b"\n") + 1 :]
        if last and _is_whole(last):
            line = b"\n" + line
        elif last:
            file.truncate(len(text) - len(last))
        file.write(line)  # goes to the end, whatever the position
        file.flush()
        os.fsync(file.fileno())


def _plain(x: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, Sequence) and not isinstance(x, str):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class Reached(NamedTuple):
    """What it took to reach a target."""

    cpu_s: float
    wall_s: float
    flops: float
    step: int


def time_to(record: Mapping[str, Any], target: float) -> Reached | None:
    """At the first evaluation that meets the target; None if none does."""
    for point in record["curve"]:
        step, cpu, wall, flops, quality, _ = point
        if quality is not None and quality >= target:
            return Reached(cpu, wall, flops, step)
    return None


def final_quality(record: Mapping[str, Any]) -> float:
    """At the end; minus infinity where training broke down."""
    quality = record["curve"][-1][CURVE.index("quality")]
    return -math.inf if quality is None or record.get("diverged") else quality


def winner(records: Sequence[Mapping[str, Any]], target: float) -> Settings | None:
    """The settings of the tuning runs that reach a target in the least CPU time.

    In as many runs as possible; among equals the least mean time; and where none
    reaches it, the best quality at the end. A run that has lost the target again at its
    end was lucky at an evaluation, and does not count. Where some settings have more
    seeds than others, only those compete. The seed is that of the first.
    """
    runs: dict[Settings, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["purpose"] == "tune":
            settings = key_of(record).settings._replace(seed=0)
            runs.setdefault(settings, []).append(record)
    mean = lambda numbers: sum(numbers) / len(numbers)

    def merit(settings):
        group = runs[settings]
        final = [final_quality(r) for r in group]
        held = [r for r, quality in zip(group, final, strict=True) if quality >= target]
        times = [t.cpu_s for r in held if (t := time_to(r, target))]
        return len(times) / len(group), -mean(times) if times else 0.0, mean(final)

    most = max(map(len, runs.values()), default=0)
    tried = [settings for settings, group in runs.items() if len(group) == most]
    best = max(tried, key=merit, default=None)
    return best and best._replace(seed=runs[best][0]["seed"])

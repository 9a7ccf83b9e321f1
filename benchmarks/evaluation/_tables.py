"""Tables in Markdown, made from the lines on file alone."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._records import final_quality, time_to
from ._statistics import mean, ratio, Welch, welch


BASELINE = "adam"


def by_policy(
    records: Sequence[Mapping[str, Any]], purpose: str, scale: str
) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each policy at its settings used last, the baseline first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if (record["purpose"], record["scale"]) == (purpose, scale):
            runs = found.setdefault(record["policy"], [])
            if runs and runs[-1]["config"] != record["config"]:
                runs.clear()
            runs.append(record)
    return dict(sorted(found.items(), key=lambda item: item[0] != BASELINE))


def speed_up(
    base: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    target: float,
    measure: str = "cpu_s",
) -> tuple[Welch, str]:
    """How many times as fast a target is reached as by the baseline.

    A run that misses it counts with all that it spent, as it took longer than that. So
    where only one side misses, what is known is a bound, and the sign says which.

    Returns:
      The ratio, and ``"="``, ``"<"`` (the ratio is at most this), ``">"`` or ``"?"``
      (both sides miss).
    """

    def spent(records):
        found = [time_to(r, target) for r in records]
        times = [
            getattr(f, measure) if f else r["totals"][measure]
            for f, r in zip(found, records, strict=True)
        ]
        return times, None in found

    (slow, base_misses), (fast, misses) = spent(base), spent(runs)
    sign = {(0, 0): "=", (0, 1): "<", (1, 0): ">", (1, 1): "?"}
    return ratio(slow, fast), sign[base_misses, misses]


def verdict(found: Welch, sign: str) -> str:
    """What the interval allows to say."""
    if sign == "?":
        return "both miss"
    if sign == "<":
        return "misses" if not found.high < 1 else "misses, slower"
    if math.isnan(found.low):
        return "one run"
    if found.low > 1:
        return "faster"
    if sign == ">":
        return "baseline misses"
    return "slower" if found.high < 1 else "no difference shown"


def time_table(
    records: Sequence[Mapping[str, Any]], target: float, scale: str = "small"
) -> str:
    """CPU seconds to a target, and how they compare with the baseline's."""
    groups = by_policy(records, "test", scale)
    base = groups.get(BASELINE)
    head = (
        "policy | rate | steps | reached | CPU s | ratio to adam (95 %) | p | "
        "FLOPs ratio | quality at the end | verdict"
    )
    rows: list[list[str]] = [list(head.split(" | "))]
    for name, runs in groups.items():
        config = runs[0]["config"]
        times = [t for r in runs if (t := time_to(r, target))]
        cells = [name, f"{config['learning_rate']:.3g}", f"{config['steps']}"]
        cells.append(f"{len(times)} of {len(runs)}")
        cells.append(_pm([t.cpu_s for t in times], 2) if times else "-")
        if name == BASELINE or base is None:
            cells += ["1" if base else "-", "", "1" if base else "-"]
        else:
            found, sign = speed_up(base, runs, target)
            by_flops, flops_sign = speed_up(base, runs, target, "flops")
            cells += [
                _interval(found, sign),
                _p(found.p),
                _interval(by_flops._replace(low=math.nan), flops_sign),
            ]
        cells.append(_pm([final_quality(r) for r in runs], 4))
        if name == BASELINE or base is None:
            cells.append("baseline" if name == BASELINE else "")
        else:
            cells.append(verdict(*speed_up(base, runs, target)))
        rows.append(cells)
    return markdown(rows)


def match_table(records: Sequence[Mapping[str, Any]], scale: str = "small") -> str:
    """Quality where all horizons are stretched to the FLOPs of the baseline."""
    groups = by_policy(records, "match", scale)
    test = by_policy(records, "test", scale)
    if groups and BASELINE in test:
        groups = {BASELINE: test[BASELINE], **groups}
    base = [final_quality(r) for r in groups.get(BASELINE, [])]
    rows = [
        ["policy", "steps", "FLOPs", "CPU s", "quality", "minus adam's (95 %)", "p"]
    ]
    for name, runs in groups.items():
        quality = [final_quality(r) for r in runs]
        totals = [r["totals"] for r in runs]
        cells = [name, f"{runs[0]['config']['steps']}"]
        cells.append(f"{mean([t['flops'] for t in totals]).mean:.3g}")
        cells += [_pm([t["cpu_s"] for t in totals], 2), _pm(quality, 4)]
        if name == BASELINE or not base:
            cells += ["", ""]
        else:
            found = welch(quality, base)
            low_high = f"({found.low:+.4f} to {found.high:+.4f})"
            cells += [f"{found.difference:+.4f} {low_high}", _p(found.p)]
        rows.append(cells)
    return markdown(rows) if len(rows) > 1 else ""


def cost_table(records: Sequence[Mapping[str, Any]], scale: str = "small") -> str:
    """What is outside of the clock, and two counts of FLOPs; means by policy."""
    head = "policy | ms a step | FLOPs a step | by XLA | compile s | kinds of step | "
    head += "evaluation s | data s | peak MB"
    rows: list[list[str]] = [list(head.split(" | "))]
    for name, runs in by_policy(records, "test", scale).items():
        steps = runs[0]["curve"][-1][0] or 1
        # XLA's count is not known where a program had to make room for another.
        known = lambda key, runs=runs: [
            x for r in runs if (x := r["totals"][key]) is not None
        ]
        total = lambda key, known=known: mean(known(key)).mean
        rows.append(
            [
                name,
                f"{1e3 * total('cpu_s') / steps:.2f}",
                f"{total('flops') / steps:.3g}",
                f"{total('xla_flops') / steps:.3g}",
                f"{total('compile_cpu_s'):.1f}",
                f"{total('kinds'):.0f}",
                f"{total('evaluation_s'):.1f}",
                f"{total('data_s'):.1f}",
                f"{total('peak_resident_bytes') / 1e6:.0f}",
            ]
        )
    return markdown(rows)


def report(
    records: Sequence[Mapping[str, Any]],
    targets: Sequence[float],
    scale: str = "small",
) -> str:
    """All tables of a workload."""
    runs = [r for r in records if (r["purpose"], r["scale"]) == ("test", scale)]
    if not runs:
        return "No runs on file."
    parts = []
    for target in targets:
        parts += [f"To quality {target:g}:", time_table(records, target, scale)]
    if matched := match_table(records, scale):
        parts += ["At the baseline's FLOPs:", matched]
    parts += ["Outside of the clock, and by the step:", cost_table(records, scale)]
    machine, versions = runs[-1]["device"], runs[-1]["versions"]
    commits = sorted({f"{r['commit']}"[:8] + "+" * bool(r["dirty"]) for r in runs})
    parts.append(
        f"{len(runs)} runs; one core of {machine['host_cpus']} ({machine['machine']}, "
        f"{machine['platform']}), jax {versions['jax']}; commit {', '.join(commits)} "
        f"(+: with changes)."
    )
    return "\n\n".join(parts)


def write(path: Path, name: str, text: str) -> bool:
    """Puts a text between the markers of its name; whether there are such markers."""
    start, end = f"<!-- table: {name} -->", "<!-- end -->"
    old = path.read_text()
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    new, count = pattern.subn(lambda _: f"{start}\n{text}\n{end}", old)
    path.write_text(new)
    return count > 0


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _pm(x: Sequence[float], digits: int) -> str:
    found = mean(x)
    error = "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}"


def _p(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _sign(sign: str) -> str:
    return {"=": "", "<": "≤", ">": "≥"}[sign]


def _interval(found: Welch, sign: str) -> str:
    if sign == "?":
        return "-"
    width = "" if math.isnan(found.low) else f" ({found.low:.2f} to {found.high:.2f})"
    return f"{_sign(sign)}{found.difference:.2f}{width}"

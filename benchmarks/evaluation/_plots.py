"""Quality against compute, a line for each policy; made from the lines on file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._records import CURVE
from ._tables import by_policy


# Okabe and Ito's, without the yellow.
_COLORS = "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()
_LINES = ["-", "--", "-.", ":"]


def quality_against_compute(
    records: Sequence[Mapping[str, Any]],
    targets: Sequence[float],
    path: Path,
    scale: str = "small",
    policies: Sequence[str] | None = None,
) -> None:
    """Writes a picture of the mean of the seeds, against CPU seconds and FLOPs.

    Qualities far below the easiest target are left out, so that what matters fills the
    picture. Grey lines are the targets.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    best = targets[0]
    for k, (name, runs) in enumerate(by_policy(records, "test", scale).items()):
        if policies is not None and name not in policies:
            continue
        shortest = min(len(r["curve"]) for r in runs)
        values = [[row for row in r["curve"][:shortest]] for r in runs]
        curve = np.array(values, float).mean(0)  # None becomes NaN
        best = max(best, np.nanmax(curve[:, CURVE.index("quality")]))
        style = {
            "color": _COLORS[k % len(_COLORS)],
            "linestyle": _LINES[k // len(_COLORS) % len(_LINES)],
            "label": f"{name} ({len(runs)})",
        }
        for axis, x in zip(axes, ("cpu_s", "flops"), strict=True):
            columns = CURVE.index(x), CURVE.index("quality")
            axis.plot(*curve[1:, columns].T, **style)
    for axis, label in zip(axes, ("CPU seconds of one core", "FLOPs"), strict=True):
        for target in targets:
            axis.axhline(target, color="0.7", linewidth=0.8, zorder=0)
        axis.set_xlabel(label)
    room = max(best - targets[0], 0.05 * abs(targets[0]))
    axes[0].set_ylim(targets[0] - 1.5 * room, best + 0.2 * room)
    axes[0].set_ylabel("quality on held-out data")
    axes[1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""What `PriorityBudget` costs and saves a training step of PyTorch.

At full budget (all is computed and updated) the block is compared to the plain loop;
target: at most 1.03. Then only the layers nearest to the loss are active, so many that
their backward pass is about a quarter of the whole one's FLOPs, next to the same model
frozen by hand; target: at least 0.9 of its speed-up. As the first step of a cycle
computes all gradients, there is also a loop by hand that thaws the model for that step.

Each sample is 50 steps: five cycles of 10, or one of 50. (Of 10 steps the first would
be a large part, which after another loop's turn finds all caches cold; a training run
has no such turns.) All loops run in turns in one process, and JAX has compiled before
the first sample. glibc is told to keep freed memory: else the
loops, which hold and free their gradients in turns, get fresh pages or none by chance,
which makes up to a fifth of a step. What is left of that differs by process: medians of
single ones have gone from 0.99 to 1.08, so several are started, and their rounds put
together. Where others use the machine, too, the CPU time of one thread says more than
the clock on the wall.

    python benchmarks/torch_overhead.py
    python benchmarks/torch_overhead.py --nets mlp --rounds 3 --threads 1 --clock cpu
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import torch
from _timing import keep_memory, parser, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from priorityprop_jax import Score
from priorityprop_jax.torch import PriorityBudget


SHARE = 0.25  # of the FLOPs of the backward pass
SHORT, LONG = 10, 50  # cycles
FULL, FROZEN = "full", "frozen"  # what the others are compared to
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Net(NamedTuple):
    """A stack of layers, from the input to the loss, and a batch."""

    model: nn.Sequential
    x: torch.Tensor
    y: torch.Tensor


def mlp(sizes: list[int], batch: int) -> Net:
    """Dense layers with ReLU."""
    layers = [
        nn.Sequential(nn.ReLU() if i else nn.Identity(), nn.Linear(*sizes[i : i + 2]))
        for i in range(len(sizes) - 1)
    ]
    x, y = torch.randn(batch, sizes[0]), torch.arange(batch) % sizes[-1]
    return Net(nn.Sequential(*layers), x, y)


def cnn(size: int, channels: int, batch: int) -> Net:
    """Four convolutions with BatchNorm, the second and the fourth with stride 2."""
    widths = [3, channels, 2 * channels, 2 * channels, 4 * channels]
    layers: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(*widths[i : i + 2], 3, stride=1 + i % 2, padding=1, bias=False),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(),
        )
        for i in range(len(widths) - 1)
    ]
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    layers.append(nn.Sequential(*pool))
    x, y = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    return Net(nn.Sequential(*layers), x, y)


class Last(nn.Module):
    """The mean over the positions, and the output."""

    def __init__(self, width: int):
        super().__init__()
        self.output = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x.mean(1))


def transformer(blocks: int, width: int, length: int, batch: int) -> Net:
    """Pre-norm, behind an embedding."""
    block = lambda: nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    layers = [nn.Embedding(96, width), *(block() for _ in range(blocks)), Last(width)]
    x = torch.randint(96, (batch, length))
    return Net(nn.Sequential(*layers), x, torch.arange(batch) % 10)


NETS: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp([784, *[512] * 4, 10], batch=128),
    "deep-mlp": lambda: mlp([512] * 13, batch=128),
    "cnn": lambda: cnn(32, channels=16, batch=32),
    "transformer": lambda: transformer(6, 128, 64, batch=12),
}


def flops(net: Net) -> int:
    """Of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(net.model(net.x), net.y).backward()
    net.model.zero_grad()
    return counter.get_total_flops()


def freeze(net: Net, first: int) -> list[nn.Parameter]:
    """Leaves the layers from `first` on; the parameters that are frozen."""
    net.model.requires_grad_(True)
    frozen = [p for layer in net.model[:first] for p in layer.parameters()]
    for p in frozen:
        p.requires_grad_(False)
    return frozen


def split(net: Net) -> tuple[int, float, float]:
    """The layer from which on about `SHARE` of the backward pass is left.

    Returns it with that share, and the speed-up that the FLOPs promise.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.model(net.x)
    forward, full = counter.get_total_flops(), flops(net)
    shares = {}
    for first in range(1, len(net.model)):
        freeze(net, first)
        shares[first] = (flops(net) - forward) / (full - forward)
    net.model.requires_grad_(True)
    best = min(shares, key=lambda first: abs(shares[first] - SHARE))
    share = shares[best]
    return best, share, full / (forward + share * (full - forward))


def loops(make: Callable[[], Net], first: int) -> dict[str, tuple[Callable, int]]:
    """Loops of one cycle by name, with the number of their steps."""

    def start() -> tuple[Net, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = make()
        return net, torch.optim.Adam(net.model.parameters())

    def by_hand(thaw: bool, freezing: bool, steps: int) -> tuple[Callable, int]:
        net, optimizer = start()
        frozen = freeze(net, first) if freezing else []

        def loop():
            for i in range(steps):
                for p in frozen if thaw and i < 2 else ():
                    p.requires_grad_(i == 0)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net.model(net.x), net.y).backward()
                if thaw and i == 0:
                    for p in frozen:  # computed, and not used
                        p.grad = None
                optimizer.step()

        return loop, steps

    def by_budget(steps: int, settings: dict[str, Any]) -> tuple[Callable, int]:
        net, optimizer = start()
        budget = PriorityBudget(
            net.model, optimizer, recalc_every=steps, max_updates=steps, **settings
        )

        def loop():
            for _ in range(steps):
                with budget.step():
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net.model(net.x), net.y).backward()
                    optimizer.step()

        return loop, steps

    net, _ = start()
    parts = [list(layer.parameters()) for layer in net.model]
    resting = sum(map(len, parts[:first]))
    active = sum(map(len, parts)) - resting
    last = Score(
        lambda sizes: (),
        lambda x, state: ((x.index >= resting) * jnp.float32(1), state),
    )
    full = lambda steps: dict(budget=1.0, min_updates=steps)
    part = lambda steps: dict(budget=active * steps, min_updates=0, score=last)
    return {
        FULL: by_hand(False, False, SHORT),
        "full, PriorityBudget": by_budget(SHORT, full(SHORT)),
        FROZEN: by_hand(False, True, SHORT),
        "frozen but for the first of 10": by_hand(True, True, SHORT),
        "PriorityBudget, cycles of 10": by_budget(SHORT, part(SHORT)),
        "PriorityBudget, cycles of 50": by_budget(LONG, part(LONG)),
    }


def measure(
    cases: dict[str, tuple[Callable, int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list]:
    """Seconds of a step, by round."""
    for loop, _ in cases.values():
        loop()  # compiles
    samples: dict[str, list] = {name: [] for name in cases}
    for i in range(rounds):
        for name in list(cases)[:: -1 if i % 2 else 1]:
            loop, steps = cases[name]
            start = clock()
            for _ in range(LONG // steps):
                loop()
            samples[name].append((clock() - start) / LONG)
    return samples


def measure_in_processes(name: str, args: Any) -> dict[str, list]:
    """The same of several processes, one after another."""
    threads = ["--threads", str(args.threads)] if args.threads else []
    own = ["--only", name, "--rounds", str(args.rounds or 3), "--clock", args.clock]
    samples: dict[str, list] = {}
    for _ in range(args.processes):
        command = [sys.executable, __file__, *own, *threads]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        for case, seconds in json.loads(out.splitlines()[-1]).items():
            samples.setdefault(case, []).extend(seconds)
    return samples


def quartiles(x: list[float]) -> dict[str, float]:
    values = statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else 3 * x
    return dict(zip(("low", "median", "high"), values, strict=True))


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    arguments.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments.add_argument("--threads", type=int, help="of torch")
    arguments.add_argument("--note", default="", help="kept in the JSON")
    arguments.add_argument("--processes", type=int, default=5, help="one at a time")
    only = "measures this net here, and prints the seconds"
    arguments.add_argument("--only", choices=NETS, help=only)
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, kept = [], keep_memory()
    if args.only:
        torch.manual_seed(0)
        net = NETS[args.only]
        first, *_ = split(net())
        clock = CLOCKS[args.clock]
        print(json.dumps(measure(loops(net, first), args.rounds or 3, clock)))
        return
    for name in args.nets:
        torch.manual_seed(0)
        first, share, promised = split(NETS[name]())
        samples = measure_in_processes(name, args)
        print(
            f"{name}: active from layer {first} on, {share:.0%} of the backward pass's "
            f"FLOPs, {promised:.2f} times fewer in all"
        )
        print(f"  {'':32}{'ms':>8}{'over full':>11}{'speed-up':>10}{'of frozen':>11}")
        for case, seconds in samples.items():
            to = lambda base: quartiles(
                [a / b for a, b in zip(seconds, samples[base], strict=True)]  # noqa: B023
            )
            over, by_hand = to(FULL), to(FROZEN)
            median = quartiles(seconds)["median"]
            part = 1 / by_hand["median"] if not case.startswith("full") else math.nan
            print(
                f"  {case:32}{median * 1e3:8.2f}{over['median']:11.3f}"
                f"{1 / over['median']:10.2f}{part:11.2f}",
                flush=True,
            )
            rows.append(
                {
                    "net": name,
                    "case": case,
                    "torch": torch.__version__,
                    "clock": args.clock,
                    "threads": torch.get_num_threads(),
                    "seconds": quartiles(seconds),
                    "over_full": over,
                    "over_frozen": by_hand,
                    "backward_share": share,
                    "flops_speedup": promised,
                    "rounds": len(seconds),
                    "processes": args.processes,
                    "memory_kept": kept,
                    "note": args.note,
                }
            )
    print(f"written to {write_json('torch_overhead', rows, args.out)}")


if __name__ == "__main__":
    main()

"""`priorityprop explain`: what a model's leaves cost, before anything is trained.

Nothing is computed: depths and costs are read off the trace of the training step. They
are those that a trainer goes by.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._costs import backward_costs, BackwardCosts
from .._depth import infer_depths
from .._units import layout, natural_key
from ..report import table
from ..training._models import as_functional
from ..training._objective import Objective, resolve_metrics
from ._arguments import complete
from ._data import load, SHAPES
from ._output import Output


def run(args: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Returns:
      The exit code.
    """
    complete(args)
    inputs, labels, classes = _shapes(args)
    costs, depths, leaves = inspect(args, inputs, labels, classes)
    found = {
        "command": "explain",
        "data": args.data,
        "model": args.model,
        "batch_size": args.batch_size,
        **explain(costs, depths, leaves, args.recalc_every),
    }
    if args.budget is not None:
        found["budget"] = args.budget
        found["feasible"] = bool(args.budget >= found["least_budget"])
    out.result(found, _text(found))
    return 0


def _shapes(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Inputs and labels of a batch, without the data where their shape is known."""
    if args.data in SHAPES and args.data_dir is None:
        shape, classes = SHAPES[args.data]
        inputs, labels = jnp.zeros((1, *shape)), jnp.zeros(1, int)
    else:
        data = load(args.data, args.data_dir, args.context)
        (inputs, labels), classes = data.train, data.classes
    size = lambda x: jax.ShapeDtypeStruct((args.batch_size, *x.shape[1:]), x.dtype)
    return size(inputs), size(labels), classes


def inspect(
    args: argparse.Namespace, inputs: Any, labels: Any, classes: int
) -> tuple[BackwardCosts, list[int], dict[str, tuple[int, ...]]]:
    """Costs and depths of the leaves of a model, and their shapes by path.

    Args:
      args: `model`, `width` and `layers`.
      inputs: of a batch, abstract.
      labels: of a batch, abstract.
      classes: how many.
    """
    from . import _models

    module = _models.build(args.model, classes, args.width, args.layers)
    variables = jax.eval_shape(lambda: _models.init(module, inputs, seed=0))
    model = as_functional(module, variables)
    loss = optax.softmax_cross_entropy_with_integer_labels
    metrics = resolve_metrics("accuracy")
    step = Objective(model, loss, False, metrics, None, 0).train
    weights = None
    if not model.couples_examples:  # then batches are padded
        weights = jax.ShapeDtypeStruct(inputs.shape[:1], jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rest = model.state, (inputs, labels), weights, number
    costs = backward_costs(step, model.params, *rest, has_aux=True)
    depths = infer_depths(lambda *args: step(*args)[0], model.params, *rest)
    where = layout(model.params, "leaf")
    leaves = dict(zip(where.names, where.shapes, strict=True))
    return costs, jax.tree.leaves(depths), leaves


def explain(
    costs: BackwardCosts,
    depths: list[int],
    shapes: dict[str, tuple[int, ...]],
    recalc_every: int,
) -> dict[str, Any]:
    """All there is to say, in numbers.

    Args:
      costs: of the leaves.
      depths: of the leaves, 0 at the loss.
      shapes: of the leaves, by path.
      recalc_every: steps in a cycle, of which the first computes all.

    Returns:
      ``"params"``: how many; ``"leaves"``, from the input to the loss;
      ``"truncations"``: for each depth, what a step costs that trains only the leaves
      up to it, and its speed-up, alone and if all steps of a cycle but the first are
      such;
      ``"least_budget"``: the share of a cycle that has but forward passes behind its
      first step.
    """
    full, forward = costs.full, costs.forward
    cycle = lambda step: recalc_every * full / (full + (recalc_every - 1) * step)
    paths, sizes = list(shapes), np.array([np.prod(s) for s in shapes.values()], int)
    order = sorted(
        range(len(depths)), key=lambda i: (-depths[i], natural_key((paths[i],)))
    )
    leaves = [
        {
            "path": paths[i],
            "shape": list(shapes[paths[i]]),
            "depth": depths[i],
            "weight": float(costs.weight[i]),
            "chain": float(costs.chain[i]),
            "share": float(costs.weight[i] + costs.chain[i]) / full,
        }
        for i in order
    ]
    truncations = []
    for depth in sorted(set(depths)):
        active = np.array(depths) <= depth
        step = costs.flops(active)
        truncations.append(
            {
                "depth": depth,
                "leaves": int(active.sum()),
                "params": int(sizes @ active),
                "flops": step,
                "share": step / full,
                "step_speedup": full / step,
                "cycle_speedup": cycle(step),
            }
        )
    return {
        "params": int(sizes.sum()),
        "unit": costs.unit,
        "forward": forward,
        "full": full,
        "recalc_every": recalc_every,
        "leaves": leaves,
        "truncations": truncations,
        "least_budget": 1 / cycle(forward),
    }


def _text(found: dict[str, Any]) -> str:
    leaves, cuts = found["leaves"], found["truncations"]
    head = ["leaf", "shape", "depth", "weight FLOPs", "chain FLOPs", "share"]
    rows = [
        [
            leaf["path"],
            "x".join(map(str, leaf["shape"])),
            str(leaf["depth"]),
            f"{leaf['weight']:,.0f}",
            f"{leaf['chain']:,.0f}",
            f"{leaf['share']:.1%}",
        ]
        for leaf in leaves
    ]
    every, full = found["recalc_every"], found["full"]
    cut_head = ["trained", "leaves", "params", "FLOPs", "of full", "step", "cycle"]
    cut_rows = [
        [
            f"depth 0 to {cut['depth']}" if cut["depth"] else "depth 0",
            str(cut["leaves"]),
            f"{cut['params']:,}",
            f"{cut['flops']:,.0f}",
            f"{cut['share']:.1%}",
            f"{cut['step_speedup']:.2f}x",
            f"{cut['cycle_speedup']:.2f}x",
        ]
        for cut in cuts
    ]
    lines = [
        f"{found['data']}, {found['model']}: {found['params']:,} params in "
        f"{len(leaves)} leaves, batches of {found['batch_size']}",
        "",
        table([head, *rows], left=2),
        "share: the backward pass if a leaf alone is trained, of training all",
        f"forward {found['forward']:,.0f} FLOPs, training all leaves {full:,.0f} "
        f"({full / found['forward']:.2f}x)",
        "",
        table([cut_head, *cut_rows]),
        "step: how many times as many FLOPs a step of full training takes, the most "
        "that it can be faster",
        f"cycle: the same for {every} steps, of which the first is a full one",
        f"least share of FLOPs that a budget can be: {found['least_budget']:.3f}, for "
        f"one full step and {every - 1} forward passes",
    ]
    if "budget" in found:
        answer = "can" if found["feasible"] else "cannot"
        lines.append(f"a budget of {found['budget']:g} {answer} be kept")
    return "\n".join(lines)

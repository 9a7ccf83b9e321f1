"""Who trains: an `Arm` makes a `Program`, which is a step and what it has spent.

Most arms are "`make_train_step` with this transformation" or "a jitted step with this
optimizer". Nothing is kept between two runs, compiled programs neither.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from priorityprop_jax import (
    backward_costs,
    BackwardCosts,
    infer_depths,
    make_train_step,
    prioritize,
    priority_prop,
    Score,
)
from priorityprop_jax.presets import from_scratch

from ._workload import Workload


CYCLE = 10  # steps, as published
BLOCK_CYCLE = 50  # steps for which BAdam keeps to a block
MAX_VARIANTS = 16  # programs of a run


class Settings(NamedTuple):
    """What a run is started with."""

    learning_rate: float
    steps: int  # the horizon, at which the learning rate is zero
    batch_size: int
    seed: int


class Program(NamedTuple):
    """A training run.

    Attributes:
      state: at the start; carries everything.
      step: (state, i, batch) -> state, for i = 0, 1, ...
      params: state -> the params to be judged.
      flops: state -> spent so far, by our account: forward passes and gradients, by
        `backward_costs`. The optimizer is not in it.
      kind: state -> what the last step was. Steps of a kind run the same program.
      xla_flops: (state, batch) -> spent so far, as counted by XLA, optimizer included;
        None if not known.
    """

    state: Any
    step: Callable[[Any, int, Any], Any]
    params: Callable[[Any], Any]
    flops: Callable[[Any], float]
    kind: Callable[[Any], Hashable] = lambda state: None
    xla_flops: Callable[[Any, Any], float | None] = lambda state, batch: None


class Arm(NamedTuple):
    """A way to train.

    Attributes:
      name: what tables call it.
      start: (workload, settings) -> `Program`.
      learning_rate: the only one, for an arm that is not tuned; None: the grid.
      about: a line for the table of arms.
    """

    name: str
    start: Callable[[Workload, Settings], Program]
    learning_rate: float | None = None
    about: str = ""


def schedule(workload: Workload, settings: Settings) -> optax.Schedule:
    """Warm-up where the workload wants one, then down to zero at the horizon."""
    steps, peak = settings.steps, settings.learning_rate
    warm = round(workload.warmup * steps)
    if workload.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(steps - warm, 1))
    else:
        decay = optax.linear_schedule(peak, 0.0, max(steps - warm, 1))
    if not warm:
        return decay
    rise = optax.linear_schedule(peak / warm, peak, warm)
    return optax.join_schedules([rise, decay], [warm])


def first_batch(workload: Workload, settings: Settings) -> Any:
    """For shapes; the same as the first that a run is given."""
    return next(iter(workload.batches(settings.seed, settings.batch_size, 1)))


@functools.lru_cache(maxsize=64)
def costs_of(workload: Workload, batch_size: int) -> BackwardCosts:
    """FLOPs of a training step, by leaf."""
    batch = first_batch(workload, Settings(0.0, 1, batch_size, 0))
    return backward_costs(workload.loss, workload.init(0), batch)


def compiled_flops(jitted: Any, *arguments: Any) -> float:
    """Of one call, as counted by XLA. What was compiled is not compiled again."""
    return (jitted.lower(*arguments).compile().cost_analysis() or {}).get("flops", 0.0)


def _fresh(workload: Workload, settings: Settings) -> Any:
    """The params at the start, in memory that the run may reuse."""
    return jax.tree.map(jnp.array, workload.init(settings.seed))


class Run(NamedTuple):
    """The state of most programs."""

    params: Any
    opt_state: Any
    steps: int = 0
    kind: Hashable = None


# --- optimizers that train everything at every step


def plain(
    name: str,
    optimizer: Callable[[Workload, Settings], optax.GradientTransformation],
    judged: Callable[[Any, Any], Any] = lambda opt_state, params: params,
    learning_rate: float | None = None,
    about: str = "",
) -> Arm:
    """A jitted step; `judged` makes of state and params those to be judged."""

    def start(workload, settings):
        tx, costs = optimizer(workload, settings), costs_of(*_size(workload, settings))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, opt_state, batch):
            gradient = jax.grad(workload.loss)(params, batch)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def step(run, i, batch):
            params, opt_state = update(run.params, run.opt_state, batch)
            return Run(params, opt_state, run.steps + 1)

        def xla_flops(run, batch):
            return run.steps * compiled_flops(update, run.params, run.opt_state, batch)

        params = _fresh(workload, settings)
        return Program(
            Run(params, tx.init(params)),
            step,
            lambda run: judged(run.opt_state, run.params),
            lambda run: run.steps * costs.full,
            xla_flops=xla_flops,
        )

    return Arm(name, start, learning_rate, about)


def _size(workload: Workload, settings: Settings) -> tuple[Workload, int]:
    return workload, settings.batch_size


def _adam(workload: Workload, settings: Settings) -> optax.GradientTransformation:
    return optax.adam(schedule(workload, settings), b2=workload.b2)


def _published(workload: Workload, settings: Settings) -> Any:
    """The published defaults: 100 updates a cycle of 10 steps, 1 to 20 for a leaf."""
    depths = _depths(workload, settings)
    first = priority_prop(budget=100, depths=depths)
    return optax.chain(first, _adam(workload, settings))


def _schedule_free(workload: Workload, settings: Settings) -> Any:
    """The learning rate does not decay: that is the point."""
    warm = max(1, round(max(workload.warmup, 0.05) * settings.steps))
    make = optax.contrib.schedule_free_adamw
    return make(settings.learning_rate, warmup_steps=warm, b2=workload.b2)


def _muon(workload: Workload, settings: Settings) -> Any:
    """Muon for the hidden matrices and kernels; Adam for embeddings, head and vectors.

    With `consistent_rms` its steps are as large as Adam's, so that the grid of learning
    rates is one for both.
    """
    depths = jax.tree_util.tree_leaves_with_path(_depths(workload, settings))
    heads = {jax.tree_util.keystr(path) for path, depth in depths if not depth}

    def numbers(path, leaf):
        name = jax.tree_util.keystr(path)
        embeds = "embed" in name or "position" in name
        if leaf.ndim < 2 or name in heads or embeds:
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return optax.contrib.muon(
        schedule(workload, settings),
        adam_b2=workload.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            numbers, params
        ),
    )


# --- budgets


def budgeted(
    name: str,
    transformation: Callable[[Workload, Settings], optax.GradientTransformation],
    about: str = "",
) -> Arm:
    """`make_train_step` with a transformation that holds a schedule."""

    def start(workload, settings):
        costs = costs_of(*_size(workload, settings))
        tx = transformation(workload, settings)
        update = make_train_step(
            workload.loss,
            tx,
            mode="static",
            max_variants=MAX_VARIANTS,
            compile_ahead=False,  # its threads would compile on the clock of others
        )
        params = _fresh(workload, settings)
        state = tx.init(params)
        cycle = optax.tree.get(state, "rank").size

        def step(run, i, batch):
            params, opt_state, metrics = update(run.params, run.opt_state, batch)
            kind = metrics.due.tobytes() if i % cycle else "first"
            return Run(params, opt_state, run.steps + 1, kind)

        def flops(run):
            counted = update.computed.items()
            return sum(n * costs.flops(list(mask.leaves)) for mask, n in counted)

        def xla_flops(run, batch):
            # Where all leaves are computed, the first step of a cycle is another
            # program than the later ones.
            left, total = dict(update.computed), 0.0
            firsts = -(-run.steps // cycle)
            for variant, jitted in update.variants.items():
                n = left.pop(variant.mask, 0)
                if variant.kind == "first":
                    left[variant.mask], n = n - firsts, firsts
                if n:
                    arguments = run.params, run.opt_state, batch
                    total += n * compiled_flops(jitted, *arguments)
            return total if not any(left.values()) else None

        return Program(
            Run(params, state),
            step,
            lambda run: run.params,
            flops,
            lambda run: run.kind,
            xla_flops,
        )

    return Arm(name, start, about=about)


def _depths(workload: Workload, settings: Settings) -> Any:
    params = workload.init(settings.seed)
    return infer_depths(workload.loss, params, first_batch(workload, settings))


def _prioritized(workload, settings, budget, costs=False, cycle=CYCLE, **options):
    """`prioritize` around Adam: at most one update of a leaf in a step."""
    bounds = {"min_updates": 1, "max_updates": cycle, "recalc_every": cycle}
    known = costs_of(*_size(workload, settings)) if costs else None
    return prioritize(
        _adam(workload, settings),
        budget,
        **{**bounds, "depths": _depths(workload, settings), "costs": known, **options},
    )


def _of(**options: Any) -> Callable[[Workload, Settings], Any]:
    return lambda workload, settings: _prioritized(workload, settings, **options)


# The formula but for the counts: |gradient| x depth factor.
_WITHOUT_COUNT = Score(
    lambda magnitudes: (), lambda x, state: (x.magnitudes * x.depth_factors, state)
)


def _preset(workload: Workload, settings: Settings) -> Any:
    """`presets.from_scratch`."""
    costs = costs_of(*_size(workload, settings))
    seen = settings.steps * settings.batch_size
    # Examples made afresh for each step never come twice.
    epochs = seen / workload.examples if workload.examples else 1.0
    adam = functools.partial(optax.adam, b2=workload.b2)
    rate, steps = schedule(workload, settings), settings.steps
    return from_scratch(adam, rate, steps, costs, epochs, cycle=CYCLE).tx


def _lisa(workload: Workload, settings: Settings) -> Any:
    """LISA (Pan et al., 2024): who is trained is drawn anew for each cycle."""
    options = {"score": "random", "min_updates": 0, "seed": settings.seed}
    return _prioritized(workload, settings, 0.5, **options)


def _badam(workload: Workload, settings: Settings) -> Any:
    """BAdam (Luo et al., 2024): one layer after another, each with a fresh state."""
    group = np.array(_groups(workload, settings))
    sizes, turns = np.bincount(group), int(group.max()) + 1

    def scores(x, state):
        mine = jnp.asarray(group)[x.index] == x.cycle % turns
        return mine.astype(jnp.float32), state

    def budget(step):  # all steps of the cycle, for the leaves of this layer
        turn = step // BLOCK_CYCLE % turns
        return BLOCK_CYCLE * jnp.asarray(sizes, jnp.int32)[turn]

    return _prioritized(
        workload,
        settings,
        budget,
        cycle=BLOCK_CYCLE,
        score=Score(lambda magnitudes: (), scores),
        min_updates=0,
        resting="reset",
    )


# --- freezing from the input on


class Frozen(NamedTuple):
    """The state of a program that freezes the layers next to the input, for good."""

    trained: dict[int, jax.Array]  # leaves by their number
    resting: dict[int, jax.Array]
    opt_state: Any  # a ScaleByAdamState of the trained ones
    sizes: dict[int, jax.Array]  # sum of squared gradients since the last decision
    steps: dict[int, int]  # taken with so many layers frozen
    frozen: int = 0
    before: Any = None  # sizes of the layers at the last decision


def freezing(
    name: str,
    rates: Callable[[Workload, Settings, np.ndarray], Callable[[Any], Any]],
    decide: Callable[[Settings, Frozen, int, np.ndarray], tuple[int, Any]],
    watch: bool = False,
    about: str = "",
) -> Arm:
    """Adam on the layers that are not frozen yet, and a program for each number.

    Args:
      name: of the arm.
      rates: (workload, settings, layer of each leaf) -> a function from the step
        (traced) to a learning rate for each leaf.
      decide: (settings, state, step, layer of each leaf) -> how many layers are frozen
        from now on, and what to keep in `Frozen.before`.
      watch: whether `decide` looks at `Frozen.sizes`.
      about: a line.
    """

    def start(workload, settings):
        costs = costs_of(*_size(workload, settings))
        layer = np.array(_groups(workload, settings))
        rate = rates(workload, settings, layer)
        adam = optax.scale_by_adam(b2=workload.b2)
        leaves, treedef = jax.tree.flatten(_fresh(workload, settings))
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

        def loss(trained, resting, batch):
            parts = {**trained, **resting}
            ordered = [parts[i] for i in range(len(parts))]
            return workload.loss(treedef.unflatten(ordered), batch)

        @functools.partial(jax.jit, donate_argnums=(0, 2, 3))
        def update(trained, resting, opt_state, sizes, i, batch):
            gradient: Any = jax.grad(loss)(trained, resting, batch)
            sizes = {k: sizes[k] + jnp.sum(gradient[k] ** 2) for k in sizes}
            adams: Any
            adams, opt_state = adam.update(gradient, opt_state)
            now = rate(i)
            updates = {k: -now[k] * u for k, u in adams.items()}
            return optax.apply_updates(trained, updates), opt_state, sizes

        def arguments(state, i, batch):
            parts = state.trained, state.resting, state.opt_state, state.sizes
            return *parts, np.int32(i), batch

        def step(state, i, batch):
            frozen, before = decide(settings, state, i, layer)
            state = _freeze(state._replace(before=before), frozen, layer)
            trained, opt_state, sizes = update(*arguments(state, i, batch))
            steps = {**state.steps, frozen: state.steps.get(frozen, 0) + 1}
            return state._replace(
                trained=trained, opt_state=opt_state, sizes=sizes, steps=steps
            )

        def params(state):
            parts = {**state.trained, **state.resting}
            return treedef.unflatten([parts[i] for i in range(len(parts))])

        def flops(state):
            steps = state.steps.items()
            return sum(n * costs.flops(layer >= frozen) for frozen, n in steps)

        def begin(leaves):
            trained = dict(enumerate(leaves))
            sizes = {i: jnp.zeros([]) for i in trained} if watch else {}
            return Frozen(trained, {}, adam.init(trained), sizes, {})

        def xla_flops(state, batch):
            total, initial = 0.0, jax.eval_shape(begin, shapes)
            for frozen, n in state.steps.items():
                then = arguments(_freeze(initial, frozen, layer), 0, batch)
                total += n * compiled_flops(update, *then)
            return total

        last = lambda state: state.frozen
        return Program(begin(leaves), step, params, flops, last, xla_flops)

    return Arm(name, start, about=about)


def _freeze(state: Frozen, frozen: int, layer: np.ndarray) -> Frozen:
    """Puts leaves to rest, and forgets their optimizer state."""
    if frozen == state.frozen:
        return state
    keep = lambda tree: {i: x for i, x in tree.items() if layer[i] >= frozen}
    rest = {i: x for i, x in state.trained.items() if layer[i] < frozen}
    adam = state.opt_state
    return state._replace(
        trained=keep(state.trained),
        resting={**state.resting, **rest},
        opt_state=adam._replace(mu=keep(adam.mu), nu=keep(adam.nu)),
        sizes=keep(state.sizes),
        frozen=frozen,
    )


def _groups(workload: Workload, settings: Settings, most: int = 8) -> list[int]:
    """The layer of each leaf, 0 next to the input; neighbors share one if many."""
    depths = jax.tree.leaves(_depths(workload, settings))
    known = sorted(set(depths), reverse=True)
    count = min(most, len(known))
    return [known.index(d) * count // len(known) for d in depths]


def freeze_times(layers: int, first: float) -> np.ndarray:
    """Shares of the run after which layers freeze: cubes, spaced evenly at the root."""
    if layers == 1:
        return np.ones(1)
    roots = np.linspace(first ** (1 / 3), 1.0, layers)
    return roots**3


def _freeze_out(name: str, first: float) -> Arm:
    """FreezeOut (Brock et al., 2017): each layer has a horizon of its own."""

    def times(settings, layer):
        return np.rint(freeze_times(layer.max() + 1, first) * settings.steps)

    def rates(workload, settings, layer):
        ends = jnp.asarray(times(settings, layer)[layer], jnp.float32)
        warm = max(round(workload.warmup * settings.steps), 1)

        def rate(i):
            share = jnp.minimum(i / ends, 1.0)
            peak = settings.learning_rate * jnp.minimum((i + 1) / warm, 1.0)
            return peak * 0.5 * (1 + jnp.cos(np.pi * share))

        return rate

    def decide(settings, state, i, layer):
        return int(np.sum(times(settings, layer)[:-1] <= i)), None

    about = f"FreezeOut, the first layer until {first:.0%} of the run"
    return freezing(name, rates, decide, about=about)


def _auto_freeze(name: str, percentile: float = 50, decisions: int = 20) -> Arm:
    """AutoFreeze (Liu et al., 2021): who changes least is frozen, from the input on.

    At intervals, for each layer that is still trained, by how much the norm of its
    gradients has changed since the last interval, relatively. The layers at the start
    of the net that are below the percentile freeze.
    """

    def rates(workload, settings, layer):
        at = schedule(workload, settings)
        return lambda i: jnp.full(len(layer), at(i))

    def decide(settings, state, i, layer):
        every = max(settings.steps // decisions, 1)
        if i % every or not i:
            return state.frozen, state.before
        total = np.zeros(layer.max() + 1)
        for leaf, size in jax.device_get(state.sizes).items():
            total[layer[leaf]] += size
        if state.before is None:
            return 0, (total, np.sqrt(total))
        total_before, norm_before = state.before
        norm = np.sqrt(np.maximum(total - total_before, 0.0))
        change = np.abs(norm - norm_before) / np.maximum(norm_before, 1e-30)
        bound, frozen = np.percentile(change[state.frozen :], percentile), state.frozen
        while frozen < len(change) - 1 and change[frozen] < bound:
            frozen += 1
        return frozen, (total, norm)

    about = f"AutoFreeze, percentile {percentile:g}, {decisions} decisions"
    return freezing(name, rates, decide, watch=True, about=about)


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        plain("adam", _adam, about="Adam, tuned: the baseline"),
        plain("adam_default", _adam, learning_rate=1e-3, about="Adam at 1e-3"),
        plain(
            "priority_prop",
            _published,
            about="as published: 100 updates a cycle, before Adam; saves nothing",
        ),
        *(
            budgeted(f"prioritize_{b}", _of(budget=b / 100), about=f"{b} % of updates")
            for b in (25, 50, 75)
        ),
        *(
            budgeted(
                f"costs_{b}", _of(budget=b / 100, costs=True), about=f"{b} % of FLOPs"
            )
            for b in (50, 65, 80)
        ),
        budgeted(
            "no_count",
            _of(budget=0.65, costs=True, score=_WITHOUT_COUNT),
            about="costs_65 without 1 / count",
        ),
        budgeted(
            "no_depth",
            _of(budget=0.65, costs=True, depth_factor=0.0),
            about="costs_65 without the depth factor",
        ),
        budgeted("random", _lisa, about="LISA: 50 % of updates, drawn at random"),
        budgeted("cyclic", _badam, about="BAdam: a layer at a time, 50 steps"),
        budgeted(
            "taylor",
            _of(budget=0.65, costs=True, magnitude="taylor", score="gradient"),
            about="ElasticTrainer's gain, 65 % of FLOPs",
        ),
        budgeted("from_scratch", _preset, about="the preset for training from scratch"),
        _freeze_out("freezeout", 0.5),
        _freeze_out("freezeout_80", 0.8),
        _auto_freeze("autofreeze"),
        plain(
            "schedule_free_adamw",
            _schedule_free,
            lambda opt_state, params: optax.contrib.schedule_free_eval_params(
                opt_state, params
            ),
            about="Schedule-Free AdamW: no decay",
        ),
        plain("muon", _muon, about="Muon, with Adam for embeddings, head and vectors"),
    )
}

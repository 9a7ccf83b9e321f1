"""What leaving out the work saves: train steps in which some layers rest.

Four nets, five masks, and four train steps for each, measured in turns:

* full: `jax.value_and_grad` and `optax.adam`, of everything;
* optimum: the best that can be written by hand for this mask. The active subtree alone
  is differentiated, Adam is run on it alone, all else is passed through;
* static: `value_and_grad(loss)(..., active=mask)` of this package, with the mask known
  to the program, and Adam as in the optimum;
* dynamic: the same with the mask as an argument of the step, one program for all masks,
  and Adam behind a `lax.cond` for each leaf.

Params and state are donated. The same again for the gradients alone: those of active
leaves, from the optimum and static; dynamic has to write zeros for the others, so there
is an optimum that writes them, too. Then what it takes to trace, lower and compile the
gradients of the transformer; and the temporary memory of the static step, as more and
more of the first layers rest.

Where static and the optimum compile to the same program, any difference between them is
that of the machine; the table says so.

Targets: static at least 0.97 of the speed of the optimum; dynamic at least 0.92 of it
if the layers at rest are the first ones, and at most 1.05 of the time of the full step
if none is; to compile at most 1.5 (static) and 3 (dynamic) of what jax takes; memory
falls.

glibc is told to keep freed memory, as in `overhead.py`: a full step has more of it, and
would seem slower.
"""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _timing import (
    as_rows,
    Case,
    compare,
    cycle_of_steps,
    keep_memory,
    parser,
    print_table,
    Quartiles,
    ratio,
    Timing,
    write_json,
)
from jax import lax

from priorityprop_jax import value_and_grad


ADAM = optax.adam(1e-3)
TARGETS = {"static": 0.97, "dynamic": 0.92, "dynamic, all active": 1.05}
COMPILE_TARGETS = {"static": 1.5, "dynamic": 3.0}


# Nets. Params are a dict of layers, in the order from the input to the loss.


class Net(NamedTuple):
    """`loss(params, batch)` is a scalar."""

    loss: Callable[[Any, Any], jax.Array]
    params: dict[str, Any]
    batch: Any
    steps: int = 10  # in a sample


def layers(parts: Sequence[Any]) -> dict[str, Any]:
    """Names that sort in order."""
    return {f"layer_{i}": part for i, part in enumerate(parts)}


def normal(seed: int, *shape: int) -> jax.Array:
    """Weights for inputs of unit variance."""
    return jax.random.normal(jax.random.key(seed), shape) / math.prod(shape[:-1]) ** 0.5


def dense(seed: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"w": normal(seed, inputs, outputs), "b": jnp.zeros(outputs)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(sizes: Sequence[int], batch: int, steps: int = 10) -> Net:
    """Dense layers with ReLU."""

    def loss(params, batch):
        x, labels = batch
        for i in range(len(params)):
            x = x if i == 0 else jax.nn.relu(x)
            x = x @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"]
        return cross_entropy(x, labels)

    params = layers([dense(i, *sizes[i : i + 2]) for i in range(len(sizes) - 1)])
    x = jax.random.normal(jax.random.key(1), (batch, sizes[0]))
    return Net(loss, params, (x, jnp.arange(batch) % sizes[-1]), steps)


def cnn(size: int, channels: int, batch: int, steps: int = 10) -> Net:
    """Three convolutions, the second with stride 2, and a dense layer."""
    strides = 1, 2, 1

    def loss(params, batch):
        x, labels = batch
        for i, stride in enumerate(strides):
            layer = params[f"layer_{i}"]
            x = lax.conv_general_dilated(
                x,
                layer["w"],
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + layer["b"])
        last = params[f"layer_{len(strides)}"]
        return cross_entropy(x.mean((1, 2)) @ last["w"] + last["b"], labels)

    widths = 1, channels, 2 * channels, 2 * channels
    convolutions = [
        {"w": normal(i, 3, 3, *widths[i : i + 2]), "b": jnp.zeros(widths[i + 1])}
        for i in range(len(strides))
    ]
    params = layers([*convolutions, dense(9, widths[-1], 10)])
    x = jax.random.normal(jax.random.key(1), (batch, size, size, 1))
    return Net(loss, params, (x, jnp.arange(batch) % 10), steps)


def transformer(
    blocks: int,
    width: int,
    length: int,
    batch: int,
    vocabulary: int = 96,
    heads: int = 4,
    tied: bool = False,
    steps: int = 10,
) -> Net:
    """Pre-norm, causal, tanh-GELU. The first layer embeds, the last is the output."""

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def attention(p, x):
        split = lambda y: y.reshape(*y.shape[:-1], heads, width // heads)
        q, k, v = (split(x @ p[name]) for name in "qkv")
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / (width // heads) ** 0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        y = jnp.einsum("bhst,bthd->bshd", weights, v)
        return y.reshape(x.shape) @ p["o"]

    def block(p, x):
        x = x + attention(p, norm(p["norm_1"], x))
        h = jax.nn.gelu(norm(p["norm_2"], x) @ p["up"]["w"] + p["up"]["b"])
        return x + h @ p["down"]["w"] + p["down"]["b"]

    def loss(params, batch):
        tokens, targets = batch
        first, *middle, last = (params[f"layer_{i}"] for i in range(len(params)))
        x = first["tokens"][tokens] + first["positions"]
        for p in middle:
            x = block(p, x)
        output = first["tokens"].T if tied else last["w"]
        return cross_entropy(norm(last["norm"], x) @ output, targets)

    def make_norm():
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def make_block(seed):
        square = {n: normal(seed + i, width, width) for i, n in enumerate("qkvo")}
        return square | {
            "norm_1": make_norm(),
            "norm_2": make_norm(),
            "up": dense(seed + 4, width, 4 * width),
            "down": dense(seed + 5, 4 * width, width),
        }

    first = {
        "tokens": normal(1, vocabulary, width),
        "positions": normal(2, length, width),
    }
    last = {"norm": make_norm()}
    if not tied:
        last["w"] = normal(3, width, vocabulary)
    params = layers([first, *(make_block(10 * i) for i in range(1, blocks + 1)), last])
    text = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)
    return Net(loss, params, (text[:, :-1], text[:, 1:]), steps)


NETS: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp([784, *[512] * 4, 10], batch=128),
    "deep-mlp": lambda: mlp([512] * 9, batch=256, steps=5),
    "cnn": lambda: cnn(28, channels=32, batch=64, steps=2),
    "transformer": lambda: transformer(4, 128, 64, batch=12, steps=2),
    "tied-transformer": lambda: transformer(4, 128, 64, 12, tied=True, steps=2),
}
QUICK: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp([6, 8, 8, 8, 8, 10], batch=4, steps=1),
    "deep-mlp": lambda: mlp([8] * 9, batch=4, steps=1),
    "cnn": lambda: cnn(6, channels=2, batch=2, steps=1),
    "transformer": lambda: transformer(1, 8, 4, 2, 7, 2, steps=1),
    "tied-transformer": lambda: transformer(1, 8, 4, 2, 7, 2, tied=True, steps=1),
}
DEFAULT_NETS = "mlp", "deep-mlp", "cnn", "transformer"


# Masks: for each layer, of n, whether it is active.
MASKS: dict[str, Callable[[int], list[bool]]] = {
    "all": lambda n: [True] * n,
    "last": lambda n: [i == n - 1 for i in range(n)],
    "last-half": lambda n: [i >= n - n // 2 for i in range(n)],
    "scattered-half": lambda n: [i % 2 == 0 for i in range(n)],
    "first": lambda n: [i == 0 for i in range(n)],
}
OF_A_PREFIX = "last", "last-half"


def mask_of(params: dict[str, Any], active: Sequence[bool]) -> Any:
    """A Python bool for each leaf."""
    return {
        name: jax.tree.map(lambda _, on=on: on, layer)
        for (name, layer), on in zip(params.items(), active, strict=True)
    }


def pick(mask: Any, tree: Any) -> list[Any]:
    """The active leaves."""
    flags = jax.tree.leaves(mask)
    return [x for x, on in zip(jax.tree.leaves(tree), flags, strict=True) if on]


def put(mask: Any, tree: Any, parts: Sequence[Any]) -> Any:
    """`tree` with other active leaves."""
    given = iter(parts)
    return jax.tree.map(lambda x, on: next(given) if on else x, tree, mask)


# Gradients: `(params, batch, mask) -> (value, gradients)`, by a static mask those of
# active leaves only.


def full_gradients(net: Net) -> Callable[..., Any]:
    return jax.value_and_grad(net.loss)


def optimum_gradients(net: Net, mask: Any) -> Callable[..., Any]:
    def gradients(params, batch):
        def loss(parts):
            return net.loss(put(mask, params, parts), batch)

        return jax.value_and_grad(loss)(pick(mask, params))

    return gradients


def zeros_gradients(net: Net, mask: Any) -> Callable[..., Any]:
    """The optimum, returning zeros for what rests, as `value_and_grad` has to."""
    optimum = optimum_gradients(net, mask)

    def gradients(params, batch):
        value, found = optimum(params, batch)
        return value, put(mask, jax.tree.map(jnp.zeros_like, params), found)

    return gradients


def static_gradients(net: Net, mask: Any) -> Callable[..., Any]:
    def gradients(params, batch):
        value, found = value_and_grad(net.loss)(params, batch, active=mask)
        return value, pick(mask, found)

    return gradients


def dynamic_gradients(net: Net) -> Callable[..., Any]:
    def gradients(params, batch, mask):
        return value_and_grad(net.loss)(params, batch, active=mask)

    return gradients


# Steps: `(params, (state, value), batch, ...) -> (params, (state, value))`.


def full_step(net: Net) -> Callable[..., Any]:
    gradients = full_gradients(net)

    def step(params, state, batch):
        value, found = gradients(params, batch)
        updates, state = ADAM.update(found, state[0], params)
        return optax.apply_updates(params, updates), (state, value)

    return step


def static_step(gradients: Callable[..., Any], mask: Any) -> Callable[..., Any]:
    """Adam for active leaves; all that belongs to others is passed through."""

    def step(params, state, batch):
        value, found = gradients(params, batch)
        moments, rest = state[0]
        mu, nu = pick(mask, moments.mu), pick(mask, moments.nu)
        some = moments._replace(mu=mu, nu=nu)
        updates, (new, rest) = ADAM.update(found, (some, rest))
        moved = optax.apply_updates(pick(mask, params), updates)
        mu, nu = put(mask, moments.mu, new.mu), put(mask, moments.nu, new.nu)
        new = new._replace(mu=mu, nu=nu)
        return put(mask, params, moved), ((new, rest), value)

    return step


def dynamic_step(net: Net) -> Callable[..., Any]:
    """Adam behind a `cond` for each leaf."""
    gradients = dynamic_gradients(net)

    def step(params, state, batch, mask):
        value, found = gradients(params, batch, mask)
        moments, rest = state[0]

        def leaf(on, p, g, m, v):
            def move():
                some = moments._replace(mu=m, nu=v)
                u, (new, _) = ADAM.update(g, (some, rest))
                return optax.apply_updates(p, u), new.mu, new.nu

            return lax.cond(on, move, lambda: (p, m, v))

        moved = jax.tree.map(leaf, mask, params, found, moments.mu, moments.nu)
        part = lambda i: jax.tree.map(lambda _, x: x[i], params, moved)
        count = optax.safe_increment(moments.count)
        new = moments._replace(count=count, mu=part(1), nu=part(2))
        return part(0), ((new, rest), value)

    return step


# What is measured.


def steps_of(net: Net, shared: Mapping[str, Callable], active: Sequence[bool]):
    """The four steps as cases. `shared` has those that are the same for all masks."""
    mask = mask_of(net.params, active)
    state = ADAM.init(net.params), jnp.zeros(())
    given = net.params, state, net.batch
    case = lambda step, *more: cycle_of_steps(step, *given, *more, steps=net.steps)
    return {
        "full": case(shared["full"]),
        "optimum": case(static_step(optimum_gradients(net, mask), mask)),
        "static": case(static_step(static_gradients(net, mask), mask)),
        "dynamic": case(shared["dynamic"], jax.tree.map(jnp.bool_, mask)),
    }


def gradients_of(net: Net, shared: Mapping[str, Callable], active: Sequence[bool]):
    """The same of the gradients alone."""
    mask = mask_of(net.params, active)
    given = net.params, net.batch
    traced = jax.tree.map(jnp.bool_, mask)
    return {
        "full": Case(shared["full gradients"], given),
        "optimum": Case(jax.jit(optimum_gradients(net, mask)), given),
        "zeros": Case(jax.jit(zeros_gradients(net, mask)), given),
        "static": Case(jax.jit(static_gradients(net, mask)), given),
        "dynamic": Case(shared["dynamic gradients"], (*given, traced)),
    }


def compiled(case: Case) -> Any:
    """As `jax.jit` compiles it."""
    if case.jitted is None:
        return case.function.lower(*case.arguments).compile()
    return case.jitted.lower(*case.jitted_arguments).compile()


def program(case: Case) -> str:
    """The compiled program, without names and places in the source."""
    text = compiled(case).as_text()
    text = text[text.index("\n%") :] if "\n%" in text else text
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    numbers: dict[str, str] = {}
    number = lambda m: numbers.setdefault(m[0], f"%{len(numbers)}")
    return re.sub(r"%[\w.\-]+", number, text)


class Cell(NamedTuple):
    """A net and a mask."""

    net: str
    mask: str
    what: str  # "step" or "gradients"
    timings: dict[str, Timing]
    same: bool  # whether static is the program of the optimum

    def speed(self, name: str, base: str) -> Quartiles:
        """How many times as fast as the base."""
        return ratio(self.timings[base], self.timings[name])


def measure(cell: Cell, cases: Mapping[str, Case], rounds: int, seconds: float):
    """Times the cases; the cell, and rows for the file."""
    timings = compare(cases, rounds, seconds)
    same = program(cases["static"]) == program(cases["optimum"])
    cell = cell._replace(timings={t.name: t for t in timings}, same=same)
    rows = as_rows(timings, net=cell.net, mask=cell.mask, what=cell.what)
    for row in rows:
        name = row["name"]
        row["speed_over_full"] = cell.speed(name, "full")._asdict()
        row["speed_over_optimum"] = cell.speed(name, "optimum")._asdict()
        found = compiled(cases[name]).memory_analysis()
        row["temporary_bytes"] = getattr(found, "temp_size_in_bytes", None)
        if name == "static":
            row["same_program_as_optimum"] = same
    print_table(timings)
    return cell, rows


def judge(cell: Cell) -> list[str]:
    """The targets of a step, and whether they are met."""
    of_optimum = lambda name: cell.speed(name, "optimum").median
    found = []
    if not cell.same:
        found.append(("static", of_optimum("static"), ">=", TARGETS["static"]))
    if cell.mask in OF_A_PREFIX:
        found.append(("dynamic", of_optimum("dynamic"), ">=", TARGETS["dynamic"]))
    if cell.mask == "all":
        time = cell.speed("full", "dynamic").median
        found.append(("time of dynamic", time, "<=", TARGETS["dynamic, all active"]))
    same = ["static, the same program: met"] if cell.same else []
    return same + [verdict(*x) for x in found]


def verdict(name: str, value: float, relation: str, target: float) -> str:
    met = value >= target if relation == ">=" else value <= target
    return f"{name} {value:.2f} {relation} {target}: {'met' if met else 'MISSED'}"


def print_cells(cells: Sequence[Cell]) -> None:
    """A line for each cell: speed over the full step; share of the optimum's speed."""
    print(f"\n{'':37}{'times as fast as full':36}of the optimum's speed")
    names = "optimum", "static", "dynamic", "static", "dynamic"
    print(f"{'':36}" + "".join(f"{name:>8} " for name in ("by FLOP", *names)))
    for cell in cells:
        flops = [cell.timings[name].flops or math.nan for name in ("full", "optimum")]
        values = [flops[0] / flops[1]]
        values += [cell.speed(name, "full").median for name in names[:3]]
        values += [cell.speed(name, "optimum").median for name in names[3:]]
        line = f"{cell.net:17}{cell.mask:15}{cell.what[:4]:4}"
        line += "".join(f"{value:8.3f} " for value in values)
        if "zeros" in cell.timings and cell.mask in OF_A_PREFIX:
            zeros = cell.speed("zeros", "optimum").median
            of_zeros = cell.speed("dynamic", "zeros").median
            line += f" with zeros {zeros:.3f}, dynamic has {of_zeros:.3f} of that"
        print(line)
        if cell.what == "step":
            print(f"{'':36} " + "; ".join(judge(cell)), flush=True)


def compile_seconds(
    makers: Mapping[str, Callable[[], tuple[Callable, tuple]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Trace, lower and compile, all functions in turns, nothing cached; medians."""
    parts = "trace", "lower", "compile", "seconds"
    samples: dict[str, list[list[float]]] = {name: [] for name in makers}
    for i in range(rounds):
        for name in list(makers)[:: -1 if i % 2 else 1]:
            function, arguments = makers[name]()
            jax.clear_caches()
            gc.collect()
            times = [time.perf_counter()]
            traced = jax.jit(function).trace(*arguments)
            times.append(time.perf_counter())
            lowered = traced.lower()
            times.append(time.perf_counter())
            lowered.compile()
            times.append(time.perf_counter())
            spans = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
            samples[name].append([*spans, sum(spans)])
    base = [s[-1] for s in next(iter(samples.values()))]
    found = {}
    for name, rows in samples.items():
        medians = map(statistics.median, zip(*rows, strict=True))
        ratios = [s[-1] / b for s, b in zip(rows, base, strict=True)]
        found[name] = dict(zip(parts, medians, strict=True))
        found[name]["ratio"] = statistics.median(ratios)
    return found


def compile_times(net: Net, rounds: int) -> list[dict[str, Any]]:
    """Of gradients: jax's, and ours by static and by dynamic masks."""
    n, given = len(net.params), (net.params, net.batch)
    everything = mask_of(net.params, MASKS["all"](n))
    half = mask_of(net.params, MASKS["last-half"](n))
    traced = jax.tree.map(jnp.bool_, everything)

    def fresh(make, *arguments):
        # Not even the loss is a function that jax has seen.
        return lambda: (
            make(net._replace(loss=lambda p, b: net.loss(p, b))),
            arguments,
        )

    found = compile_seconds(
        {
            "jax": fresh(full_gradients, *given),
            "static": fresh(lambda net: static_gradients(net, everything), *given),
            "static, last half": fresh(lambda net: static_gradients(net, half), *given),
            "dynamic": fresh(dynamic_gradients, *given, traced),
        },
        rounds,
    )
    print("\ncompile time of the gradients of the transformer")
    for name, row in found.items():
        spans = "  ".join(f"{key} {row[key]:6.3f} s" for key in list(row)[:3])
        print(f"{name:18}  {spans}  all {row['seconds']:6.3f} s  {row['ratio']:.2f}")
    for name, target in COMPILE_TARGETS.items():
        print(f"  {verdict(name, found[name]['ratio'], '<=', target)}")
    return [{"what": "compile", "name": name, **row} for name, row in found.items()]


def memory(net: Net) -> list[dict[str, Any]]:
    """Of the static step, as more and more of the first layers rest."""
    state = ADAM.init(net.params), jnp.zeros(())
    rows = []
    for resting in range(len(net.params)):
        active = [i >= resting for i in range(len(net.params))]
        mask = mask_of(net.params, active)
        step = static_step(static_gradients(net, mask), mask)
        case = cycle_of_steps(step, net.params, state, net.batch)
        found = compiled(case)
        rows.append(
            {
                "what": "memory",
                "resting": resting,
                "temporary_bytes": found.memory_analysis().temp_size_in_bytes,
                "flops": found.cost_analysis().get("flops"),
            }
        )
    sizes = [row["temporary_bytes"] for row in rows]
    falls = all(b <= a for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    print("temporary MB, by how many of the first layers rest: ", end="")
    print(*(f"{size / 1e6:.2f}" for size in sizes), "falls" if falls else "MISSED")
    print("MFLOP:", *(f"{row['flops'] / 1e6:.1f}" for row in rows), flush=True)
    return rows


def measure_net(
    name: str, net: Net, masks: Sequence[str], rounds: int, seconds: float
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells of a net, and rows for the file."""
    shared = {
        "full": full_step(net),
        "dynamic": dynamic_step(net),
        "full gradients": jax.jit(full_gradients(net)),
        "dynamic gradients": jax.jit(dynamic_gradients(net)),
    }
    cells, rows = [], []
    for mask in masks:
        active = MASKS[mask](len(net.params))
        for what, cases_of in ("step", steps_of), ("gradients", gradients_of):
            title = f"{net.steps} steps" if what == "step" else what
            print(f"\n{name}, {mask}: {title}")
            cases = cases_of(net, shared, active)
            cell = Cell(name, mask, what, {}, False)
            cell, found = measure(cell, cases, rounds, seconds)
            cells.append(cell)
            calls = net.steps if what == "step" else 1
            rows += [{**row, "steps": calls} for row in found]
    print(f"\n{name}")
    return cells, rows + [{"net": name, **row} for row in memory(net)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nets", nargs="+", choices=NETS, default=DEFAULT_NETS)
    options.add_argument("--masks", nargs="+", choices=MASKS, default=tuple(MASKS))
    options.add_argument(
        "--quick", action="store_true", help="tiny nets, one round, a file if --out"
    )
    args = options.parse_args()
    nets = QUICK if args.quick else NETS
    rounds = args.rounds or (1 if args.quick else 15)
    seconds = 0.0 if args.quick else 0.02
    kept = keep_memory()
    cells, rows = [], []
    for name in args.nets:
        more, found = measure_net(name, nets[name](), args.masks, rounds, seconds)
        cells += more
        rows += found
    print_cells(cells)
    if "transformer" in args.nets:
        rows += compile_times(nets["transformer"](), 1 if args.quick else 7)
    for row in rows:
        row["memory_kept"] = kept
    if args.out or not args.quick:
        write_json("skipping", rows, args.out)


if __name__ == "__main__":
    main()

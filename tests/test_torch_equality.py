"""The same numbers on both sides: PriorityBudget decides as priority_prop does."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from priorityprop_jax import DepthFactor, prioritize, priority_prop
from priorityprop_jax._scores import MAGNITUDES, magnitudes


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bridge = pytest.importorskip("priorityprop_jax.torch")
in_torch = pytest.importorskip("priorityprop_jax.torch._magnitudes")
nn, PriorityBudget, sizes_of = torch.nn, bridge.PriorityBudget, in_torch.sizes_of

CPU = jax.devices("cpu")[0]
RULE = DepthFactor(lambda depths, most: 2.0**depths)
SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "2.weight": (3, 7), "10.w": (2, 3, 3, 2)}
DEPTHS = {"0.weight": 2, "0.bias": 2, "2.weight": 1, "10.w": 0}


class Recorder(torch.optim.Optimizer):
    """Moves nothing; counts the steps of each parameter."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1


def gradients(steps, shapes=SHAPES, seed=0):
    """Of widely different sizes, some of them zero or not finite."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        draw = lambda s: (rng.normal(size=s) * rng.lognormal(sigma=3)).astype("float32")
        out = {name: draw(shape) for name, shape in shapes.items()}
        if step % 7 == 0 and step:
            out["0.bias"][2] = (np.nan, np.inf, 0.0)[step % 3]
        if step % 10 == 0 and step % 20:
            out["2.weight"][:] = 0.0
        yield out


def schedule(step):
    return optax.linear_schedule(0.2, 0.9, 40)(step)


@pytest.mark.parametrize(
    "settings",
    [
        dict(budget=0.5),
        dict(budget=37, min_updates=2, max_updates=35, recalc_every=7),
        dict(budget=schedule, magnitude="rms", depth_from="input", recalc_every=5),
        dict(
            budget=9, min_updates=0, magnitude="l1", recalc_every=3, depth_factor=RULE
        ),
        dict(budget=0.3, min_updates=0, score="random", seed=3, recalc_every=1),
        dict(budget=1.0, min_updates=4, max_updates=4, recalc_every=4),
    ],
)
def test_quotas_schedules_and_counts_equal_those_of_priority_prop(settings):
    parameters = {n: nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()}
    optimizer = Recorder(parameters.values())
    budget = PriorityBudget(parameters, optimizer, depths=DEPTHS, **settings)
    by_name = lambda values: OrderedDict((name, values[name]) for name in SHAPES)
    tx = priority_prop(depths=by_name(DEPTHS), **settings)
    state = tx.init(jax.tree.map(lambda s: jnp.zeros(s), by_name(SHAPES), is_leaf=_is))
    update = jax.jit(tx.update)
    for step, given in enumerate(gradients(23)):
        due = budget.active()
        with budget.step():
            for name, p in parameters.items():
                assert p.requires_grad == due[name] or not any(due.values())
                if p.requires_grad:
                    p.grad = torch.from_numpy(given[name].copy())
            optimizer.step()
        _, state = update(by_name(given), state)
        for field in ("counts", "quotas", "scores", "budget", "nonfinite", "step"):
            ours, theirs = getattr(budget.state, field), getattr(state, field)
            np.testing.assert_array_equal(ours, theirs, f"{field} at step {step}")
        steps = [optimizer.state[p].get("steps", 0) for p in parameters.values()]
        np.testing.assert_array_equal(steps, state.counts)


def _is(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes_equal_jax_bit_for_bit(name):
    for given in gradients(9, seed=1):
        arrays = list(given.values())
        ours = sizes_of([torch.from_numpy(g) for g in arrays], name, CPU)
        theirs = magnitudes([jnp.asarray(g) for g in arrays], ((),) * 4, name)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes_by_torch_agree(name):
    """Those of gradients on other devices, here with tensors of the CPU."""
    for scale in (1.0, 1e30, 1e-28):
        for given in gradients(9, seed=2):
            arrays = [np.clip(g, -90, 90) * np.float32(scale) for g in given.values()]
            ours = [
                float(in_torch._measure_there(torch.from_numpy(g), name))
                for g in arrays
            ]
            theirs = magnitudes([jnp.asarray(g) for g in arrays], ((),) * 4, name)
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-44)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_magnitudes_of_other_types(dtype):
    g = torch.arange(1, 13).reshape(3, 4).to(dtype)
    expected = np.sqrt(sum(i * i for i in range(1, 13)))
    for x in (g, g.t(), g.expand(1, 3, 4), torch.cat([g, g]).flatten()[12:]):
        np.testing.assert_allclose(sizes_of([x], "l2", CPU), [expected], rtol=1e-6)
    np.testing.assert_allclose(
        float(in_torch._measure_there(g, "l2")), expected, rtol=1e-6
    )
    if dtype.is_complex:
        g = torch.full((4,), 3 + 4j, dtype=dtype).conj()
        np.testing.assert_allclose(sizes_of([g], "max", CPU), [5.0], rtol=1e-6)


def test_magnitudes_of_none_empty_and_sparse():
    sparse = torch.sparse_coo_tensor(
        [[0, 0, 2]], [3.0, 1.0, 3.0], (4,), check_invariants=True
    )
    sizes = sizes_of([None, torch.zeros(0, 3), sparse, torch.tensor(-2.0)], "l2", CPU)
    np.testing.assert_allclose(sizes, [0, 0, 5, 2])
    np.testing.assert_allclose(sizes_of([sparse], "mean", CPU), [7 / 4])


WIDTHS = (5, 8, 6, 3)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        for width in WIDTHS[1:-1]:
            x = jnp.tanh(linen.Dense(width)(x))
        return linen.Dense(WIDTHS[-1])(x)


def test_a_torch_and_a_flax_copy_of_one_mlp_stay_together():
    """200 steps of SGD under the same budget, each with gradients of its own."""
    settings = dict(budget=0.6, min_updates=1, max_updates=14, recalc_every=10)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 16, WIDTHS[0])).astype(np.float32)
    y = np.sin(x @ rng.normal(size=(WIDTHS[0], WIDTHS[-1]))).astype(np.float32)

    layers = [nn.Linear(a, b) for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(layer.weight.detach().numpy().T),
            "bias": jnp.asarray(layer.bias.detach().numpy()),
        }
        for i, layer in enumerate(layers)
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    budget = PriorityBudget(model, optimizer, **settings)
    tx = prioritize(optax.sgd(0.05), **settings)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        loss = lambda p: jnp.mean((Net().apply({"params": p}, x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    start = None
    for i in range(200):
        params, state, value = step(params, state, x[i], y[i])
        with budget.step():
            error = model(torch.from_numpy(x[i])) - torch.from_numpy(y[i])
            loss = (error**2).mean()
            loss.backward()
            optimizer.step()
        start = start or float(value)
        np.testing.assert_allclose(float(loss.detach()), value, rtol=1e-3)
    assert float(value) < 0.7 * start  # it learns, so the runs could have parted

    counts = dict(zip(budget.names, budget.state.counts.tolist(), strict=True))
    theirs = state.priority.counts.tolist()  # bias before kernel
    assert len(set(theirs)) > 2
    for i, layer in enumerate(layers):
        bias, kernel = theirs[2 * i : 2 * i + 2]
        assert (counts[f"{2 * i}.weight"], counts[f"{2 * i}.bias"]) == (kernel, bias)
        ours = {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach()}
        for name, value in params[f"Dense_{i}"].items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5)

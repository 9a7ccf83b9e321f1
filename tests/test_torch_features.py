"""Depths by use, mixed precision, `torch.compile`, sparse gradients."""

import contextlib
import warnings

import jax
import numpy as np
import pytest

from priorityprop_jax import infer_depths
from test_torch_budget import (
    batches,
    BUSY,
    make,
    mlp,
    resting_but,
    sgd,
    take,
    WIDTHS,
)


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bridge = pytest.importorskip("priorityprop_jax.torch")
checkpoint = pytest.importorskip("torch.utils.checkpoint")
nn, PriorityBudget = torch.nn, bridge.PriorityBudget


class Backwards(nn.Module):
    """Registered in another order than used."""

    def __init__(self):
        super().__init__()
        self.last, self.middle = nn.Linear(4, 3), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.unused = nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x):
        assert self.first.weight.shape == (4, 5) and self.last.bias.dtype  # no uses
        return self.last(torch.tanh(self.middle(self.first(x)) * self.scale))


DEPTHS = {"scale": 1, "last.weight": 0, "last.bias": 0, "middle.weight": 2}
DEPTHS |= {"middle.bias": 2, "first.weight": 3, "first.bias": 3}
DEPTHS |= {"unused.weight": 0, "unused.bias": 0}


def test_depths_are_by_use():
    model = Backwards()
    model.train()
    model.middle.eval()
    assert bridge.infer_depths(model, torch.ones(1, 5)) == DEPTHS
    assert model.training and not model.middle.training
    optimizer = sgd(model)
    budget = make(model, optimizer, budget=0.5)
    before = dict(zip(budget.names, budget.state.depths.tolist(), strict=True))
    assert before["last.weight"] == 2  # in alphabetical order
    with budget.step():  # a half of the batch, and no step yet
        model(torch.ones(2, 5)).sum().backward()
    take(budget, model, optimizer, torch.ones(2, 5))
    assert dict(zip(budget.names, budget.state.depths.tolist(), strict=True)) == DEPTHS
    other = make(model, sgd(model), depths=DEPTHS, depth_from="input")
    assert (other.state.depths == 3 - budget.state.depths).all()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="was not seen to use a parameter"):
        bridge.infer_depths(model, torch.ones(1, 5))


def test_depths_agree_with_those_of_the_same_network_in_jax():
    def net(params, x):
        for i in (0, 2, 4):
            x = jax.numpy.tanh(x @ params[f"{i}.weight"].T + params[f"{i}.bias"])
        return x

    model = mlp()
    params = {n: np.asarray(p.detach()) for n, p in model.named_parameters()}
    theirs = infer_depths(net, params, np.ones(WIDTHS[0], np.float32))
    assert bridge.infer_depths(model, torch.ones(1, WIDTHS[0])) == theirs


def test_depths_of_functions_attention_and_recurrence():
    torch.manual_seed(0)
    parameters = {n: nn.Parameter(torch.ones(3, 3)) for n in "bca"}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    budget = make(parameters, optimizer, budget=0.5)
    with budget.step():
        x = torch.ones(2, 3)
        for n in "abc":
            x = torch.tanh(x @ parameters[n])
        x.sum().backward()
        optimizer.step()
    assert dict(zip("bca", budget.state.depths.tolist(), strict=True)) == {
        "a": 2,
        "b": 1,
        "c": 0,
    }
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    depths = bridge.infer_depths(
        nn.Sequential(layer, nn.LSTM(8, 4)), torch.ones(2, 3, 8)
    )
    order = [depths[f"0.{n}.weight"] for n in ("norm1", "linear1", "linear2", "norm2")]
    assert order == sorted(order, reverse=True)
    assert depths["0.self_attn.in_proj_weight"] == depths["0.self_attn.out_proj.bias"]
    assert depths["1.weight_ih_l0"] == 0 < order[-1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_depths_under_checkpoints(reentrant):
    model, x = Backwards(), torch.ones(2, 5, requires_grad=True)
    optimizer = sgd(model)
    budget = make(model, optimizer, budget=0.5)
    for _ in range(3):
        with budget.step():
            with torch.no_grad():
                model.first.weight.mul_(1.0)
            y = checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            y.sum().backward()
            optimizer.step()
    assert dict(zip(budget.names, budget.state.depths.tolist(), strict=True)) == DEPTHS
    assert budget.state.step == 3


def test_depths_fall_back_to_names_with_a_note():
    model = mlp()
    optimizer = sgd(model)
    budget = make(model, optimizer, budget=0.5)
    with pytest.warns(UserWarning, match="depths are by the names"), budget.step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert budget.state.depths.tolist() == [2, 2, 1, 1, 0, 0]
    assert budget.state.step == 1
    assert [10, 9, 8] == [
        bridge._depths.depths_by_name([f"m.{i}.w" for i in range(11)])[f"m.{i}.w"]
        for i in range(3)
    ]


def grad_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(fused, unscale):
    """Scaled gradients give the same run; a skipped step leaves the schedule alone."""
    build = lambda m: torch.optim.Adam(m.parameters(), lr=0.1, fused=fused)
    model, other = mlp(), mlp()
    optimizer, plain = build(model), build(other)
    ours, theirs = make(model, optimizer, **BUSY), make(other, plain, **BUSY)
    scaler, seen = grad_scaler(), []
    for i, x in enumerate(batches(9)):
        skip = i in (0, 3, 4)
        before = ours.state_dict(), ours.active()
        optimizer.zero_grad()
        with ours.step():
            loss = model(x).square().mean() * (float("inf") if skip else 1)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        if skip:
            assert (ours.state_dict(), ours.active()) == before
        else:
            take(theirs, other, plain, x)
            seen.append(ours.state.scores)
            np.testing.assert_allclose(ours.state.scores, theirs.state.scores, 1e-5)
            assert ours.state.counts.tolist() == theirs.state.counts.tolist()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_autocast():
    model = mlp()
    optimizer = sgd(model)
    budget = make(model, optimizer, **resting_but((4, 5)))
    for x in batches(4):
        with torch.autocast("cpu", torch.bfloat16):
            take(budget, model, optimizer, x)
    assert budget.state.counts.tolist() == [0, 0, 0, 0, 4, 4]
    assert budget.state.depths.tolist() == [2, 2, 1, 1, 0, 0]


def test_low_precision_and_complex_parameters():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float64, torch.complex64):
        layers = nn.Linear(5, 4, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
        model = nn.Sequential(*layers)
        optimizer = sgd(model)
        budget = make(model, optimizer, budget=0.5)
        for x in batches(2).to(dtype):
            with budget.step():
                model(x).abs().square().mean().backward()
                optimizer.step()
        assert budget.state.counts.min() == 1 < budget.state.counts.max()
        assert (budget.state.scores > 0).all()


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = dict(budget=18, min_updates=0, max_updates=6, recalc_every=3)
    budget = make(model, optimizer, **settings)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        take(budget, model, optimizer, torch.tensor([1, 3, 3]))
    moved = (model[0].weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 3]
    assert budget.state.counts.tolist() == [6, 6, 6]  # each twice a step


@pytest.fixture
def compiler():
    """Counts what `torch.compile` compiles; no C++ compiler is needed."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    yield testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def silently():
    """What `torch.compile` itself warns about is not the question."""
    context = warnings.catch_warnings()

    @contextlib.contextmanager
    def quiet():
        with context:
            warnings.simplefilter("ignore")
            yield

    return quiet()


def test_a_compiled_model_is_compiled_once_for_each_set_that_rests(compiler):
    model, other = mlp(), mlp()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)  # no breaks
    optimizer, plain = sgd(model), sgd(other)
    ours = make(compiled, optimizer, **BUSY)
    theirs = make(other, plain, **BUSY)
    assert ours.names == theirs.names  # without "_orig_mod."
    masks = set()
    for i, x in enumerate(batches(10)):
        if i:  # the first runs without the compiler
            masks.add(tuple(ours.active().values()))
        with silently():
            take(ours, compiled, optimizer, x)
        take(theirs, other, plain, x)
        assert compiler.frame_count == len(masks)
    assert 1 < len(masks) < 8  # the limit: torch._dynamo.config.recompile_limit
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_without_skipping_a_compiled_model_is_compiled_once(compiler):
    """All gradients are computed, and the same ones are used."""
    model, other = mlp(), mlp()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    optimizer, plain = sgd(model, momentum=0.9), sgd(other, momentum=0.9)
    ours = make(compiled, optimizer, skip=False, **BUSY)
    theirs = make(other, plain, **BUSY)
    for x in batches(10):
        with silently():
            assert all(take(ours, compiled, optimizer, x))
        take(theirs, other, plain, x)
    assert compiler.frame_count == 1
    assert ours.state_dict() == theirs.state_dict()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_compiled_function_has_depths_by_use(compiler):
    """The first block runs without the compiler."""
    model = Backwards()
    loss = torch.compile(lambda x: model(x).square().mean(), backend=compiler)
    optimizer = sgd(model)
    budget = make(model, optimizer, budget=0.5)
    for frames in (0, 1):
        with silently(), budget.step():
            loss(torch.ones(2, 5)).backward()
            optimizer.step()
        assert compiler.frame_count == frames
    assert dict(zip(budget.names, budget.state.depths.tolist(), strict=True)) == DEPTHS
    compiled = torch.compile(model, backend=compiler)
    assert bridge.infer_depths(compiled, torch.ones(1, 5)) == DEPTHS


def test_a_compiled_training_step_breaks_at_the_block(compiler):
    """It runs, and does the same as one that is not compiled."""
    model, other = mlp(), mlp()
    optimizer, plain = sgd(model), sgd(other)
    ours, theirs = make(model, optimizer, **BUSY), make(other, plain, **BUSY)
    step = torch.compile(lambda x: take(ours, model, optimizer, x), backend=compiler)
    for x in batches(5):
        with silently():
            step(x)
        take(theirs, other, plain, x)
    assert ours.state_dict() == theirs.state_dict()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_data_parallel_names():
    model = nn.DataParallel(mlp())
    assert PriorityBudget(model, sgd(model)).names[0] == "0.weight"

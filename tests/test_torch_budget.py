"""In a block parameters rest for real; after it, all is as it was."""

import contextlib
import functools
import gc
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax import Score


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bridge = pytest.importorskip("priorityprop_jax.torch")
nn, PriorityBudget = torch.nn, bridge.PriorityBudget
flop_counter = pytest.importorskip("torch.utils.flop_counter")

BATCH, WIDTHS = 6, (5, 7, 4, 3)


def mlp(seed=0):
    torch.manual_seed(seed)
    a, b, c, d = WIDTHS
    return nn.Sequential(
        nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, d)
    )


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, BATCH, WIDTHS[0], generator=generator)


@functools.cache
def only(*chosen):
    """A score that is 1 for the chosen units."""
    return Score(
        lambda sizes: (),
        lambda x, state: (jnp.isin(x.index, jnp.array(chosen)).astype(float), state),
    )


def resting_but(chosen, every=3):
    """Settings under which only the chosen units are updated, at every step."""
    return dict(
        budget=len(chosen) * every,
        min_updates=0,
        max_updates=every,
        recalc_every=every,
        score=only(*chosen),
    )


_compiled = {}


def make(model, optimizer, **settings):
    """A budget, for which nothing is compiled that was compiled before."""
    budget = PriorityBudget(model, optimizer, **settings)
    key = repr((budget.names, sorted(settings.items())))
    policy = budget._policy
    policy._decide = _compiled.setdefault(key, policy._decide)
    return budget


def take(budget, model, optimizer, x):
    """One step. Returns which parameters required a gradient inside."""
    with budget.step():
        seen = [p.requires_grad for p in model.parameters()]
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    return seen


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **kwargs})


def test_resting_parameters_have_no_gradient_and_do_not_move():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    budget = make(model, optimizer, **resting_but([2, 4]))
    take(budget, model, optimizer, batches(1)[0])
    before = [p.detach().clone() for p in model.parameters()]
    for i, x in enumerate(batches(4)):
        first = (i + 1) % 3 == 0  # of a cycle
        with budget.step():
            model(x).square().mean().backward()
            found = [p.grad is not None for p in model.parameters()]
            assert found == [first or j in (2, 4) for j in range(6)]
            optimizer.step()
            assert found == [p.grad is not None for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert all(p.requires_grad for p in model.parameters())
    for j, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        assert torch.equal(p, old) == (j not in (2, 4))
        assert (p in optimizer.state) == (j in (2, 4))
    assert budget.state.counts.tolist() == [0, 0, 5, 0, 5, 0]


def flops_of(*active):
    """Of an MLP: forward, weight gradients of what is active, and the chain to it."""
    sizes = [2 * BATCH * a * b for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
    layers = [j // 2 for j in active]
    chain = sum(sizes[min(layers) + 1 :])
    return sum(sizes) + sum(sizes[j // 2] for j in active if j % 2 == 0) + chain


@pytest.mark.parametrize("active", [(4, 5), (2, 4), (5,), (0,), (1, 3), (0, 2, 4)])
def test_flops_of_what_rests_are_left_out(active):
    model = mlp()
    optimizer = sgd(model)
    budget = make(model, optimizer, **resting_but(active))
    for i in range(3):
        with flop_counter.FlopCounterMode(display=False) as counter:
            take(budget, model, optimizer, batches(1)[0])
        expected = flops_of(*(range(6) if i == 0 else active))
        assert counter.get_total_flops() == expected


class Lion(torch.optim.Optimizer):
    """As people write them (Chen et al., 2023): not one of torch's."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (m * b1 + p.grad * (1 - b1)).sign()
                p.mul_(1 - lr * decay).add_(update, alpha=-lr)
                m.lerp_(p.grad, 1 - b2)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, weight_decay=0.01)),
    "momentum": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "nesterov": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "nesterov_foreach": (
        torch.optim.SGD,
        dict(lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    ),
    "sgd_fused": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, fused=True)),
    "adam": (torch.optim.Adam, dict(lr=0.1)),
    "adam_amsgrad": (torch.optim.Adam, dict(lr=0.1, amsgrad=True, weight_decay=0.1)),
    "adam_foreach": (torch.optim.Adam, dict(lr=0.1, foreach=True)),
    "adam_fused": (torch.optim.Adam, dict(lr=0.1, fused=True)),
    "adamw": (torch.optim.AdamW, dict(lr=0.1)),
    "adamw_fused": (torch.optim.AdamW, dict(lr=0.1, fused=True)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.1, momentum=0.5, centered=True)),
    "rmsprop_foreach": (torch.optim.RMSprop, dict(lr=0.1, foreach=True)),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.1, lr_decay=0.1)),
    "adagrad_foreach": (torch.optim.Adagrad, dict(lr=0.1, foreach=True)),
    "adadelta": (torch.optim.Adadelta, dict(lr=0.1)),
    "nadam": (torch.optim.NAdam, dict(lr=0.1)),
    "radam": (torch.optim.RAdam, dict(lr=0.1)),
    "adamax": (torch.optim.Adamax, dict(lr=0.1)),
    "lion": (Lion, dict(lr=0.1)),
}
# Parameters rest, are updated once, and twice in a step; quotas change.
BUSY = dict(budget=14, max_updates=5, recalc_every=3, score="random")


def alone(model, kind, settings, xs, given, before_step=lambda model: None):
    """The same with the full backward pass, and an optimizer for each parameter."""
    parameters = list(model.parameters())
    optimizers = [kind([p], **settings) for p in parameters]
    for x, numbers in zip(xs, given, strict=True):
        model.zero_grad()
        model(x).square().mean().backward()
        for p, m in zip(parameters, numbers, strict=True):
            if not m:
                p.grad = None
        before_step(model)
        for p, m, optimizer in zip(parameters, numbers, optimizers, strict=True):
            gradient = p.grad
            for _ in range(m):
                p.grad = gradient.clone()
                optimizer.step()
    return optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_parameter_is_updated_as_if_alone(name):
    kind, settings = OPTIMIZERS[name]
    model, xs = mlp(), batches(8)
    optimizer = kind(model.parameters(), **settings)
    budget = make(model, optimizer, **BUSY)
    counts = [budget.state.counts]
    for x in xs:
        take(budget, model, optimizer, x)
        counts.append(budget.state.counts)
    given = np.diff(counts, axis=0)
    assert {0, 1, 2} <= set(given.flat) and len(set(counts[-1])) > 1

    other = mlp()
    optimizers = alone(other, kind, settings, xs, given)
    for p, q, single in zip(
        model.parameters(), other.parameters(), optimizers, strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        ours, theirs = optimizer.state[p], single.state[q]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-7)


def test_full_budget_is_plain_training():
    settings = dict(budget=1.0, min_updates=4, max_updates=4, recalc_every=4)
    model, other = mlp(), mlp()
    optimizer, plain = sgd(model, momentum=0.9), sgd(other, momentum=0.9)
    budget = make(model, optimizer, **settings)
    for x in batches(9):
        take(budget, model, optimizer, x)
        plain.zero_grad()
        other(x).square().mean().backward()
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_param_groups_and_schedulers():
    """Schedules follow the steps, not the updates of a parameter."""
    model, other = mlp(), mlp()
    biases, weights = ([p for p in model.parameters() if p.ndim == n] for n in (1, 2))
    groups = [{"params": biases, "lr": 0.5}, {"params": weights}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    budget = make(model, optimizer, **BUSY)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for i, x in enumerate(batches(7)):
        before = budget.state.counts
        take(budget, model, optimizer, x)
        scheduler.step()
        numbers = (budget.state.counts - before).tolist()
        other.zero_grad()
        other(x).square().mean().backward()
        with torch.no_grad():
            for p, m in zip(other.parameters(), numbers, strict=True):
                rate = (0.5, 0.1)[p.ndim - 1] * 0.1 ** (i // 2)
                p -= rate * m * p.grad
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("blocks", ["one block", "a block each"])
def test_gradients_are_accumulated(blocks):
    """With the same active parameters until the step."""
    model, other, xs = mlp(), mlp(), batches(8)
    optimizer, plain = sgd(model), sgd(other)
    ours, theirs = (
        make(model, optimizer, depths="names", **BUSY),
        make(other, plain, depths="names", **BUSY),
    )
    for x in xs:
        take(theirs, other, plain, x)
        halves = x.chunk(2)
        if blocks == "one block":
            with ours.step():
                for half in halves:
                    (model(half).square().mean() / 2).backward()
                optimizer.step()
        else:
            due = ours.active()
            with ours.step():
                (model(halves[0]).square().mean() / 2).backward()
            assert ours.active() == due
            with ours.step():
                (model(halves[1]).square().mean() / 2).backward()
                optimizer.step()
        assert ours.state.counts.tolist() == theirs.state.counts.tolist()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_clipping_sees_what_is_active():
    clip = lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    model, xs, given = mlp(), batches(8), []
    optimizer = sgd(model)
    budget = make(model, optimizer, **BUSY)
    for x in xs:
        before = budget.state.counts
        with budget.step():
            model(x).square().mean().backward()
            clip(model)
            optimizer.step()
        given.append(budget.state.counts - before)
    other = mlp()
    alone(other, torch.optim.SGD, dict(lr=0.1), xs, given, clip_full(given))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def clip_full(given):
    """Clips by the norm of what is there, which at this point is what is due."""
    assert all(min(numbers) > 0 for numbers in given[::3])  # then, that is all
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def test_zero_grad_of_the_user_may_keep_tensors():
    model, other = mlp(), mlp()
    optimizer, plain = sgd(model, momentum=0.9), sgd(other, momentum=0.9)
    ours, theirs = make(model, optimizer, **BUSY), make(other, plain, **BUSY)
    for x in batches(8):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with ours.step():
            optimizer.zero_grad(set_to_none=False)  # momentum must not see these zeros
            model(x).square().mean().backward()
            optimizer.step()
        take(theirs, other, plain, x)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_where_nobody_is_due():
    """Something must require a gradient, or the user's backward() would fail."""
    model = mlp()
    optimizer = sgd(model, weight_decay=0.1)
    settings = dict(budget=1, min_updates=0, max_updates=3, recalc_every=3)
    budget = make(model, optimizer, **settings)
    seen, moved = [], []
    for x in batches(6):
        before = [p.detach().clone() for p in model.parameters()]
        seen.append(take(budget, model, optimizer, x))
        moved += [
            sum(
                not torch.equal(p, q)
                for p, q in zip(model.parameters(), before, strict=True)
            )
        ]
    assert moved == [1, 0, 0, 1, 0, 0]
    rest = [False] * 5 + [True]  # the last bias
    assert seen == 2 * [[True] * 6, rest, rest]


def test_shared_parameters_are_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = sgd(model)
    budget = make(model, optimizer, **resting_but([0]))
    assert budget.names == ["0.weight", "0.bias", "2.bias"]
    for _ in range(3):
        take(budget, model, optimizer, torch.ones(2, 4))
    assert budget.state.counts.tolist() == [3, 0, 0]
    named = [*model.named_parameters(remove_duplicate=False)]
    assert PriorityBudget(named, sgd(model), budget=9).names == budget.names


def test_batch_norm_goes_on_while_its_weights_rest():
    def start():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    model, other, xs = start(), start(), batches(5)
    optimizer = sgd(model)
    budget = make(model, optimizer, **resting_but([4, 5], every=5))
    for x in xs:
        take(budget, model, optimizer, x)
        with torch.no_grad():
            other(x)
    assert budget.state.counts.tolist() == [0, 0, 0, 0, 5, 5]
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(model[1].running_var, other[1].running_var)


def test_what_the_user_froze_stays_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    budget = PriorityBudget(model, optimizer, budget=6, recalc_every=2)
    assert budget.names == ["2.weight", "2.bias", "4.weight", "4.bias"]
    model[2].bias.requires_grad_(False)  # later, too
    before = [p.detach().clone() for p in model.parameters()]
    for x in batches(4):
        seen = take(budget, model, optimizer, x)
        assert not any(seen[j] for j in (0, 1, 3))
        expected = [False, False, True, False, True, True]
        assert [p.requires_grad for p in model.parameters()] == expected
    for j, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        assert torch.equal(p, old) == (j in (0, 1, 3))


def test_frozen_layers_below_are_not_in_the_optimizer():
    """As people fine-tune a head: the rest is none of the optimizer's business."""
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    budget = PriorityBudget(model, optimizer, budget=0.5)
    assert budget.names == ["4.weight", "4.bias"]


class Boom(Exception):
    pass


class Fragile(torch.optim.SGD):
    """Fails at the call of that number."""

    fail_at, error = None, Boom

    def step(self, closure=None):
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                raise self.error
        return super().step(closure)


@pytest.mark.parametrize("where", ["forward", "backward", "step", "second", "after"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_exceptions_leave_nothing_half_frozen(where, error):
    """ "second": in the second of two updates from one gradient."""
    model, xs = mlp(), batches(4)
    model[0].bias.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    optimizer = Fragile(model.parameters(), lr=0.1)
    settings = resting_but((1, 3)) | dict(budget=12, max_updates=6)
    budget = make(model, optimizer, **settings)
    for step, x in enumerate(xs):
        before, found = budget.state_dict(), []
        with pytest.raises(error), budget.step():
            if where == "forward":
                raise error
            loss = model(x).square().mean()
            if where == "backward":
                loss.register_hook(lambda g: (_ for _ in ()).throw(error()))
            loss.backward()
            assert len(set(wanted)) == 2
            found = [p.grad is None for p in model.parameters()]
            optimizer.error = error
            optimizer.fail_at = {"step": 0, "second": 1}.get(where)
            optimizer.step()
            raise error
        optimizer.fail_at = None
        assert [p.requires_grad for p in model.parameters()] == wanted
        if where in ("step", "second"):  # the gradients are there, to try again
            assert [p.grad is None for p in model.parameters()] == found
        assert (budget.state_dict() == before) == (where != "after")
        if where != "after":
            optimizer.zero_grad()
            take(budget, model, optimizer, x)
            assert [p.requires_grad for p in model.parameters()] == wanted
        assert budget.state.step == step + 1


class Clamped(torch.optim.SGD):
    """Its step calls that of its parent, which torch gives hooks, too."""

    def step(self, closure=None):
        found = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.3, 0.3)
        return found


def test_a_step_within_a_step_counts_once():
    sgd(mlp())  # torch puts its hooks on a class with the first of its kind
    model, by_hand = mlp(), mlp()
    optimizer = Clamped(model.parameters(), lr=0.5, momentum=0.5)
    settings = resting_but((1, 4)) | dict(budget=12, max_updates=6)
    budget = make(model, optimizer, **settings)
    theirs = Clamped(by_hand.parameters(), lr=0.5, momentum=0.5)
    for step, x in enumerate(batches(4)):
        take(budget, model, optimizer, x)
        theirs.zero_grad()
        by_hand(x).square().mean().backward()
        gradients = [p.grad for p in by_hand.parameters()]
        for _ in range(2):
            for i, p in enumerate(by_hand.parameters()):
                p.grad = gradients[i].clone() if i in (1, 4) else None
            theirs.step()
        assert budget.state.step == step + 1
        assert list(budget.state.counts) == [0, 2 * step + 2, 0, 0, 2 * step + 2, 0]
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_block_that_goes_on_after_a_failed_step():
    model = mlp()
    optimizer = Fragile(model.parameters(), lr=0.1)
    budget = make(model, optimizer)
    optimizer.error, optimizer.fail_at = Boom, 0
    with pytest.raises(RuntimeError, match="failed in the block"), budget.step():
        model(batches(1)[0]).sum().backward()
        with contextlib.suppress(Boom):
            optimizer.step()
        optimizer.fail_at = None
        optimizer.step()
    assert budget.state.step == 0
    take(budget, model, optimizer, batches(1)[0])
    assert budget.state.step == 1


def test_resume_in_the_middle_of_a_cycle():
    def start():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return model, optimizer, make(model, optimizer, **BUSY)

    model, optimizer, budget = start()
    xs = batches(9)
    for x in xs[:4]:
        take(budget, model, optimizer, x)
    parts = model, optimizer, budget
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    assert json.loads(json.dumps(budget.state_dict())) == budget.state_dict()
    file.seek(0)
    others = start()
    for part, saved in zip(others, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    for x in xs[4:]:
        seen = [take(b, m, o, x) for m, o, b in (parts, others)]
        assert seen[0] == seen[1]
    assert budget.state_dict() == others[2].state_dict()
    for p, q in zip(model.parameters(), others[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_loading_something_else_is_an_error():
    model = mlp()
    budget = PriorityBudget(model, sgd(model))
    saved = budget.state_dict()
    load = budget.load_state_dict
    with pytest.raises(ValueError, match="lacks 'counts'"):
        load({k: v for k, v in saved.items() if k != "counts"})
    with pytest.raises(ValueError, match="7 parameters.* of 6: the saved one has 'x'"):
        load({**saved, "names": [*saved["names"], "x"]})
    with pytest.raises(ValueError, match="lacks '0.weight'"):
        load({**saved, "names": saved["names"][1:]})
    with pytest.raises(ValueError, match="another order"):
        load({**saved, "names": saved["names"][::-1]})
    with pytest.raises(ValueError, match="recalc_every=10, but .* recalc_every=3"):
        load({**saved, "recalc_every": 3})
    with pytest.raises(ValueError, match=r"'quotas' has shape \(1,\), expected \(6,\)"):
        load({**saved, "quotas": [1]})
    with pytest.raises(RuntimeError, match="within budget.step"), budget.step():
        load(saved)
    with pytest.raises(RuntimeError, match="within budget.step"), budget.step():
        budget.detach()
    assert budget.state_dict() == saved


def test_steps_out_of_order():
    model, x = mlp(), batches(1)[0]
    optimizer = sgd(model)
    budget = PriorityBudget(model, optimizer)
    with pytest.raises(RuntimeError, match="outside of `with budget.step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        with budget.step():
            optimizer.step()
    with pytest.raises(RuntimeError, match="entered within"), budget.step():
        with budget.step():
            pass
    with pytest.raises(TypeError, match="closure"), budget.step():
        model(x).mean().backward()
        optimizer.step(lambda: 0.0)
    with pytest.raises(TypeError, match="closure"), budget.step():
        optimizer.step(closure=lambda: 0.0)
    assert budget.state.step == 0
    with pytest.raises(RuntimeError, match="twice in one block"), budget.step():
        model(x).mean().backward()
        optimizer.step()
        optimizer.step()
    assert budget.state.step == 1
    assert all(p.requires_grad for p in model.parameters())


def test_the_optimizer_is_free_after_detach_and_without_a_budget():
    model, x = mlp(), batches(1)[0]
    optimizer = sgd(model)
    budget = PriorityBudget(model, optimizer)
    budget.detach()
    model(x).mean().backward()
    optimizer.step()
    take(budget, model, optimizer, x)  # attached again
    with pytest.raises(RuntimeError, match="outside"):
        optimizer.step()
    budget = PriorityBudget(model, optimizer)  # as when a cell runs again
    gc.collect()
    take(budget, model, optimizer, x)
    del budget
    gc.collect()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: (m, sgd(mlp())), ValueError, "share no parameters.*'0.weight'"),
        (lambda m: (m[0], sgd(m)), ValueError, r"\['params'\]\[2\], of shape \(4, 7\)"),
        (lambda m: (m, "sgd"), TypeError, "torch.optim.Optimizer, got str"),
        (lambda m: (3, sgd(m)), TypeError, "named parameters.*got int"),
        (lambda m: (m.parameters(), sgd(m)), TypeError, "an entry of type Parameter"),
        (
            lambda m: ([("a", m[0].weight), ("a", m[0].bias)], sgd(m[0])),
            ValueError,
            "two parameters are named 'a'",
        ),
        (
            lambda m: (m, torch.optim.LBFGS(m.parameters())),
            TypeError,
            "LBFGS",
        ),
        (lambda m: (m.requires_grad_(False), sgd(m)), ValueError, "nothing to train"),
        (
            lambda m: (nn.Sequential(nn.LazyLinear(3)), None),
            TypeError,
            "'0.weight' has no shape yet",
        ),
    ],
)
def test_model_and_optimizer_that_do_not_fit(make, error, match):
    model, optimizer = make(mlp())
    with pytest.raises(error, match=match):
        PriorityBudget(model, optimizer or sgd(model))


def test_a_parameter_in_two_groups():
    model = mlp()
    optimizer = sgd(model)
    group = {**optimizer.param_groups[0], "params": [model[2].bias]}
    optimizer.param_groups.append(group)  # add_param_group would have seen it
    with pytest.raises(ValueError, match="'2.bias' is in param_groups 0 and 1"):
        PriorityBudget(model, optimizer)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (dict(budget=0), ValueError, "budget must be a positive integer"),
        (dict(budget=1.5), ValueError, r"float in \(0, 1\]"),
        (dict(min_updates=3, max_updates=2), ValueError, "must not exceed max_updates"),
        (dict(recalc_every=0), ValueError, "recalc_every must be in"),
        (dict(score="prio"), ValueError, "did you mean 'priority'"),
        (dict(magnitude="l3"), ValueError, "magnitude must be one of"),
        (dict(depths="order"), ValueError, "'trace', 'names' or a depth"),
        (dict(depths={"0.weight": 1}), ValueError, "depths has no entry for '0.bias'"),
        (dict(depth_factor={}), ValueError, "depth_factor has no entry for '0.weight'"),
        (dict(depth_factor=-1.0), ValueError, "depth_factor must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant(settings, error, match):
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(error, match=match):
        PriorityBudget(model, optimizer, **settings)
    optimizer.step()  # not attached


def test_infeasible_budgets_warn_where_the_budget_is_made():
    model = mlp()
    with pytest.warns(UserWarning, match="more than max_updates=20 .* 6 units") as seen:
        PriorityBudget(model, sgd(model), budget=1000)
    assert [warning.filename for warning in seen] == [__file__]


def test_report():
    model = mlp()
    optimizer = sgd(model)
    budget = make(model, optimizer, **resting_but([4, 5]))
    for x in batches(4):
        take(budget, model, optimizer, x)
    report = budget.report()
    assert (report.step, report.updates, report.units) == (4, 8, 6)
    by_path = {leaf.path: leaf for leaf in report.leaves}
    assert list(by_path)[:2] == ["4.weight", "4.bias"]
    assert by_path["0.weight"].shape == (7, 5) and by_path["0.weight"].depth == 2
    assert "4.weight" in str(report)


def test_nonfinite_gradients_sit_out_the_first_step():
    model = mlp()
    optimizer = sgd(model)
    budget = PriorityBudget(model, optimizer, budget=0.5, recalc_every=2)
    before = model[4].bias.detach().clone()
    with budget.step():
        model(batches(1)[0]).square().mean().backward()
        model[4].bias.grad[1] = math.nan
        optimizer.step()
    assert torch.equal(model[4].bias, before)
    assert budget.state.nonfinite.tolist() == [0, 0, 0, 0, 0, 1]
    assert not torch.equal(model[4].weight, mlp()[4].weight)


def test_counters_stop_at_the_largest_integer():
    """Whether the state is looked at after each step or at the end."""
    model = mlp()
    optimizer = sgd(model)
    settings = dict(min_updates=4, max_updates=4, recalc_every=4)
    budget = make(model, optimizer, budget=1.0, **settings)
    take(budget, model, optimizer, batches(1)[0])
    most, seen = 2**31 - 1, []
    old = budget.state_dict()
    late = {**old, "step": most - 2, "counts": [most - 2] * len(old["counts"])}
    for looks in (True, False):
        budget.load_state_dict(late)
        for x in batches(5):
            take(budget, model, optimizer, x)
            if looks:
                seen.append(int(budget.state.step))
        assert budget.state.step == most and (budget.state.counts == most).all()
    assert seen == [most - 1, most, most, most, most]

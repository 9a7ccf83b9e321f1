"""The trainer next to loops written by hand."""

import collections
import functools
import itertools
import json

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

from priorityprop_jax import (
    active,
    backward_costs,
    prioritize,
    priority_prop,
    priority_report,
    static_mask,
    unit_axes,
)
from priorityprop_jax.training._batches import ArrayLoader
from priorityprop_jax.training._loop import Event
from priorityprop_jax.training._metrics import Account, Background, Means
from priorityprop_jax.training._objective import (
    accuracy,
    EXAMPLES,
    resolve_metrics,
    STEPS,
)
from priorityprop_jax.training._schedules import by_leaf_on_device
from priorityprop_jax.training._trainer import PriorityPropTrainer


pytestmark = pytest.mark.usefixtures("quick_compilation")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int32)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 22, 8)]  # 8, 8, 6
PARAMS = {
    "first": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32) / 2},
    "last": {"kernel": RNG.normal(size=(3, 2)).astype(np.float32) / 2},
}
SHORT = {"recalc_every": 4, "max_updates": 4, "progress": False}


def net(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["last"]["kernel"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, use_bias=False, name="first")(x)
        return nn.Dense(2, use_bias=False, name="last")(jnp.tanh(x))


class Nnx(nnx.Module):
    def __init__(self, params=PARAMS):
        self.first = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
        for name, layer in params.items():
            getattr(self, name).kernel[...] = jnp.array(layer["kernel"])

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def models():
    return {
        "function": ((PARAMS, net), {}),
        "linen": (Linen(), {"params": PARAMS}),
        "nnx": (Nnx(), {}),
    }


def trainer(model=(PARAMS, net), optimizer=None, loss_fn=cross_entropy, **settings):
    settings = {"total_budget": 0.5, "mode": "dynamic"} | SHORT | settings
    return PriorityPropTrainer(
        model, optimizer or optax.adam(0.05), loss_fn, **settings
    )


def by_hand(tx, epochs, batches=BATCHES, params=PARAMS):
    """A plain loop: params, state, mean loss of each epoch, who was due when."""
    mean = lambda p, x, y: cross_entropy(net(p, x), y).mean()
    update = jax.jit(tx.update)
    grad = jax.jit(jax.value_and_grad(mean))
    params = jax.tree.map(jnp.array, params)
    state, losses, masks = tx.init(params), [], []
    for _ in range(epochs):
        total = 0.0
        for x, y in batches:
            if "PriorityPropState" in str(jax.tree.structure(state)):
                masks.append([bool(b) for b in jax.tree.leaves(active(state, params))])
            loss, grads = grad(params, x, y)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            total += float(loss) * len(x)
        losses.append(total / sum(len(x) for x, _ in batches))
    return params, state, losses, masks


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-6), a, b)


# --- the same as by hand


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_full_training_is_the_optimizer_alone(kind):
    model, given = models()[kind]
    t = trainer(model, total_budget=None, **given)
    history = t.train(BATCHES, 3)
    params, _, losses, _ = by_hand(optax.adam(0.05), 3)
    close(history["loss"], losses)
    close(t.params, params)
    assert t.paths == ["first/kernel", "last/kernel"] and t.step == 9
    assert history["flops_spent"] == history["flops_full"]
    assert history["updates"] == [[3, 3], [6, 6], [9, 9]]
    if kind == "nnx":  # the module has got them
        close(model.first.kernel[...], params["first"]["kernel"])
        model.first.kernel[...] += 1  # and they are its own
        close(t.params, params)


def test_full_training_leaves_together_what_couples_leaves():
    """Clipped by the norm of all gradients, not leaf by leaf; with a report."""
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    t = trainer((PARAMS, net), tx, total_budget=None, recalc_every=4)
    history = t.train(BATCHES, 3)
    params, _, losses, _ = by_hand(tx, 3)
    close((t.params, history["loss"]), (params, losses))
    report = t.get_priority_report()
    assert (report.updates, report.budget, report.unspent) == (2 * 9, 2, 0)
    assert [leaf.quota for leaf in report.leaves] == [1, 1]
    assert history.cycles["counts"] == [[4, 4], [8, 8]]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, mode",
    [
        ("prioritize", "static"),
        ("prioritize", "dynamic"),
        pytest.param("chain", "static", marks=SLOW),
        pytest.param("chain", "dynamic", marks=SLOW),
    ],
)
def test_under_a_budget(mode, kind):
    settings = {"budget": 0.5, "recalc_every": 4, "max_updates": 4}
    depths = {"first": {"kernel": 1}, "last": {"kernel": 0}}
    if kind == "chain":
        tx = optax.chain(priority_prop(depths=depths, **settings), optax.adam(0.05))
    else:
        tx = prioritize(optax.adam(0.05), depths=depths, **settings)
    t = trainer(transformation=kind, mode=mode)
    history = t.train(BATCHES, 5)
    params, state, losses, masks = by_hand(tx, 5)
    assert t.train_step.mode == mode
    assert jax.tree.leaves(t.depths) == [1, 0]
    close(history["loss"], losses)
    close(t.params, params)
    expected = priority_report(state, params)
    assert {x.path: x.count for x in expected.leaves} == dict(
        zip(history.paths, history["updates"][-1], strict=True)
    )
    # The costs, and what was spent of them, by adding up all the steps.
    loss = lambda p, x, y: cross_entropy(net(p, x), y).mean()
    costs = backward_costs(loss, PARAMS, *BATCHES[0])
    np.testing.assert_array_equal(t.costs.weight, costs.weight)
    spent = sum(t.costs.flops(mask) for mask in masks)
    assert history["flops_spent"][-1] == spent < 15 * t.costs.full
    assert history["flops_full"] == [t.costs.full * 3 * (i + 1) for i in range(5)]
    account = {}
    for mask in masks:
        account[tuple(mask)] = account.get(tuple(mask), 0) + 1
    report = t.get_priority_report()
    whole = priority_report(t.opt_state, t.params, costs=t.costs, account=account)
    assert report == whole and report.savings.exact
    # Cycles end at steps 4, 8, 12.
    assert history.cycles["step"] == [4, 8, 12]
    assert [sum(row) for row in history.cycles["quotas"]] == [4, 4, 4]
    assert [sum(row) for row in history.cycles["counts"]] == [4, 8, 12]


def test_an_optimizer_that_holds_a_schedule():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        prioritize(optax.sgd(0.1), budget=1, max_updates=3, recalc_every=3),
    )
    with pytest.warns(UserWarning, match="budget"):
        t = trainer(optimizer=tx, total_budget=-5)
        t.train(BATCHES, 1)
    assert t.recalc_every == 3 and t.get_priority_report().budget == 1


@pytest.mark.parametrize("costs", ["flops", "given"])
def test_a_budget_of_cost(costs):
    loss = lambda p, x, y: cross_entropy(net(p, x), y).mean()
    given = backward_costs(loss, PARAMS, *BATCHES[0])
    t = trainer(total_budget=0.8, costs="flops" if costs == "flops" else given)
    t.train(BATCHES[:2], 4)
    report = t.get_priority_report()
    assert report.savings.spent <= 0.8 * report.savings.full


# --- losses, padding, models that change


def test_padding_needs_no_other_program_and_changes_nothing():
    traces = []

    def loss_fn(logits, labels):
        traces.append(logits.shape)
        return cross_entropy(logits, labels)

    t = trainer(loss_fn=loss_fn, optimizer=optax.sgd(0.1))
    t.train(BATCHES[:1], 4)
    known = len(traces)
    t.train(BATCHES, 2)
    assert len(traces) == known and {shape[0] for shape in traces} == {8}


def test_a_scalar_loss_gets_what_came():
    shapes = []

    def loss_fn(logits, labels):
        shapes.append(logits.shape)
        return cross_entropy(logits, labels).mean()

    t = trainer(loss_fn=loss_fn, total_budget=None)
    history = t.train(BATCHES, 2)
    close(history["loss"], by_hand(optax.adam(0.05), 2)[2])
    assert {shape[0] for shape in shapes} == {6, 8}


def test_losses_by_token_are_averaged_over_tokens():
    x = RNG.normal(size=(5, 3, 4)).astype(np.float32)
    y = RNG.integers(0, 2, size=(5, 3))
    t = trainer(optimizer=optax.sgd(0.0))
    found = t.evaluate([(x[:3], y[:3]), (x[3:], y[3:])], metrics="accuracy")
    logits = net(PARAMS, x)
    assert found["loss"] == pytest.approx(
        float(cross_entropy(logits, y).mean()), rel=1e-5
    )
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == y).mean()))


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


def test_batch_statistics_are_those_of_the_examples():
    module = Normed()
    reference = nnx.clone(module)
    t = trainer(module, optax.sgd(0.0), total_budget=None)
    t.train(BATCHES, 2)
    for x, _ in BATCHES * 2:
        reference(x)
    close(t.state["norm"]["mean"], reference.norm.mean[...])
    close(module.norm.var[...], reference.norm.var[...])
    reference.eval()
    close(t.predict(X), reference(X))


def test_dropout_has_keys_of_its_own_and_the_same_again():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=deterministic)(x))

    def losses(seed):
        t = trainer(
            Dropping(),
            optax.sgd(0.0),
            example_input=X[:1],
            seed=seed,
            total_budget=None,
        )
        return t.train(BATCHES[:1], 3)["loss"]

    first = losses(1)
    assert len(set(first)) == 3 and first == losses(1) and first != losses(2)


def test_the_key_of_a_step():
    seen = []

    def loss_fn(model, batch, rng):
        noise = jax.random.normal(rng, (2,))
        return cross_entropy(model(batch[0]), batch[1]).mean(), {"noise": noise[0]}

    t = trainer(loss_fn=loss_fn, seed=5, total_budget=None)
    tell = lambda t, e: seen.append(e.metrics) if e.kind == "epoch" else None
    t.train(BATCHES[:1], 3, callbacks=tell)
    for i, metrics in enumerate(seen):
        key = jax.random.split(jax.random.fold_in(jax.random.key(5), i))[1]
        assert metrics["noise"] == jax.random.normal(key, (2,))[0]


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_a_loss_of_the_model(kind):
    def loss_fn(model, batch, rng):
        logits = model(batch["pixels"])
        losses = cross_entropy(logits, batch["digit"])
        return losses.mean(), {"hits": accuracy(logits, batch["digit"]).mean()}

    model, given = models()[kind]
    t = trainer(model, loss_fn=loss_fn, total_budget=None, **given)
    batches = [{"pixels": x, "digit": y} for x, y in BATCHES]
    history = t.train(batches, 2, eval_data=batches)
    close(history["loss"], by_hand(optax.adam(0.05), 2)[2])
    assert set(history) > {"hits", "eval_hits", "eval_loss"}
    hits = float((t.predict(X).argmax(-1) == Y).mean())
    assert history["eval_hits"][-1] == pytest.approx(hits)


def test_mixed_precision():
    seen = []

    def apply_fn(params, x):
        seen.append((params["first"]["kernel"].dtype, x.dtype))
        return net(params, x)

    t = trainer((PARAMS, apply_fn), compute_dtype=jnp.bfloat16, total_budget=None)
    history = t.train(BATCHES, 2)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 2}
    moments = optax.tree.get(t.opt_state, "ScaleByAdamState")
    dtypes = {x.dtype for x in jax.tree.leaves((t.params, moments.mu, moments.nu))}
    assert dtypes == {jnp.dtype("float32")}
    close(history["loss"], by_hand(optax.adam(0.05), 2)[2], rtol=0.02)
    assert t.predict(X).dtype == np.float32


# --- metrics, evaluation, prediction


def test_metrics_of_all_kinds():
    def largest(outputs, labels):
        return outputs.max()

    t = trainer(optimizer=optax.sgd(0.0))
    metrics = {
        "accuracy": "accuracy",
        "largest": largest,
        "miss": lambda o, y: 1 - accuracy(o, y),
    }
    history = t.train(BATCHES, 1, metrics=metrics, eval_data=BATCHES)
    logits = np.asarray(net(PARAMS, X))
    hits = (logits.argmax(-1) == Y).mean()
    assert history["accuracy"] == pytest.approx([hits])
    assert history["eval_miss"] == pytest.approx([1 - hits])
    by_batch = [
        logits[i : i + 8].max() * len(x)
        for i, (x, _) in zip((0, 8, 16), BATCHES, strict=True)
    ]
    assert history["largest"] == pytest.approx([sum(by_batch) / 22])
    found = t.evaluate(BATCHES)
    assert found.keys() == {"loss", *metrics} and list(found)[0] == "loss"
    assert found["largest"] == pytest.approx(sum(by_batch) / 22)
    assert t.evaluate(BATCHES, metrics=()).keys() == {"loss"}


@pytest.mark.parametrize(
    "outputs, labels, expected",
    [
        ([[1.0, 2.0], [3.0, 0.0]], [1, 1], [1, 0]),
        ([[1.0, 2.0], [3.0, 0.0]], [[0, 1], [0, 1]], [1, 0]),
        ([[0.5], [-0.5]], [[1], [1]], [1, 0]),
        ([0.5, -0.5], [1.0, 1.0], [1, 0]),
    ],
)
def test_accuracy(outputs, labels, expected):
    found = accuracy(jnp.array(outputs), jnp.array(labels))
    assert found.ravel().tolist() == expected


def test_names_of_metrics():
    assert resolve_metrics(None) == {} == resolve_metrics([])
    assert resolve_metrics("accuracy") == {"accuracy": accuracy}
    assert resolve_metrics({"top": "accuracy"}) == {"top": accuracy}
    for metrics, message in [
        ("accurcy", "'accurcy' is not known, only 'accuracy'"),
        ([accuracy, "accuracy"], "'accuracy' is taken"),
        ({"loss": accuracy}, "'loss' is taken"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_metrics(metrics)
    with pytest.raises(TypeError, match="must be a function"):
        resolve_metrics({"a": 3})


def test_predict():
    t = trainer()
    expected = net(PARAMS, X)
    close(t.predict(X, batch_size=8), expected)
    close(t.predict(BATCHES), expected)
    close(t.predict([x for x, _ in BATCHES]), expected)
    both = trainer((PARAMS, lambda p, x: {"logits": net(p, x["x"]), "x": x["x"]}))
    found = both.predict({"x": X}, batch_size=10)
    close(found["logits"], expected)
    assert isinstance(found["x"], np.ndarray)


# --- stopping, telling, going on


def test_events_and_stopping():
    events = []

    def tell(t, event):
        assert isinstance(event, Event) and event.step <= t.step
        events.append(event)

    t = trainer(total_budget=None)
    t.train(
        BATCHES, 15, callbacks=[tell, lambda t, e: e.kind == "epoch" and e.epoch == 13]
    )
    assert t.history.stopped == "callback" and t.epoch == 14 == len(t.history["loss"])
    groups = [e for e in events if e.kind == "step_group"]
    assert [e.step for e in groups] == [20, 40]
    assert groups[0].metrics.keys() == {"loss"}
    assert [e.epoch for e in events if e.kind == "epoch"] == list(range(14))
    assert t.train(BATCHES, 1).stopped is None and t.history["epoch"][-1] == 14


def test_two_calls_are_one():
    once, twice = trainer(), trainer()
    once.train(ArrayLoader((X, Y), 8), 4)
    for _ in range(2):
        twice.train(ArrayLoader((X, Y), 8), 2)
    assert once.history["loss"] == twice.history["loss"]
    assert once.get_priority_report() == twice.get_priority_report()
    twice.train(BATCHES, 1, metrics="accuracy", name="again")  # another program
    assert twice.history["accuracy"][:4] == [None] * 4 and twice.history.name == "again"
    assert twice.get_priority_report().savings.steps == twice.step == 15


def test_fit():
    t = trainer(optimizer=optax.adam(0.3))
    history = t.fit(BATCHES, 0.9, eval_data=BATCHES, max_epochs=60)
    assert history.stopped == "target"
    assert history["eval_accuracy"][-1] >= 0.9 > max(history["eval_accuracy"][:-1])
    bound = history["loss"][-1] * 0.999
    history = t.fit(BATCHES, bound, metric="loss", max_epochs=50)
    assert history.stopped == "target" and history["loss"][-1] <= bound
    assert t.fit(BATCHES, 0.0, metric="loss", max_epochs=1).stopped is None
    with pytest.raises(ValueError, match="needs eval_data="):
        t.fit(BATCHES, 0.9)
    with pytest.raises(ValueError, match="metric='f1' is none of epoch, step, loss"):
        t.fit(BATCHES, 0.9, metric="f1", metrics="accuracy")


# --- losses that are not finite


def poisoned(*bad):
    """Three epochs as one loader of nine batches."""
    batches = [(x.copy(), y) for x, y in BATCHES * 3]
    for i in bad:
        batches[i][0][0, 0] = np.nan
    return batches


@pytest.mark.parametrize("mode", ["dynamic", pytest.param("static", marks=SLOW)])
def test_skip(mode):
    t = trainer(Normed(), on_nonfinite="skip", mode=mode, optimizer=optax.sgd(0.1))
    history = t.train(poisoned(1, 4), 1)
    assert history["skipped"] == [2] and t.step == 9
    everything = jax.tree.leaves((t.params, t.state["norm"]))
    assert all(np.isfinite(x).all() for x in everything)
    assert np.isfinite(history["loss"][0])


def test_skipped_steps_are_left_out():
    t = trainer(on_nonfinite="skip", total_budget=None)
    history = t.train(poisoned(0, 4, 8), 1)
    batches = [b for i, b in enumerate(BATCHES * 3) if i not in (0, 4, 8)]
    params, _, losses, _ = by_hand(optax.adam(0.05), 1, batches)
    close(t.params, params)
    close(history["loss"], losses)


def test_raise():
    t = trainer(total_budget=None)
    with pytest.raises(FloatingPointError, match="epoch 2, at step 14 of the run"):
        batches = iter([poisoned(), poisoned(4)])
        t.train(lambda: next(batches), 2)
    batches = BATCHES * 6
    del batches[13]
    close(t.params, by_hand(optax.adam(0.05), 1, batches)[0])
    assert len(t.history["loss"]) == 1


# --- what cannot be meant


def test_bad_batches():
    t = trainer()
    for batches, message in [
        ([], "no batch in epoch 1"),
        ([(X, Y, Y)], "got a tuple of 3"),
        ([X], "got an array of shape"),
        ([{"x": X, "target": Y}], "got a mapping with the keys 'x', 'target'"),
        ([(X, Y[:3])], r"22 in batch\[0\] and 3 in batch\[1\]"),
        ([(X, Y), {"x": X, "y": Y}], r"batch\['x'\] was not in the first one"),
        ([({"a": X}, Y), ({"b": X}, Y)], r"batch\[0\]\['b'\] was not in the first"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(
                (PARAMS, lambda p, x: net(p, jax.tree.leaves(x)[0])), total_budget=None
            ).train(batches, 1)
    with pytest.raises(ValueError, match="gone through only once"):
        t.train(iter(BATCHES), 2)
    with pytest.raises(ValueError, match="loss must be a scalar, or have an entry for"):
        trainer(loss_fn=lambda a, b: a[:3, 0]).train(BATCHES, 1)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"loss_fn": lambda a: a}, TypeError, r"got a function of \(a\)"),
        ({"loss_fn": lambda a, b, c, d: a}, TypeError, "a, b, c, d"),
        ({"optimizer": 3}, TypeError, "optimizer must be an optax"),
        ({"total_budget": -1}, ValueError, "budget"),
        ({"mode": "fast"}, ValueError, "mode"),
        ({"transformation": "mask"}, ValueError, "transformation"),
        ({"depths": "deep"}, ValueError, "depths"),
        ({"costs": "watts"}, ValueError, "costs"),
        ({"costs": 3}, TypeError, "costs"),
        ({"costs": "flops", "total_budget": 100}, ValueError, "share of the cost"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"compute_dtype": jnp.int32}, ValueError, "compute_dtype"),
        ({"seed": -1}, ValueError, "seed"),
        ({"model": (({}, net))}, ValueError, "no trainable parameters"),
    ],
)
def test_bad_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        trainer(**settings)


def test_bad_calls():
    t = trainer()
    with pytest.raises(ValueError, match="call train first"):
        t.get_priority_report()
    with pytest.raises(ValueError, match="checkpoint_dir="):
        t.train(BATCHES, 1, resume=True)
    with pytest.raises(ValueError, match="epochs"):
        t.train(BATCHES, -1)
    with pytest.raises(TypeError, match="callbacks must be functions"):
        t.train(BATCHES, 1, callbacks=[3])
    of_model = trainer(loss_fn=lambda model, batch, rng: 0.0)
    with pytest.raises(ValueError, match="returns its own"):
        of_model.train(BATCHES, 1, metrics="accuracy")
    for loss_fn, message in [
        (lambda model, batch, rng: model(batch[0]), "must return scalars, got 'loss'"),
        (lambda model, batch, rng: (1.0, {"loss": 1.0}), "'loss' of a metric is taken"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(loss_fn=loss_fn).train(BATCHES, 1)
    with pytest.raises(TypeError, match="metrics a dict of scalars, got list"):
        trainer(loss_fn=lambda model, batch, rng: (1.0, [1.0])).train(BATCHES, 1)


# --- what is kept


@pytest.mark.parametrize("kind", ["leaf", "axis", "element"])
@pytest.mark.parametrize("leaves", [1, 3])
def test_statistics_by_leaf(kind, leaves):
    """On the device as in the report, which takes them to the host one by one."""
    params = {f"layer_{i}": jnp.ones((2, i + 1)) for i in range(leaves)}
    units = unit_axes(params, lambda path, x: (0,)) if kind == "axis" else kind
    tx = priority_prop(0.5, units=units, recalc_every=3, max_updates=3)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jnp.cumsum(p.ravel()).reshape(p.shape), params)
    for _ in range(4):
        _, state = tx.update(grads, state, params)
    counts, quotas, scores = by_leaf_on_device(state, params)(state)
    report = {leaf.path: leaf for leaf in priority_report(state, params).leaves}
    for i, name in enumerate(params):
        leaf = report[name]
        assert (leaf.count, leaf.quota) == (counts[i], quotas[i])
        assert leaf.score == pytest.approx(float(scores[i]), rel=1e-6)


@functools.cache
def _costs():
    loss = lambda p, x, y: cross_entropy(net(p, x), y).mean()
    return backward_costs(loss, PARAMS, *BATCHES[0])


MASKS = st.lists(st.sampled_from(list(itertools.product([False, True], repeat=2))))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(static=MASKS, dynamic=MASKS, more=MASKS)
def test_the_account_is_a_sum_over_steps(static, dynamic, more):
    costs = _costs()
    account, computed = Account(costs), collections.Counter()
    mask = lambda due: static_mask(dict(zip("ab", due, strict=True)))
    for due in static:
        computed[mask(due)] += 1
        account.follow(computed)
    for due in dynamic:
        account.add(np.array(due))
    account = Account(costs, json.loads(json.dumps(account.to_dict())))
    account.skip(computed)
    for due in more:
        computed[mask(due)] += 1
    account.follow(computed)
    every = static + dynamic + more
    assert account.spent == pytest.approx(sum(map(costs.flops, every)))
    assert account.full == pytest.approx(costs.full * len(every))


def test_nothing_waits_and_nothing_grows():
    queue, read = Background(delay=3), []
    for i in range(10):
        queue.push(i, {"x": jnp.int32(i)})
        read += [(tag, int(tree["x"])) for tag, tree in queue.pop()]
        # Four at once, and the last three stay.
        assert read == [(j, j) for j in range((i - 2) // 4 * 4)]
    read += [(tag, int(tree["x"])) for tag, tree in queue.pop(everything=True)]
    assert read == [(j, j) for j in range(10)]
    means = Means()
    assert means.means() == {}
    means.add([EXAMPLES, STEPS, "a", "loss"], np.array([2.0, 1.0, 3.0, 4.0]))
    means.add([EXAMPLES, STEPS, "a", "loss"], np.array([0.0, 0.0, 0.0, 0.0]))
    assert means.means() == {"loss": 2.0, "a": 1.5} and means.entries == 2


# --- checkpoints and devices; more of both in the tests of these


def states(t):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    arrays = jax.tree.leaves((t.params, t.state, t.opt_state))
    plain = (jax.random.key_data(x) if is_key(x) else x for x in arrays)
    return [np.asarray(x).tobytes() for x in plain]


@pytest.mark.parametrize("mode", ["static", pytest.param("dynamic", marks=SLOW)])
def test_resume_in_the_middle_of_an_epoch(tmp_path, mode):
    loader = lambda: ArrayLoader((X, Y), 8, seed=1)
    model = {"static": Nnx, "dynamic": Normed}[mode]
    make = lambda path=None, **settings: trainer(
        model(), mode=mode, checkpoint_dir=path, save_every_steps=5, keep=1, **settings
    )
    whole = make()
    whole.train(loader(), 4, metrics="accuracy", eval_data=BATCHES)

    class Killed(Exception):
        pass

    class Killing(ArrayLoader):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if 3 * self.epoch + i == 9:
                    raise Killed
                yield batch

    first = make(tmp_path)
    with pytest.raises(Killed):
        first.train(
            Killing((X, Y), 8, seed=1), 4, metrics="accuracy", eval_data=BATCHES
        )
    second = make(tmp_path)
    seen = []
    history = second.train(
        loader(),
        4,
        metrics="accuracy",
        eval_data=BATCHES,
        resume=True,
        callbacks=lambda t, e: seen.append(e.epoch) if e.kind == "epoch" else None,
    )
    assert seen == [1, 2, 3] and second.step == 12
    assert states(second) == states(whole)
    times = {"seconds", "compile_seconds"}
    for name in set(history) - times:
        assert history[name] == whole.history[name], name
    assert history.cycles == whole.history.cycles
    assert second.get_priority_report() == whole.get_priority_report()
    # Resumed once more, there is nothing left to do.
    third = make(tmp_path)
    assert third.train(loader(), 4, resume=True)["loss"] == history["loss"]
    assert states(third) == states(whole)
    # Another model, another seed, and no resuming.
    other = {"another": {"kernel": np.ones((4, 2), np.float32)}}
    with pytest.raises(
        ValueError, match="another model: .*'first/.* where .*'another/k"
    ):
        trainer((other, net), checkpoint_dir=tmp_path).train(BATCHES, 5, resume=True)
    with pytest.raises(ValueError, match="seed=0, this trainer has seed=3"):
        make(tmp_path, seed=3).train(BATCHES, 5, resume=True)
    with pytest.raises(FileExistsError, match="resume=True"):
        make(tmp_path).train(BATCHES, 1)


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_several_devices(sharding):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    params = {k: {"kernel": v["kernel"]} for k, v in PARAMS.items()}
    one, two = (
        trainer((params, net)),
        trainer((params, net), mesh=mesh, sharding=sharding),
    )
    one.train(BATCHES, 2)
    two.train(BATCHES, 2)
    close(two.history["loss"], one.history["loss"])
    close(two.params, one.params)
    assert one.history["updates"] == two.history["updates"]
    found = {x.sharding.is_fully_replicated for x in jax.tree.leaves(two.params)}
    assert found == ({True} if sharding is None else {False})
    close(two.predict(X), one.predict(X))

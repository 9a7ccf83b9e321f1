"""A tour in five minutes: gradients, scores, quotas, a schedule, savings, a report.

An editor that knows `# %%` shows this file as a notebook; it also runs as it is.
"""

# %% [markdown]
# Training updates every parameter at every step. Here a fixed budget of updates goes to
# the parameters with the highest priority, and the work for the others is left out.

# %% Scanned digits, and a small network in plain JAX.
import jax
import jax.numpy as jnp
import numpy as np
import optax

import priorityprop_jax as pp
from _data import argument_parser, load_images
from priorityprop_jax import plots
from priorityprop_jax.training import ArrayLoader


parser = argument_parser("A tour of the package, to be read along with its output.")
parser.add_argument("--save", help="a directory to write the picture and the page to")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
data = load_images(args.data_dir)
sizes = [data.train_images[0].size, 64, 64, data.classes]
params = {
    f"layer_{i}": {
        "b": jnp.zeros((1, n)),
        "w": jax.random.normal(jax.random.key(i), (m, n)) * m**-0.5,
    }
    for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
}


def predict(params, images):
    x = images.reshape(len(images), -1)
    for i in range(3):
        x = x @ params[f"layer_{i}"]["w"] + params[f"layer_{i}"]["b"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def loss(params, images, labels):
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


batch = data.train_images[:64], data.train_labels[:64]
grads = jax.grad(loss)(params, *batch)
paths = [f"{layer}/{leaf}" for layer in params for leaf in params[layer]]

# %% [markdown]
# Scores: |gradient| x 1 / (1 + updates so far) x depth factor. Depths are read off the
# computation; the factor grows from 1 at the loss to 2 at the input.

# %%
depths = np.array(jax.tree.leaves(pp.infer_depths(loss, params, *batch)))
norms = np.array([jnp.linalg.norm(g) for g in jax.tree.leaves(grads)])
counts = np.zeros(6)
scores = norms / (1 + counts) * (1 + depths / depths.max())
for row in zip(paths, depths, norms, scores, strict=True):
    print("{:12} depth {}  |gradient| {:.3f}  score {:.3f}".format(*row))

# %% [markdown]
# Quotas: the budget of a cycle of 10 steps, half of all 6 x 10 updates, in proportion
# to the scores, in integers, at least 1 and at most 20 for each. The schedule spreads
# them over the steps: sets are nested, and at the first step all are due.

# %%
quotas = pp.allocate(jnp.array(scores), budget=30)
for path, quota, due in zip(paths, quotas, pp.schedule(quotas, 10).T, strict=True):
    print(f"{path:12} {quota:2} updates:", *("." if k == 0 else k for k in due))

# %% [markdown]
# The transformation does all that inside of optax. What rests, rests: it does not move,
# and the inner optimizer's state for it stays as it is.

# %%
tx = pp.prioritize(optax.adam(1e-3), budget=30)
update = jax.jit(tx.update)
updates, state = update(grads, tx.init(params), params)
print("quotas by hand and by optax:", quotas, optax.tree.get(state, "quotas"))
updates, state = update(grads, state, params)
counts, updates = optax.tree.get(state, "counts"), jax.tree.leaves(updates)
for path, u, n in zip(paths, updates, counts, strict=True):
    moved = "moved" if jnp.any(u != 0) else "rested"
    print(f"{path:12} {moved} at the second step, {n} updates so far")

# %% [markdown]
# So far all gradients were computed. `value_and_grad` with a mask leaves out the rest:
# weight gradients of resting leaves, and everything below the lowest active layer.

# %%
last = {name: name == "layer_2" for name in params}
full = jax.jit(jax.value_and_grad(loss)).lower(params, *batch).compile()
masked = lambda *args: pp.value_and_grad(loss)(*args, active=last)
cut = jax.jit(masked).lower(params, *batch).compile()
same = jnp.allclose(cut(params, *batch)[1]["layer_2"]["w"], grads["layer_2"]["w"])
print("the last layer gets the gradient that it would have had:", same)
print(
    f"FLOPs, as XLA counts: {full.cost_analysis()['flops']:,.0f} for all, "
    f"{cut.cost_analysis()['flops']:,.0f} for the last layer"
)

# %% [markdown]
# Costs are known before anything runs. The forward pass is never saved: a budget of
# cost has a floor, and to train the last layer alone is hardly three times cheaper.

# %%
costs = pp.backward_costs(loss, params, *batch)
print(costs)
least = (costs.full + 9 * costs.forward) / (10 * costs.full)
print(f"least share that a budget can be, with one full step in ten: {least:.2f}")

# %% [markdown]
# The trainer puts it together: the optimizer alone, and a budget of 60 % of the FLOPs.

# %%
loss_fn = optax.softmax_cross_entropy_with_integer_labels
runs = {}
for name, budget, by in [("full", None, None), ("0.6 of the FLOPs", 0.6, "flops")]:
    trainer = pp.PriorityPropTrainer(
        (params, predict), optax.adam(1e-3), loss_fn, budget, costs=by, mode="dynamic"
    )
    runs[name] = trainer.train(
        ArrayLoader(data[:2], 64),
        epochs=1 if args.quick else 15,
        eval_data=ArrayLoader(data[2:], 256),
        metrics="accuracy",
        name=name,
    )
    reached, spent = runs[name]["eval_accuracy"][-1], runs[name]["flops_spent"][-1]
    print(f"{name:17} test accuracy {reached:.2%}, {spent:.3g} FLOPs")
print(f"One run each; one test image is {1 / len(data.test_labels):.2%} of accuracy.")

# %% The report: who got what, and what was saved.
report = trainer.get_priority_report()
print(report)

# %% [markdown]
# And as a picture: who was updated when, from the first step to the last.

# %%
try:
    figure = plots.updates_over_time(trainer.history)
except ImportError as error:  # pictures need matplotlib, all else does not
    raise SystemExit(str(error)) from None
if args.save:
    figure.savefig(f"{args.save}/updates.png", dpi=150)
    report.html(f"{args.save}/report.html", trainer.history, runs)
    print(f"wrote updates.png and report.html to {args.save}")
figure  # noqa: B018 (a notebook shows it)

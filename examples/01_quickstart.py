"""A small Flax network on real images: plain Adam, and Adam under a budget of updates.

Trains the same network three times from the same start on the same batches, and prints
the test accuracy, the updates that were spent, and who got them:

    python examples/01_quickstart.py
    python examples/01_quickstart.py --data-dir mnist --budget 0.25
"""

import sys

import jax
import optax
from flax import linen as nn

from _data import argument_parser, batches, Images, load_images
from priorityprop_jax import prioritize, priority_prop, priority_report


class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for features in (16, 32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(self.classes)(x)


def number(text: str) -> int | float:
    """An integer is a number of updates per cycle, a float a share of all of them."""
    return int(text) if text.isdigit() else float(text)


def train(name: str, tx: optax.GradientTransformation, params, data: Images, args):
    model = CNN(data.classes)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = model.apply(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    data_of_run = batches(*data[:2], size=64, steps=args.steps, seed=args.seed)
    for step, batch in enumerate(data_of_run, start=1):
        params, opt_state, loss = train_step(params, opt_state, *batch)
        if sys.stdout.isatty() and (step % 50 == 0 or step == args.steps):
            print(f"\r{name}: step {step}/{args.steps}, loss {loss:.3f} ", end="")
    if sys.stdout.isatty():
        print("\r\033[K", end="")  # the table takes the place of the progress line

    logits = jax.jit(model.apply)(params, data.test_images)
    return params, opt_state, (logits.argmax(-1) == data.test_labels).mean()


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--budget", type=number, default=0.5, help="0.5, or 40 a cycle")
    args = parser.parse_args()
    args.steps = 30 if args.quick else args.steps
    data = load_images(args.data_dir)
    start = CNN(data.classes).init(jax.random.key(args.seed), data.train_images[:1])
    adam, budget = optax.adam(1e-3), args.budget

    print(f"{'':34}{'test accuracy':>14}{'updates':>10}")
    for name, tx in {
        "adam": adam,
        "chain(priority_prop, adam)": optax.chain(priority_prop(budget), adam),
        "prioritize(adam)": prioritize(adam, budget),
    }.items():
        params, opt_state, accuracy = train(name, tx, start, data, args)
        spent = args.steps * len(jax.tree.leaves(params))
        if tx is not adam:
            spent = int(optax.tree.get(opt_state, "counts").sum())
        print(f"{name:34}{accuracy:14.2%}{spent:10,}")

    print(f"\n{name} gave its updates to:\n{priority_report(opt_state, params)}\n")
    one = 1 / len(data.test_labels)
    print(f"One run each (seed {args.seed}); one test image is {one:.2%} of accuracy.")


if __name__ == "__main__":
    main()

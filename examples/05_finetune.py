"""Fine-tuning four ways: all, a budget of cost, the last layers, a cached prefix.

A CNN learns one half of the classes. With a new last layer it then learns the other
half from few images, four times from the same start on the same batches. `costs=` makes
the budget one of FLOPs; `CachedPrefix` keeps what resting layers make of an image.
"""

import time

import jax
import numpy as np
import optax
from flax import linen as nn

import priorityprop_jax as pp
from _data import argument_parser, batches, load_images


class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for features, strides in [(32, 1), (64, 2), (64, 2)]:
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


def half(images, labels, classes, most=None):
    chosen = np.flatnonzero(np.isin(labels, classes))[:most]
    return images[chosen], labels[chosen] - classes[0]


def make_step(loss, tx, active=True):
    def step(params, opt_state, *batch):
        _, grads = pp.value_and_grad(loss)(params, *batch, active=active)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


def main():
    args = argument_parser(__doc__).parse_args()
    steps = 20 if args.quick else 300
    data = load_images(args.data_dir)
    first, second = np.array_split(np.arange(data.classes), 2)
    model = CNN(len(first))
    images, labels = half(*data[:2], second, most=1000)
    test_images, test_labels = half(*data[2:], second)

    def loss(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train(step, tx, params, images, labels, cache=None):
        params = jax.tree.map(lambda p: p.copy(), params)  # steps reuse their memory
        opt_state, start = tx.init(params), time.perf_counter()
        every = np.arange(len(labels))
        for ids, y in batches(every, labels, size=64, steps=steps, seed=args.seed):
            batch = images[ids], y
            if cache is not None:
                batch = cache(params, ids, *batch), *batch
            params, opt_state, *_ = step(params, opt_state, *batch)
        jax.block_until_ready(params)
        return params, opt_state, (time.perf_counter() - start) / steps

    adam = optax.adam(1e-3)
    params = model.init(jax.random.key(args.seed), images[:1])
    params, *_ = train(make_step(loss, adam), adam, params, *half(*data[:2], first))
    fresh = model.init(jax.random.key(args.seed + 1), images[:1])
    params["params"]["Dense_1"] = fresh["params"]["Dense_1"]

    batch = images[:64], labels[:64]
    costs = pp.backward_costs(loss, params, *batch)
    within = pp.prioritize(adam, budget=0.5, costs=costs)
    is_dense = lambda path, _: "Dense" in jax.tree_util.keystr(path)
    dense = jax.tree_util.tree_map_with_path(is_dense, params)
    masked = optax.masked(adam, dense)
    kept = pp.CachedPrefix(loss, params, dense, *batch, num_examples=len(labels))
    print(f"{'':20}{'test accuracy':>14}{'MFLOP/step':>12}{'ms/step':>9}")
    for name, step, tx, cache in [
        ("all leaves", make_step(loss, adam), adam, None),
        ("half of the FLOPs", pp.make_train_step(loss, within), within, None),
        ("dense layers only", make_step(loss, masked, dense), masked, None),
        ("the same, cached", make_step(kept.loss, masked, dense), masked, kept),
    ]:
        # Once to compile all that will be needed, and once for the time.
        train(step, tx, params, images, labels, cache)
        kept.clear()
        tuned, opt_state, seconds = train(step, tx, params, images, labels, cache)
        flops = costs.full if tx is adam else costs.flops(dense)
        if tx is within:
            report = pp.priority_report(opt_state, tuned, costs=costs)
            flops = report.savings.spent / steps
        if cache is not None:
            flops -= cache.stats.flops_saved / (2 * steps)  # of both times
        hits = jax.jit(model.apply)(tuned, test_images).argmax(-1) == test_labels
        print(f"{name:20}{hits.mean():14.2%}{flops / 1e6:12.1f}{seconds * 1e3:9.2f}")
    print(f"One run each (seed {args.seed}), {steps} steps on {len(labels):,} images;")
    print(f"one test image is {1 / len(test_labels):.2%} of accuracy.")


if __name__ == "__main__":
    main()

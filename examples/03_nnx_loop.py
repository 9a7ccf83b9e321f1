"""Flax nnx: `prioritize` in an `nnx.Optimizer`, behind a clip, with a schedule inside.

Clipping by the global norm needs the gradients of all parameters at once, so it stands
in front of `prioritize`, which gives each parameter its own AdamW. The cosine schedule
follows the steps of the run, not the updates of a parameter: a layer that has rested is
at the same learning rate as one that has not. The attributes of an nnx module come in
alphabetical order, so the depths are read off the computation.
"""

import optax
from flax import nnx

from _data import argument_parser, batches, load_images
from priorityprop_jax import infer_depths, prioritize, priority_report


class CNN(nnx.Module):
    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.conv3 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.norm(self.conv2(x)))
        x = nnx.relu(self.conv3(x))
        return self.head(x.mean((1, 2)))


def loss_fn(model: CNN, images, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return losses.mean()


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, images, labels):
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


def main():
    parser = argument_parser(__doc__)
    args = parser.parse_args()
    steps = 30 if args.quick else 600
    data = load_images(args.data_dir)

    model = CNN(data.classes, rngs=nnx.Rngs(args.seed))
    model.eval()  # BatchNorm uses its running averages, and leaves them as they are
    graph, params, others = nnx.split(model, nnx.Param, ...)
    predict = lambda params, images: nnx.merge(graph, params, others)(images)
    depths = infer_depths(predict, params, data.train_images[:1])
    model.train()

    learning_rate = optax.cosine_decay_schedule(3e-3, decay_steps=steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        prioritize(optax.adamw(learning_rate), budget=0.5, depths=depths),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    batches_of_run = batches(*data[:2], size=64, steps=steps, seed=args.seed)
    for step, batch in enumerate(batches_of_run, start=1):
        loss = train_step(model, optimizer, *batch)
        if step in (1, steps):
            print(f"step {step}: loss {loss:.3f}")

    model.eval()
    logits = nnx.jit(lambda model, x: model(x))(model, data.test_images)
    accuracy = (logits.argmax(-1) == data.test_labels).mean()
    print(f"test accuracy {accuracy:.2%}\n")
    print(priority_report(optimizer.opt_state, nnx.state(model, nnx.Param)))


if __name__ == "__main__":
    main()

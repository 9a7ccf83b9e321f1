"""Flax linen: `prioritize` in a `TrainState`, with depths read off the computation.

Only the two lines that make `tx` differ from an ordinary loop. What the budget has to
remember lies in `state.opt_state` and is saved with it: this run stops in the middle of
a cycle, is restored from bytes, and goes on.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn, serialization
from flax.training.train_state import TrainState

from _data import argument_parser, batches, load_images
from priorityprop_jax import infer_depths, prioritize, priority_report


class ResidualMLP(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64)(x.reshape(len(x), -1))
        for _ in range(3):
            x = x + nn.Dense(64)(nn.relu(nn.LayerNorm()(x)))
        return nn.Dense(self.classes)(x)


@jax.jit
def train_step(state: TrainState, images, labels):
    def loss_fn(params):
        logits = state.apply_fn(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main():
    parser = argument_parser(__doc__)
    args = parser.parse_args()
    steps = 25 if args.quick else 495  # 5 steps into a cycle of 10
    data = load_images(args.data_dir)

    model = ResidualMLP(data.classes)
    params = model.init(jax.random.key(args.seed), data.train_images[:1])
    depths = infer_depths(model.apply, params, data.train_images[:1])
    tx = prioritize(optax.adamw(1e-3), budget=0.5, depths=depths)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.replace(step=jnp.int32(0))  # an int would be traced once more

    for batch in batches(*data[:2], size=64, steps=steps, seed=args.seed):
        state, loss = train_step(state, *batch)
    print(f"step {state.step}: loss {loss:.3f}")

    saved = serialization.to_bytes(state)
    fresh = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = serialization.from_bytes(fresh, saved)
    print(f"restored {len(saved):,} bytes")

    for batch in batches(*data[:2], size=64, steps=steps, seed=args.seed + 1):
        state, loss = train_step(state, *batch)
    logits = jax.jit(model.apply)(state.params, data.test_images)
    accuracy = (logits.argmax(-1) == data.test_labels).mean()
    print(f"step {state.step}: loss {loss:.3f}, test accuracy {accuracy:.2%}\n")
    print(priority_report(state.opt_state, state.params))


if __name__ == "__main__":
    main()

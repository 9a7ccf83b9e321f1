"""A small transformer that learns to write, under a budget of 60 % of the FLOPs.

`PriorityPropTrainer` takes the nnx module, an optimizer and a loss, and does the rest:
depths and costs are read off the first batch. Another way to spend 60 % is to train all
leaves and to stop early, so the table has that, too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from _data import argument_parser, load_characters
from priorityprop_jax import PriorityPropTrainer
from priorityprop_jax.training import ArrayLoader


CONTEXT, WIDTH, HEADS = 64, 64, 2


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        heads = self.qkv(self.norm1(x)).reshape(*x.shape[:2], HEADS, -1)
        q, k, v = jnp.split(heads, 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, characters: int, layers: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def write(model: Transformer, start: np.ndarray, count: int, seed: int) -> list[int]:
    """`count` characters after those of `start`, drawn one by one."""

    @nnx.jit
    def draw(model, ids, key):
        return jax.random.categorical(key, model(ids[None])[0, -1])

    ids, keys = list(start), jax.random.split(jax.random.key(seed), count)
    for key in keys:
        ids.append(int(draw(model, np.array(ids[-CONTEXT:], np.int32), key)))
    return ids[len(start) :]


def main():
    about = "*.txt to learn from (default: Python's own help)"
    args = argument_parser(__doc__, about).parse_args()
    layers, batches = (1, 2) if args.quick else (2, 60)  # in each of five epochs
    data = load_characters(args.data_dir, CONTEXT)
    loader = ArrayLoader([x[: 32 * batches] for x in data.train], 32, seed=args.seed)
    runs = {}
    for budget in (None, 0.6):
        model = Transformer(data.classes, layers, nnx.Rngs(args.seed))
        trainer = PriorityPropTrainer(
            model,
            optax.adamw(2e-3),
            optax.softmax_cross_entropy_with_integer_labels,
            budget,
            costs="flops" if budget else None,
            # One program for all steps: where there are but few, that is the fastest.
            mode="dynamic" if budget else "auto",
            seed=args.seed,
        )
        tests = ArrayLoader(data.test, 64)
        runs[budget] = trainer.train(loader, epochs=5, eval_data=tests)

    print(f"{'':25}{'bits per character':>18}{'steps':>7}{'FLOPs':>10}{'seconds':>9}")
    for name, budget, epoch in [
        ("all leaves", None, 5),
        ("all leaves, stopped early", None, 3),
        ("a budget of 0.6", 0.6, 5),
    ]:
        names = "eval_loss", "step", "flops_spent", "seconds"
        loss, step, flops, seconds = (runs[budget][x][epoch - 1] for x in names)
        bits = loss / np.log(2)
        print(f"{name:25}{bits:18.3f}{step:7}{flops:10.3g}{seconds:9.1f}")
    print(f"One run each (seed {args.seed}), seconds with those of compiling.")

    print(f"\nUnder the budget:\n{trainer.get_priority_report().savings}")
    text = write(model, data.test[0][0], 200, args.seed)
    print(f"\nIt writes:\n{''.join(data.alphabet[i] for i in text)}")


if __name__ == "__main__":
    main()

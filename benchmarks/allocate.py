"""What does an allocation cost, next to the bare sort that it takes at the least?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from _timing import as_rows, Case, compare, parser, print_table, write_json

from priorityprop_jax import allocate


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--sizes", type=float, nargs="+", default=[1e3, 1e4, 1e5, 1e6, 1e7]
    )
    args = options.parse_args()
    rows = []
    for size in map(int, args.sizes):
        timings = compare(cases(size), args.rounds or max(5, min(20, 10**7 // size)))
        print(f"{size=:,}")
        print_table(timings)
        rows += as_rows(timings, size=size)
    print("written to", write_json("allocate", rows, args.out).name)


def cases(size: int) -> dict[str, Case]:
    """Scores over six orders of magnitude; half of the units are at a bound."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.lognormal(sigma=2, size=size), jnp.float32)
    arguments = (scores, 5 * size)
    found = {"jnp.argsort": Case(jax.jit(jnp.argsort), (scores,))}
    for method in ("argsort", "bisect"):
        function = jax.jit(functools.partial(allocate, method=method))
        found[f"allocate({method})"] = Case(function, arguments)
    return found


if __name__ == "__main__":
    main()

"""A million random operations on the prefix cache against the naive model of the tests.

    python benchmarks/soak_prefix_cache.py --operations 1000000 --seed 0

Pools of 2 to 64 pages of 1 to 5 tokens, so that eviction and failed reservations happen all the time. A failure names
the seed of its life; `--seed` and `--lives 1` repeat it. Every slot of every live handle is looked at after every
operation. Also what `make sanitize` runs against an instrumented build.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from prefix_cache_oracle import Oracle

LIFE = 2000  # operations on one pool


def live_once(seed: int, operations: int) -> dict[str, int]:
    """A pool's life: returns the cache's counters at its end."""
    rng = random.Random(seed)
    oracle = Oracle(rng.randint(2, 64), rng.randint(1, 5))
    try:
        oracle.random_steps(operations, seed)
    except Exception:
        print(f"failed in the life with seed {seed}, after {oracle.steps} operations", file=sys.stderr)
        raise
    return oracle.cache.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--lives", type=int, help="pools to run instead of a number of operations")
    parser.add_argument("--seed", type=int, default=0, help="of the first pool; the next one has the next seed")
    args = parser.parse_args()
    lives = args.lives or -(-args.operations // LIFE)
    start, shown, seen = time.perf_counter(), 0.0, Counter[str]()
    for seed in range(args.seed, args.seed + lives):
        stats = live_once(seed, LIFE)
        seen.update({name: stats[name] for name in ("evicted", "copies", "deduplicated", "hit_tokens")})
        elapsed = time.perf_counter() - start
        if elapsed - shown > 10 or seed == args.seed + lives - 1:
            shown = elapsed
            counts = ", ".join(f"{value} {name}" for name, value in seen.items())
            print(f"{(seed - args.seed + 1) * LIFE} operations in {elapsed:.0f} s: {counts}", flush=True)


if __name__ == "__main__":
    main()

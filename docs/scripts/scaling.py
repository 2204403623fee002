"""The tables of docs/scaling-out.md: simulated times of a GPO iteration on 8 to 1,024 GPUs, from stated assumptions.

    python docs/scripts/scaling.py

Nothing here is measured. Lengths follow a truncated log-normal distribution; expectations of the longest of n and of
the most searches of any GPU are exact sums over that distribution, so the tables need no random numbers.
"""

from __future__ import annotations

import math
from functools import cache

# -- the assumptions, as the page states them -------------------------------------------------------------------
PARAMETERS = 7.6e9  # R1-Distill-Qwen-7B (docs/scripts/memory.py)
WEIGHT_BYTES = 2 * PARAMETERS
KV_BYTES = 57_344  # of one token
ADAPTER_PARAMETERS = 81e6  # LoRA r=32 on all linear layers

BANDWIDTH = 3.35e12 * 0.6  # bytes/s that decoding reaches
FLOPS = 989e12 * 0.4  # that training reaches
NETWORK = 50e9 * 0.8  # bytes/s of a GPU to another machine
LATENCY = 10e-6  # seconds of one step of a ring
HOST_LINK = 25e9  # bytes/s between a GPU and its host
STORE = 5e9  # bytes/s of Ray's object store from machine to machine
GPUS_PER_MACHINE = 8

PROMPTS, GENERATIONS, PROMPT_TOKENS = 8, 8, 200  # per GPU and iteration; tokens of a prompt
MEDIAN_LENGTH, SPREAD, LONGEST = 1500.0, 0.6, 8192  # of completions
MIXED = 0.5  # probability that a group has right and wrong completions
STEPS, SAMPLES = 16, 4  # steps of a trajectory, N
UNIFORM, RACING = 1.0, 0.4  # continuations as a share of the uniform search's
RESETS, ROWS = 4, 256  # rollouts from a critical step; rows that decode together

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


# -- lengths ----------------------------------------------------------------------------------------------------


def share_below(length: float) -> float:
    """P(completion is at most so long); all that would be longer end at LONGEST."""
    if length >= LONGEST:
        return 1.0
    return 0.5 * math.erfc(-math.log(max(length, 1e-9) / MEDIAN_LENGTH) / (SPREAD * math.sqrt(2)))


@cache
def expected_longest(count: int) -> float:
    """Mean length of the longest of `count` completions."""
    return sum(1.0 - share_below(length) ** count for length in range(LONGEST))


@cache
def expected_square() -> float:
    return sum(2 * length * (1.0 - share_below(length)) for length in range(LONGEST))


# -- phases of an iteration, in seconds ---------------------------------------------------------------------------


def decode_seconds(rows: float, waits_for: int) -> float:
    """`rows` completions on a GPU, until the longest of the `waits_for` of all GPUs has ended.

    Each step reads the weights once and the keys and values of the rows that run. Beyond ROWS rows the others wait
    for a free place (list scheduling: the tail of the longest comes on top of the work that fills all places).
    """
    if rows == 0:
        return 0.0
    steps = expected_longest(max(1, waits_for)) + max(0.0, rows - ROWS) * expected_longest(1) / ROWS
    keys = rows * (expected_square() / 2 + PROMPT_TOKENS * expected_longest(1)) * KV_BYTES
    return (steps * WEIGHT_BYTES + keys) / BANDWIDTH


def sample_seconds(gpus: int, prompts: int) -> float:
    """The base rollouts."""
    rows = prompts * GENERATIONS
    return decode_seconds(rows, rows * gpus)


def most_searches(gpus: int, prompts: int) -> list[float]:
    """Probabilities of the most searches of any GPU being 0, 1, ... prompts."""
    one = [math.comb(prompts, k) * MIXED**k * (1 - MIXED) ** (prompts - k) for k in range(prompts + 1)]
    below = [min(1.0, sum(one[: k + 1])) ** gpus for k in range(prompts + 1)]
    return [b - a for a, b in zip([0.0, *below], below)]


def search_seconds(gpus: int, prompts: int, share: float) -> float:
    """Search and resets of the GPU that has most of them; each row is half a trajectory long."""
    per_search = STEPS * SAMPLES * share
    average = prompts * MIXED * gpus
    return sum(
        probability
        * (
            decode_seconds(searches * per_search / 2, round(average * per_search))
            + decode_seconds(searches * RESETS / 2, round(average * RESETS))
        )
        for searches, probability in enumerate(most_searches(gpus, prompts))
    )


def train_seconds(prompts: int) -> float:
    tokens = prompts * GENERATIONS * (expected_longest(1) + PROMPT_TOKENS)
    return 6 * PARAMETERS * tokens / FLOPS  # 2 forward, 2 backward through frozen weights, 2 for checkpointing


def all_reduce_seconds(gpus: int, parameters: float, bytes_each: int) -> float:
    """A ring over all GPUs."""
    return 2 * (gpus - 1) / gpus * parameters * bytes_each / NETWORK + 2 * (gpus - 1) * LATENCY


def send_seconds(gpus: int, size: float) -> float:
    """From a GPU to its host, from machine to machine (those that have it pass it on), to the other GPUs."""
    rounds = math.ceil(math.log2(gpus / GPUS_PER_MACHINE))
    return 2 * size / HOST_LINK + rounds * size / STORE


# -- tables -------------------------------------------------------------------------------------------------------


def iterations() -> str:
    lines = [
        "| GPUs | sample (s) | train (s) | all-reduce (s) | search + reset, uniform (s) | with racing (s) | "
        "GPO : GRPO, uniform | with racing | efficiency | GPU-hours per 1,000 iterations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first: float | None = None
    for gpus in GPUS:
        sample, train = sample_seconds(gpus, PROMPTS), train_seconds(PROMPTS)
        reduce = all_reduce_seconds(gpus, ADAPTER_PARAMETERS, 4)
        base = sample + train + reduce
        uniform, racing = (search_seconds(gpus, PROMPTS, share) for share in (UNIFORM, RACING))
        first = first or base + uniform
        lines.append(
            f"| {gpus:,} | {sample:.1f} | {train:.1f} | {reduce:.3f} | {uniform:.1f} | {racing:.1f} | "
            f"{1 + uniform / base:.2f} | {1 + racing / base:.2f} | {first / (base + uniform):.0%} | "
            f"{gpus * (base + uniform) / 3.6:,.0f} |"
        )
    return "\n".join(lines)


def batch() -> str:
    lines = [
        "| prompts per GPU | GRPO iteration (s) | per prompt (s) | GPO : GRPO, uniform | with racing |",
        "| --- | --- | --- | --- | --- |",
    ]
    for prompts in (8, 16, 32, 64):
        base = sample_seconds(64, prompts) + train_seconds(prompts) + all_reduce_seconds(64, ADAPTER_PARAMETERS, 4)
        uniform, racing = (1 + search_seconds(64, prompts, share) / base for share in (UNIFORM, RACING))
        lines.append(f"| {prompts} | {base:.0f} | {base / prompts:.1f} | {uniform:.2f} | {racing:.2f} |")
    return "\n".join(lines)


def synchronisation() -> str:
    lines = [
        "| GPUs | gradients of the adapter (fp32) | gradients of all weights (bf16) | "
        "`RayBackend.update_weights`, all weights | the adapter alone (not there yet) |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {gpus:,} | {all_reduce_seconds(gpus, ADAPTER_PARAMETERS, 4):.3f} s | "
        f"{all_reduce_seconds(gpus, PARAMETERS, 2):.2f} s | {send_seconds(gpus, WEIGHT_BYTES):.1f} s | "
        f"{send_seconds(gpus, 2 * ADAPTER_PARAMETERS):.2f} s |"
        for gpus in GPUS
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    return {"iterations": iterations(), "batch": batch(), "synchronisation": synchronisation()}


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")

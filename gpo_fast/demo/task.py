"""The demo's task: reasoning_gym's `chain_sum` with terms of one digit, 4 to 6 of them, solved line by line.

A prompt is the bare expression without spaces (fewer tokens); a solution adds one term a line, so a newline ends a
step and the first wrong line can be told by arithmetic. reasoning_gym's own scorer verifies the last line's result.
"""

from __future__ import annotations

import re
from typing import Any

from gpo_fast.rewards import reasoning_gym as partial_score

TRAIN_SEED, HELD_OUT_SEED = 11, 7_000_003
TERMS = (4, 6)  # fewest and most terms of a sum
_TERM = re.compile(r"[+-]?\d+")


def chain_sums(
    count: int, seed: int, terms: tuple[int, int] = TERMS, skip: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """`count` different problems, none of them with a prompt in `skip`: columns prompt, answer, metadata."""
    import reasoning_gym

    rows: dict[str, dict[str, Any]] = {}
    source = reasoning_gym.create_dataset(
        "chain_sum",
        size=2 * count + 100,
        seed=seed,
        min_terms=terms[0],
        max_terms=terms[1],
        min_digits=1,
        max_digits=1,
    )
    for item in source:
        expression = item["metadata"]["expression"].replace(" ", "")
        prompt = expression + "=\n"
        if prompt not in skip and len(rows) < count:
            metadata = {"source_dataset": "chain_sum", "expression": expression}
            rows.setdefault(prompt, {"prompt": prompt, "answer": item["answer"], "metadata": metadata})
    if len(rows) < count:
        raise ValueError(f"only {len(rows)} different problems of {count} could be made with the seed {seed}")
    return list(rows.values())


def held_out(count: int, terms: tuple[int, int] = TERMS) -> list[dict[str, Any]]:
    """The evaluation's problems, always the same."""
    return chain_sums(count, HELD_OUT_SEED, terms)


def training(count: int, seed: int = TRAIN_SEED, terms: tuple[int, int] = TERMS) -> list[dict[str, Any]]:
    """Problems to learn from; none of them is among the first 1,024 held-out ones."""
    return chain_sums(count, seed, terms, frozenset(row["prompt"] for row in held_out(1024, terms)))


def solution(expression: str) -> str:
    """The lines that solve an expression: '4-1+7' gives '4-1=3' and '3+7=10'."""
    terms = [int(t) for t in _TERM.findall(expression)]
    total, lines = terms[0], []
    for term in terms[1:]:
        after = total + term
        lines.append(f"{total}{term:+d}={after}")
        total = after
    return "\n".join(lines)


def solved(completions: list[Any], answer: list[Any], metadata: list[Any], **columns: Any) -> list[float]:
    """The reward: 1 where reasoning_gym's scorer gives full marks, 0 elsewhere.

    Its partial marks (the right digits somewhere in a wrong answer) would make a group of wrong answers look mixed.
    """
    return [float(score >= 1) for score in partial_score(completions, answer, metadata, **columns)]


def problems() -> list[dict[str, Any]]:
    """2,048 training problems, for configurations that name a data set by a function."""
    return training(2048)

"""Preference pairs from completions of one state: Procedure II of GPO (arXiv 2509.16456), and its plain counterpart.

The state is a prompt or, with GPO, also a critical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpo_fast.experience import TrainingRow


def ranked_pairs(rewards: Sequence[float], max_pairs: int) -> list[tuple[int, int]]:
    """(better, worse): the best with the worst, the second best with the second worst, and so on.

    Each completion is in one pair at most, and a pair's rewards differ.
    """
    ranked = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    pairs = zip(ranked[: len(ranked) // 2], reversed(ranked))
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]][:max_pairs]


def preference_rows(groups: Sequence[Sequence[TrainingRow]], max_pairs: int) -> list[TrainingRow]:
    """Pairs from groups of rows that share their context: the better row of each, then the worse one.

    Args:
        max_pairs: at most so many pairs from one group.
    """
    rows: list[TrainingRow] = []
    for group in groups:
        usable = [row for row in group if row.token_ids]
        for better, worse in ranked_pairs([row.reward for row in usable], max_pairs):
            pair = len(rows) // 2
            rows += [replace(usable[better], pair=pair, desirable=True), replace(usable[worse], pair=pair)]
    return rows

"""Credit within a failing trajectory: its blame goes to the step that lost it.

GRPO gives every token of a failing trajectory the same blame. But a chain that is lost stays lost: no token behind its
first mistake has an advantage, and no step before it was wrong. What those tokens add to a gradient is noise. So the
trajectory's advantage is dealt out to its steps in proportion to the probability that each is the first mistake
(`FirstMistake`: from the recorded log-probabilities, for nothing), and the trajectory ends, for the trainer, with the
step by which the mistake has been made with probability `SURE`. A trajectory whose surprises say little spreads its
blame, and is shortened little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gpo_fast.critical.proposals import FirstMistake, surprises
from gpo_fast.experience import TrainingRow
from gpo_fast.forest import TokenForest
from gpo_fast.steps import Step

SURE = 0.9


def blame(advantage: float, logprobs: Sequence[float], steps: Sequence[Step], mistakes: FirstMistake) -> list[float]:
    """Advantages of a failing trajectory's tokens, up to where it ends for the trainer.

    Those of the steps that are kept sum to `advantage`, and each token of a step gets the step's. Empty where nothing
    tells the steps apart: no token could have been another.

    Args:
        logprobs: of the trajectory's tokens, at temperature 1.
    """
    share = mistakes.probabilities(surprises(logprobs, steps))
    if not share.sum() > 0:
        return []
    kept = int(np.searchsorted(np.cumsum(share), SURE * share.sum())) + 1
    lengths = [step.end - step.start for step in steps[:kept]]
    blamed: list[float] = np.repeat(advantage * share[:kept] / share[:kept].sum(), lengths).tolist()
    return blamed


def blame_mistakes(
    rows: Sequence[TrainingRow],
    forest: TokenForest,
    mistakes: FirstMistake,
    split: Callable[[Sequence[int]], Sequence[Step]],
) -> None:
    """Shortens the rows that have a negative advantage, and gives each of their tokens its own (`blame`).

    Args:
        forest: the rows' nodes, with the log-probabilities of their tokens. A shortened row gets a node of its own.
        split: the steps of a row's tokens.
    """
    for row in rows:
        if row.advantage >= 0 or row.node is None or not row.token_ids:
            continue
        node = forest.nodes[row.node]
        blamed = blame(row.advantage, node.logprobs, split(row.token_ids), mistakes)
        if blamed:
            row.token_advantages = blamed
            row.token_ids = row.token_ids[: len(blamed)]
            row.sampling_logprobs = row.sampling_logprobs[: len(blamed)]
            row.node = forest.branch(node.parent, node.start, row.token_ids)

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


def blame_mistakes(
    rows: Sequence[TrainingRow],
    forest: TokenForest,
    mistakes: FirstMistake,
    split: Callable[[Sequence[int]], Sequence[Step]],
) -> None:
    """Shortens the rows that have a negative advantage, and gives each token of theirs its step's share of it.

    The shares of the steps that are kept sum to 1, and each token of a step gets the step's.

    Args:
        forest: the rows' nodes, with the log-probabilities of their tokens. A shortened row gets a node of its own.
        split: the steps of a row's tokens.
    """
    for row in rows:
        if row.advantage >= 0 or row.node is None or not row.token_ids:
            continue
        node, steps = forest.nodes[row.node], split(row.token_ids)
        share = mistakes.probabilities(surprises(node.logprobs, steps))
        if not share.sum() > 0:  # no token could have been another: nothing tells the steps apart
            continue
        kept = int(np.searchsorted(np.cumsum(share), SURE * share.sum())) + 1
        lengths = [step.end - step.start for step in steps[:kept]]
        row.token_advantages = np.repeat(row.advantage * share[:kept] / share[:kept].sum(), lengths).tolist()
        row.token_ids = row.token_ids[: sum(lengths)]
        row.sampling_logprobs = row.sampling_logprobs[: sum(lengths)]
        row.node = forest.branch(node.parent, node.start, row.token_ids)

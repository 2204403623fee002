"""Tree packing for TRL: the log-probabilities of a padded batch's rows, computed on the rows' trees.

TRL's losses take log-probabilities and entropies of the shape (rows, completion tokens) and do not ask how they were
computed. Here a token that several rows share runs once. The prefix that a row from a critical step was given has
no loss; what stands there is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpo_fast.forest import TokenForest
from gpo_fast.packing import pack_forest


def tree_logprobs(
    model: Any, forest: TokenForest, nodes: Sequence[int], first_tokens: Sequence[int], width: int
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies [rows, width] of the rows' own tokens; 0 where there is none.

    Args:
        model: one with our fused head, which is called once; wrappers around it see an ordinary forward pass.
        nodes: each row's node of the forest.
        first_tokens: the place of the node's first own token in the row's completion.
    """
    device = next(model.parameters()).device
    packed = pack_forest(forest, nodes)
    packed = (packed.filled() if device.type == "cuda" else packed).to(device)
    output = model(packed=packed, fused_lm_head=True)
    places = []
    for row in packed.branches:
        start = row * width + first_tokens[row]
        places.append(torch.arange(start, start + len(forest.nodes[nodes[row]].token_ids)))
    where = torch.cat(places).to(device)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(nodes) * width).index_copy(0, where, values).view(len(nodes), width)

    return spread(output.log_probs), None if output.entropy is None else spread(output.entropy)

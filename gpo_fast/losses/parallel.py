"""A head whose vocabulary is spread over processes: each holds a range of W's rows and the same hidden states.

With s_r the log-sum-exp of shard r and w_r = exp(s_r - s) its share of the probability (s over all shards), the
log-sum-exp is s, the mean logit is sum_r w_r mean_r, and a kept row is the sum over shards of w_r times the shard's
own. The forward pass has one collective of 2 (N + K) numbers, the backward one of the gradient of the hidden states.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.rows import Rows


def merge_shards(rows: Rows, targets: Tensor, target_rows: Tensor, group: ProcessGroup) -> Rows:
    """The shards' rows as rows of the whole vocabulary; the kept rows become this shard's part of theirs.

    Each process gathers what the others packed and adds it in the order of their ranks: an all-reduce that carries
    maxima beside sums, and the same bits on every process.
    """
    present = torch.zeros_like(rows.lse, dtype=torch.bool).index_fill_(0, target_rows[targets != IGNORED], True)
    own_mean = rows.lse - rows.entropy
    sizes = [part.shape[0] for part in (rows.lse, own_mean, rows.target_logits, rows.target_slopes)]
    packed = torch.cat([rows.lse, own_mean, rows.target_logits, rows.target_slopes])
    shards = dist.get_world_size(group)
    gathered = packed.new_empty((shards * packed.shape[0],))
    dist.all_gather_into_tensor(gathered, packed, group=group)
    lse_of, mean_of, logits_of, slopes_of = gathered.reshape(shards, -1).split(sizes, dim=1)

    lse = torch.logsumexp(lse_of, dim=0)
    share_of = torch.exp(lse_of - lse)
    # A shard all of whose logits are -inf has no mean.
    mean = torch.where(share_of > 0, share_of * mean_of, 0.0).sum(0)
    share = torch.where(rows.lse == -torch.inf, 0.0, torch.exp(rows.lse - lse)).unsqueeze(-1)

    def scaled(values: Tensor) -> Tensor:
        return torch.where(share > 0, share * values, 0.0)

    expected, entropy_row = rows.expected, rows.entropy_row
    if entropy_row is not None and expected is not None and entropy_row.shape[0]:
        entropy_row = scaled(entropy_row + (own_mean - mean).unsqueeze(-1) * expected).to(entropy_row.dtype)
    if expected is not None and expected.shape[0]:
        expected = scaled(expected).to(expected.dtype)
    return Rows(
        torch.where(targets == IGNORED, 0.0, logits_of.amax(0)),
        slopes_of.sum(0),
        torch.where(present, lse, 0.0),
        torch.where(present, lse - mean, 0.0),
        expected,
        entropy_row,
    )


def sum_over_shards(gradient: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all processes' gradients, added up in float32 or wider."""
    total = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.clone()
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)

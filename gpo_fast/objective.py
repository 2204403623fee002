"""The loss of a batch of training rows, as a GPOConfig says. Losses of the batches of one step add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gpo_fast.config import GPOConfig
from gpo_fast.experience import TrainingRow
from gpo_fast.losses import LossOutput, linear_policy_loss, linear_preference_loss
from gpo_fast.training_batch import TrainingBatch


class Totals(NamedTuple):
    """What all rows of an optimiser step, of all processes, have together: the normalisers of the losses."""

    sequences: float
    tokens: float
    desirable: float
    desirable_tokens: float

    @classmethod
    def of(cls, rows: Sequence[TrainingRow]) -> Totals:
        good = [row for row in rows if row.desirable]
        return cls(len(rows), _num_tokens(rows), len(good), _num_tokens(good))


def policy_objective(
    batch: TrainingBatch, head: dict[str, Any], args: GPOConfig, totals: Totals, reference: Tensor | None
) -> LossOutput:
    """The policy loss. Its ratio is to the policy that sampled a row, which is 1 for a batch of the present policy's.

    Args:
        head: `hidden`, `weight` and the options of the output head, as the losses take them.
        reference: log-probabilities [T] under the reference model, if the loss needs them.
    """
    return linear_policy_loss(
        **head,
        targets=batch.targets,
        loss_type=args.loss_type,  # type: ignore[arg-type]
        advantages=batch.advantages,
        sequence_ids=batch.sequence_ids,
        shared=batch.shared,
        old_logprobs=batch.per_token("old_logprobs_of_tokens") if batch.is_off_policy else None,
        ref_logprobs=reference,
        num_sequences=max(1, totals.sequences),
        num_tokens=max(1, totals.tokens),
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        awr_beta=args.awr_beta,
        max_completion_length=args.max_completion_length,
    )


def preference_objective(
    batch: TrainingBatch,
    head: dict[str, Any],
    args: GPOConfig,
    totals: Totals,
    reference: Tensor | None,
    reference_kl: float,
) -> LossOutput:
    """The preference loss of whole pairs.

    Args:
        head, reference: as in `policy_objective`.
        reference_kl: the estimate of KL(policy || reference) that "kto" compares with.
    """
    return linear_preference_loss(
        **head,
        targets=batch.targets,
        loss_type=args.loss_type,  # type: ignore[arg-type]
        sequence_ids=batch.sequence_ids,
        shared=batch.shared,
        ref_logprobs=reference,
        desirable=batch.desirable,
        reference_kl=reference_kl,
        beta=args.beta,
        gamma=args.simpo_gamma,
        num_examples=totals.sequences if args.loss_type == "kto" else totals.desirable,
        num_tokens=totals.desirable_tokens,
    )


def _num_tokens(rows: Sequence[TrainingRow]) -> int:
    return sum(len(row.token_ids) for row in rows)

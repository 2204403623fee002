"""`linear_logprob`: log-probabilities of the next tokens straight from hidden states; the logits never exist
at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses.head import IGNORED, wide_dtype
from gpo_fast.losses.ops import LinearLogprob, LogprobOptions


@dataclass(frozen=True)
class HeadInputs:
    """The head as a caller names it; see `linear_logprob` for each field."""

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    tp_group: ProcessGroup | None = None
    vocab_start: int | None = None


class Prepared(NamedTuple):
    """The inputs of a pass over the vocabulary, checked and in their final types."""

    rows: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    extra: Tensor | None  # (N, r), what lora_b is multiplied by
    lora_b: Tensor | None  # (V, r)
    targets: Tensor  # (K,)
    target_rows: Tensor  # (K,) ascending
    head: HeadInputs

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of the log-probabilities."""
        return wide_dtype(self.rows.dtype)


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    row_offsets: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    row_offsets: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    row_offsets: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under softmax(softcap(hidden @ weight.T + bias) / temperature).

    Args:
        hidden: (T, H) or (B, T, H), floating point. Row t predicts targets[t]: shift before you call.
        weight: (V, H), the output head. Without `requires_grad` (the head is frozen, as under LoRA) the
            forward pass keeps one row of H numbers per token and the backward pass is a scaling of it.
        targets: int64 of the shape of `hidden` without its last dimension, in [0, V), or -100 for a row to be
            ignored. With `row_offsets`: (K,).
        bias: (V,).
        temperature: positive; the logits are divided by it.
        softcap: positive; logits z become softcap * tanh(z / softcap), before the temperature.
        lora: (A (r, H), B (V, r), scale) of an adapter on the head: the weight is `weight + scale * B @ A`,
            which is never formed.
        row_offsets: (T + 1,) int64, for several targets per row (the branch points of a packed forest): the
            targets of row t are targets[row_offsets[t]:row_offsets[t + 1]], distinct within the row. `hidden`
            is (T, H).
        tp_group: the processes over which the vocabulary is spread (vocabulary-parallel head). Each passes the
            same hidden states and targets (of the whole vocabulary) and its own rows of weight, bias and lora's B;
            all get the same results. The gradient of `hidden` is summed over the group.
        vocab_start: with `tp_group`, the first row of this shard; default: shards of equal size in the order of
            their ranks.
        return_entropy: also return the entropy of each row's distribution, in nats.

    Returns:
        float32 log-probabilities of the shape of `targets` (float64 for float64 inputs), 0 where ignored;
        with `return_entropy` also the entropies, of the shape of `hidden` without its last dimension, 0 for
        rows that have no target. Both carry gradients to hidden, weight, bias and the adapter. Second
        derivatives raise.

    Raises:
        ValueError: for shapes, dtypes, devices, targets or options that do not fit; the message names the value.
        TypeError: for something that is no tensor.
    """
    logprobs, entropy = logprobs_and_entropy(
        hidden,
        targets,
        HeadInputs(weight, bias, temperature, softcap, lora, tp_group, vocab_start),
        row_offsets=row_offsets,
        want_entropy=return_entropy,
        entropy_needs_grad=return_entropy and torch.is_grad_enabled(),
    )
    return (logprobs, entropy) if return_entropy else logprobs


def prepare(hidden: Tensor, targets: Tensor, head: HeadInputs, *, row_offsets: Tensor | None = None) -> Prepared:
    """Check the arguments of `linear_logprob`, cast them as autocast does and flatten the rows."""
    _check_tensors(hidden=hidden, weight=head.weight, targets=targets)
    hidden, weight, bias = _autocast(hidden, head.weight, head.bias)
    _check(hidden, weight, bias, targets, head, row_offsets)
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1)
    extra, lora_b = None, None
    if head.lora is not None:
        lora_a, lora_b, scale = head.lora
        _check_lora(lora_a, lora_b, weight)
        extra = (rows @ lora_a.to(rows.dtype).t()) * scale
        lora_b = lora_b.to(rows.dtype)
    return Prepared(rows, weight, bias, extra, lora_b, flat, _target_rows(rows, flat, row_offsets), head)


def logprobs_and_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: HeadInputs,
    *,
    row_offsets: Tensor | None = None,
    want_entropy: bool,
    entropy_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` where the entropy need not carry a gradient, which costs a frozen head 2TVH FLOPs."""
    logprobs, entropy = two_passes(
        prepare(hidden, targets, head, row_offsets=row_offsets),
        want_entropy=want_entropy,
        entropy_needs_grad=entropy_needs_grad,
    )
    return logprobs.reshape(targets.shape), entropy.reshape(hidden.shape[:-1])


def two_passes(prepared: Prepared, *, want_entropy: bool, entropy_needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (K,) and entropies (N,): the backward pass is a second one, but for a frozen head."""
    head = prepared.head
    options = LogprobOptions(
        float(head.temperature),
        None if head.softcap is None else float(head.softcap),
        want_entropy,
        entropy_needs_grad,
        _vocab_start(head),
        head.tp_group,
    )
    # The inputs have their final types: autocast inside would round the float32 logits to its own.
    with torch.autocast(prepared.rows.device.type, enabled=False):
        logprobs, entropy = LinearLogprob.apply(*prepared[:7], options)  # type: ignore[no-untyped-call]  # torch has no annotation
    return logprobs, entropy


def _vocab_start(head: HeadInputs) -> int:
    """The first vocabulary entry of this process's rows of the head."""
    if head.tp_group is None:
        return 0
    if head.vocab_start is not None:
        return head.vocab_start
    return dist.get_rank(head.tp_group) * head.weight.shape[0]


def _target_rows(rows: Tensor, targets: Tensor, row_offsets: Tensor | None) -> Tensor:
    """The row of each target, ascending."""
    every_row = torch.arange(rows.shape[0], device=rows.device)
    if row_offsets is None:
        return every_row
    return torch.repeat_interleave(every_row, row_offsets.diff(), output_size=targets.shape[0])


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to `torch.nn.functional.linear`, which this replaces."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_tensors(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if len({value.device for value in tensors.values()}) > 1:
        found = ", ".join(f"{name} is on {value.device}" for name, value in tensors.items())
        raise ValueError(f"{', '.join(tensors)} must be on one device, but {found}")


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: HeadInputs,
    row_offsets: Tensor | None,
) -> None:
    if hidden.dim() not in (2, 3) or not hidden.is_floating_point():
        raise ValueError(
            f"hidden must be a floating-point tensor of shape (T, H) or (B, T, H), got {hidden.dtype} "
            f"{tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have the shape (V, {hidden.shape[-1]}), as hidden has it, got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype (or run under autocast), got {hidden.dtype} and {weight.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not head.temperature > 0:
        raise ValueError(f"temperature must be positive, got {head.temperature}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {head.softcap}")
    if head.vocab_start is not None and (head.tp_group is None or head.vocab_start < 0):
        raise ValueError(f"vocab_start goes with tp_group and is not negative; got {head.vocab_start}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if row_offsets is None:
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(
                f"targets must have the shape {tuple(hidden.shape[:-1])} of the rows of hidden, got "
                f"{tuple(targets.shape)}"
            )
    elif hidden.dim() != 2 or targets.dim() != 1 or row_offsets.shape != (hidden.shape[0] + 1,):
        raise ValueError(
            "row_offsets needs hidden (T, H), targets (K,) and row_offsets (T + 1,), got "
            f"{tuple(hidden.shape)}, {tuple(targets.shape)} and {tuple(row_offsets.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    # Of a shard only its own size is known: a target beyond the whole vocabulary shows as a log-probability of -inf.
    end = weight.shape[0] if head.tp_group is None else torch.iinfo(torch.int64).max
    wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= end)
    if bool(wrong.any()):
        raise ValueError(f"targets must be in [0, {end}) or {IGNORED}, got {int(targets[wrong][0])}")
    if row_offsets is not None:
        _check_offsets(targets, row_offsets)


def _check_offsets(targets: Tensor, row_offsets: Tensor) -> None:
    lengths = row_offsets.diff()
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != targets.shape[0] or bool((lengths < 0).any()):
        raise ValueError(f"row_offsets must ascend from 0 to the number of targets, {targets.shape[0]}")
    pairs = torch.stack([torch.repeat_interleave(lengths), targets], dim=1)[targets != IGNORED]
    if torch.unique(pairs, dim=0).shape[0] != pairs.shape[0]:
        raise ValueError("the targets of one row must be distinct: merge equal targets and add their weights")


def _check_lora(lora_a: Tensor, lora_b: Tensor, weight: Tensor) -> None:
    rank = lora_a.shape[0]
    if lora_a.shape != (rank, weight.shape[1]) or lora_b.shape != (weight.shape[0], rank):
        raise ValueError(
            f"lora must be (A (r, {weight.shape[1]}), B ({weight.shape[0]}, r), scale), got A "
            f"{tuple(lora_a.shape)} and B {tuple(lora_b.shape)}"
        )

"""Sampled tokens as text that TRL's trainers turn back into the same tokens.

TRL's preference trainers take text and tokenize it themselves. A text is only worth handing over if that gives the
sampled tokens back, with the boundary between context and completion where it was. Two ways of tokenizing matter
(TRL 1.16):

- DPO and KTO encode `prompt` and `prompt + completion + eos` with the tokenizer's special tokens and split where the
  two diverge.
- CPO and ORPO encode without special tokens and then put the beginning-of-sequence token first and the
  end-of-sequence token last, where they are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Format = Literal["dpo", "kto", "simpo", "orpo"]


class TextPair(NamedTuple):
    """A context and one completion, both as text; the completion is without its end-of-sequence token."""

    context: str
    completion: str


def exact_text(context_ids: Sequence[int], token_ids: Sequence[int], tokenizer: Any, format: Format) -> TextPair | None:
    """Text that a TRL trainer of this format encodes to `context_ids` and `token_ids`, or None if there is none.

    Args:
        context_ids: prompt and kept prefix.
        token_ids: the completion; its last token is the end-of-sequence token, which the trainer appends.
    """
    context = _text(context_ids, tokenizer)
    whole = _text([*context_ids, *token_ids[:-1]], tokenizer)
    # Decoding both at once keeps the space that some tokenizers drop from the first token of a text.
    if not whole.startswith(context):
        return None
    completion = whole[len(context) :]
    # CPO and ORPO put a beginning-of-sequence token first even where the model was sampled without one.
    wanted = [list(context_ids)]
    if format in ("simpo", "orpo") and tokenizer.bos_token_id is not None:
        wanted.append([tokenizer.bos_token_id, *context_ids])
    for start in _starts(context, tokenizer):
        prompt, answer = _trainer_tokens(start, completion, tokenizer, format)
        if prompt in wanted and answer == list(token_ids):
            return TextPair(start, completion)
    return None


def _text(token_ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _starts(context: str, tokenizer: Any) -> list[str]:
    """The context as it is and without a beginning-of-sequence token, which a trainer may add itself."""
    bos = tokenizer.bos_token
    return [context, context.removeprefix(bos)] if bos and context.startswith(bos) else [context]


def _trainer_tokens(context: str, completion: str, tokenizer: Any, format: Format) -> tuple[list[int], list[int]]:
    """Context and completion tokens as the trainer of this format makes them."""
    if format in ("dpo", "kto"):
        prompt = tokenizer(context)["input_ids"]
        whole = tokenizer(context + completion + tokenizer.eos_token)["input_ids"]
        cut = common_prefix_length(prompt, whole)
        return list(prompt[:cut]), list(whole[cut:])
    prompt = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + completion, add_special_tokens=False)["input_ids"]
    cut = len(prompt) if whole[: len(prompt)] == prompt else len(prompt) - 1
    prompt, answer = list(whole[:cut]), list(whole[cut:])
    if tokenizer.bos_token_id is not None and prompt[:1] != [tokenizer.bos_token_id]:
        prompt = [tokenizer.bos_token_id, *prompt]
    if answer[-1:] != [tokenizer.eos_token_id]:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt, answer


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))

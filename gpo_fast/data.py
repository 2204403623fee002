"""Prompts in TRL's format: a `prompt` column of plain strings or of conversations; other columns go to the rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Example = dict[str, Any]


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Raises ValueError, naming what is wrong, if a data set is empty or has no usable `prompt` column.

    Of a list all rows are looked at, of a `datasets.Dataset` (where all rows have the same columns) the first.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{name} must be a data set with a length, or a list of rows, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one row with a 'prompt' column")
    for number, row in enumerate(dataset if isinstance(dataset, list) else [dataset[0]]):
        if not isinstance(row, Mapping) or "prompt" not in row:
            columns = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"{name}, row {number} has no 'prompt' column (it has {columns})")
        _check_prompt(row["prompt"], f"{name}, row {number}")
        if number > 0 and row.keys() != dataset[0].keys():
            odd = ", ".join(map(repr, sorted(map(str, row.keys() ^ dataset[0].keys()))))
            raise ValueError(f"{name}, row {number} and row 0 must have the same columns, but one of them lacks {odd}")


def _check_prompt(prompt: Any, place: str) -> None:
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ValueError(
            f"{place}: a prompt must be a string or a list of {{'role', 'content'}} messages, got {prompt!r:.200}"
        )


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a non-empty list of messages rather than plain text."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt)
    )


def encode_prompt(prompt: Any, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids of a prompt; a conversation goes through the chat template with a generation prompt.

    Raises:
        ValueError: no prompt, or one that is empty, leaves no room for a completion in `max_length` tokens, or needs
            a chat template that the tokenizer does not have.
    """
    _check_prompt(prompt, "a row of the data set")
    if is_conversation(prompt) and not tokenizer.chat_template:
        raise ValueError(
            f"the prompt {prompt!r:.80} is a conversation, and the tokenizer has no chat_template: set one, or give "
            "prompts as text"
        )
    if is_conversation(prompt):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(prompt)["input_ids"]
    if len(ids) == 0:
        raise ValueError(f"the prompt {prompt!r:.80} has no tokens")
    if len(ids) >= max_length:
        raise ValueError(
            f"a prompt has {len(ids)} tokens, but the model's context is {max_length} tokens and must hold a "
            f"completion as well: shorten or drop it. It begins {prompt!r:.80}"
        )
    return list(ids)


def decode_completion(token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text that rewards see: special tokens such as end-of-sequence are left out."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def columns_of(examples: Sequence[Example], without: Sequence[str] = ("prompt",)) -> dict[str, list[Any]]:
    """The examples' columns as lists, except those in `without`."""
    return {key: [e[key] for e in examples] for key in examples[0] if key not in without}

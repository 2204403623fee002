"""Tiny random models and a tokenizer for tests: nothing is downloaded."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ALPHABET = [*string.digits, *string.ascii_lowercase, *" +-=.:?\n"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a pad and an end token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(ALPHABET)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of the given architecture, float32, in evaluation mode."""
    values = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **({"sliding_window": None} if kind == "mistral" else {}),
        **changes,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation="sdpa").eval()

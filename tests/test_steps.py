"""Splitting into steps under real kinds of tokenizers, trained here: byte-level BPE and SentencePiece-like."""

from __future__ import annotations

import logging
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gpo_fast import StepSplitter
from gpo_fast.steps import text_of_tokens

TEXT = (
    "Let x = 2.\n\nThen 3x = 6. So it is done.\nIt was 3.14 before.\n\n```python\ndef f():\n\n    return 1\n```\nEnd."
)
CHINESE = "先算二加三。等于五。再乘以二，得十。"


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merged newlines, byte-level without any merge, or SentencePiece-like with byte fallback."""
    corpus = [TEXT, "So.\n\nThen:\n\nIt is done.\n\n", "```\n\n"] * 8
    if kind == "sentencepiece":
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        # As in Llama 2: spaces are underlines, one more goes before the text, a newline is a token of its own.
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split(pattern="\n", behavior="isolated")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(steps)
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    else:
        inner = Tokenizer(models.BPE())
        # A pattern of its own, as in Llama 3 and Qwen: punctuation goes with the newlines after it.
        pieces = pre_tokenizers.Split(pattern=_regex(), behavior="isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
        inner.decoder = decoders.ByteLevel()
        size = 257 if kind == "bytes" else 400
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>" if kind == "sentencepiece" else None)


def _regex():
    from tokenizers import Regex

    return Regex(r" ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s?\w+|\s+")


KINDS = ["merged", "bytes", "sentencepiece"]


def split(kind: str, text: str, method="newline", **options) -> list[str]:
    """The steps' texts, each decoded as a difference of prefixes."""
    ids = tokenizer(kind)(text)["input_ids"]
    steps = StepSplitter(method, **{"min_tokens": 1, **options}).split(ids, tokenizer(kind))
    assert [s.start for s in steps] == [0, *(s.end for s in steps[:-1])]
    assert steps[-1].end == len(ids)
    decoded, ends = text_of_tokens(ids, tokenizer(kind))
    at = [0, *ends]
    return [decoded[at[s.start] : at[s.end]] for s in steps]


def test_the_byte_level_tokenizer_merges_newlines() -> None:
    # Otherwise the tests below would not test what they say.
    tokens = tokenizer("merged").convert_ids_to_tokens(tokenizer("merged")(TEXT)["input_ids"])
    assert any(t.endswith("ĊĊ") and len(t) > 2 for t in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_every_splitter_under_every_tokenizer(kind: str) -> None:
    assert split(kind, "one.\ntwo\n\nthree") == ["one.\n", "two\n\n", "three"]
    assert [s.strip() for s in split(kind, "So it is 3.14. Is it? Yes", "sentence")] == [
        "So it is 3.14.",
        "Is it?",
        "Yes",
    ]
    assert split(kind, "a\nb\n\nc\nd", "paragraph") == ["a\nb\n\n", "c\nd"]
    assert split(kind, "a\n```py\nb\n\nc\n```\nd\ne", "code") == ["a\n", "```py\nb\n\nc\n```\n", "d\n", "e"]
    assert split(kind, "a\n```\nb\n\nc", "code") == ["a\n", "```\nb\n\nc"]
    trace = "first\nmore\n\nsecond\n\n</think>\n\nThe answer\n\nis 4."
    assert split(kind, trace, "thinking") == ["first\nmore\n\n", "second\n\n", "</think>\n\n", "The answer\n\nis 4."]
    assert [s.strip() for s in split(kind, "x; y; z", "regex", pattern=";")] == ["x;", "y;", "z"]


@pytest.mark.parametrize("kind", KINDS)
def test_characters_that_span_tokens_end_steps(kind: str) -> None:
    assert len(tokenizer(kind)(CHINESE)["input_ids"]) > len(CHINESE)  # each is several byte tokens
    assert split(kind, CHINESE, "sentence") == ["先算二加三。", "等于五。", "再乘以二，得十。"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("ab .\n\n。é🙂`"), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_tokens_know_their_characters(kind: str, text: str) -> None:
    ids = tokenizer(kind)(text)["input_ids"]
    decoded, ends = text_of_tokens(ids, tokenizer(kind))
    assert decoded == tokenizer(kind).decode(ids, clean_up_tokenization_spaces=False)
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    for method in ("newline", "sentence", "code", "thinking"):
        # A step that ends in a newline ends at the first token that completes one.
        steps = StepSplitter(method, min_tokens=1).split(ids, tokenizer(kind))
        assert steps[-1].end == len(ids)


def test_broken_bytes_are_no_obstacle() -> None:
    ids = tokenizer("bytes")("é\nb")["input_ids"]
    broken = [ids[0], ids[0], ids[0], ids[0], ids[0], ids[0], *ids[2:]]
    text, ends = text_of_tokens(broken, tokenizer("bytes"))
    assert text.endswith("\nb")
    assert len(ends) == len(broken)
    assert len(StepSplitter(min_tokens=1).split(broken, tokenizer("bytes"))) == 2


def test_the_number_of_steps_has_limits_and_thinning_is_said(caplog: pytest.LogCaptureFixture) -> None:
    splitter = StepSplitter("newline", min_tokens=1, max_steps=5)
    ids = tokenizer("bytes")("a\n" * 40)["input_ids"]
    with caplog.at_level(logging.WARNING):
        assert len(splitter.split(ids, tokenizer("bytes"))) == 5
        splitter.split(ids, tokenizer("bytes"))
    assert splitter.num_thinned == 2
    assert [r.getMessage() for r in caplog.records if "thinned" in r.getMessage()] == [
        "a trajectory of 40 steps is thinned to max_steps=5; others like it are, too"
    ]
    finer = StepSplitter("newline", min_tokens=4, min_steps=6)
    steps = finer.split(ids, tokenizer("bytes"))
    assert len(finer.split(ids[:40], tokenizer("bytes"))) >= 6 <= len(steps)
    assert len(finer.split(ids[:9], tokenizer("bytes"))) == 2  # no step gets shorter than min_tokens
    with pytest.raises(ValueError, match="min_steps must be between 1 and max_steps, 3, got 4"):
        StepSplitter(max_steps=3, min_steps=4)

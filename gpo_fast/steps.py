"""Where a chain of thought may be cut: a trajectory's tokens are split into steps (arXiv 2509.16456, section 4).

Cuts are token positions. A tokenizer may merge a newline with other characters, so a step ends after the token
that contains its end, and nothing is ever decoded and encoded again. Characters are told from tokens by decoding
in context (`text_of_tokens`): a token by itself may lose a leading space or hold a part of a character only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

SplitFunction = Callable[[Sequence[int], Any], Sequence[int]]

_log = logging.getLogger(__name__)
_PATTERNS = {
    "newline": r"\n",
    "paragraph": r"\n[^\S\n]*\n",
    # Full stops of Latin scripts need white space after them (3.14), those of others do not.
    "sentence": r"[.!?…؟]+[\"'”’)\]]*(?=\s)|[。！？｡।॥]+[」』”’）]*|\n",
    "code": r"\n",
    "thinking": r"\n[^\S\n]*\n|</think>",
}
METHODS = (*_PATTERNS, "regex", "tokens")
# A fenced block of Markdown; one that is never closed goes to the end.
_FENCED = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_AS_IT_IS: dict[str, Any] = {"clean_up_tokenization_spaces": False}
_text_of_token: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()  # of each tokenizer
_MOST_BYTES = 4  # of a character in UTF-8, so a character spans at most as many tokens


class Step(NamedTuple):
    """Tokens `start <= t < end` of a trajectory."""

    start: int
    end: int


class StepSplitter:
    """Splits a trajectory's tokens into steps that cover it without gaps.

    Args:
        method: "newline" (the paper's), "paragraph" (a blank line), "sentence", "code" (newline, but a fenced code
            block is one step), "thinking" (R1-style traces: a blank line up to `</think>`, and the answer after it
            is one step), "regex" (a step ends where `pattern` matches), "tokens" (every `min_tokens` tokens), or a
            function `(token_ids, tokenizer) -> cut positions`.
        pattern: the regular expression of "regex".
        min_tokens: a shorter step is merged with the one after it (the last one with the one before it).
        max_steps: a trajectory with more steps is thinned evenly: neighbouring steps are merged. The first time is
            logged, and `num_thinned` counts.
        min_steps: a trajectory with fewer steps has its longest steps halved, where both halves keep `min_tokens`.

    Raises:
        ValueError: unknown method, a pattern that is missing or does not compile, or a limit below 1.
    """

    def __init__(
        self,
        method: str | SplitFunction = "newline",
        *,
        pattern: str | None = None,
        min_tokens: int = 4,
        max_steps: int = 64,
        min_steps: int = 1,
    ) -> None:
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"unknown step splitter {method!r}: use one of {', '.join(METHODS)}, or a function")
        if min_tokens < 1 or max_steps < 1:
            raise ValueError(f"min_tokens and max_steps must be at least 1, got {min_tokens} and {max_steps}")
        if not 1 <= min_steps <= max_steps:
            raise ValueError(f"min_steps must be between 1 and max_steps, {max_steps}, got {min_steps}")
        if (method == "regex") != (pattern is not None):
            raise ValueError("the method 'regex' needs a pattern, and no other method takes one")
        self.method = method
        self.min_tokens = min_tokens
        self.max_steps = max_steps
        self.min_steps = min_steps
        self.num_thinned = 0
        self._regex: re.Pattern[str] | None = None
        if isinstance(method, str) and method != "tokens":
            try:
                self._regex = re.compile(pattern if pattern is not None else _PATTERNS[method])
            except re.error as error:
                raise ValueError(f"the step pattern {pattern!r} is not a regular expression: {error}") from error

    def split(self, token_ids: Sequence[int], tokenizer: Any) -> list[Step]:
        """The steps of a trajectory: at least one, even of an empty trajectory (then `Step(0, 0)`).

        Raises:
            ValueError: a callable gave a cut outside the trajectory.
        """
        length = len(token_ids)
        cuts = sorted(set(self._cuts(token_ids, tokenizer)) - {0, length})
        if cuts and (cuts[0] < 0 or cuts[-1] > length):
            bad = cuts[0] if cuts[0] < 0 else cuts[-1]
            raise ValueError(f"step cuts must be token positions in 0..{length}, got {bad}")
        return self._refine(self._thin(self._merge_short(cuts, length)))

    def _cuts(self, token_ids: Sequence[int], tokenizer: Any) -> Sequence[int]:
        if callable(self.method):
            return self.method(token_ids, tokenizer)
        if self._regex is None:
            return range(self.min_tokens, len(token_ids), self.min_tokens)
        text, ends = text_of_tokens(token_ids, tokenizer)
        cuts, token = [], 0
        for end in self._step_ends(text):
            while token < len(ends) and ends[token] < end:
                token += 1
            # White space after the end belongs to the step before it: a blank line opens no step.
            after = token + 1
            while after < len(ends) and ends[after] > ends[after - 1] and text[ends[after - 1] : ends[after]].isspace():
                after += 1
            cuts.append(after)
        return [cut for cut in cuts if cut < len(token_ids)]

    def _step_ends(self, text: str) -> Iterator[int]:
        """The characters' positions at which steps end."""
        assert self._regex is not None
        blocks = [m.span() for m in _FENCED.finditer(text)] if self.method == "code" else []
        for match in self._regex.finditer(text):
            if any(start < match.end() < end for start, end in blocks):
                continue
            yield match.end()
            if self.method == "thinking" and match.group() == "</think>":
                return

    def _merge_short(self, cuts: Sequence[int], length: int) -> list[Step]:
        steps: list[Step] = []
        start = 0
        for cut in cuts:
            if cut - start >= self.min_tokens:
                steps.append(Step(start, cut))
                start = cut
        if length - start >= self.min_tokens or not steps:
            steps.append(Step(start, length))
        else:
            steps[-1] = Step(steps[-1].start, length)
        return steps

    def _thin(self, steps: list[Step]) -> list[Step]:
        count = len(steps)
        if count <= self.max_steps:
            return steps
        if self.num_thinned == 0:
            _log.warning(
                "a trajectory of %d steps is thinned to max_steps=%d; others like it are, too", count, self.max_steps
            )
        self.num_thinned += 1
        first = [i * count // self.max_steps for i in range(self.max_steps)]
        return [Step(steps[a].start, steps[b - 1].end) for a, b in zip(first, [*first[1:], count])]

    def _refine(self, steps: list[Step]) -> list[Step]:
        while len(steps) < self.min_steps:
            longest = max(range(len(steps)), key=lambda i: steps[i].end - steps[i].start)
            start, end = steps[longest]
            if end - start < 2 * self.min_tokens:
                break
            middle = (start + end) // 2
            steps = [*steps[:longest], Step(start, middle), Step(middle, end), *steps[longest + 1 :]]
        return steps


def text_of_tokens(token_ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The decoded text, and for each token the number of characters that are complete after it."""
    ids = [int(t) for t in token_ids]
    if not ids:
        return "", []
    text = tokenizer.decode(ids, **_AS_IT_IS)
    pieces = _alone(ids, tokenizer)
    if "".join(pieces) != text:
        # Usually a token adds what it adds after the token before it.
        pairs = tokenizer.batch_decode([ids[max(0, i - 1) : i + 1] for i in range(len(ids))], **_AS_IT_IS)
        pieces = [pairs[0], *(pair[len(before) :] for pair, before in zip(pairs[1:], pieces))]
    if "".join(pieces) != text:
        pieces = _decode_step_by_step(ids, tokenizer)
    ends, total = [], 0
    for piece in pieces:
        total += len(piece)
        ends.append(total)
    return "".join(pieces), ends


def _alone(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token by itself. A rollout's tokens are mostly those of others: it is kept."""
    texts = _text_of_token.setdefault(tokenizer, {})
    unknown = sorted(set(ids) - texts.keys())
    texts.update(zip(unknown, tokenizer.batch_decode([[t] for t in unknown], **_AS_IT_IS)))
    return [texts[t] for t in ids]


def _decode_step_by_step(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a character that spans tokens comes with the last of them."""
    pieces: list[str] = []
    context, done = 0, 0  # tokens context..done are shown already, and keep the decoder in its state
    for i in range(len(ids)):
        shown = tokenizer.decode(ids[context:done], **_AS_IT_IS)
        now = tokenizer.decode(ids[context : i + 1], **_AS_IT_IS)
        incomplete = now.endswith("\ufffd") and i + 1 - done < _MOST_BYTES and i + 1 < len(ids)
        pieces.append("" if incomplete else now[len(shown) :])
        if not incomplete:
            context, done = done, i + 1
    return pieces

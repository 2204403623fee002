"""Where a chain of thought may be cut: a trajectory's tokens are split into steps (arXiv 2509.16456, section 4).

Cuts are token positions. A tokenizer may merge a newline with other characters, so a step ends after the token
that contains its end, and nothing is ever decoded and encoded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SplitFunction = Callable[[Sequence[int], Any], Sequence[int]]

_PATTERNS = {
    "newline": r"\n",
    "paragraph": r"\n[^\S\n]*\n",
    "sentence": r"[.!?。！？]+[\"')\]]*(?=\s)|\n",
}


class Step(NamedTuple):
    """Tokens `start <= t < end` of a trajectory."""

    start: int
    end: int


class StepSplitter:
    """Splits a trajectory's tokens into steps that cover it without gaps.

    Args:
        method: "newline" (the paper's), "paragraph" (a blank line), "sentence", "regex" (a step ends where
            `pattern` matches), "tokens" (every `min_tokens` tokens), or a function
            `(token_ids, tokenizer) -> cut positions`.
        pattern: the regular expression of "regex".
        min_tokens: a shorter step is merged with the one after it (the last one with the one before it).
        max_steps: a trajectory with more steps is thinned evenly: neighbouring steps are merged.

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
    ) -> None:
        known = [*_PATTERNS, "regex", "tokens"]
        if isinstance(method, str) and method not in known:
            raise ValueError(f"unknown step splitter {method!r}: use one of {', '.join(known)}, or a function")
        if min_tokens < 1 or max_steps < 1:
            raise ValueError(f"min_tokens and max_steps must be at least 1, got {min_tokens} and {max_steps}")
        if (method == "regex") != (pattern is not None):
            raise ValueError("the method 'regex' needs a pattern, and no other method takes one")
        self.method = method
        self.min_tokens = min_tokens
        self.max_steps = max_steps
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
        return self._thin(self._merge_short(cuts, length))

    def _cuts(self, token_ids: Sequence[int], tokenizer: Any) -> Sequence[int]:
        if callable(self.method):
            return self.method(token_ids, tokenizer)
        if self._regex is None:
            return range(self.min_tokens, len(token_ids), self.min_tokens)
        # Pieces are decoded one by one: a character that spans tokens shows as replacement characters, which
        # moves no cut, because cuts are made at whole tokens.
        pieces = tokenizer.batch_decode([[int(t)] for t in token_ids], clean_up_tokenization_spaces=False)
        ends: list[int] = []
        total = 0
        for piece in pieces:
            total += len(piece)
            ends.append(total)
        text = "".join(pieces)
        cuts, token = [], 0
        for match in self._regex.finditer(text):
            while token < len(ends) and ends[token] < match.end():
                token += 1
            # White space after the end belongs to the step before it: a blank line opens no step.
            after = token + 1
            while after < len(pieces) and not pieces[after].strip() and pieces[after]:
                after += 1
            cuts.append(after)
        return cuts

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
        first = [i * count // self.max_steps for i in range(self.max_steps)]
        return [Step(steps[a].start, steps[b - 1].end) for a, b in zip(first, [*first[1:], count])]

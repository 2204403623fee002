"""Reward functions with TRL's signature: `(prompts, completions, completion_ids, **columns) -> list[float | None]`."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

RewardFunction = Callable[..., Any]


class RewardResult(NamedTuple):
    """`total` (n,) weighted sums; `per_function` (n, functions), NaN where a function does not apply."""

    total: np.ndarray
    per_function: np.ndarray


class RewardFunctions:
    """One or several reward functions, sync or async, and the weighted sum of what they give.

    Args:
        allow_silent: a row to which no function applies has the total 0 instead of being an error.
        timeout: seconds that a function may take for one call; None: no limit. With a limit, functions run in a
            thread of their own; one that hangs is left behind there.

    Raises:
        ValueError: no function, or not one weight for each.
        TypeError: something that cannot be called.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | np.ndarray | None = None,
        *,
        allow_silent: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.allow_silent = allow_silent
        self.timeout = timeout
        chosen = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not chosen:
            raise ValueError("at least one reward function is needed")
        self.functions = [get_reward(f) if isinstance(f, str) else f for f in chosen]
        for function in self.functions:
            if not callable(function):
                raise TypeError(f"a reward function must be callable, got {function!r}")
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
        self.weights = np.ones(len(chosen)) if weights is None else np.asarray(weights, dtype=np.float64)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"{len(self.functions)} reward functions need as many weights, got {len(self.weights)}")

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> RewardResult:
        """Rewards of n completions. `None` means that a function does not apply to a row.

        Raises:
            RuntimeError: a function raised, or took longer than `timeout`.
            ValueError: the wrong number of values, a NaN, or no function that applies to a row.
            TypeError: values that are not numbers.
        """
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        columns_of_scores = [
            self._checked(name, self._call(name, function, arguments), len(prompts))
            for name, function in zip(self.names, self.functions)
        ]
        scores = np.stack(columns_of_scores, axis=1) if prompts else np.zeros((0, len(self.functions)))
        silent = np.flatnonzero(np.isnan(scores).all(axis=1))
        if len(silent) and not self.allow_silent:
            raise ValueError(
                f"no reward function applies to {len(silent)} of {len(prompts)} completions (all gave None), first to "
                f"number {silent[0]}: every completion needs at least one reward"
            )
        return RewardResult(np.nansum(scores * self.weights, axis=1), scores)

    def _call(self, name: str, function: RewardFunction, arguments: dict[str, Any]) -> Any:
        try:
            if self.timeout is None:
                return _values(function, arguments)
            return _within(self.timeout, lambda: _values(function, arguments))
        except _TooSlow as error:
            raise RuntimeError(
                f"reward function {name!r} has not returned after {self.timeout} seconds: it hangs, or needs a longer "
                "reward timeout"
            ) from error
        except Exception as error:
            raise RuntimeError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error

    @staticmethod
    def _checked(name: str, values: Any, count: int) -> np.ndarray:
        if not hasattr(values, "__len__"):
            raise TypeError(f"reward function {name!r} must return a list of numbers, got {type(values).__name__}")
        if len(values) != count:
            raise ValueError(f"reward function {name!r} returned {len(values)} values for {count} completions")
        checked = np.full(count, np.nan)
        for row, value in enumerate(values):
            if value is None:
                continue
            try:
                checked[row] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"reward function {name!r} returned {value!r} for completion {row}: not a number"
                ) from error
            if not isfinite(checked[row]):
                raise ValueError(
                    f"reward function {name!r} returned {checked[row]} for completion {row}: return None where it "
                    "does not apply"
                )
        return checked


class _TooSlow(Exception):
    """A call did not return in its time."""


def _values(function: RewardFunction, arguments: dict[str, Any]) -> Any:
    """What a function returns, awaited if it is async."""
    values = function(**arguments)
    return asyncio.run(_finish(values)) if inspect.isawaitable(values) else values


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, if it does so in time, from a thread that does not keep the process alive."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    if not wait([result], seconds).done:
        raise _TooSlow
    return result.result()


def overlong_punishment(lengths: Sequence[int], max_length: int, cache: int) -> np.ndarray:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, equation 13): float64 (n,), from 0 down to -1.

    Args:
        lengths: of n completions, in tokens.
        cache: the last so many tokens before `max_length` in which it falls, in a line; 0 is off.
    """
    if cache == 0:
        return np.zeros(len(lengths))
    return np.clip((max_length - cache - np.asarray(lengths, dtype=np.float64)) / cache, -1.0, 0.0)


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def get_reward(name: str) -> RewardFunction:
    """A reward function by name: a known one (`exact_match`, `math`, `multiple_choice`, ...) or `module:function`.

    Raises:
        ValueError: no such name; ImportError: the module cannot be imported.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if ":" not in name:
        raise ValueError(f"unknown reward function {name!r}: use one of {', '.join(_KNOWN)}, or 'module:function'")
    module, _, attribute = name.partition(":")
    function: RewardFunction | None = getattr(importlib.import_module(module), attribute, None)
    if function is None:
        raise ValueError(f"the module {module!r} has no reward function {attribute!r}")
    return function


def text_of(completion: Any) -> str:
    """The text of a plain completion or of a conversation's last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def last_line(text: str) -> str:
    """The last line that is not blank, without the white space around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 where the completion's last line is the column `answer`."""
    return [float(last_line(text_of(c)) == str(a).strip()) for c, a in zip(completions, answer)]


def reasoning_gym(completions: list[Any], answer: list[Any], metadata: list[Any], **_: Any) -> list[float]:
    """reasoning_gym's own score of the text behind the last '=' or ':' of the last line.

    Columns: `answer` and `metadata` (a JSON object with `source_dataset`) of a reasoning_gym item.
    """
    from reasoning_gym import get_score_answer_fn

    scores = []
    for completion, right, meta in zip(completions, answer, metadata):
        details = json.loads(meta) if isinstance(meta, str) else meta
        given = last_line(text_of(completion)).replace(":", "=").rpartition("=")[2].strip()
        entry = {"answer": right, "metadata": details}
        scores.append(float(get_score_answer_fn(details["source_dataset"])(given, entry)))
    return scores


def math(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 where math-verify finds the completion equal to the column `answer`."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward 'math' needs math-verify: pip install 'math-verify[antlr4_13_2]'") from error
    # math-verify limits its time by signals, which only the main thread gets; in another one the caller has a limit.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    return [
        float(
            verify(
                parse(str(a), parsing_timeout=limit),
                parse(text_of(c), parsing_timeout=limit),
                timeout_seconds=limit,
            )
        )
        for c, a in zip(completions, answer)
    ]


def multiple_choice(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 where the letter that a completion chooses is the column `answer` (a letter, or an index from 0)."""
    letters = [chr(ord("A") + a) if isinstance(a, int) else str(a).strip().strip("()").upper() for a in answer]
    return [float(chosen_letter(text_of(c)) == letter) for c, letter in zip(completions, letters)]


def chosen_letter(text: str) -> str | None:
    """The option that a text chooses: the last "answer is X" or boxed letter, else a last line that is one letter."""
    said: list[str] = re.findall(
        r"(?:answer\s*(?:is|:)\s*|\\boxed\{\s*(?:\\text\{)?\s*)\(?\*{0,2}([A-Za-z])\b", text, re.IGNORECASE
    )
    if said:
        return said[-1].upper()
    alone = re.fullmatch(r"\W*([A-Za-z])(?:[).:]\s.*|\W*)", last_line(text))
    return alone.group(1).upper() if alone else None


class RegexFormat:
    """1 where the whole completion matches a pattern, for example `<think>.*</think>\\s*<answer>.*</answer>`."""

    __name__ = "regex_format"

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"the format {pattern!r} is not a regular expression: {error}") from error

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return [float(self._pattern.fullmatch(text_of(c).strip()) is not None) for c in completions]


class JSONFormat:
    """1 where a completion is JSON (alone, or in a ```json block) that a JSON schema accepts.

    Without a schema any JSON is right. Needs the package `jsonschema` if there is one.
    """

    __name__ = "json_format"

    def __init__(self, schema: dict[str, Any] | None = None) -> None:
        self._validator: Any = None
        if schema is None:
            return
        try:
            import jsonschema
        except ImportError as error:
            raise ImportError("a JSON schema needs the package jsonschema: pip install jsonschema") from error
        kind = jsonschema.validators.validator_for(schema)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from error
        self._validator = kind(schema)

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return [float(self._accepts(text_of(c))) for c in completions]

    def _accepts(self, text: str) -> bool:
        try:
            value = json.loads(code_block(text, "json"))
        except (ValueError, RecursionError):
            return False
        return self._validator is None or self._validator.is_valid(value)


class CodeReward:
    """Share of tests that a completion's Python program passes; runs programs that a model wrote, so off by default.

    Column `tests`: for each row a list of strings (code that is appended and must not raise) or of
    `{"input": ..., "output": ...}` (standard input, and the standard output that is right). Programs run confined,
    see `gpo_fast.code_runner`.

    Args:
        enable: True, or the environment variable GPO_FAST_RUN_CODE=1, allows programs to run.
        limits: keyword arguments of `run_program`.

    Raises:
        ValueError: not enabled.
    """

    __name__ = "code"

    def __init__(self, enable: bool = False, **limits: Any) -> None:
        if not enable and os.environ.get("GPO_FAST_RUN_CODE") != "1":
            raise ValueError(
                "the reward 'code' runs programs that the model wrote, and is off: read gpo_fast.code_runner, then "
                "use CodeReward(enable=True) or set GPO_FAST_RUN_CODE=1"
            )
        self.limits = limits

    def __call__(self, completions: list[Any], tests: list[Any], **_: Any) -> list[float]:
        return [self._share(code_block(text_of(c), "python"), t) for c, t in zip(completions, tests)]

    def _share(self, source: str, tests: Sequence[Any]) -> float:
        if not tests:
            raise ValueError("the reward 'code' needs at least one test in each row's column 'tests'")
        return sum(self._passes(source, test) for test in tests) / len(tests)

    def _passes(self, source: str, test: Any) -> bool:
        from gpo_fast.code_runner import run_program

        if not isinstance(test, str):
            result = run_program(source, standard_input=test["input"], **self.limits)
            return result.ok and result.output.split() == str(test["output"]).split()
        # The mark comes after the test: a program that ends early with status 0 has not passed it.
        mark = secrets.token_hex(16)
        result = run_program(f"{source}\n{test}\nprint('\\n{mark}')\n", **self.limits)
        return result.ok and last_line(result.output) == mark


def code_block(text: str, language: str) -> str:
    """The last fenced block of the language (or of none), or the whole text."""
    blocks = re.findall(rf"```(?:{language})?[ \t]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return blocks[-1] if blocks else text


def _code(**arguments: Any) -> list[float]:
    return CodeReward()(**arguments)


_code.__name__ = "code"

_KNOWN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "reasoning_gym": reasoning_gym,
    "math": math,
    "multiple_choice": multiple_choice,
    "json": JSONFormat(),
    "code": _code,
}

"""Tasks for the loop benchmark that a tiny model can learn on one core, solved line by line, a line a step.

`chain_sum` and `basic_arithmetic` are reasoning_gym's with one-digit numbers. A character is a token.
"""

from __future__ import annotations

import ast
import operator
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from gpo_fast.demo.task import solution as sum_lines

Row = dict[str, Any]  # prompt, answer, solution
OPERATORS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}
ALPHABET = string.digits + "+-*()=\n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the tasks, a pad and an end token."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass(frozen=True)
class Task:
    """`name` with solutions of `steps` lines."""

    name: str
    steps: int

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(f"unknown task {self.name!r}: use one of {', '.join(SOURCES)}")
        if self.steps < 2:
            raise ValueError(f"a task needs at least 2 steps, got {self.steps}")

    @property
    def label(self) -> str:
        return f"{self.name}, {self.steps} steps"

    @property
    def max_tokens(self) -> int:
        """Room for a solution: no line of these tasks is longer than 12 characters."""
        return 12 * self.steps

    def rows(self, count: int, seed: int) -> list[Row]:
        """`count` problems. With this many possible ones a repeated problem is rare."""
        return SOURCES[self.name](self, count, seed)


def solved(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """1 where every line is right: the last number alone may be guessed."""
    return [float(c.strip() == s) for c, s in zip(completions, solution)]


def chain_sum(task: Task, count: int, seed: int) -> list[Row]:
    """reasoning_gym's chain_sum: one more term a line, as in the demo."""
    expressions = _expressions("chain_sum", task, count, seed)
    return [_row(expression, sum_lines(expression)) for expression in expressions]


def basic_arithmetic(task: Task, count: int, seed: int) -> list[Row]:
    """reasoning_gym's basic_arithmetic with +, -, * and parentheses: an operation a line, in the order of evaluation.

    Problems with a result of more than two digits on the way are left out: a tiny model learns no long products.
    """
    options = {"operators": ["+", "-", "*"], "allow_negation": False, "format_style": "simple"}
    expressions = _expressions("basic_arithmetic", task, 3 * count + 100, seed, **options)
    rows = [_row(e, operation_lines(e)) for e in expressions]
    short = [row for row in rows if all(abs(int(line.rpartition("=")[2])) < 100 for line in row["solution"].split())]
    if len(short) < count:
        raise ValueError(f"only {len(short)} of {len(rows)} problems of {task.steps} steps have small results")
    return short[:count]


def _expressions(name: str, task: Task, count: int, seed: int, **options: Any) -> list[str]:
    import reasoning_gym

    size = {"min_terms": task.steps + 1, "max_terms": task.steps + 1, "min_digits": 1, "max_digits": 1}
    items = reasoning_gym.create_dataset(name, size=count, seed=seed, **size, **options)
    return [item["metadata"]["expression"].replace(" ", "") for item in items]


def operation_lines(expression: str) -> str:
    """'2*(3+4)' gives '3+4=7' and '2*7=14'."""
    lines: list[str] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            sign, apply = OPERATORS[type(node.op)]
            left, right = value(node.left), value(node.right)
            lines.append(f"{left}{sign}{right}={apply(left, right)}")
            return apply(left, right)
        return ast.literal_eval(node)

    value(ast.parse(expression, mode="eval").body)
    return "\n".join(lines)


def _row(expression: str, lines: str) -> Row:
    return {"prompt": expression + "=\n", "solution": lines}


SOURCES: dict[str, Callable[[Task, int, int], list[Row]]] = {
    "chain_sum": chain_sum,
    "basic_arithmetic": basic_arithmetic,
}

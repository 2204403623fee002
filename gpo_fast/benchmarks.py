"""The paper's seven benchmarks (arXiv 2509.16456, table 1) by their public data set ids: rows -> prompt, answer.

A loader is a data set id, a split and a function from a row of that data set to `{"prompt", "answer"}`; the reward
says how an answer is compared. Prompts ask for the form of answer that the reward understands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

BOXED = "\n\nThink step by step, and put the final answer into \\boxed{}."
ALONE = "\n\nThink step by step, and give only the answer in the last line."
LETTER = "\n\nThink step by step, and end with: The answer is (X), where X is the letter of the right option."


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows come from, and what becomes of them."""

    dataset: str
    split: str
    reward: str
    convert: Callable[[Row], Row]
    config: str | None = None
    configs: tuple[str, ...] = ()  # several parts that make up the benchmark

    def rows(self, load: Callable[..., Any]) -> list[Row]:
        """All problems. `load` has the signature of `datasets.load_dataset`."""
        parts = self.configs or (self.config,)
        found = [row for part in parts for row in load(self.dataset, part, split=self.split)]
        return [self.convert(dict(row)) for row in found]


def gsm8k(row: Row) -> Row:
    """Columns question, answer; the final answer stands behind '####'."""
    return {"prompt": row["question"] + BOXED, "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


def math_500(row: Row) -> Row:
    """Columns problem, solution, answer (LaTeX)."""
    return {"prompt": row["problem"] + BOXED, "answer": f"${row['answer']}$"}


def aime(row: Row) -> Row:
    """Columns problem (or Problem) and answer (or Answer), an integer from 0 to 999."""
    lower = {key.lower(): value for key, value in row.items()}
    return {"prompt": lower["problem"] + BOXED, "answer": str(int(lower["answer"]))}


def mmlu(row: Row) -> Row:
    """Columns question, choices (4 of them), answer (the index of the right one)."""
    return {"prompt": options(row["question"], row["choices"]), "answer": chr(ord("A") + int(row["answer"]))}


def mmlu_pro(row: Row) -> Row:
    """Columns question, options (up to 10), answer (its letter)."""
    return {"prompt": options(row["question"], row["options"]), "answer": row["answer"]}


def bbh(row: Row) -> Row:
    """Columns input and target: an option such as '(B)', or a word, number or list of words."""
    target = row["target"].strip()
    return {
        "prompt": f"{row['input']}\n\nThink step by step, and give only the answer in the last line.",
        "answer": target,
    }


def options(question: str, choices: list[str]) -> str:
    """A multiple-choice question with lettered options."""
    lettered = [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question, *lettered]) + LETTER


BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

BENCHMARKS = {
    "bbh": Benchmark("lukaemon/bbh", "test", "exact_match", bbh, configs=BBH_TASKS),
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test", "math", math_500),
    "gsm8k": Benchmark("openai/gsm8k", "test", "math", gsm8k, config="main"),
    "mmlu": Benchmark("cais/mmlu", "test", "multiple_choice", mmlu, config="all"),
    "mmlu-pro": Benchmark("TIGER-Lab/MMLU-Pro", "test", "multiple_choice", mmlu_pro),
    "aime-24": Benchmark("HuggingFaceH4/aime_2024", "train", "math", aime),
    "aime-25": Benchmark("yentinglin/aime_2025", "train", "math", aime),
}


def load_benchmark(name: str, load: Callable[..., Any] | None = None) -> tuple[list[Row], str]:
    """(rows with `prompt` and `answer`, name of the reward) of a benchmark, or of `reasoning_gym:TASK`.

    Raises:
        ValueError: no such benchmark.
    """
    if name.startswith("reasoning_gym:"):
        return _reasoning_gym(name.partition(":")[2]), "reasoning_gym"
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: use one of {', '.join(BENCHMARKS)}, or reasoning_gym:TASK")
    if load is None:
        import datasets

        load = datasets.load_dataset
    benchmark = BENCHMARKS[name]
    return benchmark.rows(load), benchmark.reward


def math_train() -> list[Row]:
    """Training problems for the paper's runs: the training split of MATH as conversations.

    The answer is the whole solution, in which the reward "math" reads the last box.
    """
    import datasets

    name = "EleutherAI/hendrycks_math"
    parts = [datasets.load_dataset(name, s, split="train") for s in datasets.get_dataset_config_names(name)]
    return [math_problem(dict(row)) for part in parts for row in part]


def math_problem(row: Row) -> Row:
    """Columns problem, solution."""
    return {"prompt": [{"role": "user", "content": row["problem"] + BOXED}], "answer": row["solution"]}


def _reasoning_gym(task: str, size: int = 256, seed: int = 0) -> list[Row]:
    import json

    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}")
    return [
        {"prompt": f"{row['question']}\n", "answer": row["answer"], "metadata": json.dumps(row["metadata"])}
        for row in create_dataset(task, size=size, seed=seed)
    ]

"""Benchmark loaders on rows with the public data sets' columns, and pass@k."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpo_fast.benchmarks import BBH_TASKS, BENCHMARKS, load_benchmark, math_problem
from gpo_fast.evaluation import pass_at_k, pass_at_k_of
from gpo_fast.rewards import get_reward

# One row of our own for each data set, with its columns, the right answer as a model may write it, and a wrong one.
FIXTURES = {
    "gsm8k": ({"question": "What is 1200 + 34?", "answer": "Add.\n#### 1,234"}, "So \\boxed{1234}", "So \\boxed{1235}"),
    "math-500": (
        {"problem": "What is $1/2$?", "solution": "...", "answer": "\\frac{1}{2}", "subject": "x", "level": 1},
        "$\\boxed{0.5}$",
        "$\\boxed{2}$",
    ),
    "aime-24": ({"id": 1, "problem": "What is 3?", "answer": "003", "url": ""}, "\\boxed{3}", "\\boxed{4}"),
    "aime-25": ({"id": "1", "problem": "What is 70?", "answer": "70", "solution": ""}, "\\boxed{70}", "\\boxed{7}"),
    "mmlu": (
        {"question": "Which is red?", "subject": "s", "choices": ["sky", "blood", "snow", "grass"], "answer": 1},
        "The answer is (B).",
        "The answer is (A).",
    ),
    "mmlu-pro": (
        {"question_id": 1, "question": "Which is ten?", "options": [str(n) for n in range(1, 11)], "answer": "J"},
        "The answer is (J).",
        "The answer is (I).",
    ),
    "bbh": ({"input": "Options: (A) no (B) yes", "target": "(B)"}, "It is so.\n(B)", "It is so.\n(A)"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_become_prompts_and_answers_that_the_reward_understands(name: str) -> None:
    row, right, wrong = FIXTURES[name]
    asked = []

    def load(dataset, config, split):
        asked.append((dataset, config, split))
        return [row]

    rows, reward = load_benchmark(name, load)
    assert len(rows) == (len(BBH_TASKS) if name == "bbh" else 1)
    assert {d for d, _, _ in asked} == {BENCHMARKS[name].dataset}
    shown = row.get("question") or row.get("problem") or row["input"]
    assert shown in rows[0]["prompt"]
    assert all(choice in rows[0]["prompt"] for choice in row.get("choices", row.get("options", [])))
    if reward == "math":
        pytest.importorskip("math_verify")
    assert get_reward(reward)(completions=[right, wrong], answer=[rows[0]["answer"]] * 2) == [1.0, 0.0]


def test_the_training_problems_of_the_papers_runs() -> None:
    row = math_problem({"problem": "What is $1/2$?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "1"})
    assert row["prompt"][0]["content"].startswith("What is $1/2$?")
    pytest.importorskip("math_verify")
    given = ["$\\boxed{0.5}$", "$\\boxed{5}$"]
    assert get_reward("math")(completions=given, answer=[row["answer"]] * 2) == [1.0, 0.0]


def test_reasoning_gym_tasks_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'gsm9k': use one of bbh"):
        load_benchmark("gsm9k")
    pytest.importorskip("reasoning_gym")
    rows, reward = load_benchmark("reasoning_gym:chain_sum")
    columns = {"answer": [rows[0]["answer"]], "metadata": [rows[0]["metadata"]]}
    assert get_reward(reward)(completions=[rows[0]["answer"]], **columns) == [1.0]
    with pytest.raises(ValueError, match="no task 'chain_some'"):
        load_benchmark("reasoning_gym:chain_some")


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(outcomes: list[bool], data) -> None:
    k = data.draw(st.integers(1, len(outcomes)))
    subsets = list(combinations(outcomes, k))
    assert pass_at_k(sum(outcomes), len(outcomes), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_intervals_of_pass_at_k() -> None:
    mixed = pass_at_k_of([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], 2)
    assert mixed.accuracy == pytest.approx((0.5 + 0 + 1 + 5 / 6) / 4)
    assert 0 <= mixed.low < mixed.accuracy < mixed.high <= 1
    sure = pass_at_k_of([[1, 1]] * 10, 1)
    assert (sure.accuracy, sure.high) == pytest.approx((1.0, 1.0))
    assert sure.low < 0.8, "ten right answers do not prove that all are"
    with pytest.raises(ValueError, match="k=3, 1 of 2"):
        pass_at_k(1, 2, 3)

"""The benchmarks' own parts: tasks, intervals, studies that go on, the README's table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gpo_fast.bench.common import mean_interval
from gpo_fast.bench.loop_gain import Trial, append, is_finished, run
from gpo_fast.bench.loop_study import Study, studies
from gpo_fast.bench.loop_tasks import TABLE, Task, character_tokenizer, solved

from gpo_fast.run_files import read_records


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic"])
def test_solutions_have_a_line_for_each_step_and_end_at_the_value(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = Task(name, 5)
    rows = task.rows(50, seed=3)
    for row in rows:
        lines = row["solution"].split("\n")
        assert len(lines) == 5
        assert all(eval(left) == int(right) for left, right in (line.split("=") for line in lines))
        assert int(row["answer"]) == eval(row["prompt"].removesuffix("=\n"))
        assert len(row["solution"]) < task.max_tokens
    columns = {"answer": [row["answer"] for row in rows]}
    assert solved([row["solution"] for row in rows], **columns) == [1.0] * 50
    assert not any(solved([row["solution"] + "1" for row in rows], **columns))


@pytest.mark.parametrize(("pivotal", "hard"), [(True, 1), (False, 7)])
def test_modular_chains_have_the_hard_steps_they_say(pivotal: bool, hard: int) -> None:
    for row in Task("modular", 7, pivotal).rows(50, seed=1):
        lines = row["solution"].split("\n")
        assert (len(lines), row["prompt"].count("#")) == (7, hard)
        for line in lines:
            digit, operand, after = int(line[0]), int(line[2]), int(line[4])
            assert after == (TABLE[digit][operand] if line[1] == "#" else (digit + operand) % 10)
    with pytest.raises(ValueError, match="only 'modular' can be pivotal"):
        Task("chain_sum", 4, pivotal=True)
    with pytest.raises(ValueError, match="unknown task 'sums'"):
        Task("sums", 4)


def test_the_tokenizer_loses_no_character() -> None:
    tokenizer = character_tokenizer()
    text = "(-9--1*-2)+7#3=\n-1*-2=2"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_intervals_of_few_seeds_cover_the_mean() -> None:
    draw = np.random.default_rng(0)
    intervals = [mean_interval(draw.normal(3.0, 2.0, 5).tolist()) for _ in range(4000)]
    covered = np.mean([i.low <= 3.0 <= i.high for i in intervals])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert math.isnan(mean_interval([1.0]).low)


def record(algorithm: str, seed: int, accuracies: list[float], tokens: float = 100.0) -> dict:
    points = [
        {"seconds": float(i), "steps": 2 * i, "tokens": tokens * i, "rollouts": i, "accuracy": a}
        for i, a in enumerate(accuracies)
    ]
    shared = {"task": {"name": "modular", "steps": 4, "pivotal": False}, "start": 0.1, "evaluations": 4}
    return {
        **shared,
        "algorithm": algorithm,
        "seed": seed,
        "seconds": 4.0,
        "problems": 8,
        "clock": "x",
        "points": points,
    }


def test_a_study_compares_at_equal_time_tokens_and_steps() -> None:
    base = [record("grpo", s, [0.1, 0.2, 0.3, 0.4, 0.5 + s / 100]) for s in range(3)]
    ours = [record("gpo", s, [0.1, 0.4, 0.5, 0.6, 0.7 + s / 100], tokens=200.0) for s in range(3)]
    (study,) = studies(base + ours)
    assert study.gain("gpo").mean == pytest.approx(0.2)
    assert study.gain("gpo").high - study.gain("gpo").low == pytest.approx(0, abs=1e-9)
    assert study.time_to_base("gpo") == pytest.approx(0.525, abs=0.01)  # 0.51 between 0.5 at 2 s and 0.6 at 3 s
    assert study.shortest("tokens") == 400
    assert study.accuracy("gpo", "tokens", 400) == pytest.approx([0.5] * 3)
    assert Study([*base, record("slow", 0, [0.1] * 5)]).time_to_base("slow") is None
    assert len(studies([*base, {**ours[0], "seconds": 5.0}])) == 2
    assert [row[0] for row in study.table().rows] == ["grpo", "gpo"]


def test_a_run_is_recorded_once_and_its_clock_leaves_evaluation_out(tmp_path: Path) -> None:
    trial = Trial(Task("modular", 2), "gpo:num_resets=2,learning_rate=1e-3", 0, start=0.0, seconds=0.5, evaluations=2)
    assert trial.changes == {"estimator": "racing", "num_resets": 2, "learning_rate": 1e-3}
    result = run(trial, tmp_path)
    append(tmp_path / "study.jsonl", result)
    assert is_finished(trial, read_records(tmp_path / "study.jsonl"))
    assert not is_finished(Trial(Task("modular", 2), "grpo", 0, 0.0, 0.5, 2), read_records(tmp_path / "study.jsonl"))
    points = result["points"]
    assert [p["seconds"] for p in points] == sorted(p["seconds"] for p in points)
    assert points[0] | {"accuracy": 0} == {"seconds": 0, "steps": 0, "tokens": 0, "rollouts": 0, "accuracy": 0}
    assert points[-1]["seconds"] >= 0.5
    assert points[-1]["tokens"] > points[-1]["rollouts"] > 0
    json.dumps(result)
    with pytest.raises(ValueError, match="unknown algorithm 'gppo'"):
        Trial(Task("modular", 2), "gppo", 0, 0.1, 1.0)

"""The benchmarks' own parts: tasks, intervals, studies that go on, the README's table."""

from __future__ import annotations

import json
import math
import subprocess
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gpo_fast.bench import gpu, loop_gradient, suite
from gpo_fast.bench.common import device_name, mean_interval
from gpo_fast.bench.loop_gain import Trial, append, is_finished, run
from gpo_fast.bench.loop_gradient import worth
from gpo_fast.bench.loop_models import warm_start
from gpo_fast.bench.loop_plane import EVEN, KINDS, SCHEMES, STEP_TOKENS, Prompt, World, progress
from gpo_fast.bench.loop_price import FullVocabularyTrainer, PlainEngine, Size, StepClock, Way, our_trainer
from gpo_fast.bench.loop_study import Study, readme_rows, studies
from gpo_fast.bench.loop_tasks import Task, character_tokenizer, solved
from gpo_fast.bench.readme import MEASURED, README, tables, with_table
from gpo_fast.bench.suite import SUITE, command, compare
from typer.testing import CliRunner

from gpo_fast import GPOTrainer, Request, RolloutEngine, SamplingParams, cli
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
        assert int(lines[-1].rpartition("=")[2]) == eval(row["prompt"].removesuffix("=\n"))
        assert len(row["solution"]) < task.max_tokens
    solutions = [row["solution"] for row in rows]
    assert solved(solutions, solutions) == [1.0] * 50
    assert not any(solved([text + "1" for text in solutions], solutions))
    assert not any(solved([text.rpartition("\n")[2] for text in solutions], solutions))  # the last line alone


def test_bad_tasks_are_named() -> None:
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        Task("chain_sum", 1)
    with pytest.raises(ValueError, match="unknown task 'sums'"):
        Task("sums", 4)


def test_the_tokenizer_loses_no_character() -> None:
    tokenizer = character_tokenizer()
    text = "(-9--1*-2)+7+3=\n-1*-2=2"
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
    shared = {
        "model": "tiny",
        "task": {"name": "chain_sum", "steps": 4},
        "start": 0.1,
        "evaluations": 4,
        "learning_rate": 3e-4,
    }
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
    assert (
        len(studies([*base, {**ours[0], "seconds": 5.0}]))
        == len(studies([*base, {**ours[0], "model": "smollm2"}]))
        == 2
    )
    assert [row[0] for row in study.table().rows] == ["grpo", "gpo"]
    preferences = Study([*base, record("dpo", 0, [0.1] * 5), record("gpo-dpo:beta=0.2", 0, [0.1, 0.1, 0.1, 0.1, 0.3])])
    assert preferences.gain("gpo-dpo:beta=0.2").mean == pytest.approx(0.2)


def test_a_run_is_recorded_once_and_its_clock_leaves_evaluation_out(tmp_path: Path) -> None:
    trial = Trial(Task("chain_sum", 2), "gpo:num_resets=2,learning_rate=1e-3", 0, start=0.0, seconds=0.5, evaluations=2)
    assert trial.changes == {"estimator": "racing", "reuse": "all", "num_resets": 2, "learning_rate": 1e-3}
    result = run(trial, tmp_path)
    append(tmp_path / "study.jsonl", result)
    assert is_finished(trial, read_records(tmp_path / "study.jsonl"))
    assert not is_finished(Trial(Task("chain_sum", 2), "grpo", 0, 0.0, 0.5, 2), read_records(tmp_path / "study.jsonl"))
    points = result["points"]
    assert [p["seconds"] for p in points] == sorted(p["seconds"] for p in points)
    assert points[0] | {"accuracy": 0} == {"seconds": 0, "steps": 0, "tokens": 0, "rollouts": 0, "accuracy": 0}
    assert points[-1]["seconds"] >= 0.5
    assert points[-1]["tokens"] > points[-1]["rollouts"] > 0
    json.dumps(result)
    with pytest.raises(ValueError, match="unknown algorithm 'gppo'"):
        Trial(Task("chain_sum", 2), "gppo", 0, 0.1, 1.0)
    with pytest.raises(ValueError, match="unknown model 'large': use one of tiny, smollm2"):
        Trial(Task("chain_sum", 2), "gpo", 0, 0.1, 1.0, model="large")
    assert Trial(Task("chain_sum", 2), "gpo", 0, 0.1, 1.0, model="smollm2").learning_rate == 4e-4


def test_the_readme_says_who_reaches_the_bases_end_in_half_its_time() -> None:
    base = [record("grpo", s, [0.1, 0.2, 0.3, 0.4, 0.5]) for s in range(3)]
    fast = [record("gpo", s, [0.1, 0.4, 0.6, 0.6, 0.7]) for s in range(2)]
    slow = [record("random", s, [0.1, 0.1, 0.2, 0.3, 0.45]) for s in range(3)]
    (row,) = readme_rows({"data": {"records": base + fast + slow}})
    assert "at least 2 seeds" in row.what
    assert row.result.startswith("`grpo` 50.0% (50.0% to 50.0%); `gpo` 70.0%, +20.0% (")
    assert row.result.endswith("; `random` 45.0%, -5.0% (-5.0% to -5.0%), not reached")
    assert not row.missed
    assert row.goal == "grpo's end in 50% of its time: `gpo`; **missed** by the others"
    assert row.brief is not None
    assert row.brief[1].startswith("`grpo` 50.0%; `gpo` 70.0%, ")
    assert row.brief[1].endswith("%; `random` 45.0%")
    assert readme_rows({"data": {"records": base + slow}})[0].missed


def test_an_algorithm_is_compared_with_its_base_with_as_many_completions() -> None:
    few = [record("grpo", s, [0.1, 0.2, 0.3, 0.4, 0.5]) for s in range(3)]
    many = [record("grpo:num_generations=8", s, [0.1, 0.1, 0.2, 0.2, 0.3]) for s in range(3)]
    ours = [record("gpo:num_generations=8", s, [0.1, 0.2, 0.3, 0.3, 0.4]) for s in range(3)]
    (row,) = readme_rows({"data": {"records": few + many + ours}})
    assert "; `grpo:num_generations=8` 30.0%; `gpo:num_generations=8` 40.0%, +10.0% (" in row.result
    assert row.brief is not None
    assert row.brief[1] == "`grpo` 50.0%; `grpo:num_generations=8` 30.0%"


def test_a_warm_up_that_does_not_get_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="solved after 6 steps of warm-up, not 90%"):
        warm_start("tiny", Task("chain_sum", 2), 0.9, tmp_path, max_steps=6)
    assert not list(tmp_path.rglob("*.safetensors"))
    ready = warm_start("tiny", Task("chain_sum", 2), 0.0, tmp_path)
    assert warm_start("tiny", Task("chain_sum", 2), 0.0, tmp_path, max_steps=0) == ready  # found, not taught again


@pytest.mark.parametrize("kind", KINDS)
def test_the_planes_world_is_what_it_says(kind: str) -> None:
    rng = np.random.default_rng(0)
    world = World(6, 0.3, kind)
    solved_chains = [(rng.random(6) < world.problem(rng)[1]).all() for _ in range(4000)]
    assert abs(np.mean(solved_chains) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    prompts = [Prompt(world, SCHEMES["GRPO, 8"], rng, price=2.0, hit=1.0) for _ in range(3000)]
    mean = np.mean([p.gradient for p in prompts], axis=0)
    assert world.gradient @ mean > 0.9 * np.linalg.norm(world.gradient) * np.linalg.norm(mean)
    sampled = 8 * 6 * STEP_TOKENS
    assert {p.tokens for p in prompts} == {sampled, 3 * sampled}  # those with equal rewards are not trained on
    assert all(p.gradient.any() == (p.tokens > sampled) for p in prompts)


def test_the_plane_counts_what_a_search_samples() -> None:
    """All fail from a lost state, so that a reset after the mistake costs tokens and teaches nothing."""
    world = World(4, 0.2, EVEN)
    cost = {}
    names = ("GRPO, 8", "uniform", "racing", "bisect", "random", "proposal", "optimal, 8")
    for name in names:
        rng = np.random.default_rng(1)
        cost[name] = np.mean([Prompt(world, SCHEMES[name], rng, 1.0, 0.9).tokens for _ in range(300)])
    assert cost["optimal, 8"] < cost["GRPO, 8"] < min(cost["random"], cost["proposal"])
    assert max(cost["random"], cost["proposal"]) < cost["bisect"] < cost["uniform"]
    assert cost["racing"] < cost["uniform"]
    assert progress(world, SCHEMES["GRPO, 8"], 500, 1.0, 0.9, seed=0) > progress(
        world, SCHEMES["uniform"], 500, 1.0, 0.9, seed=0
    )


def test_the_worth_of_an_update_is_its_part_along_the_true_gradient_over_its_noise() -> None:
    rng = np.random.default_rng(0)
    true, scale = rng.normal(size=50), np.append(rng.uniform(0.5, 2.0, 49), 0.0)
    noise = rng.normal(size=(4000, 50))
    noise[:, -1] = true[-1] = 0.0  # a parameter without a gradient
    found = worth(0.5 * true + 3.0 * noise, np.full(4000, 2.0), true, scale)
    weight = 1 / scale[:-1]
    expected = (0.5 * (weight * true[:-1] ** 2).sum()) ** 2 / (9.0 * weight.sum())
    assert found["quality"] == pytest.approx(expected, rel=0.2)
    assert found["per_second"] == found["quality"] / 2
    assert abs(found["quality"] - expected) < 8 * found["deviation"]  # of a second, which has half of it
    few = [worth(own, np.ones(20), true, scale)["quality"] for own in 3.0 * noise.reshape(200, 20, 50)]
    assert np.median(few) < 0.1 * expected  # noise alone is worth nothing


def test_gradients_are_measured_at_weights_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_gradient, "solved", _ends_with_an_even_token)  # an untrained model solves nothing
    trial = Trial(Task("chain_sum", 2), "grpo", 0, start=0.0, seconds=0.0)
    first, seconds, history = loop_gradient.gradients(trial, tmp_path, 2, seed=1)
    again, _, _ = loop_gradient.gradients(trial, tmp_path, 2, seed=1)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], first[1])
    assert len(first) == len(seconds) == len(history) == 2
    records = [
        loop_gradient.measure(Trial(trial.task, algorithm, 0, 0.0, 0.0), tmp_path, 2)
        for algorithm in ("random", "grpo")
    ]
    (cell,) = loop_gradient.cells(records)
    assert [r["algorithm"] for r in cell] == ["grpo", "random"]
    assert loop_gradient.ratios(cell)[0] == (1.0, 1.0, 1.0, 0.0)
    assert records[0]["means"]["num_tokens"] > records[1]["means"]["num_tokens"]
    json.dumps(records)


def _ends_with_an_even_token(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


def test_the_readme_shows_the_committed_results() -> None:
    pages = tables()
    for page, table in pages.items():
        committed = page.read_text(encoding="utf-8")
        assert with_table(committed, table) == committed, "run `gpo-fast bench readme`"
    assert len({table.count("**missed**") for table in pages.values()}) == 1
    assert "**missed**" in pages[README]
    of_another_machine = [line for line in pages[README].splitlines() if line.endswith("AMX |")]
    assert of_another_machine  # shown if they miss their goal
    assert all("**missed**" in line for line in of_another_machine)
    assert pages[MEASURED].count("AMX |") > 2 * len(of_another_machine)
    with pytest.raises(ValueError, match="needs the lines"):
        with_table("no table", "")


def test_results_are_compared_by_name(tmp_path: Path) -> None:
    def write(name: str, scale: float, rows: list[str]) -> Path:
        data = {row: {"median": scale * (n + 1), "samples": 3} for n, row in enumerate(rows)}
        runs = [{"peer": row, "median_ms": 1e3 * scale} for row in reversed(rows)]
        (tmp_path / name).write_text(json.dumps({"data": data, "runs": runs, "floors": {"seconds": 1.0}}))
        return tmp_path / name

    before, after = write("a.json", 1.0, ["fork", "match"]), write("b.json", 3.0, ["fork", "match", "evict"])
    shown = compare(before, after)
    assert {row[0] for row in shown.rows} == {"data / fork", "data / match", "runs / fork", "runs / match"}
    assert {row[-1] for row in shown.rows} == {"3.00"}
    with pytest.raises(ValueError, match="no time in common"):
        compare(before, write("c.json", 1.0, ["open"]))


def test_times_are_drawn_beside_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("matplotlib.image")
    result = tmp_path / "bench" / "loss.json"
    rounds = {"ours": [{"seconds": 1.0}, {"seconds": 3.0}], "theirs": [{"seconds": 4.0}], "slow": ["out of time"]}

    def script(call: list[str], check: bool) -> Any:
        assert call[1:3] == [command("loss", [])[0], "--device"]
        result.parent.mkdir()
        result.write_text(json.dumps({"runs": [{"task": "GRPO", "results": rounds}]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", script)
    assert suite.run("loss", ["--json", str(result)]) == 0
    picture = image.imread(result.with_suffix(".png"))
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.2)
    widths = sorted({int(row.sum()) for row in blue if row.sum() > 100})
    assert widths[-1] == pytest.approx(2 * widths[0], rel=0.02)  # a bar of 4 s, and one of the median, 2 s
    result.write_text(json.dumps({"data": {"coverage": 0.95}}))
    assert suite.plot(result) is None  # without times there is nothing to draw


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_name(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentTypeError, match="sees no GPU"):
        device_name("cuda")
    with pytest.raises(ArgumentTypeError, match="'tpu' is neither"):
        device_name("tpu")


def test_the_command_line_finds_every_script_and_suits_the_machine() -> None:
    shown = CliRunner().invoke(cli.app, ["bench", "--help"]).output
    assert all(name in shown for name in (*SUITE, "all", "compare", "readme"))
    for name in SUITE:
        assert Path(command(name, [])[0]).is_file()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for options in (["gain", "--quick"], ["price", "--device=cpu", "--quick"], ["--help"]):
        assert command("loop", options)[1:] == options
    for options in (["--quick"], ["price", "--quick"]):
        assert command("loop", options)[1:] == ["price", "--device", device, "--quick"]
    assert command("rollout", ["--dtype=float32", "--quick"])[-2:] == ["--dtype=float32", "--quick"]
    assert command("tree", []).count("--dtype") == 1
    assert command("tree", ["--dtype", "fp32"]).count("--dtype") == 1


def test_the_gpu_run_fits_its_nine_minutes(tmp_path: Path) -> None:
    plan = gpu.parts(tmp_path, quick=False)
    assert sum(part.seconds for part in plan) <= 9 * 60 - 10
    assert next(part for part in plan if part.name == "loop").command[2] == "price"


def test_the_plain_engine_samples_what_the_engine_does() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # one token has all the probability, so both must draw it
    requests = [
        Request(tokenizer(text)["input_ids"], n, SamplingParams(max_tokens=most))
        for text, n, most in (("1+1=", 2, 9), ("a longer prefix: 2+2=", 1, 4), ("x", 3, 12))
    ]
    plain = PlainEngine(model, tokenizer, max_batch_size=4).generate(requests)
    ours = RolloutEngine(model, tokenizer).generate(requests)
    for theirs, mine in zip(plain, ours, strict=True):
        assert (theirs.request_index, theirs.branch_index) == (mine.request_index, mine.branch_index)
        assert theirs.prompt_token_ids == list(mine.prompt_token_ids)
        assert (theirs.token_ids, theirs.finish_reason) == (list(mine.token_ids), mine.finish_reason)


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_full_vocabulary_loss_has_the_same_gradients(tmp_path: Path, packing: str) -> None:
    gradients = []
    for number, kind in enumerate((GPOTrainer, FullVocabularyTrainer)):
        model = tiny.model()
        way = Way({"packing": packing, "temperature": 0.8}, kind)
        size = Size("tiny", "cpu", "float32", prompts=2, generations=3, resets=2, samples=2, tokens=20)
        trainer = our_trainer(way, model, tiny.tokenizer(), size, tmp_path / str(number), 1, StepClock())
        experience = trainer.sampler.collect(list(trainer.train_dataset)[:2], seed=1)
        trainer._forest = experience.forest
        trainer._update(trainer.model, experience.rows)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()

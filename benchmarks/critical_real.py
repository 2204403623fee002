"""Does the search find the mistake? SmolLM2-135M on chains of sums, where arithmetic knows the first wrong line.

The model is warmed up as in `gpo-fast demo`. Failing trajectories are taken from groups with right and wrong
outcomes, and each method names a step (criterion "min"); a hit is the first line that differs from the right one.
Uniform and racing at several N, bisection, the proposals alone, and a random step (Satori's way of resetting).

    python benchmarks/critical_real.py --warm /tmp/warm --json critical_real.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

import gpo_fast
from gpo_fast import Completion, CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter
from gpo_fast.critical.proposals import GradientScore, TokenEntropy, logprob_dip
from gpo_fast.demo.model import fast_dtype, load_demo_model
from gpo_fast.demo.task import held_out, solution, solved
from gpo_fast.demo.warmup import warm_up
from gpo_fast.evaluation import wilson_interval
from gpo_fast.steps import Step

SPLITTER = StepSplitter("newline", min_tokens=1)
GROUP, MAX_TOKENS = 8, 64


class Failing(NamedTuple):
    """A failing trajectory, its steps (lines), its problem, the rewards of its group, and its first wrong line."""

    completion: Completion
    steps: list[Step]
    row: dict[str, Any]
    group: list[float]
    mistake: int


class Result(NamedTuple):
    """One line of the table."""

    method: str
    hits: float  # an expectation where the method is random
    tokens: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=Path, help="folder of the warmed-up model; made if it is not there")
    parser.add_argument("--solve-rate", type=float, default=0.25, help="at which the warm-up ends")
    parser.add_argument("--trajectories", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="24 trajectories")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count = 24 if options.quick else options.trajectories
    transformers.utils.logging.disable_progress_bar()

    model, tokenizer = warmed(options.warm, options.solve_rate)
    engine = RolloutEngine(model, tokenizer, max_batch_size=128)
    failing, accuracy = failing_trajectories(engine, count)
    if not failing:
        raise SystemExit(f"no group of {GROUP} has right and wrong rollouts: the warm-up was too short or too long")
    results = [search(engine, failing, "uniform", n) for n in (2, 4, 12, 32)]
    results += [search(engine, failing, "racing", n) for n in (2, 4, 12)]
    results += [search(engine, failing, "racing", 4, proposal=p) for p in ("logprob", "entropy", "gradient")]
    results += [search(engine, failing, "bisect", n) for n in (4, 12)]
    proposals = {"logprob": logprob_dip, "entropy": TokenEntropy(model), "gradient": GradientScore(model)}
    results += [alone(failing, name, proposal) for name, proposal in proposals.items()]
    chance = sum(1 / len(f.steps) for f in failing)
    results.append(Result("random step", chance, 0, 0.0))
    show(results, len(failing), accuracy)
    if options.json:
        options.json.write_text(json.dumps(record(results, failing, accuracy), indent=1))


def warmed(folder: Path | None, solve_rate: float) -> tuple[Any, Any]:
    """The demo's model after its warm-up, from `folder` if it is there."""
    if folder is not None and (folder / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype(), local_files_only=True)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, tokenizer = load_demo_model(torch.float32)
    warm_up(
        model,
        tokenizer,
        solve_rate=solve_rate,
        max_steps=60,
        on_step=lambda step, loss: print(f"warm-up {step}/60 loss {loss:.3f}", flush=True),
    )
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.to(fast_dtype()).eval(), tokenizer


def failing_trajectories(engine: RolloutEngine, count: int) -> tuple[list[Failing], float]:
    """The first failing trajectory of each group with mixed outcomes, and the accuracy of all rollouts."""
    rows, found, rewards, start = held_out(1024), [], [], 0
    while len(found) < count and start < len(rows):
        batch = rows[start : start + 32]
        prompts = [engine.tokenizer(row["prompt"])["input_ids"] for row in batch]
        sampling = SamplingParams(max_tokens=MAX_TOKENS)
        drawn = engine.generate([Request(p, GROUP, sampling, seed=start + i) for i, p in enumerate(prompts)])
        for i, row in enumerate(batch):
            group = drawn[i * GROUP : (i + 1) * GROUP]
            outcomes = scores(engine, group, [row] * GROUP)
            rewards += outcomes
            if 0 < sum(outcomes) < GROUP:
                worst = group[outcomes.index(0.0)]
                steps = SPLITTER.split(worst.token_ids, engine.tokenizer)
                mistake = first_wrong_line(engine, worst, steps, row)
                if mistake is not None:
                    found.append(Failing(worst, steps, row, outcomes, mistake))
        start += len(batch)
    return found[:count], sum(rewards) / len(rewards)


def first_wrong_line(
    engine: RolloutEngine, completion: Completion, steps: list[Step], row: dict[str, Any]
) -> int | None:
    """The step that holds the first line unlike the solution's; None where steps and lines do not match."""
    text = [
        engine.tokenizer.decode(completion.token_ids[s.start : s.end], skip_special_tokens=True).strip() for s in steps
    ]
    right = solution(row["metadata"]["expression"]).split("\n")
    if len(text) < 2 or any("\n" in line for line in text):
        return None
    for i, line in enumerate(text):
        if i >= len(right) or line != right[i]:
            return i
    return len(text) - 1  # right as far as it goes, but it stops too early


def scores(engine: RolloutEngine, completions: Sequence[Completion], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a right final result, else 0."""
    texts = [engine.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    return solved(texts, [r["answer"] for r in rows], [r["metadata"] for r in rows])


def search(engine: RolloutEngine, failing: list[Failing], estimator: Any, n: int, proposal: Any = None) -> Result:
    def outcome(completions: Sequence[Completion]) -> list[float]:
        return scores(engine, completions, [failing[c.request_index].row for c in completions])

    finder = CriticalStepFinder(
        engine,
        outcome,
        SPLITTER,
        n_samples=n,
        criterion="min",
        estimator=estimator,
        proposal=proposal,
        sampling=SamplingParams(max_tokens=MAX_TOKENS),
        seed=5,
    )
    engine.update_weights()  # nothing of an earlier search is in the cache
    began = time.perf_counter()
    found = finder.find(
        [f.completion for f in failing], rewards=[0.0] * len(failing), root_values=[f.group for f in failing]
    )
    seconds = time.perf_counter() - began
    hits = sum(step.index == f.mistake for f, step in zip(failing, found))
    name = f"{estimator} N={n}" + (f", {proposal} first" if proposal else "")
    return Result(name, hits, sum(step.num_tokens for step in found), seconds)


def alone(failing: list[Failing], name: str, proposal: Any) -> Result:
    """A proposal's own favourite, without a single continuation."""
    began = time.perf_counter()
    scored = proposal([f.completion for f in failing], [f.steps for f in failing])
    hits = sum(max(range(len(s)), key=s.__getitem__) == f.mistake for f, s in zip(failing, scored))
    return Result(f"{name} alone", hits, 0, time.perf_counter() - began)


def show(results: list[Result], count: int, accuracy: float) -> None:
    table = Table("method", "hits", "95 % interval", "tokens", "seconds", title=f"{count} failing trajectories")
    for r in results:
        rate = wilson_interval(r.hits, count)
        interval = f"{rate.low:.0%} to {rate.high:.0%}"
        table.add_row(r.method, f"{rate.accuracy:.1%}", interval, f"{r.tokens}", f"{r.seconds:.1f}")
    Console().print(table)
    print(f"accuracy of the model: {accuracy:.1%}")


def record(results: list[Result], failing: list[Failing], accuracy: float) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "trajectories": len(failing),
        "mean_steps": sum(len(f.steps) for f in failing) / max(1, len(failing)),
        "accuracy": accuracy,
        "results": [r._asdict() for r in results],
        "machine": platform.platform(),
        "cpu": platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "gpo_fast": gpo_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit,
    }


if __name__ == "__main__":
    main()

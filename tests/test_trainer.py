"""The trainer on a tiny model: it learns, resumes exactly, and refuses what cannot work."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig

from gpo_fast import GPOConfig, GPOTrainer
from gpo_fast.config import load_config
from gpo_fast.procedure import SEARCH_RULES, GuidedSampler, TrainingRow, search_failed
from gpo_fast.report import write_report
from gpo_fast.run_files import COMPLETE_MARK, RunFiles, last_checkpoint, read_records
from gpo_fast.steps import METHODS

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def share_of_ones(completions, **_):
    return [c.count("1") / max(1, len(c)) for c in completions]


def config(folder: Path, **changes) -> GPOConfig:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "num_samples": 2,
        "num_resets": 2,
        "search_budget": None,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "save_steps": 2,
        "step_splitter": "tokens",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **changes,
    }
    return GPOConfig(**values)


def trainer(folder: Path, model=None, **changes) -> GPOTrainer:
    return GPOTrainer(
        model if model is not None else tiny.model(initializer_range=0.02),
        share_of_ones,
        args=config(folder, **changes),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
    )


def deterministic(folder: Path) -> list[dict]:
    """A run's metrics without times."""
    timed = ("time", "seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("loss_type", ["grpo", "awr"])
def test_the_reward_rises(tmp_path: Path, loss_type: str) -> None:
    run = trainer(tmp_path / "run", loss_type=loss_type, max_steps=15, learning_rate=1e-2)
    run.train()
    rewards = [r["reward"] for r in deterministic(tmp_path / "run")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert write_report(tmp_path / "run").stat().st_size > 5_000


def test_a_run_says_what_it_did(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", search="all", max_searches=3, reuse="all")
    run.train()
    record = deterministic(tmp_path / "run")[0]
    assert record["num_searches"] == 3
    assert 0 < record["num_reused"] <= 3 * 2
    experience = run.sampler.collect(PROMPTS[:4], seed=1)
    trained = [r for r in experience.rows if r.kind != "base"]
    later = sum(t["critical"] > 0 for t in experience.trajectories)
    assert len(trained) == later * 2  # a step at the prompt has its group's rollouts
    assert any(r.kind == "search" for r in trained)
    trajectories = read_records(tmp_path / "run" / "trajectories.jsonl")
    assert all(t["steps"] and 0 <= t["critical"] < len(t["steps"]) for t in trajectories)
    assert all(sum(b["kind"] == "reset" for b in t["branches"]) <= 2 for t in trajectories)
    assert (last_checkpoint(tmp_path / "run") or Path()).name == "checkpoint-6"


def second_of_each(rewards):
    return [group * rewards.shape[1] + 1 for group in range(len(rewards))]


def test_without_any_reset_the_metrics_are_numbers(tmp_path: Path) -> None:
    """Trajectories of one step: each critical step is at the prompt, which has its rollouts."""
    run = trainer(tmp_path / "run", reuse="all", min_step_tokens=12, max_steps=1)
    run.train()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert record["num_searches"] > 0
    assert "reset_reward" not in record
    assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_the_search_is_chosen_by_a_rule_and_a_budget(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", search=second_of_each, reuse="split", estimator="uniform", max_steps=1)
    run.train()
    record = deterministic(tmp_path / "run")[0]
    assert record["num_searches"] == 4
    assert record["search_rollouts_saved"] == 0
    assert record["num_reused"] <= 4
    for budget in (0.0, 1e-9, 0.4):
        sampler = GuidedSampler(run.engine, run.rewards, config(tmp_path, search="all", search_budget=budget), 64)
        metrics = sampler.collect(PROMPTS[:2], seed=1).metrics
        # A continuation is expected to be as long as what the trajectory had left; few are longer here.
        assert metrics["num_search_tokens"] <= budget * metrics["num_tokens"] or metrics["num_searches"] == 1
        assert metrics["num_searches"] > 0 or budget == 0
        assert metrics["num_searches"] < 8
    with pytest.raises(ValueError, match="only the trajectories 0 to 7"):
        GuidedSampler(run.engine, run.rewards, config(tmp_path, search=lambda r: [8]), 64).collect(PROMPTS[:2], seed=1)


def test_which_trajectories_a_rule_takes() -> None:
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5], [1.0, 0.5]])
    expected = {"mixed": [2, 9], "failed": [4, 6], "worst": [0, 2, 4, 6, 9], "all": list(range(10))}
    assert {name: rule(rewards) for name, rule in SEARCH_RULES.items()} == expected
    # Where no rewards differ, they may be the best ones or the worst.
    assert search_failed(np.zeros((2, 2))) == search_failed(np.ones((2, 2))) == [0, 2]
    assert search_failed(np.array([[0.0, 1.0], [1.0, 1.0]])) == []


def test_the_update_is_that_of_plain_grpo(tmp_path: Path) -> None:
    model = tiny.model()
    run = trainer(tmp_path / "run", model=model, loss_type="grpo", max_tokens_per_microbatch=20)
    rows = [
        TrainingRow([5, 6, 7], [8, 9], [0.0, 0.0], 1.5, "base"),
        TrainingRow([5, 6], [8, 10, 11, 12], [0.0] * 4, -0.5, "reset"),
        TrainingRow([9], [3], [0.0], 0.0, "base"),
    ]
    loss, _ = run._update(model, rows)
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    truth = torch.zeros(())
    for row in rows:
        ids = torch.tensor([[*row.context_ids, *row.token_ids]])
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        own = logprobs[len(row.context_ids) - 1 :]
        # On-policy the ratio is 1 and its gradient that of the logprob (arXiv 2402.03300, equation 3).
        truth = truth - (row.advantage * (own - own.detach()).exp()).mean() / len(rows)
    truth.backward()
    assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7


def test_adapters_train_and_report_their_divergence(tmp_path: Path) -> None:
    run = GPOTrainer(
        tiny.model(),
        share_of_ones,
        args=config(tmp_path / "run", max_steps=3),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
    )
    run.train()
    divergence = [r["kl"] for r in deterministic(tmp_path / "run")]
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 0


def test_conversations_and_several_steps_per_generation(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    seen = []

    def reward(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    run = GPOTrainer(
        tiny.model(),
        reward,
        args=config(tmp_path / "run", steps_per_generation=2, max_steps=4, beta=0.1),
        train_dataset=[{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in PROMPTS],
        processing_class=tokenizer,
    )
    run.train()
    tokenizer.chat_template = None
    assert seen[0][1][0]["role"] == "assistant"
    assert ["reward" in r for r in deterministic(tmp_path / "run")] == [True, False, True, False]
    assert "optimiser steps" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_memory_too_small_for_all_sequences_changes_no_metric(tmp_path: Path) -> None:
    # The estimator is uniform: racing looks ahead where the engine has idle places, which memory decides.
    options = {"max_steps": 2, "max_completion_length": 40, "estimator": "uniform"}
    roomy = trainer(tmp_path / "roomy", **options)
    roomy.train()
    tight = trainer(tmp_path / "tight", kv_cache_memory=7 * roomy.engine.block_bytes, **options)
    tight.train()
    assert tight.engine.stats()["preemptions"] > 0 == roomy.engine.stats()["preemptions"]
    for ours, theirs in zip(deterministic(tmp_path / "tight"), deterministic(tmp_path / "roomy")):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / COMPLETE_MARK).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_later_records_are_dropped_on_resume(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    files.begin({"title": "x"}, 0)
    for step in (1, 2, 3):
        files.metrics({"step": step, "time": float(step)})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "ti')
    again = RunFiles(tmp_path / "run")
    again.begin({"title": "x"}, 2)
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert again.time() >= 2


def build(tmp_path: Path, **changes) -> GPOTrainer:
    values = {
        "model": tiny.model(),
        "reward_funcs": share_of_ones,
        "args": config(tmp_path / "run"),
        "train_dataset": PROMPTS,
        "processing_class": tiny.tokenizer(),
        **changes,
    }
    return GPOTrainer(**values)


def test_bad_input_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        build(tmp_path, train_dataset=[])
    with pytest.raises(ValueError, match="no 'prompt' column"):
        build(tmp_path, train_dataset=[{"question": "x"}])
    with pytest.raises(ValueError, match="must be a string or a list"):
        build(tmp_path, train_dataset=[{"prompt": 3}])
    with pytest.raises(ValueError, match="sliding-window"):
        build(tmp_path, model=tiny.model("mistral", sliding_window=8))
    with pytest.raises(ValueError, match="dropout must be 0"):
        build(tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    tokenizer = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no eos_token"):
        build(tmp_path, processing_class=tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not a run"):
        build(tmp_path, args=config(tmp_path / "full"))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "keep me"
    with pytest.raises(ValueError, match="context is 256 tokens"):
        build(tmp_path, train_dataset=[{"prompt": "1" * 300}]).train()
    with pytest.raises(FileNotFoundError, match="not a run"):
        write_report(tmp_path / "full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "grppo"}, "did you mean 'grpo'"),
        ({"criterion": "mean"}, "must be one of max, min, abs"),
        ({"num_generations": 1}, "at least 2"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"gradient_accumulation_steps": 4}, "max_tokens_per_microbatch"),
        ({"top_p": 1.5}, "top_p must be in"),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("method", [*METHODS, lambda tokens, tokenizer: [1]])
def test_every_step_splitter_can_be_configured(tmp_path: Path, method: object) -> None:
    pattern = r"\." if method == "regex" else None
    assert config(tmp_path, step_splitter=method, step_pattern=pattern).splitter().method == method


def test_configuration_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndataset: d.jsonl\nrewards: exact_match\noutput_dir: {tmp_path}/run\nuse_cpu: true\n")
    spec, read = load_config(path, {"max_steps": 7, "bf16": False})
    assert (spec.rewards, read.max_steps) == (["exact_match"], 7)
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        load_config(path, {"learning_rat": 1})
    path.write_text("dataset: d\nrewards: r\n")
    with pytest.raises(ValueError, match="needs the field 'model'"):
        load_config(path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")


def test_a_report_escapes_everything(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\" onload='x'"
    files = RunFiles(tmp_path / "run")
    files.begin({"title": evil, "model": evil, "algorithm": evil, "device": evil, "notes": [evil]}, 0)
    step = {"text": evil, "num_tokens": 3, "value": 0.5, "standard_error": float("nan"), "advantage": -0.5}
    record = {"step": 1, "prompt": evil, "reward": 0.0, "steps": [step], "critical": 0, "reset": "before"}
    record |= {"criterion": evil, "num_rollouts": 4, "num_tokens": 9, "answer": evil}
    files.trajectories([{**record, "branches": [{"text": evil, "reward": 1.0, "kind": evil}]}])
    page = write_report(tmp_path / "run").read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert page.count("&lt;script&gt;") >= 8
    json.loads((tmp_path / "run" / "run.json").read_text())

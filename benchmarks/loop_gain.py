"""One run of the gain study: a tiny model, its warm start, one algorithm for a fixed time, its learning curve.

The clock is this process's CPU time in training steps, evaluation left out: on a machine that others use as well it
says what wall-clock time would say on an idle core. All runs of a task begin with the same weights (a seed draws
problems and samples) and share every setting that they do not name themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpo_fast.bench.common import machine
from gpo_fast.bench.loop_tasks import Row, Task, character_tokenizer, solved
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

from gpo_fast import GPOConfig, GPOTrainer, linear_logprob
from gpo_fast.cli import parse_overrides
from gpo_fast.experience import TrainingRow
from gpo_fast.procedure import GuidedSampler
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout import RolloutEngine
from gpo_fast.run_files import read_records
from gpo_fast.training_batch import padded_batches

# What an algorithm changes in the settings that all share.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"use_gpo": False},
    "gpo": {"estimator": "racing", "reuse": "all"},
    "gpo-uniform": {"estimator": "uniform", "reuse": "all"},
    # Of all schemes of loop_plane.py the one that gains most where success is rare.
    "gpo-proposal": {
        "estimator": "proposal",
        "search": "worst",
        "reuse": "all",
        "num_generations": 4,
        "num_resets": 8,
    },
    "random": {"estimator": "random"},
    "grpo-credit": {"use_gpo": False, "credit": "mistake"},
    "gpo-credit": {"estimator": "proposal", "search": "worst", "reuse": "all", "credit": "mistake"},
    "dpo": {"loss_type": "dpo", "use_gpo": False},
    "gpo-dpo": {"loss_type": "dpo", "estimator": "racing"},
}
TRAIN_SEED, HELD_OUT_SEED, WARMUP_SEED = 11, 7_000_003, 29
LESSONS, WARMUP_BATCH, WARMUP_CHECK = 8192, 64, 5  # the latter: steps between two measurements of the solve rate


@dataclass(frozen=True)
class Trial:
    """What one run depends on. `algorithm` may have settings of GPOConfig behind it: `gpo:criterion=min,reuse=all`."""

    task: Task
    algorithm: str
    seed: int
    start: float  # solve rate at which the warm-up ends
    seconds: float  # of training
    evaluations: int = 5  # after equal parts of the time, and one before
    learning_rate: float = 1e-4
    problems: int = 512  # held-out ones, one sample each at temperature 1

    def __post_init__(self) -> None:
        base = self.algorithm.partition(":")[0]
        if base not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {base!r}: use one of {', '.join(ALGORITHMS)}, then ':name=value,...'")

    @property
    def changes(self) -> dict[str, Any]:
        """The algorithm's own settings."""
        base, _, own = self.algorithm.partition(":")
        return ALGORITHMS[base] | parse_overrides([f"--{pair}" for pair in own.split(",") if pair])


@dataclass
class Curve(TrainerCallback):
    """Held-out accuracy over training time, and the end of the run when its time is used up."""

    trial: Trial
    held_out: list[Row]
    trainer: GPOTrainer | None = None
    seconds: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self._began
        if self.seconds >= self.trial.seconds * len(self.points) / self.trial.evaluations:
            self._evaluate(state.global_step)
        control.should_training_stop = self.seconds >= self.trial.seconds

    def _evaluate(self, step: int) -> None:
        assert self.trainer is not None
        done = read_records(self.trainer.run_files.folder / "metrics.jsonl")
        self.points.append(
            {
                "seconds": self.seconds,
                "steps": step,
                "tokens": sum(record.get("num_tokens", 0) for record in done),
                "rollouts": sum(record.get("num_rollouts", 0) for record in done),
                "accuracy": float(self.trainer.sample_rewards(self.held_out, seed=HELD_OUT_SEED).mean()),
            }
        )


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Trains as the trial says; gives its record. Warm starts are kept in `folder`."""
    curve = Curve(trial, trial.task.rows(trial.problems, HELD_OUT_SEED))
    with TemporaryDirectory() as output:
        trainer = build(trial, folder, Path(output), solved, TRAIN_SEED + trial.seed)
        trainer.add_callback(curve)
        curve.trainer = trainer
        trainer.train()
        history = read_records(Path(output) / "metrics.jsonl")
    phases = sorted({phase for record in history for phase in record["seconds"]})
    return {
        **asdict(trial),
        "settings": _plain(trial.changes),
        "clock": f"process CPU time, {torch.get_num_threads()} thread(s)",
        "points": curve.points,
        "wall_seconds_by_phase": {p: sum(r["seconds"].get(p, 0.0) for r in history) for p in phases},
        "means": _means(history),
        "machine": machine(),
    }


def build(trial: Trial, folder: Path, output: Path, reward: Any, data_seed: int) -> GPOTrainer:
    """A trainer at the trial's warm start."""
    trainer = GPOTrainer(
        AutoModelForCausalLM.from_pretrained(warm_start(trial, folder), dtype=torch.float32, local_files_only=True),
        reward,
        args=settings(trial, output),
        train_dataset=trial.task.rows(4096, data_seed),
        processing_class=character_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def settings(trial: Trial, output: Path) -> GPOConfig:
    """The settings that all algorithms share, then the algorithm's own."""
    shared: dict[str, Any] = {
        "loss_type": "dapo",
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": trial.task.max_tokens,
        "num_samples": 4,
        "num_resets": 4,
        "criterion": "min",
        "max_batch_size": 256,
        "kv_cache_memory": 64 << 20,
        "learning_rate": trial.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
    return GPOConfig(
        output_dir=str(output),
        seed=trial.seed,
        max_steps=1_000_000,  # the clock ends a run
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        num_logged_trajectories=0,
        **(shared | trial.changes),
    )


def tiny_model(tokenizer: Any, context: int, seed: int) -> Any:
    """A Llama of two layers and 0.4M parameters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def warm_start(trial: Trial, folder: Path, max_steps: int = 5000) -> Path:
    """A model that was taught until it solves the trial's share of problems; trained once for each task and start.

    Raises:
        RuntimeError: it does not get there.
    """
    task = trial.task
    name = f"{task.name}-{task.steps}-{trial.start:g}"
    target = folder / "warm" / name
    if target.is_dir():
        return target
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, context=16 * task.steps + 64, seed=WARMUP_SEED)
    sampler = GuidedSampler(
        RolloutEngine(model, tokenizer, kv_cache_memory=64 << 20, max_batch_size=128),
        RewardFunctions(solved),
        settings(trial, folder),
        model.config.max_position_embeddings,
    )
    checks = task.rows(256, WARMUP_SEED - 1)
    lessons = task.rows(LESSONS, WARMUP_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    rate = 0.0
    for step in range(max_steps):
        if step % WARMUP_CHECK == 0:
            sampler.engine.update_weights()
            rate = float(sampler.score_once(checks, 1.0, [step + i for i in range(len(checks))]).mean())
            if rate >= trial.start:
                break
        first = step * WARMUP_BATCH % len(lessons)
        imitate(model, tokenizer, lessons[first : first + WARMUP_BATCH]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    else:
        raise RuntimeError(
            f"{task.label}: {rate:.0%} are solved after {max_steps} steps of warm-up, not {trial.start:.0%}"
        )
    print(f"warm-up of {name}: {rate:.1%} solved after {step} steps", flush=True)
    own = target.with_name(f"{name}.{os.getpid()}")
    model.save_pretrained(own)
    if target.is_dir():  # another process was faster, with the same weights
        shutil.rmtree(own)
    else:
        own.rename(target)
    return target


def imitate(model: Any, tokenizer: Any, rows: list[Row]) -> torch.Tensor:
    """Mean negative log-probability of the solutions' tokens and the end token."""
    lessons = []
    for row in rows:
        answer = [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]
        lessons.append(TrainingRow(tokenizer(row["prompt"])["input_ids"], answer, [], 1.0, "base"))
    (batch,) = padded_batches(lessons, max_tokens=1 << 30)
    logprobs = linear_logprob(batch.hidden(model.get_decoder()), model.get_output_embeddings().weight, batch.targets)
    return -logprobs.mean()


def is_finished(trial: Trial, records: list[dict[str, Any]]) -> bool:
    """Whether a record of this very trial is there."""
    wanted = json.loads(json.dumps(asdict(trial)))
    return any(all(record.get(name) == value for name, value in wanted.items()) for record in records)


def append(path: Path, record: dict[str, Any]) -> None:
    """One line; two processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _means(history: list[dict[str, Any]]) -> dict[str, float]:
    """What the run's iterations were like."""
    names = ("mixed_groups", "reset_reward", "num_searches", "num_search_tokens", "num_tokens", "critical_position")
    found = {name: [record[name] for record in history if name in record] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))

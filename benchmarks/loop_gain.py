"""One run of the gain study: a model at its warm start, one algorithm for a fixed time, its learning curve.

The clock is this process's CPU time in training steps, evaluation left out: on a machine that others use as well it
says what wall-clock time would say on an idle core. All runs of a task begin with the same weights (a seed draws
problems and samples) and share every setting that they do not name themselves.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpo_fast.bench.common import machine
from gpo_fast.bench.loop_models import MODELS, warm_start
from gpo_fast.bench.loop_tasks import Row, Task, solved
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from gpo_fast import GPOConfig, GPOTrainer
from gpo_fast.cli import parse_overrides
from gpo_fast.run_files import read_records

BUDGET = GPOConfig.search_budget  # the default
# What an algorithm changes in the settings that all share.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"use_gpo": False},
    "gpo": {"estimator": "racing", "reuse": "all"},
    # GPOConfig's defaults, but for the criterion and the reuse.
    "gpo-default": {"estimator": "racing", "reuse": "all", "search_budget": BUDGET, "baseline": "optimal"},
    "gpo-uniform": {"estimator": "uniform", "reuse": "all"},
    "random": {"estimator": "random"},
    "grpo-optimal": {"use_gpo": False, "baseline": "optimal"},
    "gpo-optimal": {"estimator": "proposal", "search": "failed", "reuse": "all", "baseline": "optimal"},
    "dpo": {"loss_type": "dpo", "use_gpo": False},
    "gpo-dpo": {"loss_type": "dpo", "estimator": "racing", "reuse": "all", "search_budget": BUDGET},
    "gpo-dpo-failed": {"loss_type": "dpo", "estimator": "proposal", "search": "failed", "reuse": "all"},
}
TRAIN_SEED, HELD_OUT_SEED = 11, 7_000_003


@dataclass(frozen=True)
class Trial:
    """What one run depends on. `algorithm` may have settings of GPOConfig behind it: `gpo:criterion=min,reuse=all`."""

    task: Task
    algorithm: str
    seed: int
    start: float  # solve rate at which the warm-up ends
    seconds: float  # of training
    evaluations: int = 5  # after equal parts of the time, and one before
    learning_rate: float | None = None  # by default the model's
    problems: int = 512  # held-out ones, one sample each at temperature 1
    model: str = "tiny"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}: use one of {', '.join(MODELS)}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", MODELS[self.model].settings["learning_rate"])
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
    warm, pupil = warm_start(trial.model, trial.task, trial.start, folder), MODELS[trial.model]
    trainer = GPOTrainer(
        AutoModelForCausalLM.from_pretrained(warm, dtype=pupil.dtype(), local_files_only=True),
        reward,
        args=settings(trial, output),
        train_dataset=trial.task.rows(4096, data_seed),
        processing_class=AutoTokenizer.from_pretrained(warm, local_files_only=True),
        peft_config=pupil.adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def settings(trial: Trial, output: Path) -> GPOConfig:
    """The settings that all algorithms share, then the algorithm's own."""
    shared: dict[str, Any] = {
        "loss_type": "dapo",
        "max_completion_length": trial.task.max_tokens,
        "num_samples": 4,
        "num_resets": 4,
        "criterion": "min",
        "search_budget": None,
        "baseline": "mean",
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
    }
    pupil = MODELS[trial.model]
    shared |= pupil.settings | {"learning_rate": trial.learning_rate, "bf16": pupil.dtype() == torch.bfloat16}
    return GPOConfig(
        output_dir=str(output),
        seed=trial.seed,
        max_steps=1_000_000,  # the clock ends a run
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        num_logged_trajectories=0,
        **(shared | trial.changes),
    )


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

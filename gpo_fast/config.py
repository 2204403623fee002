"""Configuration of a GPO run: Hugging Face's TrainingArguments plus what GPO and its base algorithm need."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from gpo_fast.critical.finder import check_options
from gpo_fast.rollout.types import SamplingParams
from gpo_fast.steps import METHODS, StepSplitter

LOSS_TYPES = ("grpo", "awr", "ppo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class GPOConfig(TrainingArguments):
    """One optimiser step is one iteration: sample, search, reset, update.

    `per_device_train_batch_size` counts *prompts*; each gets `num_generations` completions. Memory in training is
    bounded by `max_tokens_per_microbatch`, so gradient accumulation is not needed for it.
    """

    learning_rate: float = _option(1e-6, "Peak learning rate (with LoRA, 1e-5 to 3e-4 is usual).")
    logging_steps: float = _option(1, "Log every so many steps.")
    use_gpo: bool = _option(True, "Search critical steps and learn from resets; False trains the base algorithm.")
    loss_type: str = _option("grpo", f"Base algorithm's loss: one of {', '.join(LOSS_TYPES)}.")
    num_generations: int = _option(8, "Completions sampled for each prompt.")
    max_completion_length: int = _option(256, "Longest completion in tokens.")
    temperature: float = _option(1.0, "Sampling temperature.")
    top_k: int = _option(0, "Sample among the k likeliest tokens; 0 is off.")
    top_p: float = _option(1.0, "Nucleus sampling; 1 is off.")
    min_p: float = _option(0.0, "Drop tokens less likely than this share of the likeliest; 0 is off.")
    stop: list[str] | None = _option(None, "Strings that end a completion.")
    num_samples: int = _option(4, "Monte Carlo continuations per step in the search for the critical step.")
    criterion: str = _option("max", "Critical step: largest gain (max), fall (min) or change (abs).")
    estimator: str = _option(
        "racing", "Search by racing, uniform (the paper's) or bisect (a heuristic); random is none."
    )
    delta: float = _option(0.1, "Racing stops when another step is better with at most this probability.")
    proposal: Any = _option(None, "Order of the search by logprob, entropy, gradient or a function; off if not set.")
    reset: str = _option("before", "Reset to the state before or after the critical step.")
    num_resets: int = _option(4, "New rollouts sampled from each critical step.")
    search: Any = _option(
        "mixed",
        "Searched: the worst trajectory of each group with mixed outcomes (mixed), all, or a module's function.",
    )
    max_searches: int | None = _option(None, "At most so many trajectories are searched per iteration.")
    search_budget: float | None = _option(None, "Most tokens of all searches, as a share of the base rollouts'.")
    reuse: str = _option("none", "Also train on the search's samples of the critical step: none, split or all.")
    step_splitter: Any = _option("newline", f"What a step is: {', '.join(METHODS)}, or a function.")
    step_pattern: str | None = _option(None, "Regular expression of the end of a step, for the splitter regex.")
    min_step_tokens: int = _option(4, "A shorter step is merged with its neighbour.")
    max_steps_per_trajectory: int = _option(64, "A trajectory with more steps is thinned evenly.")
    min_steps_per_trajectory: int = _option(1, "A trajectory with fewer steps has its longest ones halved.")
    beta: float = _option(0.0, "Weight of the KL penalty against the reference model.")
    epsilon: float = _option(0.2, "Clip range of the probability ratio.")
    epsilon_high: float | None = _option(None, "Upper clip range; epsilon if not set.")
    scale_rewards: bool = _option(True, "Divide a group's advantages by its standard deviation.")
    steps_per_generation: int = _option(1, "Optimiser steps that share one iteration's rollouts.")
    reward_weights: list[float] | None = _option(None, "Weight of each reward function; 1 each if not set.")
    packing: str = _option("tree", "Train shared tokens once (tree), or each sequence by itself (padded).")
    self_check_steps: int = _option(0, "Compare tree-packed loss and gradient with the padded ones in so many steps.")
    max_tokens_per_microbatch: int = _option(4096, "Tokens in one forward and backward pass, padding included.")
    max_batch_size: int = _option(64, "Sequences that the rollout engine decodes together.")
    kv_cache_memory: int | None = _option(None, "Bytes for the rollout engine's KV cache; chosen if not set.")
    num_logged_trajectories: int = _option(4, "Searched trajectories kept per iteration for the report.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("criterion", self.criterion, ("max", "min", "abs"))
        _one_of("reset", self.reset, ("before", "after"))
        _one_of("estimator", self.estimator, ("uniform", "racing", "bisect", "random"))
        _one_of("reuse", self.reuse, ("none", "split", "all"))
        if not callable(self.step_splitter):
            _one_of("step_splitter", self.step_splitter, METHODS)
        if not callable(self.search):
            _one_of("search", self.search, ("mixed", "all"))
        if self.proposal is not None and not callable(self.proposal):
            _one_of("proposal", self.proposal, ("logprob", "entropy", "gradient"))
        if self.search_budget is not None and self.search_budget < 0:
            raise ValueError(f"search_budget must be at least 0, got {self.search_budget}")
        _one_of("packing", self.packing, ("tree", "padded"))
        if self.self_check_steps < 0:
            raise ValueError(f"self_check_steps must not be negative, got {self.self_check_steps}")
        for name in ("num_generations", "num_samples", "num_resets", "steps_per_generation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_options(self.num_samples, self.criterion, self.estimator, self.reset, self.reuse, self.delta)
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: advantages compare completions of one prompt")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps must be 1, got {self.gradient_accumulation_steps}: memory is bounded "
                "by max_tokens_per_microbatch, and a larger batch is a larger per_device_train_batch_size"
            )
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if self.steps_per_generation > 1 and filtered:
            raise ValueError("steps_per_generation above 1 needs unfiltered sampling (top_k=0, top_p=1, min_p=0)")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0 in training, got {self.temperature}")
        self.sampling_params()  # these two check the rest
        self.splitter()

    def splitter(self) -> StepSplitter:
        """How trajectories are split into steps."""
        return StepSplitter(
            self.step_splitter,
            pattern=self.step_pattern,
            min_tokens=self.min_step_tokens,
            max_steps=self.max_steps_per_trajectory,
            min_steps=self.min_steps_per_trajectory,
        )

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """How completions are drawn in training."""
        values = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "max_tokens": self.max_completion_length,
            "stop": tuple(self.stop or ()),
        }
        return SamplingParams(**{**values, **changes})


@dataclass
class RunSpec:
    """What `gpo-fast train` reads from a file beside GPOConfig's own fields."""

    model: str
    dataset: str
    rewards: list[str]
    eval_dataset: str | None = None
    split: str = "train"
    dtype: str = "auto"
    lora_r: int = 0
    lora_alpha: int | None = None
    trust_remote_code: bool = False


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> tuple[RunSpec, GPOConfig]:
    """Reads a YAML file and applies overrides.

    Raises:
        ValueError: unknown field (the nearest known one is suggested), missing field, or not a mapping.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, got {type(values).__name__}")
    values = {**values, **(overrides or {})}
    spec_fields = {f.name: f for f in dataclasses.fields(RunSpec)}
    config_fields = {f.name: f for f in dataclasses.fields(GPOConfig) if f.init}
    for name in values:
        if name not in spec_fields and name not in config_fields:
            near = difflib.get_close_matches(str(name), [*spec_fields, *config_fields], n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown configuration field {name!r}{hint}")
    for name, spec_field in spec_fields.items():
        if spec_field.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"the configuration needs the field {name!r}")
    if isinstance(values["rewards"], str):
        values["rewards"] = [values["rewards"]]
    spec = RunSpec(**{k: v for k, v in values.items() if k in spec_fields})
    return spec, GPOConfig(**{k: v for k, v in values.items() if k in config_fields})


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")

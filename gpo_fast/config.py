"""Configuration of a GPO run: Hugging Face's TrainingArguments plus what GPO and its base algorithm need."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from transformers import TrainingArguments

from gpo_fast.critical.finder import ESTIMATORS, check_options
from gpo_fast.critical.proposals import PROPOSALS
from gpo_fast.rollout.types import SamplingParams
from gpo_fast.steps import METHODS, StepSplitter

_LOWEST = {
    "learning_rate": 0,
    "num_generations": 1,
    "max_completion_length": 1,
    "num_samples": 1,
    "num_resets": 1,
    "steps_per_generation": 1,
    "max_tokens_per_microbatch": 1,
    "max_batch_size": 1,
    "kv_cache_memory": 1,
    "max_searches": 0,
    "search_budget": 0,
    "self_check_steps": 0,
    "num_logged_trajectories": 0,
    "beta": 0,
    "dynamic_sampling_rounds": 0,
    "soft_punish_cache": 0,
    "replay_size": 0,
    "replay_ratio": 0,
    "max_pairs": 1,
    "epsilon": 0,
    "epsilon_high": 0,
}
PREFERENCE_LOSSES = ("dpo", "kto", "simpo", "orpo")
LOSS_TYPES = ("grpo", "awr", "ppo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", *PREFERENCE_LOSSES)
CRITICS = ("group", "value_head", "monte_carlo")
BASELINES = ("mean", "optimal")
AVERAGED_LOSSES = ("grpo", "gspo")  # whose gradient of a completion is a mean over its tokens
# The papers' strengths of a preference loss (arXiv 2305.18290, 2402.01306, 2405.14734, 2403.07691).
PREFERENCE_BETA = {"dpo": 0.1, "kto": 0.1, "simpo": 2.0, "orpo": 0.1}
UNSCALED = ("dr_grpo", "rloo")  # whose papers do not divide advantages by a standard deviation


def option(default: Any, text: str) -> Any:
    """A field of a configuration, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class GPOConfig(TrainingArguments):
    """One optimiser step is one iteration: sample, search, reset, update.

    `per_device_train_batch_size` counts *prompts*; each gets `num_generations` completions. Memory in training is
    bounded by `max_tokens_per_microbatch`, so gradient accumulation is not needed for it.
    """

    learning_rate: float = option(1e-6, "Peak learning rate (with LoRA, 1e-5 to 3e-4 is usual).")
    logging_steps: float = option(1, "Log every so many steps.")
    use_gpo: bool = option(True, "Search critical steps and learn from resets; False trains the base algorithm.")
    loss_type: str = option(
        "dapo",
        f"Base algorithm's loss: one of {', '.join(LOSS_TYPES)}. With {', '.join(PREFERENCE_LOSSES)} each iteration "
        "pairs completions of one state, the prompt or a critical one, and trains on the pairs.",
    )
    num_generations: int = option(4, "Completions sampled for each prompt.")
    max_completion_length: int = option(256, "Longest completion in tokens.")
    temperature: float = option(1.0, "Sampling temperature.")
    top_k: int = option(0, "Sample among the k likeliest tokens; 0 is off.")
    top_p: float = option(1.0, "Nucleus sampling; 1 is off.")
    min_p: float = option(0.0, "Drop tokens less likely than this share of the likeliest; 0 is off.")
    stop: list[str] | None = option(None, "Strings that end a completion.")
    num_samples: int = option(4, "Monte Carlo continuations per step in the search for the critical step.")
    criterion: str = option("max", "Critical step: largest gain (max), fall (min) or change (abs).")
    estimator: str = option(
        "racing",
        "Search by racing, uniform (the paper's), posterior or bisect (a heuristic). No search: the step that the "
        "proposal scores highest (proposal), or any (random).",
    )
    delta: float = option(0.1, "Racing stops when another step is better with at most this probability, or before.")
    proposal: Any = option(
        None,
        f"Order of the search by {', '.join(PROPOSALS)} or a function; off if not set. The estimator proposal takes "
        "mistake if not set.",
    )
    reset: str = option("before", "Reset to the state before or after the critical step.")
    num_resets: int = option(4, "Rollouts from each critical step to train on.")
    search: Any = option(
        "mixed",
        "Searched: the worst trajectory of each group with mixed outcomes (mixed), of each that failed as a whole "
        "(failed) or of every group (worst), all trajectories (all), or a module's function.",
    )
    max_searches: int | None = option(None, "At most so many trajectories are searched per iteration.")
    search_budget: float | None = option(
        0.25,
        "Most tokens of all searches, as a share of the base rollouts'; above 0 one trajectory is searched whatever it "
        "takes. None: no bound.",
    )
    reuse: str = option(
        "none",
        "The search's samples that are the first of a step's resets: none, split or all. Unless none, a critical step "
        "at the prompt gets no resets: the group's own rollouts start there, and are trained on.",
    )
    step_splitter: Any = option("newline", f"What a step is: {', '.join(METHODS)}, or a function.")
    step_pattern: str | None = option(None, "Regular expression of the end of a step, for the splitter regex.")
    min_step_tokens: int = option(4, "A shorter step is merged with its neighbour.")
    max_steps_per_trajectory: int = option(64, "A trajectory with more steps is thinned evenly.")
    min_steps_per_trajectory: int = option(1, "A trajectory with fewer steps has its longest ones halved.")
    beta: float = option(
        None,
        "Weight of the KL penalty against the reference model, 0 if not set; of a preference loss its strength, "
        "if not set "
        + ", ".join(f"{value} for {name}" for name, value in PREFERENCE_BETA.items())
        + ". Log-probabilities are those at the sampling temperature.",
    )
    simpo_gamma: float = option(0.5, "Margin of simpo, the paper's gamma.")
    max_pairs: int = option(4, "Preference pairs from one state at most: best with worst, second best and so on.")
    epsilon: float = option(0.2, "Clip range of the probability ratio.")
    epsilon_high: float | None = option(None, "Upper clip range; epsilon if not set.")
    scale_rewards: bool = option(
        None,
        "Divide a group's advantages by its standard deviation, and those of a critic by their root mean square "
        "over all tokens (the value head's are centred first); if not set, all losses but "
        f"{' and '.join(UNSCALED)} do. rloo's baseline leaves the completion itself out.",
    )
    awr_beta: float = option(1.0, "Temperature of awr: a token weighs exp(advantage / awr_beta).")
    baseline: str = option(
        None,
        "What a group's rewards are compared with: their mean, as published, or the baseline that leaves the gradient "
        "the least noise (optimal), with which completions that teach next to nothing are not trained on. If not set, "
        "optimal where it can be: with critic group and a loss other than awr, rloo and preference losses.",
    )
    critic: str = option(
        "group",
        "Baseline of the advantages: the group's mean reward (group), a linear value of the last hidden state, fitted "
        "in closed form, with an advantage for each token (value_head), or the values that the search measured, with "
        "an advantage for each step of the searched trajectories (monte_carlo).",
    )
    gamma: float = option(1.0, "Discount of a critic, for each token (value_head) or step (monte_carlo).")
    gae_lambda: float = option(
        1.0,
        "Lambda of generalised advantage estimation; below 1 the outcome of a long completion fades from its start.",
    )
    dynamic_sampling_rounds: int = option(
        0, "DAPO's dynamic sampling: replace groups whose rewards are all the same by other prompts, in so many rounds."
    )
    soft_punish_cache: int = option(
        0, "DAPO's over-long punishment: in so many last tokens before the limit a reward falls by up to 1; 0 is off."
    )
    mask_truncated_completions: bool = option(False, "Do not train on completions that reached the limit.")
    replay_size: int = option(0, "Train again on the newest so many rollouts from critical steps; 0 is off.")
    replay_ratio: float = option(
        1.0, "Replayed rollouts for each new one from a critical step, drawn in proportion to the step's advantage."
    )
    steps_per_generation: int = option(1, "Optimiser steps that share one iteration's rollouts.")
    reward_weights: list[float] | None = option(None, "Weight of each reward function; 1 each if not set.")
    reward_timeout: float | None = option(None, "Seconds that a reward function may take for a batch; no limit.")
    packing: str = option("tree", "Train shared tokens once (tree), or each sequence by itself (padded).")
    self_check_steps: int = option(0, "Compare tree-packed loss and gradient with the padded ones in so many steps.")
    max_tokens_per_microbatch: int = option(4096, "Tokens in one forward and backward pass, padding included.")
    max_batch_size: int = option(64, "Sequences that the rollout engine decodes together.")
    kv_cache_memory: int | None = option(None, "Bytes for the rollout engine's KV cache; chosen if not set.")
    num_logged_trajectories: int = option(4, "Searched trajectories kept per iteration for the report.")

    def __post_init__(self) -> None:
        _check_types(self)
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]  # transformers has none
        except Exception as error:  # Trainer's own checks raise whatever a bad value runs into
            raise ValueError(f"{error}. Set were: {_shown(changed_fields(self))}") from error
        self.remove_unused_columns = False
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("criterion", self.criterion, ("max", "min", "abs"))
        one_of("reset", self.reset, ("before", "after"))
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("reuse", self.reuse, ("none", "split", "all"))
        if not callable(self.step_splitter):
            one_of("step_splitter", self.step_splitter, METHODS)
        if not callable(self.search):
            one_of("search", self.search, ("mixed", "failed", "worst", "all"))
        if self.proposal is not None and not callable(self.proposal):
            one_of("proposal", self.proposal, PROPOSALS)
        one_of("packing", self.packing, ("tree", "padded"))
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"{name} must be at least {low} and finite, got {value}")
        if self.epsilon >= 1:
            raise ValueError(f"epsilon must be below 1, got {self.epsilon}")
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be above 0 seconds, got {self.reward_timeout}")
        if any(not math.isfinite(w) for w in self.reward_weights or ()):
            raise ValueError(f"reward_weights must be finite numbers, got {self.reward_weights}")
        check_options(self.num_samples, self.criterion, self.estimator, self.reset, self.reuse, self.delta)
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: advantages compare completions of one prompt")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps must be 1, got {self.gradient_accumulation_steps}: memory is bounded "
                "by max_tokens_per_microbatch, and a larger batch is a larger per_device_train_batch_size"
            )
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if self.steps_per_generation > 1 and filtered and not self.learns_from_pairs:
            raise ValueError("steps_per_generation above 1 needs unfiltered sampling (top_k=0, top_p=1, min_p=0)")
        if self.replay_size > 0 and filtered:
            raise ValueError("replay_size above 0 needs unfiltered sampling (top_k=0, top_p=1, min_p=0)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0 in training, got {self.temperature}")
        self._resolve_algorithm()
        self.sampling_params()  # these two check the rest
        self.splitter()

    def _resolve_algorithm(self) -> None:
        """Sets what depends on the loss, and refuses options that do not go together."""
        if self.beta is None:
            self.beta = PREFERENCE_BETA.get(self.loss_type, 0.0)
        if self.scale_rewards is None:
            self.scale_rewards = self.loss_type not in UNSCALED
        one_of("critic", self.critic, CRITICS)
        least_noise = self.critic == "group" and not self.learns_from_pairs and self.loss_type not in ("awr", "rloo")
        if self.baseline is None:
            self.baseline = "optimal" if least_noise else "mean"
        one_of("baseline", self.baseline, BASELINES)
        if self.learns_from_pairs and not self.beta > 0:
            raise ValueError(f"beta of {self.loss_type} must be above 0, got {self.beta}")
        if self.critic != "group" and (self.learns_from_pairs or self.loss_type == "rloo"):
            raise ValueError(
                f"critic={self.critic!r} gives an advantage to each token, and {self.loss_type} has none: set "
                "critic='group'"
            )
        if self.baseline == "optimal" and not least_noise:
            raise ValueError(
                "baseline='optimal' is of a group's rewards: it needs critic='group' and a loss other than awr, rloo, "
                f"{', '.join(PREFERENCE_LOSSES)}; got critic={self.critic!r}, loss_type={self.loss_type!r}"
            )
        if self.critic == "monte_carlo" and not self.use_gpo:
            raise ValueError("critic='monte_carlo' takes its values from the search: set use_gpo=True")
        if self.replay_size > 0 and (self.learns_from_pairs or not self.use_gpo):
            raise ValueError(
                "replay_size above 0 replays single rollouts from critical steps: it needs use_gpo=True "
                f"and a loss other than {', '.join(PREFERENCE_LOSSES)}"
            )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.awr_beta < math.inf:
            raise ValueError(f"awr_beta must be finite and above 0, got {self.awr_beta}")
        if self.soft_punish_cache > self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache must be at most max_completion_length={self.max_completion_length}, got "
                f"{self.soft_punish_cache}"
            )

    @property
    def learns_from_pairs(self) -> bool:
        """Whether the loss is a preference loss."""
        return self.loss_type in PREFERENCE_LOSSES

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the log-probabilities of a reference model."""
        return self.loss_type in ("dpo", "kto") if self.learns_from_pairs else self.beta > 0

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint, and checkpoints are shared: no secret may be in them.
        return {**self.__dict__, "hub_token": None}

    def splitter(self) -> StepSplitter:
        """How trajectories are split into steps."""
        return splitter_of(self)

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
    use_dora: bool = False
    merge_adapter: bool = False  # also write the whole model, the trained adapter merged into its weights
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if not self.rewards:
            raise ValueError("rewards must name one reward function at least, got none")
        if self.lora_r < 0:
            raise ValueError(f"lora_r must be at least 0 (0 trains the whole model), got {self.lora_r}")
        if self.lora_r == 0 and (self.use_dora or self.merge_adapter):
            raise ValueError("use_dora and merge_adapter are about an adapter: set lora_r above 0")
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


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
    if not all(isinstance(name, str) for name in values):
        raise ValueError(
            f"{path}: the names of fields must be text, got {[n for n in values if not isinstance(n, str)]}"
        )
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
    for name in config_fields.keys() & values.keys():
        values[name] = _number_of_text(values[name], typing.get_type_hints(GPOConfig)[name])
    spec = RunSpec(**{k: v for k, v in values.items() if k in spec_fields})
    return spec, GPOConfig(**{k: v for k, v in values.items() if k in config_fields})


def splitter_of(config: Any) -> StepSplitter:
    """The splitter that the options of a configuration describe, ours or that of the TRL door."""
    return StepSplitter(
        config.step_splitter,
        pattern=config.step_pattern,
        min_tokens=config.min_step_tokens,
        max_steps=config.max_steps_per_trajectory,
        min_steps=config.min_steps_per_trajectory,
    )


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")


def _check_types(values: Any) -> None:
    """Raises ValueError naming the first field of a dataclass whose value is not of the field's type, or is NaN."""
    hints = typing.get_type_hints(type(values))
    for known in dataclasses.fields(values):
        value = getattr(values, known.name)
        if value is not known.default and not _fits(value, hints[known.name]):
            hint = hints[known.name]
            right = str(hint).replace("typing.", "") if typing.get_args(hint) else getattr(hint, "__name__", hint)
            raise ValueError(f"{known.name} must be of the type {right}, got {value!r:.200}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{known.name} must be a number, got {value}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. A whole number is a float, too, and text may name an enum's member."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type) or isinstance(value, kind):
        return True
    return issubclass(kind, Enum) and isinstance(value, str)


def _number_of_text(value: Any, hint: Any) -> Any:
    """YAML reads 1e-4 (without a point) as text: where a number is wanted and no text, it becomes one."""
    wanted = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and float in wanted and str not in wanted:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _shown(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.200}" for name, value in fields.items())


def changed_fields(values: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their defaults, without secrets."""
    known = {f.name: f.default for f in dataclasses.fields(values) if f.init and f.name != "hub_token"}
    given = {name: getattr(values, name) for name, default in known.items() if getattr(values, name) is not default}
    return {name: value for name, value in given.items() if value != known[name]}

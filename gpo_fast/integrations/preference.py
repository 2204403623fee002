"""Procedure II of GPO (arXiv 2509.16456): preference data built at the critical step.

Sample trajectories, find each one's critical step m, sample continuations of its state s_m, and pair a better one
with a worse one: the two share the context s_m. The result is a data set for TRL's DPO, KTO, CPO (SimPO) and ORPO
trainers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from gpo_fast.critical import CriticalStep, CriticalStepFinder
from gpo_fast.data import (
    Example,
    check_dataset,
    columns_of,
    decode_completion,
    encode_prompt,
    is_conversation,
)
from gpo_fast.integrations.preference_text import Format, TextPair, exact_text
from gpo_fast.pairs import ranked_pairs
from gpo_fast.procedure import search_mixed, search_worst
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout.types import Completion, Request, SamplingParams
from gpo_fast.steps import SplitFunction, StepSplitter

logger = logging.getLogger(__name__)


@dataclass
class PreferenceReport:
    """What became of the samples. Counts are of continuations, unless the name says otherwise."""

    prompts: int = 0
    trajectories_searched: int = 0
    sampled: int = 0
    truncated: int = 0  # dropped: the trainers would append an end that the model did not sample
    inexact: int = 0  # dropped: their text does not tokenize back to the sampled tokens
    tied_states: int = 0  # states whose usable continuations all have one reward
    rows: int = 0
    num_search_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows from {self.prompts} prompts: {self.trajectories_searched} trajectories searched, "
            f"{self.sampled} continuations of critical states sampled, dropped {self.truncated} that did not end "
            f"with the end-of-sequence token and {self.inexact} whose text does not tokenize back to the same "
            f"tokens; {self.tied_states} states had no better and no worse continuation"
        )


@dataclass
class _State:
    """A critical state: its tokens, and the continuations that can be used, with their rewards."""

    context_ids: list[int]
    texts: list[tuple[TextPair, float]] = field(default_factory=list)


def build_preference_dataset(
    model: Any,
    prompts: Any,
    reward_funcs: Any,
    tokenizer: Any = None,
    format: Format = "dpo",
    *,
    num_generations: int = 8,
    num_samples: int = 4,
    num_resets: int = 8,
    max_pairs: int = 4,
    search: Literal["mixed", "all"] = "mixed",
    criterion: Literal["max", "abs", "min"] = "max",
    reset: Literal["before", "after"] = "before",
    step_splitter: StepSplitter | str | SplitFunction = "newline",
    max_completion_length: int = 256,
    sampling: SamplingParams | None = None,
    reward_weights: Sequence[float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """A `datasets.Dataset` of preferences at critical steps, which TRL's trainers take unchanged.

    Args:
        model: a transformers causal LM, a path or hub id of one, or a rollout backend with the attribute
            `tokenizer`.
        prompts: strings, conversations, or rows with a `prompt` of either kind; other columns go to the rewards.
        reward_funcs: as in `GPOTrainer`. They see whole completions, from the end of the prompt on.
        tokenizer: the model's; loaded from its path, or taken from the backend, if None.
        format: "dpo", "simpo" and "orpo" give the columns prompt, chosen, rejected; "kto" gives prompt,
            completion, label.
        num_generations: trajectories sampled for each prompt.
        num_samples: Monte Carlo continuations for each step in the search.
        num_resets: continuations sampled from each critical state, at least 2.
        max_pairs: at most so many pairs, or KTO examples of each label, from one state.
        search: "mixed" searches the worst trajectory of each prompt whose outcomes differ, "all" the worst one of
            every prompt.
        criterion, reset, step_splitter: as in `CriticalStepFinder` and `StepSplitter`.
        sampling: how tokens are drawn; `max_tokens` is replaced by `max_completion_length`.
        progress: called with (prompts done, all prompts).

    Returns:
        Plain text: a conversation is rendered with the chat template, and `prompt` holds it together with the
        prefix that the critical step keeps. Completions come without the end-of-sequence token, which all four
        trainers append. A continuation is dropped if it did not end by itself, or if its text does not tokenize
        back to exactly the tokens that were sampled; `dataset.info.description` says how many. Rows are shuffled,
        because KTO estimates its KL term from neighbouring rows, which must not share a context.

    Raises:
        ValueError: unusable prompts or options, or no pair could be built.
    """
    import datasets

    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    for name, value, least in (
        ("num_generations", num_generations, 2),
        ("num_samples", num_samples, 1),
        ("num_resets", num_resets, 2),
        ("max_pairs", max_pairs, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if search not in ("mixed", "all"):
        raise ValueError(f"search must be 'mixed' or 'all', got {search!r}")
    engine = _engine(model, tokenizer)
    builder = _Builder(
        engine,
        RewardFunctions(reward_funcs, reward_weights),
        step_splitter if isinstance(step_splitter, StepSplitter) else StepSplitter(step_splitter),
        sampling or SamplingParams(),
        max_completion_length,
        format,
        num_generations=num_generations,
        num_samples=num_samples,
        num_resets=num_resets,
        search=search,
        criterion=criterion,
        reset=reset,
    )
    rows = builder.rows(_examples(prompts), max_pairs, seed, progress)
    if not rows:
        raise ValueError(
            f"no preference pair could be built: {builder.report}. Sample more (num_generations, num_resets), allow "
            "longer completions, or use search='all'"
        )
    logger.log(logging.WARNING if builder.report.inexact else logging.INFO, "%s", builder.report)
    order = np.random.default_rng([seed, 0x6B746F]).permutation(len(rows))
    dataset = datasets.Dataset.from_list([rows[i] for i in order])
    dataset.info.description = str(builder.report)
    return dataset


class _Builder:
    """Samples, searches and pairs. One instance builds one data set."""

    def __init__(
        self,
        engine: Any,
        rewards: RewardFunctions,
        splitter: StepSplitter,
        sampling: SamplingParams,
        max_completion_length: int,
        format: Format,
        *,
        num_generations: int,
        num_samples: int,
        num_resets: int,
        search: str,
        criterion: Any,
        reset: Any,
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self.splitter = splitter
        self.sampling = sampling
        self.max_completion_length = max_completion_length
        self.format = format
        self.num_generations = num_generations
        self.num_samples = num_samples
        self.num_resets = num_resets
        self.search = search
        self.criterion = criterion
        self.reset = reset
        self.report = PreferenceReport()

    def rows(
        self, examples: list[Example], max_pairs: int, seed: int, progress: Callable[[int, int], None] | None
    ) -> list[dict[str, Any]]:
        """The data set's rows, state by state."""
        seeds = np.random.SeedSequence([seed, 0x70726566]).generate_state(3).tolist()
        self.report.prompts = len(examples)
        trajectories, rewards, owner = self._trajectories(examples, seeds[0])
        rows: list[dict[str, Any]] = []
        chosen = self._choose(rewards)
        self.report.trajectories_searched = len(chosen)
        picked = [trajectories[i] for i in chosen]
        found = self._find(picked, [examples[owner[i]] for i in chosen], rewards, chosen, seeds[1])
        states = self._states(picked, found, [examples[owner[i]] for i in chosen], seeds[2])
        for done, state in enumerate(states, start=1):
            rows += self._preferences(state, max_pairs)
            if progress is not None:
                progress(done, len(states))
        self.report.rows = len(rows)
        return rows

    def _trajectories(self, examples: list[Example], seed: int) -> tuple[list[Completion], np.ndarray, list[int]]:
        """Completions of all prompts, their rewards (prompts, num_generations), and each one's prompt."""
        requests = []
        for i, example in enumerate(examples):
            ids = encode_prompt(example["prompt"], self.engine.tokenizer, self._max_length())
            requests.append(Request(ids, self.num_generations, self._params(len(ids)), seed=seed + i, keep=True))
        drawn = self.engine.generate(requests)
        owner = [c.request_index for c in drawn]
        scores = self._score(drawn, [examples[i] for i in owner])
        return drawn, scores.reshape(len(examples), self.num_generations), owner

    def _choose(self, rewards: np.ndarray) -> list[int]:
        """The trajectories to search, as indices into the flat list: the worst one of a prompt."""
        return search_mixed(rewards) if self.search == "mixed" else search_worst(rewards)

    def _find(
        self,
        trajectories: list[Completion],
        examples: list[Example],
        rewards: np.ndarray,
        chosen: list[int],
        seed: int,
    ) -> list[CriticalStep]:
        if not trajectories:
            return []

        def outcome(completions: Sequence[Completion]) -> list[float]:
            scores = self._score(completions, [examples[c.request_index] for c in completions])
            return [float(score) for score in scores]

        finder = CriticalStepFinder(
            self.engine,
            outcome,
            self.splitter,
            n_samples=self.num_samples,
            criterion=self.criterion,
            reset=self.reset,
            sampling=self._params(max(len(t.prompt_token_ids) for t in trajectories)),
            seed=seed,
        )
        groups = [rewards[i // self.num_generations].tolist() for i in chosen]
        found = finder.find(trajectories, rewards=[float(rewards.flat[i]) for i in chosen], root_values=groups)
        self.report.num_search_tokens = sum(f.num_tokens for f in found)
        return found

    def _states(
        self, trajectories: list[Completion], found: list[CriticalStep], examples: list[Example], seed: int
    ) -> list[_State]:
        """The critical states with the continuations that can be handed to a trainer."""
        requests = []
        for n, (trajectory, critical) in enumerate(zip(trajectories, found)):
            params, cut = self._params(len(trajectory.prompt_token_ids)), critical.token_position
            requests.append(CriticalStepFinder.continuation(trajectory, cut, self.num_resets, params, seed=seed + n))
        states = [_State(list(r.token_ids)) for r in requests]
        drawn = self.engine.generate(requests) if requests else []
        self.report.sampled = len(drawn)
        whole = [CriticalStepFinder.whole(trajectories[c.request_index], c) for c in drawn]
        scores = self._score(whole, [examples[c.request_index] for c in drawn])
        for completion, reward in zip(drawn, scores.tolist()):
            state = states[completion.request_index]
            text = self._usable(state, completion)
            if text is not None:
                state.texts.append((text, reward))
        return states

    def _usable(self, state: _State, completion: Completion) -> TextPair | None:
        """The completion's text, or None, counted in the report, if no trainer could learn from it exactly."""
        tokenizer = self.engine.tokenizer
        if completion.finish_reason != "stop" or completion.token_ids[-1:] != [tokenizer.eos_token_id]:
            self.report.truncated += 1
            return None
        text = exact_text(state.context_ids, completion.token_ids, tokenizer, self.format)
        self.report.inexact += text is None
        return text

    def _preferences(self, state: _State, max_pairs: int) -> list[dict[str, Any]]:
        """Rows of one state."""
        texts = [text for text, _ in state.texts]
        ranked = ranked_pairs([reward for _, reward in state.texts], max_pairs)
        pairs = [(texts[better], texts[worse]) for better, worse in ranked]
        self.report.tied_states += not pairs
        if self.format != "kto":
            return [{"prompt": b.context, "chosen": b.completion, "rejected": w.completion} for b, w in pairs]
        return [
            {"prompt": text.context, "completion": text.completion, "label": label}
            for pair in pairs
            for text, label in zip(pair, (True, False))
        ]

    def _score(self, completions: Sequence[Completion], examples: Sequence[Example]) -> np.ndarray:
        """Rewards of whole completions, float64 (n,)."""
        if not completions:
            return np.zeros(0)
        prompts = [e["prompt"] for e in examples]
        texts = [decode_completion(c.token_ids, self.engine.tokenizer) for c in completions]
        shown: list[Any] = [
            [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
            for text, prompt in zip(texts, prompts)
        ]
        return self.rewards(prompts, shown, [c.token_ids for c in completions], columns_of(examples)).total

    def _params(self, prompt_length: int) -> SamplingParams:
        room = min(self.max_completion_length, self._max_length() - prompt_length)
        return replace(self.sampling, max_tokens=max(1, room))

    def _max_length(self) -> int:
        return int(getattr(self.engine, "max_length", 1 << 30))


def _engine(model: Any, tokenizer: Any) -> Any:
    """A rollout backend for a model, a path, or a backend that is one already."""
    if hasattr(model, "update_weights"):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"the backend {type(model).__name__} has no tokenizer: set its attribute 'tokenizer'")
        return model
    from gpo_fast.rollout import RolloutEngine

    if isinstance(model, str):
        import transformers

        tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if tokenizer is None:
        raise ValueError("build_preference_dataset needs the model's tokenizer: pass tokenizer=")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no completion could ever end: set tokenizer.eos_token")
    return RolloutEngine(model, tokenizer)


def _examples(prompts: Any) -> list[Example]:
    """Rows with a `prompt` of strings, conversations or rows."""
    rows = [p if isinstance(p, dict) else {"prompt": p} for p in prompts]
    check_dataset(rows, "prompts")
    return rows

"""GPO inside TRL: `GPOTrainer` and `GPOConfig` in place of `GRPOTrainer` and `GRPOConfig` (TRL 1.16).

What changes underneath: completions are sampled by `RolloutEngine`; in each group with mixed outcomes, some rows are
rollouts from the critical step of the group's worst trajectory; log-probabilities come from our fused head. What does
not: the loss, rewards, data, callbacks, adapters, logging, and the number of rows.

A row from a critical step is the whole completion, so rewards see all of it; the prefix that was kept is masked out
of the loss, because only the tokens after it were sampled from the policy as an action.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from trl import GRPOConfig, GRPOTrainer

import gpo_fast.config
from gpo_fast.baseline import gradient_size, optimal_baseline
from gpo_fast.config import BASELINES, one_of, option, splitter_of
from gpo_fast.critical import CriticalStep, CriticalStepFinder
from gpo_fast.critical.finder import OutcomeReward, check_options
from gpo_fast.data import is_conversation
from gpo_fast.forest import TokenForest
from gpo_fast.integrations.trl_head import install_fused_head
from gpo_fast.integrations.trl_packing import tree_logprobs
from gpo_fast.integrations.trl_rewards import LocalRewards
from gpo_fast.model_card import PAPER
from gpo_fast.procedure import choose_searches
from gpo_fast.rollout import RolloutEngine
from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams
from gpo_fast.steps import METHODS, StepSplitter
from gpo_fast.tree_attention import tree_attention_of

logger = logging.getLogger(__name__)
AVERAGED_LOSSES = ("grpo", "sapo")  # whose gradient of a completion is a mean over its tokens


def _ours(name: str) -> Any:
    """The option of gpo_fast.GPOConfig: its default and its help."""
    own = gpo_fast.config.GPOConfig.__dataclass_fields__[name]
    return option(own.default, own.metadata["help"])


@dataclass
class GPOConfig(GRPOConfig):
    """TRL's GRPOConfig and what GPO needs. Every field of GRPOConfig keeps its meaning and default.

    What `gpo_fast.GPOConfig` has too has the same name here, but for its `delta`, a name that TRL uses for something
    else: it is `racing_delta`.
    """

    use_gpo: bool = option(True, "Search critical steps and learn from resets; False trains plain GRPO.")
    reset_share: float = option(0.5, "Share of a searched group's rows that are rollouts from the critical step.")
    num_samples: int = _ours("num_samples")
    criterion: str = _ours("criterion")
    estimator: str = _ours("estimator")
    racing_delta: float = _ours("delta")
    proposal: Any = _ours("proposal")
    reset: str = _ours("reset")
    search: Any = option(
        "mixed",
        "Searched: the worst trajectory of each group with mixed outcomes (mixed), of each that failed as a whole "
        "(failed) or of every group (worst), or a function that takes the rewards (groups, n) and gives places, at "
        "most one in each group.",
    )
    max_searches: int | None = option(None, "At most so many trajectories are searched per batch and process.")
    search_budget: float | None = _ours("search_budget")
    reuse: str = option(
        "none", "Rows that the search's samples of the critical step take in place of new rollouts: none, split or all."
    )
    baseline: str = option(
        "mean",
        "What a group's rewards are compared with: their mean, as TRL does, or the baseline that leaves the gradient "
        "the least noise (optimal).",
    )
    step_splitter: Any = _ours("step_splitter")
    step_pattern: str | None = _ours("step_pattern")
    min_step_tokens: int = _ours("min_step_tokens")
    max_steps_per_trajectory: int = _ours("max_steps_per_trajectory")
    min_steps_per_trajectory: int = _ours("min_steps_per_trajectory")
    packing: str = option("padded", "Train each row by itself (padded), or tokens that rows share once (tree).")
    use_rollout_engine: bool = option(True, "Sample with gpo-fast's engine; must stay True with use_gpo.")
    use_fused_head: bool = option(True, "Compute log-probabilities with gpo-fast's kernels.")
    max_batch_size: int = _ours("max_batch_size")
    kv_cache_memory: int | None = _ours("kv_cache_memory")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # TRL has none
        one_of("packing", self.packing, ("tree", "padded"))
        if self.packing == "tree" and not (self.use_rollout_engine and self.use_fused_head):
            raise ValueError(
                "packing='tree' needs use_rollout_engine=True, which knows the rows' trees, and use_fused_head=True"
            )
        one_of("baseline", self.baseline, BASELINES)
        if not callable(self.step_splitter):
            one_of("step_splitter", self.step_splitter, METHODS)
        self.splitter()  # checks the rest
        if self.baseline == "optimal":
            if not self.use_rollout_engine:
                raise ValueError("baseline='optimal' needs use_rollout_engine=True, which records what it samples")
            self._check_groups("baseline='optimal'")
        if not self.use_gpo:
            return
        self._check_groups("use_gpo")
        check_options(self.num_samples, self.criterion, self.estimator, self.reset, self.reuse, self.racing_delta)
        if not callable(self.search):
            one_of("search", self.search, ("mixed", "failed", "worst"))
        if self.num_resets < 2:
            raise ValueError(
                f"reset_share={self.reset_share} of num_generations={self.num_generations} rows is {self.num_resets}, "
                "but rollouts from a critical step are compared with one another: at least 2 are needed"
            )
        if not 0 < self.reset_share <= 1:
            raise ValueError(f"reset_share must be above 0 and at most 1, got {self.reset_share}")
        if not self.use_rollout_engine:
            raise ValueError("use_gpo needs the rollout engine: set use_rollout_engine=True, or use_gpo=False")

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint, and checkpoints are shared: no secret may be in them.
        return {**self.__dict__, "hub_token": None}

    def _check_groups(self, who: str) -> None:
        """That the groups of a batch lie on this process and have one reward for each row."""
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"{who} needs multi_objective_aggregation='sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}"
            )
        rows = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if rows % (self.num_generations or 1):
            raise ValueError(
                f"a process samples per_device_train_batch_size * steps_per_generation = {rows} completions at once, "
                f"which is not a multiple of num_generations={self.num_generations}: a group would lie on two "
                f"processes, and {who} needs it on one"
            )

    def splitter(self) -> StepSplitter:
        """How trajectories are split into steps."""
        return splitter_of(self)

    @property
    def num_resets(self) -> int:
        """Rows of a searched group that are rollouts from its critical step."""
        return round(self.reset_share * (self.num_generations or 0))


class _Group(NamedTuple):
    """A group of the batch's rows, and what those of them from the prompt are compared with."""

    first: int  # index of its first row
    resets: int  # its last rows are rollouts from the critical step
    base_rewards: list[float]  # of all completions of the prompt, also of those whose rows were given away
    base_logprobs: list[list[float]]  # of their tokens, as they were sampled


class GPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with GPO (arXiv 2509.16456, procedure I). Takes the same arguments.

    Args:
        rollout_backend: samples in place of a `RolloutEngine` on the trained model; its `update_weights` is called
            whenever the weights have changed.

    Raises:
        ValueError: options of TRL with which critical steps cannot be searched (tools, images, vLLM, a rollout
            function of your own, sharded weights), with what to set instead.
    """

    args: GPOConfig
    model: Any
    processing_class: Any
    num_generations: Any
    max_completion_length: Any
    rollout_func: Any
    _logs: Any

    def __init__(self, *arguments: Any, rollout_backend: RolloutBackend | None = None, **options: Any) -> None:
        own_rollouts = options.get("rollout_func") is not None
        super().__init__(*arguments, **options)
        args = self.args
        if not isinstance(args, GPOConfig):
            raise TypeError(f"gpo-fast's GPOTrainer needs gpo-fast's GPOConfig, got {type(args).__name__}")
        if args.use_gpo:  # what TRL's model card says
            citation = PAPER["citation"] + "\n\n" + GRPOTrainer._paper["citation"]
            self._name, self._tag_names = "GPO", [*GRPOTrainer._tag_names, "gpo"]
            self._paper = {**PAPER, "citation": citation}
        no_head = self._install_head() if args.use_fused_head else None
        reason = _why_no_engine(self, own_rollouts)
        if args.use_gpo and reason is not None:
            raise ValueError(f"critical steps cannot be searched {reason}: change that, or set use_gpo=False")
        if args.baseline == "optimal" and reason is not None:
            raise ValueError(
                f"baseline='optimal' needs what gpo-fast's engine records, and it cannot sample {reason}: change that, "
                "or set baseline='mean'"
            )
        if args.packing == "tree":
            self._check_packing(no_head, reason)
        self._engine: Any = None
        self._forest = TokenForest()  # of the rows sampled last
        self._nodes: list[int] = []  # of each of these rows
        self._rows: list[Completion] = []  # these rows
        self._packed_nodes: list[int] | None = None  # of the rows whose log-probabilities TRL computes; None: padded
        self._attention = ExitStack()
        self._groups: list[_Group] = []
        self._inputs: list[dict[str, Any]] = []
        self._rewards_per_function = torch.zeros(0)
        self._sampled_at = -1
        self._draws = 0
        if reason is not None:
            if args.use_rollout_engine:
                logger.warning("TRL samples the completions itself %s", reason)
        elif args.use_rollout_engine:
            self._engine = rollout_backend or RolloutEngine(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                kv_cache_memory=args.kv_cache_memory,
                max_batch_size=args.max_batch_size,
            )
            self.rollout_func = _sample_rows

    # -- what TRL calls -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, then the advantages of searched groups: a row is compared with rows of its own state."""
        self._inputs, self._groups = inputs, []
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and (self.args.use_gpo or self.args.baseline == "optimal"):
            self._set_advantages(output)
        if self._packed_nodes is not None:
            output["gpo_nodes"] = torch.tensor(self._packed_nodes)  # shuffled and split with the rows
            self._packed_nodes = None
        return output

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        # Tree attention stays until the backward pass has run: with gradient checkpointing it runs layers again.
        with ExitStack() as self._attention:
            loss: torch.Tensor = super().training_step(*arguments, **options)  # type: ignore[no-untyped-call]
            return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        nodes = inputs.get("gpo_nodes")
        self._packed_nodes = None if nodes is None else nodes.tolist()
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        self._packed_nodes = None
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        nodes = self._packed_nodes
        if nodes is None:
            padded: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            padded = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options
            )
            return padded
        size = batch_size or len(nodes)
        parts = []
        with ExitStack() as no_backward:
            attention = self._attention if torch.is_grad_enabled() else no_backward
            attention.enter_context(tree_attention_of(self.accelerator.unwrap_model(model)))
            for first in range(0, len(nodes), size):
                some = nodes[first : first + size]
                with self.accelerator.autocast():
                    parts.append(tree_logprobs(model, self._forest, some, self._kept(some), logits_to_keep))
        logprobs, entropies = zip(*parts)
        return torch.cat(logprobs), torch.cat(entropies) if options.get("compute_entropy") else None, None

    def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
        self._rewards_per_function = super()._calculate_rewards(*arguments)
        return self._rewards_per_function

    def sample_rows(self, prompts: list[Any]) -> dict[str, Any]:
        """A batch's completions for TRL: one for each of `prompts`, which come repeated within their groups."""
        if self._sampled_at != self.state.global_step:
            self._engine.update_weights()
            self._sampled_at = self.state.global_step
        prompt_ids = [list(ids) for ids in self._tokenize_prompts(prompts)[0]]
        self._draws += 1
        seeds = np.random.SeedSequence(
            [self.args.seed, self.accelerator.process_index, self.state.global_step, self._draws]
        ).generate_state(3)
        searched = self.model.training and self.args.use_gpo
        rows = self._engine.generate(
            [
                Request(ids, 1, self._sampling(ids), seed=int(seeds[0]) + i, keep=searched)
                for i, ids in enumerate(prompt_ids)
            ]
        )
        self._plant(rows)
        if searched:
            self._add_resets(rows, seeds)
        self._rows = rows
        if self.model.training and self.args.packing == "tree":
            self._packed_nodes = self._nodes
        output: dict[str, Any] = {
            "prompt_ids": [r.prompt_token_ids for r in rows],
            "completion_ids": [r.token_ids for r in rows],
            "logprobs": [r.sampling_logprobs for r in rows],
        }
        if searched:
            kept = self._kept(self._nodes)
            output["env_mask"] = [[0] * k + [1] * (len(r.token_ids) - k) for r, k in zip(rows, kept)]
        return output

    # -- GPO ------------------------------------------------------------------------------------------------

    def _plant(self, rows: list[Completion]) -> None:
        """The rows as a forest."""
        self._forest, self._nodes = TokenForest(), []
        roots: dict[tuple[int, ...], int] = {}
        for row in rows:
            prompt = tuple(row.prompt_token_ids)
            if prompt not in roots:
                roots[prompt] = self._forest.add_prompt(prompt)
            self._nodes.append(self._forest.branch(roots[prompt], len(prompt), row.token_ids))

    def _kept(self, nodes: Sequence[int]) -> list[int]:
        """For each node the tokens of its completion that are the prefix that was kept, not sampled for it."""
        kept = []
        for node in nodes:
            root = node
            while self._forest.nodes[root].parent != -1:
                root = self._forest.nodes[root].parent
            kept.append(self._forest.nodes[node].start - self._forest.nodes[root].end)
        return kept

    def _add_resets(self, rows: list[Completion], seeds: np.ndarray) -> None:
        """Replaces the last rows of each searched group by rollouts from its critical step.

        Which rows go is fixed by their place, not by their reward, so the rows that stay are a fair sample.
        """
        width, resets = self.num_generations, self.args.num_resets
        scores = self._score(rows, range(len(rows))).reshape(-1, width)
        logprobs = [row.sampling_logprobs for row in rows]
        chosen = choose_searches(scores, rows, self.args, self._finder(lambda found: [], 0))
        if len({i // width for i in chosen}) < len(chosen):
            raise ValueError(f"search chose {chosen}: under TRL at most one trajectory of a group of {width}")
        trajectories = [rows[i] for i in chosen]
        drawn = self._from_critical_steps(rows, chosen, scores, seeds) if chosen else []
        for i, trajectory, (cut, continuations) in zip(chosen, trajectories, drawn):
            group, node = i // width, self._nodes[i]
            end = (group + 1) * width
            for row, continuation in zip(range(end - resets, end), continuations):
                rows[row] = CriticalStepFinder.whole(trajectory, continuation)
                at = len(trajectory.prompt_token_ids) + cut
                self._nodes[row] = self._forest.branch(node, at, continuation.token_ids)
            self._groups.append(_Group(group * width, resets, scores[group].tolist(), logprobs[group * width : end]))
        metrics = self._metrics["train"]
        metrics["gpo/searched_groups"].append(len(chosen) / max(1, len(scores)))

    def _from_critical_steps(
        self, rows: list[Completion], chosen: list[int], scores: np.ndarray, seeds: np.ndarray
    ) -> list[tuple[int, list[Completion]]]:
        """For each chosen row how many tokens are kept, and the continuations of its critical step."""
        trajectories = [rows[i] for i in chosen]
        longest = max((t.prompt_token_ids for t in trajectories), key=len)
        outcome = lambda found: self._score(found, [chosen[c.request_index] for c in found]).tolist()  # noqa: E731
        finder = self._finder(outcome, int(seeds[1]), longest)
        finder.learn(rows, scores.ravel().tolist())
        groups = [scores[i // self.num_generations].tolist() for i in chosen]
        found = finder.find(trajectories, rewards=[float(scores.flat[i]) for i in chosen], root_values=groups)
        self._log_search(found)
        drawn = [(f.token_position, f.reusable[: self.args.num_resets]) for f in found]
        requests, owners = [], []
        for n, (trajectory, (cut, reused)) in enumerate(zip(trajectories, drawn)):
            missing = self.args.num_resets - len(reused)
            if missing:
                sampling, seed = self._sampling(trajectory.prompt_token_ids), int(seeds[2]) + n
                requests.append(CriticalStepFinder.continuation(trajectory, cut, missing, sampling, seed=seed))
                owners.append(n)
        for completion in self._engine.generate(requests):
            drawn[owners[completion.request_index]][1].append(completion)
        return drawn

    def _finder(self, outcome: OutcomeReward, seed: int, prompt_ids: Sequence[int] = ()) -> CriticalStepFinder:
        args = self.args
        return CriticalStepFinder(
            self._engine,
            outcome,
            args.splitter(),
            n_samples=args.num_samples,
            criterion=args.criterion,  # type: ignore[arg-type]
            estimator=args.estimator,  # type: ignore[arg-type]
            reset=args.reset,  # type: ignore[arg-type]
            reuse=args.reuse,  # type: ignore[arg-type]
            sampling=self._sampling(prompt_ids),
            delta=args.racing_delta,
            proposal=args.proposal,
            seed=seed,
        )

    def _log_search(self, found: Sequence[CriticalStep]) -> None:
        metrics = self._metrics["train"]
        advantages = [f.advantages[f.index] for f in found]
        metrics["gpo/critical_advantage"].append(float(np.mean([a for a in advantages if np.isfinite(a)] or [0.0])))
        metrics["gpo/critical_position"].append(float(np.mean([f.index / len(f.steps) for f in found])))
        if np.isfinite(found[0].confidence):  # else the estimator takes no samples
            metrics["gpo/critical_confidence"].append(float(np.mean([f.confidence for f in found])))
        metrics["gpo/search_tokens"].append(float(sum(f.num_tokens for f in found)))
        metrics["gpo/search_tokens_saved"].append(float(sum(f.tokens_saved for f in found)))

    def _set_advantages(self, output: dict[str, Any]) -> None:
        """Advantages of searched groups: base rows against all completions of the prompt, resets among themselves.

        With the optimal baseline those of the other groups as well.
        """
        advantages, width = output["advantages"], self.num_generations
        everyone, local = self._weighted_rewards(len(advantages))
        logprobs = [row.sampling_logprobs[cut:] for row, cut in zip(self._rows, self._kept(self._nodes))]
        groups = {group.first: group for group in self._groups}
        if self.args.baseline == "optimal":
            for first in range(0, len(advantages), width):
                own = slice(first, first + width)
                groups.setdefault(first, _Group(first, 0, local[own].tolist(), logprobs[own]))
        for group in groups.values():
            end = group.first + width
            cut = end - group.resets
            base, resets = slice(group.first, cut), slice(cut, end)
            states = [(base, group.base_rewards, group.base_logprobs)]
            if group.resets:
                states.append((resets, local[resets].tolist(), logprobs[resets]))
            for rows, rewards, of_rows in states:
                compared = local.new_tensor(rewards)
                centred = local[rows] - self._baseline(compared, of_rows)
                if self.scale_rewards != "none":
                    spread = everyone if self.scale_rewards == "batch" else compared
                    centred = centred / (spread[~spread.isnan()].std() + 1e-4)
                advantages[rows] = centred.nan_to_num()
        logged = self.accelerator.gather(advantages).tolist()
        for _ in logged:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(logged)

    def _baseline(self, rewards: torch.Tensor, logprobs: Sequence[Sequence[float]]) -> torch.Tensor:
        """What rewards (n,) of one state are compared with, given what was sampled there; NaN rewards do not count."""
        known = ~rewards.isnan()
        if self.args.baseline == "mean" or not known.any():
            return rewards.nanmean()
        averaged = self.loss_type in AVERAGED_LOSSES
        sizes = np.asarray([gradient_size(of_row, averaged=averaged) for of_row in logprobs])
        b = optimal_baseline(rewards[known].cpu().double().numpy()[None], sizes[known.cpu().numpy()][None])
        return rewards.new_tensor(b.item())

    def _weighted_rewards(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of all processes' rows, and of this one's; NaN where no function applies, as in TRL."""
        scores = self._rewards_per_function
        everyone = (scores * self.reward_weights.to(scores.device)).nansum(dim=1)
        everyone[scores.isnan().all(dim=1)] = torch.nan
        return everyone, everyone[self.accelerator.process_index * rows :][:rows]

    def _score(self, completions: Sequence[Completion], rows: Sequence[int]) -> np.ndarray:
        """Rewards of whole completions, float64 (n,); `rows[i]` is the batch row whose columns belong to i.

        On this process alone: the number of completions in a search differs between processes.
        """
        inputs = [self._inputs[i] for i in rows]
        texts = self.processing_class.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        shown = [
            [{"role": "assistant", "content": text}] if is_conversation(row["prompt"]) else text
            for text, row in zip(texts, inputs)
        ]
        return LocalRewards(self).score(inputs, shown, [c.token_ids for c in completions])

    # -- parts ----------------------------------------------------------------------------------------------

    def _sampling(self, prompt_ids: Sequence[int]) -> SamplingParams:
        room = getattr(self._engine, "max_length", 1 << 30) - len(prompt_ids)
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            max_tokens=max(1, min(self.max_completion_length, room)),
            stop_token_ids=tuple(self.eos_token_ids),
        )

    def _check_packing(self, no_head: str | None, no_engine: str | None) -> None:
        """Raises ValueError where rows cannot be packed as trees."""
        for condition, reason in (
            (no_head is not None, f"the fused head, but {no_head}"),
            (no_engine is not None, f"the rollout engine, which cannot sample {no_engine}"),
            (self.aux_loss_enabled, "a model without a router loss"),
        ):
            if condition:
                raise ValueError(f"packing='tree' needs {reason}: set packing='padded'")

    def _install_head(self) -> str | None:
        """Why TRL's own head stays, or None."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("TRL's own log-probabilities are used, because the weights are sharded")
            return "the weights are sharded"
        in_loss = self.args.entropy_coef != 0 or self.args.use_adaptive_entropy
        reason = install_fused_head(model, self.temperature, entropy=True, entropy_needs_grad=in_loss)
        if self.ref_model is None:
            return reason
        reference = self.accelerator.unwrap_model(self.ref_model)
        other = install_fused_head(reference, self.temperature, entropy=False, entropy_needs_grad=False)
        return reason or other


def _sample_rows(prompts: list[Any], trainer: GPOTrainer) -> dict[str, Any]:
    """TRL's rollout function."""
    return trainer.sample_rows(prompts)


def _why_no_engine(trainer: Any, own_rollouts: bool) -> str | None:
    """Why our engine cannot sample for this trainer, as the end of a sentence, or None."""
    args = trainer.args
    for condition, reason in (
        (own_rollouts, "with a rollout_func of your own"),
        (args.use_vllm, "with use_vllm=True"),
        (args.use_transformers_continuous_batching, "with use_transformers_continuous_batching=True"),
        (bool(trainer.tools) or trainer.environment_factories is not None, "with tools or environments"),
        (trainer._is_vlm, "on a model that takes images"),
        (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, "on sharded weights (FSDP, DeepSpeed)"),
        (args.repetition_penalty != 1.0, f"with repetition_penalty={args.repetition_penalty}"),
        (bool(args.generation_kwargs), f"with generation_kwargs={args.generation_kwargs}"),
    ):
        if condition:
            return reason
    return None

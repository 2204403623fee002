"""GPOTrainer: Procedure I of GPO (arXiv 2509.16456) on Hugging Face's Trainer.

A training step takes a batch of prompts, collects experience (`procedure.GuidedSampler`) and makes one update of
the base algorithm: a policy loss, or, with iterated Procedure II, a preference loss on pairs. Trainer brings
optimiser, schedule, logging, checkpoints and callbacks.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

import gpo_fast
from gpo_fast.config import GPOConfig, changed_fields
from gpo_fast.critic import ValueHead, explained_variance, scale_advantages, set_advantages
from gpo_fast.data import check_dataset
from gpo_fast.experience import Experience, TrainingRow, inseparable
from gpo_fast.forest import TokenForest
from gpo_fast.losses import LossOutput
from gpo_fast.losses.linear_logprob import HeadInputs
from gpo_fast.losses.shared_rows import token_logprobs
from gpo_fast.model_card import model_card
from gpo_fast.objective import Totals, policy_objective, preference_objective
from gpo_fast.procedure import GuidedSampler
from gpo_fast.ranks import Ranks, merge_pending
from gpo_fast.replay import ReplayBuffer, plant
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout import RolloutEngine
from gpo_fast.run_files import COMPLETE_MARK, RunFiles, last_checkpoint, mark_complete
from gpo_fast.self_check import compare_gradients, gradient_tolerance
from gpo_fast.sharding import anchor, forward_pass, idle_batch, is_sharded, refresh_copy, whole_copy
from gpo_fast.training_batch import TrainingBatch, padded_batches, tree_batches

VALUE_HEAD_FILE = "value_head.safetensors"
PAIR_METRICS = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")  # means over pairs, all others over tokens
# Rows on which the divergence from the reference is measured when it is not part of the loss: one in so many, at most.
KL_SPACING, KL_ROWS = 16, 8


class RepeatSampler(Sampler[int]):
    """A shuffled order of the data in which each batch of `batch_size` comes `repeats` times in a row."""

    def __init__(self, length: int, batch_size: int, repeats: int, seed: int) -> None:
        self.length, self.batch_size, self.repeats, self.seed, self.epoch = (
            length,
            batch_size,
            repeats,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for start in range(0, self.length, self.batch_size):
            for _ in range(self.repeats):
                yield from order[start : start + self.batch_size]

    def __len__(self) -> int:
        return self.length * self.repeats


class GPOTrainer(Trainer):
    """Trains a causal language model with GPO on top of a policy-gradient or a preference algorithm.

    Args:
        model: a transformers causal LM or a path or hub id of one.
        reward_funcs: one or several functions with TRL's signature
            `(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async.
        args: a `GPOConfig`.
        train_dataset, eval_dataset: rows with a `prompt` (string or messages); other columns go to the rewards.
        processing_class: the tokenizer; loaded from the model's path if None.
        peft_config: trains an adapter of PEFT instead of the whole model.
        run_description: what the report's header shows (`title`, `algorithm`, `notes`, ...).
        on_phase: called with the name of each phase as it begins.

    Raises:
        ValueError, TypeError: unusable data set, model, tokenizer or configuration, naming what would be right.
        FileExistsError: `args.output_dir` holds something that is not a run.
    """

    args: GPOConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        run_description: dict[str, Any] | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        args = args or GPOConfig(output_dir="gpo-run")
        if train_dataset is None:
            raise ValueError("GPOTrainer needs a train_dataset with a 'prompt' column")
        check_dataset(train_dataset)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        self.run_files = RunFiles(args.output_dir or "gpo-run")
        if isinstance(model, str):
            path = model
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
            processing_class = processing_class or transformers.AutoTokenizer.from_pretrained(path)
        if processing_class is None:
            raise ValueError("GPOTrainer needs processing_class, the model's tokenizer")
        _check_tokenizer(processing_class)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._is_peft = hasattr(model, "disable_adapter")
        _refuse_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda examples: examples,  # type: ignore[arg-type,return-value]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        self._refuse_sharding()
        self.ranks = Ranks(args.process_index, args.world_size, args.device)
        # The engine samples from the trained parameters themselves, unless these are to be in shards.
        self._copy = whole_copy(self.model, args.device) if self.is_fsdp_enabled else None
        self._reference: Any = None
        if args.uses_reference and not self._is_peft:
            start = self.model if self._copy is None else self._copy
            self._reference = copy.deepcopy(start).to(args.device).eval().requires_grad_(False)
        self.engine = RolloutEngine(
            self.model if self._copy is None else self._copy,
            processing_class,
            kv_cache_memory=args.kv_cache_memory,
            max_batch_size=args.max_batch_size,
            seed=args.seed,
        )
        self.rewards = RewardFunctions(reward_funcs, weights=args.reward_weights, timeout=args.reward_timeout)
        self.sampler = GuidedSampler(self.engine, self.rewards, args, self.engine.max_length, on_phase, self.ranks)
        self.on_phase = on_phase or (lambda phase: None)
        self.run_description = run_description or {}
        self.value_head: ValueHead | None = None
        if args.critic == "value_head":
            self.value_head = ValueHead(self._head().in_features, args.device)
        self.replay = ReplayBuffer(args.replay_size) if args.replay_size > 0 else None
        self._pending: list[list[TrainingRow]] = []  # minibatches of the last experience still to be trained on
        self._forest = TokenForest()  # the one that their nodes belong to
        self._self_checks_left = args.self_check_steps if args.packing == "tree" else 0
        self._began = False

    # -- Trainer's hooks ------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        length = len(train_dataset if train_dataset is not None else self.train_dataset)
        # accelerate deals batches to the processes in turn: a repetition has to begin with the first process again.
        batch_size = self._train_batch_size * self.ranks.count
        return RepeatSampler(length, batch_size, self.args.steps_per_generation, self.args.seed)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimiser step's forward and backward; `inputs` is a list of examples."""
        start = time.perf_counter()
        step = self.state.global_step
        experience: Experience | None = None
        if not self._pending:
            self._update_engine()
            seed = (self.args.seed * 1_000_003 + step) * self.ranks.count + self.ranks.index
            experience = self._collect(inputs, seed)
        self.on_phase("train")
        train_start = time.perf_counter()
        try:
            loss, metrics = self._update(model, self._pending.pop(0))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the update of {self.args.max_tokens_per_microbatch} tokens at a time does not fit this device: lower "
                f"max_tokens_per_microbatch, give the rollout engine less memory (kv_cache_memory), or set "
                f"gradient_checkpointing. {error}"
            ) from error
        train_seconds = time.perf_counter() - train_start
        if experience is not None:
            metrics |= experience.metrics
        metrics = self.ranks.merge_metrics(metrics)
        phases = {k.split("/")[1]: metrics.pop(k) for k in list(metrics) if k.startswith("seconds/")}
        phases["train"] = train_seconds
        total = time.perf_counter() - start
        phases["rest"] = max(0.0, total - sum(phases.values()))
        if experience is not None:
            metrics["tokens_per_second"] = metrics["num_tokens"] / total
        record = {
            "step": step + 1,
            "time": self.run_files.time(),
            "loss": float(loss),
            **metrics,
            "seconds": phases,
        }
        if self.is_world_process_zero():
            self.run_files.metrics(record)
        if experience is not None and self.is_world_process_zero():
            self.run_files.trajectories([{"step": step + 1, **t} for t in experience.trajectories])
        self._last_metrics = metrics
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **getattr(self, "_last_metrics", {})}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward of one sampled completion per prompt, with its standard error."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs an eval_dataset")
        check_dataset(dataset, "eval_dataset")
        self.on_phase("evaluate")
        rewards = self.sample_rewards(list(dataset))
        spread = rewards.std(unbiased=True) / len(rewards) ** 0.5 if len(rewards) > 1 else torch.tensor(float("nan"))
        metrics = {
            f"{metric_key_prefix}_reward": float(rewards.mean()),
            f"{metric_key_prefix}_reward_standard_error": float(spread),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample_rewards(self, examples: Sequence[dict[str, Any]], seed: int = 0) -> torch.Tensor:
        """Rewards of one completion for each example with the present weights. float64, shape (n,)."""
        self._update_engine()
        places = self.ranks.share(range(len(examples)))
        mine = self.sampler.score_once([examples[i] for i in places], self.args.temperature, [seed + i for i in places])
        rewards = torch.empty(len(examples), dtype=torch.float64)
        for rank, part in enumerate(self.ranks.gather(torch.from_numpy(mine))):
            rewards[rank :: self.ranks.count] = part
        return rewards

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        step = 0
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.run_files.folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.run_files.folder} holds no whole checkpoint to go on from")
        if isinstance(resume_from_checkpoint, str | Path):
            mark = Path(resume_from_checkpoint) / COMPLETE_MARK
            if not mark.is_file():
                raise ValueError(f"{resume_from_checkpoint} is not a whole checkpoint: it has no {COMPLETE_MARK}")
            state = json.loads(mark.read_text(encoding="utf-8"))
            # Of another number of processes, each takes over what it can get of theirs.
            mine = merge_pending(self.ranks.share(state["ranks"]))
            longest = max(len(s["pending"]) for s in state["ranks"])
            mine["pending"] += [[] for _ in range(longest - len(mine["pending"]))]
            self._pending = [[TrainingRow(**row) for row in batch] for batch in mine["pending"]]
            self._forest = TokenForest.from_structure(mine["forest"])
            self._load_algorithm(Path(resume_from_checkpoint), state)
            step = json.loads((mark.parent / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._begin_run(step)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks whether a run is done after a step only: one that goes on from its end would make one too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers has none

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # Old checkpoints are dropped below, when the new one is whole; until then they are what a run goes on from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.is_world_process_zero():  # of a run that went on from an earlier checkpoint
                (folder / COMPLETE_MARK).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            self._complete_checkpoint(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(_failed_checkpoint(folder, error)) from error
        finally:
            self.args.save_total_limit = limit
        if self.is_world_process_zero():
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _complete_checkpoint(self, folder: Path) -> None:
        """Writes what Trainer does not, and declares the checkpoint whole when every process has written its files."""
        pending = [[asdict(row) for row in batch] for batch in self._pending]
        own = {
            "pending": pending,
            "forest": self._forest.structure() if pending else [],
            "replay": [] if self.replay is None else self.replay.state(),
        }
        ranks = self.ranks.gather(own)  # comes back when every process has written its files
        if not self.is_world_process_zero():
            return
        if self.value_head is not None:
            save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)
        mark_complete(folder, json.dumps({"version": gpo_fast.__version__, "ranks": ranks}))

    def _load_algorithm(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """What the value head and the replay buffer were at a checkpoint."""
        if self.replay is not None:
            self.replay.load([row for rank in self.ranks.share(state["ranks"]) for row in rank["replay"]])
        if self.value_head is not None:
            path = checkpoint / VALUE_HEAD_FILE
            if not path.is_file():
                raise ValueError(f"{checkpoint} is of a run without a value head: set critic='group' to go on from it")
            self.value_head.load_state_dict(load_file(path))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; of a model in shards the whole one, whatever the type of the checkpoints' state dict."""
        if self._copy is None:
            return super().save_model(output_dir, _internal_call)
        self._update_engine()  # all processes
        if self.args.should_save:
            self._save(output_dir, state_dict=self._copy.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._write_card(Path(output_dir or self.run_files.folder), self.run_files.folder.name)

    def create_model_card(self, model_name: str | None = None, **data: Any) -> None:  # type: ignore[override]
        """Writes README.md in the output folder; `push_to_hub` calls it. `data` are further fields of its header."""
        if self.is_world_process_zero():
            self._write_card(self.run_files.folder, model_name or self.run_files.folder.name, **data)

    def _write_card(self, folder: Path, name: str, **data: Any) -> None:
        card = model_card(
            name,
            base_model=self._model_name(),
            loss_type=self.args.loss_type,
            use_gpo=self.args.use_gpo,
            options={k: v for k, v in changed_fields(self.args).items() if k in _own_fields()},
            is_adapter=self._is_peft,
            **data,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    # -- the update -----------------------------------------------------------------------------------------

    def _update_engine(self) -> None:
        """Lets the engine sample from the present weights."""
        if self._copy is not None:
            refresh_copy(self._copy, self.model)
        self.engine.update_weights()

    def _collect(self, inputs: Any, seed: int) -> Experience:
        """New experience, with a critic's advantages and with what is replayed, as minibatches to be trained on."""
        experience = self.sampler.collect(inputs, seed, self.train_dataset)
        self._forest = experience.forest
        experience.metrics |= self._estimate_values(experience.rows)
        new = [row for row in experience.rows if row.kind != "base"]
        if self.replay is not None:
            count = round(self.args.replay_ratio * len(new))
            replayed = self.replay.sample(count, np.random.default_rng([seed, 0x7265]))
            experience.rows += plant(replayed, experience.forest)
            experience.metrics["num_replayed"] = float(len(replayed))
        self._pending = self._minibatches(experience.rows)
        if self.args.steps_per_generation > 1 and not self.args.learns_from_pairs:
            # The first is trained on with the weights that sampled it, but may be replayed with others.
            self._compute_old_logprobs(self._pending[1:] if self.replay is None else self._pending)
        if self.replay is not None:
            self.replay.add(new)
        return experience

    def _compute_old_logprobs(self, minibatches: Sequence[Sequence[TrainingRow]]) -> None:
        """Gives the rows that will be trained on their log-probabilities under the present weights.

        By the forward pass that the updates will make, before the first of them: rounding then cancels in the ratio,
        which the sampler's log-probabilities would not give in bfloat16.
        """
        for rows in minibatches:
            for batch in self._batches([row for row in self._useful(rows) if row.old_logprobs is None]):
                logprobs = self._logprobs(batch, reference=False)
                for row, own in zip(batch.rows, logprobs.split(batch.lengths)):
                    row.old_logprobs = own.tolist()

    def _useful(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """A row without advantage has no gradient unless it is held to the reference."""
        args = self.args
        every = args.learns_from_pairs or args.beta > 0 or args.loss_type == "awr"
        return [row for row in rows if row.token_ids and (every or row.has_advantage)]

    def _minibatches(self, rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """Each of the `steps_per_generation` minibatches gets its share of the rows."""
        parts = self.args.steps_per_generation
        units = inseparable(rows)
        return [[row for unit in units[i::parts] for row in unit] for i in range(parts)]

    def _update(self, model: Any, rows: Sequence[TrainingRow]) -> tuple[torch.Tensor, dict[str, float]]:
        """Forward and backward over the rows in microbatches; normalisers are those of all rows together."""
        model.train()
        args, useful = self.args, self._useful(rows)
        totals = Totals(*self.ranks.sum(Totals.of(rows)))
        batches = self._batches(useful)
        references = self._references(batches)
        reference_kl = self._kto_baseline(batches, references) if args.loss_type == "kto" else 0.0
        # Of a model in shards all processes make all passes, also those that have nothing to compute.
        takes_part = bool(useful) or is_sharded(self.model)
        check = self._self_checks_left > 0 and takes_part
        if check:
            self._self_checks_left -= 1
            expected = self._padded_gradients(model, useful, totals, reference_kl)
        total, metrics, logprobs = self._backward(batches, references, totals, reference_kl)
        if check:
            compare_gradients(model, total, *expected, tolerance=gradient_tolerance(model, self.args.bf16))
        self.ranks.add_gradients(model.parameters())
        total = total.new_tensor(self.ranks.sum([float(total)])[0])
        metrics["trained_rows"] = float(len(useful))
        if not args.uses_reference and self._is_peft and takes_part:
            few = useful[:: max(KL_SPACING, len(useful) // KL_ROWS)][:KL_ROWS]
            metrics |= self._measured_kl(few, logprobs)
        return total, metrics

    def _batches(self, rows: Sequence[TrainingRow], packing: str | None = None) -> list[TrainingBatch]:
        budget, device = self.args.max_tokens_per_microbatch, self.args.device
        if (packing or self.args.packing) == "padded":
            batches = padded_batches(rows, budget, device)
        else:
            batches = tree_batches(rows, self._forest, budget, device)
        if is_sharded(self.model):
            batches += [idle_batch(device)] * (max(self.ranks.gather(len(batches))) - len(batches))
        return batches

    def _backward(
        self,
        batches: Sequence[TrainingBatch],
        references: Sequence[torch.Tensor],
        totals: Totals,
        reference_kl: float,
    ) -> tuple[torch.Tensor, dict[str, float], dict[int, torch.Tensor]]:
        """Adds to the gradients; gives the loss, means of metrics, and each row's logprobs by its id.

        Loss and gradients are this process's part of those of all: `totals` and `reference_kl` are everyone's.
        """
        total = torch.zeros((), device=self.args.device)
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        logprobs: dict[int, torch.Tensor] = {}
        for batch, reference in zip_longest(batches, references):
            with batch.attention(self.model):
                with self.compute_loss_context_manager():
                    objective = partial(self._objective, batch, reference, totals, reference_kl)
                    output = forward_pass(self.model, objective)
                self.accelerator.backward(output.loss)
            total += output.loss.detach()
            for name, value in output.metrics.items():
                weight = len(batch.rows) if name in PAIR_METRICS else len(batch.targets)
                sums[name] = sums.get(name, 0.0) + float(value) * weight
                weights[name] = weights.get(name, 0) + weight
            logprobs |= {id(row): own for row, own in zip(batch.rows, output.logprobs.split(batch.lengths))}
        metrics = {name: value / weights[name] for name, value in sums.items()}
        if logprobs:
            metrics["logprob"] = float(torch.cat(list(logprobs.values())).mean())
        return total, metrics, logprobs

    def _objective(
        self, batch: TrainingBatch, reference: torch.Tensor | None, totals: Totals, reference_kl: float
    ) -> LossOutput:
        """The loss of a batch, as its part of that of all rows; `reference` are log-probabilities [T]."""
        hidden = batch.hidden(self._base_model().get_decoder())
        zero = anchor(hidden, self._head()) if is_sharded(self.model) else None
        if zero is not None and not batch.rows:
            return LossOutput(zero, hidden.new_zeros(0), None, {})
        head = {"hidden": hidden, "weight": self._head().weight, **self._head_options(self._head())}
        if self.args.learns_from_pairs:
            output = preference_objective(batch, head, self.args, totals, reference, reference_kl)
        else:
            output = policy_objective(batch, head, self.args, totals, reference)
        return output if zero is None else replace(output, loss=output.loss + zero)

    def _references(self, batches: Sequence[TrainingBatch]) -> list[torch.Tensor]:
        """Log-probabilities [T] of each batch under the reference; none where the loss needs none."""
        return [self._logprobs(b, reference=True) for b in batches if self.args.uses_reference]

    @torch.no_grad()
    def _logprobs(self, batch: TrainingBatch, *, reference: bool) -> torch.Tensor:
        """Log-probabilities [T] under the policy or the reference: the base without adapter, or a frozen copy."""
        model = self._reference if reference and self._reference is not None else self.model
        base, head = _base_of(model), _base_of(model).get_output_embeddings()

        def compute() -> torch.Tensor:
            hidden = batch.hidden(base.get_decoder())
            if is_sharded(model):
                anchor(hidden, head)
            if not batch.rows:
                return hidden.new_zeros(0)
            inputs = HeadInputs(head.weight, **self._head_options(head))
            logprobs, _ = token_logprobs(
                hidden, batch.targets, inputs, batch.shared, want_entropy=False, entropy_needs_grad=False
            )
            return logprobs

        adapter = model.disable_adapter() if reference and self._is_peft else nullcontext()
        with self.compute_loss_context_manager(), batch.attention(model), adapter:
            return forward_pass(model, compute)

    def _kto_baseline(self, batches: Sequence[TrainingBatch], references: Sequence[torch.Tensor]) -> float:
        """KTO's estimate of KL(policy || reference) per completion, at least 0 (arXiv 2402.01306, section 4.1).

        KTO takes completions of other prompts for it, because its own are not the policy's. Here they are, so the
        mean log-ratio of the rows themselves estimates it.
        """
        differences = [self._logprobs(b, reference=False) - ref for b, ref in zip(batches, references)]
        total = sum(float(difference.double().sum()) for difference in differences)
        everywhere, count = self.ranks.sum([total, float(sum(len(batch.rows) for batch in batches))])
        return max(0.0, everywhere / max(1.0, count))

    def _estimate_values(self, rows: Sequence[TrainingRow]) -> dict[str, float]:
        """Gives each row the value head's values, which then learns what they should have been."""
        rows = [row for row in rows if row.token_ids]
        if self.value_head is None:
            return {}
        products = torch.zeros_like(self.value_head.moments)
        for batch in self._batches(rows):
            with torch.no_grad(), self.compute_loss_context_manager(), batch.attention(self.model):
                hidden = batch.hidden(self._base_model().get_decoder())[batch.row_of_token].float()
            for row, own in zip(batch.rows, self.value_head(hidden).split(batch.lengths)):
                set_advantages(row, own.tolist(), self.args.gamma, self.args.gae_lambda)
            # The returns: advantages are the differences of them and the values.
            returns = batch.per_token("values") + batch.per_token("token_advantages")
            products += self.value_head.products(hidden, returns)
        self.ranks.add(products)
        self.value_head.learn(products)
        explained = {"explained_variance": explained_variance(rows)} if rows else {}
        if self.args.scale_rewards:
            scale_advantages(rows, self.ranks, centre=True)
        return explained

    def _measured_kl(self, rows: Sequence[TrainingRow], logprobs: dict[int, torch.Tensor]) -> dict[str, float]:
        """Schulman's k3 estimate of KL(policy || reference) per token, on a few rows; nothing where there are none."""
        estimates = []
        for batch in self._batches(rows):
            reference = self._logprobs(batch, reference=True)
            for row, theirs in zip(batch.rows, reference.split(batch.lengths)):
                difference = theirs.double() - logprobs[id(row)].double()
                estimates.append(torch.expm1(difference) - difference)
        return {"kl": float(torch.cat(estimates).mean())} if estimates else {}

    def _padded_gradients(
        self, model: Any, useful: Sequence[TrainingRow], totals: Totals, reference_kl: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients of the padded batch; the model's own gradients are left empty."""
        batches = self._batches(useful, "padded")
        loss, *_ = self._backward(batches, self._references(batches), totals, reference_kl)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss, gradients

    # -- the model's parts ----------------------------------------------------------------------------------

    def _refuse_sharding(self) -> None:
        """Raises ValueError for weights in shards of a kind, or with options, that cannot be trained."""
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "GPOTrainer trains weights in shards with FSDP2 only: start it with `accelerate launch --use_fsdp "
                "--fsdp_version 2`, or without DeepSpeed and FSDP"
            )
        if self.is_fsdp_enabled and self.args.critic == "value_head":
            raise ValueError("critic='value_head' does not work with FSDP: set critic='group' or 'monte_carlo'")

    def _base_model(self) -> Any:
        return _base_of(self.model)

    def _model_name(self) -> str:
        """The path or hub id that the model was loaded from, or ''."""
        return str(getattr(self._base_model().config, "_name_or_path", ""))

    def _head(self) -> torch.nn.Linear:
        head = self._base_model().get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise TypeError(f"the output head must be a plain linear layer, got {type(head).__name__}")
        return head

    def _head_options(self, head: torch.nn.Linear) -> dict[str, Any]:
        softcap = getattr(self._base_model().config.get_text_config(), "final_logit_softcapping", None)
        return {"bias": head.bias, "softcap": softcap, "temperature": self.args.temperature}

    def _begin_run(self, step: int) -> None:
        if self._began:
            return
        self._began = True
        if not self.is_world_process_zero():
            return
        self.run_files.begin(
            {
                "title": "gpo-fast run",
                "model": self._model_name() or type(self._base_model()).__name__,
                "algorithm": ("GPO-" if self.args.use_gpo else "") + self.args.loss_type.upper(),
                "config": {k: v for k, v in self.args.to_dict().items() if k in _own_fields()},  # type: ignore[no-untyped-call]
                "versions": {
                    "gpo-fast": gpo_fast.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "device": str(self.args.device),
                "notes": [],
                **self.run_description,
            },
            step,
        )


def _failed_checkpoint(folder: Path, error: Exception) -> str:
    """Why a checkpoint is not there, and what the run can go on from."""
    free = shutil.disk_usage(folder.parent).free
    whole = last_checkpoint(folder.parent)
    return (
        f"{folder} could not be written ({free / 2**20:.1f} MiB are free there): {error}. Make room and start the run "
        f"again: it goes on from {whole if whole is not None else 'its beginning, as it has no checkpoint yet'}"
    )


def _own_fields() -> set[str]:
    return {*GPOConfig.__annotations__, "per_device_train_batch_size", "max_steps", "seed", "weight_decay"}


def _base_of(model: Any) -> Any:
    """The transformers model inside of PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, so no completion could ever end: set tokenizer.eos_token to the "
            "token that ends the model's answers"
        )


def _refuse_dropout(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ValueError(
                f"dropout must be 0 (the policy that is trained must be the one that sampled), but {name} has "
                f"p={module.p}: set it to 0, with LoRA by lora_dropout=0"
            )

"""GPOTrainer: Procedure I of GPO (arXiv 2509.16456) on Hugging Face's Trainer.

A training step takes a batch of prompts, collects experience (`procedure.GuidedSampler`) and makes one update of
the base algorithm. Trainer brings optimiser, schedule, logging, checkpoints and callbacks.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

import gpo_fast
from gpo_fast.config import GPOConfig
from gpo_fast.data import check_dataset
from gpo_fast.forest import TokenForest
from gpo_fast.losses import linear_policy_loss
from gpo_fast.losses.linear_logprob import HeadInputs
from gpo_fast.losses.shared_rows import token_logprobs
from gpo_fast.procedure import Experience, GuidedSampler, TrainingRow
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout import RolloutEngine
from gpo_fast.run_files import COMPLETE_MARK, RunFiles, last_checkpoint, mark_complete
from gpo_fast.self_check import compare_gradients, gradient_tolerance
from gpo_fast.training_batch import TrainingBatch, padded_batches, tree_batches

KL_ROWS = 8  # rows on which the divergence from the reference is measured when it is not part of the loss


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
    """Trains a causal language model with GPO on top of a policy-gradient algorithm.

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
        if args.world_size > 1:
            raise ValueError(f"GPOTrainer runs on one process so far, got a world of {args.world_size}")
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
        self._reference = None
        if args.beta > 0 and not self._is_peft:
            self._reference = copy.deepcopy(model).eval().requires_grad_(False)
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
        self.engine = RolloutEngine(
            self.model,
            processing_class,
            kv_cache_memory=args.kv_cache_memory,
            max_batch_size=args.max_batch_size,
            seed=args.seed,
        )
        self.rewards = RewardFunctions(reward_funcs, weights=args.reward_weights, timeout=args.reward_timeout)
        self.sampler = GuidedSampler(self.engine, self.rewards, args, self.engine.max_length, on_phase)
        self.on_phase = on_phase or (lambda phase: None)
        self.run_description = run_description or {}
        self._pending: list[list[TrainingRow]] = []  # minibatches of the last experience still to be trained on
        self._forest = TokenForest()  # the one that their nodes belong to
        self._self_checks_left = args.self_check_steps if args.packing == "tree" else 0
        self._began = False

    # -- Trainer's hooks ------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        length = len(train_dataset if train_dataset is not None else self.train_dataset)
        return RepeatSampler(length, self._train_batch_size, self.args.steps_per_generation, self.args.seed)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimiser step's forward and backward; `inputs` is a list of examples."""
        start = time.perf_counter()
        step = self.state.global_step
        experience: Experience | None = None
        if not self._pending:
            self.engine.update_weights()
            experience = self.sampler.collect(inputs, seed=self.args.seed * 1_000_003 + step)
            self._pending, self._forest = self._minibatches(experience.rows), experience.forest
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
        self.run_files.metrics(record)
        if experience is not None:
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
        self.engine.update_weights()
        return torch.from_numpy(self.sampler.score_once(examples, self.args.temperature, seed))

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
            self._pending = [[TrainingRow(**row) for row in batch] for batch in state["pending"]]
            self._forest = TokenForest.from_structure(state.get("forest", []))
            step = json.loads((mark.parent / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._begin_run(step)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks whether a run is done after a step only: one that goes on from its end would make one too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE_MARK).unlink(missing_ok=True)  # of a run that went on from an earlier checkpoint
        # Old checkpoints are dropped below, when the new one is whole; until then they are what a run goes on from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            pending = [[asdict(row) for row in batch] for batch in self._pending]
            forest = self._forest.structure() if pending else []
            mark_complete(folder, json.dumps({"version": gpo_fast.__version__, "pending": pending, "forest": forest}))
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(_failed_checkpoint(folder, error)) from error
        finally:
            self.args.save_total_limit = limit
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    # -- the update -----------------------------------------------------------------------------------------

    def _minibatches(self, rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """Each of the `steps_per_generation` minibatches gets its share of the rows."""
        parts = self.args.steps_per_generation
        return [list(rows[i::parts]) for i in range(parts)]

    def _update(self, model: Any, rows: Sequence[TrainingRow]) -> tuple[torch.Tensor, dict[str, float]]:
        """Forward and backward over the rows in microbatches; normalisers are those of all rows together."""
        model.train()
        args = self.args
        # A row without advantage has no gradient unless it is held to the reference.
        useful = [r for r in rows if r.token_ids and (r.advantage != 0 or args.beta > 0 or args.loss_type == "awr")]
        check = self._self_checks_left > 0 and bool(useful)
        if check:
            self._self_checks_left -= 1
            expected = self._padded_gradients(model, rows, useful)
        total, sums, logprobs = self._backward(rows, self._batches(useful))
        if check:
            compare_gradients(model, total, *expected, tolerance=gradient_tolerance(model, self.args.bf16))
        num_tokens = sum(len(r.token_ids) for r in useful)
        metrics = {name: value / num_tokens for name, value in sums.items()} if useful else {}
        metrics["trained_rows"] = float(len(useful))
        if args.beta == 0 and self._is_peft and useful:
            few = useful[:: max(1, len(useful) // KL_ROWS)][:KL_ROWS]
            metrics["kl"] = self._measured_kl(few, logprobs)
        return total, metrics

    def _batches(self, rows: Sequence[TrainingRow], packing: str | None = None) -> list[TrainingBatch]:
        budget, device = self.args.max_tokens_per_microbatch, self.args.device
        if (packing or self.args.packing) == "padded":
            return padded_batches(rows, budget, device)
        return tree_batches(rows, self._forest, budget, device)

    def _backward(
        self, rows: Sequence[TrainingRow], batches: Sequence[TrainingBatch]
    ) -> tuple[torch.Tensor, dict[str, float], dict[int, torch.Tensor]]:
        """Adds to the gradients; gives the loss, sums of metrics over tokens, and each row's logprobs by its id."""
        args = self.args
        total = torch.zeros((), device=args.device)
        sums: dict[str, float] = {}
        logprobs: dict[int, torch.Tensor] = {}
        for batch in batches:
            with batch.attention(self.model):
                with self.compute_loss_context_manager():
                    reference = self._reference_logprobs(batch) if args.beta > 0 else None
                    output = linear_policy_loss(
                        batch.hidden(self._base_model().get_decoder()),
                        self._head().weight,
                        batch.targets,
                        loss_type=args.loss_type,  # type: ignore[arg-type]
                        advantages=batch.advantages,
                        sequence_ids=batch.sequence_ids,
                        shared=batch.shared,
                        old_logprobs=batch.old_logprobs if args.steps_per_generation > 1 else None,
                        ref_logprobs=reference,
                        num_sequences=max(1, len(rows)),
                        num_tokens=max(1, sum(len(r.token_ids) for r in rows)),
                        epsilon=args.epsilon,
                        epsilon_high=args.epsilon_high,
                        beta=args.beta,
                        max_completion_length=args.max_completion_length,
                        temperature=args.temperature,
                        **self._head_options(),
                    )
                self.accelerator.backward(output.loss)
            total += output.loss.detach()
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.targets)
            sums["logprob"] = sums.get("logprob", 0.0) + float(output.logprobs.sum())
            lengths = [len(row.token_ids) for row in batch.rows]
            logprobs |= {id(row): own for row, own in zip(batch.rows, output.logprobs.split(lengths))}
        return total, sums, logprobs

    @torch.no_grad()
    def _reference_logprobs(self, batch: TrainingBatch) -> torch.Tensor:
        """Log-probabilities [T] under the reference: the base without adapter, or a frozen copy."""
        model = self._reference if self._reference is not None else self.model
        base = _base_of(model)
        with batch.attention(model), model.disable_adapter() if self._is_peft else nullcontext():
            logprobs, _ = token_logprobs(
                batch.hidden(base.get_decoder()),
                batch.targets,
                HeadInputs(
                    base.get_output_embeddings().weight, temperature=self.args.temperature, **self._head_options()
                ),
                batch.shared,
                want_entropy=False,
                entropy_needs_grad=False,
            )
        return logprobs

    def _measured_kl(self, rows: Sequence[TrainingRow], logprobs: dict[int, torch.Tensor]) -> float:
        """Schulman's k3 estimate of KL(policy || reference) per token, on a few rows."""
        estimates = []
        for batch in self._batches(rows):
            with self.compute_loss_context_manager():
                reference = self._reference_logprobs(batch)
            own = torch.cat([logprobs[id(row)] for row in batch.rows])
            difference = reference.double() - own.double()
            estimates.append(torch.expm1(difference) - difference)
        return float(torch.cat(estimates).mean())

    def _padded_gradients(
        self, model: Any, rows: Sequence[TrainingRow], useful: Sequence[TrainingRow]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients of the padded batch; the model's own gradients are left empty."""
        loss, *_ = self._backward(rows, self._batches(useful, "padded"))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss, gradients

    # -- the model's parts ----------------------------------------------------------------------------------

    def _base_model(self) -> Any:
        return _base_of(self.model)

    def _head(self) -> torch.nn.Linear:
        head = self._base_model().get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise TypeError(f"the output head must be a plain linear layer, got {type(head).__name__}")
        return head

    def _head_options(self) -> dict[str, Any]:
        softcap = getattr(self._base_model().config.get_text_config(), "final_logit_softcapping", None)
        return {"bias": self._head().bias, "softcap": softcap}

    def _begin_run(self, step: int) -> None:
        if self._began:
            return
        self._began = True
        self.run_files.begin(
            {
                "title": "gpo-fast run",
                "model": getattr(self._base_model().config, "_name_or_path", "") or type(self._base_model()).__name__,
                "algorithm": ("GPO-" if self.args.use_gpo else "") + self.args.loss_type.upper(),
                "config": {k: v for k, v in self.args.to_dict().items() if k in _own_fields()},
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

"""What one iteration costs: GPO here, GPO written plainly on transformers, the base algorithm, and TRL's GRPOTrainer.

The plain GPO is the paper's as one would write it well with transformers alone: uniform search, padded `generate`
batches with the longest prefixes together, padded training batches, full-vocabulary logits of the loss tokens. It
shares prompts, rewards, adapters, sizes and Python around it with ours.

The reward is 1 where a text has more of a letter than the first texts had on average, so groups are mixed and the
model need not know anything. Every group's worst trajectory is searched, and no text ends before its limit (the end
token is one that the model never draws), so each search has the same number of steps. The numbers of samples and
resets are the defaults of GPOConfig, that of completions is TRL's. The base algorithm samples as many rollouts as GPO
may train on. "GPO as it comes" has the defaults that bear on the search and the update too: its bound, the baseline.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpo_fast.bench.common import ReadmeRow, Table, human, machine, peak_memory
from gpo_fast.bench.rollout import load
from transformers import PrinterCallback, TrainerCallback

from gpo_fast import _C, GPOConfig, GPOTrainer
from gpo_fast.demo.model import adapter
from gpo_fast.demo.task import training
from gpo_fast.losses import LossOutput
from gpo_fast.objective import Totals
from gpo_fast.procedure import search_worst
from gpo_fast.rollout import Completion, Request, RolloutEngine
from gpo_fast.run_files import read_records
from gpo_fast.training_batch import TrainingBatch

LETTER = "e"
NEVER_DRAWN = "<issue_start>"  # a token of SmolLM2's that its training left untouched
STEP_TOKENS = 8
BASE, PLAIN, UNIFORM, OURS, DEFAULT, TRL = "GRPO", "plain GPO", "GPO, uniform", "GPO", "GPO as it comes", "TRL GRPO"


@dataclass(frozen=True)
class Size:
    """Of one iteration. GPO trains on `generations + resets` rollouts of each prompt."""

    model: str
    device: str
    dtype: str
    prompts: int
    generations: int
    resets: int
    samples: int  # Monte Carlo continuations per step
    tokens: int  # of a completion at most


# The type in which each row is fast here: where a CPU emulates bfloat16, all would be slower in it.
CPU_TYPE = "float32" if _C.linear_logprob_kernels() == "none" else "bfloat16"
SIZES = {
    "cpu": Size("smollm2", "cpu", CPU_TYPE, 4, 8, 4, 4, 48),
    "cuda": Size("qwen3-0.6b", "cuda", "bfloat16", 16, 8, 4, 4, 256),
}
QUICK = {"prompts": 1, "generations": 2, "resets": 2, "samples": 2, "tokens": 16}


class PlainEngine:
    """transformers' `generate` behind the rollout engine's protocol: what `GuidedSampler` needs of it."""

    def __init__(self, model: Any, tokenizer: Any, max_batch_size: int) -> None:
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        self.max_length = model.config.max_position_embeddings

    def update_weights(self) -> None:
        """`generate` keeps nothing from one call to the next."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Padded batches; the longest prefixes come first, so that a batch has little padding."""
        branches = [(number, branch) for number, request in enumerate(requests) for branch in range(request.n)]
        order = sorted(range(len(branches)), key=lambda i: -len(requests[branches[i][0]].token_ids))
        done: dict[int, Completion] = {}
        for first in range(0, len(order), self.max_batch_size):
            places = order[first : first + self.max_batch_size]
            drawn = self._batch([requests[branches[place][0]] for place in places])
            for place, tokens in zip(places, drawn):
                number, branch = branches[place]
                ended = tokens[-1:] == [self.tokenizer.eos_token_id]
                prompt, unknown = list(requests[number].token_ids), [0.0] * len(tokens)
                reason = "stop" if ended else "length"
                done[place] = Completion(number, branch, prompt, tokens, unknown, list(unknown), reason)
        return [done[place] for place in range(len(branches))]

    @torch.no_grad()
    def _batch(self, requests: list[Request]) -> list[list[int]]:
        width = max(len(r.token_ids) for r in requests)
        padding = [width - len(r.token_ids) for r in requests]
        ids = torch.tensor([[0] * pad + list(r.token_ids) for pad, r in zip(padding, requests)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        self.model.eval()
        drawn = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(r.sampling.max_tokens for r in requests),
            pad_token_id=self.tokenizer.eos_token_id,
        )[:, width:].tolist()
        return [self._ended(tokens[: r.sampling.max_tokens]) for tokens, r in zip(drawn, requests)]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class FullVocabularyTrainer(GPOTrainer):
    """GPOTrainer with GRPO's loss from whole rows of logits; on policy, so the ratio is 1 and its clipping idle."""

    def _objective(
        self, batch: TrainingBatch, reference: torch.Tensor | None, totals: Totals, reference_kl: float
    ) -> LossOutput:
        hidden = batch.hidden(self._base_model().get_decoder())
        logits = self._head()(hidden).float() / self.args.temperature
        logprobs = torch.log_softmax(logits, -1)[batch.row_of_token, batch.targets]
        ratio = torch.exp(logprobs - logprobs.detach())
        weight = (batch.advantages / torch.bincount(batch.sequence_ids))[batch.sequence_ids] / totals.sequences
        return LossOutput(-(weight * ratio).sum(), logprobs.detach(), None, {})


@dataclass(frozen=True)
class Way:
    """A row of the benchmark: how GPOTrainer is changed."""

    settings: dict[str, Any]
    trainer: type[GPOTrainer] = GPOTrainer
    plain_engine: bool = False
    engine: tuple[tuple[str, bool], ...] = ()  # options of the rollout engine


_OURS = {"estimator": "racing", "reuse": "all"}
_DEFAULTS = {name: getattr(GPOConfig, name) for name in ("search", "search_budget", "loss_type", "baseline")}
WAYS: dict[str, Way] = {
    BASE: Way({"use_gpo": False}),
    PLAIN: Way({"estimator": "uniform", "packing": "padded"}, FullVocabularyTrainer, plain_engine=True),
    UNIFORM: Way({"estimator": "uniform"}),
    OURS: Way(_OURS),
    DEFAULT: Way({**_OURS, **_DEFAULTS}),
    "GPO, prefixes not shared": Way(_OURS, engine=(("share_prefixes", False),)),
    "GPO, no C++ forward pass": Way(_OURS, engine=(("fast_forward", False),)),
    "GPO, padded training": Way({**_OURS, "packing": "padded"}),
    "GPO, full-vocabulary loss": Way(_OURS, FullVocabularyTrainer),
    "GPO, uniform with reuse": Way({"estimator": "uniform", "reuse": "all"}),
    "GPO, criterion max": Way({**_OURS, "criterion": "max"}),
    # Cheaper, and less sure: see critical_real.py.
    "GPO, half of N": Way({**_OURS, "num_samples": 2}),
    "GPO, no search": Way({"estimator": "proposal", "reuse": "all"}),
    "GPO, bisection": Way({**_OURS, "estimator": "bisect"}),
}
HEADLINE = (TRL, BASE, PLAIN, UNIFORM, OURS, DEFAULT)
ROWS = (TRL, *WAYS)


class Letters:
    """The reward of the module's text, with TRL's signature."""

    __name__ = "letters"

    def __init__(self) -> None:
        self.usual: float | None = None

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        shares = [text.count(LETTER) / max(1, len(text)) for text in completions]
        if self.usual is None:
            self.usual = statistics.median(shares)
        return [float(share > self.usual) for share in shares]


class StepClock(TrainerCallback):
    """Seconds of each optimiser step, sampling included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def measure(row: str, size: Size, repeats: int) -> dict[str, Any]:
    """The record of one row: seconds of `repeats` iterations after one that is not counted."""
    model, _ = load(size.model, getattr(torch, size.dtype), size.device)
    tokenizer = _endless_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    clock = StepClock()
    with TemporaryDirectory() as folder:
        build = trl_trainer if row == TRL else partial(our_trainer, WAYS[row])
        trainer = build(model, tokenizer, size, Path(folder), repeats + 1, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = read_records(Path(folder) / "metrics.jsonl")[1:]
    phases = {phase for record in history for phase in record["seconds"]}
    counted = ("trained_rows", "num_rollouts", "num_tokens", "num_search_tokens", "num_reused", "completion_length")
    return {
        "row": row,
        "size": asdict(size),
        "repeats": repeats,
        "seconds": statistics.median(clock.seconds[1:]),
        "seconds_all": clock.seconds[1:],
        "phases": {p: statistics.fmean(r["seconds"].get(p, 0.0) for r in history) for p in sorted(phases)},
        "counts": {name: statistics.fmean(r.get(name, 0.0) for r in history) for name in counted if history},
        "peak_memory": peak_memory(),
        "machine": machine(),
    }


def our_trainer(
    way: Way, model: Any, tokenizer: Any, size: Size, folder: Path, steps: int, clock: StepClock
) -> GPOTrainer:
    """GPOTrainer as the row changes it; the base algorithm samples all its rollouts from the prompt."""
    base = not way.settings.get("use_gpo", True)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": size.prompts,
        "num_generations": size.generations + size.resets * base,
        "num_resets": size.resets,
        "num_samples": size.samples,
        "max_completion_length": size.tokens,
        "search": search_worst,  # in every group, mixed or not
        "search_budget": None,
        "loss_type": "grpo",
        "baseline": "mean",  # GRPO as published, in all rows
        "criterion": "min",  # the step that lost the worst trajectory, as in the gain study
        "step_splitter": "tokens",
        "min_step_tokens": STEP_TOKENS,
        "max_batch_size": 64,
    }
    trainer = way.trainer(
        model,
        Letters(),
        args=GPOConfig(**_training_settings(size, folder, steps), **(shared | way.settings)),
        train_dataset=_prompts(),
        processing_class=tokenizer,
        peft_config=adapter(),
        callbacks=[clock],
    )
    if way.plain_engine:
        trainer.engine = trainer.sampler.engine = PlainEngine(trainer.model, tokenizer, 64)
    elif way.engine:
        trainer.engine = RolloutEngine(trainer.model, tokenizer, max_batch_size=64, **dict(way.engine))
        trainer.sampler.engine = trainer.engine
    return trainer


def trl_trainer(model: Any, tokenizer: Any, size: Size, folder: Path, steps: int, clock: StepClock) -> Any:
    """TRL's GRPOTrainer, plain GRPO: as many base rollouts as GPO has here, one batch of them a step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        model,
        Letters(),
        args=GRPOConfig(
            **_training_settings(size, folder, steps),
            per_device_train_batch_size=size.prompts * size.generations,
            num_generations=size.generations,
            max_completion_length=size.tokens,
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(_prompts()),
        processing_class=tokenizer,
        peft_config=adapter(),
        callbacks=[clock],
    )


def _training_settings(size: Size, folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": size.device == "cpu",
        "bf16": size.dtype == "bfloat16",
        "seed": 0,
    }


def _prompts() -> list[dict[str, str]]:
    return [{"prompt": f"Explain step by step how to work out {row['prompt'].strip()} "} for row in training(256)]


def _endless_tokenizer() -> Any:
    """The demo's; for random weights any will do whose tokens they know."""
    from gpo_fast.demo.model import load_demo_model

    tokenizer = load_demo_model()[1]
    tokenizer.eos_token = NEVER_DRAWN
    return tokenizer


# -- the report ---------------------------------------------------------------------------------------------------


def tables(records: Sequence[dict[str, Any]]) -> list[Table]:
    """Rows against the base, the plain GPO and TRL; then the phases."""
    by_row = {record["row"]: record for record in records}
    size = records[0]["size"]
    title = f"One iteration: {size['model']}, {size['dtype']}, {size['device']}, {size['prompts']} prompts"
    ratio_columns = tuple(f"/ {row}" for row in (BASE, PLAIN, TRL))
    main = Table(title, ("row", "seconds", "from", "to", *ratio_columns, "trained rollouts", "sampled tokens"))
    phases = sorted({phase for record in records for phase in record["phases"]})
    spent = Table("Seconds by phase", ("row", *phases))
    for row, record in by_row.items():
        others = [by_row.get(other) for other in (BASE, PLAIN, TRL)]
        ratios = ["" if other is None else f"{record['seconds'] / other['seconds']:.2f}" for other in others]
        counts, all_seconds = record["counts"], record["seconds_all"]
        numbers = [f"{counts[name]:.0f}" if counts else "" for name in ("trained_rows", "num_tokens")]
        main.add(row, human(record["seconds"]), human(min(all_seconds)), human(max(all_seconds)), *ratios, *numbers)
        spent.add(row, *(f"{record['phases'][p]:.2f}" if p in record["phases"] else "" for p in phases))
    return [main, spent]


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """GPO's price against our base, a plain GPO and TRL's GRPO, with their goals."""
    records = result["data"]["records"]
    by_row = {record["row"]: record for record in records}
    goals = (
        (OURS, BASE, "GPO's iteration over the base's", 1.25, True),
        (OURS, PLAIN, "the same over GPO's on plain transformers", 1 / 5, False),
        (OURS, TRL, "the same over plain GRPO's in TRL, as many base rollouts", 0.5, False),
        (DEFAULT, TRL, "an iteration of GPO as it comes, but 8 completions, over plain GRPO's in TRL", 0.5, False),
    )
    return [
        _readme_row(f"{what}, {records[0]['size']['model']}", by_row[ours], by_row[row], goal, per_rollout)
        for ours, row, what, goal, per_rollout in goals
        if row in by_row and ours in by_row
    ]


def _readme_row(what: str, ours: dict[str, Any], other: dict[str, Any], goal: float, per_rollout: bool) -> ReadmeRow:
    """`per_rollout`: the goal is for as many trained rollouts, and GPO does not always find as many to train on."""
    ratio = ours["seconds"] / other["seconds"]
    result = f"{ratio:.2f} ({human(ours['seconds'])}, {human(other['seconds'])})"
    if per_rollout:
        trained, others = (record["counts"]["trained_rows"] for record in (ours, other))
        ratio *= others / trained
        result += f", with {trained:.0f} trained rollouts against {others:.0f}; {ratio:.2f} for as many"
    return ReadmeRow(what, "loop.py price", result, f"at most {goal:g}", ratio > goal, (what, result))

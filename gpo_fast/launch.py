"""What the command line does behind its options: load model, data and rewards by name, then train, search, evaluate."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpo_fast.benchmarks import BENCHMARKS, load_benchmark
from gpo_fast.config import RunSpec, load_config
from gpo_fast.critical import CriticalStepFinder
from gpo_fast.data import check_dataset, columns_of, decode_completion, encode_prompt
from gpo_fast.evaluation import Accuracy, pass_at_k_of
from gpo_fast.procedure import search_mixed
from gpo_fast.report import write_report
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout import Completion, Request, RolloutEngine, SamplingParams
from gpo_fast.run_files import last_checkpoint, read_records
from gpo_fast.steps import StepSplitter


def train_from_config(path: Path, overrides: dict[str, Any]) -> None:
    """Trains as a YAML file says; goes on from the last whole checkpoint of the output folder, if there is one."""
    from gpo_fast.trainer import GPOTrainer

    spec, config = load_config(path, overrides)
    model, tokenizer = load_model(spec.model, spec.dtype, spec.trust_remote_code)
    trainer = GPOTrainer(
        model=model,
        reward_funcs=spec.rewards,
        args=config,
        train_dataset=load_rows(spec.dataset, spec.split),
        eval_dataset=load_rows(spec.eval_dataset, spec.split) if spec.eval_dataset else None,
        processing_class=tokenizer,
        peft_config=_lora(spec),
    )
    checkpoint = last_checkpoint(trainer.run_files.folder)
    print(f"going on from {checkpoint}" if checkpoint else f"a new run in {trainer.run_files.folder}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(trainer.run_files.folder / "model"))
    tokenizer.save_pretrained(trainer.run_files.folder / "model")
    if spec.merge_adapter and trainer.is_world_process_zero():
        _save_merged(spec, trainer.run_files.folder)
    print(write_report(trainer.run_files.folder))
    trainer.accelerator.end_training()  # a process group that is left to the interpreter's end may abort there


def find_critical(
    dataset: str,
    model_name: str,
    reward: str,
    *,
    num_problems: int,
    num_generations: int,
    temperature: float,
    max_tokens: int,
    splitter: StepSplitter,
    seed: int,
    **search: Any,
) -> list[dict[str, Any]]:
    """Critical steps as records for `critical_table`.

    Rows with a `completion` are searched as they are. For rows without, `num_generations` are sampled, and of each
    prompt whose outcomes differ the worst is searched.

    Raises:
        ValueError: rows with and without a completion, or no prompt whose outcomes differ.
    """
    rows = load_rows(dataset, "train")[:num_problems]
    given = [isinstance(row.get("completion"), str) for row in rows]
    if any(given) and not all(given):
        raise ValueError(f"{dataset}: row {given.index(False)} has no text in the column 'completion', others do")
    model, tokenizer = load_model(model_name)
    engine, rewards = RolloutEngine(model, tokenizer), RewardFunctions(reward)
    prompts = [encode_prompt(row["prompt"], tokenizer, engine.max_length) for row in rows]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    chosen = list(range(len(rows)))  # the row of each trajectory

    def outcome(completions: Sequence[Completion]) -> list[float]:
        mine = [rows[chosen[c.request_index]] for c in completions]
        texts = [decode_completion(c.token_ids, tokenizer) for c in completions]
        columns = columns_of(mine, without=("prompt", "completion"))
        scored = rewards([r["prompt"] for r in mine], texts, [c.token_ids for c in completions], columns)
        return [float(total) for total in scored.total]

    if all(given):
        trajectories = [_given(p, row["completion"], tokenizer) for p, row in zip(prompts, rows)]
        roots = None
    else:
        drawn = engine.generate(
            [Request(p, num_generations, sampling, seed + i, keep=True) for i, p in enumerate(prompts)]
        )
        grouped = np.asarray(outcome(drawn)).reshape(len(rows), num_generations)
        worst = search_mixed(grouped)
        if not worst:
            raise ValueError(f"no prompt of {len(rows)} has right and wrong completions: try more, or other prompts")
        trajectories, chosen = [drawn[i] for i in worst], [i // num_generations for i in worst]
        roots = [grouped[i].tolist() for i in chosen]
    finder = CriticalStepFinder(engine, outcome, splitter, sampling=sampling, seed=seed, **search)
    records = []
    for row, trajectory, found in zip(chosen, trajectories, finder.find(trajectories, root_values=roots)):
        answer = rows[row].get("answer")
        records.append(
            {**found.record(trajectory, tokenizer), "row": row, "answer": None if answer is None else str(answer)}
        )
    return records


def _given(prompt: list[int], text: str, tokenizer: Any) -> Completion:
    """A completion that is given as text."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = [0.0] * len(tokens)
    return Completion(0, 0, prompt, tokens, unknown, list(unknown), "stop")


def evaluate_model(
    model_name: str,
    dataset: str,
    reward: str | None,
    num_problems: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    num_samples: int = 1,
    k: int = 1,
) -> Accuracy:
    """pass@k of `num_samples` completions for each problem of a data set, or of a benchmark by its name.

    Raises:
        ValueError: k is not within 1 and num_samples, or several samples are greedy.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= num_samples, got k={k} and num_samples={num_samples}")
    if num_samples > 1 and temperature == 0:
        raise ValueError("several samples at temperature 0 are all the same: set a temperature")
    if dataset in BENCHMARKS or dataset.startswith("reasoning_gym:"):
        rows, own_reward = load_benchmark(dataset)
        as_chat = True
    else:
        rows, own_reward = load_rows(dataset, "test"), "exact_match"
        as_chat = False  # the prompts of a data set of one's own are taken as they are
    rows, reward = rows[:num_problems], reward or own_reward
    model, tokenizer = load_model(model_name)
    engine, rewards = RolloutEngine(model, tokenizer), RewardFunctions(reward)
    if as_chat and tokenizer.chat_template:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    room = engine.max_length - max_tokens
    requests = [
        Request(encode_prompt(row["prompt"], tokenizer, room), num_samples, sampling, seed + i)
        for i, row in enumerate(rows)
    ]
    drawn = engine.generate(requests)
    texts = [decode_completion(c.token_ids, tokenizer) for c in drawn]
    mine = [rows[c.request_index] for c in drawn]
    scored = rewards([r["prompt"] for r in mine], texts, [c.token_ids for c in drawn], columns_of(mine))
    return pass_at_k_of(scored.total.reshape(len(rows), num_samples).tolist(), k)


def load_model(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a hub id, on the first CUDA device if there is one.

    Raises:
        ValueError: code would come with the model, and `trust_remote_code` is off.
        OSError: no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    model = model.eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_rows(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, of `module:function` (called without arguments), or of a data set of the hub.

    Raises:
        ValueError: no rows, or rows without a `prompt`.
    """
    rows: list[dict[str, Any]]
    if Path(name).suffix in (".json", ".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no data set at {name}")
        rows = read_records(Path(name))
    elif ":" in name:
        module, _, function = name.partition(":")
        make = getattr(importlib.import_module(module), function, None)
        if not callable(make):
            raise ValueError(f"the data set {name!r} must be module:function, and {module!r} has no such function")
        rows = list(make())
    else:
        import datasets

        rows = list(datasets.load_dataset(name, split=split))
    check_dataset(rows, name)
    plain: list[dict[str, Any]] = json.loads(json.dumps(rows))
    return plain


def _save_merged(spec: RunSpec, folder: Path) -> None:
    """Writes the model in which the saved adapter is merged; loads both again, since training may hold shards."""
    from peft import PeftModel

    model, tokenizer = load_model(spec.model, spec.dtype, spec.trust_remote_code)
    merged: Any = PeftModel.from_pretrained(model, str(folder / "model")).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")


def _lora(spec: RunSpec) -> Any:
    if spec.lora_r < 1:
        return None
    from peft import LoraConfig

    alpha = spec.lora_alpha or 2 * spec.lora_r
    return LoraConfig(
        r=spec.lora_r, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, use_dora=spec.use_dora
    )

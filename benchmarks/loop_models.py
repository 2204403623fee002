"""The models that the gain study trains, and how they are taught before an algorithm begins.

`tiny` is made from scratch and trained as a whole. `smollm2` is the demo's pretrained model with LoRA in bfloat16 where
the machine is fast at it, as a user would train it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpo_fast.bench.loop_tasks import Task, character_tokenizer, solved
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from gpo_fast.demo.model import adapter, fast_dtype, load_demo_model
from gpo_fast.demo.warmup import imitation_loss, sample_once
from gpo_fast.rollout import RolloutEngine
from gpo_fast.tree_attention import tree_attention_of

WARMUP_SEED = 29
LESSONS, CHECKS = 8192, 256  # problems to learn from, and to measure the solve rate on
CHECK_EVERY = 5  # steps


@dataclass(frozen=True)
class Pupil:
    """A model of the study."""

    label: str
    untaught: Callable[[Task], tuple[Any, Any]]  # model in float32 and tokenizer; what needs a gradient is taught
    warmup_rate: float  # learning rate of the warm-up
    warmup_batch: int
    settings: dict[str, Any]  # of GPOConfig, for all algorithms
    dtype: Callable[[], torch.dtype] = lambda: torch.float32  # of training after the warm-up
    adapter: LoraConfig | None = None


def tiny(task: Task) -> tuple[Any, Any]:
    """A Llama of two layers and 0.4M parameters with random weights; a character is a token."""
    tokenizer = character_tokenizer()
    torch.manual_seed(WARMUP_SEED)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16 * task.steps + 64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def smollm2(task: Task) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct; its embedding, which is the head as well, stays as it is."""
    model, tokenizer = load_demo_model(torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    return model, tokenizer


MODELS: dict[str, Pupil] = {
    "tiny": Pupil(
        label="0.4M parameters",
        untaught=tiny,
        warmup_rate=1e-3,
        warmup_batch=64,
        settings={
            "per_device_train_batch_size": 64,
            "num_generations": 4,
            "max_batch_size": 256,
            "kv_cache_memory": 64 << 20,
            "learning_rate": 1e-4,
            "warmup_steps": 5,
            "max_grad_norm": 1.0,
        },
    ),
    "smollm2": Pupil(
        label="SmolLM2-135M with LoRA",
        untaught=smollm2,
        warmup_rate=3e-4,
        warmup_batch=16,
        settings={
            "per_device_train_batch_size": 24,
            "num_generations": 4,
            "steps_per_generation": 2,
            "max_batch_size": 128,
            "kv_cache_memory": 256 << 20,
            "learning_rate": 4e-4,
            "warmup_steps": 3,
            "max_grad_norm": 0.3,
        },
        dtype=fast_dtype,
        adapter=adapter(),
    ),
}


def warm_start(name: str, task: Task, start: float, folder: Path, max_steps: int = 5000) -> Path:
    """The model `name`, taught until it solves the share `start` of the task's problems; made once in `folder`.

    Raises:
        RuntimeError: it does not get there.
    """
    target = folder / "warm" / f"{name}-{task.name}-{task.steps}-{start:g}"
    if target.is_dir():
        return target
    pupil = MODELS[name]
    model, tokenizer = pupil.untaught(task)
    engine = RolloutEngine(model, tokenizer, kv_cache_memory=256 << 20, max_batch_size=128)
    checks = task.rows(CHECKS, WARMUP_SEED - 1)
    lessons = [(row["prompt"], row["solution"]) for row in task.rows(LESSONS, WARMUP_SEED)]
    taught = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(taught, pupil.warmup_rate, weight_decay=0.0)
    rate = 0.0
    for step in range(max_steps):
        if step % CHECK_EVERY == 0:
            engine.update_weights()
            texts = sample_once(engine, tokenizer, [row["prompt"] for row in checks], task.max_tokens, seed=step)
            rate = sum(solved(texts, [row["solution"] for row in checks])) / len(checks)
            if rate >= start:
                break
        first = step * pupil.warmup_batch % len(lessons)
        with tree_attention_of(model):
            imitation_loss(model, tokenizer, lessons[first : first + pupil.warmup_batch], pupil.dtype()).backward()
        torch.nn.utils.clip_grad_norm_(taught, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    else:
        raise RuntimeError(f"{task.label}: {rate:.0%} are solved after {max_steps} steps of warm-up, not {start:.0%}")
    print(f"warm-up of {target.name}: {rate:.1%} solved after {step} steps", flush=True)
    own = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    if target.is_dir():  # another process was faster, with the same weights
        shutil.rmtree(own)
    else:
        own.rename(target)
    return target

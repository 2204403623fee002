"""Supervised warm-up: the raw model cannot do the task at all, so it first sees worked solutions for a short while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpo_fast.demo.task import solution, training
from gpo_fast.losses import linear_logprob

WARMUP_SEED = 29


def warm_up(
    model: Any,
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Trains all weights (float32, bfloat16 autocast) on generated solutions; the loss is on the solution only."""
    rows = training(steps * batch_size, seed=WARMUP_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps + 1, pct_start=0.1, anneal_strategy="linear"
    )
    model.train()
    for step in range(steps):
        batch = rows[step * batch_size : (step + 1) * batch_size]
        loss = _loss(model, tokenizer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))
    model.eval()


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Mean negative log-probability of the solutions' tokens and the end token."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [
        [*tokenizer(solution(row["metadata"]["expression"]))["input_ids"], tokenizer.eos_token_id] for row in rows
    ]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers))
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        positions.append(i * width + torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
    targets = torch.tensor([token for answer in answers for token in answer])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        rows_with_loss = hidden.flatten(0, 1)[torch.cat(positions)]
        return -linear_logprob(rows_with_loss, model.get_output_embeddings().weight, targets).mean()

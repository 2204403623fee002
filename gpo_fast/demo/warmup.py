"""Supervised warm-up: the raw model cannot do the task at all, so it first sees worked solutions for a short while.

It ends at a solve rate, not at a step count: how far a number of steps carries differs from machine to machine, and
GPO needs a start at which some samples are right and some are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpo_fast.demo.model import fast_dtype
from gpo_fast.demo.task import TERMS, solution, solved, training
from gpo_fast.forest import TokenForest
from gpo_fast.losses import linear_logprob
from gpo_fast.packing import pack_forest
from gpo_fast.rollout import Request, RolloutEngine, SamplingParams
from gpo_fast.tree_attention import tree_attention_of

WARMUP_SEED, CHECK_SEED = 29, 31
BATCH_SIZE = 16
RISE = 5  # steps over which the learning rate rises
MAX_NEW_TOKENS = 48


def warm_up(
    model: Any,
    tokenizer: Any,
    *,
    solve_rate: float,
    max_steps: int,
    terms: tuple[int, int] = TERMS,
    first_check: int = 30,
    check_every: int = 6,
    learning_rate: float = 3e-4,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Trains all layers on generated solutions until `solve_rate` of the check problems are solved.

    The embedding, which is the head as well, stays frozen. Returns the last solve rate that was measured.
    """
    rows = training(max_steps * BATCH_SIZE, WARMUP_SEED, terms)
    lessons = [(row["prompt"], solution(row["metadata"]["expression"])) for row in rows]
    problems = training(96, CHECK_SEED, terms)
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RISE))
    rate = 0.0
    for step in range(1, max_steps + 1):
        model.train()
        with tree_attention_of(model):
            loss = imitation_loss(model, tokenizer, lessons[(step - 1) * BATCH_SIZE : step * BATCH_SIZE], fast_dtype())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
        if step == max_steps or (step >= first_check and (step - first_check) % check_every == 0):
            rate = _solve_rate(model, tokenizer, problems)
            if rate >= solve_rate:
                break
    model.eval().requires_grad_(True)
    return rate


def _solve_rate(model: Any, tokenizer: Any, problems: Sequence[dict[str, Any]]) -> float:
    """The share of problems that one sample at temperature 1 solves."""
    engine = RolloutEngine(model, tokenizer, max_batch_size=len(problems), kv_cache_memory=256 << 20)
    texts = sample_once(engine, tokenizer, [row["prompt"] for row in problems], MAX_NEW_TOKENS)
    rewards = solved(texts, [row["answer"] for row in problems], [row["metadata"] for row in problems])
    return sum(rewards) / len(rewards)


def sample_once(
    engine: RolloutEngine, tokenizer: Any, prompts: Sequence[str], max_tokens: int, seed: int = 0
) -> list[str]:
    """One completion of each prompt at temperature 1."""
    sampling = SamplingParams(max_tokens=max_tokens)
    requests = [Request(tokenizer(p)["input_ids"], 1, sampling, seed + number) for number, p in enumerate(prompts)]
    return [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in engine.generate(requests)]


def imitation_loss(model: Any, tokenizer: Any, lessons: Sequence[tuple[str, str]], dtype: torch.dtype) -> torch.Tensor:
    """Mean negative log-probability of the solutions' tokens and the end token; the rows are packed, not padded.

    Call it, and the backward pass, within `tree_attention_of(model)`.

    Args:
        lessons: prompts and solutions.
        dtype: what autocast computes in.
    """
    forest = TokenForest()
    for prompt, solved_by in lessons:
        ids = tokenizer(prompt)["input_ids"]
        forest.branch(forest.add_prompt(ids), len(ids), [*tokenizer(solved_by)["input_ids"], tokenizer.eos_token_id])
    packed = pack_forest(forest)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.get_decoder()(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, tree=packed.tree
        ).last_hidden_state[0, packed.rows]
        # Different prompts share nothing: each row has one target.
        return -linear_logprob(hidden, model.get_output_embeddings().weight, packed.shared.targets).mean()

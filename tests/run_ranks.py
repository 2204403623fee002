"""What each process of tests/test_trainer_ranks.py runs: `python run_ranks.py equal|train|resume FOLDER`.

Two processes are started by torchrun, or, to shard the model, by `accelerate launch --use_fsdp --fsdp_version 2`.
`train FOLDER STEPS die` kills the second process in the middle of the first step after a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig, PeftModel
from test_trainer import PROMPTS
from torch.distributed.tensor import DTensor

from gpo_fast import GPOConfig, GPOTrainer
from gpo_fast.experience import TrainingRow
from gpo_fast.run_files import last_checkpoint

CASES = {
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "dapo": {"loss_type": "dapo", "packing": "padded"},
    "gspo": {"loss_type": "gspo", "self_check_steps": 1},
    "dpo": {"loss_type": "dpo"},
    "kto": {"loss_type": "kto", "lora": True},
    "value_head": {"loss_type": "ppo", "critic": "value_head"},
    "lora": {"loss_type": "ppo", "lora": True, "max_tokens_per_microbatch": 16},
    "tied": {"loss_type": "grpo", "tied": True},
}
FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"
RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def trainer(folder: Path, reward, lora: bool = False, tied: bool = False, **changes) -> GPOTrainer:
    values = {
        "per_device_train_batch_size": 4 // COUNT,
        "num_generations": 4,
        "num_resets": 4,
        "search_budget": None,
        "max_completion_length": 8,
        "max_steps": 4,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "min_step_tokens": 1,
        "step_splitter": "tokens",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    args = GPOConfig(output_dir=str(folder), **values)
    if FSDP:
        # Torch shards on CPUs as well, but accelerate (1.15) looks at its FSDP options on accelerators alone.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return GPOTrainer(
        tiny.model(initializer_range=0.05, tie_word_embeddings=tied),
        reward,
        args=args,
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False) if lora else None,
    )


def shares_of_ones(completions, **_):
    return [completion.count("1") / 8 for completion in completions]


def rows_of(case: str) -> list[TrainingRow]:
    """Twelve rows, those of a preference pair together; the last four have no advantage."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(12):
        tokens = torch.randint(3, 40, (3 + i % 5,), generator=generator).tolist()
        logprobs = (-torch.rand(len(tokens), generator=generator)).tolist()
        advantage = float(torch.randn((), generator=generator)) if i < 8 else 0.0
        row = TrainingRow([5, 6, 7 + i // 2], tokens, logprobs, advantage, "base", reward=float(i % 3))
        if case in ("dpo", "kto"):
            row = replace(row, pair=i // 2, desirable=i % 2 == 0)
        rows.append(row)
    return rows


def equal(folder: Path) -> None:
    """Each case's loss and gradients on the same rows, of which the second process has only useless ones."""
    results = {}
    for case in CASES:
        if FSDP and case == "value_head":
            with pytest.raises(ValueError, match="does not work with FSDP"):
                trainer(folder / case, shares_of_ones, **CASES[case])
            continue
        run = trainer(folder / f"{case}-{COUNT}", shares_of_ones, **CASES[case])
        if FSDP:
            run.create_optimizer()
            run.model, run.optimizer = run.accelerator.prepare(run.model, run.optimizer)
        rows = rows_of(case)
        mine = rows if COUNT == 1 else [rows[:8], rows[8:]][RANK]
        run._estimate_values(mine)
        loss, metrics = run._update(run.model, mine)
        results[case] = {"loss": loss, "rows": torch.tensor(run.ranks.merge_metrics(metrics)["trained_rows"])}
        results[case] |= {name: whole(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}
        results[case] |= {} if run.value_head is None else {"moments": run.value_head.moments}
    if RANK == 0:
        torch.save(results, folder / f"equal-{COUNT}{'-fsdp' * FSDP}.pt")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(folder: Path, steps: int, dies: bool) -> None:
    """A run of two steps an iteration, saved in the middle of one; prompts 8 to 15 have nothing to be learned."""

    def reward(prompts, completions, **_):
        if dies and RANK == 1 and last_checkpoint(folder / "run") is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return [0.0 if prompt[0] in "23" else float("1" in c) for prompt, c in zip(prompts, completions)]

    run = trainer(
        folder / "run", reward, max_steps=steps, steps_per_generation=2, save_strategy="steps", save_steps=3,
        search="all", replay_size=8, eval_strategy="no",
    )  # fmt: skip
    run.train(resume_from_checkpoint=last_checkpoint(folder / "run"))
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert all(torch.equal(weights, other) for other in run.ranks.gather(weights)), "the processes' weights differ"
    rewards = run.sample_rewards(PROMPTS, seed=3)
    assert all(torch.equal(rewards, other) for other in run.ranks.gather(rewards))
    if RANK == 0:
        rows = [asdict(row) for batch in run._pending for row in batch]
        (folder / f"train-{COUNT}.json").write_text(json.dumps({"rewards": rewards.tolist(), "pending": len(rows)}))


def resume(folder: Path) -> None:
    """Four steps at once, and three that are saved and one more: the same weights, in the saved model as well."""
    for lora in (False, True):
        ends = []
        for name, stages in (("at once", [4]), ("in two", [3, 4])):
            output = folder / f"{name} {lora}"
            for steps in stages:
                run = trainer(
                    output, shares_of_ones, lora, max_steps=steps, steps_per_generation=2, save_strategy="steps",
                    save_steps=3, lr_scheduler_type="constant",
                )  # fmt: skip
                start = parameters(run.engine.model)
                run.train(resume_from_checkpoint=last_checkpoint(output))
            ends.append(parameters(run.model))
        torch.testing.assert_close(*ends, rtol=0, atol=0)
        assert any(not torch.equal(start[name], end) for name, end in ends[0].items()), "nothing was learned"
        run.sample_rewards(PROMPTS[:2])
        torch.testing.assert_close(parameters(run.engine.model), ends[0], rtol=0, atol=0)
        run.save_model(str(output / "model"))
        run.accelerator.wait_for_everyone()
        saved = tiny.model(seed=0, initializer_range=0.05)
        if lora:
            saved = PeftModel.from_pretrained(saved, output / "model")
        else:
            saved = type(saved).from_pretrained(output / "model")
        torch.testing.assert_close(parameters(saved), ends[0], rtol=0, atol=0)


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "equal":
        equal(Path(sys.argv[2]))
    elif sys.argv[1] == "resume":
        resume(Path(sys.argv[2]))
    else:
        train(Path(sys.argv[2]), int(sys.argv[3]), dies=sys.argv[4:] == ["die"])
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads may abort there
        torch.distributed.destroy_process_group()

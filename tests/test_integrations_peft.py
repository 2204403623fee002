"""PEFT's adapters, LoRA and DoRA: trained, saved, loaded by plain PEFT, merged; the base is the reference.

Rollouts come from the adapted weights: the engine merges the adapter into its own copy of them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from test_trainer import PROMPTS, config, deterministic, share_of_ones
from transformers import AutoModelForCausalLM

from gpo_fast import GPOTrainer, Request, SamplingParams

IDS = torch.tensor([tiny.tokenizer()("1+2=3\n4+5=")["input_ids"]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GPOTrainer:
    """A run of three steps; all weights of the adapter, also those that start at 0, have moved."""
    torch.manual_seed(3)  # of the adapter's first matrices
    run = GPOTrainer(
        tiny.model(),
        share_of_ones,
        args=config(tmp_path_factory.mktemp("peft") / "run", max_steps=3, beta=0.1, save_steps=3),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, use_dora=request.param),
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    assert any("magnitude" in name for name in before) == request.param
    run.train()
    after = dict(run.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    return run


def test_plain_peft_loads_what_was_trained(trained: GPOTrainer, tmp_path: Path) -> None:
    assert (logits(trained.model) - logits(tiny.model())).abs().max() > 0.1
    trained.save_model(str(tmp_path / "saved"))
    for folder in (Path(trained.args.output_dir) / "checkpoint-3", tmp_path / "saved"):
        again = PeftModel.from_pretrained(tiny.model(), folder)
        assert torch.equal(logits(again), logits(trained.model))


def test_the_merged_model_is_a_plain_one(trained: GPOTrainer, tmp_path: Path) -> None:
    own = logits(trained.model)
    copy.deepcopy(trained.model).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert (logits(merged) - own).abs().max() <= 1e-5 * own.abs().max()


def test_the_reference_is_the_base_without_the_adapter(trained: GPOTrainer) -> None:
    trained._update_engine()
    rows = trained._collect(PROMPTS[:2], 5).rows
    base = tiny.model()
    assert trained._reference is None
    batches = trained._batches(rows)
    for batch, reference in zip(batches, trained._references(batches), strict=True):
        for row, own in zip(batch.rows, reference.split(batch.lengths)):
            ids = torch.tensor([[*row.context_ids, *row.token_ids]])
            with torch.no_grad():
                logprobs = base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            assert (own - logprobs[len(row.context_ids) - 1 :]).abs().max() <= 1e-4
    assert deterministic(Path(trained.args.output_dir))[-1]["kl"] > 0


def test_rollouts_come_from_the_adapted_model(trained: GPOTrainer) -> None:
    trained._update_engine()
    assert trained.engine._runner._packed is not None, "the fast forward pass knows the adapter"
    requests = [Request([3 + i, 5, 7], 2, SamplingParams(max_tokens=20), seed=i) for i in range(4)]
    for completion in trained.engine.generate(requests):
        ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
        with torch.no_grad():
            logprobs = trained.model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        own = torch.tensor(completion.logprobs)
        assert (own - logprobs[len(completion.prompt_token_ids) - 1 :]).abs().max() <= 1e-4

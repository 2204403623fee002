"""GPOTrainer with tree packing: the same step as with padding, on every setting that touches the forward pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from peft import LoraConfig
from test_trainer import PROMPTS, config, share_of_ones
from trees import distance

from gpo_fast import GPOTrainer, TokenForest
from gpo_fast.procedure import TrainingRow
from gpo_fast.run_files import last_checkpoint, read_records
from gpo_fast.training_batch import padded_batches, tree_batches
from gpo_fast.tree_attention import tree_attention_of


def build(folder: Path, model=None, lora: bool = False, **changes) -> GPOTrainer:
    return GPOTrainer(
        model if model is not None else tiny.model(),
        share_of_ones,
        args=config(folder, **changes),
        train_dataset=PROMPTS,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
    )


def step_gradients(folder: Path, rows, forest, **changes) -> tuple[float, dict, dict]:
    run = build(folder, **changes)
    run._forest = forest
    if changes.get("gradient_checkpointing"):
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, metrics = run._update(run.model, rows)
    return float(loss), metrics, {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


def sampled(folder: Path, **changes):
    """One iteration's rows with their forest: original trajectories, resets, and samples of the search."""
    run = build(folder, search="all", max_searches=3, reuse="all", num_resets=4, **changes)
    run.engine.update_weights()
    experience = run.sampler.collect(PROMPTS[:4], seed=3)
    return experience.rows, experience.forest


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-5),
        ({"lora": True}, 1e-5),
        ({"lora": True, "beta": 0.1}, 1e-5),
        ({"beta": 0.1, "loss_type": "awr"}, 1e-5),
        ({"steps_per_generation": 2, "loss_type": "gspo"}, 1e-5),
        ({"gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 0.1),
        ({"max_tokens_per_microbatch": 60}, 1e-5),
    ],
)
def test_a_step_is_that_of_the_padded_batch(tmp_path: Path, changes: dict, tolerance: float) -> None:
    rows, forest = sampled(tmp_path / "a")
    assert {row.kind for row in rows if row.node is not None} == {"base", "reset", "search"}
    loss, metrics, ours = step_gradients(tmp_path / "b", rows, forest, **changes)
    padded_loss, padded_metrics, padded = step_gradients(tmp_path / "c", rows, forest, packing="padded", **changes)
    assert loss == pytest.approx(padded_loss, rel=tolerance, abs=tolerance)
    assert distance(ours, padded) <= tolerance
    assert metrics.keys() == padded_metrics.keys()
    for name in metrics:
        assert metrics[name] == pytest.approx(padded_metrics[name], rel=10 * tolerance, abs=tolerance)


def test_old_logprobs_are_those_of_the_packed_pass(tmp_path: Path) -> None:
    rows, forest = sampled(tmp_path / "a", bf16=True)
    run = build(tmp_path / "run", steps_per_generation=2, bf16=True)
    run._forest = forest
    for place, row in enumerate(rows):
        row.advantage = float(place > 0)
    run._compute_old_logprobs([rows[:5], rows[5:]])
    assert rows[0].old_logprobs is None  # it is not trained on
    assert all(len(row.old_logprobs) == len(row.token_ids) for row in rows[1:])
    # Before the first update the ratio to them is one, rounding included; to the sampler's it is not.
    batch = run._batches(rows[5:])[0]
    trained = run._logprobs(batch, reference=False)
    off = {name: float((trained - batch.per_token(name)).abs().max()) for name in ("old_logprobs", "sampling_logprobs")}
    assert off["old_logprobs"] == 0 < off["sampling_logprobs"] < 0.1


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
@pytest.mark.parametrize("replay_size", [0, 8])
def test_the_first_minibatch_is_of_the_policy_that_sampled_it(tmp_path: Path, loss_type: str, replay_size: int) -> None:
    run = build(tmp_path / "run", steps_per_generation=2, loss_type=loss_type, replay_size=replay_size, search="all")
    run._update_engine()
    run._collect(PROMPTS, seed=3)
    first, second = run._pending
    assert any(row.has_advantage for row in first)
    for row in [*first, *second]:
        needed = row.has_advantage and (replay_size > 0 or row in second)  # any of them may be replayed
        assert (row.old_logprobs is not None) == needed
    loss, _, gradients = step_gradients(tmp_path / "a", first, run._forest, loss_type=loss_type)
    for row in first:
        row.old_logprobs = None if row.old_logprobs else row.sampling_logprobs  # the same in float32
    same_loss, _, same = step_gradients(tmp_path / "b", first, run._forest, loss_type=loss_type)
    assert loss == pytest.approx(same_loss, rel=1e-5, abs=1e-6)
    assert distance(gradients, same) <= 1e-5


def test_shared_tokens_are_in_the_batch_once(tmp_path: Path) -> None:
    rows, forest = sampled(tmp_path / "a")
    (batch,) = tree_batches(rows, forest, 100_000)
    assert batch.input_ids.numel() == forest.unique_tokens
    assert batch.input_ids.numel() < sum(b.input_ids.numel() for b in padded_batches(rows, 100_000))
    assert sorted(map(id, batch.rows)) == sorted(map(id, rows))


def test_rows_without_a_node_and_rows_of_another_forest() -> None:
    forest = TokenForest()
    node = forest.branch(forest.add_prompt([5, 6]), 2, [7, 8])
    known = TrainingRow([5, 6], [7, 8], [0.0, 0.0], 1.0, "base", node)
    stray = TrainingRow([5, 6], [9], [0.0], 1.0, "base")
    (batch,) = tree_batches([known, stray], forest, 100)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 5, 6, 9]]
    assert len(forest.nodes) == 2
    with pytest.raises(ValueError, match="not those of its node 1"):
        tree_batches([TrainingRow([5, 6], [7, 9], [0.0, 0.0], 1.0, "base", node)], forest, 100)


def test_the_self_check_passes_and_catches_a_wrong_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path / "run", self_check_steps=2, max_steps=2)
    run.train()
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2
    rows, forest = sampled(tmp_path / "a")
    broken = build(tmp_path / "b", self_check_steps=1)
    broken._forest = forest
    right = tree_batches

    def one_block_short(*args):
        batches = right(*args)
        for batch in batches:
            object.__setattr__(batch.tree, "blocks", batch.tree.blocks[1:])
        return batches

    monkeypatch.setattr("gpo_fast.trainer.tree_batches", one_block_short)
    with pytest.raises(RuntimeError, match="self check: the tree-packed gradient differs"):
        broken._update(broken.model, rows)


def test_minibatches_that_wait_in_a_checkpoint_keep_their_forest(tmp_path: Path) -> None:
    run = build(tmp_path / "run", steps_per_generation=2, max_steps=3, save_steps=3)
    run.train()
    resumed = build(tmp_path / "run", steps_per_generation=2, max_steps=4, save_steps=3)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))
    whole = build(tmp_path / "whole", steps_per_generation=2, max_steps=4, save_steps=3)
    whole.train()
    assert distance(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())) == 0
    assert len(resumed._forest.nodes) == len(whole._forest.nodes) > 4


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sliding-window"), tree_attention_of(tiny.model("mistral", sliding_window=8)):
        pass
    model = tiny.model("llama", attention_dropout=0.1).train()
    batch = tree_batches([TrainingRow([5, 6], [7], [0.0], 1.0, "base")], TokenForest(), 100)[0]
    with pytest.raises(ValueError, match=r"without dropout, got 0\.1"), tree_attention_of(model):
        batch.hidden(model.get_decoder())
    model = tiny.model("gpt2", n_head=4, n_embd=64, n_layer=2, resid_pdrop=0.1).train()
    with pytest.raises(ValueError, match="without dropout"), tree_attention_of(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    config = SimpleNamespace(model_type="x", layer_types=["linear_attention"])
    config.get_text_config = lambda: config
    with pytest.raises(ValueError, match="linear attention"), tree_attention_of(SimpleNamespace(config=config)):
        pass

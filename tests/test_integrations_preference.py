"""Preference data at the critical step: token-exact, and TRL's own trainers learn from it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpo_fast import RolloutEngine, build_preference_dataset
from gpo_fast.integrations.preference_text import exact_text

trl = pytest.importorskip("trl")

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]


def ones(completions, **_):
    return [c.count("1") / max(1, len(c)) for c in completions]


def policy():
    """A model that can sample only tokens that the tokenizer knows."""
    return tiny.model(vocab_size=len(tiny.tokenizer()))


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs in which two newlines, and a newline before an "a", merge; a beginning token goes before a text."""
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", "a", "b", "Ċ", "ĊĊ", "Ċa", "Ġ", "ab"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("Ċ", "a"), ("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@cache
def dataset(format: str, **options):
    values = {"num_generations": 4, "num_samples": 2, "step_splitter": "tokens", "max_completion_length": 60}
    return build_preference_dataset(policy(), PROMPTS, ones, tiny.tokenizer(), format, **{**values, **options})


@pytest.mark.parametrize("format", ["dpo", "kto", "simpo", "orpo"])
def test_rows_share_the_critical_state_and_end_without_an_end_token(format: str) -> None:
    rows = list(dataset(format))
    columns = {"prompt", "completion", "label"} if format == "kto" else {"prompt", "chosen", "rejected"}
    assert set(rows[0]) == columns
    assert {next(p for p in PROMPTS if r["prompt"].startswith(p)) for r in rows} <= set(PROMPTS)
    assert any(r["prompt"] not in PROMPTS for r in rows), "no prefix of a trajectory is in any context"
    assert not any("<eos>" in text for r in rows for text in r.values() if isinstance(text, str))
    if format == "kto":
        assert sum(r["label"] for r in rows) * 2 == len(rows)
        return
    for row in rows:
        prompt = next(p for p in PROMPTS if row["prompt"].startswith(p))
        better, worse = (ones([row["prompt"][len(prompt) :] + row[k]])[0] for k in ("chosen", "rejected"))
        assert better > worse


def test_the_same_seed_gives_the_same_data_and_the_report_counts_it() -> None:
    first = dataset("dpo")
    again = dataset("dpo", seed=0)
    assert first.to_list() == again.to_list()
    assert first.to_list() != dataset("dpo", seed=1).to_list()
    assert first.info.description.startswith(f"{len(first)} rows from {len(PROMPTS)} prompts")


def trainer(format: str, folder: Path, rows=None):
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 256,
        "gradient_checkpointing": False,
    }
    rest = {"train_dataset": rows or dataset(format), "processing_class": tiny.tokenizer()}
    if format == "dpo":
        return trl.DPOTrainer(policy(), ref_model=policy(), args=trl.DPOConfig(**common), **rest)
    if format == "kto":
        return trl.KTOTrainer(policy(), ref_model=policy(), args=trl.KTOConfig(**common), **rest)
    if format == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer(policy(), args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, **common), **rest)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(policy(), args=ORPOConfig(**common), **rest)


@pytest.mark.parametrize("format", ["dpo", "kto", "simpo", "orpo"])
def test_trls_own_trainer_learns_from_it(format: str, tmp_path: Path) -> None:
    run = trainer(format, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("format", ["dpo", "kto", "simpo", "orpo"])
@given(
    context=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=5),
    completion=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_a_text_is_given_only_if_the_trainer_gets_the_sampled_tokens(format, context, completion) -> None:
    tokenizer = merging_tokenizer()
    context, completion = [0, *context], [*completion, 1]
    text = exact_text(context, completion, tokenizer, format)
    both = tokenizer.decode([*context[1:], *completion[:-1]])
    canonical = tokenizer(both)["input_ids"] == [*context, *completion[:-1]]
    stable = tokenizer(tokenizer.decode(context[1:]))["input_ids"] == context
    assert (text is not None) == (canonical and stable)
    if text is not None:
        assert (text.context + text.completion).removeprefix("<s>") == both


class Recording:
    """A backend that remembers what it sampled: the tokens, and where the context ended."""

    def __init__(self) -> None:
        self.engine = RolloutEngine(policy(), tiny.tokenizer())
        self.tokenizer, self.max_length = self.engine.tokenizer, self.engine.max_length
        self.sampled: dict[tuple[int, ...], int] = {}

    def update_weights(self) -> None: ...

    def generate(self, requests):
        drawn = self.engine.generate(requests)
        self.sampled |= {tuple(c.prompt_token_ids + c.token_ids): len(c.prompt_token_ids) for c in drawn}
        return drawn


def test_trls_processed_data_sets_hold_the_sampled_tokens(tmp_path: Path) -> None:
    backend = Recording()
    options = {"num_generations": 4, "num_samples": 2, "step_splitter": "tokens", "max_completion_length": 60}
    rows = build_preference_dataset(backend, PROMPTS, ones, format="dpo", **options)
    processed = trainer("dpo", tmp_path, rows).train_dataset
    for row in processed:
        for kind in ("chosen_ids", "rejected_ids"):
            assert backend.sampled[tuple(row["prompt_ids"] + row[kind])] == len(row["prompt_ids"])
    for row in trainer("simpo", tmp_path, rows).train_dataset:
        for kind in ("chosen", "rejected"):
            prompt = [label for label in row[f"{kind}_labels"] if label == -100]
            assert backend.sampled[tuple(row[f"{kind}_input_ids"])] == len(prompt)


def test_conversations_are_rendered_with_the_chat_template() -> None:
    tokenizer = tiny.tokenizer().__class__(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}q:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    seen = []

    def reward(completions, answer, **_):
        seen.append((completions[0][0]["role"], answer[0]))
        return ones([c[0]["content"] for c in completions])

    rows = build_preference_dataset(
        policy(),
        [{"prompt": [{"role": "user", "content": p}], "answer": "1"} for p in PROMPTS],
        reward,
        tokenizer,
        num_generations=4,
        num_samples=2,
        step_splitter="tokens",
        max_completion_length=60,
    )
    assert all(isinstance(r["prompt"], str) and r["prompt"].startswith("q:") for r in rows)
    assert all(any(r["prompt"].startswith(f"q:{p}\na:") for p in PROMPTS) for r in rows)
    assert set(seen) == {("assistant", "1")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "ppo"}, "format must be one of dpo"),
        ({"num_resets": 1}, "num_resets must be at least 2"),
        ({"prompts": []}, "prompts is empty"),
        ({"tokenizer": None}, "pass tokenizer"),
        ({"reward_funcs": lambda completions, **_: [1.0] * len(completions)}, "no preference pair could be built"),
        ({"max_completion_length": 1}, "no preference pair could be built"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict, message: str) -> None:
    values = {"model": policy(), "prompts": PROMPTS[:2], "reward_funcs": ones, "tokenizer": tiny.tokenizer()}
    options = {"num_generations": 2, "num_samples": 1, "max_completion_length": 20}
    with pytest.raises(ValueError, match=message):
        build_preference_dataset(**{**values, **options, **changes})

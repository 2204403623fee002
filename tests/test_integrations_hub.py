"""Loggers hear what Trainer tells them, and a saved model has a card that says what to cite: nothing is uploaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_trainer import PROMPTS, config, share_of_ones
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from gpo_fast import GPOTrainer
from gpo_fast.config import LOSS_TYPES
from gpo_fast.model_card import model_card


def trainer(folder: Path, adapter: bool = False, **changes) -> GPOTrainer:
    return GPOTrainer(
        tiny.model(),
        share_of_ones,
        args=config(folder, max_steps=2, **changes),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0) if adapter else None,
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_a_saved_model_has_a_card_that_cites_the_paper(tmp_path: Path, adapter: bool) -> None:
    run = trainer(tmp_path / "run", adapter, criterion="min", hub_token="hf_secret")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    run.create_model_card(model_name="mine", tags=["sums"], license="apache-2.0")  # what push_to_hub does
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-2", tmp_path / "run"):
        card = ModelCard.load(folder / "README.md")
        assert "https://arxiv.org/abs/2509.16456" in card.text
        assert "GPO: Learning from Critical Steps" in card.text
        assert "https://arxiv.org/abs/2503.14476" in card.text, "the base algorithm's paper"
        assert "| `criterion` | `min` |" in card.text
        assert "hf_secret" not in card.content
        assert str(tmp_path) not in card.content
        assert {"gpo-fast", "gpo", "dapo"} <= set(card.data.tags)
        assert card.data.library_name == ("peft" if adapter else "transformers")
    assert card.data.license == "apache-2.0"
    assert card.text.strip().startswith("# mine\n")
    assert "sums" in card.data.tags


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_card_without_gpo_cites_the_base_alone(loss_type: str) -> None:
    options = {"base_model": "org/model", "loss_type": loss_type, "options": {}, "is_adapter": False}
    plain = ModelCard(model_card("m", use_gpo=False, **options))
    assert "2509.16456" not in plain.text
    assert "arxiv.org" in plain.text
    assert plain.data.base_model == "org/model"
    assert "2509.16456" in ModelCard(model_card("m", use_gpo=True, **options)).text


class Logger(TrainerCallback):
    """Stands for the callback of a logger such as TensorBoard's."""

    events: list = []  # noqa: RUF012

    def on_train_begin(self, args, state, control, **_):
        self.events.append(("begin", {}))

    def on_log(self, args, state, control, logs=None, **_):
        self.events.append(("log", dict(logs)))

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.events.append(("evaluate", dict(metrics)))

    def on_save(self, args, state, control, **_):
        self.events.append(("save", {}))

    def on_train_end(self, args, state, control, **_):
        self.events.append(("end", {}))


def test_report_to_names_a_logger_as_in_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Logger)
    monkeypatch.setattr(Logger, "events", [])
    trainer(tmp_path / "run", report_to="tensorboard", eval_strategy="steps", eval_steps=2, beta=0.1).train()
    names = [name for name, _ in Logger.events]
    assert names[0] == "begin"
    assert names[-1] == "end"
    assert names.count("save") == names.count("evaluate") == 1
    steps = [logs for name, logs in Logger.events if name == "log" and "loss" in logs]
    assert len(steps) == 2
    assert {"learning_rate", "grad_norm", "reward", "kl", "entropy", "num_searches", "tokens_per_second"} <= set(
        steps[0]
    )
    assert all(math.isfinite(value) for value in steps[0].values()), "a logger takes numbers"
    evaluated = next(logs for name, logs in Logger.events if name == "log" and "eval_reward" in logs)
    assert evaluated["eval_reward"] == next(m for name, m in Logger.events if name == "evaluate")["eval_reward"]

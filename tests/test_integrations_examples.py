"""Every example is short and runs; the paper's configurations can be read and launched."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny

from gpo_fast.config import load_config
from gpo_fast.launch import train_from_config
from gpo_fast.run_files import read_records

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


PAPER = sorted((EXAMPLES / "paper").glob("*.yaml"))


def share_of_digits(completions, **_):
    return [sum(c.isdigit() for c in completion) / max(1, len(completion)) for completion in completions]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_configurations_can_be_read(path: Path) -> None:
    spec, config = load_config(path, {"use_cpu": True, "bf16": False})
    assert spec.model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert config.use_gpo == path.stem.startswith("gpo")


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_configurations_can_be_launched(path: Path, saved: str, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(8)))
    size = {"max_completion_length": 8, "max_steps": 2, "num_generations": 4, "num_resets": 2, "num_samples": 2}
    machine = {"use_cpu": True, "bf16": False, "dtype": "float32", "report_to": "none", "disable_tqdm": True}
    names = {"model": saved, "dataset": str(problems), "rewards": f"{__name__}:share_of_digits"}
    train_from_config(path, {**names, **size, **machine, "output_dir": str(tmp_path / "run")})
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2
    assert all(record["trained_rows"] > 0 for record in records)
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()

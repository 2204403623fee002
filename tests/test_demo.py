"""The demo from its first to its last line with a tiny model, and what the terminal shows of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gpo_fast import cli
from gpo_fast.demo import run as demo_run
from gpo_fast.demo.warmup import warm_up
from gpo_fast.display import TrainingDisplay
from gpo_fast.run_files import last_checkpoint, read_records

TERMS = (3, 4)


def model():
    return tiny.model(vocab_size=len(tiny.tokenizer()))


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of warm-up, one of training, four problems."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(demo_run, "load_demo_model", lambda dtype: (model(), tiny.tokenizer()))
    monkeypatch.setattr(demo_run, "QUICK", demo_run.Size(1.0, 2, 0.0, 4, TERMS))


def demo(folder: Path) -> str:
    result = CliRunner().invoke(
        cli.app, ["demo", "--quick", "--compare", "--output", str(folder)], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.output


def test_the_demo_ends_with_a_model_and_a_report_and_goes_on_when_started_again(
    small_demo: None, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    said = demo(folder)
    assert "warm-up: step 2 of 2" in said
    assert said.count("before,") == said.count("after, a gain of") == 2
    for run in (folder, folder / "grpo"):
        evaluations = [r["eval"]["label"] for r in read_records(run / "metrics.jsonl") if "eval" in r]
        assert evaluations == ["accuracy before", "accuracy after"]
        assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() == model().num_parameters()
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "gpo-fast demo: GPO-GRPO on chained sums" in report
    first = last_checkpoint(folder)
    again = demo(folder)
    assert "warm-up: found, not repeated" in again
    assert first != last_checkpoint(folder) is not None


def test_the_warm_up_ends_at_its_solve_rate(small_demo: None) -> None:
    steps: list[int] = []
    warm_up(
        model(),
        tiny.tokenizer(),
        solve_rate=0.0,
        max_steps=9,
        terms=TERMS,
        first_check=2,
        on_step=lambda step, loss: steps.append(step),
    )
    assert steps == [1, 2]


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_a_terminal_shows_the_phase_the_rewards_and_the_time_left() -> None:
    warming, training = terminal(), terminal()
    with TrainingDisplay(warming) as display:
        display.phase("warm-up", 4)
        display.advance(1, loss=2.5)
    with TrainingDisplay(training, seconds=60.0) as display:
        display.phase("search")
        for step, reward in enumerate((0.25, 0.5, 1.0), start=1):
            display.iteration(step, {"reward": reward, "tokens_per_second": 123.0}, elapsed=20.0)
    for console, expected in (
        (warming, ("warm-up", "1 of 4", "2.500")),
        (training, ("search", "1.000", "0.583", "123", "40 s", "▁▃█")),
    ):
        assert isinstance(console.file, io.StringIO)
        for words in expected:
            assert words in console.file.getvalue(), words

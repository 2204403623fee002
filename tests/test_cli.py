"""The command line, in this process: help, overrides, and every command on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gpo_fast import cli
from gpo_fast.demo.task import chain_sums, held_out, solution, training
from gpo_fast.rewards import reasoning_gym

RUNNER = CliRunner()


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("command", ["train", "demo", "critical", "eval", "report", "version"])
def test_help_teaches_by_example(command: str) -> None:
    result = RUNNER.invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"gpo-fast {command}" in result.output.split("Example:")[1]


def test_overrides_are_read_as_values() -> None:
    given = ["--learning_rate", "1e-4", "--use-gpo=false", "--max_steps", "-1", "--stop", "[a, b]", "--model", "x"]
    read = cli.parse_overrides(given)
    assert read == {"learning_rate": 1e-4, "use_gpo": False, "max_steps": -1, "stop": ["a", "b"], "model": "x"}
    with pytest.raises(ValueError, match="needs a value"):
        cli.parse_overrides(["--model"])
    with pytest.raises(ValueError, match="expected --field value"):
        cli.parse_overrides(["model"])


def test_critical_eval_and_report(saved_model: Path, tmp_path: Path) -> None:
    data = lines(
        tmp_path / "data.jsonl",
        [
            {"prompt": "1+1=", "completion": "one\nand one\nis 2", "answer": "2"},
            {"prompt": "2=", "completion": "", "answer": "2"},
        ],
    )
    common = ["--dataset", str(data), "--model", str(saved_model), "--max-tokens", "20"]
    html = tmp_path / "critical.html"
    uniform = ["--estimator", "uniform", "--html", str(html), "--json"]
    result = RUNNER.invoke(cli.app, ["critical", *common, *uniform], catch_exceptions=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [len(f["steps"]) for f in found] == [3, 1]
    assert (found[0]["num_rollouts"], found[0]["rollouts_saved"]) == (12, 0)
    assert "Critical steps" in html.read_text()
    assert "took 12 rollouts" in html.read_text()
    table = RUNNER.invoke(cli.app, ["critical", *common], catch_exceptions=False)
    assert "advantage" in table.output
    assert "racing:" in table.output
    by_pattern = ["--step-splitter", "regex", "--step-pattern", " ", "--min-step-tokens", "1", "--json"]
    for limit, count in (([], 3), (["--max-steps", "2"], 2), (["--min-steps", "5"], 5)):
        cut = RUNNER.invoke(cli.app, ["critical", *common, *by_pattern, *limit], catch_exceptions=False)
        assert len(json.loads(cut.stdout.splitlines()[0])["steps"]) == count  # "one\nand ", "one\nis ", "2"
    options = ["eval", "--model", str(saved_model), "--dataset", str(data), "--max-tokens", "8"]
    scored = RUNNER.invoke(cli.app, options, catch_exceptions=False)
    assert "95 % interval" in scored.output
    several = [*options, "--temperature", "1", "--num-samples", "3", "--k", "2"]
    assert "pass@2" in RUNNER.invoke(cli.app, several, catch_exceptions=False).output
    with pytest.raises(ValueError, match="temperature 0"):
        RUNNER.invoke(cli.app, [*options, "--num-samples", "3"], catch_exceptions=False)


def ends_even(completions, **_):
    return [float(len(c) % 2 == 0) for c in completions]


def test_prompts_without_completions_are_sampled_first(saved_model: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", [{"prompt": f"{n}+1="} for n in range(4)])
    options = [
        "--dataset",
        str(data),
        "--model",
        str(saved_model),
        "--max-tokens",
        "12",
        "--reward",
        "test_cli:ends_even",
    ]
    searched = ["--step-splitter", "tokens", "--json"]
    result = RUNNER.invoke(cli.app, ["critical", *options, *searched], catch_exceptions=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert found
    assert all(f["reward"] == 0 and f["num_rollouts"] <= 4 * len(f["steps"]) for f in found)
    mixed = lines(tmp_path / "mixed.jsonl", [{"prompt": "1", "completion": "2"}, {"prompt": "1"}])
    with pytest.raises(ValueError, match=r"row 1 and row 0 must have the same columns.*'completion'"):
        RUNNER.invoke(cli.app, ["critical", "--dataset", str(mixed), *options[2:]], catch_exceptions=False)


def test_training_from_a_file_and_its_report(saved_model: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {saved_model}\ndataset: {data}\nrewards: exact_match\noutput_dir: {tmp_path / 'run'}\nlora_r: 2\n"
        "use_dora: true\nmerge_adapter: true\nlearning_rate: 1e-2\n"
        "per_device_train_batch_size: 2\nnum_generations: 2\nmax_completion_length: 6\nreport_to: none\n"
        "use_cpu: true\nbf16: false\ndisable_tqdm: true\nmax_steps: 4\n"
    )
    result = RUNNER.invoke(cli.app, ["train", str(config), "--max_steps", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "run" / "report.html").is_file()
    adapter = tmp_path / "run" / "model"
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"]
    base = AutoModelForCausalLM.from_pretrained(saved_model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    ids = torch.arange(3, 20)[None]
    difference = (merged(ids).logits - base(ids).logits).abs().max()
    trained = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert (merged(ids).logits - trained).abs().max() <= 1e-4 * difference
    other = RUNNER.invoke(cli.app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").is_file()
    assert other.exit_code == 0


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpo-fast", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"gpo-fast: {tmp_path} is not a run")


def test_solutions_are_right_and_problems_do_not_leak() -> None:
    rows = chain_sums(100, seed=3)
    texts = [solution(r["metadata"]["expression"]) for r in rows]
    columns = {"answer": [r["answer"] for r in rows], "metadata": [r["metadata"] for r in rows]}
    assert reasoning_gym(texts, **columns) == [1.0] * 100
    wrong = [t[:-1] + str((int(t[-1]) + 1) % 10) for t in texts]
    assert max(reasoning_gym(wrong, **columns)) < 1
    assert not {r["prompt"] for r in training(500)} & {r["prompt"] for r in held_out(512)}

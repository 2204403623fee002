"""The command line: `gpo-fast train | demo | critical | eval | report | bench | version`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from gpo_fast.bench.suite import SUITE
from gpo_fast.steps import METHODS, StepSplitter

app = typer.Typer(
    name="gpo-fast",
    help="GPO fine-tuning of reasoning LLMs: find the step a chain of thought hinges on, reset there, learn from it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

bench = typer.Typer(
    help="Measure gpo-fast on this machine against its peers; options go to the benchmark, `--help` shows them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; a run found there is continued.")]


def main() -> None:
    """Entry point: errors of the user's making are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        print(f"gpo-fast: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def version() -> None:
    """Print the versions that a bug report needs.

    Example: `gpo-fast version`
    """
    import platform

    import torch
    import transformers

    import gpo_fast

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    print(
        f"gpo-fast {gpo_fast.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {device}"
    )


@app.command()
def demo(
    output: Output = Path("gpo-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, at most 3 minutes on two cores.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also run plain GRPO for the same time.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train SmolLM2-135M with GPO on this machine, offline, and show what it learned from.

    Example: `gpo-fast demo --quick`
    """
    from gpo_fast.demo.run import run_demo

    run_demo(output, quick=quick, compare=compare, seed=seed)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file: model, dataset, rewards and any field of GPOConfig.")],
) -> None:
    """Train a model with GPO. A run that was cut off goes on when the same command is given again.

    Any field of the file can be overridden with `--field value`.

    Example: `gpo-fast train examples/chain_sum.yaml --learning_rate 1e-4 --max_steps 200`
    """
    from gpo_fast.launch import train_from_config

    train_from_config(config, parse_overrides(context.args))


@app.command()
def critical(
    model: Annotated[str, typer.Option(help="Path or hub id of the model.")],
    dataset: Annotated[
        str, typer.Option(help="JSON-lines file, `module:function` or hub id: prompts, with `completion` or without.")
    ],
    reward: Annotated[str, typer.Option(help="Reward function: a known name or `module:function`.")] = "exact_match",
    estimator: Annotated[str, typer.Option(help="uniform (the paper's), posterior, racing or bisect.")] = "racing",
    num_samples: Annotated[int, typer.Option(min=1, help="Continuations per step; what racing is measured by.")] = 4,
    criterion: Annotated[str, typer.Option(help="max, min or abs.")] = "max",
    delta: Annotated[float, typer.Option(help="Racing stops when it errs with at most this probability.")] = 0.1,
    proposal: Annotated[
        str | None, typer.Option(help="Where racing and bisect look first: logprob, mistake, entropy or gradient.")
    ] = None,
    step_splitter: Annotated[str, typer.Option(help=f"What a step is: {', '.join(METHODS)}.")] = "newline",
    step_pattern: Annotated[str | None, typer.Option(help="Regular expression of a step's end, for regex.")] = None,
    min_step_tokens: Annotated[int, typer.Option(help="A shorter step is merged with its neighbour.")] = 4,
    max_steps: Annotated[int, typer.Option(help="A trajectory with more steps is thinned evenly.")] = 64,
    min_steps: Annotated[int, typer.Option(help="A trajectory with fewer steps has its longest ones halved.")] = 1,
    num_problems: Annotated[int, typer.Option(min=1, help="Rows to take at most.")] = 32,
    num_generations: Annotated[int, typer.Option(min=1, help="Completions of a prompt that comes without one.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a report to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Show the steps of trajectories with their values, and the critical one.

    Rows with a `completion` are searched as they are; prompts without one are sampled first, and the worst
    completion of each prompt with right and wrong ones is searched.

    Example: `gpo-fast critical --model ./my-model --dataset problems.jsonl --criterion min --html critical.html`
    """
    from gpo_fast.launch import find_critical

    records = find_critical(
        dataset,
        model,
        reward,
        num_problems=num_problems,
        num_generations=num_generations,
        temperature=temperature,
        max_tokens=max_tokens,
        splitter=StepSplitter(
            step_splitter,
            pattern=step_pattern,
            min_tokens=min_step_tokens,
            max_steps=max_steps,
            min_steps=min_steps,
        ),
        seed=seed,
        n_samples=num_samples,
        criterion=criterion,
        estimator=estimator,
        delta=delta,
        proposal=proposal,
    )
    from gpo_fast.report import critical_table, write_critical_report

    if html is not None:
        write_critical_report(records, {"title": "Critical steps", "model": model, "algorithm": estimator}, html)
        print(html, file=sys.stderr)
    if as_json:
        for record in records:
            print(json.dumps(record))
        return
    from rich.console import Console

    Console().print(critical_table(records))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Path or hub id of the model.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="bbh, math-500, gsm8k, mmlu, mmlu-pro, aime-24, aime-25, reasoning_gym:TASK, a JSON-lines file, "
            "`module:function` or a hub id."
        ),
    ],
    reward: Annotated[
        str | None, typer.Option(help="A known reward or `module:function`; default: the benchmark's, or exact_match.")
    ] = None,
    num_problems: Annotated[int, typer.Option(min=1, help="Problems to sample at most.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Completions for each problem.")] = 1,
    k: Annotated[int, typer.Option("--k", help="Report pass@k: the chance that one of k completions is right.")] = 1,
) -> None:
    """Accuracy (pass@k) of a model on a benchmark or a data set, with a 95 % interval.

    Example: `gpo-fast eval --model gpo-demo/model --dataset problems.jsonl --reward reasoning_gym`
    """
    from gpo_fast.launch import evaluate_model

    result = evaluate_model(model, dataset, reward, num_problems, max_tokens, temperature, seed, num_samples, k)
    name = "accuracy" if k == 1 else f"pass@{k}"
    print(f"{name} {result.accuracy:.1%} (95 % interval {result.low:.1%} to {result.high:.1%}, n={result.n})")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file; in the run's folder.")] = None,
) -> None:
    """Write a run's report: one HTML file that needs no network.

    Example: `gpo-fast report gpo-demo`
    """
    from gpo_fast.report import write_report

    print(write_report(run, output))


def _add_benchmark(name: str, text: str) -> None:
    """`gpo-fast bench NAME`: every option is the script's own."""

    @bench.command(
        name,
        help=f"{text}\n\nExample: `gpo-fast bench {name} --quick`",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def measure(context: typer.Context) -> None:
        from gpo_fast.bench.suite import run

        sys.exit(run(name, context.args))


for _name, _benchmark in SUITE.items():
    _add_benchmark(_name, _benchmark.text)


@bench.command("all")
def bench_all(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for results and plots.")] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that all run.")] = False,
) -> None:
    """Run every benchmark at the sizes that this machine can take.

    Example: `gpo-fast bench all --quick`
    """
    from gpo_fast.bench.suite import run_all

    failed = [name for name, status in run_all(folder, quick).items() if status]
    if failed:
        raise ValueError(f"these benchmarks failed: {', '.join(failed)}")


@bench.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="JSON file of a benchmark.")],
    after: Annotated[Path, typer.Argument(help="JSON file of the same benchmark, from another time or machine.")],
) -> None:
    """Show how two results of one benchmark differ.

    Example: `gpo-fast bench compare before.json after.json`
    """
    from gpo_fast.bench.suite import compare

    compare(before, after).show()


@bench.command("readme")
def bench_readme() -> None:
    """Write the README's and docs/measured.md's tables of measured numbers, and draw the gain study's pictures.

    All of it is made from the results that are kept with the benchmarks.

    Example: `gpo-fast bench readme`
    """
    from gpo_fast.bench.readme import draw, tables, with_table

    for page, table in tables().items():
        page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")
        print(page)
    for picture in draw():
        print(picture)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--field value` and `--field=value` pairs as a mapping; values are read as YAML.

    Raises:
        ValueError: something that is not such a pair.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) == 2:
            raise ValueError(f"expected --field value, got {name!r}")
        name, has_value, value = name[2:].partition("=")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        overrides[name.replace("-", "_")] = _scalar(value)
    return overrides


def _scalar(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() and text[0] in "0123456789.+-" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text

"""`gpo-fast demo`: warm up, train with GPO, evaluate held-out problems before and after, write a report."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from transformers import TrainerCallback

from gpo_fast.config import GPOConfig
from gpo_fast.demo.model import adapter, fast_dtype, load_demo_model
from gpo_fast.demo.task import TERMS, held_out, solved, training
from gpo_fast.demo.warmup import warm_up
from gpo_fast.display import TrainingDisplay
from gpo_fast.evaluation import Accuracy, Gain, accuracy_of, gain_of
from gpo_fast.report import write_report
from gpo_fast.run_files import RunFiles, last_checkpoint
from gpo_fast.trainer import GPOTrainer

EVALUATION_SEED = 5


class Size(NamedTuple):
    """How large a demo is."""

    solve_rate: float  # at which the warm-up ends, ...
    warmup_steps: int  # ... or after so many steps
    seconds: float  # of GPO training
    problems: int  # held-out ones
    terms: tuple[int, int]  # fewest and most terms of a sum


FULL, QUICK = Size(0.25, 42, 240.0, 384, TERMS), Size(0.15, 14, 30.0, 128, (3, 4))


class TimeLimit(TrainerCallback):
    """Stops training when the run has used its seconds, time before an interruption included."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.run_files: RunFiles | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run_files is not None and self.run_files.time() >= self.seconds:
            control.should_training_stop = True
            control.should_save = True


class Progress(TrainerCallback):
    """Hands each iteration's metrics to the display."""

    def __init__(self, display: TrainingDisplay) -> None:
        self.display = display
        self.trainer: GPOTrainer | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "reward" in logs and self.trainer is not None:
            self.display.iteration(state.global_step, logs, self.trainer.run_files.time())


def run_demo(output: Path, *, quick: bool = False, compare: bool = False, seed: int = 0) -> None:
    """Runs the demo in the folder `output`; a demo that was cut off there goes on where it stood."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    size, console, started = QUICK if quick else FULL, Console(), time.perf_counter()
    RunFiles(output)  # refuses a folder that is something else
    console.print("[bold]gpo-fast demo[/bold]: SmolLM2-135M-Instruct learns chained sums with GPO on GRPO, offline")
    warm = _warm_model(output, size, console)
    results = [_train(output, warm, size, seed, use_gpo=True, console=console, compare=compare)]
    if compare:
        results.append(_train(output / "grpo", warm, size, seed, use_gpo=False, console=console))
    report = write_report(output)
    for name, (before, after, gain) in zip(("GPO-GRPO", "GRPO"), results):
        console.print(
            f"[bold]{name}[/bold]: {_words(before)} before, [bold]{_words(after)}[/bold] after, "
            f"a gain of {gain.gain:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
        )
    console.print(
        f"report {report}\nmodel  {output / 'model'}\ntime   {(time.perf_counter() - started) / 60:.1f} minutes"
    )


def _words(a: Accuracy) -> str:
    return f"{a.accuracy:.1%} ({a.low:.1%} to {a.high:.1%})"


def _warm_model(output: Path, size: Size, console: Console) -> Path:
    """The folder of the warmed-up model; made once for a run."""
    target = output / "warm"
    if (target / "config.json").is_file():
        console.print("warm-up: found, not repeated")
        return target
    output.mkdir(parents=True, exist_ok=True)
    # The folder is a run from here on: a demo that is cut off in its warm-up can be started again.
    RunFiles(output).begin({"title": "gpo-fast demo", "algorithm": "warm-up", "model": "SmolLM2-135M-Instruct"}, 0)
    model, tokenizer = load_demo_model(torch.float32)
    with TrainingDisplay(console) as display:
        display.phase("warm-up", size.warmup_steps)
        rate = warm_up(
            model,
            tokenizer,
            solve_rate=size.solve_rate,
            max_steps=size.warmup_steps,
            terms=size.terms,
            on_step=display.advance,
        )
    console.print(f"warm-up: {rate:.0%} of its check problems are solved")
    temporary = output / "warm.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(target)
    return target


def _train(
    output: Path, warm: Path, size: Size, seed: int, *, use_gpo: bool, console: Console, compare: bool = False
) -> tuple[Accuracy, Accuracy, Gain]:
    """Trains from the warmed-up model; accuracy before and after, and the gain."""
    model = transformers.AutoModelForCausalLM.from_pretrained(warm, dtype=fast_dtype(), local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(warm, local_files_only=True)
    name = "GPO-GRPO" if use_gpo else "GRPO"
    limit = TimeLimit(size.seconds)
    with TrainingDisplay(console, seconds=size.seconds) as display:
        progress = Progress(display)
        trainer = GPOTrainer(
            model=model,
            reward_funcs=solved,
            args=_config(output, seed, use_gpo),
            train_dataset=training(2048, terms=size.terms),
            processing_class=tokenizer,
            peft_config=adapter(),
            callbacks=[limit, progress],
            run_description={
                "title": f"gpo-fast demo: {name} on chained sums",
                "model": "SmolLM2-135M-Instruct",
                "algorithm": name,
                "notes": [
                    "Accuracy is of one sample at temperature 1 for each held-out problem, scored by reasoning_gym."
                ],
                **({"compare": {"label": "GRPO", "metrics": "grpo/metrics.jsonl"}} if compare else {}),
            },
            on_phase=display.phase,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        progress.trainer, limit.run_files = trainer, trainer.run_files
        display.phase("evaluate")
        checkpoint = last_checkpoint(output)
        before = _evaluate(trainer, size, base=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        display.phase("evaluate")
        after = _evaluate(trainer, size)
    step = trainer.state.global_step
    scores = [accuracy_of(before), accuracy_of(after)]
    for label, at, result in (("before", 0, scores[0]), ("after", step, scores[1])):
        trainer.run_files.metrics({"eval": {"step": at, "label": f"accuracy {label}", **result._asdict()}})
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    return scores[0], scores[1], gain_of(before, after)


def _evaluate(trainer: GPOTrainer, size: Size, base: bool = False) -> list[float]:
    """Rewards of the held-out problems, of the model without its adapter if `base`."""
    with trainer.model.disable_adapter() if base else nullcontext():
        return trainer.sample_rewards(held_out(size.problems, size.terms), seed=EVALUATION_SEED).tolist()


def _config(output: Path, seed: int, use_gpo: bool) -> GPOConfig:
    return GPOConfig(
        output_dir=str(output),
        seed=seed,
        use_gpo=use_gpo,
        baseline="optimal" if use_gpo else "mean",  # plain GRPO is the published one
        per_device_train_batch_size=24,
        num_generations=4,
        max_completion_length=48,
        criterion="min",
        reuse="all",
        steps_per_generation=2,
        max_batch_size=128,
        bf16=fast_dtype() == torch.bfloat16,
        learning_rate=4e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        max_grad_norm=0.3,
        weight_decay=0.0,
        max_steps=10_000,
        save_steps=10,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )

"""Bad input, and what each gets: the type of the error, and words that name the value and say what would be right.

The table is one list of cases; configurations are also made at random. tests/test_extension.py does the like for the
C++ extension.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_trainer import PROMPTS, build, config
from typer.testing import CliRunner

from gpo_fast import (
    _C,
    CriticalStepFinder,
    GPOConfig,
    PrefixCache,
    Request,
    RolloutEngine,
    SamplingParams,
    StepSplitter,
    TokenForest,
    build_preference_dataset,
    cli,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
    pack_forest,
)
from gpo_fast.benchmarks import load_benchmark
from gpo_fast.config import load_config
from gpo_fast.data import check_dataset, encode_prompt
from gpo_fast.evaluation import gain_of, pass_at_k, pass_at_k_of, wilson_interval
from gpo_fast.launch import evaluate_model, load_model, load_rows
from gpo_fast.report import write_report
from gpo_fast.rewards import CodeReward, RewardFunctions, get_reward
from gpo_fast.rollout.openai_backend import OpenAIBackend
from gpo_fast.run_files import RunFiles, read_records


class Case(NamedTuple):
    """A call with the folder for its files, and the error that it must raise."""

    name: str
    call: Callable[[Path], Any]
    error: type[Exception]
    words: str  # a regular expression


CASES: list[Case] = []


def case(name: str, words: str, call: Callable[[Path], Any], error: type[Exception] = ValueError) -> None:
    CASES.append(Case(name, call, error, words))


# -- configurations -----------------------------------------------------------------------------------------------

for changes, words in (
    ({"loss_type": "grppo"}, "loss_type must be one of .*got 'grppo'.*did you mean 'grpo'"),
    ({"loss_type": None}, "loss_type must be of the type str, got None"),
    ({"criterion": "mean"}, "criterion must be one of max, min, abs, got 'mean'"),
    ({"estimator": "race"}, "estimator must be one of .*did you mean 'racing'"),
    ({"reset": "middle"}, "reset must be one of before, after, got 'middle'"),
    ({"reuse": True}, "reuse must be of the type str, got True"),
    ({"search": "best"}, "search must be one of mixed, failed, worst, all, got 'best'"),
    ({"proposal": "attention"}, "proposal must be one of logprob, mistake, entropy, gradient"),
    ({"baseline": "median"}, "baseline must be one of mean, optimal"),
    ({"baseline": "optimal", "loss_type": "dpo"}, "got critic='group', loss_type='dpo'"),
    ({"baseline": "optimal", "loss_type": "awr"}, "got critic='group', loss_type='awr'"),
    ({"baseline": "optimal", "critic": "value_head"}, "got critic='value_head', loss_type='dapo'"),
    ({"packing": "trees"}, "packing must be one of tree, padded.*did you mean 'tree'"),
    ({"step_splitter": "newlines"}, "step_splitter must be one of .*did you mean 'newline'"),
    ({"step_splitter": "regex"}, "'regex' needs a pattern"),
    ({"step_splitter": "regex", "step_pattern": "("}, r"step pattern '\(' is not a regular expression"),
    ({"step_pattern": "x"}, "no other method takes one"),
    ({"num_generations": 0}, "num_generations must be at least 1 and finite, got 0"),
    ({"num_generations": 1}, "num_generations must be at least 2"),
    ({"num_generations": 2.5}, "num_generations must be of the type int, got 2.5"),
    ({"num_generations": "8"}, "num_generations must be of the type int, got '8'"),
    ({"num_generations": True}, "num_generations must be of the type int, got True"),
    ({"num_samples": 0}, "num_samples must be at least 1 and finite, got 0"),
    ({"num_samples": 3, "reuse": "split"}, "n_samples must be even, got 3"),
    ({"estimator": "bisect"}, "estimator='bisect' .*needs criterion='min'"),
    ({"num_resets": -1}, "num_resets must be at least 1 and finite, got -1"),
    ({"delta": 1.0}, "delta must be between 0 and 1, got 1.0"),
    ({"delta": float("nan")}, "delta must be a number, got nan"),
    ({"temperature": 0.0}, "temperature must be finite and above 0 in training, got 0.0"),
    ({"temperature": float("inf")}, "temperature must be finite and above 0 in training, got inf"),
    ({"temperature": float("nan")}, "temperature must be a number, got nan"),
    ({"top_k": -1}, r"top_k must be at least 0 \(0 is off\), got -1"),
    ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
    ({"top_p": 0.9, "steps_per_generation": 2}, "needs unfiltered sampling"),
    ({"max_completion_length": 0}, "max_completion_length must be at least 1 and finite, got 0"),
    ({"stop": "END"}, r"stop must be of the type list\[str\] \| None, got 'END'"),
    ({"stop": [""]}, "stop must hold strings that are not empty, got ''"),
    ({"steps_per_generation": 0}, "steps_per_generation must be at least 1 and finite, got 0"),
    ({"min_step_tokens": 0}, "min_tokens and max_steps must be at least 1, got 0"),
    ({"min_steps_per_trajectory": 65}, "min_steps must be between 1 and max_steps, 64, got 65"),
    ({"beta": -0.1}, "beta must be at least 0 and finite, got -0.1"),
    ({"epsilon": 1.0}, "epsilon must be below 1, got 1.0"),
    ({"epsilon_high": -1.0}, "epsilon_high must be at least 0 and finite, got -1.0"),
    ({"search_budget": -1.0}, "search_budget must be at least 0 and finite, got -1.0"),
    ({"max_searches": -1}, "max_searches must be at least 0 and finite, got -1"),
    ({"self_check_steps": -1}, "self_check_steps must be at least 0 and finite, got -1"),
    ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch must be at least 1 and finite, got 0"),
    ({"max_batch_size": 0}, "max_batch_size must be at least 1 and finite, got 0"),
    ({"kv_cache_memory": 0}, "kv_cache_memory must be at least 1 and finite, got 0"),
    ({"reward_timeout": 0.0}, "reward_timeout must be above 0 seconds, got 0.0"),
    ({"reward_weights": [1.0, float("nan")]}, r"reward_weights must be finite numbers, got \[1.0, nan\]"),
    ({"reward_weights": "1"}, r"reward_weights must be of the type list\[float\] \| None, got '1'"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must be 1, got 4"),
    ({"learning_rate": "fast"}, "learning_rate must be of the type float, got 'fast'"),
    ({"learning_rate": -1e-4}, "learning_rate must be at least 0 and finite, got -0.0001"),
    ({"optim": "adamm"}, "adamm.*Set were: .*optim="),
    ({"output_dir": 3}, "output_dir must be of the type str.*got 3"),
    ({"use_gpo": "yes"}, "use_gpo must be of the type bool, got 'yes'"),
):
    shown = ", ".join(f"{k}={v}" for k, v in changes.items())
    case(f"configuration {shown}", words, lambda folder, changes=changes: config(folder, **changes))


def read(text: str, overrides: dict[str, Any] | None = None) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        path = folder / "run.yaml"
        path.write_text(text, encoding="utf-8")
        options = {"output_dir": str(folder / "run"), "bf16": False, "use_cpu": True}
        return load_config(path, {**options, **(overrides or {})})

    return call


GOOD = "model: m\ndataset: d\nrewards: exact_match\n"
case("file: none", "no configuration file at", lambda f: load_config(f / "none.yaml"), FileNotFoundError)
case("file: not YAML", "is not valid YAML", read("a: [1"))
case("file: a list", "must hold a mapping of fields to values, got list", read("- 1"))
case("file: empty", "needs the field 'model'", read(""))
case("file: no rewards", "needs the field 'rewards'", read("model: m\ndataset: d\n"))
case("file: a number as name", r"names of fields must be text, got \[3\]", read(GOOD + "3: 4\n"))
case("file: a typo", "'learning_rat': did you mean 'learning_rate'", read(GOOD + "learning_rat: 1\n"))
case("file: rewards are a number", r"rewards must be of the type list\[str\], got 3", read(GOOD + "rewards: 3\n"))
case("file: empty rewards", "rewards must name one reward function", read(GOOD + "rewards: []\n"))
case("file: model is a list", "model must be of the type str", read(GOOD + "model: [m]\n"))
case("file: empty model", "model must not be empty", read(GOOD + "model: ''\n"))
case("file: dtype", "dtype must be one of auto, float32.*did you mean 'float16'", read(GOOD + "dtype: floot16\n"))
case("file: lora_r", "lora_r must be at least 0", read(GOOD + "lora_r: -1\n"))
case("file: merge_adapter", "set lora_r above 0", read(GOOD + "merge_adapter: true\n"))
case("file: trust_remote_code", "trust_remote_code must be of the type bool", read(GOOD + "trust_remote_code: sure\n"))

# -- the command line ---------------------------------------------------------------------------------------------

case("override: no dashes", "expected --field value, got 'max_steps'", lambda f: cli.parse_overrides(["max_steps"]))
case("override: no value", "--max_steps needs a value", lambda f: cli.parse_overrides(["--max_steps"]))
case("override: two fields", "--a needs a value", lambda f: cli.parse_overrides(["--a", "--b", "1"]))
case("override: bare dashes", "expected --field value, got '--'", lambda f: cli.parse_overrides(["--", "1"]))
case(
    "override: text for a number",
    "num_samples must be of the type int, got 'four'",
    read(GOOD, {"num_samples": "four"}),
)
case(
    "eval: k above n",
    "needs 1 <= k <= num_samples, got k=3",
    lambda f: evaluate_model("m", "d", None, 1, 8, 1.0, 0, 2, 3),
)
case(
    "eval: greedy samples",
    "at temperature 0 are all the same",
    lambda f: evaluate_model("m", "d", None, 1, 8, 0.0, 0, 2, 1),
)
case("eval: no benchmark", "unknown benchmark 'gsm9k'", lambda f: load_benchmark("gsm9k"))
case("report: no run", "is not a run: it has no run.json", lambda f: write_report(f), FileNotFoundError)

# -- data sets ----------------------------------------------------------------------------------------------------

case("data: empty", "train_dataset is empty", lambda f: build(f, train_dataset=[]))
case("data: none", "needs a train_dataset", lambda f: build(f, train_dataset=None))
case(
    "data: a generator",
    "must be a data set with a length.*generator",
    lambda f: build(f, train_dataset=(r for r in PROMPTS)),
)
case(
    "data: no prompt",
    "row 0 has no 'prompt' column .it has 'question'",
    lambda f: build(f, train_dataset=[{"question": "x"}]),
)
case(
    "data: no prompt further on",
    "row 1 has no 'prompt' column",
    lambda f: build(f, train_dataset=[{"prompt": "1"}, {}]),
)
case("data: rows are text", "no 'prompt' column .it has str", lambda f: build(f, train_dataset=["1+1="]))
case(
    "data: a number",
    "must be a string or a list of .*messages, got 3",
    lambda f: build(f, train_dataset=[{"prompt": 3}]),
)
case("data: no messages", r"must be a string or a list of .*got \[\]", lambda f: check_dataset([{"prompt": []}]))
case("data: no content", "must be a string or a list of", lambda f: check_dataset([{"prompt": [{"role": "user"}]}]))
case(
    "data: columns differ",
    "row 1 and row 0 must have the same columns.*'answer'",
    lambda f: check_dataset([{"prompt": "1", "answer": "2"}, {"prompt": "2"}]),
)
case("data: evaluation", "eval_dataset, row 0 has no 'prompt'", lambda f: build(f, eval_dataset=[{"x": 1}]))
case("data: empty prompt", "the prompt '' has no tokens", lambda f: encode_prompt("", tiny.tokenizer(), 64))
case(
    "data: long prompt",
    "a prompt has 300 tokens, but the model's context is 256",
    lambda f: encode_prompt("1" * 300, tiny.tokenizer(), 256),
)
case(
    "data: no template",
    "has no chat_template",
    lambda f: encode_prompt([{"role": "user", "content": "x"}], tiny.tokenizer(), 64),
)
case("data: no file", "no data set at", lambda f: load_rows(str(f / "none.jsonl"), "train"), FileNotFoundError)
case(
    "data: no module",
    "No module named 'no_such_module'",
    lambda f: load_rows("no_such_module:rows", "train"),
    ImportError,
)
case("data: no function", "'json' has no such function", lambda f: load_rows("json:rows", "train"))


def broken_file(folder: Path) -> Any:
    (folder / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt"\n{"prompt": "2"}\n')
    return load_rows(str(folder / "rows.jsonl"), "train")


case("data: a broken line", "rows.jsonl, line 2 is not JSON", broken_file)

# -- rewards ------------------------------------------------------------------------------------------------------


def reward(function: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda f: RewardFunctions(function, **options)(["p"] * 2, ["c"] * 2, [[1]] * 2, {})


case("reward: none", "at least one reward function", reward([]))
case("reward: a number", "must be callable, got 3", reward(3), TypeError)
case("reward: no such name", "unknown reward function 'maths'", lambda f: get_reward("maths"))
case("reward: no such function", "has no reward function 'nothing'", lambda f: get_reward("json:nothing"))
case("reward: weights", "1 reward functions need as many weights, got 2", reward(lambda **_: [0, 0], weights=[1, 2]))
case("reward: too few values", "returned 1 values for 2 completions", reward(lambda **_: [1.0]))
case("reward: no list", "must return a list of numbers, got float", reward(lambda **_: 1.0), TypeError)
case("reward: text", "returned 'good' for completion 0: not a number", reward(lambda **_: ["good", 1]), TypeError)
case("reward: NaN", "returned nan for completion 1: return None", reward(lambda **_: [0.0, float("nan")]))
case("reward: all None", "no reward function applies to 2 of 2", reward(lambda **_: [None, None]))
case("reward: code is off", "the reward 'code' runs programs.*is off", lambda f: CodeReward())
case("reward: no tests", "needs at least one test", lambda f: CodeReward(enable=True)(["x"], tests=[[]]))

# -- models, tokenizers, engines ----------------------------------------------------------------------------------


SHORT = Request([3], sampling=SamplingParams(max_tokens=4))


def engine(**options: Any) -> RolloutEngine:
    return RolloutEngine(tiny.model(), tiny.tokenizer(), **options)


def no_eos(folder: Path) -> Any:
    bare = tiny.tokenizer()
    return build(folder, processing_class=bare.__class__(tokenizer_object=bare.backend_tokenizer))


case(
    "model: sliding window",
    "models with sliding-window attention",
    lambda f: build(f, model=tiny.model("mistral", sliding_window=8)),
)
case("model: no folder", "no_such_model", lambda f: load_model(str(f / "no_such_model")), OSError)
case(
    "model: dropout",
    "dropout must be 0 .*p=0.1",
    lambda f: build(f, peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)),
)
case("tokenizer: none", "needs processing_class", lambda f: build(f, processing_class=None))
case("tokenizer: no end", "no eos_token", no_eos)
case("engine: batch of 0", "must be at least 1, got 0", lambda f: engine(max_batch_size=0))
case("engine: pages of 0", "block_size must be at least 1, got 0", lambda f: engine(block_size=0))
case("engine: little memory", "kv_cache_memory=8 bytes cannot hold one page", lambda f: engine(kv_cache_memory=8))
case(
    "engine: long request",
    "request 0 needs 200 prompt tokens .*context is 256",
    lambda f: engine().generate([Request([3] * 200)]),
)
case(
    "engine: foreign token",
    "request 0 has the token 64, but the model's tokens are 0 to 63",
    lambda f: engine().generate([Request([64])]),
)
case("engine: negative token", "request 0 has the token -1, but", lambda f: engine().generate([Request([3, -1])]))
case(
    "engine: too little for one",
    "alone may need .*give kv_cache_memory at least",
    lambda f: engine(kv_cache_memory=1 << 15).generate([Request([3] * 100, sampling=SamplingParams(max_tokens=100))]),
)
case(
    "engine: no such request",
    "request 5 is not one of this stream's 1",
    lambda f: engine().stream([SHORT]).cancel(5),
    IndexError,
)


def two_streams(folder: Path) -> Any:
    own = engine()
    first = own.stream([SHORT])
    try:
        return own.stream()
    finally:
        first.close()


case("engine: two streams", "a stream of this engine is still open", two_streams, RuntimeError)
case("request: empty", "token_ids is empty", lambda f: Request([]))
case("request: text", "must be a list or array of token ids, got 'abc'", lambda f: Request("abc"), TypeError)
case("request: fractions", "must be whole numbers in one dimension, got", lambda f: Request([1.5]), TypeError)
case("request: two dimensions", "must be whole numbers in one dimension", lambda f: Request([[1]]), TypeError)
case("request: n", "n must be at least 1, got 0", lambda f: Request([1], 0))
case("request: n is a fraction", "n must be a whole number, got 2.5", lambda f: Request([1], 2.5), TypeError)
case("request: seed", "seed must be a whole number, got 'x'", lambda f: Request([1], seed="x"), TypeError)
case(
    "sampling: temperature",
    "temperature must be at least 0 .* and finite, got -1",
    lambda f: SamplingParams(temperature=-1),
)
case("sampling: NaN", "temperature must be .*got nan", lambda f: SamplingParams(temperature=float("nan")))
case(
    "sampling: text", "temperature must be a number, got 'hot'", lambda f: SamplingParams(temperature="hot"), TypeError
)
case("sampling: top_k", "top_k must be a whole number, got 1.5", lambda f: SamplingParams(top_k=1.5), TypeError)
case("sampling: max_tokens", "max_tokens must be at least 1, got 0", lambda f: SamplingParams(max_tokens=0))
case("sampling: stop", "stop must be a tuple of strings", lambda f: SamplingParams(stop="END"), TypeError)
case("sampling: stop tokens", "stop_token_ids must be a tuple", lambda f: SamplingParams(stop_token_ids=3), TypeError)
case(
    "sampling: a stop token",
    "must be a whole number, got 'x'",
    lambda f: SamplingParams(stop_token_ids=("x",)),
    TypeError,
)
case("server: url", "must start with http", lambda f: OpenAIBackend("localhost", "m", None))
case(
    "server: mode",
    "mode must be 'tokens' or 'text', got 'ids'",
    lambda f: OpenAIBackend("http://x", "m", None, mode="ids"),
)
case("server: timeout", "timeout above 0, got", lambda f: OpenAIBackend("http://x", "m", None, timeout=0))

# -- steps and the search -----------------------------------------------------------------------------------------

case("steps: method", "unknown step splitter 'lines'", lambda f: StepSplitter("lines"))
case("steps: pattern", "is not a regular expression", lambda f: StepSplitter("regex", pattern="["))
case("steps: limit", "must be at least 1, got 0", lambda f: StepSplitter(min_tokens=0))
case(
    "steps: a cut outside",
    r"must be token positions in 0..3, got 9",
    lambda f: StepSplitter(lambda ids, t: [9]).split([1, 2, 3], None),
)
case("search: samples", "n_samples must be at least 1, got 0", lambda f: CriticalStepFinder(engine(), len, n_samples=0))
case("search: criterion", "criterion must be one of", lambda f: CriticalStepFinder(engine(), len, criterion="mean"))
case(
    "search: range",
    r"reward_range must be \(lowest, highest\), got \(1, 0\)",
    lambda f: CriticalStepFinder(engine(), len, reward_range=(1, 0)),
)
case("search: proposal", "proposal must be .*got 'x'", lambda f: CriticalStepFinder(engine(), len, proposal="x"))
case(
    "preferences: format",
    "format must be one of .*got 'ppo'",
    lambda f: build_preference_dataset(tiny.model(), ["1"], len, tiny.tokenizer(), "ppo"),
)
case(
    "preferences: resets",
    "num_resets must be at least 2, got 1",
    lambda f: build_preference_dataset(tiny.model(), ["1"], len, tiny.tokenizer(), num_resets=1),
)

# -- tensors ------------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT = torch.randn(4, 8), torch.randn(16, 8)
TARGETS = torch.tensor([1, 2, 3, 4])


def logprob(
    hidden: Any = HIDDEN, weight: Any = WEIGHT, targets: Any = TARGETS, **options: Any
) -> Callable[[Path], Any]:
    return lambda f: linear_logprob(hidden, weight, targets, **options)


def policy(
    advantages: Any = None, targets: Any = TARGETS, loss_type: Any = "grpo", **options: Any
) -> Callable[[Path], Any]:
    given = torch.ones(1) if advantages is None else advantages
    return lambda f: linear_policy_loss(HIDDEN, WEIGHT, targets, loss_type=loss_type, advantages=given, **options)


def preference(**options: Any) -> Callable[[Path], Any]:
    values = {"loss_type": "dpo", "sequence_ids": torch.tensor([0, 0, 1, 1]), "ref_logprobs": torch.zeros(4), **options}
    return lambda f: linear_preference_loss(HIDDEN, WEIGHT, TARGETS, **values)


case("tensor: hidden is a list", "hidden must be a tensor, got list", logprob(hidden=[[1.0]]), TypeError)
case("tensor: hidden of one dimension", r"hidden must be .* got torch.float32 \(8,\)", logprob(hidden=torch.randn(8)))
case(
    "tensor: whole hidden",
    "hidden must be a floating-point tensor.*int64",
    logprob(hidden=torch.ones(4, 8, dtype=torch.int64)),
)
case("tensor: width", r"weight must have the shape \(V, 8\).*got \(16, 9\)", logprob(weight=torch.randn(16, 9)))
case("tensor: dtypes", "must have one dtype .*float32 and torch.float64", logprob(weight=WEIGHT.double()))
case("tensor: bias", r"bias must have the shape \(16,\), got \(3,\)", logprob(bias=torch.zeros(3)))
case(
    "tensor: target beyond",
    r"targets must be in \[0, 16\) or -100, got 16",
    logprob(targets=torch.tensor([1, 2, 3, 16])),
)
case(
    "tensor: negative target",
    r"targets must be in \[0, 16\) or -100, got -1",
    logprob(targets=torch.tensor([1, 2, 3, -1])),
)
case("tensor: int32 targets", "targets must be int64, got torch.int32", logprob(targets=TARGETS.int()))
case("tensor: fewer targets", r"targets must have the shape \(4,\)", logprob(targets=TARGETS[:3]))
case("tensor: temperature", "temperature must be positive, got 0", logprob(temperature=0.0))
case("tensor: NaN temperature", "temperature must be positive, got nan", logprob(temperature=float("nan")))
case("tensor: softcap", "softcap must be positive or None, got -1", logprob(softcap=-1.0))
case("tensor: adapter", r"lora must be \(A \(r, 8\)", logprob(lora=(torch.zeros(2, 9), torch.zeros(16, 2), 1.0)))
case(
    "tensor: other device",
    "hidden, weight, targets must be on one device.*cpu.*meta",
    logprob(weight=WEIGHT.to("meta")),
)
case("tensor: offsets", "row_offsets must ascend from 0", logprob(row_offsets=torch.tensor([0, 2, 1, 3, 4])))
case(
    "tensor: equal targets of a row",
    "targets of one row must be distinct",
    logprob(targets=torch.tensor([1, 1, 2, 3]), row_offsets=torch.tensor([0, 2, 2, 3, 4])),
)
case(
    "tensor: advantages",
    r"advantages must be per sequence \(1,\) or per token \(4,\).*got \(3,\)",
    policy(torch.ones(3)),
)
case("tensor: loss", "loss_type must be one of .*got 'sgd'", policy(loss_type="sgd"))
case("tensor: NaN epsilon", r"epsilon must be in \[0, 1\), got nan", policy(epsilon=float("nan")))
case("tensor: beta without a reference", "beta = 0.1 needs ref_logprobs", policy(beta=0.1))
case("tensor: old logprobs", r"old_logprobs must have the shape \(4,\)", policy(old_logprobs=torch.zeros(5)))
case(
    "tensor: sequences without order",
    "sequence_ids must be ascending",
    policy(torch.ones(2), sequence_ids=torch.tensor([1, 0, 0, 1])),
)
case("tensor: sequence dtype", "sequence_ids must be int64", policy(sequence_ids=torch.zeros(4)))
case(
    "tensor: steps",
    r"step_ids .* must be in \[0, 2\).*got 0 to 5",
    policy(torch.ones(2), step_ids=torch.tensor([0, 1, 1, 5])),
)
case("tensor: normaliser", "num_tokens must be one positive number, got 0", policy(num_tokens=0))
case("tensor: length", "dr_grpo needs max_completion_length", policy(loss_type="dr_grpo"))
case("tensor: rloo per token", "rloo has one ratio per sequence", policy(torch.ones(4), loss_type="rloo"))
case(
    "tensor: odd pairs",
    "needs pairs: the number of sequences must be even, got 1",
    preference(sequence_ids=torch.zeros(4, dtype=torch.int64)),
)
case("tensor: no reference", "dpo needs ref_logprobs", preference(ref_logprobs=None))
case("tensor: NaN beta", "beta must be positive, got nan", preference(beta=float("nan")))
case("tensor: kto", "kto needs desirable", preference(loss_type="kto"))

# -- forests ------------------------------------------------------------------------------------------------------


def forest() -> TokenForest:
    made = TokenForest()
    made.branch(made.add_prompt([1, 2, 3]), 3, [4, 5])
    return made


case("forest: empty prompt", "a prompt needs at least one token", lambda f: TokenForest().add_prompt([]))
case("forest: beyond the path", "has 5 tokens, cannot branch at 9", lambda f: forest().branch(1, 9, [1]))
case("forest: at the start", "cannot branch at 0", lambda f: forest().branch(1, 0, [1]))
case(
    "forest: logprobs", "2 tokens need as many logprobs, got 1", lambda f: forest().branch(1, 3, [1, 2], logprobs=[0.0])
)
case("forest: no such node", "the forest has the nodes 0 to 1, got the node 7", lambda f: forest().branch(7, 1, [1]))
case("packing: no such branch", "has the nodes 0 to 1, got the branch 7", lambda f: pack_forest(forest(), [7]))
case("packing: nothing", "nothing to train", lambda f: pack_forest(TokenForest()))
case(
    "packing: loss on the first token",
    "its loss must start at a depth",
    lambda f: pack_forest(forest(), [1], loss_starts=[0]),
)
case(
    "packing: starts",
    "1 branches need as many loss_starts, got 2",
    lambda f: pack_forest(forest(), [1], loss_starts=[1, 2]),
)

# -- the prefix cache ---------------------------------------------------------------------------------------------

case("cache: no pages", "num_blocks must be at least 1, got 0", lambda f: PrefixCache(0))
case("cache: pages of 0", "block_size must be at least 1, got 0", lambda f: PrefixCache(4, 0))
case("cache: too many slots", "must be below 2.31", lambda f: PrefixCache(2**30, 16))
case("cache: no tokens", "open needs at least one token", lambda f: PrefixCache(4).open([]))
case(
    "cache: text",
    "tokens must be an integer, or a list or array of integers",
    lambda f: PrefixCache(4).open("ab"),
    TypeError,
)
case("cache: fractions", "tokens must be an integer, or a list", lambda f: PrefixCache(4).open([1.5]), TypeError)
case("cache: large token", "tokens must fit an int32, got 1099511627776", lambda f: PrefixCache(4).open([1 << 40]))
case("cache: no such handle", "no live sequence has the handle 77", lambda f: PrefixCache(4).release(77))
case("cache: negative eviction", "cannot evict -1 pages", lambda f: PrefixCache(4).evict(-1))
case("cache: old epoch", "must be above the last one, 0", lambda f: PrefixCache(4).begin_epoch(0))
case("cache: format", 'format must be "text" or "dot", got "svg"', lambda f: PrefixCache(4).snapshot("svg"))


def cache_with(call: Callable[[PrefixCache, int], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        cache = PrefixCache(2, 2)
        sequence, _ = cache.open([1, 2, 3])
        return call(cache, sequence)

    return run


case("cache: negative length", "a length must not be negative, got -1", cache_with(lambda c, s: c.reserve([s], -1)))
case("cache: lengths", "lengths add up to 5, but 2", cache_with(lambda c, s: c.append([s], [1, 2], [5])))
case(
    "cache: full",
    "no free KV block is left",
    cache_with(lambda c, s: c.append([s], list(range(9)), [9])),
    _C.OutOfBlocks,
)
case("cache: fork beyond", "position 9 is not within", cache_with(lambda c, s: c.fork([s], 9, 1)))
case("cache: negative forks", "cannot make -1 forks", cache_with(lambda c, s: c.fork([s], 0, -1)))
case("cache: named twice", "named twice", cache_with(lambda c, s: c.release([s, s])))
case("cache: pin below 0", "pos must not be negative, got -1", cache_with(lambda c, s: c.pin(s, 0, -1)))
case("cache: unpin a sequence", "not a pin", cache_with(lambda c, s: c.unpin(s)))

# -- numbers and files --------------------------------------------------------------------------------------------

case("interval: none", "n >= 1, got 0 of 0", lambda f: wilson_interval(0, 0))
case("pass@k: k", "got k=3, 1 of 2", lambda f: pass_at_k(1, 2, 3))
case("pass@k: nothing", "needs at least one problem", lambda f: pass_at_k_of([], 1))
case("gain: lengths", "two lists of equal length", lambda f: gain_of([1.0], [1.0, 0.0]))


def other_folder(folder: Path) -> Any:
    (folder / "thesis.txt").write_text("keep me")
    return RunFiles(folder)


def a_file(folder: Path) -> Any:
    (folder / "run").write_text("")
    return RunFiles(folder / "run")


def broken_records(folder: Path) -> Any:
    (folder / "metrics.jsonl").write_text("{\n{}\n")
    return read_records(folder / "metrics.jsonl")


case("run: another folder", "is not empty and not a run", other_folder, FileExistsError)
case("run: a file", "is a file: give a folder", a_file, FileExistsError)
case("run: broken records", "metrics.jsonl, line 1 is not JSON", broken_records)
case("run: no checkpoint", "is not a whole checkpoint: it has no gpo_state.json", lambda f: build(f).train(str(f)))


@pytest.mark.parametrize("bad", CASES, ids=lambda c: c.name)
def test_bad_input_gets_its_error(tmp_path: Path, bad: Case) -> None:
    with pytest.raises(bad.error) as caught:
        bad.call(tmp_path)
    assert type(caught.value) is bad.error or bad.error is not ValueError, "a subclass says something else"
    assert re.search(bad.words, str(caught.value), re.DOTALL), str(caught.value)


def test_the_table_is_long_and_has_no_case_twice() -> None:
    assert len({c.name for c in CASES}) == len(CASES) >= 100


# -- any value in any field ---------------------------------------------------------------------------------------

FIELDS = [f.name for f in dataclasses.fields(GPOConfig) if f.init]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.one_of(st.integers(), st.text(max_size=4), st.floats()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.binary(max_size=4),
    st.sampled_from(
        ["no", "steps", "epoch", "all", "tree", "racing", "min", "regex", "adamw_torch", "cosine", object()]
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=2))
def test_a_configuration_is_valid_or_names_its_field(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    error = ""
    try:
        made = config(folder, **values)
    except (ValueError, TypeError) as refused:
        error = str(refused)
    else:
        made.splitter()
        made.sampling_params()
    named = [*values, *(_SAID_AS[n] for n in values if n in _SAID_AS)]
    assert not error or any(name in error for name in named), f"{values!r}: {error}"


# Fields that are checked where they are used, under the name that they have there.
_SAID_AS = {
    "min_step_tokens": "min_tokens",
    "max_steps_per_trajectory": "max_steps",
    "min_steps_per_trajectory": "min_steps",
    "step_pattern": "pattern",
    "num_samples": "n_samples",
}


# -- the command line's own words ----------------------------------------------------------------------------------


def test_the_command_line_says_errors_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for arguments, words in (
        (["train", "none.yaml"], "no configuration file at none.yaml"),
        (["report", "none"], "none is not a run"),
        (["critical", "--model", "m", "--dataset", "none.jsonl"], "no data set at none.jsonl"),
    ):
        monkeypatch.setattr("sys.argv", ["gpo-fast", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("gpo-fast: ")
        assert words in said
        assert len(said.splitlines()) == 1
    for option, value in (
        ("--num-problems", "0"),
        ("--max-tokens", "-1"),
        ("--temperature", "-1"),
        ("--num-samples", "x"),
    ):
        done = CliRunner().invoke(cli.app, ["eval", "--model", "m", "--dataset", "d", option, value])
        assert done.exit_code == 2
        assert option in re.sub(r"\x1b\[[0-9;]*m", "", done.output)

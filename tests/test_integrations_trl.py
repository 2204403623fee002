"""GPO inside TRL: drop-in, the same loss as TRL's where GPO is off, and the rows that TRL expects where it is on."""

from __future__ import annotations

import difflib
import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, TrainerCallback

trl = pytest.importorskip("trl")

from gpo_fast.baseline import gradient_size  # noqa: E402
from gpo_fast.integrations.trl import GPOConfig, GPOTrainer  # noqa: E402
from gpo_fast.integrations.trl_rewards import LocalRewards  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def digits(completions, answer, **_):
    assert len(answer) == len(completions)
    return [sum(x.isdigit() for x in c) / max(1, len(c)) for c in completions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    policy().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def policy(**changes):
    return tiny.model(**{"vocab_size": len(tiny.tokenizer()), "initializer_range": 0.05, **changes})


@cache
def dataset():
    import datasets

    return datasets.Dataset.from_list(ROWS)


def options(folder: Path, **changes) -> dict:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    return {**values, **changes}


def gpo(folder: Path, model=None, rewards=digits, trainer=None, **changes) -> GPOTrainer:
    return GPOTrainer(
        model if model is not None else policy(),
        rewards,
        args=GPOConfig(
            **options(folder, **{"num_samples": 2, "step_splitter": "tokens", "search_budget": None, **changes})
        ),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
        **(trainer or {}),
    )


def test_the_reward_rises_with_gpo(tmp_path: Path) -> None:
    run = gpo(tmp_path, max_steps=20, per_device_train_batch_size=16)
    run.train()
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    entry = run.state.log_history[0]
    assert entry["gpo/searched_groups"] > 0
    assert entry["gpo/search_tokens"] > 0


def test_no_secret_is_in_what_is_saved(tmp_path: Path) -> None:
    run = gpo(tmp_path / "run", hub_token="hf_hunter2")
    assert run.args.hub_token == "hf_hunter2"
    run.save_model(str(tmp_path / "saved"))
    run.create_model_card("model")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


def test_a_reward_model_scores_a_search_as_trl_scores_the_rows(tmp_path: Path) -> None:
    config = policy().config.__class__.from_dict({**policy().config.to_dict(), "num_labels": 1})
    scorer = AutoModelForSequenceClassification.from_config(config)
    run = gpo(tmp_path, rewards=[scorer, digits], trainer={"reward_processing_classes": [tiny.tokenizer(), None]})
    completions = ["12", "ab3", "x"]
    ids = [tiny.tokenizer()(c)["input_ids"] for c in completions]
    theirs = run._calculate_rewards(ROWS[:3], [r["prompt"] for r in ROWS[:3]], completions, ids)
    ours = LocalRewards(run).score(ROWS[:3], completions, ids)
    assert ours == pytest.approx((theirs.double() * run.reward_weights).sum(1).tolist(), rel=1e-5)
    assert len(set(ours)) == 3


def test_rows_keep_trls_counts_and_prefixes_have_no_loss(tmp_path: Path) -> None:
    run = gpo(tmp_path, reset_share=0.5, min_step_tokens=2)
    run.model.train()
    rows = [ROWS[i] for i in (3, 3, 3, 3, 7, 7, 7, 7)]
    output = run._generate_and_score_completions(rows)
    mask, length = output["tool_mask"], output["completion_mask"].sum(1)
    assert output["completion_ids"].shape[0] == len(rows)
    assert int(length.max()) <= 12
    kept = [(row == 0).sum().item() for row in mask]
    assert {g.first for g in run._groups} == {0, 4}
    for first in (0, 4):
        assert kept[first : first + 2] == [0, 0]
        assert kept[first + 2] == kept[first + 3], "both rollouts start from the same critical step"
        cut = kept[first + 2]
        resets = output["completion_ids"][first + 2 : first + 4]
        assert (resets[0, :cut] == resets[1, :cut]).all()
        assert (length[first + 2 : first + 4] > cut).all()
        # The advantages of rollouts from one state are centred on that state.
        assert output["advantages"][first + 2 : first + 4].sum().abs() < 1e-5
    assert sum(kept) > 0
    assert int(output["num_items_in_batch"]) == int((output["completion_mask"] * mask).sum())
    assert list(run._logs["advantages"]) == pytest.approx(output["advantages"].tolist())


def test_base_rows_are_compared_with_all_completions_of_their_prompt(tmp_path: Path) -> None:
    run = gpo(tmp_path, scale_rewards="none", reset_share=0.5)
    run.model.train()
    output = run._generate_and_score_completions([ROWS[3]] * 4 + [ROWS[7]] * 4)
    for group in run._groups:
        rewards = torch.tensor(group.base_rewards)
        expected = rewards[:2] - rewards.mean()
        assert torch.allclose(output["advantages"][group.first : group.first + 2], expected, atol=1e-6)


@pytest.mark.parametrize("use_gpo", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_rows_are_compared_with_the_optimal_baseline(tmp_path: Path, use_gpo: bool, loss_type: str) -> None:
    run = gpo(tmp_path, baseline="optimal", use_gpo=use_gpo, loss_type=loss_type, scale_rewards="none", max_steps=1)
    run.model.train()
    output = run._generate_and_score_completions([ROWS[3]] * 4 + [ROWS[7]] * 4)
    texts = [run.processing_class.decode(row.token_ids, skip_special_tokens=True) for row in run._rows]
    rewards, kept = digits(texts, [0] * 8), run._kept(run._nodes)
    averaged = loss_type == "grpo"
    sizes = [gradient_size(row.sampling_logprobs[cut:], averaged=averaged) for row, cut in zip(run._rows, kept)]
    searched = {group.first: group for group in run._groups}
    assert (len(searched) > 0) == use_gpo

    def lower(values, weights) -> float:
        return min(np.average(values, weights=weights), np.mean(values))

    for first in (0, 4):
        states = [slice(first, first + 4)]
        if first in searched:
            states = [slice(first + 2, first + 4)]
            of_all = [gradient_size(logprobs, averaged=averaged) for logprobs in searched[first].base_logprobs]
            b = lower(searched[first].base_rewards, of_all)
            assert len(of_all) == 4
            assert of_all[:2] == sizes[first : first + 2]
            expected = [reward - b for reward in rewards[first : first + 2]]
            assert output["advantages"][first : first + 2].tolist() == pytest.approx(expected, abs=1e-6)
        for rows in states:
            b = lower(rewards[rows], sizes[rows])
            assert output["advantages"][rows].tolist() == pytest.approx([r - b for r in rewards[rows]], abs=1e-6)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0


class Gradients(TrainerCallback):
    """Keeps the first step's gradients."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        if not self.kept:
            self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def fixed_rollouts(prompts, trainer) -> dict:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 12, (len(prompts),), generator=generator).tolist()
    ids = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]
    prompt_ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "temperature": 0.7},
        {"loss_type": "dr_grpo", "entropy_coef": 0.3},
        {"loss_type": "dapo", "beta": 0.2},
        {"loss_type": "cispo", "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_without_gpo_loss_and_gradients_are_trls(tmp_path: Path, saved: str, changes: dict, adapter: bool) -> None:
    found = []
    for config, trainer in ((trl.GRPOConfig, trl.GRPOTrainer), (GPOConfig, GPOTrainer)):
        own = {"use_gpo": False} if config is GPOConfig else {}
        gradients = Gradients()
        run = trainer(
            saved,
            digits,
            args=config(**options(tmp_path, max_grad_norm=0.0, max_steps=1, **{**changes, **own})),
            train_dataset=dataset(),
            processing_class=tiny.tokenizer(),
            rollout_func=fixed_rollouts,
            callbacks=[gradients],
            peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
            if adapter
            else None,
        )
        run.train()
        entry = run.state.log_history[0]
        found.append((entry["loss"], entry["entropy"], gradients.kept))
    (loss, entropy, theirs), (own_loss, own_entropy, ours) = found
    assert own_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert own_entropy == pytest.approx(entropy, rel=1e-5)
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo", "beta": 0.2},
        {"loss_type": "dapo", "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {"loss_type": "bnpo", "importance_sampling_level": "sequence", "gradient_checkpointing": False},
        {"loss_type": "dr_grpo", "entropy_coef": 0.3, "temperature": 0.7},
        {"loss_type": "cispo", "num_iterations": 2, "max_steps": 2},
        {"loss_type": "grpo", "use_gpo": False},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_tree_packing_gives_the_loss_and_gradients_of_the_padded_rows(
    tmp_path: Path, saved: str, changes: dict, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpo_fast.integrations import trl_packing

    sizes = []
    original = trl_packing.pack_forest

    def counting(*arguments, **keywords):
        packed = original(*arguments, **keywords)
        sizes.append((packed.unique_tokens, packed.padded_tokens))
        return packed

    monkeypatch.setattr(trl_packing, "pack_forest", counting)
    found = []
    for packing in ("padded", "tree"):
        gradients = Gradients()
        lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
        torch.manual_seed(7)  # of the adapter
        run = gpo(
            tmp_path,
            saved,
            trainer={"callbacks": [gradients], "peft_config": lora if adapter else None},
            **{"max_grad_norm": 0.0, "max_steps": 1, "min_step_tokens": 2, "packing": packing, **changes},
        )
        run.train()
        entries = [entry for entry in run.state.log_history if "loss" in entry]
        found.append(([(e["loss"], e["entropy"], e.get("kl", 0.0)) for e in entries], gradients.kept))
        assert bool(sizes) == (packing == "tree")
        assert (sum(map(len, (r.base_rewards for r in run._groups))) > 0) == run.args.use_gpo
    assert sum(unique for unique, _ in sizes) < sum(padded for _, padded in sizes)
    (losses, theirs), (own_losses, ours) = found
    for numbers, own_numbers in zip(losses, own_losses, strict=True):
        assert own_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert set(theirs) == set(ours)
    assert any(gradient.norm() > 0 for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "uniform"},
        {"estimator": "racing", "racing_delta": 0.3, "proposal": "gradient"},
        {"estimator": "bisect", "criterion": "min", "proposal": "entropy"},
        {"estimator": "random", "search": lambda rewards: [int(rewards[0].argmin())]},
        {"estimator": "proposal", "search": "worst"},
        {"estimator": "proposal", "search": "failed"},
        {"estimator": "uniform", "reuse": "all", "num_samples": 2},
        {"search_budget": 1e-9},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
@pytest.mark.parametrize("packing", ["padded", "tree"])
def test_every_search_fills_the_rows(tmp_path: Path, changes: dict, packing: str) -> None:
    """The rows' prefixes are their trajectory's, and as many are searched as the options say."""
    run = gpo(tmp_path, packing=packing, min_step_tokens=2, max_steps=1, **changes)
    found, drawn = [], []
    log, draw = run._log_search, run._from_critical_steps
    run._log_search = lambda steps: (found.extend(steps), log(steps))
    run._from_critical_steps = lambda *a: drawn.extend(zip([a[0][i] for i in a[1]], result := draw(*a))) or result
    run.train()
    one = "search_budget" in changes or callable(changes.get("search"))
    expected = 0 if changes.get("search") == "failed" else 1 if one else 2
    assert len(run._groups) == len(found) == len(drawn) == expected
    reused = [step.reusable[:2] for step in found]
    assert any(reused) == ("reuse" in changes)
    for (trajectory, (cut, continuations)), step, taken in zip(drawn, found, reused, strict=True):
        assert cut == step.token_position
        assert continuations[: len(taken)] == taken
        assert len(continuations) == run.args.num_resets == 2
        for continuation in continuations:
            assert continuation.prompt_token_ids == [*trajectory.prompt_token_ids, *trajectory.token_ids[:cut]]


def test_options_of_our_own_trainer_have_the_same_name_and_default() -> None:
    import dataclasses

    import gpo_fast

    theirs = {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(GPOConfig) if f.name not in theirs}
    native = {f.name: f.default for f in dataclasses.fields(gpo_fast.GPOConfig)}
    assert set(ours) - set(native) == {"reset_share", "racing_delta", "use_rollout_engine", "use_fused_head"}
    assert native["delta"] == ours["racing_delta"]
    different = {name for name in set(ours) & set(native) if ours[name] != native[name]}
    assert different == {"packing", "baseline"}, "tree packing and another baseline are asked for under TRL"


def test_the_fused_head_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpo_fast.integrations import trl_head

    calls = []
    original = trl_head.logprobs_and_entropy

    def counting(*arguments, **keywords):
        calls.append(arguments[1].shape)
        return original(*arguments, **keywords)

    monkeypatch.setattr(trl_head, "logprobs_and_entropy", counting)
    gpo(tmp_path, max_steps=1).train()
    assert calls
    calls.clear()
    gpo(tmp_path, max_steps=1, use_fused_head=False).train()
    assert not calls


def test_adapters_conversations_async_rewards_and_checkpoints(tmp_path: Path) -> None:
    import datasets

    tokenizer = tiny.tokenizer().__class__(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}q:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    seen = []

    async def later(completions, trainer_state, **_):
        seen.append(trainer_state.global_step)
        return [float(len(c[0]["content"])) for c in completions]

    def never(completions, log_metric, **_):
        log_metric("mine", 1.0)
        return [None] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in ROWS]
    run = GPOTrainer(
        policy(),
        [later, never],
        args=GPOConfig(**options(tmp_path, save_strategy="steps", save_steps=2, num_iterations=2, beta=0.0)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0),
    )
    run.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "https://huggingface.co/papers/2509.16456" in card
    assert "arXiv:2402.03300" in card, "the base algorithm's paper"
    assert seen
    assert run.state.log_history[0]["mine"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset_share": 0.25}, "at least 2 are needed"),
        ({"reset_share": 1.5}, "reset_share must be above 0"),
        ({"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, "divisible"),
        ({"use_rollout_engine": False}, "needs the rollout engine"),
        ({"repetition_penalty": 1.1}, "with repetition_penalty=1.1"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"estimator": "bisect"}, "needs criterion='min'"),
        ({"estimator": "races"}, "estimator must be one of"),
        ({"search": "all"}, "search must be one of mixed, failed, worst, got 'all'"),
        ({"baseline": "median"}, "baseline must be one of mean, optimal, got 'median'"),
        ({"baseline": "optimal", "use_gpo": False, "use_rollout_engine": False}, "'optimal' needs use_rollout_engine"),
        ({"baseline": "optimal", "use_gpo": False, "repetition_penalty": 1.1}, "records, and it cannot sample with"),
        (
            {"baseline": "optimal", "use_gpo": False, "multi_objective_aggregation": "normalize_then_sum"},
            "baseline='optimal' needs multi_objective_aggregation",
        ),
        ({"packing": "tree", "use_fused_head": False}, "packing='tree' needs use_rollout_engine=True"),
        ({"packing": "tree", "use_gpo": False, "repetition_penalty": 1.1}, "packing='tree' needs the rollout engine"),
        ({"packing": "tree", "cast_lm_head_to_fp32": True}, "packing='tree' needs the fused head"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpo(tmp_path, **changes)


def test_the_plain_script_becomes_ours_in_ten_lines(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = ((EXAMPLES / name).read_text().splitlines() for name in ("trl_grpo.py", "trl_gpo.py"))
    changed = [line for line in difflib.unified_diff(plain, ours, n=0) if line[:1] == "+" and line[:3] != "+++"]
    assert len(changed) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("trl_grpo.py", "trl_gpo.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 30
        monkeypatch.setattr(sys, "argv", [name, saved, "2"])
        state = runpy.run_path(str(EXAMPLES / name), run_name="__main__")["trainer"].state
        assert state.global_step == 2
        json.dumps(state.log_history)


TWO_PROCESSES = """
import datasets, os, sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import tiny
from test_integrations_trl import GPOConfig, GPOTrainer, ROWS, digits, options, policy

rank = int(os.environ["RANK"])
reward = digits if rank == 0 else lambda completions, **_: [0.0] * len(completions)
model = policy()
start = torch.cat([p.detach().flatten() for p in model.parameters()])
config = GPOConfig(**options(sys.argv[2], per_device_train_batch_size=4, max_steps=3, step_splitter="tokens",
                             packing="tree"))
run = GPOTrainer(model, reward, args=config, train_dataset=datasets.Dataset.from_list(ROWS),
                 processing_class=tiny.tokenizer())
run.train()
end = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.zeros_like(end) for _ in range(2)]
dist.all_gather(both, end)
assert torch.equal(*both), "the processes' weights differ"
assert not torch.equal(start, end)
"""


@pytest.mark.slow
def test_two_processes_of_which_one_has_nothing_to_search(tmp_path: Path) -> None:
    """Neither waits for the other's search, and both end with the same weights."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(Path(__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""The rollout engine against transformers' own generation, teacher forcing, and itself under other schedules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import tiny
import torch

from gpo_fast import _C, Request, RolloutEngine, SamplingParams

KINDS = ["llama", "qwen2", "qwen3", "mistral"]  # those that the packed forward pass runs
MODELS: dict[str, dict[str, Any]] = {  # head sizes 32 to 256, 1 to 8 query heads for a key head
    "llama": {"head_dim": 64, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2": {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"head_dim": 48, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 70},
    "phi3": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "olmo2": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
}
FORWARD_PASSES = ["amx", "avx512", "avx2", "portable", "the model's own modules"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@contextmanager
def forward_pass(kernels: str) -> Iterator[bool]:
    """Chooses the CPU kernels, or skips the test; gives the engine's `fast_forward`."""
    best = _C.cpu_kernels()
    try:
        if kernels in FORWARD_PASSES[:-1]:
            _C.use_cpu_kernels(kernels)
    except ValueError:
        pytest.skip(f"this machine has no {kernels}")
    try:
        yield kernels in FORWARD_PASSES[:-1]
    finally:
        _C.use_cpu_kernels(best)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]


def reference(model, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def teacher_forced(model, completion, temperature: float = 1.0) -> torch.Tensor:
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        logprobs = (model(ids).logits.float() / temperature).log_softmax(-1)[0, :-1]
    picked = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    return picked[len(completion.prompt_token_ids) - 1 :]


@pytest.mark.parametrize(("kind", "changes"), MODELS.items(), ids=MODELS)
@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_greedy_equals_generate(kind: str, changes: dict, share_prefixes: bool, block_size: int) -> None:
    engine = RolloutEngine(
        tiny.model(kind, seed=3, **changes),
        tiny.tokenizer(),
        block_size=block_size,
        max_batch_size=5,
        share_prefixes=share_prefixes,
    )
    requests, expected = greedy_cases(kind)
    assert [c.token_ids for c in engine.generate(requests)] == expected
    assert (engine.stats()["shared_reads_saved"] > 0) == (share_prefixes and block_size < 64)
    engine.cache.check_integrity()


@cache
def greedy_cases(kind: str) -> tuple[list[Request], list[list[int]]]:
    """Prompts with and without common beginnings, and what `generate` makes of them."""
    model, asked = tiny.model(kind, seed=3, **MODELS[kind]), prompts(3)
    asked += [[*asked[0], *asked[1], *p] for p in prompts(4, seed=1)]
    return [Request(p, sampling=GREEDY) for p in asked], [reference(model, p, 24) for p in asked]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", FORWARD_PASSES)
def test_each_forward_pass_equals_generate(kind: str, kernels: str) -> None:
    with forward_pass(kernels) as fast_forward:
        engine = RolloutEngine(tiny.model(kind, seed=3, **MODELS[kind]), tiny.tokenizer(), fast_forward=fast_forward)
        requests, expected = greedy_cases(kind)
        assert [c.token_ids for c in engine.generate(requests)] == expected


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernels", FORWARD_PASSES[:-1])
def test_a_pass_of_many_rows_equals_passes_of_few(kernels: str, threads: int) -> None:
    """From 128 rows a thread on, threads take blocks of rows instead of parts of every product."""
    generator = torch.Generator().manual_seed(4)
    asked = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in (200, 61, 180, 7)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            model = tiny.model("llama", seed=1, **MODELS["llama"]).to(dtype)
            logprobs = []
            with forward_pass(kernels):
                for room in (2048, 40):
                    engine = RolloutEngine(model, tiny.tokenizer(), max_prefill_tokens=room)
                    params = SamplingParams(max_tokens=1, ignore_eos=True)
                    drawn = engine.generate([Request(p, sampling=params, seed=i) for i, p in enumerate(asked)])
                    logprobs.append(torch.tensor([c.logprobs for c in drawn]))
                    truth = torch.cat([teacher_forced(model, c) for c in drawn])
                    assert (logprobs[-1][:, 0] - truth).abs().max() <= bound
            assert (logprobs[0] - logprobs[1]).abs().max() <= bound
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_at_every_token_continue_like_generate(kind: str) -> None:
    model = tiny.model(kind, seed=5)
    engine = RolloutEngine(model, tiny.tokenizer(), block_size=4, max_batch_size=64)
    prompt = prompts(1, seed=2)[0]
    trajectory = engine.generate([Request(prompt, sampling=SamplingParams(max_tokens=20, ignore_eos=True), seed=1)])[0]
    cuts = [prompt + trajectory.token_ids[:t] for t in range(21)]
    drawn = engine.generate([Request(c, n=2, sampling=GREEDY) for c in cuts])
    for completion in drawn:
        assert completion.token_ids == reference(model, cuts[completion.request_index], 24)
    engine.cache.check_integrity()


def test_a_comb_computes_its_trajectory_once() -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer(), block_size=4)
    trajectory = list(range(3, 43))
    engine.generate([Request(trajectory[:t], n=3, sampling=SamplingParams(max_tokens=1)) for t in range(4, 41, 4)])
    # The longest prefix once, then one token for each shorter one: its logits are needed.
    assert engine.stats()["prefill_tokens"] <= 40 + 9 + 4 * 9
    assert engine.stats()["shared_tokens"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_teacher_forcing(kind: str) -> None:
    model = tiny.model(kind, seed=1)
    engine = RolloutEngine(model, tiny.tokenizer())
    params = SamplingParams(temperature=0.7, max_tokens=30)
    for completion in engine.generate([Request(p, n=3, sampling=params, seed=i) for i, p in enumerate(prompts(5))]):
        own = torch.tensor(completion.logprobs)
        assert (own - teacher_forced(model, completion)).abs().max() <= 1e-4
        drawn = torch.tensor(completion.sampling_logprobs)
        assert (drawn - teacher_forced(model, completion, 0.7)).abs().max() <= 1e-4
        assert (own - teacher_forced(model, completion)).abs().mean() <= 1e-5


@pytest.mark.parametrize("kernels", FORWARD_PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logprobs_are_as_near_the_truth_as_teacher_forcing(kind: str, kernels: str) -> None:
    for initializer_range in (0.02, 0.1):  # the libraries' default, and weights that make sharper distributions
        changes = {**MODELS[kind], "initializer_range": initializer_range}
        model = tiny.model(kind, seed=1, **changes).to(torch.bfloat16)
        exact = tiny.model(kind, seed=1, **changes).to(torch.bfloat16).float()
        with forward_pass(kernels) as fast_forward:
            engine = RolloutEngine(model, tiny.tokenizer(), fast_forward=fast_forward)
            drawn = engine.generate([Request(p, n=3, sampling=SamplingParams(max_tokens=30)) for p in prompts(5)])
        own = torch.cat([torch.tensor(c.logprobs) for c in drawn])
        forced = torch.cat([unrounded_head(model, c) for c in drawn])
        truth = torch.cat([unrounded_head(exact, c) for c in drawn])
        assert (own - truth).square().mean().sqrt() <= 1.25 * (forced - truth).square().mean().sqrt() + 1e-4
        if initializer_range == 0.02:
            assert (own - forced).abs().mean() <= 5e-3
            assert (own - forced).abs().max() <= 0.05


@torch.no_grad()
def unrounded_head(model: Any, completion: Any) -> torch.Tensor:
    """Teacher-forced logprobs, the head in float32 as the losses compute it: rounded logits would hide the rest."""
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    hidden = model.get_decoder()(ids).last_hidden_state[0, :-1].float()
    logprobs = (hidden @ model.lm_head.weight.float().T).log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[len(completion.prompt_token_ids) - 1 :, 0]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_take_part_in_rollouts(merged: bool, dora: bool, kind: str) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
    model = peft.get_peft_model(tiny.model(kind), adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith("q_proj.base_layer.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    engine = RolloutEngine(model, tiny.tokenizer())
    assert engine._runner._packed is not None
    if merged:
        model.merge_adapter()
        engine.update_weights()
    for completion in engine.generate([Request(p, n=2, sampling=SamplingParams(max_tokens=20)) for p in prompts(4)]):
        own = torch.tensor(completion.logprobs)
        assert (own - teacher_forced(model, completion)).abs().max() <= 1e-4


@pytest.mark.slow
def test_the_demo_model_continues_like_generate() -> None:
    try:
        from gpo_fast.demo.model import load_demo_model

        model, tokenizer = load_demo_model()
    except ImportError as error:
        pytest.skip(str(error))
    ids = tokenizer("The three laws of motion are", return_tensors="pt").input_ids[0].tolist()
    engine = RolloutEngine(model, tokenizer, kv_cache_memory=64 << 20)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    drawn = engine.generate([Request(ids[:n], sampling=params) for n in (4, len(ids))])
    assert [c.token_ids for c in drawn] == [reference(model, ids[:n], 24) for n in (4, len(ids))]


def test_preemption_changes_no_token() -> None:
    model = tiny.model(seed=4)
    asked = [Request(p, n=2, sampling=SamplingParams(max_tokens=40), seed=i) for i, p in enumerate(prompts(6))]
    roomy = RolloutEngine(model, tiny.tokenizer(), block_size=4)
    tight = RolloutEngine(model, tiny.tokenizer(), block_size=4, kv_cache_memory=24 * roomy.block_bytes)
    assert [c.token_ids for c in tight.generate(asked)] == [c.token_ids for c in roomy.generate(asked)]
    assert tight.stats()["preemptions"] > 0
    tight.cache.check_integrity()


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    model = tiny.model(seed=6)
    engine = RolloutEngine(model, tiny.tokenizer(), max_batch_size=7)
    prompt, short = prompts(1)[0], SamplingParams(max_tokens=30)
    alone = engine.generate([Request(prompt, n=3, sampling=short, seed=11)])
    others = [Request(p, n=2, sampling=short, seed=100 + i) for i, p in enumerate(prompts(5, seed=9))]
    together = engine.generate([*others, Request(prompt, n=5, sampling=short, seed=11)])
    assert [c.token_ids for c in together[-5:-2]] == [c.token_ids for c in alone]
    assert alone[0].token_ids != alone[1].token_ids


def test_new_weights_never_meet_old_keys() -> None:
    model = tiny.model(seed=7)
    engine = RolloutEngine(model, tiny.tokenizer(), block_size=4)
    prompt = list(range(3, 40))
    engine.generate([Request(prompt, sampling=GREEDY)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine.update_weights()
    assert engine.generate([Request(prompt, sampling=GREEDY)])[0].token_ids == reference(model, prompt, 24)


def test_stop_tokens_and_strings_end_a_completion() -> None:
    tokenizer = tiny.tokenizer()
    engine = RolloutEngine(tiny.model(seed=8), tokenizer)
    free = SamplingParams(max_tokens=60, ignore_eos=True)
    whole = engine.generate([Request([5, 6, 7], sampling=free, seed=0)])[0]
    text = tokenizer.decode(whole.token_ids)
    stop = text[10:12]
    cut = engine.generate(
        [Request([5, 6, 7], sampling=SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)), seed=0)]
    )[0]
    assert cut.finish_reason == "stop"
    assert tokenizer.decode(cut.token_ids) == text[: text.index(stop) + 2]
    token = whole.token_ids[5]
    cut = engine.generate(
        [Request([5, 6, 7], sampling=SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(token,)), seed=0)]
    )[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model().train()
    RolloutEngine(model, tiny.tokenizer()).generate([Request([4, 5], sampling=GREEDY)])
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_bad_requests_and_models_are_refused() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    engine = RolloutEngine(model, tokenizer)
    with pytest.raises(ValueError, match="context is 256"):
        engine.generate([Request([3] * 250, sampling=SamplingParams(max_tokens=10))])
    with pytest.raises(ValueError, match="cannot hold one page"):
        RolloutEngine(model, tokenizer, kv_cache_memory=10)
    small = RolloutEngine(model, tokenizer, kv_cache_memory=2 * engine.block_bytes)
    with pytest.raises(ValueError, match="give kv_cache_memory at least"):
        small.generate([Request([3] * 100, sampling=SamplingParams(max_tokens=10))])
    with pytest.raises(ValueError, match="sliding-window"):
        RolloutEngine(tiny.model("mistral", sliding_window=16), tokenizer)
    with pytest.raises(ValueError, match="at least one token"):
        Request([])
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=0)

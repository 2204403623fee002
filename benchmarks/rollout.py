"""Sampling branches: the engine against transformers' ways of doing the same, in one process, taking turns.

Every peer produces the same number of tokens for the same prompts (end-of-sequence is ignored). Peers:
  generate         one generate() for each different prompt, with num_return_sequences where it continues more than
                   once; different prompts of one length are one batch
  repeat cache     prefill once, repeat the cache for the branches, decode with one small call a step (the fair
                   baseline)
  generate_batch   transformers' continuous batching
  llama.cpp        llama-cpp-python where it is installed (SmolLM2 only: its packaged file, with that quantisation)
On a GPU (--device cuda) a second table has decode steps of large batches, and of a comb, over their floor: the bytes of
the weights and of every key and value, each read once, over the measured bandwidth of a copy.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpo_fast.bench.common import ReadmeRow, Table, Timing, finish, floors, human, interleave, parser
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from gpo_fast import Request, RolloutEngine, SamplingParams
from gpo_fast.demo.model import find_gguf, load_demo_model

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "kind": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "kind": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


PEERS = {  # and what a reader of the README calls them
    "generate": "`generate`",
    "repeat cache": "*prefill once, repeat the cache*",
    "generate_batch": "`generate_batch`",
    "llama.cpp": "llama.cpp",
}


@dataclass
class Workload:
    """Prompts, continuations of each, new tokens, and the ratios to reach (None: not asked for)."""

    name: str
    prompts: list[list[int]]
    branches: int
    new_tokens: int
    targets: dict[str, float]

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.branches * self.new_tokens


def load(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """(model, tokenizer or None); random weights for the shapes that no package holds."""
    if name == "smollm2":
        model, tokenizer = load_demo_model(dtype)
        return model.eval().to(device), tokenizer
    if name not in SHAPES:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model.eval().to(device), AutoTokenizer.from_pretrained(name)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("kind"), **shape, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), None


def comb_prompts(tokens: Callable[[int], list[int]], trajectories: int, cuts: int) -> list[list[int]]:
    """Trajectories of a 64-token prompt and `cuts` steps of 16 tokens, cut off after each step."""
    prompts = []
    for _ in range(trajectories):
        prompt, answer = tokens(64), tokens(16 * cuts)
        prompts += [prompt + answer[: 16 * (i + 1)] for i in range(cuts)]
    return prompts


def workloads(vocabulary: int, quick: bool) -> list[Workload]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, vocabulary - 10, (count,), generator=generator).tolist()

    prefix, branches, new = (128, 4, 4) if quick else (1024, 32, 64)
    trajectories, cuts, continuations, ahead = (2, 3, 2, 4) if quick else (8, 12, 4, 48)
    comb = comb_prompts(tokens, trajectories, cuts)
    different = [tokens(128) for _ in range(4 if quick else 32)]
    return [
        Workload(
            f"{prefix}-token prefix, {branches} branches x {new}",
            [tokens(prefix)],
            branches,
            new,
            {"generate": 10, "repeat cache": 4, "generate_batch": 8},
        ),
        Workload(
            f"comb: {trajectories} trajectories x {cuts} cuts x {continuations} x {ahead}",
            comb,
            continuations,
            ahead,
            {"generate": 15, "repeat cache": 3},
        ),
        Workload(f"{len(different)} different 128-token prompts x {new}", different, 1, new, {"generate": 2.5}),
        Workload(f"one sequence: 128-token prompt x {new}", [tokens(128)], 1, new, {"generate": 1}),
    ]


def chosen_workloads(arguments: Any, vocabulary: int) -> list[Workload]:
    """The user's own prefix, or all workloads, or one of them."""
    if arguments.prefix or arguments.branches:
        prefix, branches = arguments.prefix or 1024, arguments.branches or 32
        tokens = torch.randint(10, vocabulary - 10, (prefix,), generator=torch.Generator().manual_seed(0)).tolist()
        return [Workload(f"{prefix}-token prefix, {branches} branches x 64", [tokens], branches, 64, {})]
    works = workloads(vocabulary, arguments.quick)
    return works if arguments.only is None else [works[arguments.only]]


def ours(engine: RolloutEngine, work: Workload) -> Callable[[], object]:
    sampling = SamplingParams(max_tokens=work.new_tokens, ignore_eos=True)
    requests = [Request(p, work.branches, sampling, seed=i) for i, p in enumerate(work.prompts)]

    def run() -> None:
        engine.update_weights()  # nothing is kept from the run before: the prefill is part of the time
        engine.generate(requests)

    return run


def by_length(work: Workload) -> list[list[list[int]]]:
    """The prompts in batches of equal length, except that a comb has one call for each cut point."""
    if work.branches > 1:
        return [[p] for p in work.prompts]
    return [work.prompts]


def with_generate(model: Any, work: Workload) -> Callable[[], object]:
    def run() -> None:
        for batch in by_length(work):
            ids = torch.tensor(batch, device=model.device)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=work.branches,
                min_new_tokens=work.new_tokens,
                max_new_tokens=work.new_tokens,
                pad_token_id=0,
            )

    return run


@torch.no_grad()
def repeat_cache_once(model: Any, batch: list[list[int]], branches: int, new_tokens: int) -> None:
    ids = torch.tensor(batch, device=model.device)
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    if branches > 1:
        cache.batch_repeat_interleave(branches)
        logits = logits.repeat_interleave(branches, dim=0)
    for step in range(new_tokens):
        token = torch.softmax(logits.float(), -1).multinomial(1)
        if step + 1 < new_tokens:
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def with_repeated_cache(model: Any, work: Workload) -> Callable[[], object]:
    def run() -> None:
        for batch in by_length(work):
            repeat_cache_once(model, batch, work.branches, work.new_tokens)

    return run


def with_generate_batch(model: Any, work: Workload) -> Callable[[], object]:
    config = GenerationConfig(
        max_new_tokens=work.new_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    inputs = [p for p in work.prompts for _ in range(work.branches)]

    def run() -> None:
        done = model.generate_batch(inputs, generation_config=config, progress_bar=False)
        if len(done) != len(inputs) or any(len(o.generated_tokens) != work.new_tokens for o in done.values()):
            raise RuntimeError("generate_batch returned other numbers of tokens than asked for")

    return run


def with_llama_cpp(work: Workload) -> Callable[[], object]:
    from llama_cpp import Llama

    path = find_gguf()
    llama = Llama(str(path), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False, logits_all=False)

    def run() -> None:
        for prompt in work.prompts:
            for _ in range(work.branches):
                stream = llama.generate(prompt, temp=1.0, top_k=0, top_p=1.0)
                for _, _ in zip(range(work.new_tokens), stream):
                    pass

    return run


def peers(model: Any, work: Workload, arguments: Any) -> dict[str, Callable[[], object]]:
    calls = {
        "generate": with_generate(model, work),
        "repeat cache": with_repeated_cache(model, work),
        "generate_batch": with_generate_batch(model, work),
    }
    if arguments.model == "smollm2" and importlib.util.find_spec("llama_cpp"):
        calls["llama.cpp"] = with_llama_cpp(work)
    return {name: call for name, call in calls.items() if name in arguments.peers}


def runs(name: str, call: Callable[[], object], notes: list[str]) -> bool:
    """Warms a call up; what does not run here is noted with its reason."""
    try:
        call()
    except Exception as error:  # a peer may lack support for this device: its row says so
        notes.append(f"{name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return False
    return True


@dataclass
class DecodeCase:
    """A batch whose branches all decode together, and the keys of its prompts, shared ones counted once."""

    name: str
    prompts: list[list[int]]
    branches: int
    prompt_keys: int


def decode_cases(quick: bool) -> list[DecodeCase]:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 1000, (count,), generator=generator).tolist()

    sizes, length, (trajectories, cuts) = ([4], 32, (2, 3)) if quick else ([64, 256], 256, (8, 12))
    different = [DecodeCase(f"{n} different prompts", [tokens(length) for _ in range(n)], 1, n * length) for n in sizes]
    comb = comb_prompts(tokens, trajectories, cuts)
    name = f"comb: {trajectories} trajectories x {cuts} cuts x 4"
    return [*different, DecodeCase(name, comb, 4, trajectories * (64 + 16 * cuts))]


def seconds_of(engine: RolloutEngine, case: DecodeCase, new_tokens: int) -> float:
    """The fastest of three runs; the first compiles and captures."""
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    requests = [Request(p, case.branches, sampling, seed=i) for i, p in enumerate(case.prompts)]
    times = []
    for _ in range(3):
        engine.update_weights()
        start = time.perf_counter()
        engine.generate(requests)
        times.append(time.perf_counter() - start)
    return min(times)


def decode_steps(model: Any, tokenizer: Any, quick: bool) -> tuple[Table, dict[str, dict[str, float]]]:
    """A decode step of each case, as the difference of a long and a short run, over its floor."""
    table = Table("Decode step over its floor", ("batch", "weights + KV", "floor", "measured", "ratio"))
    bandwidth = floors(model.device.type)["copy_bytes_per_second"]
    weights = sum(p.numel() * p.element_size() for p in set(model.parameters()))
    short, long = (2, 6) if quick else (8, 40)
    results = {}
    for case in decode_cases(quick):
        rows = len(case.prompts) * case.branches
        # Every prompt in one pass, so that all branches run from the first step on.
        room = sum(map(len, case.prompts)) + rows * (long + 16)
        one = RolloutEngine(model, tokenizer, max_batch_size=1)
        engine = RolloutEngine(
            model,
            tokenizer,
            max_batch_size=rows,
            max_prefill_tokens=room,
            kv_cache_memory=room * one.block_bytes // one.block_size,
        )
        step = (seconds_of(engine, case, long) - seconds_of(engine, case, short)) / (long - short)
        keys = case.prompt_keys + rows * (short + long) // 2
        size = weights + keys * engine.block_bytes // engine.block_size
        floor = size / bandwidth
        table.add(case.name, f"{size / 1e6:,.0f} MB", human(floor), human(step), f"{step / floor:.2f}")
        results[case.name] = {"bytes": size, "floor_seconds": floor, "seconds": step}
    return table, results


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """The engine against each peer of a result."""
    targets = {work.name: work.targets for work in workloads(vocabulary=1000, quick=False)}
    options = result["arguments"]
    command = f"rollout.py --dtype {options['dtype']} --repeats {options['repeats']} --only {options['only']}"
    rows = []
    for name, times in result["data"]["times"].items():
        ours = times["gpo-fast"]["median"]
        for peer in [p for p in PEERS if p in times]:
            theirs, goal = times[peer]["median"], targets[name].get(peer)
            rows.append(
                ReadmeRow(
                    f"{name}, {options['model']}, against {PEERS[peer]}",
                    command,
                    f"{theirs / ours:.2f} x as fast ({human(ours)}, {human(theirs)})",
                    "" if goal is None else f"{goal:g} x",
                    goal is not None and theirs < goal * ours,
                )
            )
    return rows


def main() -> None:
    arguments_of = parser(__doc__ or "")
    arguments_of.add_argument(
        "--model", default="smollm2", help=f"smollm2, random weights of {' or '.join(SHAPES)}, a path or a hub id"
    )
    arguments_of.add_argument("--prefix", type=int, help="one workload instead of all: tokens of a shared prefix, ...")
    arguments_of.add_argument("--branches", type=int, help="... continued so many times by 64 tokens")
    arguments_of.add_argument("--device", default="cpu")
    arguments_of.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments_of.add_argument("--threads", type=int, help="torch's number of threads; its own choice if not given")
    arguments_of.add_argument("--repeats", type=int, default=3)
    arguments_of.add_argument("--peers", nargs="*", default=list(PEERS), metavar="PEER")
    arguments_of.add_argument("--only", type=int, help="the number of one workload, from 0")
    arguments = arguments_of.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    engine = RolloutEngine(model, tokenizer, max_batch_size=64 if arguments.device == "cpu" else 256)
    table = Table(
        f"{arguments.model}, {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads",
        ("workload", "way", "time", "middle half", "tokens/s", "ours is faster by", "to reach"),
    )
    notes: list[str] = []
    measured: dict[str, dict[str, Timing]] = {}
    for work in chosen_workloads(arguments, model.config.vocab_size):
        calls = {"gpo-fast": ours(engine, work)}
        calls |= {name: call for name, call in peers(model, work, arguments).items() if runs(name, call, notes)}
        times = interleave(calls, repeats=1 if arguments.quick else arguments.repeats)
        measured[work.name] = times
        own = times["gpo-fast"].median
        for name, timing in times.items():
            target = work.targets.get(name)
            table.add(
                work.name if name == "gpo-fast" else "",
                name,
                human(timing.median),
                f"{human(timing.low)} - {human(timing.high)}",
                f"{work.tokens / timing.median:,.0f}",
                "" if name == "gpo-fast" else f"{timing.median / own:.2f} x",
                "" if target is None else f"{target:g} x",
            )
    data = {"notes": notes, "times": measured, "engine": engine.stats()}
    tables = [table]
    if arguments.device == "cuda":
        del engine  # its pool
        steps, data["decode_steps"] = decode_steps(model, tokenizer, arguments.quick)
        tables.append(steps)
    finish(arguments, tables, data)
    for note in dict.fromkeys(notes):
        print(note)


if __name__ == "__main__":
    main()

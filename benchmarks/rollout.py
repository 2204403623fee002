"""Sampling branches: the engine against transformers' ways of doing the same, in one process, taking turns.

Every way produces the same number of tokens for the same prompts (end-of-sequence is ignored) and is warmed up with a
small part of the workload. Peers:
  generate         one generate() for each different prompt, with num_return_sequences where it continues more than
                   once; different prompts of one length are one batch
  repeat cache     prefill once, repeat the cache for the branches, decode with one small call a step (the fair
                   baseline)
  generate_batch   transformers' continuous batching, with a cache as large as the workload needs
  llama.cpp        llama-cpp-python where it is installed (SmolLM2 only: its packaged file, with that quantisation), a
                   prompt's branches sharing its cells
The first two need a call for each cut point of a comb: they are timed on its first trajectories, and the time is
multiplied. A long benchmark can be run in pieces, a workload (--only) with a peer (--peers) at a time: our engine runs
in each of them.
--sharing compares decode steps that read a shared prefix once with steps that read it for each branch.
On a GPU (--device cuda) a second table has decode steps of large batches, and of a comb, over their floor: the bytes of
the weights and of every key and value, each read once, over the measured bandwidth of a copy.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpo_fast.bench.common import ReadmeRow, Table, Timing, device_name, finish, floors, human, interleave, parser
from gpo_fast.bench.llama_peer import with_llama_cpp
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)

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
BRIEF = ("generate", "llama.cpp")  # peers in the README


@dataclass
class Workload:
    """Prompts, continuations of each, new tokens, and the ratios to reach (None: not asked for)."""

    name: str
    prompts: list[list[int]]
    branches: int
    new_tokens: int
    targets: dict[str, float]
    share: int = 1  # peers with a call for each prompt are timed on the first 1 / share of them

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.branches * self.new_tokens

    def small(self) -> Workload:
        """What a way is warmed up with."""
        prompts, branches, new_tokens = self.prompts[:2], min(2, self.branches), min(2, self.new_tokens)
        return replace(self, prompts=prompts, branches=branches, new_tokens=new_tokens)

    def part(self) -> Workload:
        """The prompts on which peers with a call for each are timed."""
        return replace(self, prompts=self.prompts[: len(self.prompts) // self.share])


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
            share=1 if quick else 8,
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
    # Its own choice of a cache is a large part of the machine's memory, all of which its attention goes through.
    page = 256
    blocks = sum(-(-(len(p) + work.new_tokens) // page) for p in inputs)
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=blocks)

    def run() -> None:
        done = model.generate_batch(
            inputs, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        if len(done) != len(inputs) or any(len(o.generated_tokens) != work.new_tokens for o in done.values()):
            raise RuntimeError("generate_batch returned other numbers of tokens than asked for")

    return run


PEER_CALLS: dict[str, Callable[[Any, Workload], Callable[[], object]]] = {
    "generate": with_generate,
    "repeat cache": with_repeated_cache,
    "generate_batch": with_generate_batch,
    "llama.cpp": lambda _, work: with_llama_cpp(find_gguf(), work.prompts, work.branches, work.new_tokens),
}
ONE_CALL_A_PROMPT = ("generate", "repeat cache")


def measure(engine: RolloutEngine, model: Any, work: Workload, arguments: Any, notes: list[str]) -> dict[str, Timing]:
    """Our engine and each peer that was asked for and runs here, taking turns."""
    names = [name for name in PEERS if name in arguments.peers]
    if arguments.model != "smollm2" or not importlib.util.find_spec("llama_cpp"):
        names = [name for name in names if name != "llama.cpp"]
    parts = {name: work.part() if name in ONE_CALL_A_PROMPT else work for name in names}
    ours(engine, work.small())()
    calls = {"gpo-fast": ours(engine, work)}
    for name in names:
        if runs(name, lambda name=name: PEER_CALLS[name](model, work.small())(), notes):
            calls[name] = PEER_CALLS[name](model, parts[name])
    times = interleave(calls, repeats=1 if arguments.quick else arguments.repeats)
    for name, part in parts.items():
        scale = len(work.prompts) / len(part.prompts)
        if name in times and scale > 1:
            notes.append(
                f"{name} was timed on {len(part.prompts)} of the {len(work.prompts)} prompts, the time multiplied"
            )
            times[name] = replace(
                times[name], **{k: scale * getattr(times[name], k) for k in ("median", "low", "high")}
            )
    if "llama.cpp" in times:
        notes.append(f"llama.cpp ran {find_gguf().name}, its weights not laid out anew for the CPU")
    return times


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


def sharing(model: Any, tokenizer: Any, quick: bool) -> tuple[Table, dict[str, dict[str, float]]]:
    """A decode step whose branches' prefix is read once, against one that reads it for each branch."""
    table = Table("Decode step, a shared prefix read once", ("prefix", "branches", "shared", "plain", "plain / shared"))
    lengths, sizes = ([32], [2]) if quick else ([16, 64, 256, 1024], [2, 4, 8, 32])
    engines = [RolloutEngine(model, tokenizer, share_prefixes=share) for share in (True, False)]
    short, long = (2, 6) if quick else (4, 20)
    results = {}
    for length in lengths:
        for branches in sizes:
            prompt = torch.randint(10, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
            case = DecodeCase("", [prompt], branches, length)
            shared, plain = (
                (seconds_of(engine, case, long) - seconds_of(engine, case, short)) / (long - short)
                for engine in engines
            )
            table.add(str(length), str(branches), human(shared), human(plain), f"{plain / shared:.2f}")
            results[f"{length} x {branches}"] = {"shared_seconds": shared, "plain_seconds": plain}
    return table, results


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """The engine against each peer of a result, or what sharing gains."""
    if result["arguments"].get("sharing") == "True":
        return [sharing_row(result)]
    works = {work.name: work for work in workloads(vocabulary=1000, quick=False)}
    options = result["arguments"]
    model = "" if options["model"] == "smollm2" else f" --model {options['model']}"
    command = f"rollout.py{model} --dtype {options['dtype']} --repeats {options['repeats']} --only {options['only']}"
    rows = []
    for name, times in result["data"]["times"].items():
        ours = times["gpo-fast"]["median"]
        for peer in [p for p in PEERS if p in times]:
            theirs, goal = times[peer]["median"], works[name].targets.get(peer)
            what = f"{name}, {options['model']}, against {PEERS[peer]}"
            if peer in ONE_CALL_A_PROMPT and works[name].share > 1:
                what += f" (a call per cut point, timed on 1 / {works[name].share} of them)"
            rows.append(
                ReadmeRow(
                    what,
                    command,
                    f"{theirs / ours:.2f} x as fast ({human(ours)}, {human(theirs)})",
                    "" if goal is None else f"{goal:g} x",
                    goal is not None and theirs < goal * ours,
                    (what, f"{theirs / ours:.2f} x as fast") if peer in BRIEF else None,
                )
            )
    return rows


def sharing_row(result: dict[str, Any]) -> ReadmeRow:
    ratios = {case: step["plain_seconds"] / step["shared_seconds"] for case, step in result["data"].items()}
    least, most = min(ratios, key=lambda case: ratios[case]), max(ratios, key=lambda case: ratios[case])
    options = result["arguments"]
    return ReadmeRow(
        f"a decode step, {options['model']}, a prefix of 16 to 1,024 tokens read once for 2 to 32 branches, against "
        "once for each",
        f"rollout.py --dtype {options['dtype']} --sharing",
        f"{ratios[least]:.2f} x ({least}) to {ratios[most]:.2f} x as fast ({most})",
    )


def main() -> None:
    arguments_of = parser(__doc__ or "")
    arguments_of.add_argument(
        "--model", default="smollm2", help=f"smollm2, random weights of {' or '.join(SHAPES)}, a path or a hub id"
    )
    arguments_of.add_argument("--prefix", type=int, help="one workload instead of all: tokens of a shared prefix, ...")
    arguments_of.add_argument("--branches", type=int, help="... continued so many times by 64 tokens")
    arguments_of.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    arguments_of.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments_of.add_argument("--threads", type=int, help="torch's number of threads; its own choice if not given")
    arguments_of.add_argument("--repeats", type=int, default=3)
    arguments_of.add_argument("--peers", nargs="*", default=list(PEERS), metavar="PEER")
    arguments_of.add_argument("--only", type=int, help="the number of one workload, from 0")
    arguments_of.add_argument(
        "--sharing", action="store_true", help="instead: decode steps with prefixes read once, against once a branch"
    )
    arguments = arguments_of.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    if arguments.sharing:
        steps, results = sharing(model, tokenizer, arguments.quick)
        return finish(arguments, [steps], results)
    engine = RolloutEngine(model, tokenizer, max_batch_size=64 if arguments.device == "cpu" else 256)
    table = Table(
        f"{arguments.model}, {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads",
        ("workload", "way", "time", "middle half", "tokens/s", "ours is faster by", "to reach"),
    )
    notes: list[str] = []
    measured: dict[str, dict[str, Timing]] = {}
    for work in chosen_workloads(arguments, model.config.vocab_size):
        measured[work.name] = times = measure(engine, model, work, arguments, notes)
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

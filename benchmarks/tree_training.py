"""Tree-packed training against its peers: one forward and backward pass of the same loss on the same branches.

    python benchmarks/tree_training.py                       # SmolLM2-135M's shape, bfloat16 autocast
    python benchmarks/tree_training.py --quick               # a small model and short trees: does it run?
    python benchmarks/tree_training.py --model qwen3-0.6b --device cuda --unique-tokens 16384

Peers, all with the same model, head and loss:

- padded: a row for each branch, padded on the right (transformers' "sdpa").
- unshared: all branches end to end in one row without padding, nothing shared (this project's attention, in which
  each branch is a tree of its own).
- one level: the longest prefix that all branches of a tree share once, then the rest of each branch behind it, with
  torch's scaled_dot_product_attention: the way of PrefixGrouper (arXiv 2506.05433), written afresh.

A peer whose tokens do not fit one pass (`--pass-tokens`) takes several, whose gradients add up; ours takes one.

`share` is time ratio / token ratio: 1 if each token saved were time saved. It cannot be 1, since packing saves no work
in the output head (which runs on loss tokens alone, in every way) and less of the attention than of the tokens (a
branch still reads its ancestors' keys): `FLOP ratio` is the ratio of the operations that each way has to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpo_fast.bench.common import ReadmeRow, device_name, floors, human, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from gpo_fast import TokenForest, linear_policy_loss, pack_forest
from gpo_fast.losses import SharedRows
from gpo_fast.tree_attention import tree_attention_of

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "kind": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "qwen3-0.6b": {
        "kind": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "small": {
        "kind": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}


@dataclass
class Case:
    """Branches of a forest to train; the order is depth-first."""

    name: str
    forest: TokenForest
    branches: list[int]


def grouped_case(name: str, prefix: int, count: int, length: int, draw: random.Random) -> Case:
    forest = TokenForest()
    root = forest.add_prompt(_tokens(draw, prefix))
    return Case(name, forest, [forest.branch(root, prefix, _tokens(draw, length)) for _ in range(count)])


def gpo_case(prompt: int, trajectories: int, length: int, resets: int, draw: random.Random, trees: int = 1) -> Case:
    """Trajectories of one prompt; from a critical step of each, somewhere in its middle half, `resets` branches."""
    forest = TokenForest()
    branches = []
    for _ in range(trees):
        root = forest.add_prompt(_tokens(draw, prompt))
        for _ in range(trajectories):
            trajectory = forest.branch(root, prompt, _tokens(draw, length))
            cut = draw.randint(length // 4, 3 * length // 4)
            branches.append(trajectory)
            branches += [forest.branch(trajectory, prompt + cut, _tokens(draw, length - cut)) for _ in range(resets)]
    name = f"GPO: prompt {prompt}, {trajectories} x {length}, {resets} resets each"
    return Case(name + (f", {trees} prompts" if trees > 1 else ""), forest, branches)


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 1000) for _ in range(count)]


def cases(scale: float, unique_tokens: int | None) -> list[Case]:
    """The four shapes; `scale` shortens them. With `unique_tokens`, GPO trees of about so many tokens instead."""

    def n(tokens: int) -> int:
        return max(4, round(tokens * scale))

    draw = random.Random(0)
    if unique_tokens is not None:
        one = gpo_case(n(256), 4, n(1024), 8, random.Random(0)).forest.unique_tokens
        return [gpo_case(n(256), 4, n(1024), 8, draw, trees=max(1, unique_tokens // one))]
    return [
        grouped_case(f"prefix {n(1024)} + 8 x {n(256)}", n(1024), 8, n(256), draw),
        grouped_case(f"prefix {n(256)} + 8 x {n(256)}", n(256), 8, n(256), draw),
        gpo_case(n(128), 4, n(512), 8, draw),
        grouped_case(f"pair {n(768)} + 2 x {n(256)}", n(768), 2, n(256), draw),
    ]


# -- the contestants: each gives (input ids, position ids, options of the forward pass, loss rows, targets, ...) ---


@dataclass
class Way:
    """One way to run a case: the model's attention and inputs, and where the loss tokens are."""

    attention: str  # "sdpa", ONE_LEVEL or "tree"
    inputs: list[dict[str, Any]]  # forward passes
    rows: list[Tensor]  # for each, loss rows among its hidden states
    targets: list[Tensor]
    sequence_ids: list[Tensor]
    shared: list[SharedRows | None]

    @property
    def tokens(self) -> int:
        return sum(i["input_ids"].numel() for i in self.inputs)

    def flops(self, model: Any) -> float:
        """Of the matrix products of forward and backward; the head's logits are computed twice."""
        config, head = model.config, model.lm_head.weight
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = sum(p.numel() for p in model.model.layers.parameters())
        pairs = sum(map(self._pairs, self.inputs))
        attention = 14 * pairs * config.num_attention_heads * width * config.num_hidden_layers
        return 6 * layers * self.tokens + attention + 8 * head.numel() * sum(len(t) for t in self.targets)

    def _pairs(self, inputs: dict[str, Any]) -> int:
        """Pairs of query and key that attention goes through."""
        rows, length = inputs["input_ids"].shape
        if self.attention == "tree":
            return int(inputs["position_ids"].sum()) + length
        if self.attention == "sdpa":
            return rows * length * (length + 1) // 2
        prefix, count, width = inputs["shape"]
        return prefix * (prefix + 1) // 2 + count * width * (prefix + width)


def tree_way(case: Case, device: str, pass_tokens: int) -> Way:
    """Ours; one pass, whatever its length."""
    way = Way("tree", [], [], [], [], [])
    _add_pass(way, case.forest, case.branches, device)
    return way


def _add_pass(way: Way, forest: TokenForest, branches: list[int], device: str) -> None:
    packed = pack_forest(forest, branches)
    packed = (packed.filled() if device == "cuda" else packed).to(device)
    way.inputs.append({"input_ids": packed.input_ids, "position_ids": packed.position_ids, "tree": packed.tree})
    way.rows.append(packed.rows)
    way.targets.append(packed.targets)
    way.sequence_ids.append(packed.sequence_ids)
    way.shared.append(packed.shared)


def unshared_way(case: Case, device: str, pass_tokens: int) -> Way:
    way = Way("tree", [], [], [], [], [])
    for branches in _passes(case.branches, [case.forest.nodes[b].end for b in case.branches], pass_tokens):
        apart = TokenForest()
        for branch in branches:
            node, path = case.forest.nodes[branch], case.forest.path(branch)
            apart.branch(apart.add_prompt(path[: node.start]), node.start, node.token_ids)
        _add_pass(way, apart, apart.leaves(), device)
    return way


def _passes(branches: list[int], sizes: list[int], pass_tokens: int) -> list[list[int]]:
    """The branches in turn, as many to a pass as its tokens allow."""
    passes: list[list[int]] = []
    used = pass_tokens
    for branch, size in zip(branches, sizes):
        if used + size > pass_tokens:
            passes.append([])
            used = 0
        passes[-1].append(branch)
        used += size
    return passes


def padded_way(case: Case, device: str, pass_tokens: int) -> Way:
    way = Way("sdpa", [], [], [], [], [])
    longest = max(case.forest.nodes[b].end for b in case.branches)
    for branches in _passes(case.branches, [longest] * len(case.branches), pass_tokens):
        paths = [case.forest.path(b) for b in branches]
        width = max(map(len, paths))
        ids = torch.tensor([path + [0] * (width - len(path)) for path in paths], device=device)
        starts = [case.forest.nodes[b].start for b in branches]
        rows = [i * width + torch.arange(s - 1, len(p) - 1) for i, (p, s) in enumerate(zip(paths, starts))]
        lengths = torch.tensor([len(r) for r in rows])
        positions = torch.arange(width, device=device).expand(len(paths), -1)
        way.inputs.append({"input_ids": ids, "position_ids": positions})
        way.rows.append(torch.cat(rows).to(device))
        way.targets.append(torch.tensor([t for b in branches for t in case.forest.nodes[b].token_ids], device=device))
        way.sequence_ids.append(torch.repeat_interleave(lengths).to(device))
        way.shared.append(None)
    return way


ONE_LEVEL = "benchmark_one_level"


def one_level_way(case: Case, device: str, pass_tokens: int) -> Way:
    """Forward passes for each tree: [prefix, the rest of each branch padded to the longest]."""
    trees: dict[int, list[int]] = {}
    for branch in case.branches:
        root = branch
        while case.forest.nodes[root].parent != -1:
            root = case.forest.nodes[root].parent
        trees.setdefault(root, []).append(branch)
    way = Way(ONE_LEVEL, [], [], [], [], [])
    for tree in trees.values():
        # What all share; the last shared token is the first that a suffix may differ after.
        prefix = min(case.forest.nodes[b].start for b in tree)
        rest = max(case.forest.nodes[b].end for b in tree) - prefix
        for branches in _passes(tree, [rest] * len(tree), pass_tokens - prefix):
            _add_one_level(way, case.forest, branches, prefix, device)
    return way


def _add_one_level(way: Way, forest: TokenForest, branches: list[int], prefix: int, device: str) -> None:
    paths = [forest.path(b) for b in branches]
    suffixes = [p[prefix:] for p in paths]
    width = max(map(len, suffixes))
    ids = [*paths[0][:prefix], *(t for s in suffixes for t in s + [0] * (width - len(s)))]
    positions = [*range(prefix), *(d for _ in suffixes for d in range(prefix, prefix + width))]
    rows, sequence = [], []
    for i, branch in enumerate(branches):
        node = forest.nodes[branch]
        first = prefix + i * width + node.start - prefix
        own = torch.arange(first - 1, first - 1 + len(node.token_ids))
        if node.start == prefix:
            own[0] = prefix - 1
        rows.append(own)
        sequence.append(torch.full((len(own),), i))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    way.inputs.append({k: v.to(device) for k, v in inputs.items()} | {"shape": (prefix, len(branches), width)})
    way.rows.append(torch.cat(rows).to(device))
    way.targets.append(torch.tensor([t for b in branches for t in forest.nodes[b].token_ids], device=device))
    way.sequence_ids.append(torch.cat(sequence).to(device))
    way.shared.append(None)


def _one_level_attention(
    module: Any,
    query: Tensor,  # [1, heads, N, dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shape: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Two calls: the prefix causally; each suffix on the prefix and, causally, itself."""
    assert shape is not None
    prefix, count, width = shape
    head = F.scaled_dot_product_attention(
        *(t[:, :, :prefix] for t in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
    )

    def tails(t: Tensor) -> Tensor:  # [count, heads, width, dim]
        return t[0, :, prefix:].unflatten(1, (count, width)).transpose(0, 1)

    keys, values = (torch.cat([t[:, :, :prefix].expand(count, -1, -1, -1), tails(t)], dim=2) for t in (key, value))
    column = torch.arange(prefix + width, device=query.device)
    mask = column[None] <= prefix + torch.arange(width, device=query.device)[:, None]
    tail = F.scaled_dot_product_attention(tails(query), keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    tail = tail.transpose(0, 1).flatten(1, 2)[None]
    return torch.cat([head, tail], dim=2).transpose(1, 2), None


AttentionInterface.register(ONE_LEVEL, _one_level_attention)
AttentionMaskInterface.register(ONE_LEVEL, lambda *args, **kwargs: None)


def step(model: Any, way: Way, autocast: bool, device: str) -> float:
    """Forward and backward of the whole case; gives the loss."""
    total = 0.0
    model.zero_grad(set_to_none=True)
    count = sum(int(ids[-1]) + 1 for ids in way.sequence_ids)
    model.config._attn_implementation = way.attention if way.attention != "tree" else "sdpa"
    parts = zip(way.inputs, way.rows, way.targets, way.sequence_ids, way.shared)
    for inputs, rows, targets, sequence_ids, shared in parts:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if way.attention == "tree":
                with tree_attention_of(model):
                    hidden = model.get_decoder()(use_cache=False, **inputs).last_hidden_state
            else:
                hidden = model.get_decoder()(use_cache=False, **inputs).last_hidden_state
            sequences = int(sequence_ids[-1]) + 1
            loss = linear_policy_loss(
                hidden.flatten(0, 1)[rows],
                model.lm_head.weight,
                targets,
                loss_type="grpo",
                advantages=torch.ones(sequences, device=device),
                sequence_ids=sequence_ids,
                shared=shared,
                num_sequences=float(count),
                return_entropy=False,
            ).loss
        loss.backward()
        total += float(loss.detach())
    return total


WAYS: dict[str, Callable[[Case, str, int], Way]] = {
    "tree (ours)": tree_way,
    "padded": padded_way,
    "unshared": unshared_way,
    "one level": one_level_way,
}


def measure(
    model: Any, case: Case, repeats: int, autocast: bool, device: str, pass_tokens: int
) -> dict[str, dict[str, Any]]:
    """Times of the ways, taken in turn, after one turn that is not counted and compares their gradients."""
    ways = {name: make(case, device, pass_tokens) for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    reference: Tensor | None = None
    errors: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            gc.collect()
            _reset_peak(device)
            start = time.perf_counter()
            step(model, way, autocast, device)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
                peaks[name] = max(peaks.get(name, 0), _peak(device))
                continue
            gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
            reference = gradient if reference is None else reference
            errors[name] = float((gradient - reference).norm() / reference.norm())
    median = {name: statistics.median(t) for name, t in times.items()}
    result = {}
    for name, way in ways.items():
        token_ratio = way.tokens / ways["tree (ours)"].tokens
        time_ratio = median[name] / median["tree (ours)"]
        result[name] = {
            "tokens": way.tokens,
            "seconds": median[name],
            "seconds_all": times[name],
            "peak_mib": peaks[name] / 2**20,
            "token_ratio": token_ratio,
            "time_ratio": time_ratio,
            "share": time_ratio / token_ratio,
            "flop_ratio": way.flops(model) / ways["tree (ours)"].flops(model),
            "gradient_distance": errors[name],
        }
    return result


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of resident memory starts anew


def _peak(device: str) -> int:
    """Bytes. On a CPU the peak of the process's resident memory, weights included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(case: Case, result: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{case.name}: {case.forest.unique_tokens} unique tokens")
    for column in (
        "way",
        "tokens",
        "seconds",
        "spread",
        "peak MiB",
        "token ratio",
        "FLOP ratio",
        "time ratio",
        "share",
        "off",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in result.items():
        spread = f"{min(row['seconds_all']):.2f}-{max(row['seconds_all']):.2f}"
        table.add_row(
            name,
            f"{row['tokens']:,}",
            f"{row['seconds']:.3f}",
            spread,
            f"{row['peak_mib']:,.0f}",
            f"{row['token_ratio']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['share']:.2f}",
            f"{row['gradient_distance']:.1e}",
        )
    Console(width=130).print(table)


def packing_times(repeats: int) -> dict[str, Any]:
    """Seconds of `pack_forest` for 512 branches of 1,024 tokens each on one prompt: 524,352 unique tokens."""
    case = grouped_case("packing", 64, 512, 1024, random.Random(0))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pack_forest(case.forest, case.branches)
        times.append(time.perf_counter() - start)
    return {"branches": 512, "unique_tokens": case.forest.unique_tokens, "seconds": statistics.median(times[1:])}


PACKING_GOAL = 5e-3  # seconds
GOAL = 0.85  # share of the token ratio that the time ratio to a padded batch reaches


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """Each case against its peers."""
    settings = result["settings"]
    rows = []
    if packing := result.get("packing"):
        text = f"packing {packing['branches']} branches of 1,024 tokens"
        seconds = packing["seconds"]
        rows.append(
            ReadmeRow(text, "tree_training.py --packing", human(seconds), human(PACKING_GOAL), seconds > PACKING_GOAL)
        )
    for case, ways in result["results"].items():
        ours, padded = ways["tree (ours)"], ways["padded"]
        share = f"{padded['token_ratio']:.2f} x the tokens (share {padded['share']:.2f})"
        others = "; ".join(f"{name} {ways[name]['time_ratio']:.2f} x as long" for name in ("unshared", "one level"))
        rows.append(
            ReadmeRow(
                f"a training step of {case}, {settings['model']}, {settings['dtype']}, {settings['device']}",
                f"tree_training.py --only {settings['only']} --repeats {settings['repeats']}",
                f"{human(ours['seconds'])}; padded {padded['time_ratio']:.2f} x as long for {share}; {others}",
                f"share {GOAL}",
                padded["share"] < GOAL,
                (
                    f"a training step of {case}, against padded rows",
                    f"{padded['time_ratio']:.2f} x as fast, for {share}",
                ),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m", help="shape of the model; random weights")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast on float32 weights")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="shortens all lengths")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--packing", action="store_true", help="only the time that packing 512 branches takes")
    parser.add_argument("--only", type=int, help="the number of one case, from 0")
    parser.add_argument("--unique-tokens", type=int, help="GPO trees of about so many tokens instead of the four cases")
    parser.add_argument(
        "--pass-tokens", type=int, help="tokens in a pass of the peers; default: 10,240 on a CPU, 65,536 on CUDA"
    )
    parser.add_argument("--quick", action="store_true", help="a small model, short trees, two repeats")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    if args.quick:
        args.model, args.scale, args.repeats = "small", args.scale / 8, 2
    torch.set_num_threads(args.threads)
    if args.packing:
        record = {"machine": machine(), "packing": packing_times(50), "settings": {}, "results": {}}
        print(f"packing 512 branches of 1,024 tokens: {human(record['packing']['seconds'])}")
        if args.json:
            args.json.write_text(json.dumps(record, indent=1))
        return
    torch.manual_seed(0)
    shape = dict(MODELS[args.model])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("kind"), **shape)).to(args.device).train()
    pass_tokens = args.pass_tokens or (10_240 if args.device == "cpu" else 65_536)
    results = {}
    for number, case in enumerate(cases(args.scale, args.unique_tokens)):
        if args.only is None or number == args.only:
            results[case.name] = measure(model, case, args.repeats, args.dtype == "bf16", args.device, pass_tokens)
            show(case, results[case.name])
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items() if k != "json"}
        record = {"machine": machine(), "floors": floors(args.device), "settings": settings, "results": results}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

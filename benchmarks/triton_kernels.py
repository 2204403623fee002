"""The Triton kernels of rollout and tree training against their peers, one kernel at a time.

    python benchmarks/triton_kernels.py --device cuda --json kernels.json
    python benchmarks/triton_kernels.py --quick      # tiny sizes in Triton's interpreter: does it run? No timings.

Decode attention: branches of shared prefixes, against plain paged attention by the same kernel (nothing shared) and
against scaled_dot_product_attention over a cache that is repeated for each branch; the floor is the time to read every
key and value once at the measured copy bandwidth. Tree attention: forward and backward, against FlexAttention with the
same mask and against causal attention over the padded, separate branches. Sampling: against the plain torch sampler and
softmax + multinomial. Peers run interleaved; medians, with the 10th and 90th percentiles in the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from gpo_fast.bench.common import device_name, floors, machine
from gpo_fast.kernels.sampling import Filters, sample_tokens
from gpo_fast.kernels.tree_attention import tree_attention, tree_blocks
from gpo_fast.kernels.work_list import PlanArrays, plain_plan
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gpo_fast.rollout.attention_gpu import attend_shared, prepare
from gpo_fast.rollout.sampler import sample, stream_key, uniforms
from gpo_fast.rollout.types import SamplingParams

BLOCK = 16
Run = Callable[[], Any]


def milliseconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def compare(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, dict[str, float] | str]:
    """Times of each run, interleaved. A run that fails is reported with its error."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    warm_up = 2 if device.type == "cuda" else 0  # the first turns compile
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            if name in errors:
                continue
            try:
                elapsed = milliseconds(run, device)
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            if turn >= warm_up:
                times[name].append(elapsed)
    results: dict[str, dict[str, float] | str] = {}
    for name in runs:
        if name in errors:
            results[name] = errors[name]
            continue
        ordered = np.array(sorted(times[name]))
        low, high = np.percentile(ordered, [10, 90])
        results[name] = {"median_ms": statistics.median(ordered), "p10_ms": float(low), "p90_ms": float(high)}
    return results


def comb_plan(pages: np.ndarray, prompts: int, branches: int, prefix: int, tail: int, block_size: int) -> PlanArrays:
    """`prompts` prefixes, each shared by `branches` rows with private tails.

    Args:
        pages: int32, first those of the prefixes, prompt by prompt, then those of the tails, row by row.
        prefix: tokens, a multiple of `block_size`.
    """
    rows, shared, private = prompts * branches, prefix // block_size, -(-tail // block_size)
    groups, tails = np.split(pages, [prompts * shared])
    return PlanArrays(
        np.zeros(prompts, np.int32),
        np.full(prompts, prefix, np.int32),
        np.arange(prompts + 1, dtype=np.int32) * shared,
        groups,
        np.arange(prompts + 1, dtype=np.int32) * branches,
        np.arange(rows, dtype=np.int32),
        np.full(rows, prefix, np.int32),
        np.arange(rows + 1, dtype=np.int32) * private,
        tails,
    )


def decode_case(
    prompts: int, branches: int, prefix: int, tail: int, heads: int, kv_heads: int, device: torch.device
) -> tuple[dict[str, Run], int]:
    """The runs, and the bytes of all keys and values read once."""
    head_dim, rows, dtype = 128, prompts * branches, torch.bfloat16
    shared, private = prefix // BLOCK, -(-tail // BLOCK)
    pages = np.arange(prompts * shared + rows * private, dtype=np.int32)
    plan = comb_plan(pages, prompts, branches, prefix, tail, BLOCK)
    lengths = np.full(rows, prefix + tail, np.int32)
    tables = np.concatenate(
        [np.repeat(plan.pages.reshape(prompts, -1), branches, 0), plan.tail_pages.reshape(rows, -1)], 1
    )
    q = torch.randn(rows, heads, head_dim, device=device, dtype=dtype)
    keys, values = (torch.randn(len(pages) * BLOCK, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    on_device, scale = torch.from_numpy(lengths).to(device), head_dim**-0.5
    options: dict[str, Any] = {"block_size": BLOCK, "heads": heads, "kv_heads": kv_heads, "device": device}
    forest = prepare(plan, **options)
    plain = prepare(plain_plan(tables, lengths, BLOCK), **options)
    # The repeated cache, gathered beforehand: only the attention is timed.
    positions = np.arange(prefix + tail)
    slots = torch.from_numpy(tables[:, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK).to(device)
    dense_keys, dense_values = (t[slots].transpose(1, 2) for t in (keys, values))
    runs = {
        "ours": lambda: attend_shared(q, keys, values, forest, on_device, scale),
        "ours, nothing shared": lambda: attend_shared(q, keys, values, plain, on_device, scale),
        "sdpa, cache repeated": lambda: F.scaled_dot_product_attention(
            q[:, :, None], dense_keys, dense_values, scale=scale, enable_gqa=True
        ),
    }
    unique = prompts * prefix + rows * tail
    return runs, 2 * unique * kv_heads * head_dim * dtype.itemsize


def tree_case(
    prefix: int, branches: int, tail: int, device: torch.device, *, heads: int = 16, kv_heads: int = 8
) -> dict[str, Run]:
    """Forward and backward over one shared prefix with branches."""
    head_dim, dtype = 128, torch.bfloat16 if device.type == "cuda" else torch.float32
    count, scale = prefix + branches * tail, head_dim**-0.5
    ends = torch.full((count,), count, dtype=torch.int32)
    for branch in range(branches):
        ends[prefix + branch * tail : prefix + (branch + 1) * tail] = prefix + (branch + 1) * tail
    ends = ends.to(device)
    shapes = [(count, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    grad = torch.randn_like(q)
    blocks = tree_blocks(ends, head_dim, dtype)

    def ours() -> None:
        torch.autograd.grad(tree_attention(q, k, v, ends, scale, blocks), (q, k, v), grad)

    def batched(t: Tensor) -> Tensor:
        return t.detach().transpose(0, 1)[None].requires_grad_()

    flex_inputs = [batched(t) for t in (q, k, v)]
    compiled: list[Any] = []

    def flex() -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not compiled:
            if device.type != "cuda":
                raise RuntimeError("FlexAttention has no backward pass here")

            def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (j <= i) & (i < ends[j])

            compiled.extend([torch.compile(flex_attention), create_block_mask(sees, None, None, count, count, device)])
        out = compiled[0](*flex_inputs, block_mask=compiled[1], scale=scale, enable_gqa=True)
        torch.autograd.grad(out, flex_inputs, grad.transpose(0, 1)[None])

    padded = [
        torch.randn(branches, h, prefix + tail, head_dim, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]

    def separate() -> None:
        out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=True)
        torch.autograd.grad(out, padded, padded[0].detach())

    return {"ours": ours, "flex attention": flex, "sdpa, branches apart": separate}


def sampling_case(rows: int, vocabulary: int, params: SamplingParams, device: torch.device) -> dict[str, Run]:
    logits = torch.randn(rows, vocabulary, device=device) * 3
    keys = np.array([stream_key(0, i) for i in range(rows)], np.uint64)
    positions = np.zeros(rows, np.uint64)
    on_device = [torch.from_numpy(a.view(np.int64)).to(device) for a in (keys, positions)]
    temperature = torch.full((rows,), params.temperature, device=device)
    filters = None
    if params.top_k or params.top_p < 1 or params.min_p:
        filters = Filters(
            torch.full((rows,), params.top_k, dtype=torch.int32, device=device),
            torch.full((rows,), params.top_p, device=device),
            torch.full((rows,), params.min_p, device=device),
        )
    uniform = uniforms(keys, positions)
    return {
        "ours": lambda: sample_tokens(logits, *on_device, temperature, filters),
        "torch sampler": lambda: sample(logits, [params] * rows, uniform),
        "softmax + multinomial, unfiltered": lambda: torch.multinomial(torch.softmax(logits, -1), 1),
    }


def cases(device: torch.device, quick: bool) -> dict[str, tuple[dict[str, Run], int | None]]:
    if quick:
        return {
            "decode 1x4, prefix 64": decode_case(1, 4, 64, 20, 4, 2, device),
            "tree 32 + 2x16": (tree_case(32, 2, 16, device, heads=2, kv_heads=1), None),
            "sample 2x5000": (sampling_case(2, 5000, SamplingParams(), device), None),
        }
    plain, filtered = SamplingParams(), SamplingParams(temperature=0.8, top_k=50, top_p=0.95)
    return {
        "decode 2x32, prefix 1024, 16/8 heads": decode_case(2, 32, 1024, 256, 16, 8, device),
        "decode 8x32, prefix 2048, 12/2 heads": decode_case(8, 32, 2048, 256, 12, 2, device),
        "decode 64x1, prefix 1024, 16/8 heads": decode_case(64, 1, 1024, 256, 16, 8, device),
        "tree 1024 + 8x256": (tree_case(1024, 8, 256, device), None),
        "tree 4096 + 16x768": (tree_case(4096, 16, 768, device), None),
        "sample 64x151936": (sampling_case(64, 151_936, plain, device), None),
        "sample 256x151936": (sampling_case(256, 151_936, plain, device), None),
        "sample 64x151936, top-k 50, top-p 0.95": (sampling_case(64, 151_936, filtered, device), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu" and not (arguments.quick and triton.knobs.runtime.interpret):
        parser.error("on a CPU the kernels run only in the interpreter: set TRITON_INTERPRET=1 and give --quick")
    repeats = (3 if device.type == "cuda" else 1) if arguments.quick else arguments.repeats
    measured = floors(device.type)
    bandwidth = measured["copy_bytes_per_second"] / 1e3  # bytes in a millisecond
    table = Table("case", "run", "median ms", "ours / run", "over the floor")
    rows = []
    for name, (runs, floor_bytes) in cases(device, arguments.quick).items():
        results = compare(runs, device, repeats)
        floor = floor_bytes / bandwidth if floor_bytes else None
        own = results["ours"]
        for run, result in results.items():
            row: dict[str, Any] = {"case": name, "run": run, "floor_ms": floor}
            if isinstance(result, str):
                row["error"] = result
                table.add_row(name, run, result.splitlines()[0][:60], "", "")
            else:
                row |= result
                ratio = own["median_ms"] / result["median_ms"] if isinstance(own, dict) else None
                row["ours_over_run"] = ratio
                over = f"{result['median_ms'] / floor:.2f}" if floor else ""
                table.add_row(name, run, f"{result['median_ms']:.3f}", f"{ratio:.3f}" if ratio else "", over)
            rows.append(row)
    Console(width=130).print(table)
    if arguments.json:
        timed = device.type == "cuda"
        report = {"machine": machine(), "interpreted": not timed, "floors": measured, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

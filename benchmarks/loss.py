"""Time and extra peak memory of the fused losses and their peers, forward and backward.

    python benchmarks/loss.py                          both shapes on a CPU, frozen and trainable head
    python benchmarks/loss.py --only 1                 one row: the second of them
    python benchmarks/loss.py --quick                  a small shape, to see that it runs
    python benchmarks/loss.py --device cuda            the GPU shapes, with the fraction of the measured matmul ceiling
    python benchmarks/loss.py --task passes            a trainable head in one pass over the vocabulary and in two

Every measurement runs in a process of its own, peers in turn, `--rounds` times. Time: the fastest of two calls after a
warm-up on a small input. Extra memory: the process's high-water mark during the call, less what it held before and the
gradients that it leaves behind.
The loss is GRPO (DPO in the rows named so); `F.linear_cross_entropy` has no policy loss and does its own, simpler one.
"products of one pass" are its three matrix products for 1,024 rows at a time, by torch and rounded to bfloat16.
A peer that does not finish within `--timeout` is reported as slower than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpo_fast.bench.common import ReadmeRow, device_name, floors, human, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

SEQUENCES = 8
SHAPES = {
    "cpu": [(2048, 151936, 1536), (2048, 49152, 576)],
    "cuda": [(8192, 151936, 1536), (8192, 151936, 3584)],
    "quick": [(256, 4096, 128)],
}
TASKS = {
    "GRPO": ["gpo-fast", "plain torch", "plain torch, float32", "F.linear_cross_entropy", "Liger GRPO", "TRL chunked"],
    "DPO": ["gpo-fast", "plain torch", "Liger DPO"],
}
# Our own code with a trainable head, whichever it would choose.
PASSES = [
    "two passes", "one pass", "products of one pass", "two passes, float32", "one pass, float32",
    "one pass of 128 MiB, float32",
]  # fmt: skip
# The goals: of plain torch's time, of its extra memory, and how much longer a peer must take (the others: 1).
MOST_OF_PLAIN = {"frozen": 0.40, "trainable": 0.70}
MOST_MEMORY = 0.03
LEAST_SPEED = {"F.linear_cross_entropy": 5.0}


class Inputs:
    """Random rows and head, made without a copy of the head in another type."""

    def __init__(
        self, rows: int, vocab: int, width: int, device: str, trainable: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        new = {"dtype": dtype, "device": device, "generator": generator}
        self.hidden = torch.randn(rows, width, **new).requires_grad_()
        self.weight = torch.randn(vocab, width, **new).mul_(width**-0.5).requires_grad_(trainable)
        self.targets = torch.randint(0, vocab, (rows,), device=device, generator=generator)
        self.advantages = torch.randn(SEQUENCES, device=device)
        self.old = torch.full((rows,), -12.0, device=device)

    def batched(self, values: Tensor) -> Tensor:
        return values.reshape(SEQUENCES, -1, *values.shape[1:])


def grpo(inputs: Inputs, logprobs: Tensor) -> Tensor:
    """The loss that all peers are given: sequences of one length, so its mean is that over tokens."""
    ratio = torch.exp(logprobs - inputs.old)
    advantage = inputs.advantages.repeat_interleave(logprobs.shape[0] // SEQUENCES)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def dpo(inputs: Inputs, logprobs: Tensor) -> Tensor:
    chosen, rejected = inputs.batched(logprobs).sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def plain_logprobs(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    logits = inputs.hidden.to(dtype) @ inputs.weight.to(dtype).t()
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1)


def losses(task: str) -> dict[str, Callable[[Inputs], Tensor]]:
    from gpo_fast.losses import chunked, cpu, dispatch, linear_policy_loss, linear_preference_loss

    def one_pass_path(head: Any, hidden: Tensor) -> Any:
        path = dispatch.choose(head, hidden)
        return chunked if path is cpu else path  # the C++ code has no one pass

    def fast(x: Inputs) -> Tensor:
        hidden, targets = x.batched(x.hidden), x.batched(x.targets)
        if task == "DPO":
            reference = torch.zeros(SEQUENCES, device=x.hidden.device)
            return linear_preference_loss(
                hidden, x.weight, targets, loss_type="dpo", ref_logprobs=reference, return_entropy=False
            ).loss
        return linear_policy_loss(
            hidden, x.weight, targets, loss_type="grpo", advantages=x.advantages,
            old_logprobs=x.batched(x.old), return_entropy=False,
        ).loss  # fmt: skip

    def liger_grpo(x: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=x.hidden.is_cuda, use_ref_model=False, loss_type="grpo")
        mask = torch.ones_like(x.batched(x.old))
        return function(
            x.batched(x.hidden),
            x.weight,
            x.batched(x.targets),
            mask,
            x.advantages,
            old_per_token_logps=x.batched(x.old),
        )[0]

    def liger_dpo(x: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        function = LigerFusedLinearDPOLoss(beta=0.1, compiled=x.hidden.is_cuda, use_ref_model=False)
        return function(x.weight, x.batched(x.hidden), x.batched(x.targets))[0]

    def trl(x: Inputs) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        logprobs = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, 1.0, 8192, None, 1.0, ())[0]
        return grpo(x, logprobs)

    def one_pass(x: Inputs) -> Tensor:
        dispatch.one_pass = one_pass_path
        return fast(x)

    def one_pass_in_128_mib(x: Inputs) -> Tensor:
        chunked.KEPT_ELEMENTS = 1 << 25
        return one_pass(x)

    def two_passes(x: Inputs) -> Tensor:
        dispatch.one_pass = lambda head, hidden: None
        return fast(x)

    loss = dpo if task == "DPO" else grpo
    return {
        "two passes": two_passes,
        "one pass": one_pass,
        "products of one pass": ProductsOfOnePass.of,
        "two passes, float32": two_passes,
        "one pass, float32": one_pass,
        "one pass of 128 MiB, float32": one_pass_in_128_mib,
        "gpo-fast": fast,
        "plain torch": lambda x: loss(x, plain_logprobs(x, torch.bfloat16)),
        "plain torch, float32": lambda x: loss(x, plain_logprobs(x, torch.float32)),
        "F.linear_cross_entropy": lambda x: F.linear_cross_entropy(
            x.hidden, x.weight, x.targets, options=torch.nn.LinearCrossEntropyOptions()
        ),
        "Liger GRPO": liger_grpo,
        "Liger DPO": liger_dpo,
        "TRL chunked": trl,
    }


class ProductsOfOnePass(torch.autograd.Function):
    """A lower bound: of 1,024 rows at a time the logits, dHidden and dWeight, with no softmax in between."""

    @classmethod
    def of(cls, inputs: Inputs) -> Tensor:
        return cls.apply(inputs.hidden, inputs.weight)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, grad in zip(hidden.split(1024), grad_hidden.split(1024)):
            logits = rows @ weight.t()
            torch.mm(logits, weight, out=grad)
            grad_weight.addmm_(logits.t(), rows)
        ctx.gradients = grad_hidden, grad_weight
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradients, ctx.gradients = ctx.gradients, None
        return gradients


def resident(field: str) -> int:
    """Bytes that /proc/self/status gives for VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(task: str, peer: str, shape: tuple[int, int, int], device: str, trainable: bool) -> dict[str, float]:
    """Seconds and extra bytes of one forward and backward pass, in this process."""
    call = losses(task)[peer]
    dtype = torch.float32 if task == "passes" and peer.endswith("float32") else torch.bfloat16
    call(Inputs(64, 512, 64, device, trainable, dtype)).backward()
    inputs = Inputs(*shape, device, trainable, dtype)
    seconds, extra = [], []
    while len(seconds) < 2 and sum(seconds) < 60:
        inputs.hidden.grad = inputs.weight.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = resident("VmRSS")
        start = time.perf_counter()
        call(inputs).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
        extra.append(peak - before - sum(t.grad.nbytes for t in (inputs.hidden, inputs.weight) if t.grad is not None))
    return {"seconds": min(seconds), "extra_bytes": extra[0]}


def in_subprocess(arguments: list[str], timeout: float) -> dict[str, float] | str:
    command = [sys.executable, __file__, "--measure", *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done in {timeout:.0f} s"
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["failed"])[-1]
    return json.loads(run.stdout.strip().splitlines()[-1])


def medians(runs: list) -> tuple[float, float] | None:
    """Median seconds and extra bytes of the runs that finished."""
    good = [run for run in runs if isinstance(run, dict)]
    if not good:
        return None
    return statistics.median(run["seconds"] for run in good), statistics.median(run["extra_bytes"] for run in good)


def report(name: str, results: dict[str, list], trainable: bool, shape: tuple[int, int, int], ceiling: float) -> Table:
    """One table: medians with their spread, ratios to plain torch, and the share of the FLOP floor."""
    columns = ["peer", "seconds", "spread", "time / plain", "extra MiB", "memory / plain", "of ceiling"]
    table = Table(title=name)
    for column in columns:
        table.add_column(column, no_wrap=True)
    rows, vocab, width = shape
    floor = (6 if trainable else 4) * rows * vocab * width / ceiling
    plain = medians(results.get("plain torch", []))
    for peer, runs in results.items():
        middle = medians(runs)
        if middle is None:
            table.add_row(peer, str(runs[0]) if runs else "-")
            continue
        times = [run["seconds"] for run in runs if isinstance(run, dict)]
        ratios = (f"{middle[0] / plain[0]:.2f}", f"{middle[1] / plain[1]:.3f}") if plain else ("-", "-")
        table.add_row(
            peer, f"{middle[0]:.3f}", f"{min(times):.3f} to {max(times):.3f}", ratios[0],
            f"{middle[1] / 2**20:.0f}", ratios[1], f"{floor / middle[0]:.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, one round")
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=int, help="replace T of every shape (a multiple of 8)")
    parser.add_argument("--only", type=int, metavar="ROW", help="one row, counted from 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one measurement")
    parser.add_argument("--task", choices=[*TASKS, "passes", "all"], default="all")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument(
        "--measure", nargs=5, metavar=("TASK", "PEER", "SHAPE", "DEVICE", "HEAD"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measure:
        task, peer, shape, device, head = options.measure
        rows, vocab, width = map(int, shape.split(","))
        print(json.dumps(measure(task, peer, (rows, vocab, width), device, head == "trainable")))
        return

    shapes = SHAPES["quick" if options.quick else options.device]
    tasks = TASKS if options.task == "all" else [options.task]
    every = [
        (task, head, (options.rows or rows, vocab, width))
        for rows, vocab, width in shapes
        for task in tasks
        for head in ("frozen", "trainable")
        if head == "trainable" or task != "passes"
    ]
    if options.only is not None and not 0 <= options.only < len(every):
        parser.error(f"--only must be in [0, {len(every)}), got {options.only}")
    console, rounds = Console(width=120), 1 if options.quick else options.rounds
    record: dict = {"machine": machine(), "floors": floors(options.device), "runs": []}
    ceiling = record["floors"]["bfloat16_flop_per_second"]
    for number, (task, head, shape) in enumerate(every):
        if options.only not in (None, number):
            continue
        results: dict[str, list] = {peer: [] for peer in (PASSES if task == "passes" else TASKS[task])}
        run = {"row": number, "task": task, "head": head, "shape": shape, "device": options.device, "results": results}
        record["runs"].append(run)
        for _ in range(rounds):
            for peer, runs in results.items():
                if runs and isinstance(runs[-1], str):
                    continue  # it failed or took too long: once is enough
                arguments = [task, peer, ",".join(map(str, shape)), options.device, head]
                runs.append(in_subprocess(arguments, options.timeout))
                if options.json:
                    options.json.write_text(json.dumps(record, indent=2) + "\n")
        console.print(report(title(run), results, head == "trainable", shape, ceiling))


def title(run: dict[str, Any]) -> str:
    rows, vocab, width = run["shape"]
    dtype = "" if run["task"] == "passes" else " bfloat16,"
    return f"{run['task']}, {run['head']} head, T={rows} V={vocab} H={width},{dtype} {run['device']}"


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """A row of the README for each row measured."""
    return [_readme_row(run) for run in result["runs"]]


def _readme_row(run: dict[str, Any]) -> ReadmeRow:
    middles = {peer: medians(runs) for peer, runs in run["results"].items()}
    ours, plain = middles.pop("gpo-fast"), middles.pop("plain torch")
    if ours is None or plain is None:
        raise ValueError(f"row {run['row']} has no time of gpo-fast or of plain torch")
    time_ratio, memory_ratio, most = ours[0] / plain[0], ours[1] / plain[1], MOST_OF_PLAIN[run["head"]]
    missed, others = time_ratio > most or memory_ratio > MOST_MEMORY, []
    for peer, middle in middles.items():
        if middle is None:
            others.append(f"{peer}: {run['results'][peer][0] if run['results'][peer] else 'not run'}")
            continue
        missed |= middle[0] < LEAST_SPEED.get(peer, 1.0) * ours[0]
        others.append(f"{peer} {middle[0] / ours[0]:.1f} x as long")
    text = f"{human(ours[0])}: {time_ratio:.2f} x the time of plain torch, {memory_ratio:.1%} of its extra memory"
    goal = f"{most:.2f} x, {MOST_MEMORY:.0%}, ahead of all"
    if "F.linear_cross_entropy" in run["results"]:
        goal += f", {LEAST_SPEED['F.linear_cross_entropy']:.0f} x `F.linear_cross_entropy`"
    result = "; ".join([text, *others])
    brief = (title(run), result) if tuple(run["shape"]) == SHAPES[run["device"]][0] else None
    return ReadmeRow(title(run), f"loss.py --only {run['row']}", result, goal, missed, brief)


if __name__ == "__main__":
    main()

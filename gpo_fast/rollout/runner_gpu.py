"""Steps on a GPU: Triton attention and sampling around the model's own modules, decode steps as CUDA graphs.

A step runs over device buffers that one copy from the host fills (`DeviceStep`), and gives back tokens and logprobs by
one copy to the host. A step that computes prompts gets buffers of its size and runs kernel by kernel, the prompts'
attention by flash-attn where it is installed. A step that only decodes, the usual one, is padded to a bucket of sizes,
whose buffers stay: its kernels are captured once in a CUDA graph and replayed with new contents.

On a CPU (Triton's interpreter, in tests) a replay is a plain call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from gpo_fast._C import PrefixCache
from gpo_fast.kernels.kv_blocks import copy_blocks
from gpo_fast.kernels.sampling import Filters, sample_tokens
from gpo_fast.kernels.tl_utils import block_dim
from gpo_fast.kernels.work_list import DeviceWork, Plan, plain_plan
from gpo_fast.rollout.attention import KVPool
from gpo_fast.rollout.attention_gpu import SharedBatch, prepare, room_for, with_chunks
from gpo_fast.rollout.flash import PromptAttention, VarlenAttention, flash_attention
from gpo_fast.rollout.runner import ModuleForward, Step
from gpo_fast.rollout.sampler import Drawn

log = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes: what Triton's compiler makes use of


class DeviceArrays:
    """Arrays in one piece of device memory, filled by one copy from the host and never moved.

    Args:
        fields: type and length of each array.
    """

    def __init__(self, fields: dict[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        starts: dict[str, int] = {}
        size = 0
        for name, (dtype, length) in fields.items():
            starts[name] = size
            size += -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[starts[name] : starts[name] + length * dtype.itemsize].view(dtype)
                for name, (dtype, length) in fields.items()
            }

        self.host = {name: view.numpy() for name, view in views(self._host).items()}
        self.device = views(self._device)

    def send(self) -> None:
        """Copies what is in `host` to `device`, on the current stream, without waiting for it."""
        self._device.copy_(self._host, non_blocking=True)


class DeviceStep:
    """A forward pass over up to `tokens` tokens and up to `draws` draws, over buffers that never move.

    What is left of the buffers is padding: it writes no key, sees none, and what it draws is not looked at.
    """

    def __init__(
        self,
        forward: ModuleForward,
        pool: KVPool,
        tokens: int,
        draws: int,
        work: DeviceWork,
        filtered: bool,
        prompts: PromptAttention | None = None,
    ) -> None:
        device = pool.keys.device
        per_token = {"tokens": torch.int64, "positions": torch.int64, "slots": torch.int64, "lengths": torch.int32}
        per_draw = {"selected": torch.int64, "keys": torch.int64, "drawn": torch.int64, "temperature": torch.float32}
        per_draw |= {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        fields = {name: (dtype, tokens) for name, dtype in per_token.items()}
        self.arrays = DeviceArrays(fields | {name: (dtype, draws) for name, dtype in per_draw.items()}, device)
        self.work = work
        self.plan: Plan | None = None  # the plan that `work` holds
        self.replay: Callable[[], None] | None = None
        self._forward = forward
        at = self.arrays.device
        self._batch = SharedBatch(pool, at["slots"], at["lengths"], work, forward.softcap, prompts)
        self._filters = Filters(at["top_k"], at["top_p"], at["min_p"]) if filtered else None
        self._out = torch.zeros(3, draws, dtype=torch.float64, device=device)

    def load(self, step: Step) -> None:
        """Fills the buffers, but for the work list."""
        params = step.params
        padded: dict[str, tuple[Any, float]] = {
            "tokens": (step.tokens, 0),
            "positions": (step.positions, 0),
            "slots": (step.slots, -1),
            "lengths": (step.lengths, 0),
            "selected": (step.selected[step.rows], 0),
            "keys": (step.keys.view(np.int64), 0),
            "drawn": (step.drawn.view(np.int64), 0),
            "temperature": ([p.temperature for p in params], 1),
            "top_k": ([p.top_k for p in params], 0),
            "top_p": ([p.top_p for p in params], 1),
            "min_p": ([p.min_p for p in params], 0),
        }
        for name, (values, padding) in padded.items():
            array = self.arrays.host[name]
            array[: len(values)] = values
            array[len(values) :] = padding
        self.arrays.send()

    def compute(self) -> None:
        """All of the device's work; launches only, nothing waits."""
        at = self.arrays.device
        logits = self._forward(at["tokens"], at["positions"], self._batch, at["selected"])
        drawn = sample_tokens(logits, at["keys"], at["drawn"], at["temperature"], self._filters)
        self._out.copy_(torch.stack([column.double() for column in drawn]))

    def result(self, draws: int) -> Drawn:
        """What the first `draws` branches drew: one copy to the host, which waits for the device."""
        tokens, logprobs, sampling_logprobs = self._out.cpu().numpy()[:, :draws]
        return Drawn(tokens.astype(np.int64), logprobs, sampling_logprobs)


@dataclass(frozen=True)
class Bucket:
    """Decode steps that share buffers and a graph."""

    rows: int
    levels: int  # groups of a row, on average
    filtered: bool


class GpuRunner:
    """Computes the steps of one model on a GPU; see `Runner`, and `HostRunner` for the arguments.

    Args:
        max_rows: the most branches that decode together.
        fast: replay decode steps as CUDA graphs.

    Raises:
        ValueError: heads or pages that the kernels do not handle.
    """

    def __init__(
        self,
        model: Any,
        pool: KVPool,
        cache: PrefixCache,
        *,
        counters: dict[str, int],
        seconds: dict[str, float],
        max_rows: int,
        share_prefixes: bool,
        fast: bool,
    ) -> None:
        if pool.block_size & (pool.block_size - 1):
            raise ValueError(f"on a GPU block_size must be a power of two, got {pool.block_size}")
        block_dim(pool.keys.shape[-1])  # raises for head sizes that no tile holds
        config = model.config.get_text_config()
        self._pool = pool
        self._cache = cache
        self._counters = counters
        self._seconds = seconds
        self._max_rows = max_rows
        self._share_prefixes = share_prefixes
        self._forward = ModuleForward(model)
        self._heads_and_pages: dict[str, Any] = {
            "block_size": pool.block_size,
            "heads": config.num_attention_heads,
            "kv_heads": pool.keys.shape[2],
            "device": pool.keys.device,
        }
        self._max_length = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._device = pool.keys.device
        self._graphs = fast
        self._graph_memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._addresses = addresses(model)
        self.decode_steps: dict[Bucket, DeviceStep] = {}
        self._flash, prompts = self._find_flash_attention()
        log.info(
            "rollouts run the model's own modules with Triton attention and sampling, prompts with %s, decode steps %s",
            prompts,
            "as CUDA graphs" if fast else "kernel by kernel: fast_forward is off",
        )

    def run(self, step: Step) -> Drawn:
        """See `Runner`."""
        start = time.perf_counter()
        with _current(self._device):
            plan = self._plan(step)
            self._copy(*self._cache.take_copies())
            self._cache.acknowledge_copies()
            self._seconds["schedule"] += time.perf_counter() - start
            start = time.perf_counter()
            decodes = self._graphs and not step.chunks
            device_step = self._replay(step, plan) if decodes else self._compute(step, plan)
            drawn = device_step.result(len(step.rows))
        self._seconds["forward"] += time.perf_counter() - start
        return drawn

    def weights_changed(self) -> None:
        """See `Runner`. New values at the old addresses, as an optimiser leaves them, need no new graphs."""
        now = addresses(self._forward.model)
        if now != self._addresses:
            self._addresses = now
            self.decode_steps.clear()

    def _compute(self, step: Step, plan: Plan) -> DeviceStep:
        """Kernel by kernel, over buffers of the step's own size."""
        prompts = None
        if self._flash and step.chunks:
            prompts = PromptAttention(self._flash, step.chunks, self._pool)
        else:
            plan = with_chunks(plan, step.chunks)
        work = prepare(plan, **self._heads_and_pages)
        sizes = len(step.tokens), len(step.rows)
        device_step = DeviceStep(self._forward, self._pool, *sizes, work, is_filtered(step), prompts)
        device_step.load(step)
        device_step.compute()
        return device_step

    def _replay(self, step: Step, plan: Plan) -> DeviceStep:
        """The graph of the step's bucket, captured if this is its first; the same work as `_compute`."""
        bucket = self._bucket(step, plan)
        if bucket not in self.decode_steps:
            self.decode_steps[bucket] = self._decode_step(bucket)
        device_step = self.decode_steps[bucket]
        device_step.load(step)
        if device_step.plan is not plan:
            prepare(plan, **self._heads_and_pages, into=device_step.work)
            device_step.plan = plan
        if device_step.replay is None:
            try:
                device_step.replay = captured(device_step.compute, self._device, self._graph_memory)
            except RuntimeError as error:
                log.warning("decode steps run kernel by kernel: no CUDA graph of this model can be captured: %s", error)
                self._graphs = False
                self.decode_steps.clear()
                device_step.replay = device_step.compute
        device_step.replay()
        return device_step

    def _bucket(self, step: Step, plan: Plan) -> Bucket:
        rows = min(triton.next_power_of_2(step.running), self._max_rows)
        levels = triton.next_power_of_2(max(1, -(-len(plan.rows) // rows)))
        return Bucket(rows, levels, is_filtered(step))

    def _decode_step(self, bucket: Bucket) -> DeviceStep:
        """Buffers for every step of the bucket."""
        slots = self._pool.keys.shape[1]
        work = room_for(bucket.rows, min(self._max_length, slots), levels=bucket.levels, **self._heads_and_pages)
        return DeviceStep(self._forward, self._pool, bucket.rows, bucket.rows, work, bucket.filtered)

    def _find_flash_attention(self) -> tuple[VarlenAttention | None, str]:
        """flash-attn's function where it runs, and what the log says of the prompts' attention."""
        try:
            return flash_attention(self._pool), "flash-attn's attention"
        except (ValueError, ImportError) as error:
            return None, f"the same attention (no flash-attn: {error})"

    def _plan(self, step: Step) -> Plan:
        """Which keys the running branches share: the cache's plan, or one in which nothing is shared."""
        if not self._share_prefixes:
            tables = self._cache.block_tables(step.decoding)
            return plain_plan(tables, step.lengths[: step.running], self._pool.block_size)
        plan: Plan = self._cache.plan(step.decoding)
        self._counters["shared_reads_saved"] += int(((np.diff(plan.row_offsets) - 1) * plan.group_lengths).sum())
        return plan

    def _copy(self, source: np.ndarray, target: np.ndarray, length: np.ndarray) -> None:
        """Copy-on-write jobs; the kernels that write to the sources come after it on the same stream."""
        if len(source):
            jobs = torch.from_numpy(np.stack([source, target, length]).astype(np.int32)).to(self._device)
            count = torch.full((1,), len(source), dtype=torch.int32, device=self._device)
            copy_blocks(self._pool.keys, self._pool.values, jobs, count)


def is_filtered(step: Step) -> bool:
    """Whether some branch of a step samples with top-k, top-p or min-p."""
    return any(p.top_k or p.top_p < 1 or p.min_p for p in step.params)


def captured(compute: Callable[[], None], device: torch.device, memory: Any) -> Callable[[], None]:
    """A CUDA graph of `compute`, to be replayed; on a CPU `compute` itself.

    Args:
        memory: the pool that all graphs of a runner share. They never run at once, and nothing in it is read after a
            replay.

    Raises:
        RuntimeError: `compute` does something that a graph cannot hold, such as waiting for the device.
    """
    if device.type != "cuda":
        return compute
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles kernels, makes workspaces; the same keys are written again
            compute()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one, hence the outer context. Other threads (of a data loader,
    # say) may go on using the device.
    with torch.cuda.stream(current), torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        compute()
    return graph.replay


def addresses(model: Any) -> tuple[Any, ...]:
    """What a captured graph takes for granted of a model: where its weights are, and which adapters run."""
    weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    adapters = [
        (tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, repr(layer.scaling))
        for layer in model.modules()
        if hasattr(layer, "merged_adapters")
    ]
    return (*weights, *adapters)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one: Triton launches there."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield

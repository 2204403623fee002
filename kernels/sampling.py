"""Sampling from logits: the token, its logprob under temperature 1, and its logprob under the sampled distribution.

    x = z / temperature;  kept = top-k, then top-p of what is left, then min-p (p_v >= min_p * max p)
    token            = the first index whose cumulative kept mass exceeds u * total   (inverse CDF, index order)
    logprob          = z[token] - logsumexp(z)
    sampling_logprob = x[token] - log(sum over kept exp(x))          (0 for temperature 0, which takes the argmax)

u is number `position` of the row's own SplitMix64 stream, as in `gpo_fast.rollout.sampler`: the same key, position
and logits give the same token as the reference, unless u lies within rounding of a boundary between two tokens.

Three kernels over chunks of CHUNK logits:
1. `stats_kernel`  (rows x chunks programs): the chunk's maximum, its sum of exponentials for temperature 1 (float32)
   and for the row's own temperature (float64), and its argmax. The one pass over the logits.
2. `filter_kernel` (one program per row, only if some row has a filter): finds, without a sort, the smallest kept value
   and how many tokens of exactly that value stay, by searching the 32-bit patterns of the floats two bits a pass, 16
   passes for top-k and 16 for top-p (each over a row that the L2 cache should hold); replaces the chunks' masses by
   the kept ones. Counts are integers, so top-k is exact; equal values stay in the order of their indices.
3. `draw_kernel`   (one program per row): finds the chunk from the chunks' masses and reads that chunk alone again.

Shapes: logits [N, V] float32, bfloat16 or float16, unit stride along V; everything else [N]. Nothing is synchronised
and nothing but tokens and logprobs leaves the device, so the launches can be captured in a CUDA graph.
Not handled: NaN logits; a row with no finite logit; penalties and biases (add them to the logits first). A token
with a logit of -inf is never drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
NEVER = tl.constexpr(-(2**31))  # below the pattern of every float: a threshold that keeps all


class Filters(NamedTuple):
    """Filters of each row, on the device. top_k 0 is off, top_p 1 is off, min_p 0 is off."""

    top_k: Tensor  # int32 [N]
    top_p: Tensor  # float32 [N]
    min_p: Tensor  # float32 [N]


class Sampled(NamedTuple):
    """One token for each row."""

    tokens: Tensor  # int64 [N]
    logprobs: Tensor  # float32 [N]: under temperature 1 with no filter
    sampling_logprobs: Tensor  # float32 [N]: under the distribution that was sampled from


@triton.jit
def stream_uniform(key, position):
    """Number `position` (from 0) of the stream `key`, float64 in [0, 1): SplitMix64 with a counter.

    Both arguments are uint64. See `gpo_fast.rollout.sampler.uniforms`, which this equals bit by bit.
    """
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    one = tl.full([], 1, tl.uint64)
    z = _mix(_mix(key) + (position + one) * golden)
    return (z >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)  # 2^-53


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def _load_chunk(row_logits, chunk, vocabulary, temperature, SIZE: tl.constexpr):
    """(index, raw, scaled) of a chunk; -inf beyond the vocabulary. Scaled as the reference scales: one rounding."""
    index = chunk * SIZE + tl.arange(0, SIZE)
    raw = tl.load(row_logits + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
    return index, raw, tl.div_rn(raw, tl.zeros_like(raw) + temperature)


@triton.jit
def _pattern(x):
    """int32 that is ordered as the floats are. Both zeros get the same one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _finite(top):
    """0 in place of -inf: what to subtract from a chunk in which every logit is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _temperature(temperatures, row):
    temperature = tl.load(temperatures + row)
    return tl.where(temperature == 0, 1.0, temperature)


@triton.jit
def stats_kernel(
    logits,  # [N, V]
    temperatures,  # float32 [N]; 0 is greedy
    tops,  # float32 [N, chunks]: the largest raw logit
    raw_sums,  # float32 [N, chunks]: sum exp(z - top)
    masses,  # float64 [N, chunks]: sum exp((z - top) / temperature)
    bests,  # int32 [N, chunks]: the first index of the largest logit
    vocabulary,
    row_stride,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    temperature = _temperature(temperatures, row)
    row_logits = logits + row.to(tl.int64) * row_stride
    _, raw, scaled = _load_chunk(row_logits, chunk, vocabulary, temperature, SIZE)
    top = tl.max(raw, 0)
    best = chunk * SIZE + tl.argmax(raw, 0, tie_break_left=True)
    raw_sum = tl.sum(tl.exp(raw - _finite(top)), 0)
    mass = tl.sum(tl.exp(scaled - _finite(tl.max(scaled, 0))).to(tl.float64), 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops + at, top)
    tl.store(raw_sums + at, raw_sum)
    tl.store(masses + at, mass)
    tl.store(bests + at, best)


@triton.jit
def _above(
    row_logits, chunks, vocabulary, temperature, best, floor, threshold, COUNT: tl.constexpr, SIZE: tl.constexpr
):
    """Number (COUNT) or mass of the tokens with pattern >= threshold and >= floor."""
    if COUNT:
        sums = tl.zeros([SIZE], tl.int32)
    else:
        sums = tl.zeros([SIZE], tl.float32)
    for chunk in range(0, chunks):
        _, _, scaled = _load_chunk(row_logits, chunk, vocabulary, temperature, SIZE)
        pattern = _pattern(scaled)
        inside = (pattern >= threshold) & (pattern >= floor)
        if COUNT:
            sums += inside.to(tl.int32)
        else:
            sums += tl.where(inside, tl.exp(scaled - best), 0.0)
    if COUNT:
        return tl.sum(sums, 0).to(tl.float64)
    else:
        return tl.sum(sums.to(tl.float64), 0)


@triton.jit
def _search(row_logits, chunks, vocabulary, temperature, best, floor, need, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The largest pattern t such that the tokens with pattern >= t (and >= floor) number or weigh at least `need`.

    Two bits of t are found in each pass over the row, from the top. Below every pattern if there is no such t.
    """
    found = tl.full([], NEVER, tl.int32)
    for digit in range(0, 16):
        step = tl.full([], 1, tl.int32) << (30 - 2 * digit)
        if COUNT:
            one = tl.zeros([SIZE], tl.int32)
            two = tl.zeros([SIZE], tl.int32)
            three = tl.zeros([SIZE], tl.int32)
        else:
            one = tl.zeros([SIZE], tl.float32)
            two = tl.zeros([SIZE], tl.float32)
            three = tl.zeros([SIZE], tl.float32)
        first = found + step
        second = first + step
        third = second + step
        for chunk in range(0, chunks):
            _, _, scaled = _load_chunk(row_logits, chunk, vocabulary, temperature, SIZE)
            pattern = _pattern(scaled)
            if COUNT:
                weight = (pattern >= floor).to(tl.int32)
            else:
                weight = tl.where(pattern >= floor, tl.exp(scaled - best), 0.0)
            one += tl.where(pattern >= first, weight, 0)
            two += tl.where(pattern >= second, weight, 0)
            three += tl.where(pattern >= third, weight, 0)
        found = tl.where(
            tl.sum(three.to(tl.float64), 0) >= need,
            third,
            tl.where(
                tl.sum(two.to(tl.float64), 0) >= need,
                second,
                tl.where(tl.sum(one.to(tl.float64), 0) >= need, first, found),
            ),
        )
    return found


@triton.jit
def _kept(scaled, threshold, ties, ties_before, min_p, best):
    """(kept, tied): what the filters leave of a chunk; of equal values at the threshold the first `ties` stay."""
    pattern = _pattern(scaled)
    tied = pattern == threshold
    rank = ties_before + tl.cumsum(tied.to(tl.int32), 0) - 1
    kept = (pattern > threshold) | (tied & (rank < ties))
    return kept & (tl.exp(scaled - best) >= min_p), tied


@triton.jit
def filter_kernel(
    logits,
    temperatures,
    top_ks,  # int32 [N]
    top_ps,  # float32 [N]
    min_ps,  # float32 [N]
    tops,  # float32 [N, chunks], from stats_kernel
    masses,  # float64 [N, chunks]: replaced by the kept masses
    thresholds,  # int32 [N]: pattern of the smallest kept value
    ties,  # int32 [N]: tokens of that value that stay
    ties_before,  # int32 [N, chunks]: tokens of that value before the chunk
    vocabulary,
    row_stride,
    chunks,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two, at least `chunks`
):
    row = tl.program_id(0)
    temperature = _temperature(temperatures, row)
    row_logits = logits + row.to(tl.int64) * row_stride
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row).to(tl.float64)
    min_p = tl.load(min_ps + row)
    column = tl.arange(0, CHUNKS)
    top = tl.load(tops + row * chunks + column, mask=column < chunks, other=float("-inf"))
    best = tl.max(tl.div_rn(top, tl.zeros_like(top) + temperature), 0)

    threshold = tl.full([], NEVER, tl.int32)
    left = tl.full([], 2147483647, tl.int32)
    if (top_k > 0) & (top_k < vocabulary):
        need = top_k.to(tl.float64)
        threshold = _search(row_logits, chunks, vocabulary, temperature, best, threshold, need, True, SIZE)
        larger = _above(row_logits, chunks, vocabulary, temperature, best, threshold, threshold + 1, True, SIZE)
        left = top_k - larger.to(tl.int32)
    if top_p < 1:
        # The mass that top-k left: that above its threshold, and its ties.
        floor = threshold
        larger = _above(row_logits, chunks, vocabulary, temperature, best, floor, floor + 1, False, SIZE)
        value = _weight_of(floor, best)
        whole = larger + tl.where(top_k > 0, left.to(tl.float64) * value, 0.0)
        need = top_p * whole
        threshold = _search(row_logits, chunks, vocabulary, temperature, best, floor, need, False, SIZE)
        threshold = tl.maximum(threshold, floor)
        larger = _above(row_logits, chunks, vocabulary, temperature, best, floor, threshold + 1, False, SIZE)
        value = _weight_of(threshold, best)
        # Tie number j (from 0) stays while larger + j * value < need.
        staying = tl.ceil((need - larger) / tl.where(value > 0, value, 1.0))
        staying = tl.minimum(tl.maximum(staying, 1.0), 2147483647.0).to(tl.int32)
        left = tl.where(threshold == floor, tl.minimum(staying, left), staying)
    tl.store(thresholds + row, threshold)
    tl.store(ties + row, left)

    seen = tl.full([], 0, tl.int32)
    for chunk in range(0, chunks):
        _, _, scaled = _load_chunk(row_logits, chunk, vocabulary, temperature, SIZE)
        kept, tied = _kept(scaled, threshold, left, seen, min_p, best)
        weight = tl.where(kept, tl.exp(scaled - _finite(tl.max(scaled, 0))), 0.0)
        tl.store(masses + row * chunks + chunk, tl.sum(weight.to(tl.float64), 0))
        tl.store(ties_before + row * chunks + chunk, seen)
        seen += tl.sum(tied.to(tl.int32), 0)


@triton.jit
def _weight_of(pattern, best):
    """exp(x - best) of the value with this pattern, float64; 0 for the pattern below every float."""
    bits = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
    value = bits.to(tl.float32, bitcast=True)
    return tl.where(pattern == NEVER, 0.0, tl.exp(value - best)).to(tl.float64)


@triton.jit
def draw_kernel(
    logits,
    temperatures,
    keys,  # int64 [N]: the bits of the uint64 key of each row's stream
    positions,  # int64 [N]
    min_ps,
    tops,
    raw_sums,
    masses,
    bests,
    thresholds,
    ties,
    ties_before,
    tokens,  # int64 [N]
    logprobs,  # float32 [N]
    sampling_logprobs,  # float32 [N]
    vocabulary,
    row_stride,
    chunks,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    row = tl.program_id(0)
    greedy = tl.load(temperatures + row) == 0
    temperature = _temperature(temperatures, row)
    row_logits = logits + row.to(tl.int64) * row_stride
    column = tl.arange(0, CHUNKS)
    real = column < chunks
    at = row * chunks + column
    top = tl.load(tops + at, mask=real, other=float("-inf"))
    scaled_top = tl.div_rn(top, tl.zeros_like(top) + temperature)
    raw_best = tl.max(top, 0)
    best = tl.max(scaled_top, 0)
    raw_sum = tl.load(raw_sums + at, mask=real, other=0.0)
    normaliser = raw_best + tl.log(tl.sum(raw_sum * tl.exp(top - raw_best), 0))

    # Which chunk: the first whose cumulative mass exceeds the target.
    factor = tl.exp(scaled_top - best).to(tl.float64)
    mass = tl.load(masses + at, mask=real, other=0.0) * factor
    cumulative = tl.cumsum(mass, 0)
    total = tl.sum(mass, 0)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row).to(tl.uint64, bitcast=True)
    target = stream_uniform(key, position) * total
    passed = tl.sum((cumulative <= target).to(tl.int32), 0)
    chosen = tl.minimum(passed, tl.max(tl.where(mass > 0, column, 0), 0))
    before = tl.sum(tl.where(column < chosen, mass, 0.0), 0)
    own_factor = tl.sum(tl.where(column == chosen, factor, 0.0), 0)

    # Which token of it. Its weights are summed as they were for the chunk's mass.
    index, _, scaled = _load_chunk(row_logits, chosen, vocabulary, temperature, SIZE)
    weight = tl.exp(scaled - _finite(tl.max(scaled, 0)))
    if FILTERED:
        seen = tl.load(ties_before + row * chunks + chosen)
        min_p = tl.load(min_ps + row)
        kept, _ = _kept(scaled, tl.load(thresholds + row), tl.load(ties + row), seen, min_p, best)
        weight = tl.where(kept, weight, 0.0)
    within = tl.cumsum(weight.to(tl.float64), 0)
    passed = tl.sum((within * own_factor + before <= target).to(tl.int32), 0)
    last = tl.max(tl.where(weight > 0, index, 0), 0)  # if rounding leaves the target above all of them
    token = tl.minimum(chosen * SIZE + passed, last)

    if greedy:
        # The first chunk that holds the largest logit.
        first = tl.min(tl.where(real & (top == raw_best), column, CHUNKS), 0)
        token = tl.load(bests + row * chunks + first)
    raw = tl.load(row_logits + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, raw - normaliser)
    drawn = tl.div_rn(raw, temperature) - best - tl.log(total.to(tl.float32))
    tl.store(sampling_logprobs + row, tl.where(greedy, 0.0, drawn))


def sample_tokens(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: Tensor, filters: Filters | None = None
) -> Sampled:
    """Draws one token for each row.

    Args:
        logits: [N, V] float32, bfloat16 or float16, contiguous along V.
        keys: int64 [N], the bits of each row's uint64 stream key (`stream_key`; view the numpy array as int64).
        positions: int64 [N], how many numbers of its stream a row has used.
        temperature: float32 [N]; 0 takes the argmax.
        filters: None if no row of the batch has one; then the logits are read once.

    Raises:
        ValueError: arguments of another shape, dtype or device than these.
    """
    rows, vocabulary = logits.shape
    _check_rows(rows, logits.device, keys=(keys, torch.int64), positions=(positions, torch.int64))
    _check_rows(rows, logits.device, temperature=(temperature, torch.float32))
    if logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous along the vocabulary, got strides {logits.stride()}")
    chunks = -(-vocabulary // CHUNK)
    room = triton.next_power_of_2(chunks)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = Sampled(empty(rows, dtype=torch.int64), empty(rows, dtype=torch.float32), empty(rows, dtype=torch.float32))
    if rows == 0:
        return out
    tops, raw_sums = (empty(rows, chunks, dtype=torch.float32) for _ in range(2))
    masses = empty(rows, chunks, dtype=torch.float64)
    bests = empty(rows, chunks, dtype=torch.int32)
    stride = logits.stride(0)
    stats_kernel[(rows, chunks)](
        logits, temperature, tops, raw_sums, masses, bests, vocabulary, stride, SIZE=CHUNK, num_warps=8
    )
    # Without filters the kernel never reads these: any tensor stands in.
    min_p, thresholds, ties, ties_before = temperature, bests, bests, bests
    if filters is not None:
        _check_rows(rows, logits.device, top_k=(filters.top_k, torch.int32), top_p=(filters.top_p, torch.float32))
        _check_rows(rows, logits.device, min_p=(filters.min_p, torch.float32))
        min_p = filters.min_p
        thresholds, ties = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.int32)
        ties_before = empty(rows, chunks, dtype=torch.int32)
        filter_kernel[(rows,)](
            logits,
            temperature,
            filters.top_k,
            filters.top_p,
            min_p,
            tops,
            masses,
            thresholds,
            ties,
            ties_before,
            vocabulary,
            stride,
            chunks,
            SIZE=CHUNK,
            CHUNKS=room,
            num_warps=16,
        )
    draw_kernel[(rows,)](
        logits,
        temperature,
        keys,
        positions,
        min_p,
        tops,
        raw_sums,
        masses,
        bests,
        thresholds,
        ties,
        ties_before,
        out.tokens,
        out.logprobs,
        out.sampling_logprobs,
        vocabulary,
        stride,
        chunks,
        SIZE=CHUNK,
        CHUNKS=room,
        FILTERED=filters is not None,
        num_warps=8,
    )
    return out


def _check_rows(rows: int, device: torch.device, **arguments: tuple[Tensor, torch.dtype]) -> None:
    for name, (tensor, dtype) in arguments.items():
        if tensor.shape != (rows,) or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {dtype} of shape ({rows},) on {device}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")

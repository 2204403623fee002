"""The Triton kernels of the losses: their numbers in the interpreter, and what they compile to for three GPUs.

The interpreter is chosen when a kernel is defined: where there is a GPU, its tests run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from aot import ARCHS, COMPILE_ALL, SHARED_LIMIT, Job, compile_ahead

triton = pytest.importorskip("triton")
from gpo_fast.kernels import linear_logprob  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_numbers_in_the_interpreter")

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
tile_shape = linear_logprob.tile_shape  # what a GPU gets; the tests in the interpreter take a smaller one


@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels already")
def test_numbers_in_the_interpreter() -> None:
    """Every test of this file marked `in_the_interpreter`, and those of the losses that go through the kernels."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-4000:]  # 5 if no test ran


@pytest.fixture(autouse=True)
def _through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: everything on the CPU goes to the Triton path, in blocks small enough to have several."""
    if not INTERPRETED:
        return
    from gpo_fast.losses import gpu, token_loss

    monkeypatch.setattr(token_loss, "supported", lambda new, loss_type, others: loss_type not in ("gspo", "rloo"))
    monkeypatch.setattr(gpu, "supported", lambda head, hidden: hidden.shape[0] > 0 and hidden.dtype != torch.float64)
    monkeypatch.setattr(gpu, "ROWS", 48)
    monkeypatch.setattr(gpu, "ROWS_WITHOUT_BLOCKS", 64)
    monkeypatch.setattr(gpu, "COLUMNS", 192)
    monkeypatch.setattr(gpu, "ROWS_OF_ONE_PASS", 16)
    small = linear_logprob.TileShape(rows=64, columns=64, depth=64, warps=4, stages=2)
    monkeypatch.setattr(linear_logprob, "tile_shape", lambda *arguments, **options: small)


@in_the_interpreter
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 31, 223), (1, 40, 300)])
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, trainable: bool) -> None:
    from test_losses_numerics import compare, random_inputs

    hidden, weight, bias, targets = random_inputs(*shape, dtype)
    compare(hidden, weight, bias, targets, trainable=trainable)
    compare(hidden, weight, None, targets, trainable=trainable, entropy=False)


@in_the_interpreter
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"temperature": 1.7, "softcap": 5.0}])
def test_temperature_and_softcap(options: dict, dtype: torch.dtype, trainable: bool) -> None:
    from test_losses_numerics import compare, random_inputs

    hidden, weight, _, targets = random_inputs(40, 48, 300, dtype, spread=2.0)
    compare(hidden, weight, None, targets, trainable=trainable, **options)


@in_the_interpreter
def test_the_properties_of_the_other_paths() -> None:
    """The same tests as for the C++ and the torch path: extreme logits, branch points, an adapter, ignored rows."""
    import test_losses_numerics as numerics

    for dtype in (torch.float32, torch.bfloat16):
        for trainable in (False, True):
            numerics.test_a_common_offset_of_all_logits_changes_nothing(-1e4, dtype, trainable)
            numerics.test_logits_of_ten_thousand(dtype, trainable)
            numerics.test_several_targets_per_row(dtype, trainable)
            numerics.test_all_rows_ignored(dtype, trainable)
        numerics.test_gradient_at_a_near_certain_target(dtype)
        numerics.test_lora_on_the_head(dtype)
    numerics.test_ignored_rows_are_not_read()


@in_the_interpreter
@pytest.mark.parametrize("trainable", [False, True])
def test_tokens_that_a_bias_forbids(trainable: bool) -> None:
    """Whole tiles of -inf, also the first ones of the vocabulary: a merge of two empty ranges must not give NaN."""
    from test_losses_numerics import random_inputs, relative_error

    from gpo_fast.losses import linear_logprob

    hidden, weight, _, targets = random_inputs(40, 32, 500, torch.float32)
    targets = torch.where(targets == -100, targets, targets % 100 + 300)
    allowed = torch.zeros(500, dtype=torch.bool)
    allowed[300:400] = True
    bias = torch.where(allowed, 0.0, -torch.inf)
    results = []
    for kept in (slice(None), allowed):
        leaves = [hidden.clone().requires_grad_(), weight[kept].clone().requires_grad_(trainable)]
        shift = 0 if kept == slice(None) else 300
        wanted = torch.where(targets == -100, targets, targets - shift)
        logprobs, entropy = linear_logprob(*leaves, wanted, bias=bias[kept], return_entropy=True)
        (logprobs.square().sum() + entropy.sum()).backward()
        results.append([logprobs, entropy, leaves[0].grad, leaves[1].grad])
    if trainable:
        assert results[0][3][~allowed].abs().max() == 0
        results[0][3] = results[0][3][allowed]
    for value, exact in zip(*results):
        if value is not None:
            assert relative_error(value, exact.double()) < 1e-5


@in_the_interpreter
def test_nan_is_not_swallowed() -> None:
    from gpo_fast.losses import linear_logprob

    hidden = torch.randn(3, 32)
    hidden[1, 5] = torch.nan
    logprobs, entropy = linear_logprob(hidden, torch.randn(70, 32), torch.tensor([1, 2, 3]), return_entropy=True)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert entropy.isnan().tolist() == [False, True, False]


@in_the_interpreter
@pytest.mark.parametrize("loss_type", ["awr", "ppo", "dr_grpo", "cispo", "gspo"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_policy_losses_through_the_kernels(loss_type: str, kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused terms against autograd's on the torch path, with every option on."""
    from test_losses_policy import Case, options, relative_error

    from gpo_fast.losses import linear_policy_loss, token_loss

    case = Case(torch.float32, shift=0.8)
    weights = torch.rand(case.targets.shape)
    weights[:, 2] = 0.0
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            monkeypatch.setattr(token_loss, "supported", lambda *arguments: False)
        leaves = [case.hidden.to(dtype, copy=True).requires_grad_(), case.weight.to(dtype, copy=True).requires_grad_()]
        output = linear_policy_loss(
            *leaves,
            case.targets,
            loss_type=loss_type,
            advantages=case.advantages.to(dtype),
            old_logprobs=case.old,
            ref_logprobs=case.ref,
            rollout_logprobs=case.ref,
            weights=weights,
            beta=0.3,
            kl=kl,
            dual_clip=1.3,
            epsilon_high=0.3,
            awr_max_exponent=0.5,
            **options(loss_type),
        )
        output.loss.backward()
        outcomes.append((output.loss, leaves[0].grad, leaves[1].grad))
    for value, exact in zip(*outcomes):
        assert relative_error(value, exact) < 1e-5


@in_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_tiles_become_gradients(with_entropy: bool, softcap: float | None, dtype: torch.dtype) -> None:
    """Of all columns but the targets; a bias of -inf forbids the first tile."""
    from gpo_fast.kernels.linear_logprob import HeadColumns, RowGradients, softmax_tiles
    from gpo_fast.kernels.linear_logprob_merge import SoftmaxState, merge, tile_gradients
    from test_losses_numerics import TOLERANCE, random_inputs, relative_error

    hidden, weight, _, _ = random_inputs(37, 40, 300, dtype, spread=3.0)
    bias = torch.where(torch.arange(300) < 70, -torch.inf, 0.0) if softcap is None else 0.1 * torch.randn(300)
    logprob_grad, entropy_grad = torch.randn(37), torch.randn(37)
    tiles = softmax_tiles(
        hidden, None, HeadColumns(weight, bias, None, 0.7, softcap), store_sloped=True, store_weighted=with_entropy
    )
    state = SoftmaxState.empty(hidden)
    merge(state, tiles)
    at = RowGradients(state.lse, state.mass.log() - state.mean, logprob_grad, entropy_grad if with_entropy else None)
    gradient = tile_gradients(tiles, at, 0.7)

    raw = hidden.double() @ weight.double().t() + bias.double()
    slope = torch.ones_like(raw) if softcap is None else 1 - torch.tanh(raw / softcap) ** 2
    log_probs = torch.log_softmax((raw if softcap is None else softcap * torch.tanh(raw / softcap)) / 0.7, dim=-1)
    probs = log_probs.exp()
    entropy = -torch.special.xlogy(probs, probs).sum(-1, keepdim=True)
    factor = logprob_grad.unsqueeze(-1).expand_as(probs)
    if with_entropy:
        factor = factor + entropy_grad.unsqueeze(-1) * (log_probs.clamp(min=-1e9) + entropy)
    assert relative_error(gradient, -probs * factor * slope / 0.7) <= TOLERANCE[dtype]


INTEGERS = {"count", "rows", "columns", "width", "rank", "entries", "tiles", "row_start", "column_start", "height"}
FLOATS = {
    "inverse_temperature", "softcap", "low", "high", "dual_clip", "beta", "awr_beta", "awr_max_exponent",
    "max_log_ratio",
}  # fmt: skip
FLOAT32 = {
    "top", "mass", "moment", "rise", "tile_top", "tile_mass", "tile_moment", "bias", "lse", "entropy",
    "logprob_grad", "entropy_grad", "kept", "product", "below", "logits", "slopes", "values", "share", "row_grad",
    "grad_entropy", "terms", "derivatives", "new", "old", "ref", "advantage", "importance",
}  # fmt: skip
INT64 = {"targets", "target_rows", "first"}


def job(kernel: str, dtype: str, constants: dict, **launch: int) -> Job:
    """The kernel "module:name" on tensors of `dtype`; None in `constants` is a pointer that is absent."""
    module, name = kernel.split(":")
    arguments = {}
    for argument in getattr(import_module(f"gpo_fast.kernels.{module}"), name).arg_names:
        if argument in constants:
            arguments[argument] = constants[argument]
        elif argument in FLOATS:
            arguments[argument] = "fp32"
        elif argument in INTEGERS or argument.endswith("_stride"):
            arguments[argument] = "i32:16"
        else:
            arguments[argument] = "*" + ("fp32" if argument in FLOAT32 else "i64" if argument in INT64 else dtype)
    return Job(f"gpo_fast.kernels.{kernel}", arguments, **launch)


def logits_kernels() -> list[tuple[str, dict]]:
    plain = {"HAS_BIAS": False, "bias": None, "HAS_SOFTCAP": False, "RANK": 0, "extra": None, "lora_b": None}
    every = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "RANK": 16}
    return [
        ("softmax_tiles_kernel", {**plain, "STORE_SLOPED": False, "STORE_WEIGHTED": False}),
        ("softmax_tiles_kernel", {**plain, "STORE_SLOPED": True, "STORE_WEIGHTED": False}),
        ("softmax_tiles_kernel", {**every, "STORE_SLOPED": True, "STORE_WEIGHTED": True}),
        ("logit_gradients_kernel", {**plain, "HAS_ENTROPY_GRAD": False, "entropy_grad": None}),
        ("logit_gradients_kernel", {**every, "HAS_ENTROPY_GRAD": True}),
    ]


def logits_job(architecture: int, name: str, options: dict, dtype: str) -> Job:
    """The kernel as it is launched on that GPU."""
    shape = tile_shape(
        torch.bfloat16 if dtype == "bf16" else torch.float32,
        divmod(architecture, 10),
        softcap=options["HAS_SOFTCAP"],
        store_weighted=options.get("STORE_WEIGHTED", False),
    )
    stored = {"STORE_SLOPED": "sloped", "STORE_WEIGHTED": "weighted"}
    absent = {pointer: None for flag, pointer in stored.items() if not options.get(flag, True)}
    launch = {
        "EVEN_WIDTH": True,
        "WIDEN": False,
        "GROUP": linear_logprob.ROW_BLOCKS_PER_GROUP,
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLUMNS": shape.columns,
        "BLOCK_DEPTH": shape.depth,
    }
    return job(
        f"linear_logprob:{name}",
        dtype,
        {**options, **absent, **launch},
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


@pytest.mark.parametrize("architecture", ARCHS if COMPILE_ALL else [90])
def test_logits_run_on_the_tensor_cores(architecture: int) -> None:
    """The matrix instruction of each generation, within its shared memory, and no register spilled."""
    # In float32 the heavier variant of each kernel stands for the lighter ones.
    jobs = [
        logits_job(architecture, name, options, dtype)
        for dtype in ("bf16", "fp32")
        for name, options in logits_kernels()
        if dtype == "bf16" or options["HAS_SOFTCAP"]
    ]
    for built in compile_ahead(jobs if COMPILE_ALL else jobs[1:5:3], archs=[architecture]):
        assert built.uses(MATRIX_INSTRUCTION[architecture]), built.job
        assert built.shared <= SHARED_LIMIT[architecture], built.job
        assert built.spill_bytes == 0, built.job


def small_kernels() -> list[tuple[str, str, dict]]:
    return [
        ("linear_logprob_merge", "merge_kernel", {"BLOCK": 64}),
        ("linear_logprob_merge", "recentre_kernel", {"HAS_WEIGHTED": True, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}),
        (
            "linear_logprob_merge",
            "tile_gradients_kernel",
            {"HAS_ENTROPY_GRAD": True, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256},
        ),
        (
            "linear_logprob_merge",
            "tile_gradients_kernel",
            {
                "HAS_ENTROPY_GRAD": False,
                "weighted": None,
                "entropy_grad": None,
                "BLOCK_ROWS": 16,
                "BLOCK_COLUMNS": 256,
            },
        ),
        ("linear_logprob_merge", "accumulate_kernel", {"HAS_BELOW": True, "BLOCK": 1024}),
        (
            "linear_logprob_targets",
            "target_logits_kernel",
            {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_LORA": True, "BLOCK": 512},
        ),
        ("linear_logprob_targets", "write_targets_kernel", {"HAS_VALUES": True, "BLOCK": 256}),
        ("linear_logprob_targets", "write_targets_kernel", {"HAS_VALUES": False, "values": None, "BLOCK": 256}),
        ("linear_logprob_targets", "frozen_backward_kernel", {"HAS_ENTROPY": True, "BLOCK": 1024}),
        (
            "step_loss",
            "token_losses_kernel",
            {"KIND": 0, "KL": 3, "HAS_DUAL_CLIP": True, "HAS_IMPORTANCE": True, "BLOCK": 256},
        ),
    ]


def test_the_other_kernels_compile_without_atomics() -> None:
    jobs = [job(f"{module}:{name}", "bf16", constants) for module, name, constants in small_kernels()]
    for built in compile_ahead(jobs, archs=ARCHS if COMPILE_ALL else [90]):
        assert not re.search(r"\b(atom|red)\.", built.ptx), built.job
        assert built.spill_bytes == 0, built.job

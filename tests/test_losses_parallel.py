"""A head spread over two processes gives what one process with the whole head gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gpo_fast.losses import linear_logprob, linear_policy_loss, linear_preference_loss

ROWS, WIDTH, VOCAB, RANK = 30, 20, 90, 3
SPLIT = 40  # the shards are of different sizes


def random_inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    lengths = torch.randint(0, 4, (ROWS,))
    targets = torch.cat([torch.randperm(VOCAB)[:length] for length in lengths.tolist()])
    targets[5] = -100
    return {
        "hidden": torch.randn(ROWS, WIDTH, dtype=torch.float64),
        "weight": torch.randn(VOCAB, WIDTH, dtype=torch.float64) / 4,
        "bias": torch.randn(VOCAB, dtype=torch.float64) / 4,
        "lora_a": torch.randn(RANK, WIDTH, dtype=torch.float64) / 4,
        "lora_b": torch.randn(VOCAB, RANK, dtype=torch.float64) / 4,
        "targets": targets,
        "row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "grad_logprobs": torch.randn(targets.shape, dtype=torch.float64),
        "grad_entropy": torch.randn(ROWS, dtype=torch.float64),
    }


def outcome(part: slice, trainable: bool, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    inputs = random_inputs()
    leaves = {
        "hidden": inputs["hidden"].requires_grad_(),
        "weight": inputs["weight"][part].clone().requires_grad_(trainable),
        "bias": inputs["bias"][part].clone().requires_grad_(trainable),
    }
    options: dict = {"softcap": 3.0, "temperature": 0.8, "row_offsets": inputs["row_offsets"], "return_entropy": True}
    if trainable:
        leaves["lora_a"] = inputs["lora_a"].requires_grad_()
        leaves["lora_b"] = inputs["lora_b"][part].clone().requires_grad_()
        options["lora"] = (leaves["lora_a"], leaves["lora_b"], 0.5)
    if group is not None:
        options.update(tp_group=group, vocab_start=part.start)
    logprobs, entropy = linear_logprob(
        leaves["hidden"], leaves["weight"], inputs["targets"], bias=leaves["bias"], **options
    )
    ((logprobs * inputs["grad_logprobs"]).sum() + (entropy * inputs["grad_entropy"]).sum()).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **gradients}


def policy_outcome(part: slice, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    inputs = random_inputs()
    hidden = inputs["hidden"].requires_grad_()
    targets = torch.arange(ROWS) % VOCAB
    options = {} if group is None else {"tp_group": group, "vocab_start": part.start}
    output = linear_policy_loss(
        hidden, inputs["weight"][part], targets, loss_type="grpo", advantages=inputs["grad_entropy"][:1],
        old_logprobs=-4 + inputs["grad_entropy"], entropy_coef=0.1, **options,
    )  # fmt: skip
    output.loss.backward()
    return {"loss": output.loss.detach(), "hidden": hidden.grad}


def preference_outcome(
    loss_type: str, part: slice, trainable: bool, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Three pairs of sequences of up to five tokens."""
    inputs = random_inputs()
    hidden = inputs["hidden"].reshape(6, 5, WIDTH).requires_grad_()
    weight = inputs["weight"][part].clone().requires_grad_(trainable)
    targets = torch.arange(0, 3 * ROWS, 3).reshape(6, 5)  # of both shards
    targets[1, 2:] = targets[3, 4:] = -100
    options: dict = {} if group is None else {"tp_group": group, "vocab_start": part.start}
    if loss_type == "dpo":
        options["ref_logprobs"] = -4 + inputs["grad_entropy"].reshape(6, 5)
    output = linear_preference_loss(hidden, weight, targets, loss_type=loss_type, beta=0.3, **options)
    output.loss.backward()
    gradients = {"hidden": hidden.grad, "weight": weight.grad} if trainable else {"hidden": hidden.grad}
    return {"loss": output.loss.detach(), **gradients}


def run_shard(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCAB)
    results = {str(trainable): outcome(part, trainable, dist.group.WORLD) for trainable in (False, True)}
    results["policy"] = policy_outcome(part, dist.group.WORLD)
    for loss_type in ("dpo", "orpo"):
        for trainable in (False, True):
            results[f"{loss_type} {trainable}"] = preference_outcome(loss_type, part, trainable, dist.group.WORLD)
    torch.save(results, os.path.join(directory, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    directory: Path = tmp_path_factory.mktemp("shards")
    mp.spawn(run_shard, args=(str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("trainable", [False, True])
def test_two_processes_equal_one(shards: list[dict[str, dict[str, Tensor]]], trainable: bool) -> None:
    whole = outcome(slice(0, VOCAB), trainable, None)
    first, second = (shard[str(trainable)] for shard in shards)
    for name, exact in whole.items():
        if name in ("weight", "bias", "lora_b"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), exact, rtol=1e-10, atol=1e-12)
        elif name == "lora_a":
            # Each process has the whole gradient of what it holds a copy of.
            torch.testing.assert_close(first[name], exact, rtol=1e-10, atol=1e-12)
        else:
            torch.testing.assert_close(first[name], exact, rtol=1e-10, atol=1e-12)
            assert torch.equal(first[name], second[name])


def test_a_policy_loss_over_two_processes(shards: list[dict[str, dict[str, Tensor]]]) -> None:
    for name, exact in policy_outcome(slice(0, VOCAB), None).items():
        for shard in shards:
            torch.testing.assert_close(shard["policy"][name], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss_type", ["dpo", "orpo"])
def test_a_preference_loss_over_two_processes(
    shards: list[dict[str, dict[str, Tensor]]], loss_type: str, trainable: bool
) -> None:
    whole = preference_outcome(loss_type, slice(0, VOCAB), trainable, None)
    first, second = (shard[f"{loss_type} {trainable}"] for shard in shards)
    for name, exact in whole.items():
        if name == "weight":
            torch.testing.assert_close(torch.cat([first[name], second[name]]), exact, rtol=1e-10, atol=1e-12)
        else:
            torch.testing.assert_close(first[name], exact, rtol=1e-10, atol=1e-12)
            assert torch.equal(first[name], second[name])


def test_vocab_start_needs_a_group() -> None:
    with pytest.raises(ValueError, match="vocab_start"):
        linear_logprob(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), vocab_start=4)

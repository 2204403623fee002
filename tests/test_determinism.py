"""The same seed gives the same run on a CPU in float32, whatever the threads do. docs/reliability.md says where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_trainer import deterministic, trainer

OPTIONS = {"max_steps": 3, "save_steps": 3, "search": "all", "reuse": "split", "estimator": "uniform"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(folder: Path, threads: int, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics and final weights of a run."""
    torch.set_num_threads(threads)
    trainer(folder, **OPTIONS, **changes).train()
    return deterministic(folder), safetensors.torch.load_file(folder / "checkpoint-3" / "model.safetensors")


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_run(tmp_path: Path, threads: int, packing: str) -> None:
    first = run(tmp_path / "first", threads, packing=packing)
    torch.manual_seed(1234)  # what a program did before is not part of a run
    second = run(tmp_path / "second", threads, packing=packing)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    other = run(tmp_path / "other", threads, packing=packing, seed=43)
    assert other[0] != first[0], "the seed matters"


def test_the_number_of_threads_does_not_matter(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])

"""The same seed gives the same run on a CPU in float32, whatever the threads do. docs/reliability.md says where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_trainer import deterministic, trainer

OPTIONS = {"max_steps": 3, "save_steps": 3, "search": "all", "reuse": "split", "estimator": "uniform"}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


Result = tuple[list[dict], dict[str, torch.Tensor]]  # metrics and final weights of a run


def run(folder: Path, threads: int, **changes) -> Result:
    torch.set_num_threads(threads)
    trainer(folder, **OPTIONS, **changes).train()
    return deterministic(folder), safetensors.torch.load_file(folder / "checkpoint-3" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Result]:
    """One run for each number of threads and each packing, with which others are compared."""
    folder = tmp_path_factory.mktemp("runs")
    cases = [(threads, packing) for threads in (1, 2) for packing in ("tree", "padded")]
    return {case: run(folder / f"{case}", case[0], packing=case[1]) for case in cases}


def same(first: Result, second: Result) -> bool:
    return first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_run(runs: dict, tmp_path: Path, threads: int, packing: str) -> None:
    torch.manual_seed(1234)  # what a program did before is not part of a run
    assert same(run(tmp_path / "second", threads, packing=packing), runs[threads, packing])


def test_another_seed_gives_another_run(runs: dict, tmp_path: Path) -> None:
    assert run(tmp_path / "other", 1, packing="tree", seed=43)[0] != runs[1, "tree"][0]


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_number_of_threads_does_not_matter(runs: dict, packing: str) -> None:
    assert same(runs[1, packing], runs[2, packing])

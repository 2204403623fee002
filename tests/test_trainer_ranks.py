"""GPOTrainer on two processes: what one process would do with the same rows, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_ranks import CASES
from trees import distance

from gpo_fast.ranks import ALONE, merge_pending
from gpo_fast.run_files import last_checkpoint, read_records

SCRIPT = Path(__file__).with_name("run_ranks.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FSDP = "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
FSDP += " --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


def run(launch: str, *arguments: str) -> None:
    launchers = {"1": [], "2": TORCHRUN, "2-fsdp": FSDP.split()}
    done = subprocess.run(
        [sys.executable, *launchers[launch], str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    launches = ("1", "2", "2-fsdp")
    for launch in launches:
        run(launch, "equal", str(folder))
    return {launch: torch.load(folder / f"equal-{launch}.pt", weights_only=True) for launch in launches}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "launch"),
    [(case, launch) for case in CASES for launch in ("2", "2-fsdp") if (case, launch) != ("value_head", "2-fsdp")],
)
def test_loss_and_gradients_are_those_of_one_process(results, case: str, launch: str) -> None:
    one, two = dict(results["1"][case]), dict(results[launch][case])
    assert one.keys() == two.keys()
    # A policy loss of centred advantages is 0 but for rounding.
    assert float(two.pop("loss")) == pytest.approx(float(one.pop("loss")), rel=1e-5, abs=1e-6)
    assert two.pop("rows") == one.pop("rows")
    if case == "value_head":
        assert distance({"": two.pop("moments")}, {"": one.pop("moments")}) <= 1e-5
    assert distance(two, one) <= 1e-5
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_a_checkpoint_and_is_saved_whole(tmp_path: Path) -> None:
    run("2-fsdp", "resume", str(tmp_path))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    run("2", "train", str(tmp_path), "3")
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    state = json.loads((checkpoint / "gpo_state.json").read_text())
    assert [len(rank["pending"]) for rank in state["ranks"]] == [1, 1]
    left = sum(len(rank["pending"][0]) for rank in state["ranks"])
    run("1", "train", str(tmp_path), "6")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert 0 < records[3]["trained_rows"] <= left
    run("2", "train", str(tmp_path), "8")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(1, 9)]
    assert len(json.loads((tmp_path / "train-2.json").read_text())["rewards"]) == 16


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(tmp_path: Path) -> None:
    """Without a launcher, which would end the other process too: it must notice by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(SCRIPT), "train", str(tmp_path), "6", "die"]
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "WORLD_SIZE": "2", "RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ranks[1].communicate(timeout=200)
        assert ranks[1].returncode == -signal.SIGKILL
        _, said = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1
    assert "process 0 of 2 lost contact with the others" in said
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    run("2", "train", str(tmp_path), "6")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_pending_rows_of_two_processes_become_those_of_one() -> None:
    def row(node: int, pair: int | None) -> dict:
        return {"node": node, "pair": pair, "token_ids": [node]}

    first = {
        "pending": [[row(1, 0), row(2, 0)], [row(3, 1)]],
        "forest": [(-1, 0, [7]), *[(0, 1, [n]) for n in (1, 2, 3)]],
    }
    second = {"pending": [[row(1, 0)]], "forest": [(-1, 0, [8]), (0, 1, [1])]}
    merged = merge_pending([first, second])
    assert [[r["node"] for r in batch] for batch in merged["pending"]] == [[1, 2, 5], [3]]
    assert [[r["pair"] for r in batch] for batch in merged["pending"]] == [[0, 0, 2], [1]]
    for batch in merged["pending"]:
        for r in batch:
            parent, _, tokens = merged["forest"][r["node"]]
            assert tokens == r["token_ids"]
            assert merged["forest"][parent][0] == -1
    assert merged["forest"][merged["forest"][5][0]][2] == [8]


def test_a_process_alone_asks_nobody() -> None:
    assert ALONE.sum([1.0, 2.0]) == [1.0, 2.0]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.merge_metrics({"num_x": 2.0, "reward": 0.5}) == {"num_x": 2.0, "reward": 0.5}

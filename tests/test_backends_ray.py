"""The Ray backend: the same completions as one local engine, also when an actor is killed."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from gpo_fast import Request, RolloutEngine, SamplingParams

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

from gpo_fast.rollout.ray_backend import RayBackend  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # at Ray's 15, actors on a busy machine starve
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 1024 * 1024)
    yield str(folder)
    ray.shutdown()


def requests(count: int, tokens: int = 12) -> list[Request]:
    return [Request([3 + i % 20, 5, 7], 2, SamplingParams(max_tokens=tokens), seed=i) for i in range(count)]


def test_ray_gives_what_one_engine_gives_and_a_killed_actor_loses_nothing(saved: str) -> None:
    backend = RayBackend(saved, 2, chunk_size=2, max_batch_size=4)
    try:
        wanted = requests(40, tokens=60)
        drawn: list = []
        thread = threading.Thread(target=lambda: drawn.extend(backend.generate(wanted)))
        thread.start()
        deadline = time.monotonic() + 120
        while backend.stats()["completions"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert thread.is_alive(), "the actor must be killed in the middle"
        ray.kill(backend.actors[0])
        thread.join(timeout=180)
        assert backend.stats()["replaced"] == 1
        local = RolloutEngine(tiny.model(), tiny.tokenizer(), max_batch_size=4).generate(wanted)
        assert [(c.request_index, c.branch_index, c.token_ids) for c in drawn] == [
            (c.request_index, c.branch_index, c.token_ids) for c in local
        ]
        assert all(a.logprobs == pytest.approx(b.logprobs, abs=1e-4) for a, b in zip(drawn, local))
    finally:
        backend.close()


def test_new_weights_reach_every_actor_also_one_that_starts_later(saved: str) -> None:
    trained = tiny.model(seed=5)
    backend = RayBackend(saved, 2, model=trained, chunk_size=1)
    try:
        wanted = requests(4)
        local = [c.token_ids for c in RolloutEngine(trained, tiny.tokenizer()).generate(wanted)]
        old = [c.token_ids for c in backend.generate(wanted)]
        backend.update_weights()
        assert [c.token_ids for c in backend.generate(wanted)] == local != old
        ray.kill(backend.actors[1])
        assert [c.token_ids for c in backend.generate(wanted)] == local
        with pytest.raises(ValueError, match="context is 256 tokens"):  # the engine's own error
            backend.generate([Request([3] * 250, 1, SamplingParams(max_tokens=50))])
        assert [c.token_ids for c in backend.generate(wanted)] == local
    finally:
        backend.close()


def test_an_actor_that_dies_while_weights_arrive_is_replaced_by_one_that_has_them(saved: str, tmp_path: Path) -> None:
    died = str(tmp_path / "died")

    def build():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(saved).eval()
        load = model.load_state_dict

        def die_once(weights):
            try:
                os.close(os.open(died, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return load(weights)
            os._exit(1)

        model.load_state_dict = die_once
        return model, AutoTokenizer.from_pretrained(saved)

    trained = tiny.model(seed=5)
    backend = RayBackend(build, 1, model=trained, tokenizer=tiny.tokenizer(), chunk_size=1)
    try:
        wanted = requests(8)
        old = [c.token_ids for c in backend.generate(wanted)]
        backend.update_weights()
        assert backend.stats()["replaced"] == 1
        local = [c.token_ids for c in RolloutEngine(trained, tiny.tokenizer()).generate(wanted)]
        assert [c.token_ids for c in backend.generate(wanted)] == local != old
        assert backend.stats()["replaced"] == 1
    finally:
        backend.close()


def test_a_deadly_chunk_is_given_up(saved: str) -> None:
    def deadly():
        os._exit(1)

    backend = RayBackend(deadly, 1, tokenizer=tiny.tokenizer(), max_losses=2)
    try:
        with pytest.raises(RuntimeError, match="were lost with 2 actors"):
            backend.generate(requests(1))
    finally:
        backend.close()
    with pytest.raises(ValueError, match="at least 1"):
        RayBackend(saved, 0)


def test_the_example_samples(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["backend_ray.py", saved, "1"])
    script = Path(__file__).parent.parent / "examples" / "backend_ray.py"
    backend = runpy.run_path(str(script), run_name="__main__")["backend"]
    backend.close()
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["prompt"] and row["chosen"] != row["rejected"] for row in rows)

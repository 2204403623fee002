"""The completions-server backend against a small server with faults, `transformers serve` and llama.cpp's server."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from gpo_fast import CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter
from gpo_fast.rollout.openai_backend import OpenAIBackend, ServerError
from gpo_fast.rollout.sampler import stream_key


class FakeServer(ThreadingHTTPServer):
    """Answers with tokens made of the seed; `faults` are met first, one for each attempt of a seed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list = []
        self.style = "vllm"
        self.usage: dict = {}
        self.bodies: list[dict] = []
        self.attempts: Counter[int] = Counter()
        self.lock = threading.Lock()
        self.broken_seed: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


def tokens_of(seed: int) -> list[int]:
    return [3 + seed % 40, 3 + seed % 37, 1]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            attempt = self.server.attempts[body["seed"]]
            self.server.attempts[body["seed"]] += 1
        fault = self.server.faults[attempt] if attempt < len(self.server.faults) else None
        if body["seed"] == self.server.broken_seed:
            fault = 500
        if fault == "hang":
            time.sleep(0.6)
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        if fault == "close":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.answer(fault, {"error": "the prompt is too long"})
            return
        ids = tokens_of(body["seed"])
        logprobs = [-0.5, -0.25, -0.125]
        choice: dict = {"text": "xy", "finish_reason": "stop"}
        if self.server.style == "vllm":
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
        elif self.server.style == "named":
            names = [f"token_id:{t}" for t in ids]
            choice |= {"logprobs": {"tokens": names, "token_logprobs": logprobs}}
        elif self.server.style == "llama.cpp":
            content = [{"id": t, "logprob": p} for t, p in zip(ids[:-1], logprobs)]
            choice |= {"logprobs": {"content": content}}
        elif self.server.style == "llama.cpp, verbose":  # a character of two tokens: nothing is said of its first
            content = [{"id": t, "logprob": p} for t, p in zip(ids[1:], logprobs)]
            choice |= {"logprobs": {"content": content}}
        extra = {"__verbose": {"tokens": ids}} if "verbose" in self.server.style else {}
        self.answer(200, {"choices": [choice], "usage": self.server.usage, **extra})

    def answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


def backend(server: FakeServer, **changes) -> OpenAIBackend:
    return OpenAIBackend(server.url, "m", tiny.tokenizer(), **{"backoff": 0.01, "timeout": 5.0, **changes})


REQUESTS = [Request([3, 4, 5], 3, SamplingParams(max_tokens=9), seed=11), Request([6], 2, seed=12)]


@pytest.mark.parametrize("style", ["vllm", "named", "llama.cpp"])
def test_completions_come_in_order_with_their_tokens(server: FakeServer, style: str) -> None:
    server.style = style
    drawn = backend(server).generate(REQUESTS)
    assert [(c.request_index, c.branch_index) for c in drawn] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for c in drawn:
        assert c.prompt_token_ids == REQUESTS[c.request_index].token_ids
        seed = stream_key(REQUESTS[c.request_index].seed or 0, c.branch_index) & 0x7FFFFFFF
        assert c.token_ids == tokens_of(seed), "the end token is part of a completion, whoever appends it"
        assert c.logprobs[:2] == c.sampling_logprobs[:2] == [-0.5, -0.25]
        assert c.finish_reason == "stop"


def test_filters_that_are_off_are_said_to_be_off(server: FakeServer) -> None:
    sampling = SamplingParams(temperature=0.5, top_k=5, stop=("\n",), stop_token_ids=(7,), max_tokens=4)
    drawn = backend(server).generate([Request([3], 1), Request([4], 1, sampling)])
    bodies = {tuple(b["prompt"]): b for b in server.bodies}
    plain, full = bodies[(3,)], bodies[(4,)]
    assert (plain["top_k"], plain["top_p"], plain["min_p"]) == (1 << 30, 1.0, 0.0)
    assert not {"stop", "stop_token_ids", "ignore_eos"} & set(plain)
    assert (full["top_k"], full["stop"], full["stop_token_ids"], full["max_tokens"]) == (5, ["\n"], [7], 4)
    assert drawn[1].logprobs[0] == -0.5
    assert math.isnan(drawn[1].sampling_logprobs[0]), "raw logprobs are not those of a filtered distribution"


def test_a_token_that_the_server_says_nothing_of_is_not_lost(server: FakeServer) -> None:
    server.style = "llama.cpp, verbose"
    for c in backend(server).generate(REQUESTS):
        assert len(c.token_ids) == len(c.logprobs) == 3
        assert all(math.isnan(p) for p in c.logprobs), "which token each logprob is of is not known"
    server.style, server.usage = "llama.cpp", {"completion_tokens": 3}
    with pytest.raises(ServerError, match="sampled 3 tokens and returned 2"):
        backend(server).generate(REQUESTS)


def test_a_completion_ends_at_its_stop_token_or_stop_string(server: FakeServer) -> None:
    first = tokens_of(stream_key(11, 0) & 0x7FFFFFFF)[0]
    drawn = backend(server).generate([Request([3], 1, SamplingParams(max_tokens=9, stop_token_ids=(first,)), seed=11)])
    assert (drawn[0].token_ids, drawn[0].finish_reason) == ([first], "stop"), "servers that do not know them go on"
    server.style = "llama.cpp"  # leaves the end out
    with pytest.raises(ServerError, match=r"neither a stop string of \['@'\] nor an end token is in it"):
        backend(server).generate([Request([3], 1, SamplingParams(stop=("@",)))])


@pytest.mark.parametrize("fault", [500, 429, "cut", "close", "hang"])
def test_a_fault_is_retried(server: FakeServer, fault: object) -> None:
    server.faults = [fault, fault]
    drawn = backend(server, timeout=0.3 if fault == "hang" else 5.0).generate(REQUESTS)
    assert len(drawn) == 5
    assert set(server.attempts.values()) == {3}


def test_a_refusal_is_not_retried_and_says_what_the_server_said(server: FakeServer) -> None:
    server.faults = [400]
    with pytest.raises(ServerError, match=r"status 400: .*the prompt is too long"):
        backend(server, max_concurrency=1).generate(REQUESTS)
    assert set(server.attempts.values()) == {1}


def test_nothing_that_arrived_is_lost_when_a_server_fails_for_good(server: FakeServer) -> None:
    server.broken_seed = stream_key(11, 2) & 0x7FFFFFFF
    one = backend(server, max_concurrency=1, max_retries=1)
    with pytest.raises(ServerError, match=r"2 of 5 completions had arrived") as caught:
        one.generate(REQUESTS)
    assert [(c.request_index, c.branch_index) for c in caught.value.finished] == [(0, 0), (0, 1)]
    server.broken_seed = None
    before = len(server.bodies)
    drawn = one.generate(REQUESTS, finished=caught.value.finished)
    assert len(server.bodies) - before == 3, "what had arrived is not sampled again"
    assert drawn == backend(server).generate(REQUESTS)


def test_an_unreachable_server_and_one_without_token_ids(server: FakeServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gone = OpenAIBackend(f"http://127.0.0.1:{port}/v1", "m", tiny.tokenizer(), backoff=0.01, max_retries=2)
    with pytest.raises(ServerError, match="3 attempts failed"):
        gone.generate(REQUESTS[:1])
    server.style = "text only"
    with pytest.raises(ServerError, match="without token ids"):
        backend(server).generate(REQUESTS)
    with pytest.raises(RuntimeError, match="sync_weights="):
        backend(server).update_weights()
    with pytest.raises(ValueError, match="must start with http"):
        OpenAIBackend("localhost:8000", "m", tiny.tokenizer())


def test_a_search_runs_on_it(server: FakeServer) -> None:
    engine = backend(server)
    trajectory = engine.generate([Request([3, 4, 5], 1, seed=1)])[0]
    trajectory.token_ids, trajectory.logprobs = list(range(3, 15)), [0.0] * 12
    trajectory.sampling_logprobs = [0.0] * 12
    finder = CriticalStepFinder(engine, lambda found: [float(c.token_ids[-2] % 2) for c in found])
    found = finder.find([trajectory])[0]
    assert 0 <= found.index < len(found.steps)


def test_extra_fields_are_sent_and_a_requests_own_win(server: FakeServer) -> None:
    one = backend(server, mode="text", extra_body={"top_k": 0, "user": "me"})
    one.generate([Request([3], 1), Request([4], 1, SamplingParams(top_k=5))])
    bodies = {b["prompt"]: b for b in server.bodies}
    texts = [tiny.tokenizer().decode([t]) for t in (3, 4)]
    assert [(bodies[t]["top_k"], bodies[t]["user"], "min_p" in bodies[t]) for t in texts] == [
        (0, "me", False),
        (5, "me", False),
    ]


def test_the_example_samples(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["backend_openai.py", server.url, str(tmp_path)])
    script = Path(__file__).parent.parent / "examples" / "backend_openai.py"
    runpy.run_path(str(script), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["prompt"] and row["chosen"] != row["rejected"] for row in rows)


# -- real servers -------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """The address of a server that has come up; it is ended afterwards."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} ended at once"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.slow
def test_transformers_serve_in_text_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Greedy text from a real server is that of our engine."""
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package)
    model = tiny.model(vocab_size=len(tiny.tokenizer()))
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    options = ["--port", str(port), "--device", "cpu", str(tmp_path)]
    greedy = SamplingParams(0.0, max_tokens=8)
    requests = [Request(tiny.tokenizer()(t)["input_ids"], 1, greedy) for t in ("1+1", "ab")]
    with serving([*command, *options], port) as url:
        remote = OpenAIBackend(url, str(tmp_path), tiny.tokenizer(), mode="text", timeout=60)
        theirs = remote.generate(requests)
        assert all(math.isnan(p) for c in theirs for p in c.logprobs)
        branches = [Request([5, 6, 7], 4, SamplingParams(max_tokens=8), seed=3)]
        remote.generate(branches)
        assert "does the server sample at all?" in caplog.text
        how = json.dumps({"do_sample": True, "top_k": 0, "eos_token_id": 1, "pad_token_id": 0})
        remote.extra_body = {"generation_config": how}
        assert len({tuple(c.token_ids) for c in remote.generate(branches)}) == 4
        with pytest.raises(ServerError, match="needs mode='text'"):
            OpenAIBackend(url, str(tmp_path), tiny.tokenizer()).generate(requests)
    ours = RolloutEngine(model, tiny.tokenizer()).generate(requests)
    for a, b in zip(theirs, ours):
        decode = lambda c: tiny.tokenizer().decode(c.token_ids, skip_special_tokens=True)  # noqa: E731
        assert decode(a) == decode(b)
        assert a.finish_reason == b.finish_reason


@pytest.fixture(scope="module")
def llama() -> Iterator[OpenAIBackend]:
    """llama.cpp's own server with SmolLM2: the program in LLAMA_SERVER, or llama-server on the PATH."""
    program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("no llama-server: set LLAMA_SERVER to llama.cpp's server")
    from gpo_fast.demo.model import find_gguf

    port = free_port()
    options = ["--ctx-size", "1024", "--parallel", "4", "--threads", "1", "--port", str(port)]
    with serving([program, "--model", str(find_gguf()), *options], port) as url:
        yield OpenAIBackend(url, "smollm2", smollm2()[1], timeout=120)


def smollm2() -> tuple[Any, Any]:
    from gpo_fast.demo.model import load_demo_model

    return load_demo_model()


def teacher_forced(completion: Any) -> torch.Tensor:
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        logprobs = smollm2()[0](ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[len(completion.prompt_token_ids) - 1 :, 0]


@pytest.mark.slow
def test_llama_cpp_samples_what_it_says(llama: OpenAIBackend) -> None:
    ids = llama.tokenizer("The sum of 17 and 25 is")["input_ids"]
    requests = [Request(ids, 3, SamplingParams(max_tokens=12), seed=4)]
    drawn = llama.generate(requests)
    assert len({tuple(c.token_ids) for c in drawn}) == 3, "each branch has a seed of its own"
    assert [c.token_ids for c in llama.generate(requests)] == [c.token_ids for c in drawn]
    for completion in drawn:
        assert completion.prompt_token_ids == ids
        # llama.cpp rounds activations to 8 bits for its products, our model computes in float32.
        assert (torch.tensor(completion.logprobs) - teacher_forced(completion)).abs().max() < 0.5
    wild = SamplingParams(max_tokens=1, temperature=1000.0)
    firsts = {c.token_ids[0] for c in llama.generate([Request(ids, 48, wild, seed=1)])}
    assert len(firsts) > 40, "llama.cpp's own filter leaves 40 tokens"
    assert len({c.token_ids[0] for c in llama.generate([Request(ids, 8, SamplingParams(max_tokens=1, top_k=1))])}) == 1


@pytest.mark.slow
def test_llama_cpp_stops(llama: OpenAIBackend) -> None:
    ids = llama.tokenizer("The capital of France is")["input_ids"]
    greedy = SamplingParams(0.0, max_tokens=10, ignore_eos=True)
    plain = llama.generate([Request(ids, 1, greedy)])[0]
    assert (len(plain.token_ids), plain.finish_reason) == (10, "length")
    end = plain.token_ids[1]
    for stop in ({"stop_token_ids": (end,)}, {"stop": (llama.tokenizer.decode([end]),)}):
        ended = llama.generate([Request(ids, 1, SamplingParams(0.0, max_tokens=10, **stop))])[0]
        assert (ended.token_ids, ended.finish_reason) == (plain.token_ids[:2], "stop")


@pytest.mark.slow
def test_a_search_runs_on_llama_cpp(llama: OpenAIBackend) -> None:
    trajectory = llama.generate([Request(llama.tokenizer("1, 2, 3,")["input_ids"], 1, SamplingParams(max_tokens=12))])
    finder = CriticalStepFinder(
        llama,
        lambda found: [float(len(c.token_ids) % 2) for c in found],
        StepSplitter("tokens", min_tokens=4),
        n_samples=2,
        sampling=SamplingParams(max_tokens=12),
    )
    found = finder.find(trajectory)[0]
    assert found.num_rollouts == 2 * len(found.steps)

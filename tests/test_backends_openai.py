"""The completions-server backend against a small server with faults, and against `transformers serve`."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

from gpo_fast import CriticalStepFinder, Request, RolloutEngine, SamplingParams
from gpo_fast.rollout.openai_backend import OpenAIBackend, ServerError
from gpo_fast.rollout.sampler import stream_key


class FakeServer(ThreadingHTTPServer):
    """Answers with tokens made of the seed; `faults` are met first, one for each attempt of a seed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list = []
        self.style = "vllm"
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
        self.answer(200, {"choices": [choice]})

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


@pytest.mark.slow
def test_transformers_serve_in_text_mode(tmp_path: Path) -> None:
    """Greedy text from a real server is that of our engine."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    model = tiny.model(vocab_size=len(tiny.tokenizer()))
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--port", str(port), "--device", "cpu", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended at once"
                time.sleep(0.5)
        requests = [
            Request(tiny.tokenizer()(t)["input_ids"], 1, SamplingParams(0.0, max_tokens=8)) for t in ("1+1", "ab")
        ]
        remote = OpenAIBackend(f"http://127.0.0.1:{port}/v1", str(tmp_path), tiny.tokenizer(), mode="text", timeout=60)
        theirs = remote.generate(requests)
    finally:
        process.terminate()
        process.wait(timeout=20)
    ours = RolloutEngine(model, tiny.tokenizer()).generate(requests)
    for a, b in zip(theirs, ours):
        decode = lambda c: tiny.tokenizer().decode(c.token_ids, skip_special_tokens=True)  # noqa: E731
        assert decode(a) == decode(b)
        assert a.finish_reason == b.finish_reason

"""Rollouts from any server with OpenAI's /v1/completions: vLLM, SGLang, llama.cpp, `transformers serve`.

Each branch is one HTTP request with a seed of its own, so a lost connection costs one branch, and the server's prefix
cache makes the shared prompt cheap. Only the standard library is used.

Two ways of talking to a server:

- `mode="tokens"`: prompts go out as token ids and token ids come back (vLLM's `return_token_ids`, llama.cpp's
  `return_tokens` with `verbose`, or token ids within `logprobs`). Exact, and the default.
- `mode="text"`: prompts and completions travel as text (`transformers serve` and llama-cpp-python's server take
  nothing else). A prompt whose text does not tokenize back to the same ids is refused; logprobs are NaN.

A server samples an option that it is not told with a default of its own: llama.cpp among the 40 likeliest tokens,
vLLM as the model's generation_config.json says. So filters that are off are sent as well.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Literal

from gpo_fast.rollout.sampler import stream_key
from gpo_fast.rollout.types import Completion, FinishReason, Request, SamplingParams

logger = logging.getLogger(__name__)

Branch = tuple[int, int]  # request index, branch index

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 30.0  # seconds between two attempts
ALIKE = 4  # so many equal completions of one prompt are suspect
EVERY_TOKEN = 1 << 30  # as top_k: servers disagree on whether 0 or -1 is "off", but cut this to the vocabulary


class ServerError(RuntimeError):
    """The server failed for good. `finished` holds every completion that had arrived."""

    def __init__(self, message: str, finished: list[Completion]) -> None:
        super().__init__(message)
        self.finished = finished


class _Fatal(Exception):
    """An answer that another attempt would not change."""


class _Stopped(_Fatal):
    """Not tried (again), because another completion failed for good."""


class OpenAIBackend:
    """Samples completions from a server; keeps the contract of `RolloutBackend`.

    Args:
        base_url: the server's address up to and with `/v1`.
        model: the name under which the server knows the model.
        tokenizer: the model's tokenizer.
        mode: "tokens" or "text", see the head of this module.
        api_key: sent as a bearer token.
        max_concurrency: requests under way at once.
        timeout: seconds that one request may take.
        max_retries: further attempts after a failed one (connection, timeout, status 429 or 5xx, cut-off answer),
            with waits that double from `backoff` seconds.
        logprobs: what the server's logprobs are: "raw" (of the model at temperature 1, vLLM's default) or
            "processed" (of the distribution that was sampled from). The other kind is NaN, unless the two are equal.
        extra_body: further fields of every request. In mode "text" filters that are off (top_k, min_p) are not sent,
            because `transformers serve` refuses them; tell other servers here that they are off:
            `{"top_k": 0, "min_p": 0.0}` for llama-cpp-python. `transformers serve` samples only if told so here:
            `{"generation_config": '{"do_sample": true, "top_k": 0, "eos_token_id": 2}'}` with the model's end token.
        max_length: the model's context in tokens.
        sync_weights: called by `update_weights`; must load the trained weights into the server.
        seed: first of the seeds that requests without one get.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any,
        *,
        mode: Literal["tokens", "text"] = "tokens",
        api_key: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        logprobs: Literal["raw", "processed"] = "raw",
        extra_body: dict[str, Any] | None = None,
        max_length: int = 1 << 30,
        sync_weights: Callable[[], None] | None = None,
        seed: int = 0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
        if mode not in ("tokens", "text"):
            raise ValueError(f"mode must be 'tokens' or 'text', got {mode!r}")
        if logprobs not in ("raw", "processed"):
            raise ValueError(f"logprobs must be 'raw' or 'processed', got {logprobs!r}")
        if max_concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(
                f"max_concurrency must be at least 1, max_retries at least 0 and timeout above 0, got "
                f"{max_concurrency}, {max_retries} and {timeout}"
            )
        self.url = base_url.rstrip("/") + "/completions"
        self.model = model
        self.tokenizer = tokenizer
        self.mode = mode
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.logprobs = logprobs
        self.extra_body = dict(extra_body or {})
        self.max_length = max_length
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._sync_weights = sync_weights
        self._next_seed = seed
        self._stopping = threading.Event()

    # -- the public face ------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], *, finished: Sequence[Completion] = ()) -> list[Completion]:
        """All branches of all requests, in the order of requests, then branches.

        Args:
            finished: completions of these same requests from a `ServerError`: they are not sampled again.

        Raises:
            ServerError: a branch failed after all attempts. No further one is started, those under way are awaited,
                and the error carries everything that arrived.
        """
        self._stopping.clear()
        done: dict[Branch, Completion] = {(c.request_index, c.branch_index): c for c in finished}
        prompts = [[int(t) for t in r.token_ids] for r in requests]
        seeds = [self._seed(r) for r in requests]
        shown: list[Any] = [self._prompt(ids) for ids in prompts]
        failure: Exception | None = None
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            under_way: dict[Future[Completion], Branch] = {}
            for number, request in enumerate(requests):
                for branch in range(request.n):
                    if (number, branch) not in done:
                        body = self._body(shown[number], request.sampling, seeds[number], branch)
                        task = pool.submit(self._sample, body, request.sampling, prompts[number], number, branch)
                        under_way[task] = (number, branch)
            try:
                for task in as_completed(under_way):
                    if task.cancelled():
                        continue
                    error = task.exception()
                    if error is None:
                        done[under_way[task]] = task.result()
                    elif failure is None or isinstance(failure, _Stopped):
                        failure = error if isinstance(error, Exception) else RuntimeError(str(error))
                        self._stop(under_way)
            except KeyboardInterrupt:
                self._stop(under_way)
                raise
        if failure is not None:
            count = sum(r.n for r in requests)
            raise ServerError(
                f"{self.url}: {failure}. {len(done)} of {count} completions had arrived and are kept in the error's "
                "'finished': pass them to generate(..., finished=...) to sample only the rest",
                [done[key] for key in sorted(done)],
            ) from failure
        if self.mode == "text":
            self._warn_of_greed(requests, done)
        return [done[key] for key in sorted(done)]

    def update_weights(self) -> None:
        """Loads the trained weights into the server.

        Raises:
            RuntimeError: no `sync_weights` was given: the server would go on sampling from old weights.
        """
        if self._sync_weights is None:
            raise RuntimeError(
                f"the server at {self.url} keeps its own weights, and the completions API cannot change them: pass "
                "sync_weights=, a function that loads the trained weights into the server (for vLLM, its "
                "collective_rpc or weight-transfer endpoints)"
            )
        self._sync_weights()

    def _warn_of_greed(self, requests: Sequence[Request], done: dict[Branch, Completion]) -> None:
        for number, request in enumerate(requests):
            drawn = {tuple(done[number, branch].token_ids) for branch in range(request.n)}
            if request.n >= ALIKE and len(drawn) == 1 and request.sampling.temperature > 0:
                logger.warning(
                    "all %d completions of request %d are the same: does the server sample at all? `transformers "
                    "serve` does only if its generation_config says so, see extra_body",
                    request.n,
                    number,
                )
                return

    # -- one branch -----------------------------------------------------------------------------------------

    def _seed(self, request: Request) -> int:
        if request.seed is not None:
            return request.seed
        self._next_seed += 1
        return self._next_seed - 1

    def _prompt(self, token_ids: list[int]) -> list[int] | str:
        if self.mode == "tokens":
            return token_ids
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        bos = self.tokenizer.bos_token
        for shown in (text, text.removeprefix(bos) if bos else text):
            if self.tokenizer(shown)["input_ids"] == token_ids:
                return shown
        raise ValueError(
            f"in mode 'text' a prompt's text must tokenize back to the same ids; this one does not: {text!r:.200}. "
            "Use a server that takes token ids (mode='tokens')"
        )

    def _body(self, prompt: Any, sampling: SamplingParams, seed: int, branch: int) -> dict[str, Any]:
        """The request."""
        if self.mode == "text" and (sampling.stop or sampling.stop_token_ids):
            raise ValueError("stop strings and stop tokens need mode='tokens': text does not say which token ended it")
        body: dict[str, Any] = {
            **self.extra_body,
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": stream_key(seed, branch) & 0x7FFFFFFF,
        }
        if self.mode == "tokens":
            body |= {"logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
            body |= {"return_tokens": True, "verbose": True}
        if self.mode == "tokens" or sampling.top_k:
            body["top_k"] = sampling.top_k or EVERY_TOKEN
        if self.mode == "tokens" or sampling.min_p:
            body["min_p"] = sampling.min_p
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if sampling.stop:
            body |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
        return body

    def _sample(
        self, body: dict[str, Any], sampling: SamplingParams, prompt: list[int], number: int, branch: int
    ) -> Completion:
        try:
            return self._attempts(body, sampling, prompt, number, branch)
        except _Fatal:
            self._stopping.set()  # here, and not where the result is awaited: no further branch may start
            raise

    def _attempts(
        self, body: dict[str, Any], sampling: SamplingParams, prompt: list[int], number: int, branch: int
    ) -> Completion:
        for attempt in range(self.max_retries + 1):
            try:
                return self._completion(self._post(body), sampling, prompt, number, branch)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:  # noqa: PERF203
                if isinstance(error, urllib.error.HTTPError) and error.code not in RETRIED_STATUS:
                    raise _Fatal(f"status {error.code}: {_message(error)}{self._hint(error.code)}") from error
                if attempt == self.max_retries or self._stopping.is_set():
                    raise _Fatal(f"{attempt + 1} attempts failed, the last with {error!r}") from error
                wait = _wait(error, self.backoff * 2**attempt)
                logger.warning("attempt %d of a completion failed (%r), next in %.1f s", attempt + 1, error, wait)
                self._stopping.wait(wait)
        raise AssertionError("unreachable")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._stopping.is_set():
            raise _Stopped("another completion failed")
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        deadline = time.monotonic() + self.timeout
        parts = []
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            while part := answer.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:  # the socket's own limit is for each part alone
                    raise TimeoutError(f"the answer was not complete after {self.timeout} seconds")
        parsed: dict[str, Any] = json.loads(b"".join(parts))
        return parsed

    def _completion(
        self, answer: dict[str, Any], sampling: SamplingParams, prompt: list[int], number: int, branch: int
    ) -> Completion:
        try:
            choice = answer["choices"][0]
            reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise _Fatal(f"the answer is not a completion: {answer!s:.200}") from error
        if self.mode == "tokens":
            tokens, logprobs = _tokens(answer)
        else:
            tokens = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
            logprobs = [math.nan] * len(tokens)
        # llama.cpp does not know stop tokens and goes on; what it sampled up to the first one is what was asked for.
        stop = next((i for i, token in enumerate(tokens) if token in sampling.stop_token_ids), None)
        if stop is not None:
            tokens, logprobs, reason = tokens[: stop + 1], logprobs[: stop + 1], "stop"
        ends = {self.tokenizer.eos_token_id, *sampling.stop_token_ids}
        if sampling.stop and reason == "stop" and tokens[-1:] and tokens[-1] not in ends:
            self._check_stop(tokens, sampling.stop)
        if (reason == "stop" and not sampling.stop and tokens[-1:] and tokens[-1] not in ends) or not tokens:
            # Some servers leave out the token that ended the completion; the contract includes it.
            tokens, logprobs = [*tokens, self.tokenizer.eos_token_id], [*logprobs, math.nan]
        unchanged = sampling.temperature == 1 and not sampling.top_k and sampling.top_p == 1 and not sampling.min_p
        unknown = [math.nan] * len(tokens)
        raw = logprobs if unchanged or self.logprobs == "raw" else unknown
        drawn = logprobs if unchanged or self.logprobs == "processed" else unknown
        if sampling.temperature == 0:
            drawn = [0.0] * len(tokens)
        return Completion(number, branch, prompt, tokens, raw, drawn, reason)

    def _hint(self, status: int) -> str:
        if self.mode == "tokens" and status in (400, 422):
            return " (a server that takes no token ids, such as `transformers serve`, needs mode='text')"
        return ""

    def _check_stop(self, tokens: list[int], stop: Sequence[str]) -> None:
        """Raises _Fatal unless one of the stop strings is in the completion that it has ended."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not any(string in text for string in stop):
            raise _Fatal(
                f"the server ended a completion without its end: neither a stop string of {list(stop)} nor an end "
                "token is in it. Use stop_token_ids, or a server that returns what it stopped at (vLLM, SGLang, "
                "llama.cpp)"
            )

    def _stop(self, under_way: dict[Future[Completion], Branch]) -> None:
        self._stopping.set()
        for task in under_way:
            task.cancel()


def _tokens(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and logprobs of an answer's only choice, wherever the server put them."""
    choice = answer["choices"][0]
    told = choice.get("logprobs") or {}
    content = told.get("content") or []
    ids = choice.get("token_ids") or choice.get("tokens") or (answer.get("__verbose") or {}).get("tokens")
    own = [entry["id"] for entry in content] if content and all("id" in entry for entry in content) else None
    if not ids and own is not None:
        ids = own
        _check_count(ids, answer)
    if not ids and told.get("tokens") and all(str(t).startswith("token_id:") for t in told["tokens"]):
        ids = [int(t.removeprefix("token_id:")) for t in told["tokens"]]
    if not ids and choice.get("text"):
        raise _Fatal(
            "the server returned text without token ids: use one that does (vLLM, SGLang or llama.cpp with "
            "return_token_ids, return_tokens or return_tokens_as_token_ids), or mode='text'"
        )
    ids = [int(t) for t in ids or []]
    given = told.get("token_logprobs") or [entry.get("logprob") for entry in content]
    if own is not None and ids[: len(own)] != own:
        given = []  # llama.cpp says nothing of a token that ends within a character: whose logprob is whose?
    logprobs = [math.nan if p is None else float(p) for p in given][: len(ids)]
    return ids, [*logprobs, *[math.nan] * (len(ids) - len(logprobs))]


def _check_count(ids: list[int], answer: dict[str, Any]) -> None:
    """Raises _Fatal if the server sampled more tokens than it has given logprobs of."""
    sampled = (answer.get("usage") or {}).get("completion_tokens", len(ids))
    if sampled > len(ids):
        raise _Fatal(
            f"the server sampled {sampled} tokens and returned {len(ids)}: it leaves out those that end within a "
            "character. A newer llama.cpp returns all (its fields return_tokens and verbose), or use mode='text'"
        )


def _wait(error: Exception, seconds: float) -> float:
    """Seconds until the next attempt: what the server asks for, or the back-off with jitter."""
    asked = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    if asked is not None and asked.isdigit():
        seconds = float(asked)
    else:
        seconds *= random.uniform(0.75, 1.25)
    return min(seconds, LONGEST_WAIT)


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says about a refused request."""
    try:
        return error.read().decode(errors="replace")[:300]
    except OSError:
        return str(error)

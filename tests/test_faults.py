"""What goes wrong outside of the package, and what it does then: full disks, rewards and servers that fail, little
memory."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from test_trainer import build, config, deterministic, trainer
from transformers import PreTrainedTokenizerFast, TrainerCallback

from gpo_fast import CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout.openai_backend import OpenAIBackend, ServerError
from gpo_fast.run_files import last_checkpoint, read_records


class At(TrainerCallback):
    """Calls a function when so many steps have been made."""

    def __init__(self, step: int, call: Callable[[], object]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            self.call()


@contextmanager
def file_size_limit() -> Iterator[Callable[[], None]]:
    """Gives a function after whose call no file of this process may grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_full_disk(folder: Path, fill: Callable[[], object], make_room: Callable[[], object]) -> None:
    """The second checkpoint meets a full disk: the first one is whole, and the run goes on from it to the same end."""
    run = trainer(folder, max_steps=4)
    run.add_callback(At(3, fill))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*goes on from .*checkpoint-2"):
            run.train()
    finally:
        make_room()
    assert not (folder / "checkpoint-4").exists()
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    trainer(folder, max_steps=4).train(resume_from_checkpoint=True)
    whole = folder.parent / "whole"
    trainer(whole, max_steps=4).train()
    assert deterministic(folder) == deterministic(whole)


def test_a_checkpoint_that_may_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    with file_size_limit() as limit:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        check_full_disk(tmp_path / "run", limit, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a small file system")
    ballast = disk / "ballast"

    def fill() -> None:
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - (1 << 16)))  # leaves room for the metrics, not for the weights

    try:
        check_full_disk(disk / "run", fill, ballast.unlink)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_that_is_done_makes_no_further_step(tmp_path: Path) -> None:
    trainer(tmp_path / "run", max_steps=2).train()
    before = deterministic(tmp_path / "run")
    again = trainer(tmp_path / "run", max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, deterministic(tmp_path / "run")) == (2, before)


def test_a_run_that_was_killed_in_its_first_write_can_start_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    trainer(tmp_path / "run", max_steps=1).train()
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 1


def test_no_whole_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)


def test_little_memory_in_training_is_met_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run", max_steps=1, max_tokens_per_microbatch=321)

    def out_of_memory(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run, "_backward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"321 tokens.*lower max_tokens_per_microbatch.*2\.00 GiB"):
        run.train()


# -- rewards ------------------------------------------------------------------------------------------------------


def call(function, count: int = 2, **options):
    return RewardFunctions(function, **options)(["p"] * count, ["c"] * count, [[1]] * count, {}).total.tolist()


def test_a_reward_that_hangs_is_left_behind() -> None:
    end = threading.Event()

    def hangs(completions, **_):
        end.wait()
        return [1.0] * len(completions)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"'hangs' has not returned after 0\.2 seconds"):
        call(hangs, timeout=0.2)
    assert time.monotonic() - start < 10
    end.set()
    assert call(hangs, timeout=30.0) == [1.0, 1.0], "one that returns in time is used"


def test_a_reward_that_raises_on_some_rows_is_named() -> None:
    def fails(completions, **_):
        return [1 / (i - 1) for i in range(len(completions))]

    for timeout in (None, 30.0):
        with pytest.raises(RuntimeError, match="'fails' raised ZeroDivisionError: division by zero"):
            call(fails, timeout=timeout)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_names_its_row(tmp_path: Path, value: float) -> None:
    def odd(completions, **_):
        return [0.0] * (len(completions) - 1) + [value]

    with pytest.raises(ValueError, match=rf"'odd' returned {value} for completion 15: return None"):
        build(tmp_path, reward_funcs=odd).train()


def test_a_hanging_reward_stops_the_training(tmp_path: Path) -> None:
    end = threading.Event()

    def hangs(completions, **_):
        end.wait()

    with pytest.raises(RuntimeError, match="'hangs' has not returned"):
        build(tmp_path, reward_funcs=hangs, args=config(tmp_path / "run", reward_timeout=0.2)).train()
    end.set()


# -- tokenizers ---------------------------------------------------------------------------------------------------


class Lossy(PreTrainedTokenizerFast):
    """Decodes capital letters that it encodes to something else: no text of it comes back as the same tokens."""

    def decode(self, *arguments, **options):
        return super().decode(*arguments, **options).upper()


def lossy() -> Lossy:
    plain = tiny.tokenizer()
    inner = plain.backend_tokenizer
    return Lossy(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_a_tokenizer_that_cannot_go_back_changes_no_token_of_the_search() -> None:
    engine = RolloutEngine(tiny.model(), lossy(), seed=1)
    drawn = engine.generate([Request([20, 21, 22], 1, SamplingParams(max_tokens=24, ignore_eos=True), seed=3)])
    asked: list[list[int]] = []

    def reward(completions):
        asked.extend(c.token_ids for c in completions)
        return [float(sum(c.token_ids) % 2) for c in completions]

    sampling = SamplingParams(max_tokens=24)
    finder = CriticalStepFinder(engine, reward, StepSplitter("tokens"), sampling=sampling, n_samples=2)
    found = finder.find(drawn)[0]
    starts = {tuple(drawn[0].token_ids[: step.start]) for step in found.steps}
    assert all(any(tuple(tokens[: len(s)]) == s for s in starts) for tokens in asked)
    assert len(asked) > len(found.steps)


def test_a_server_of_text_refuses_a_tokenizer_that_cannot_go_back() -> None:
    remote = OpenAIBackend("http://127.0.0.1:1/v1", "m", lossy(), mode="text")
    with pytest.raises(ValueError, match="must tokenize back to the same ids"):
        remote.generate([Request(lossy()("abc")["input_ids"])])


# -- servers ------------------------------------------------------------------------------------------------------


class Trickle(BaseHTTPRequestHandler):
    """Sends an answer byte by byte, each well within the time limit, without an end."""

    def log_message(self, *_) -> None: ...

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        try:
            for _ in range(600):
                self.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            return


def test_a_server_that_answers_ever_so_slowly_is_given_up() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    remote = OpenAIBackend(url, "m", tiny.tokenizer(), timeout=0.3, max_retries=1, backoff=0.01)
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"2 attempts failed.*not complete after 0\.3 seconds"):
        remote.generate([Request([3])])
    assert time.monotonic() - start < 10
    server.shutdown()
    server.server_close()


def test_a_failing_server_loses_no_rollout_of_a_training_step(tmp_path: Path) -> None:
    """A trainer's engine that fails once: the next run of the same command samples what the first one did."""
    run = trainer(tmp_path / "run", max_steps=2, save_steps=1)
    generate, calls = run.engine.generate, []

    def fails_late(requests, **options):
        calls.append(len(requests))
        if len(calls) == 3:
            raise ServerError("gone", [])
        return generate(requests, **options)

    run.engine.generate = fails_late
    with pytest.raises(ServerError, match="gone"):
        run.train()
    trainer(tmp_path / "run", max_steps=2, save_steps=1).train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))
    trainer(tmp_path / "whole", max_steps=2, save_steps=1).train()
    assert deterministic(tmp_path / "run") == deterministic(tmp_path / "whole")

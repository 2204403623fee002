"""Reward functions: answers, formats, and programs that must not get out."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

import pytest

from gpo_fast.code_runner import confinement, run_program
from gpo_fast.rewards import CodeReward, JSONFormat, RegexFormat, RewardFunctions, chosen_letter, get_reward


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("Because of x.\nThe answer is (D).", "D"),
        ("Answer: A", "A"),
        ("so \\boxed{B}", "B"),
        ("so \\boxed{\\text{C}}", "C"),
        ("The answer is A. No, the answer is B", "B"),
        ("I think\nB) the second", "B"),
        ("A dog barks", None),
        ("The answer is apples", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_chooses(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_rewards_by_name() -> None:
    assert get_reward("multiple_choice")(completions=["B", "so C"], answer=[1, "(B)"]) == [1.0, 0.0]
    chat = [{"role": "assistant", "content": "x\n42"}]
    assert get_reward("exact_match")(completions=[chat, "41"], answer=[42, 42]) == [1.0, 0.0]
    assert get_reward("json")(completions=['{"a": 1}', "```json\n[1]\n```", "{", "[" * 100_000]) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="unknown reward function 'maths'"):
        get_reward("maths")


def test_math_sees_equal_values() -> None:
    pytest.importorskip("math_verify")
    given = ["so $\\boxed{\\frac{1}{2}}$", "it is $0.5$", "it is $0.25$"]
    answers = ["$\\frac{1}{2}$"] * 3
    assert get_reward("math")(completions=given, answer=answers) == [1.0, 1.0, 0.0]
    # With a time limit it runs in a thread, where math-verify's own limit cannot work.
    limited = RewardFunctions("math", timeout=60.0)
    assert limited(["p"] * 3, given, [[1]] * 3, {"answer": answers}).total.tolist() == [1.0, 1.0, 0.0]


def test_formats() -> None:
    thinks = RegexFormat(r"<think>.+</think>\s*<answer>.+</answer>")
    assert thinks(["<think>a\nb</think>\n<answer>1</answer>\n", "<answer>1</answer>"]) == [1.0, 0.0]
    assert RewardFunctions(thinks).names == ["regex_format"]
    with pytest.raises(ValueError, match="not a regular expression"):
        RegexFormat("(")
    pytest.importorskip("jsonschema")
    person = JSONFormat({"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}})
    assert person(['{"age": 3}', '{"age": "3"}', "{}", "no"]) == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="not a JSON schema"):
        JSONFormat({"type": "objekt"})


def test_code_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPO_FAST_RUN_CODE", raising=False)
    with pytest.raises(ValueError, match="is off"):
        CodeReward()
    with pytest.raises(RuntimeError, match="is off"):
        RewardFunctions("code")(["p"], ["print(1)"], [[1]], {"tests": [["pass"]]})
    monkeypatch.setenv("GPO_FAST_RUN_CODE", "1")
    assert get_reward("code")(completions=["x = 2"], tests=[["assert x == 2"]]) == [1.0]


def test_programs_are_scored_by_the_tests_that_they_pass() -> None:
    reward = CodeReward(enable=True)
    program = "Here it is:\n```python\ndef f(x):\n    return x + 1\n```\nDone."
    reader = "```\nprint(int(input()) * 2)\n```"
    early = "import sys\nsys.exit(0)"
    tests = [["assert f(1) == 2", "assert f(1) == 3"], [{"input": "21", "output": "42\n"}], ["assert False"]]
    assert reward(completions=[program, reader, early], tests=tests) == [0.5, 1.0, 0.0]


HOSTILE = {
    "endless": "while True: pass",
    "asleep": "import time; time.sleep(60)",
    "memory": "x = bytearray(1 << 32)",
    "disk": "f = open('big', 'wb')\nfor _ in range(100): f.write(b'x' * (1 << 20)); f.flush()",
    "output": "while True: print('x' * 10000)",
    "raises limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40)); x = bytearray(1 << 32)",
    "signals": "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs_fail_in_time(program: str) -> None:
    start = time.monotonic()
    result = run_program(program, seconds=1.0)
    assert not result.ok
    assert time.monotonic() - start < 15


def processes_with(mark: str) -> list[str]:
    """The processes of this machine whose command line holds a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rounds", [1, 6])
def test_nothing_is_left_behind(rounds: int) -> None:
    """Children that outlive their program are killed with it (64 of them fork one another), its folder is gone."""
    mark = secrets.token_hex(8)
    child = "import time; time.sleep(60)"
    source = (
        "import os, subprocess, sys, time\nprint(os.getcwd(), flush=True)\n"
        f"for _ in range({rounds}):\n"
        "    try: os.fork()\n"
        "    except OSError: pass\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, {mark!r}])\ntime.sleep(60)"
    )
    result = run_program(source, seconds=2.0, processes=256)
    assert result.reason == "timeout"
    assert not Path(result.output.split()[0]).exists()
    deadline = time.monotonic() + 10
    while processes_with(mark) and time.monotonic() < deadline:  # they are dead, but the kernel is still clearing up
        time.sleep(0.05)
    assert processes_with(mark) == []


# Each prints "out" where it got out of its confinement.
ESCAPES = {
    "write": "open({target!r}, 'w').write('out')",
    "delete": "import os; os.remove({secret!r}); print('out')",
    "symlink": "import os; os.symlink({target!r}, 'link'); open('link', 'w').write('out')",
    "hard link": "import os; os.link({secret!r}, 'link'); open('link', 'a').write('out')",
    "mode": "import os; os.chmod({secret!r}, 0o777); print('out')",
    "environment": (
        "import pathlib\nfor p in pathlib.Path('/proc').glob('[0-9]*/environ'):\n"
        "    try:\n        if b'hunter2' in p.read_bytes(): print('out')\n    except OSError: pass"
    ),
    "signal": "import os; os.kill({pid}, 0); print('out')",
    "unmount proc": (
        "import ctypes, os\nif ctypes.CDLL(None).umount2(b'/proc', 2) == 0 and os.path.exists('/proc/{pid}'):\n"
        "    print('out')"
    ),
    "remount": (
        "import ctypes\nif ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0:\n"
        "    open({target!r}, 'w').write('out')"
    ),
    "another namespace": (
        "import subprocess\nsubprocess.run(['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', "
        "'umount -l /proc; mount -o remount,bind,rw /; echo out > {target}'])"
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_programs_do_not_get_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if not confinement().own_files:
        pytest.skip("this system does not permit mount namespaces: programs have this user's files here")
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("hunter2")
    # A process of this user with a secret in its environment; it is not a child of the program's.
    sleeper = subprocess.Popen(["sleep", "60"], env={"SECRET_TOKEN": "hunter2", "PATH": os.defpath})
    try:
        result = run_program(ESCAPES[name].format(target=str(target), secret=str(secret), pid=sleeper.pid))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "out" not in result.output
    assert not target.exists()
    assert secret.read_text() == "hunter2"
    assert secret.stat().st_mode & 0o777 == 0o644


def test_a_program_cannot_fill_the_disk() -> None:
    if not confinement().own_files:
        pytest.skip("this system does not permit mount namespaces: only the size of a file is limited")
    source = (
        "written = 0\ntry:\n    for i in range(4096):\n        with open(f'file{i}', 'wb') as file:\n"
        "            written += file.write(bytes(1 << 20))\nexcept OSError as error: print(written, error)"
    )
    result = run_program(source)
    written, _, error = result.output.partition(" ")
    assert int(written) <= 8 << 20
    assert "No space left" in error


def test_programs_see_no_secrets_of_the_environment_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in run_program("import os; print(dict(os.environ))").output
    if not confinement().command:
        pytest.skip("this system does not permit user namespaces: programs keep the network here")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        source = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert not run_program(source).ok
    assert os.environ["SECRET_TOKEN"] == "hunter2"

"""Reward functions: answers, formats, and programs that must not get out."""

from __future__ import annotations

import os
import socket
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
    assert get_reward("math")(completions=given, answer=["$\\frac{1}{2}$"] * 3) == [1.0, 1.0, 0.0]


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


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """A child that outlives its program is killed with it, and the program's folder is gone."""
    beat = tmp_path / "beat"
    child = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('x'); time.sleep(0.02)"
    source = (
        "import os, subprocess, sys, time\nprint(os.getcwd())\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(0.5)"
    )
    result = run_program(source, seconds=5.0)
    assert not Path(result.output.strip()).exists()
    size = beat.stat().st_size if beat.exists() else 0
    time.sleep(0.3)
    assert (beat.stat().st_size if beat.exists() else 0) == size


def test_programs_see_no_secrets_of_the_environment_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in run_program("import os; print(dict(os.environ))").output
    if not confinement():
        pytest.skip("this system does not permit user namespaces: programs keep the network here")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        source = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert not run_program(source).ok
    assert os.environ["SECRET_TOKEN"] == "hunter2"

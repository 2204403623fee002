"""Steps, forests, critical steps and rewards: the method without a trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gpo_fast import Completion, CriticalStepFinder, SamplingParams, StepSplitter, TokenForest
from gpo_fast.evaluation import gain_of, wilson_interval
from gpo_fast.rewards import RewardFunctions
from gpo_fast.steps import Step


def encode(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def split(text: str, **options) -> list[str]:
    splitter = StepSplitter(options.pop("method", "newline"), **{"min_tokens": 1, **options})
    return [text[s.start : s.end] for s in splitter.split(encode(text), tiny.tokenizer())]


def test_a_newline_ends_a_step_and_blank_lines_belong_to_it() -> None:
    assert split("1+1=2\n\n2+3=5\nx") == ["1+1=2\n\n", "2+3=5\n", "x"]
    assert split("no newline") == ["no newline"]
    assert split("\n\n\n") == ["\n\n\n"]
    assert StepSplitter().split([], tiny.tokenizer()) == [Step(0, 0)]


def test_short_steps_are_merged_and_long_traces_thinned() -> None:
    assert split("a\nbcdef\ng", min_tokens=4) == ["a\nbcdef\ng"]
    assert split("abcd\nefgh\ni", min_tokens=4) == ["abcd\n", "efgh\ni"]
    assert len(split("ab\n" * 100, max_steps=7)) == 7


def test_other_splitters() -> None:
    assert split("it is so. and so? yes", method="sentence") == ["it is so. ", "and so? ", "yes"]
    assert split("a\nb\n\nc", method="paragraph") == ["a\nb\n\n", "c"]
    assert split("a:b:c", method="regex", pattern=":") == ["a:", "b:", "c"]
    assert split("abcdef", method="tokens", min_tokens=4) == ["abcdef"]
    assert split("abcdefgh", method="tokens", min_tokens=4) == ["abcd", "efgh"]
    assert split("abcd", method=lambda tokens, tokenizer: [1, 3]) == ["a", "bc", "d"]


def test_bad_splitters_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="newline, paragraph"):
        StepSplitter("line")
    with pytest.raises(ValueError, match="regular expression"):
        StepSplitter("regex", pattern="(")
    with pytest.raises(ValueError, match="needs a pattern"):
        StepSplitter("regex")
    with pytest.raises(ValueError, match="got 9"):
        split("abc", method=lambda tokens, tokenizer: [9])


@given(st.lists(st.sampled_from("ab1 .\n"), max_size=60), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_steps_cover_a_trajectory_without_gaps(characters: list[str], min_tokens: int, max_steps: int) -> None:
    tokens = encode("".join(characters)) if characters else []
    for method in ("newline", "sentence", "paragraph", "tokens"):
        steps = StepSplitter(method, min_tokens=min_tokens, max_steps=max_steps).split(tokens, tiny.tokenizer())
        assert steps[0].start == 0
        assert steps[-1].end == len(tokens)
        assert all(a.end == b.start for a, b in zip(steps, steps[1:]))
        assert 1 <= len(steps) <= max_steps
        assert len(steps) == 1 or all(s.end - s.start >= min_tokens for s in steps)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5)), max_size=12))
def test_a_forest_gives_back_every_path(branches: list[tuple[int, int]]) -> None:
    forest = TokenForest()
    prompt = forest.add_prompt([1, 2, 3])
    paths = {prompt: [1, 2, 3]}
    for number, (choice, length) in enumerate(branches):
        parent = list(paths)[choice % len(paths)]
        at = 1 + choice % len(paths[parent])
        tokens = [100 * number + k for k in range(length)]
        node = forest.branch(parent, at, tokens)
        paths[node] = paths[parent][:at] + tokens
    for node, path in paths.items():
        assert forest.path(node) == path
    assert forest.leaves() == [n for n in paths if n != prompt]
    assert forest.total_tokens == sum(len(p) for n, p in paths.items() if n != prompt)
    assert forest.unique_tokens == 3 + sum(length for _, length in branches)


def test_a_forest_refuses_what_cannot_be() -> None:
    forest = TokenForest()
    with pytest.raises(ValueError, match="at least one token"):
        forest.add_prompt([])
    prompt = forest.add_prompt([1, 2])
    with pytest.raises(ValueError, match="cannot branch at 3"):
        forest.branch(prompt, 3, [4])
    with pytest.raises(ValueError, match="as many logprobs"):
        forest.branch(prompt, 1, [4], logprobs=[0.1, 0.2])


class TableEngine:
    """A backend whose continuations succeed with a probability that depends on the prefix's length alone."""

    def __init__(self, values: dict[int, float], prompt_length: int) -> None:
        self.tokenizer, self.values, self.prompt_length, self.requests = tiny.tokenizer(), values, prompt_length, []

    def generate(self, requests):
        self.requests += requests
        drawn = []
        for number, request in enumerate(requests):
            cut = len(request.token_ids) - self.prompt_length
            successes = round(self.values[cut] * request.n)
            for branch in range(request.n):
                token = 4 if branch < successes else 3  # "1" or "0"
                drawn.append(Completion(number, branch, list(request.token_ids), [token], [0.0], [0.0], "stop"))
        return drawn

    def update_weights(self) -> None:
        pass


def outcome(completions):
    return [float(c.token_ids[-1:] == [4]) for c in completions]


TEXT = "aaaa\nbbbb\ncccc\ndddd\n0"
VALUES = {0: 0.5, 5: 0.75, 10: 0.25, 15: 1.0}


@pytest.mark.parametrize(
    ("criterion", "reset", "index", "position"),
    [("max", "before", 2, 10), ("min", "before", 3, 15), ("abs", "before", 3, 15), ("max", "after", 2, 15)],
)
def test_the_critical_step_is_the_extreme_advantage(criterion, reset, index, position) -> None:
    prompt = [3, 4, 5]
    engine = TableEngine(VALUES, len(prompt))
    finder = CriticalStepFinder(
        engine,
        outcome,
        StepSplitter(min_tokens=4),
        n_samples=8,
        criterion=criterion,
        reset=reset,
        sampling=SamplingParams(max_tokens=30),
    )
    tokens = encode(TEXT)
    found = finder.find([Completion(0, 0, prompt, tokens, [0.0] * len(tokens), [0.0] * len(tokens), "stop")])[0]
    assert found.values == [0.5, 0.75, 0.25, 1.0, 0.0]
    assert found.advantages == [0.25, -0.5, 0.75, -1.0]
    assert (found.index, found.token_position) == (index, position)
    assert found.num_rollouts == 4 * 8
    assert found.num_tokens == 32
    assert found.standard_errors[0] == pytest.approx(math.sqrt(0.25 / 7))
    # One batch, one request for each state, each with the room that its prefix leaves.
    assert [(len(r.token_ids) - 3, r.n, r.sampling.max_tokens) for r in engine.requests] == [
        (0, 8, 30),
        (5, 8, 25),
        (10, 8, 20),
        (15, 8, 15),
    ]
    assert len({r.seed for r in engine.requests}) == 4


def test_rollouts_of_the_same_prompt_are_samples_of_the_first_value() -> None:
    engine = TableEngine(VALUES, 3)
    finder = CriticalStepFinder(engine, outcome, n_samples=4, sampling=SamplingParams(max_tokens=30))
    tokens = encode(TEXT)
    trajectory = Completion(0, 0, [3, 4, 5], tokens, [0.0] * len(tokens), [0.0] * len(tokens), "stop")
    found = finder.find([trajectory], rewards=[0.0], root_values=[[1.0, 0.0, 0.0, 0.0]])[0]
    assert found.values[0] == 0.25
    assert len(engine.requests) == 3


def test_a_trajectory_of_one_step_or_none_is_reset_to_its_start() -> None:
    for tokens in (encode("abc"), []):
        engine = TableEngine({0: 0.5}, 2)
        finder = CriticalStepFinder(engine, outcome, reset="after", sampling=SamplingParams(max_tokens=9))
        found = finder.find([Completion(0, 0, [3, 4], tokens, [0.0] * len(tokens), [0.0] * len(tokens), "length")])
        assert (found[0].index, found[0].token_position) == (0, 0)


def constant(value):
    def reward(prompts, **_):
        return [value] * len(prompts)

    return reward


async def later(completions, **_):
    return [float(len(c)) for c in completions]


def raising(**_):
    raise KeyError("no such column")


def test_rewards_are_weighted_sums_sync_or_async() -> None:
    both = RewardFunctions([constant(1.0), later, constant(None)], weights=[2.0, 0.5, 9.0])
    result = both(["p", "q"], ["ab", "c"], [[1], [2]], {})
    assert result.total.tolist() == [3.0, 2.5]
    assert np.isnan(result.per_function[:, 2]).all()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raising, RuntimeError, "'raising' raised KeyError"),
        (lambda prompts, **_: [1.0], ValueError, "returned 1 values for 2"),
        (constant(None), ValueError, "all gave None"),
        (constant(float("nan")), ValueError, "returned nan for completion 0"),
        (constant("good"), TypeError, "not a number"),
        (lambda **_: 1.0, TypeError, "must return a list"),
    ],
)
def test_a_bad_reward_function_is_named(function, error, message) -> None:
    with pytest.raises(error, match=message):
        RewardFunctions(function)(["p", "q"], ["a", "b"], [[1], [2]], {})
    with pytest.raises(ValueError, match="unknown reward"):
        RewardFunctions("exactmatch")


def test_a_gain_is_compared_problem_by_problem() -> None:
    before, after = [0, 0, 1, 1] * 25, [1, 0, 1, 1] * 25
    gain = gain_of(before, after)
    assert gain.gain == pytest.approx(0.25)
    # A quarter of 100 problems gained 1: the variance of the differences is 0.1875 * 100 / 99.
    assert gain.high - gain.gain == pytest.approx(1.959964 * math.sqrt(0.1875 / 99))
    assert gain_of(after, before).gain == -gain.gain
    with pytest.raises(ValueError, match="equal length"):
        gain_of([1.0], [1.0, 0.0])


def test_wilson_interval() -> None:
    # Wilson 1927 by the closed formula, for 8 of 10: 0.4902 to 0.9433.
    found = wilson_interval(8, 10)
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 5).low == 0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)

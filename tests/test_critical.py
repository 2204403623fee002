"""The search in worlds whose values are known exactly. Bounds are binomial: three standard errors unless it says."""

from __future__ import annotations

import math

import exact_world as exact
import numpy as np
import pytest

from gpo_fast import Completion, CriticalStepFinder, RolloutEngine, SamplingParams
from gpo_fast.critical.proposals import FirstMistake, GradientScore, TokenEntropy, logprob_dip
from gpo_fast.critical.step import SCORES
from gpo_fast.critical.value_model import VALUES, _transition, sample_paths
from gpo_fast.steps import Step

SAMPLING = SamplingParams(max_tokens=exact.MAX_TOKENS)


def finder(backend, **options) -> CriticalStepFinder:
    return CriticalStepFinder(backend, exact.rewards, exact.splitter(), sampling=SAMPLING, **options)


def roots_of(backend, count: int, group: int = 8) -> list[list[float]]:
    """Rewards of other rollouts of the prompt, for each of `count` trajectories."""
    drawn = exact.rewards(exact.trajectories(backend, group * count, seed=99, outcome=None))
    return [drawn[i * group : (i + 1) * group] for i in range(count)]


class Trial:
    """Searches of the same trajectories of some worlds: which found the true critical step, and what they took."""

    def __init__(self, worlds, outcome: float | None, count: int, **options) -> None:
        self.found, hits = [], []
        score = SCORES[options["criterion"]]
        for number, world in enumerate(worlds):
            backend = exact.ChainBackend(world)
            drawn = exact.trajectories(backend, count // len(worlds), seed=number, outcome=outcome)
            found = finder(backend, **options).find(drawn, root_values=roots_of(backend, len(drawn)))
            for trajectory, step in zip(drawn, found):
                true = score(np.diff(world.values(trajectory.token_ids)))
                hits.append(true[step.index] >= true.max() - 1e-9)
            self.found += found
        self.hits = np.array(hits)
        self.rate = float(self.hits.mean())
        self.tokens = sum(f.num_tokens for f in self.found)

    @property
    def error(self) -> float:
        """Standard error of the hit rate."""
        return math.sqrt(max(self.rate * (1 - self.rate), 1 / len(self.hits)) / len(self.hits))


EVEN = ([exact.even()], 0.0, "min")
REPAIRED = ([exact.even(10, 0.85, repair=0.1)], 0.0, "min")
FALL = ([exact.pivotal(k) for k in (2, 5, 8)], 0.0, "min")
GAIN = ([exact.pivotal(k) for k in (2, 5, 8)], 1.0, "max")
CHANGE = ([exact.even(12, 0.8, repair=0.3)], None, "abs")


def trial(world, count: int, **options) -> Trial:
    worlds, outcome, criterion = world
    return Trial(worlds, outcome, count, criterion=criterion, **options)


# -- values -------------------------------------------------------------------------------------------------------


def test_uniform_values_are_unbiased_and_their_intervals_cover() -> None:
    world = exact.even(6, 0.8, repair=0.2)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, 300, seed=3, outcome=None)
    n = 80
    found = finder(backend, n_samples=n).find(drawn)
    truth = np.array([world.values(t.token_ids)[:-1] for t in drawn])
    values = np.array([f.values[:-1] for f in found])
    errors = np.array([f.standard_errors[:-1] for f in found])
    spread = np.sqrt((truth * (1 - truth) / n).sum()) / truth.size
    assert abs((values - truth).mean()) < 3 * spread
    # The normal interval of 80 right-or-wrong samples is good where both outcomes are expected 16 times or more.
    middle = (truth > 0.2) & (truth < 0.8)
    covered = (np.abs(values - truth) <= 1.96 * errors)[middle]
    assert covered.size > 800
    assert 0.93 < covered.mean() < 0.97


def test_the_real_engine_samples_the_same_values() -> None:
    world = exact.even(5, 0.7, repair=0.3)
    engine = RolloutEngine(exact.table_model(world), None, max_batch_size=256)
    trajectory = exact.trajectories(exact.ChainBackend(world), 1, seed=0, outcome=0.0)
    for estimator in ("uniform", "racing"):
        found = finder(engine, n_samples=150, estimator=estimator, delta=1e-6).find(trajectory)[0]
        truth = world.values(trajectory[0].token_ids)
        for value, true, error in zip(found.values, truth, found.standard_errors):
            assert abs(value - true) <= 4 * max(error, 0.01)


def test_the_hit_rate_rises_with_the_samples() -> None:
    rates = [trial(FALL, 90, n_samples=n).rate for n in (2, 4, 8, 12, 32)]
    assert all(b > a - 0.1 for a, b in zip(rates, rates[1:]))
    assert rates[-1] > rates[0] + 0.4
    assert rates[-1] > 0.9


# -- racing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [EVEN, FALL, GAIN], ids=["even", "fall", "gain"])
@pytest.mark.parametrize(("uniform", "racing"), [(4, 2), (12, 12)])
def test_racing_hits_as_often_as_uniform_with_two_fifths_of_its_tokens(world, uniform: int, racing: int) -> None:
    paper = trial(world, 150, n_samples=uniform)
    race = trial(world, 150, n_samples=racing, estimator="racing")
    assert race.tokens <= 0.4 * paper.tokens
    assert race.rate >= paper.rate - 2 * math.hypot(race.error, paper.error)


@pytest.mark.parametrize("world", [EVEN, REPAIRED, FALL, GAIN, CHANGE], ids=["even", "repaired", "fall", "gain", "abs"])
def test_a_stated_confidence_is_honest(world) -> None:
    delta = 0.2
    race = trial(world, 150, n_samples=24, estimator="racing", delta=delta)
    stated = np.array([f.confidence for f in race.found]) >= 1 - delta
    assert stated.sum() >= 25
    wrong = float((~race.hits)[stated].mean())
    assert wrong <= delta + 3 * math.sqrt(delta * (1 - delta) / stated.sum())


def test_racing_ends_when_it_is_as_sure_as_uniform_or_as_delta_asks() -> None:
    cost = {}
    for n, delta in ((4, 0.01), (12, 0.01), (12, 0.5)):
        race = trial(FALL, 60, n_samples=n, estimator="racing", delta=delta)
        cost[n, delta] = race.tokens
        assert race.tokens < trial(FALL, 60, n_samples=n).tokens
    assert cost[4, 0.01] < cost[12, 0.01] > cost[12, 0.5]


def test_the_posteriors_choice_of_uniform_samples() -> None:
    """The same continuations as uniform's, and no worse a choice."""
    paper = trial(FALL, 150, n_samples=4)
    chosen = trial(FALL, 150, n_samples=4, estimator="posterior")
    assert chosen.tokens == paper.tokens
    same = [a.continuation_rewards == b.continuation_rewards for a, b in zip(paper.found, chosen.found)]
    assert all(same)
    assert chosen.rate >= paper.rate + 2 * math.hypot(chosen.error, paper.error)


def test_racing_is_never_dearer_than_uniform() -> None:
    backend = exact.ChainBackend(exact.pivotal(4))
    drawn = exact.trajectories(backend, 40, seed=0, outcome=0.0)
    race = finder(backend, n_samples=3, estimator="racing", criterion="min", delta=1e-9)
    for trajectory, found in zip(drawn, race.find(drawn)):
        assert found.num_rollouts <= 3 * len(found.steps)
        prices = [len(trajectory.token_ids) - s.start for s in found.steps]
        planned = sum(p * len(c) for p, c in zip(prices, found.continuations))
        assert planned <= 3 * sum(prices) == race.most_tokens(trajectory, root_is_known=False)
        assert found.rollouts_saved == 3 * len(found.steps) - found.num_rollouts


def test_the_posterior_is_that_of_one_state_in_closed_form() -> None:
    # One state and an outcome: uniform prior, so Beta(1 + successes, 1 + failures) with the own outcome counted.
    rng = np.random.default_rng(0)
    paths = sample_paths(np.array([3.0]), np.array([5.0]), 1.0, 40_000, rng)
    mean, sd = 5 / 11, math.sqrt(5 * 6 / 11**2 / 12)
    assert abs(paths[:, 0].mean() - mean) < 4 * sd / 200 + 1e-3
    assert paths[:, 0].std() == pytest.approx(sd, rel=0.02)
    assert (paths[:, 1] == 1.0).all()


def test_the_prior_is_a_martingale_up_to_the_grid() -> None:
    transition = _transition()
    np.testing.assert_allclose(transition.sum(axis=1), 1.0, rtol=1e-12)
    # The part that may go anywhere pulls towards the middle by 2 % of the way.
    pull = 0.02 * (0.5 - VALUES)
    assert np.abs(transition @ VALUES - VALUES - pull).max() < 0.02


# -- rounds, streams, cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["racing", "bisect"])
def test_a_search_does_not_depend_on_how_it_is_run(estimator: str) -> None:
    world = exact.pivotal(6)
    drawn = exact.trajectories(exact.ChainBackend(world), 12, seed=1, outcome=0.0)
    backends = [
        exact.ChainBackend(world),
        exact.StreamingChainBackend(world, max_batch_size=5),
        exact.StreamingChainBackend(world, max_batch_size=500),
    ]
    results = []
    for backend in backends:
        found = finder(backend, n_samples=4, estimator=estimator, criterion="min", ahead=False).find(drawn)
        results.append([(f.index, f.continuation_rewards, f.num_tokens, f.confidence) for f in found])
    assert results[0] == results[1] == results[2]


def test_few_continuations_are_drawn_in_one_round() -> None:
    world = exact.pivotal(6)
    drawn = exact.trajectories(exact.ChainBackend(world), 20, seed=1, outcome=0.0)

    def found(estimator: str, count: int, **options):
        backend = exact.StreamingChainBackend(world, max_batch_size=400)
        return finder(backend, n_samples=4, estimator=estimator, criterion="min", **options).find(drawn[:count])

    few, posterior = found("racing", 2), found("posterior", 2)
    assert [f.continuation_rewards for f in few] == [f.continuation_rewards for f in posterior]
    assert [(f.index, f.num_rounds) for f in few] == [(f.index, 1) for f in posterior]
    assert max(f.num_rounds for f in found("racing", 2, ahead=False)) > 1
    assert sum(f.rollouts_saved for f in found("racing", 20)) > 0


def test_what_can_no_longer_win_is_cancelled() -> None:
    world = exact.pivotal(6)
    backend = exact.StreamingChainBackend(world, max_batch_size=400)
    drawn = exact.trajectories(backend, 20, seed=1, outcome=0.0)
    backend.num_tokens = 0
    found = finder(backend, n_samples=24, estimator="racing", criterion="min").find(drawn)
    assert backend.num_cancelled == sum(f.num_cancelled for f in found) > 0
    assert sum(f.num_tokens for f in found) < backend.num_tokens  # a cancelled one stops where it is
    for step in found:
        assert all(c.finish_reason != "cancelled" for drawn in step.continuations for c in drawn)
        assert step.num_rollouts >= sum(map(len, step.continuations)) + step.num_cancelled


def test_the_real_engine_streams_and_cancels() -> None:
    world = exact.pivotal(6, steps=12)
    engine = RolloutEngine(exact.table_model(world), None, max_batch_size=128)
    drawn = exact.trajectories(exact.ChainBackend(world), 4, seed=1, outcome=0.0)
    found = finder(engine, n_samples=64, estimator="racing", criterion="min", delta=0.02).find(drawn)
    assert [f.index for f in found] == [6] * 4
    assert engine.stats()["cancelled"] == sum(f.num_cancelled for f in found)


def test_rewards_know_their_trajectory() -> None:
    world = exact.even(4)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, 6, seed=0, outcome=None)
    seen = []

    def rewards(completions):
        for c in completions:
            own = drawn[c.request_index].token_ids
            seen.append(c.request_index)
            assert c.token_ids[:1] == own[:1] or c.prompt_token_ids == [exact.PROMPT]
        return exact.rewards(completions)

    CriticalStepFinder(backend, rewards, exact.splitter(), sampling=SAMPLING).find(drawn)
    assert set(seen) == set(range(6))


# -- bisection ----------------------------------------------------------------------------------------------------


def test_bisection_is_exact_where_mistakes_stay() -> None:
    n, steps = 64, 12
    world = exact.even(steps, 0.9, repair=0.0)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, 60, seed=5, outcome=0.0)
    search = finder(backend, n_samples=n, estimator="bisect", criterion="min")
    found = search.find(drawn, root_values=[[1.0, 0.0]] * 60)
    for trajectory, step in zip(drawn, found):
        mistake = next(i for i, v in enumerate(world.values(trajectory.token_ids)) if v == 0) - 1
        assert step.index == mistake  # a miss needs 64 failures in a row at a value above 0.9^12
        assert step.num_rollouts <= n * math.ceil(math.log2(steps))
        assert len(step.continuations[step.reset_state]) in (0, n)


def test_bisection_of_what_did_not_fail_costs_nothing() -> None:
    backend = exact.ChainBackend(exact.even())
    drawn = exact.trajectories(backend, 3, seed=0, outcome=1.0)
    found = finder(backend, estimator="bisect", criterion="min").find(drawn, root_values=[[1.0, 0.0]] * 3)
    assert [(f.index, f.num_rollouts) for f in found] == [(0, 0)] * 3


# -- reuse --------------------------------------------------------------------------------------------------------


def reuse_bias(reuse: str, estimator: str = "uniform") -> tuple[float, float]:
    """Mean of (reward of reused samples - true value of their state), in standard errors, and as it is."""
    world = exact.even(8, 0.85, repair=0.15)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, 300, seed=2, outcome=None)
    found = finder(backend, n_samples=4, reuse=reuse, estimator=estimator).find(drawn)
    gaps, variance = [], 0.0
    for trajectory, step in zip(drawn, found):
        true = world.values(trajectory.token_ids)[step.reset_state]
        gaps += [r - true for r in step.reusable_rewards]
        variance += len(step.reusable_rewards) * true * (1 - true)
    return sum(gaps) / math.sqrt(variance), sum(gaps) / len(gaps)


def test_split_samples_are_unbiased_and_all_are_not() -> None:
    split, _ = reuse_bias("split")
    everything, gap = reuse_bias("all")
    assert abs(split) < 3
    # The largest gain begins at a state that was underestimated.
    assert everything < -5
    assert gap < -0.05


def test_split_is_unbiased_in_a_race() -> None:
    split, _ = reuse_bias("split", "racing")
    assert abs(split) < 3


def test_split_costs_no_more_and_keeps_the_halves_apart() -> None:
    backend = exact.ChainBackend(exact.even())
    drawn = exact.trajectories(backend, 5, seed=0, outcome=0.0)
    for step in finder(backend, n_samples=4, reuse="split").find(drawn):
        assert step.num_rollouts == 4 * len(step.steps)
        assert [len(c) for c in step.continuations] == [4] * len(step.steps)
        assert len(step.reusable) == len(step.reusable_rewards) == 2
        chosen = step.continuation_rewards[step.reset_state][:2]
        assert step.values[step.reset_state] == np.mean(chosen)
    assert all(not s.reusable for s in finder(backend, n_samples=4).find(drawn))


# -- proposals ----------------------------------------------------------------------------------------------------


def test_a_proposal_orders_the_search_and_never_decides_it() -> None:
    world = exact.pivotal(7, slip=0.0)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, 30, seed=4, outcome=0.0)

    def favourite(step: int):
        return lambda completions, steps: [[float(i == step) for i in range(len(row))] for row in steps]

    for estimator, n in (("racing", 12), ("bisect", 64)):
        for wrong in (1, 10):
            options = {"n_samples": n, "estimator": estimator, "criterion": "min", "proposal": favourite(wrong)}
            found = finder(backend, **options).find(drawn, root_values=[[1.0, 0.0]] * 30)
            assert sum(f.index == 7 for f in found) >= 26
    told = finder(backend, n_samples=8, estimator="bisect", criterion="min", proposal=favourite(7))
    plain = finder(backend, n_samples=8, estimator="bisect", criterion="min")
    costs = [sum(f.num_rollouts for f in s.find(drawn, root_values=[[1.0, 0.0]] * 30)) for s in (told, plain)]
    assert costs[0] < costs[1]


def test_proposals_of_a_known_model() -> None:
    world = exact.even(4, 0.7, repair=0.3, loop=(0.0, 0.0))
    model = exact.table_model(world)
    drawn = exact.trajectories(exact.ChainBackend(world), 3, seed=0, outcome=0.0)
    steps = [exact.splitter().split(c.token_ids, None) for c in drawn]
    entropies = TokenEntropy(model)(drawn, steps)
    for trajectory, scores in zip(drawn, entropies):
        before = [exact.PROMPT, *trajectory.token_ids]
        rows = [world.table[before[i]] for i in range(len(scores))]
        truth = [-sum(p * math.log(p) for p in row if p > 0) for row in rows]
        np.testing.assert_allclose(scores, truth, rtol=1e-3, atol=1e-4)
    # In a Markov chain the outcome hangs on the last step before it and on no other.
    for scores in GradientScore(model)(drawn, steps):
        assert scores[-1] == 0.0
        assert scores[-2] > 0.0
        assert max(scores[:-2]) <= 1e-6 * scores[-2]
    drawn[0].logprobs[:] = [-float(i) for i in range(len(drawn[0].logprobs))]
    dips = logprob_dip(drawn[:1], steps[:1])[0]
    assert dips == [float(s.end - 1) for s in steps[0]]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "halving"}, "uniform, posterior, racing, bisect"),
        ({"estimator": "bisect"}, "criterion='min'"),
        ({"reuse": "half"}, "none, split, all"),
        ({"reuse": "split", "n_samples": 3}, "even, got 3"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"reward_range": (1, 1)}, "lowest, highest"),
        ({"proposal": "attention"}, "logprob, mistake, entropy"),
        ({"proposal": "gradient"}, "ChainBackend has none"),
    ],
)
def test_bad_options_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finder(exact.ChainBackend(exact.even()), **options)


def test_a_reward_outside_its_range_is_named() -> None:
    backend = exact.ChainBackend(exact.even())
    drawn = exact.trajectories(backend, 1, seed=0, outcome=0.0)
    with pytest.raises(ValueError, match=r"reward of 3\.0 is outside reward_range, 0 to 2"):
        finder(backend, reward_range=(0, 2)).find(drawn, rewards=[3.0])


def test_the_control_samples_nothing_and_resets_anywhere() -> None:
    drawn = exact.trajectories(exact.ChainBackend(exact.even()), 400, seed=0, outcome=0.0)
    found = finder(exact.ChainBackend(exact.even()), estimator="random").find(drawn)
    assert {(f.num_rollouts, f.num_tokens) for f in found} == {(0, 0)}
    places = np.bincount([f.index for f in found], minlength=len(found[0].steps))
    expected = len(found) / len(places)
    assert (np.abs(places - expected) < 4 * math.sqrt(expected)).all()
    after = finder(exact.ChainBackend(exact.even()), estimator="random", reset="after").find(drawn)
    assert all(0 < f.reset_state < len(f.steps) for f in after)


def test_a_proposal_alone_samples_nothing_and_takes_its_best_candidate() -> None:
    drawn = exact.trajectories(exact.ChainBackend(exact.even()), 20, seed=0, outcome=0.0)

    def scores(completions, steps):
        return [[float(i == row % len(own)) for i in range(len(own))] for row, own in enumerate(steps)]

    found = finder(exact.ChainBackend(exact.even()), estimator="proposal", proposal=scores).find(drawn)
    assert [f.index for f in found] == [row % len(f.steps) for row, f in enumerate(found)]
    assert {(f.num_rollouts, f.num_tokens) for f in found} == {(0, 0)}
    after = finder(exact.ChainBackend(exact.even()), estimator="proposal", proposal=scores, reset="after").find(drawn)
    assert all(f.index < len(f.steps) - 1 for f in after)


def chains_of(surprises: np.ndarray) -> tuple[list[Completion], list[list[Step]]]:
    """Chains whose steps are one token each, of the given surprises (n, H)."""
    tokens = [0] * surprises.shape[1]
    drawn = [Completion(0, 0, [1], tokens, (-row).tolist(), (-row).tolist(), "stop") for row in surprises]
    return drawn, [[Step(i, i + 1) for i in range(len(tokens))]] * len(drawn)


def test_the_first_mistake_is_told_from_what_follows_it() -> None:
    drawn, steps = chains_of(np.array([[0.05, 0.1, 1.0, 3.0, 2.0], [0.05, 0.1, 0.05, 3.0, 2.0]]))
    proposal = FirstMistake()
    scores = proposal(drawn, steps)
    right = np.exp(drawn[0].logprobs)
    truth = [right[:i].prod() * (1 - right[i]) for i in range(5)]
    np.testing.assert_allclose(scores[0], truth)
    assert [int(np.argmax(row)) for row in scores] == [2, 3]
    assert int(np.argmax(logprob_dip(drawn, steps)[0])) == 3


@pytest.mark.parametrize("kappa", [0.1, 0.4, 1.5])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 3.0)])
def test_how_often_a_surprise_is_a_mistake_is_learned_from_outcomes(kappa: float, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    surprises = rng.exponential(0.3 / kappa, size=(4000, 6))
    drawn, steps = chains_of(surprises)
    right = rng.random(4000) < np.exp(-kappa * surprises.sum(axis=1))
    proposal = FirstMistake()
    proposal.learn(drawn, steps, np.where(right, high, low).tolist())
    assert proposal.kappa == pytest.approx(kappa, rel=0.1)


def test_outcomes_that_say_nothing_leave_the_prior() -> None:
    drawn, steps = chains_of(np.full((64, 5), 2.0))
    proposal = FirstMistake()
    proposal.learn(drawn, steps, [0.0] * 64)
    assert proposal.kappa == pytest.approx(1.0, rel=0.06)


def test_a_search_learns_from_what_it_is_given_unless_it_was_told_more() -> None:
    backend = exact.ChainBackend(exact.even())
    drawn = exact.trajectories(backend, 200, seed=0, outcome=None)
    rng = np.random.default_rng(0)
    for completion in drawn:
        completion.logprobs[:] = (-rng.exponential(0.2, len(completion.logprobs))).tolist()
    alone, told = finder(backend, estimator="proposal"), finder(backend, estimator="proposal")
    told.learn(drawn, [1.0] * len(drawn))
    alone.find(drawn)
    found = told.find(drawn)
    assert told.proposal.kappa < 0.01 < alone.proposal.kappa
    for completion, f in zip(drawn, found):
        (scores,) = told.proposal([completion], [f.steps])
        assert scores[f.index] == max(scores)

"""Every base algorithm in GPOTrainer, with GPO and without: it learns, and it does what its paper says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_packing_trainer import step_gradients
from test_trainer import PROMPTS, config, deterministic
from trees import distance

from gpo_fast import GPOConfig, GPOTrainer, TokenForest
from gpo_fast.config import LOSS_TYPES, PREFERENCE_LOSSES
from gpo_fast.critic import FADING, RIDGE, ValueHead, generalized_advantages, monte_carlo_advantages, scale_advantages
from gpo_fast.critical import CriticalStep
from gpo_fast.critical.proposals import FirstMistake
from gpo_fast.experience import TrainingRow
from gpo_fast.ranks import ALONE
from gpo_fast.replay import ReplayBuffer
from gpo_fast.rewards import overlong_punishment
from gpo_fast.run_files import last_checkpoint
from gpo_fast.steps import Step


def share_of_digits(completions, **_):
    return [sum(c.isdigit() for c in completion) / max(1, len(completion)) for completion in completions]


def build(folder: Path, reward=share_of_digits, dataset=PROMPTS, **changes) -> GPOTrainer:
    values = {"num_resets": 4, "save_steps": 100, "learning_rate": 1e-2, **changes}
    return GPOTrainer(
        tiny.model(initializer_range=0.02),
        reward,
        args=config(folder, **values),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
    )


def collected(folder: Path, seed: int = 3, **changes):
    run = build(folder, **changes)
    run.engine.update_weights()
    return run, run._collect(PROMPTS[:4], seed)


# -- every algorithm learns ---------------------------------------------------------------------------------

DAPO = {"epsilon_high": 0.28, "dynamic_sampling_rounds": 2, "soft_punish_cache": 3}
RUNS = [
    *({"loss_type": loss, "use_gpo": gpo} for loss in LOSS_TYPES for gpo in (True, False)),
    *({"loss_type": "ppo", "critic": "value_head", "use_gpo": gpo} for gpo in (True, False)),
    *({"loss_type": "dapo", **DAPO, "use_gpo": gpo} for gpo in (True, False)),
    {"loss_type": "ppo", "critic": "monte_carlo", "use_gpo": True},
    {"loss_type": "grpo", "replay_size": 32, "use_gpo": True},
]


@pytest.mark.parametrize("changes", RUNS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_it_learns(tmp_path: Path, changes: dict) -> None:
    run = build(tmp_path / "run", max_steps=12, **changes)
    run.train()
    records = deterministic(tmp_path / "run")
    rewards = [record["reward"] for record in records]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert (max(record["num_searches"] for record in records) > 0) == changes["use_gpo"]


# cispo is left out: the ratio that weighs its tokens has no gradient but moves, so its loss may rise as it learns.
@pytest.mark.parametrize("loss_type", [loss for loss in LOSS_TYPES if loss != "cispo"])
def test_the_loss_of_the_same_rows_falls(tmp_path: Path, loss_type: str) -> None:
    """Of new rollouts a policy loss is about 0 whatever the policy, so learning shows on rows that stay."""
    run, experience = collected(tmp_path / "run", loss_type=loss_type, search="all")
    for row in experience.rows:
        row.old_logprobs = row.sampling_logprobs
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        losses.append(float(run._update(run.model, experience.rows)[0]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3 * abs(losses[0])
    assert losses[1] < losses[0]


def test_the_search_learns_from_all_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(FirstMistake, "learn", lambda self, completions, steps, rewards: told.append(rewards))
    _, experience = collected(tmp_path / "run", estimator="proposal", search="worst")
    assert told == [[row.reward for row in experience.rows if row.kind == "base"]]


# -- preference losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_gpo", [True, False])
def test_pairs_share_their_state_and_differ_in_reward(tmp_path: Path, use_gpo: bool) -> None:
    _, experience = collected(tmp_path / "run", loss_type="dpo", use_gpo=use_gpo, search="all", max_pairs=2)
    prompts = [tiny.tokenizer()(example["prompt"])["input_ids"] for example in PROMPTS[:4]]
    rows = experience.rows
    assert experience.metrics["num_pairs"] == len(rows) / 2 > 2
    for better, worse in zip(rows[::2], rows[1::2]):
        assert (better.pair, better.desirable, worse.desirable) == (worse.pair, True, False)
        assert better.context_ids == worse.context_ids
        assert better.reward > worse.reward
        assert better.kind == worse.kind
    assert {row.kind for row in rows} == ({"base", "reset"} if use_gpo else {"base"})
    assert any(row.context_ids not in prompts for row in rows) == use_gpo
    states = [tuple(row.context_ids) for row in rows[::2] if row.kind == "base"]
    assert max(states.count(tuple(prompt)) for prompt in prompts) == 2


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
@pytest.mark.parametrize("changes", [{}, {"lora": True}, {"max_tokens_per_microbatch": 40}])
def test_a_preference_step_is_that_of_the_padded_batch(tmp_path: Path, loss_type: str, changes: dict) -> None:
    _, experience = collected(tmp_path / "a", loss_type=loss_type, search="all")
    rows, forest = experience.rows, experience.forest
    loss, metrics, ours = step_gradients(tmp_path / "b", rows, forest, loss_type=loss_type, **changes)
    padded = step_gradients(tmp_path / "c", rows, forest, loss_type=loss_type, packing="padded", **changes)
    assert loss == pytest.approx(padded[0], rel=1e-5)
    assert distance(ours, padded[2]) <= 1e-5
    assert metrics == pytest.approx(padded[1], rel=1e-4, abs=1e-5)


def test_the_preference_update_is_that_of_plain_dpo(tmp_path: Path) -> None:
    run, experience = collected(tmp_path / "run", loss_type="dpo", temperature=0.8, beta=0.3)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rows = experience.rows
    loss, _ = run._update(run.model, rows)
    ours = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()

    def score(row: TrainingRow) -> torch.Tensor:
        ids = torch.tensor([[*row.context_ids, *row.token_ids]])
        own = []
        for model in (run.model, run._reference):
            logprobs = (model(ids).logits / 0.8).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            own.append(logprobs[len(row.context_ids) - 1 :].sum())
        return own[0] - own[1].detach()

    margins = torch.stack([score(better) - score(worse) for better, worse in zip(rows[::2], rows[1::2])])
    truth = -torch.nn.functional.logsigmoid(0.3 * margins).mean()  # arXiv 2305.18290, equation 7
    truth.backward()
    assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-4)
    assert distance(ours, {name: p.grad for name, p in run.model.named_parameters()}) <= 1e-4


# -- critics ---------------------------------------------------------------------------------------------------


def test_generalized_advantages_are_those_of_the_definition() -> None:
    rng = np.random.default_rng()
    values, reward, gamma, gae_lambda = rng.normal(size=7), rng.normal(), 0.9, 0.8
    after = [*values[1:], None]
    deltas = [reward - v if n is None else gamma * n - v for v, n in zip(values, after)]
    expected = [sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[i:])) for i in range(7)]
    assert generalized_advantages(values, reward, gamma, gae_lambda) == pytest.approx(expected)
    assert generalized_advantages(values, reward, 1.0, 1.0) == pytest.approx(reward - values)


def test_measured_values_give_each_step_its_advantage() -> None:
    steps = [Step(0, 2), Step(2, 5), Step(5, 6)]
    found = CriticalStep(0, 0, steps, [], [0.5, 0.25, 0.75, 1.0], [], 1.0, 0, 0)
    assert monte_carlo_advantages(found, 1.0, 0.0) == [-0.25, -0.25, 0.5, 0.5, 0.5, 0.25]
    assert monte_carlo_advantages(found, 1.0, 1.0) == [0.5, 0.5, 0.75, 0.75, 0.75, 0.25]
    found.values[1] = float("nan")  # the search did not sample there: one step of five tokens
    assert monte_carlo_advantages(found, 1.0, 0.0) == [0.25] * 5 + [0.25]


def test_the_trainer_uses_the_measured_values(tmp_path: Path) -> None:
    changes = {"loss_type": "ppo", "critic": "monte_carlo", "gae_lambda": 0.5, "estimator": "uniform"}
    _, experience = collected(tmp_path / "a", scale_rewards=False, search="all", **changes)
    searched = [row for row in experience.rows if row.token_advantages is not None]
    assert len(searched) == 16
    assert any(len(set(row.token_advantages)) > 1 for row in searched)
    _, scaled = collected(tmp_path / "b", search="all", **changes)
    flat = np.concatenate([row.token_advantages for row in scaled.rows])
    before = np.concatenate([row.advantage_of_tokens for row in experience.rows])
    assert np.square(flat).mean() == pytest.approx(1)
    assert flat * np.sqrt(np.square(before).mean()) == pytest.approx(before, rel=1e-5, abs=1e-8)


def test_the_value_head_is_the_ridge_regression_of_its_returns() -> None:
    rng = np.random.default_rng()
    head = ValueHead(5)
    assert head(torch.ones(2, 5)).tolist() == [0, 0]
    batches = [(rng.normal(1, 2, (30, 5)), rng.normal(size=30)) for _ in range(3)]
    for x, _ in batches:
        x[:, 3] = 0  # nothing can be learned of it, and nothing else is lost by it
    for x, y in batches:
        head.learn(head.products(torch.tensor(x), torch.tensor(y)))
    weights = np.repeat([FADING**2, FADING, 1.0], 30)
    x = np.concatenate([np.concatenate([x for x, _ in batches]), np.ones((90, 1))], axis=1)
    y = np.concatenate([y for _, y in batches])
    squares = (weights[:, None] * x**2).sum(0)
    penalty = RIDGE * squares * (np.arange(6) < 5) + (squares == 0)
    expected = np.linalg.solve(x.T @ (weights[:, None] * x) + np.diag(penalty), x.T @ (weights * y))
    assert head.coefficients.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_row_is_valued_before_the_head_has_seen_it(tmp_path: Path, packing: str) -> None:
    changes = {"loss_type": "ppo", "critic": "value_head", "gae_lambda": 0.7, "scale_rewards": False}
    run, first = collected(tmp_path / "run", packing=packing, search="all", **changes)
    assert all(row.values == [0] * len(row.token_ids) for row in first.rows)
    coefficients = run.value_head.coefficients.clone()
    second = run._collect(PROMPTS[4:8], 8).rows
    products = torch.zeros_like(run.value_head.moments)
    for row in second:
        with torch.no_grad():
            ids = torch.tensor([[*row.context_ids, *row.token_ids]])
            hidden = run.model.get_decoder()(ids).last_hidden_state[0, len(row.context_ids) - 1 : -1]
        values = hidden @ coefficients[:-1] + coefficients[-1]
        assert row.values == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
        advantages = generalized_advantages(values.tolist(), row.reward, 1.0, 0.7)
        assert row.token_advantages == pytest.approx(advantages.tolist(), rel=1e-4, abs=1e-5)
        products += run.value_head.products(hidden, values + torch.tensor(advantages))
    before = (run.value_head.moments - products) / FADING
    again, _ = collected(tmp_path / "again", packing=packing, search="all", **changes)
    assert distance({"": before}, {"": again.value_head.moments}) <= 1e-4


def says_the_prompt(prompts, completions, **_):
    return [float(prompt[0] in "23") for prompt in prompts]


def test_the_value_head_explains_what_the_prompt_decides(tmp_path: Path) -> None:
    run = build(
        tmp_path / "run", says_the_prompt, loss_type="ppo", critic="value_head", max_steps=8, learning_rate=1e-4,
        use_gpo=False, per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    explained = [record["explained_variance"] for record in deterministic(tmp_path / "run")]
    assert explained[0] == 0
    assert np.mean(explained[-4:]) > 0.4


# -- advantages, DAPO, replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "rloo", "ppo", "dapo"])
def test_advantages_are_those_of_the_loss(tmp_path: Path, loss_type: str) -> None:
    _, experience = collected(tmp_path / "run", loss_type=loss_type, baseline="mean")
    for start in range(0, 16, 4):
        group = experience.rows[start : start + 4]
        rewards = np.array([row.reward for row in group])
        expected = rewards - rewards.mean()
        if loss_type == "rloo":  # arXiv 2402.14740, equation 8
            expected = np.array([r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)])
        elif loss_type != "dr_grpo":  # arXiv 2503.20783 drops the deviation
            expected = expected / (rewards.std(ddof=1) + 1e-4)
        assert [row.advantage for row in group] == pytest.approx(expected)


def sometimes(prompts, completions, **_):
    return [len(c) % 7 / 7 * (prompt[0] in "01") for prompt, c in zip(prompts, completions)]


def test_groups_that_teach_nothing_make_room_for_other_prompts(tmp_path: Path) -> None:
    poor, rich = PROMPTS[8:], PROMPTS[:8]
    run = build(tmp_path / "run", sometimes, [*poor, *rich], use_gpo=False, dynamic_sampling_rounds=12)
    run.engine.update_weights()
    found = run.sampler.collect(poor[:4], 1, run.train_dataset)
    assert found.metrics["mixed_groups"] == 1
    assert 1 <= found.metrics["resampling_rounds"] <= 12
    assert all(tiny.tokenizer().decode(row.context_ids)[0] in "01" for row in found.rows)
    assert found.metrics["num_rollouts"] > len(found.rows) == 16
    kept = run.sampler.collect(poor[:4], 1, poor)
    assert (kept.metrics["mixed_groups"], kept.metrics["resampling_rounds"]) == (0, 12)
    assert kept.metrics["num_rollouts"] == 13 * 16
    again = run.sampler.collect(poor[:4], 1, run.train_dataset)
    assert [row.token_ids for row in again.rows] == [row.token_ids for row in found.rows]


def test_the_punishment_of_long_completions_is_trls() -> None:
    rewards = pytest.importorskip("trl.rewards")
    lengths = list(range(1, 25))
    for cache in (1, 5, 20):
        theirs = rewards.get_soft_overlong_punishment(20, cache)(completion_ids=[[0] * n for n in lengths])
        assert overlong_punishment(lengths, 20, cache) == pytest.approx(theirs)
    assert not overlong_punishment(lengths, 20, 0).any()


def test_long_completions_are_punished_in_training_alone(tmp_path: Path) -> None:
    def one(completions, **_):
        return [1.0] * len(completions)

    run = build(tmp_path / "run", one, use_gpo=False, soft_punish_cache=6, mask_truncated_completions=True)
    run.engine.update_weights()
    found = run.sampler.collect(PROMPTS[:4], 2)
    assert found.metrics["truncated"] > 0
    assert 0 < len(found.rows) == round(16 * (1 - found.metrics["truncated"]))
    expected = [1 + min(0.0, (12 - 6 - len(row.token_ids)) / 6) for row in found.rows]
    assert [row.reward for row in found.rows] == pytest.approx(expected)
    assert found.metrics["reward"] == 1
    assert run.sample_rewards(PROMPTS).tolist() == [1.0] * 16


def row(priority: float = 1.0, advantage: float = 1.0, **changes) -> TrainingRow:
    values = {"context_ids": [5, 6], "token_ids": [7, 8], "sampling_logprobs": [-1.0, -2.0], "kind": "reset"}
    return TrainingRow(**{**values, "advantage": advantage, "priority": priority, **changes})


def test_replay_is_in_proportion_to_the_advantage_of_the_step() -> None:
    buffer = ReplayBuffer(3)
    buffer.add([row(9.0), row(1.0), row(2.0), row(5.0)])  # the oldest goes
    buffer.add([row(0.0), row(1.0, advantage=0.0), row(1.0, kind="base")])  # nothing to be learned from
    rng = np.random.default_rng()
    drawn = [buffer.sample(1, rng)[0].priority for _ in range(4000)]
    for priority in (1.0, 2.0, 5.0):
        share = priority / 8
        assert abs(drawn.count(priority) / 4000 - share) < 5 * np.sqrt(share * (1 - share) / 4000)
    assert sorted(r.priority for r in buffer.sample(9, rng)) == [1.0, 2.0, 5.0]
    again = ReplayBuffer(3)
    again.load(buffer.state())
    assert again.rows == buffer.rows


def test_a_replayed_row_has_the_ratio_to_the_policy_that_sampled_it(tmp_path: Path) -> None:
    run = build(tmp_path / "run", replay_size=4, epsilon=0.5, epsilon_high=0.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    own = run.model(ids).logits.log_softmax(-1)[0, 1:3].gather(-1, ids[0, 2:, None])[:, 0].detach()
    run.replay.add([row(sampling_logprobs=(own - torch.tensor([0.1, -0.2])).tolist(), advantage=2.0)])
    (moved,) = run.replay.sample(1, np.random.default_rng())
    run._forest = TokenForest()
    loss, metrics = run._update(run.model, [moved])
    ratio = torch.tensor([0.1, -0.2]).exp()
    assert float(loss) == pytest.approx(float(-2.0 * ratio.mean()), rel=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-4)


# -- resuming, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dpo", "steps_per_generation": 2},
        {"loss_type": "kto", "steps_per_generation": 2, "use_gpo": False},
        {"loss_type": "ppo", "critic": "value_head", "steps_per_generation": 2},
        {"loss_type": "ppo", "critic": "monte_carlo", "steps_per_generation": 2},
        {"loss_type": "grpo", "replay_size": 16, "search": "all"},
        {"loss_type": "dapo", **DAPO},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, changes: dict) -> None:
    build(tmp_path / "run", max_steps=5, save_steps=5, **changes).train()
    resumed = build(tmp_path / "run", max_steps=8, save_steps=5, **changes)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))
    whole = build(tmp_path / "whole", max_steps=8, save_steps=5, **changes)
    whole.train()
    assert deterministic(tmp_path / "run") == deterministic(tmp_path / "whole")
    assert distance(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())) == 0
    if resumed.value_head is not None:
        assert torch.equal(resumed.value_head.coefficients, whole.value_head.coefficients)
    if resumed.replay is not None:
        assert resumed.replay.rows == whole.replay.rows
        assert deterministic(tmp_path / "run")[-1]["num_replayed"] > 0


def test_a_checkpoint_without_a_value_head_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "run", max_steps=1, save_steps=1).train()
    run = build(tmp_path / "run", critic="value_head")
    with pytest.raises(ValueError, match="without a value head: set critic='group'"):
        run.train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))


def test_what_the_loss_decides(tmp_path: Path) -> None:
    def options(**changes) -> GPOConfig:
        return config(tmp_path, **changes)

    assert (options().beta, options(loss_type="simpo").beta, options(loss_type="dpo").beta) == (0.0, 2.0, 0.1)
    assert [options(loss_type=loss).scale_rewards for loss in ("grpo", "dr_grpo", "rloo")] == [True, False, False]
    assert options(loss_type="dr_grpo", scale_rewards=True).scale_rewards
    assert [options(loss_type=loss).baseline for loss in ("dapo", "rloo", "awr", "kto")] == ["optimal", *["mean"] * 3]
    assert options(critic="value_head").baseline == options(baseline="mean").baseline == "mean"
    assert options(loss_type="dpo").uses_reference
    assert not options(loss_type="orpo").uses_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic": "values"}, "critic must be one of group, value_head, monte_carlo"),
        ({"critic": "value_head", "loss_type": "rloo"}, "set critic='group'"),
        ({"critic": "value_head", "loss_type": "dpo"}, "set critic='group'"),
        ({"critic": "monte_carlo", "use_gpo": False}, "set use_gpo=True"),
        ({"replay_size": 8, "loss_type": "kto"}, "replay_size above 0"),
        ({"replay_size": 8, "top_p": 0.9}, "unfiltered sampling"),
        ({"gae_lambda": 1.5}, "gae_lambda must be from 0 to 1, got 1.5"),
        ({"beta": 0.0, "loss_type": "dpo"}, "beta of dpo must be above 0"),
        ({"soft_punish_cache": 13}, "at most max_completion_length=12, got 13"),
        ({"max_pairs": 0}, "max_pairs must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_scaling_leaves_a_measured_zero_alone() -> None:
    rows = [row(advantage=0.0), row(advantage=3.0)]
    scale_advantages(rows, ALONE, centre=False)
    assert rows[0].token_advantages == [0.0, 0.0]
    scale_advantages(rows, ALONE, centre=True)
    assert sum(a for r in rows for a in r.token_advantages) == pytest.approx(0)

"""Packing: the layout is that of the definition, and loss and gradients are those of the separate sequences."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import Grown, distance, forests, gradients, grow, packed_hidden, padded_hidden, small_forests, widen_norms

from gpo_fast import TokenForest, linear_logprob, linear_policy_loss, linear_preference_loss
from gpo_fast.losses.reference import linear_logprob_reference
from gpo_fast.packing import pack_forest, plan_microbatches
from gpo_fast.tree_attention import tree_attention_of

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "olmo2")
POLICY_LOSSES = ("awr", "ppo", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")


def test_a_small_tree_is_laid_out_as_documented() -> None:
    forest = TokenForest()
    prompt = forest.add_prompt([10, 11, 12])
    a = forest.branch(prompt, 3, [23, 24])
    forest.branch(a, 4, [34])
    forest.branch(prompt, 2, [42, 43])
    packed = pack_forest(forest)
    assert packed.input_ids.tolist() == [[10, 11, 12, 23, 24, 34, 42, 43]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 2, 3]]
    assert packed.tree.subtree_end.tolist() == [8, 8, 6, 6, 5, 6, 8, 8]
    assert packed.rows.tolist() == [1, 2, 3, 6]
    assert packed.shared.row_offsets.tolist() == [0, 1, 2, 4, 5]
    assert packed.shared.targets.tolist() == [42, 23, 24, 34, 43]
    assert packed.shared.pair_of_token.tolist() == [1, 2, 3, 0, 4]
    assert (packed.unique_tokens, packed.padded_tokens) == (8, 5 + 5 + 4)


@given(forests)
@settings(max_examples=60, deadline=None)
def test_a_token_sees_its_ancestors_once_and_nothing_else(grown: Grown) -> None:
    packed = grown.pack()
    count = packed.unique_tokens
    seen = torch.zeros(count, count, dtype=torch.int64)
    for start, end in packed.tree.spans:
        seen[start:end, start:end] += torch.ones(end - start, end - start, dtype=torch.int64).tril()
    for query, query_end, key, key_end in packed.tree.blocks:
        seen[query:query_end, key:key_end] += 1
    i, j = torch.arange(count)[:, None], torch.arange(count)
    ends = packed.tree.subtree_end
    assert torch.equal(seen, ((j <= i) & (i < ends)).long())
    # Each position sees as many keys as its depth says, and read in order they are the path of a branch.
    tokens = packed.input_ids[0]
    assert torch.equal(seen.sum(1), packed.position_ids[0] + 1)
    prefixes = {tuple(path[:n]) for path in grown.paths for n in range(1, len(path) + 1)}
    assert {tuple(tokens[row.bool()].tolist()) for row in seen} == prefixes


@given(forests)
@settings(max_examples=60, deadline=None)
def test_every_loss_token_has_its_own_row_and_target(grown: Grown) -> None:
    packed = grown.pack()
    ends, tokens = packed.tree.subtree_end, packed.input_ids[0]
    row_of_pair = packed.rows.repeat_interleave(packed.shared.row_offsets.diff())
    pairs = list(zip(row_of_pair.tolist(), packed.shared.targets.tolist()))
    assert len(set(pairs)) == len(pairs)
    expected = [
        (path[:depth], path[depth])
        for path, start in ((grown.paths[b], grown.loss_starts[b]) for b in packed.branches)
        for depth in range(start, len(path))
    ]
    found = []
    for pair in packed.shared.pair_of_token.tolist():
        row, target = pairs[pair]
        sees = (torch.arange(row + 1) <= row) & (row < ends[: row + 1])
        found.append((tokens[: row + 1][sees].tolist(), target))
    assert found == expected
    assert packed.targets.tolist() == [target for _, target in expected]
    missing = set(range(len(grown.branches))) - set(packed.branches)
    assert all(grown.loss_starts[b] == len(grown.paths[b]) for b in missing)


def seed() -> int:
    return int(torch.randint(2**31, ()))


def check_gradients(model, grown: Grown, tolerance: float) -> None:
    """Log-probabilities, and gradients of a random weighing of them, against each branch by itself."""
    packed = grown.pack()
    weights = torch.randn(len(packed.targets), dtype=model.dtype)
    with tree_attention_of(model):
        hidden = packed_hidden(model, packed)
        pairs = linear_logprob(
            hidden, model.lm_head.weight, packed.shared.targets, row_offsets=packed.shared.row_offsets
        )
        ours = pairs[packed.shared.pair_of_token]
        our_gradients = gradients(model, (weights * ours).sum())
    truth, _ = linear_logprob_reference(padded_hidden(model, grown, packed), model.lm_head.weight, packed.targets)
    assert (ours - truth).norm() <= tolerance * truth.norm()
    assert distance(our_gradients, gradients(model, (weights * truth).sum())) <= tolerance


@given(small_forests)
@settings(max_examples=15, deadline=None)
def test_gradients_are_those_of_the_separate_sequences(grown: Grown) -> None:
    check_gradients(widen_norms(tiny.model().double()), grown, 1e-10)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_of_each_architecture(kind: str) -> None:
    check_gradients(widen_norms(tiny.model(kind).double()), grow(seed(), branches=20), 1e-10)
    check_gradients(tiny.model(kind), grow(seed(), branches=20), 1e-5)


def policy_inputs(packed) -> dict:
    sequences = len(packed.branches)
    near = torch.randn(len(packed.targets), dtype=torch.float64) - 4
    return {
        "advantages": torch.randn(sequences, dtype=torch.float64),
        "sequence_ids": packed.sequence_ids,
        "old_logprobs": near,
        "ref_logprobs": near + 0.1 * torch.randn_like(near),
        "beta": 0.05,
        "entropy_coef": 0.01,
        "max_completion_length": 20,
    }


def loss_both_ways(model, grown: Grown, loss, options: dict) -> None:
    packed = grown.pack()
    options = options(packed)
    with tree_attention_of(model):
        hidden = packed_hidden(model, packed)
        ours = loss(hidden, model.lm_head.weight, packed.targets, shared=packed.shared, **options)
        our_gradients = gradients(model, ours.loss)
    truth = loss(padded_hidden(model, grown, packed), model.lm_head.weight, packed.targets, **options)
    assert float(ours.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-10)
    assert distance(our_gradients, gradients(model, truth.loss)) <= 1e-10
    for name, value in truth.metrics.items():
        assert float(ours.metrics[name]) == pytest.approx(float(value), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_policy_losses(loss_type: str) -> None:
    def loss(*args, **options):
        return linear_policy_loss(*args, loss_type=loss_type, **options)

    model = widen_norms(tiny.model(vocab_size=61).double())
    loss_both_ways(model, grow(seed(), branches=16), loss, policy_inputs)


@pytest.mark.parametrize("loss_type", ["dpo", "kto", "simpo", "orpo"])
def test_preference_losses_of_pairs_that_share_a_prefix(loss_type: str) -> None:
    forest = TokenForest()
    chosen, rejected = [], []
    for n in range(3):
        prompt = forest.add_prompt(torch.randint(3, 60, (5,)).tolist())
        trajectory = forest.branch(prompt, 5, torch.randint(3, 60, (8,)).tolist())
        chosen.append(forest.branch(trajectory, 8 + n, torch.randint(3, 60, (4,)).tolist()))
        rejected.append(forest.branch(trajectory, 8 + n, torch.randint(3, 60, (3 + n,)).tolist()))
    branches = [*chosen, *rejected]

    def options(packed) -> dict:
        values = {"sequence_ids": packed.sequence_ids}
        if loss_type in ("dpo", "kto"):
            values["ref_logprobs"] = torch.randn(len(packed.targets), dtype=torch.float64) - 4
        return values | ({"desirable": torch.arange(6) < 3} if loss_type == "kto" else {})

    def loss(*args, **values):
        return linear_preference_loss(*args, loss_type=loss_type, **values)

    # Trained from the end of the prompt: the shared steps count for both.
    grown = Grown(forest, branches, [5] * 6)
    loss_both_ways(widen_norms(tiny.model().double()), grown, loss, options)


def test_bfloat16_is_as_near_to_the_truth_as_the_padded_batch() -> None:
    differences = []
    for start in [seed() for _ in range(24)]:  # drawn at once: a model's seed sets torch's
        grown = grow(start, branches=16, longest=12)
        packed = grown.pack()
        model = tiny.model(seed=start)
        weights = torch.randn(len(packed.targets))
        exact = tiny.model().double()
        exact.load_state_dict({n: p.bfloat16().double() for n, p in model.state_dict().items()})
        narrow = model.bfloat16()

        def loss(hidden, model, packed=packed, weights=weights, **shared):
            result = linear_logprob(
                hidden, model.lm_head.weight, shared.get("targets", packed.targets), row_offsets=shared.get("offsets")
            )
            return (weights * (result[packed.shared.pair_of_token] if shared else result)).sum()

        truth = gradients(exact, loss(padded_hidden(exact, grown, packed), exact))
        padded = gradients(narrow, loss(padded_hidden(narrow, grown, packed), narrow))
        with tree_attention_of(narrow):
            hidden = packed_hidden(narrow, packed)
            shared = {"targets": packed.shared.targets, "offsets": packed.shared.row_offsets}
            ours = gradients(narrow, loss(hidden, narrow, **shared))
        differences.append(distance(ours, truth) - distance(padded, truth))
    # Rounding is random: the mean difference may be above zero by what its own spread explains.
    off = torch.tensor(differences)
    assert off.mean() <= 3 * off.std() / len(off) ** 0.5


@given(forests, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_microbatches_keep_to_the_budget_and_lose_no_branch(grown: Grown, budget: int) -> None:
    plan = plan_microbatches(grown.forest, grown.branches, budget)
    assert sorted(place for batch in plan for place in batch) == list(range(len(grown.branches)))
    sizes = []
    for batch in plan:
        trained = [grown.branches[p] for p in batch]
        sizes.append(unique_tokens(grown.forest, trained))
        assert sizes[-1] <= budget or len(batch) == 1
    # First fit leaves no two batches that would fit together, unless a single branch is above the budget.
    small = sorted(s for s in sizes if s <= budget)
    assert len(small) < 2 or small[0] + small[1] > budget


def unique_tokens(forest: TokenForest, branches: list[int]) -> int:
    prefixes = set()
    for branch in branches:
        node, end = branch, forest.nodes[branch].end
        while node != -1:
            own = forest.nodes[node]
            prefixes |= {(node, depth) for depth in range(own.start, end)}
            node, end = own.parent, own.start
    return len(prefixes)


def test_a_tree_that_was_cut_has_the_gradients_of_the_whole() -> None:
    model = widen_norms(tiny.model().double())
    grown = grow(seed(), branches=24)
    whole = grown.pack()
    weights = dict(zip(whole.branches, torch.randn(len(whole.branches), dtype=torch.float64)))

    def loss(part: Grown, places: list[int]) -> torch.Tensor:
        packed = part.pack()
        hidden = packed_hidden(model, packed)
        pairs = linear_logprob(
            hidden, model.lm_head.weight, packed.shared.targets, row_offsets=packed.shared.row_offsets
        )
        own = torch.stack([weights[places[b]] for b in packed.branches])
        return (pairs[packed.shared.pair_of_token] * own[packed.sequence_ids]).sum()

    with tree_attention_of(model):
        truth = gradients(model, loss(grown, list(range(len(grown.branches)))))
        total = torch.zeros((), dtype=torch.float64)
        plan = plan_microbatches(grown.forest, grown.branches, 30)
        assert len(plan) > 1
        for places in plan:
            if any(p in weights for p in places):
                part = Grown(grown.forest, [grown.branches[p] for p in places], [grown.loss_starts[p] for p in places])
                total = total + loss(part, places)
        assert distance(gradients(model, total), truth) <= 1e-10


def test_memory_is_used_again_once_a_batch_is_gone_and_not_before() -> None:
    forest = TokenForest()
    prompt = forest.add_prompt([1])
    branch = forest.branch(prompt, 1, list(range(1 << 16)))
    first = pack_forest(forest, [branch])
    place = first.input_ids.data_ptr()
    kept = first.targets  # one array of a batch is enough to keep its memory
    del first
    second = pack_forest(forest, [branch])
    assert second.input_ids.data_ptr() != place
    assert torch.equal(kept, second.targets)
    place = second.input_ids.data_ptr()
    del second
    assert pack_forest(forest, [branch]).input_ids.data_ptr() == place


def test_bad_branches_are_refused() -> None:
    forest = TokenForest()
    prompt = forest.add_prompt([4, 5])
    branch = forest.branch(prompt, 2, [6])
    with pytest.raises(ValueError, match="nothing to train"):
        pack_forest(forest, [prompt], loss_starts=[2])
    with pytest.raises(ValueError, match=r"from 1 .*, got 0"):
        pack_forest(forest, [prompt])
    with pytest.raises(ValueError, match="nodes 0 to 1, got the branch 7"):
        pack_forest(forest, [7])
    with pytest.raises(ValueError, match=r"from 1 .*, got 0"):
        pack_forest(forest, [branch], loss_starts=[0])
    with pytest.raises(ValueError, match="1 branches need as many loss_starts, got 2"):
        pack_forest(forest, [branch], loss_starts=[1, 1])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        plan_microbatches(forest, [branch], 0)

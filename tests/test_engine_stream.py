"""Streaming: completions as they finish, requests added and branches cancelled on the way."""

from __future__ import annotations

import pytest
import tiny

from gpo_fast import Request, RolloutEngine, SamplingParams


def asked(lengths: list[int], n: int = 1) -> list[Request]:
    return [
        Request(range(3, 20 + i), n=n, sampling=SamplingParams(max_tokens=length, ignore_eos=True), seed=i)
        for i, length in enumerate(lengths)
    ]


def all_free(engine: RolloutEngine) -> bool:
    engine.cache.check_integrity()
    stats = engine.cache.stats()
    return stats["sequences"] == 0 and stats["free"] + stats["cached"] == stats["num_blocks"]


def test_completions_come_in_the_order_of_finishing_and_are_those_of_generate() -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer(), block_size=4)
    requests = asked([9, 3, 6, 1], n=2)
    streamed = list(engine.stream(requests))
    assert [len(c.token_ids) for c in streamed] == [1, 1, 3, 3, 6, 6, 9, 9]
    in_order = sorted(streamed, key=lambda c: (c.request_index, c.branch_index))
    assert [c.token_ids for c in in_order] == [c.token_ids for c in engine.generate(requests)]
    assert all_free(engine)


def test_requests_added_on_the_way_are_sampled_as_if_asked_for_at_first() -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer(), block_size=4, max_batch_size=3)
    requests = asked([8, 2, 5, 4])
    stream = engine.stream(requests[:2])
    drawn = [next(stream)]
    assert stream.add(requests[2:]) == [2, 3]
    drawn += stream
    tokens = {c.request_index: c.token_ids for c in drawn}
    assert [tokens[i] for i in range(4)] == [c.token_ids for c in engine.generate(requests)]
    with pytest.raises(RuntimeError, match="has ended"):
        stream.add(requests)


@pytest.mark.parametrize("max_batch_size", [2, 64])  # 2: some of the cancelled branches are still waiting
def test_cancelled_branches_come_out_with_what_they_had(max_batch_size: int) -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer(), block_size=4, max_batch_size=max_batch_size)
    requests = asked([30, 2, 30, 30], n=2)
    whole = {(c.request_index, c.branch_index): c.token_ids for c in engine.generate(requests)}
    stream = engine.stream(requests)
    first = next(stream)
    assert stream.cancel(0, 1) == 1
    assert stream.cancel(2) == 2
    assert stream.cancel(0, 1) == 0
    rest = list(stream)
    reasons = {(c.request_index, c.branch_index): c.finish_reason for c in [first, *rest]}
    assert {k for k, reason in reasons.items() if reason == "cancelled"} == {(0, 1), (2, 0), (2, 1)}
    assert reasons.keys() == whole.keys()
    for c in [first, *rest]:
        expected = whole[c.request_index, c.branch_index]
        assert c.token_ids == expected[: len(c.token_ids)]
        assert len(c.logprobs) == len(c.sampling_logprobs) == len(c.token_ids)
        assert c.finish_reason == "cancelled" or c.token_ids == expected
    assert all_free(engine)
    with pytest.raises(IndexError, match="request 9"):
        engine.stream(requests).cancel(9)


def test_branches_cancelled_during_their_prefill_give_back_its_pages() -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer(), block_size=4, max_prefill_tokens=4)
    stream = engine.stream([Request([3, i], sampling=SamplingParams(max_tokens=i), seed=0) for i in (1, 2)])
    next(stream)
    stream.add(asked([4], n=2))
    assert next(stream).request_index == 1  # in the step that computed the first of the long prompt's chunks
    assert engine.stats()["prefill_tokens"] == 2 + 2 + 4
    assert stream.cancel(2, 0) == 1
    assert stream.cancel(2, 1) == 1
    assert [c.token_ids for c in stream] == [[], []]
    assert all_free(engine)


def test_closing_a_stream_early_releases_everything() -> None:
    engine = RolloutEngine(tiny.model().train(), tiny.tokenizer(), block_size=4)
    with engine.stream(asked([1, 30], n=3)) as stream:
        next(stream)
        with pytest.raises(RuntimeError, match="still open"):
            engine.generate(asked([1]))
        with pytest.raises(RuntimeError, match="open stream"):
            engine.update_weights()
        assert engine.model.training  # between steps the model is as it was
    assert all_free(engine)
    next(engine.stream(asked([30])))  # dropped without a word
    for _ in engine.stream(asked([1, 30])):
        break
    assert all_free(engine)
    engine.update_weights()


def test_a_request_that_does_not_fit_leaves_the_stream_as_it_was() -> None:
    engine = RolloutEngine(tiny.model(), tiny.tokenizer())
    stream = engine.stream(asked([2]))
    with pytest.raises(ValueError, match="context is 256"):
        stream.add([*asked([1]), Request([3] * 256)])
    assert len(list(stream)) == 1
    assert len(engine.generate(asked([1]))) == 1


def test_chunked_prefill_changes_no_token() -> None:
    model = tiny.model(seed=2)
    requests = asked([12, 5, 20, 7], n=2)
    whole = RolloutEngine(model, tiny.tokenizer()).generate(requests)
    for chunk in (1, 7):
        engine = RolloutEngine(model, tiny.tokenizer(), block_size=4, max_prefill_tokens=chunk)
        assert [c.token_ids for c in engine.generate(requests)] == [c.token_ids for c in whole]


def test_progress_counts_every_branch() -> None:
    seen: list[tuple[int, int]] = []
    engine = RolloutEngine(tiny.model(), tiny.tokenizer())
    engine.generate(asked([1, 2], n=2), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

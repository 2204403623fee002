"""What a prefix cache must do, one property at a time. (Random operations: test_prefix_cache_random.py.)"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from prefix_cache_oracle import check_plan

from gpo_fast import PrefixCache


def acknowledge(cache: PrefixCache) -> list[tuple[int, int, int]]:
    jobs = [tuple(int(x) for x in job) for job in zip(*cache.take_copies())]
    cache.acknowledge_copies()
    return jobs


def computed(cache: PrefixCache, tokens: list[int] | range, namespace: int = 0, commit: bool = True) -> int:
    """A sequence of these tokens, committed."""
    tokens = list(tokens)
    handle, hit = cache.open(tokens, namespace=namespace)
    cache.append(handle, tokens[hit:], len(tokens) - hit)
    acknowledge(cache)
    if commit:
        cache.commit(handle)
    return handle


def hit(cache: PrefixCache, tokens: list[int] | range, namespace: int = 0) -> int:
    """How much of these tokens is found, with any next token."""
    handle, found = cache.open([*tokens, -7], namespace=namespace)
    cache.release(handle)
    return found


# -- matching -----------------------------------------------------------------------------------------------


def test_a_match_ends_at_any_token_and_changes_nothing() -> None:
    cache = PrefixCache(32, 4)
    cache.release(computed(cache, range(11)))
    picture = cache.snapshot()
    for length in range(12):
        assert hit(cache, range(length)) == length
        assert hit(cache, [*range(length), 99, 99, 99, 99, 99]) == length
    assert cache.snapshot() == picture  # nothing was split, and nothing is held any more
    assert cache.stats()["cached"] == 3


def test_branches_within_a_run_are_all_found_and_share_its_pages() -> None:
    cache = PrefixCache(64, 4)
    trunk = computed(cache, range(24))
    branches = {}
    for at in (3, 4, 9, 16, 23):
        (branch,) = cache.fork(trunk, at)
        cache.append(branch, [100 + at] * 6, 6)
        acknowledge(cache)
        cache.commit(branch)
        branches[at] = int(branch)
    pages = cache.stats()["live"]
    assert pages == 6 + sum(-(-(at + 6) // 4) - at // 4 for at in branches)  # the trunk, and each branch's own
    for at in branches:
        assert hit(cache, [*range(at), *[100 + at] * 6]) == at + 6
        assert hit(cache, [*range(at), *[100 + at] * 3, 5]) == at + 3
        assert cache.block_table(branches[at])[: at // 4].tolist() == cache.block_table(trunk)[: at // 4].tolist()
    assert hit(cache, range(24)) == 24
    cache.release([trunk, *branches.values()])
    assert cache.stats()["cached"] == pages
    cache.check_integrity()


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33])
def test_lengths_around_a_page_boundary(length: int) -> None:
    cache = PrefixCache(16, 16)
    handle = computed(cache, range(length))
    assert len(cache.block_table(handle)) == -(-length // 16)
    assert hit(cache, range(length)) == length
    assert cache.open(range(length))[1] == length - 1  # the last token's logits are to be computed
    mark = cache.mark(handle, length)
    cache.release(handle)
    first, second = cache.fork(mark, length, 2).tolist()
    cache.append(first, [1], 1)  # goes on in place: no one else has
    assert acknowledge(cache) == []
    slot = cache.append(second, [2], 1)[0]
    jobs = acknowledge(cache)
    assert len(jobs) == (length % 16 > 0)
    if jobs:
        source, target, used = jobs[0]
        assert (used, target + used) == (length % 16, slot)
        assert source == cache.block_table(mark)[-1] * 16


def test_a_namespace_never_matches_another() -> None:
    cache = PrefixCache(32, 4)
    first = computed(cache, range(10), namespace=1)
    assert hit(cache, range(10), namespace=0) == hit(cache, range(10), namespace=2) == 0
    second = computed(cache, range(10), namespace=-5)
    assert not set(cache.block_table(first)) & set(cache.block_table(second))
    assert hit(cache, range(10), namespace=1) == hit(cache, range(10), namespace=-5) == 10


def test_the_turns_of_a_conversation_extend_one_run() -> None:
    cache = PrefixCache(64, 4)
    history: list[int] = []
    for turn in range(6):
        prompt = [*history, *[10 * turn + k for k in range(5)]]
        handle, found = cache.open(prompt)
        assert found == len(history)
        cache.append(handle, prompt[found:], len(prompt) - found)
        cache.append(handle, [1000 + turn] * 3, 3)
        history = [*prompt, *[1000 + turn] * 3]
        cache.commit(handle)
        cache.release(handle)
    assert cache.take_copies()[0].size == 0  # each turn writes behind the last one
    stats = cache.stats()
    assert stats["cached"] == len(history) // 4
    assert stats["runs"] == 2  # the root and one run


# -- copies -------------------------------------------------------------------------------------------------


def test_a_copy_keeps_its_source_until_it_is_acknowledged() -> None:
    cache = PrefixCache(4, 4)
    handle = computed(cache, range(6), commit=False)
    cache.append(handle, [6], 1)
    (fork,) = cache.fork(handle, 5)
    cache.append(fork, [9], 1)
    source = cache.block_table(handle)[1]
    cache.release(handle)
    assert cache.take_copies()[0].tolist() == [source * 4]
    assert cache.stats()["free"] == 1
    cache.acknowledge_copies()
    assert cache.stats()["free"] == 2
    cache.check_integrity()


def test_a_copy_of_a_copy_reads_the_original() -> None:
    cache = PrefixCache(8, 4)
    handle = computed(cache, range(7), commit=False)
    (second,) = cache.fork(handle, 6)
    cache.append(second, [50], 1)
    (third,) = cache.fork(second, 5)
    cache.append(third, [60], 1)
    sources, targets, lengths = cache.take_copies()
    assert sources.tolist() == [cache.block_table(handle)[1] * 4] * 2
    assert targets.tolist() == [cache.block_table(h)[1] * 4 for h in (second, third)]
    assert lengths.tolist() == [2, 1]


def test_what_waits_for_a_copy_cannot_be_committed() -> None:
    cache = PrefixCache(8, 4)
    handle = computed(cache, range(6))
    (fork,) = cache.fork(handle, 5)
    cache.append(fork, [50], 1)
    with pytest.raises(ValueError, match="acknowledge"):
        cache.commit(fork)
    acknowledge(cache)
    cache.commit(fork)
    assert hit(cache, [0, 1, 2, 3, 4, 50]) == 6


# -- commit -------------------------------------------------------------------------------------------------


def test_equal_pages_are_kept_once_for_every_holder() -> None:
    cache = PrefixCache(32, 4)
    prompt = computed(cache, range(6))
    one, two = cache.fork(prompt, 6, 2).tolist()
    tokens = np.arange(100, 112, dtype=np.int32)
    cache.append([one, two], np.concatenate([tokens, tokens]), 12)
    acknowledge(cache)
    (held,) = cache.fork(two, 15)
    mark = cache.mark(two, 13)
    before = cache.stats()["live"]
    cache.commit([one, two])
    assert cache.block_table(two)[:4].tolist() == cache.block_table(one)[:4].tolist()
    assert cache.block_table(held)[:3].tolist() == cache.block_table(mark)[:3].tolist()
    assert cache.tokens(two).tolist() == cache.tokens(one).tolist()
    assert before - cache.stats()["live"] == 3  # the last page is not full: it stays each one's own
    assert cache.stats()["deduplicated"] == 3
    cache.append([one, two], [1, 2], 1)  # and is written in place
    assert acknowledge(cache) == []
    cache.check_integrity()


def test_nothing_of_an_older_epoch_is_found_and_it_goes_first() -> None:
    cache = PrefixCache(12, 4)
    old = computed(cache, range(8))
    cache.release(computed(cache, [9] * 8))
    cache.begin_epoch(3)
    assert hit(cache, range(8)) == hit(cache, [9] * 8) == 0
    cache.append(old, [8, 8], 2)  # a live sequence goes on, privately
    cache.commit(old)
    assert hit(cache, range(8)) == 0
    new = computed(cache, range(8))
    assert not set(cache.block_table(new)) & set(cache.block_table(old))
    cache.release(new)
    assert cache.stats()["stale"] == 2
    assert cache.evict(2) == 2
    assert cache.stats()["stale"] == 0
    assert hit(cache, range(8)) == 8
    with pytest.raises(ValueError, match="above the last one, 3"):
        cache.begin_epoch(3)
    cache.release(old)
    cache.check_integrity()


# -- truncate, release, eviction ----------------------------------------------------------------------------


def test_truncating_a_shared_prefix_leaves_it_to_the_others() -> None:
    cache = PrefixCache(16, 4)
    handle = computed(cache, range(12))
    (other,) = cache.fork(handle, 10)
    cache.truncate(handle, 6)
    assert cache.tokens(other).tolist() == list(range(10))
    assert hit(cache, range(12)) == 12
    cache.append(handle, [70], 1)
    assert [job[2] for job in acknowledge(cache)] == [2]  # it may not write over what the others see
    assert cache.tokens(other).tolist() == list(range(10))


def test_truncating_what_no_one_else_sees_frees_its_pages() -> None:
    cache = PrefixCache(16, 4)
    handle = computed(cache, range(12), commit=False)
    cache.truncate(handle, 5)
    assert cache.stats()["free"] == 14
    cache.append(handle, [70], 1)
    assert acknowledge(cache) == []


def test_holding_and_letting_go_are_symmetric() -> None:
    cache = PrefixCache(32, 4)
    cache.release(computed(cache, range(21)))
    before = cache.stats()
    picture = cache.snapshot()
    handle, _ = cache.open([*range(18), 5])
    forks = cache.fork(handle, 11, 5)
    marks = cache.mark(handle, [0, 3, 8, 18])
    pin = cache.pin(handle, pos=4)
    assert cache.stats()["cached"] == before["cached"] - 5
    cache.release(handle)
    assert cache.stats()["cached"] == before["cached"] - 5  # the last mark stands at 18
    cache.release(np.concatenate([marks, forks]))
    assert cache.stats()["cached"] == before["cached"] - 1
    cache.unpin(pin)
    assert cache.snapshot() == picture
    assert {k: v for k, v in cache.stats().items() if "tokens" not in k} == {
        k: v for k, v in before.items() if "tokens" not in k
    }


def test_the_longest_unused_goes_first_from_its_end() -> None:
    cache = PrefixCache(32, 4)
    for first in (100, 200, 300):
        cache.release(computed(cache, range(first, first + 8)))
    cache.release(cache.open([*range(100, 108), 0])[0])  # used again
    assert cache.evict(3) == 3
    assert [hit(cache, range(first, first + 8)) for first in (200, 300, 100)] == [0, 4, 8]
    assert cache.evict(3) == 3
    assert cache.evict(1) == 0


def test_the_end_of_a_run_goes_before_a_beginning_that_is_in_use() -> None:
    cache = PrefixCache(32, 4)
    cache.release(computed(cache, range(16)))
    cache.release(computed(cache, range(100, 104)))
    cache.release(cache.open([*range(8), 0])[0])  # only the first half of the older run is used
    assert cache.evict(2) == 2
    assert hit(cache, range(16)) == 8
    assert cache.evict(1) == 1
    assert (hit(cache, range(16)), hit(cache, range(100, 104))) == (8, 0)


def test_held_pinned_and_shared_pages_never_go() -> None:
    cache = PrefixCache(64, 4)
    trunk = computed(cache, range(16))
    (branch,) = cache.fork(trunk, 8)
    cache.append(branch, [50] * 8, 8)
    cache.commit(branch)
    mark = cache.mark(trunk, 12)
    cache.release(computed(cache, range(200, 216)))
    pin = cache.pin(computed(cache, range(300, 310)), priority=1, pos=9)
    cache.release(trunk)
    assert cache.evict(1000) == 1 + 4
    assert cache.tokens(mark).tolist() == list(range(12))
    assert cache.tokens(branch).tolist() == [*range(8), *[50] * 8]
    assert cache.tokens(pin).tolist() == list(range(300, 309))
    assert not cache.reserve(branch, 4 * 64)
    cache.check_integrity()


def test_pins_go_by_priority_and_only_when_asked() -> None:
    cache = PrefixCache(32, 4)
    pins = []
    for priority in (2, 0, 1):
        handle = computed(cache, [priority] * 8)
        pins.append(cache.pin(handle, priority=priority))
        cache.release(handle)
    assert cache.evict(100) == 0
    assert cache.evict(1, priority=2) == 1
    assert [hit(cache, [p] * 8) for p in (2, 0, 1)] == [8, 4, 8]
    assert cache.evict(100, priority=2) == 3
    assert [hit(cache, [p] * 8) for p in (2, 0, 1)] == [8, 0, 0]
    for pin in pins:
        cache.unpin(pin)  # a pin that was given up is still a handle
    assert cache.evict(100) == 2
    assert cache.stats()["pins"] == 0


def test_a_failed_reservation_changes_nothing() -> None:
    cache = PrefixCache(8, 4)
    one = computed(cache, range(6))
    cache.release(computed(cache, range(100, 108)))
    two = cache.fork(one, 6, 1)
    handles = [one, int(two[0])]
    picture, stats = cache.snapshot(), cache.stats()
    assert not cache.reserve(handles, [2, 30])
    with pytest.raises(MemoryError):
        cache.append(handles, np.zeros(32, dtype=np.int32), [2, 30])
    assert (cache.snapshot(), cache.stats()) == (picture, stats)
    assert cache.reserve(handles, [2, 20])  # six pages, two of them evicted, and no more
    assert cache.stats()["free"] == 0
    cache.append(handles, np.zeros(22, dtype=np.int32), [2, 20])
    cache.check_integrity()


# -- plans --------------------------------------------------------------------------------------------------


def test_a_plan_has_prompt_trajectory_and_branch_in_depth_first_order() -> None:
    cache = PrefixCache(64, 4)
    prompt = computed(cache, range(10))
    trajectories = cache.fork(prompt, 10, 2).tolist()
    cache.append(trajectories, [*[50] * 10, *[60] * 10], 10)
    acknowledge(cache)
    rows = [*cache.fork(trajectories[0], 17, 2).tolist(), trajectories[1], *cache.fork(trajectories[0], 14, 1).tolist()]
    cache.append(rows, [1, 2, 3, 4], 1)
    acknowledge(cache)
    plan = cache.plan(rows)
    assert plan.group_starts.tolist() == [0, 8, 12]
    assert plan.group_lengths.tolist() == [8, 4, 4]
    assert plan.row_offsets.tolist() == [0, 4, 7, 9]
    assert plan.rows.tolist() == [0, 1, 2, 3, 0, 1, 3, 0, 1]
    assert plan.tail_starts.tolist() == [16, 16, 8, 12]
    check_plan(cache, rows, plan)


def test_a_plan_stays_the_same_object_until_an_array_changes() -> None:
    cache = PrefixCache(64, 4)
    prompt = computed(cache, range(8))
    rows = cache.fork(prompt, 8, 3)
    plan = cache.plan(rows)
    assert plan.version == cache.plan(rows.tolist()).version
    cache.append(rows, [1, 2, 3], 1)
    grown = cache.plan(rows)
    assert grown.version > plan.version
    for token in (4, 5, 6):
        cache.append(rows, [token] * 3, 1)
        assert cache.plan(rows) is grown  # the tails' pages are the same
    cache.append(rows, [7] * 3, 1)
    assert cache.plan(rows).version > grown.version
    pages = plan.pages
    del plan, grown
    assert pages.tolist() == cache.block_table(prompt).tolist()  # an array outlives its plan
    cache.release(rows[:1])
    with pytest.raises(ValueError, match="no live sequence"):
        cache.plan(rows)
    assert cache.plan([]).tail_offsets.tolist() == [0]


# -- the rest -----------------------------------------------------------------------------------------------


def test_integers_of_every_kind_are_taken_and_others_refused() -> None:
    cache = PrefixCache(64, 4)
    for tokens in ([1, 2, 3], np.array([1, 2, 3]), np.arange(1, 4, dtype=np.int16), range(1, 4)):
        handle, _ = cache.open(tokens)
        cache.append(np.int64(handle), tokens, np.array(3))
        assert cache.tokens(handle).tolist() == [1, 2, 3]
        (fork,) = cache.fork(handle, 1)
        strided = np.array([fork, 0])[::2]
        cache.append(strided, np.array([[7, 8]], dtype=np.int64), [2])
        assert cache.tokens(fork).tolist() == [1, 7, 8]
    for wrong in ([1.5], np.ones(2), ["a"], None, "ab"):
        with pytest.raises(TypeError, match="integer"):
            cache.open(wrong)
    with pytest.raises(ValueError, match=str(2**40)):
        cache.open([2**40])


def test_batches_name_one_value_for_all_or_one_for_each() -> None:
    cache = PrefixCache(64, 4)
    handles = [computed(cache, range(k, k + 9)) for k in range(3)]
    forks = cache.fork(handles, [1, 5, 9], [2, 0, 1])
    assert [cache.length(f) for f in forks] == [1, 1, 9]
    assert len(cache.fork(handles, 4, 3)) == 9
    marks = cache.mark(handles[0], np.arange(10))
    assert [cache.length(m) for m in marks] == list(range(10))
    with pytest.raises(ValueError, match="is a mark"):
        cache.append(marks[:1], [1], 1)
    with pytest.raises(ValueError, match="one position is needed for each of 3"):
        cache.fork(handles, [1, 2], 1)


def test_a_handle_dies_with_its_release_though_its_place_is_used_again() -> None:
    cache = PrefixCache(8, 4)
    seen = set()
    for _ in range(100):
        handle, _ = cache.open([1, 2])
        assert handle not in seen
        seen.add(handle)
        cache.release(handle)
    for handle in seen:
        with pytest.raises(ValueError, match="no live sequence"):
            cache.tokens(handle)


def test_pictures_name_pages_tokens_and_holders() -> None:
    cache = PrefixCache(8, 4)
    handle = computed(cache, [11, 12, 13, 14, 15], namespace=3)
    cache.mark(handle, 2)
    text = cache.snapshot()
    assert "namespace 3" in text
    assert "tokens 11 12 13 14 15" in text
    assert "mark" in text
    dot = cache.snapshot("dot")
    assert dot.startswith("digraph")
    assert dot.count("->") == 1
    with pytest.raises(ValueError, match="html"):
        cache.snapshot("html")


def test_two_threads_share_one_cache() -> None:
    cache = PrefixCache(400, 4)
    errors: list[BaseException] = []

    def work(namespace: int) -> None:
        try:
            for turn in range(300):
                tokens = [namespace, *range(turn % 30)]
                handle, found = cache.open(tokens, namespace=namespace)
                cache.append(handle, tokens[found:], len(tokens) - found)
                assert cache.tokens(handle).tolist() == tokens
                forks = cache.fork(handle, len(tokens), 3)
                check_plan(cache, forks.tolist(), cache.plan(forks))
                cache.release(forks)
                cache.release(handle)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.check_integrity()
    assert cache.stats()["live"] == 0

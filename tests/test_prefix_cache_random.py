"""Random operations on the prefix cache against a naive model: every slot holds what its sequence expects, always."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from prefix_cache_oracle import Oracle

NUMBER = st.integers(0, 2**30 - 1)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Hypothesis chooses the operations, and shortens the list of them when one fails."""

    @initialize(num_blocks=st.integers(2, 14), block_size=st.integers(1, 4))
    def begin(self, num_blocks: int, block_size: int) -> None:
        self.oracle = Oracle(num_blocks, block_size, plan_every=1)

    @rule(name=st.sampled_from((*Oracle.OPERATIONS, "begin_epoch")), a=NUMBER, b=NUMBER, c=NUMBER)
    def operate(self, name: str, a: int, b: int, c: int) -> None:
        self.oracle.step(name, a, b, c)


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# 48,000 operations; with hypothesis's, above 50,000. The soak run makes a million: benchmarks/soak_prefix_cache.py.
@pytest.mark.parametrize(("num_blocks", "block_size"), [(5, 1), (6, 2), (9, 3), (12, 4), (24, 4), (40, 2)])
def test_a_long_life_in_a_small_pool(num_blocks: int, block_size: int) -> None:
    oracle = Oracle(num_blocks, block_size)
    oracle.random_steps(8000, seed=num_blocks)
    stats = oracle.cache.stats()
    assert stats["evicted"] > 100  # the pool was too small, again and again
    assert stats["deduplicated"] > 0
    assert block_size == 1 or stats["copies"] > 10

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastalign.models.batches import plan_batches

LENGTHS = st.lists(st.integers(2, 40), max_size=60)


@given(LENGTHS, st.integers(1, 200))
def test_batches_partition_the_sequences_within_the_budget(lengths, batch_tokens):
    batches = plan_batches(np.array(lengths, np.int64), batch_tokens)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        of_batch = [lengths[i] for i in batch]
        assert len(batch) == 1 or len(batch) * max(of_batch) <= batch_tokens
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_batches_are_as_large_as_the_budget_allows():
    batches = plan_batches(np.array([4, 10, 4, 10, 5]), 20)
    assert [batch.tolist() for batch in batches] == [[1, 3], [4, 0, 2]]


def test_a_sequence_beyond_the_budget_is_alone():
    assert [batch.tolist() for batch in plan_batches(np.array([3, 100, 3]), 10)] == [[1], [0, 2]]


def test_a_limit_on_rows():
    batches = plan_batches(np.array([4, 10, 4, 10, 5]), 20, max_rows=2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [4, 0], [2]]

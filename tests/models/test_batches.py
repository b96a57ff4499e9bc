from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.models.batches import plan_batches, plan_scoring, prompt_number, prompt_runs, shared_prefixes

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


# Prompts that are shared ---------------------------------------------------------------------------------------------

GROUPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=30
)


def flat(groups):
    lengths = np.array([p + c for p, members in groups for c in members])
    completions = np.array([c for _, members in groups for c in members])
    return lengths, completions, np.repeat(np.arange(len(groups)), [len(members) for _, members in groups])


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from(["padded", "packed", "shared"]), st.integers(10, 200))
def test_batches_partition_the_sequences(groups, layout, budget):
    lengths, completions, prompts = flat(groups)
    batches = plan_scoring(lengths, completions, prompts, budget, layout)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        tokens = lengths[batch].sum()
        if layout == "padded":
            tokens = len(batch) * lengths[batch].max()
        if layout == "shared":
            used = {int(prompts[i]): int(lengths[i] - completions[i]) for i in batch}
            tokens = sum(used.values()) + completions[batch].sum()
        assert tokens <= budget or len(batch) == 1
    longest = [lengths[batch].max() for batch in batches]
    assert longest[0] == lengths.max() or layout == "shared"
    if layout == "shared":
        where = np.empty(len(lengths), int)
        for number, batch in enumerate(batches):
            where[batch] = number
        for group, (prompt, members) in enumerate(groups):
            if prompt + sum(members) <= budget:
                assert len(set(where[prompts == group].tolist())) == 1


def test_nothing_gives_no_batches():
    none = np.zeros(0, np.int64)
    for layout in ("padded", "packed", "shared"):
        assert plan_scoring(none, none, none, 100, layout) == []


def test_common_tokens():
    ids = np.array([[1, 2, 3, 4, 0], [1, 2, 3, 5, 6], [1, 2, 9, 0, 0], [1, 2, 9, 8, 0], [7, 0, 0, 0, 0]])
    groups, prefixes = shared_prefixes(ids, np.array([4, 5, 3, 4, 1]), [2, 2, 2, 3, 1])
    assert groups.tolist() == [0, 0, 0, 1, 2]  # the fourth begins elsewhere
    assert prefixes.tolist() == [2, 0, 0]
    groups, prefixes = shared_prefixes(ids[:2], np.array([4, 5]), [2, 2])
    assert prefixes.tolist() == [3]  # completions that begin alike share that too
    groups, prefixes = shared_prefixes(ids[[2, 2]], np.array([3, 3]), [2, 2])
    assert prefixes.tolist() == [3]
    groups, prefixes = shared_prefixes(ids[[0, 4]], np.array([4, 1]), [2, 2])
    assert groups.tolist() == [0, 1]


def test_a_run_over_the_budget_is_cut():
    lengths, completions = np.array([12, 13, 14, 12, 5, 5]), np.array([2, 3, 4, 2, 3, 4])
    prompts = np.array([7, 7, 7, 7, 7, 9])  # the fifth has a number in common by chance, and another length
    assert prompt_runs(lengths, completions, prompts, 1000).tolist() == [0, 4, 5]
    assert prompt_runs(lengths, completions, prompts, 15).tolist() == [0, 2, 3, 4, 5]
    assert prompt_runs(lengths, completions, prompts, 1).tolist() == list(range(6))


def test_prompts_are_told_apart():
    assert prompt_number([1, 2]) == prompt_number((1, 2)) != prompt_number([2, 1])
    assert prompt_number(np.array([1, 2])) == prompt_number(np.array([1, 2])) != prompt_number(np.array([12]))

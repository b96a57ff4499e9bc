from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.reference import DamagedFileError
from fastalign.reference.index import KeyIndex, first_occurrences


class FakeShard:
    def __init__(self, keys, damaged=()):
        self._keys, self._damaged = keys, set(damaged)

    def read_keys(self):
        return np.array([list(key) for key in self._keys], np.uint8).reshape(-1, 16)

    def row(self, index, key):
        assert self._keys[index] == key
        if index in self._damaged:
            raise DamagedFileError("fake", f"row {index}")
        return (self, index)


# two byte values in each half: keys collide in one half, or in both, all the time
KEY = st.tuples(st.sampled_from(b"ab"), st.sampled_from(b"cde")).map(lambda p: bytes([p[0]]) * 8 + bytes([p[1]]) * 8)


def as_array(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


@given(st.lists(st.lists(KEY, max_size=6), max_size=4), st.lists(KEY | st.binary(min_size=16, max_size=16), max_size=8))
def test_finds_what_is_there_and_nothing_else(blocks, asked):
    shards = [FakeShard(block) for block in blocks]
    index = KeyIndex(shards)
    present = [key for block in blocks for key in block]
    assert len(index) == len(present)
    assert index.distinct() == len(set(present))
    positions = index.find(as_array(asked))
    assert positions.shape == (len(asked),)
    for key, position in zip(asked, positions.tolist(), strict=True):
        assert (position >= 0) == (key in present)
        if position >= 0:
            index.read(position, key)  # asserts that the row is of that key


def test_a_sound_duplicate_stands_in_for_a_damaged_row():
    key, other = b"k" * 16, b"k" * 15 + b"z"
    broken, sound = FakeShard([other, key], damaged=[1]), FakeShard([key])
    for shards in ([broken, sound], [sound, broken]):
        index = KeyIndex(shards)
        (position,) = index.find(as_array([key])).tolist()
        assert index.read(position, key) == (sound, 0)
    index = KeyIndex([broken, FakeShard([key], damaged=[0])])
    (position,) = index.find(as_array([key])).tolist()
    with pytest.raises(DamagedFileError):
        index.read(position, key)


@given(st.lists(KEY, max_size=20))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_first_occurrences(keys):
    expected = [i for i, key in enumerate(keys) if key not in keys[:i]]
    assert first_occurrences(as_array(keys)).tolist() == expected

from __future__ import annotations

import errno
import os
import pickle
import shutil

import numpy as np
import pytest

from fastalign.reference import CacheError, DamagedFileError, MissingLogpsError, ReferenceCache, TokenSequence

OTHER = "fedcba9876543210" * 4


def build(path, reference, sequences, score, **options):
    return ReferenceCache.build(path, reference, sequences, score=score, progress=False, **options)


@pytest.fixture
def sequences(make_sequences):
    return make_sequences(40)


def test_build_look_up_open_again(tmp_path, digest, scorer, sequences):
    built = build(tmp_path, digest, sequences, scorer, shard_tokens=60)
    for cache in (built, ReferenceCache.open(tmp_path, digest), ReferenceCache.open(tmp_path)):
        assert len(cache) == 40
        scorer.assert_right(cache, sequences[::-1])
        assert cache.verify() == []
    report = built.report
    assert (report.rows, report.distinct, report.cached, report.computed) == (40, 40, 0, 40)
    assert report.tokens == sum(len(ids) - start for ids, start in sequences)
    assert report.seconds >= report.writing_seconds > 0


def test_look_up_gives_copies(tmp_path, digest, scorer, sequences):
    cache = build(tmp_path, digest, sequences, scorer)
    (row,) = cache.lookup(sequences[:1])
    row[:] = 1.0
    scorer.assert_right(cache, sequences)


def test_only_new_rows_are_computed_and_each_once(tmp_path, digest, scorer, sequences):
    build(tmp_path, digest, sequences[:25], scorer)
    assert len(scorer.scored) == 25
    cache = build(tmp_path, digest, [*sequences, *sequences], scorer)
    assert sorted(scorer.scored) == sorted(sequences)
    assert (cache.report.rows, cache.report.distinct, cache.report.cached, cache.report.computed) == (80, 40, 25, 15)
    files = sorted(path.name for path in tmp_path.rglob("*"))
    build(tmp_path, digest, sequences, scorer)
    assert len(scorer.scored) == 40
    assert sorted(path.name for path in tmp_path.rglob("*")) == files  # a build with nothing to do writes nothing


def test_an_iterator_will_do(tmp_path, digest, scorer, sequences):
    cache = build(tmp_path, digest, iter(sequences), scorer)
    for row, sequence in zip(cache.lookup(iter(sequences)), sequences, strict=True):
        assert np.array_equal(row, scorer.logps(sequence))


def test_no_sequences(tmp_path, digest, scorer):
    cache = build(tmp_path, digest, [], scorer)
    assert len(cache) == 0
    assert cache.lookup([]) == []
    assert scorer.calls == []


def test_batches_respect_the_budget(tmp_path, digest, scorer, sequences):
    build(tmp_path, digest, sequences, scorer, batch_tokens=50)
    assert all(len(call) * max(len(ids) for ids, _ in call) <= 50 for call in scorer.calls)


def test_references_do_not_mix(tmp_path, digest, scorer, sequences):
    build(tmp_path, digest, sequences, scorer)
    other = build(tmp_path, OTHER, sequences[:5], lambda batch: [scorer.logps(one) - 1 for one in batch])
    assert len(other) == 5
    for sequence, row in zip(sequences[:5], other.lookup(sequences[:5]), strict=True):
        assert np.array_equal(row, scorer.logps(sequence) - 1)
    with pytest.raises(MissingLogpsError):
        other.lookup(sequences[:6])
    scorer.assert_right(ReferenceCache.open(tmp_path, digest), sequences)
    with pytest.raises(CacheError, match=rf"holds 2 references: {digest}, {OTHER}; name one of them"):
        ReferenceCache.open(tmp_path)
    with pytest.raises(CacheError, match="'abc' is not among them"):
        ReferenceCache.open(tmp_path, "abc")


def test_missing_rows_are_an_error_that_counts_them(tmp_path, digest, scorer, sequences):
    cache = build(tmp_path, digest, sequences[:10], scorer)
    asked = [sequences[3], TokenSequence([49] * 7, 2), sequences[4], TokenSequence([49] * 8, 3)]
    message = (
        r"2 of 4 sequences have no reference log-probs in .*; the first is sequence 1 \(7 tokens, the last 5 of them"
    )
    with pytest.raises(MissingLogpsError, match=message) as caught:
        cache.lookup(asked)
    assert caught.value.indices == cache.missing(asked) == [1, 3]
    with pytest.raises(MissingLogpsError):  # another completion of the same tokens is another sequence
        cache.lookup([TokenSequence([1, *sequences[0].input_ids], 1)])


def test_reload_shows_what_another_process_built(tmp_path, digest, scorer, sequences):
    reader = build(tmp_path, digest, sequences[:10], scorer)
    build(tmp_path, digest, sequences, scorer)
    assert reader.missing(sequences) == list(range(10, 40))
    reader.reload()
    scorer.assert_right(reader, sequences)


def test_a_pickled_cache_is_opened_again(tmp_path, digest, scorer, sequences):
    cache = pickle.loads(pickle.dumps(build(tmp_path, digest, sequences, scorer)))
    scorer.assert_right(cache, sequences)


def test_a_moved_folder(tmp_path, digest, scorer, sequences):
    build(tmp_path / "a", digest, sequences, scorer)
    shutil.move(tmp_path / "a", tmp_path / "b")
    scorer.assert_right(ReferenceCache.open(tmp_path / "b"), sequences)


def test_two_caches_are_merged_by_copying_shards(tmp_path, digest, scorer, sequences):
    build(tmp_path / "a", digest, sequences[:20], scorer)
    build(tmp_path / "b", digest, sequences[20:], scorer)
    shutil.copytree(tmp_path / "b" / "shards", tmp_path / "a" / "shards", dirs_exist_ok=True)
    cache = build(tmp_path / "a", digest, sequences, scorer)
    assert cache.report.computed == 0
    scorer.assert_right(cache, sequences)
    assert cache.verify() == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rows: rows[:-1], r"score returned \d+ results for \d+ sequences"),
        (lambda rows: [row[:-1] for row in rows], r"sequence \d+: score returned float32 \(\d+,\), expected float32"),
        (lambda rows: [row.astype(np.float64) for row in rows], r"sequence \d+: score returned float64"),
        (lambda rows: [row[None] for row in rows], r"sequence \d+: score returned float32 \(1, "),
        (
            lambda rows: [np.where(np.arange(len(r)) == 0, np.nan, r).astype("f4") for r in rows],
            "completion token 0 is nan",
        ),
        (lambda rows: [np.full_like(row, -np.inf) for row in rows], "token 0 is -inf"),
    ],
    ids=["fewer", "shorter", "dtype", "shape", "nan", "inf"],
)
def test_a_scorer_that_is_wrong_is_refused(tmp_path, digest, scorer, sequences, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, digest, sequences, lambda batch: wrong(scorer(batch)))
    assert ReferenceCache(tmp_path, digest).missing(sequences) == list(range(40))


def test_a_scorer_that_fails_keeps_what_was_finished(tmp_path, digest, scorer, sequences):
    def failing(batch):
        if len(scorer.calls) == 3:
            raise RuntimeError("out of memory")
        return scorer(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        build(tmp_path, digest, sequences, failing, batch_tokens=60)
    finished = scorer.scored
    assert 0 < len(finished) < 40
    scorer.assert_right(ReferenceCache.open(tmp_path), finished)
    build(tmp_path, digest, sequences, scorer)
    assert sorted(scorer.scored) == sorted(sequences)  # none twice


def test_sequences_that_change_from_reading_to_reading(tmp_path, digest, scorer, sequences):
    """As of a data set that is augmented on the fly: the score would stand under another sequence's key."""

    class Augmented(list):
        def __getitem__(self, index):
            ids, start = super().__getitem__(index)
            return TokenSequence([*ids[:-1], 99], start)

    with pytest.raises(ValueError, match=r"sequence \d+ is not the same at every reading"):
        build(tmp_path, digest, Augmented(sequences), scorer)
    assert scorer.calls == []


@pytest.mark.parametrize("option", ["batch_tokens", "shard_tokens", "shard_seconds"])
def test_options_must_be_positive(tmp_path, digest, scorer, option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        build(tmp_path / "new", digest, [], scorer, **{option: 0})
    assert not (tmp_path / "new").exists()


def test_what_build_needs(tmp_path, digest, scorer):
    with pytest.raises(ValueError, match="needs score="):
        ReferenceCache.build(tmp_path, digest, [])
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits, got 'Ab'"):
        ReferenceCache.build(tmp_path, "Ab", [], score=scorer)


def test_open_where_there_is_none(tmp_path, digest, scorer):
    with pytest.raises(CacheError, match="is no reference cache"):
        ReferenceCache.open(tmp_path / "nowhere")
    build(tmp_path, digest, [], scorer)
    with pytest.raises(CacheError, match="holds 0 references: none"):
        ReferenceCache.open(tmp_path)


def test_opening_and_reading_write_nothing(tmp_path, digest, scorer, sequences, monkeypatch):
    """As in a read-only folder (permissions do not bind root, so the calls that write are refused)."""
    build(tmp_path, digest, sequences, scorer)

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fastalign.reference.files.write_atomic", refused)
    for name in ("mkdir", "replace", "unlink"):
        monkeypatch.setattr(os, name, refused)
    cache = ReferenceCache.open(tmp_path)
    scorer.assert_right(cache, sequences)
    assert cache.verify() == []
    assert cache.inspect().rows == 40


def test_a_damaged_row_is_an_error_in_look_up_and_rebuilt_by_build(tmp_path, digest, scorer, sequences, flip_bit):
    cache = build(tmp_path, digest, sequences, scorer, shard_tokens=100)
    (place,) = cache._index.find(cache_keys(cache, sequences[7:8])).tolist()
    shard, row = cache._index._shards[cache._index._shard[place]], cache._index._row[place]
    flip_bit(shard.path, 8 * (shard.path.read_bytes().index(scorer.logps(sequences[7]).tobytes()) + 1))
    for damaged in (cache, ReferenceCache.open(tmp_path)):  # mapped before the damage, and after it
        with pytest.raises(DamagedFileError, match=rf"{shard.path.name}: the checksum of its row {row} does not fit"):
            damaged.lookup(sequences[7:8])
        scorer.assert_right(damaged, sequences[:7] + sequences[8:])
    scorer.calls.clear()
    rebuilt = build(tmp_path, digest, sequences, scorer)
    assert scorer.scored == [sequences[7]]
    scorer.assert_right(rebuilt, sequences)
    assert rebuilt.verify() == []
    assert rebuilt.inspect().retired == [shard.path.name]


def cache_keys(cache, sequences):
    from fastalign.reference.sequences import sequence_keys

    return sequence_keys(cache.reference, sequences)[0]


def test_a_damaged_shard_is_named_when_its_rows_are_missing(tmp_path, digest, scorer, sequences):
    build(tmp_path, digest, sequences, scorer, shard_tokens=100)
    path = min((tmp_path / "shards").iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    cache = ReferenceCache.open(tmp_path)
    with pytest.raises(MissingLogpsError, match=rf"Left out: shards/{path.name}: it has \d+ bytes, its manifest says"):
        cache.lookup(sequences)

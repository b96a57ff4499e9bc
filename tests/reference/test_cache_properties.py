"""Properties of a cache over random sequences, shard sizes, interleavings and damage."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.reference import DamagedFileError, MissingLogpsError, ReferenceCache
from fastalign.reference.sequences import sequence_keys
from fastalign.reference.shards import Shard
from fastalign.reference.writer import ShardWriter


def build(path, reference, sequences, score, **options):
    return ReferenceCache.build(path, reference, sequences, score=score, progress=False, **options)


def cache_keys(cache, sequences):
    return sequence_keys(cache.reference, sequences)[0]


def looked_up(cache, sequence) -> tuple[np.ndarray | None, str | None]:
    try:
        return cache.lookup([sequence])[0], None
    except (DamagedFileError, MissingLogpsError) as error:
        return None, str(error)


@settings(max_examples=80)
@given(data=st.data())
def test_any_damage_is_found_and_no_number_is_wrong(new_scorer, make_sequences, digest, flip_bit, data):
    """Random shards, random damage to a random file: found and named, the rest still works, a build repairs it."""
    scorer, sequences = new_scorer(), make_sequences(12, longest=8)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        split = data.draw(st.integers(0, 12))
        for part in (sequences[:split], sequences[split:]):
            build(root, digest, part, scorer, shard_tokens=data.draw(st.integers(1, 30)), batch_tokens=20)
        in_shard = {}
        for path in (root / "shards").iterdir():
            for key in Shard(path).read_keys():
                in_shard[key.tobytes()] = path
        keys = [key.tobytes() for key in cache_keys(ReferenceCache.open(root), sequences)]

        files = sorted(path for path in root.rglob("*.*") if path.name != "format.json")
        # names are random, so what is drawn must not depend on their order: hypothesis replays its examples
        victim, position = files[data.draw(st.integers(0, 99)) % len(files)], data.draw(st.integers(0, 2**32))
        size = victim.stat().st_size
        match data.draw(st.sampled_from(["flip", "truncate", "append", "delete"])):
            case "flip":
                flip_bit(victim, position)
            case "truncate":
                victim.write_bytes(victim.read_bytes()[: position % size])
            case "append":
                victim.write_bytes(victim.read_bytes() + b"\n")
            case "delete":
                victim.unlink()
        manifest_gone = victim.parent.name == "manifests" and not victim.exists()

        cache = ReferenceCache(root, digest)
        named = {problem.file for problem in cache.verify()}
        # without its manifest a shard is unlisted, which is no damage: what it says is still checked
        assert named == set() if manifest_gone else named == {f"{victim.parent.name}/{victim.name}"}
        for key, sequence in zip(keys, sequences, strict=True):
            (row, error) = looked_up(cache, sequence)
            if error is not None:
                assert in_shard[key] == victim
                assert victim.name in error
            else:
                assert np.array_equal(row, scorer.logps(sequence))
        rebuilt = build(root, digest, sequences, scorer)
        scorer.assert_right(rebuilt, sequences)
        assert rebuilt.verify() == []


@settings(max_examples=80)
@given(data=st.data())
def test_any_interleaving_of_writers_gives_the_same_cache(new_scorer, make_sequences, digest, data):
    """Builds of random parts, and two writers in turns, with shards of random sizes, while a reader looks on."""
    scorer, sequences = new_scorer(), make_sequences(15, longest=8)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reader = build(root, digest, [], scorer)
        writers = [
            ShardWriter(root, digest, shard_tokens=data.draw(st.integers(1, 40)), shard_seconds=1e9) for _ in range(2)
        ]
        expected = set()
        for _ in range(data.draw(st.integers(1, 12))):
            chosen = data.draw(st.lists(st.integers(0, 14), max_size=5))
            part = [sequences[i] for i in chosen]
            match data.draw(st.sampled_from(["build", "write", "write", "read"])):
                case "build":
                    cache = build(root, digest, part, scorer, shard_tokens=data.draw(st.integers(1, 40)))
                    scorer.assert_right(cache, part)
                    expected.update(chosen)
                case "write":
                    writer = data.draw(st.sampled_from(writers))
                    for key, sequence in zip(cache_keys(reader, part), part, strict=True):
                        writer.add(key.tobytes(), scorer.logps(sequence))
                    expected.update(chosen)
                case "read":
                    reader.reload()
                    there = [sequences[i] for i in set(range(15)) - set(reader.missing(sequences))]
                    scorer.assert_right(reader, there)
        for writer in writers:
            writer.flush()
        reader.reload()
        assert set(range(15)) - set(reader.missing(sequences)) == expected
        assert len(reader) == len(expected)
        scorer.assert_right(reader, [sequences[i] for i in expected])
        assert reader.verify() == []

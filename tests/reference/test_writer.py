from __future__ import annotations

import errno
import os
import resource
import time

import numpy as np
import pytest

from fastalign.reference import DamagedFileError
from fastalign.reference.store import Store, create_store
from fastalign.reference.writer import ShardWriter


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def row(i: int, length: int = 4) -> np.ndarray:
    return np.full(length, -i, np.float32)


@pytest.fixture
def root(tmp_path):
    create_store(tmp_path)
    return tmp_path


@pytest.fixture
def new_writer(root, digest):
    return lambda shard_tokens=10, shard_seconds=1e9: ShardWriter(
        root, digest, shard_tokens=shard_tokens, shard_seconds=shard_seconds
    )


def rows_in(root) -> dict[int, list[float]]:
    found = {}
    for shard in Store(root).shards.values():
        for index, name in enumerate(shard.read_keys()):
            found[int.from_bytes(name.tobytes(), "big")] = shard.row(index, name.tobytes()).tolist()
    return found


def shard_problems(root) -> list:
    return [problem for problem in Store(root).verify() if problem.file.startswith("shards/")]


def test_a_shard_is_written_when_it_is_full(root, new_writer):
    with new_writer() as writer:
        for i in range(7):
            writer.add(key(i), row(i))
            assert sorted(rows_in(root)) == list(range((i + 1) // 3 * 3))
    assert rows_in(root) == {i: row(i).tolist() for i in range(7)}
    store = Store(root)
    assert [record.rows for record in store.records.values()] == [3, 3, 1]
    assert store.problems == []
    assert store.unlisted == {}


def test_a_shard_is_written_when_it_is_old(root, new_writer, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = new_writer(shard_tokens=10**6, shard_seconds=60)
    writer.add(key(0), row(0))
    now[0] += 59
    writer.add(key(1), row(1))
    assert rows_in(root) == {}
    now[0] += 1
    writer.add(key(2), row(2))
    assert sorted(rows_in(root)) == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_finished_is_written_on_the_way_out(root, new_writer, error):
    def interrupted():
        with new_writer() as writer:
            writer.add(key(0), row(0))
            raise error

    with pytest.raises(error):
        interrupted()
    assert sorted(rows_in(root)) == [0]


def test_nothing_to_write_writes_nothing(root, new_writer):
    with new_writer():
        pass
    assert list((root / "shards").iterdir()) == list((root / "manifests").iterdir()) == []


def test_writers_of_one_second_do_not_meet(new_writer):
    assert len({new_writer().name for _ in range(100)}) == 100


def test_interleaved_writers(root, new_writer):
    one, two = new_writer(), new_writer()
    for i in range(10):
        (one if i % 2 else two).add(key(i), row(i))
    one.flush()
    two.flush()
    assert sorted(rows_in(root)) == list(range(10))
    assert Store(root).unlisted == {}


def test_a_full_disk(root, new_writer):
    """The kernel refuses the third shard: the error says what is lost, and the first two are still there."""
    writer = new_writer()
    for i in range(8):
        writer.add(key(i), row(i))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"3 finished rows could not be written.*before is still valid") as caught:
            writer.add(key(8), row(8, length=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(root)
    assert sorted(rows_in(root)) == list(range(6))
    assert not [path for path in (root / "shards").iterdir() if path.name.endswith(".tmp")]
    writer.flush()  # nothing is tried again
    assert sorted(rows_in(root)) == list(range(6))


def test_death_between_shard_and_manifest_loses_nothing(root, new_writer, monkeypatch):
    writer = new_writer()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_commit", lambda: None)
        for i in range(3):
            writer.add(key(i), row(i))
    assert len(Store(root).unlisted) == 1
    assert sorted(rows_in(root)) == [0, 1, 2]
    repairer = new_writer()
    repairer.repair(Store(root), {})
    assert Store(root).unlisted == {}
    assert Store(root).verify() == [
        problem for problem in Store(root).verify() if problem.file.startswith("references/")
    ]
    assert sorted(rows_in(root)) == [0, 1, 2]


def test_repair_keeps_sound_rows_of_a_damaged_shard(root, new_writer, flip_bit, caplog):
    with new_writer(shard_tokens=100) as writer:
        for i in range(5):
            writer.add(key(i), row(i))
    (path,) = (root / "shards").iterdir()
    at = path.read_bytes().index(row(3).tobytes())
    flip_bit(path, 8 * at + 5)
    store = Store(root)
    with pytest.raises(DamagedFileError, match="row 3"):
        store.shards[path.name].check()
    new_writer().repair(store, {path.name: "damaged"})
    assert "4 of its rows saved" in caplog.text
    assert rows_in(root) == {i: row(i).tolist() for i in (0, 1, 2, 4)}
    assert shard_problems(root) == []
    assert path.exists()  # append-only: nothing is deleted


def test_repair_makes_a_damaged_manifest_again(root, new_writer, flip_bit):
    with new_writer() as writer:
        for i in range(6):
            writer.add(key(i), row(i))
    (manifest,) = (root / "manifests").iterdir()
    flip_bit(manifest, 50)
    store = Store(root)
    new_writer().repair(store, store.damaged())
    repaired = Store(root)
    assert not manifest.exists()
    assert (repaired.problems, repaired.unlisted) == ([], {})
    assert sorted(rows_in(root)) == list(range(6))


def test_repair_of_a_sound_cache_writes_nothing(root, new_writer):
    with new_writer() as writer:
        writer.add(key(0), row(0))
    before = sorted(path.name for path in root.rglob("*"))
    new_writer().repair(Store(root), {})
    assert sorted(path.name for path in root.rglob("*")) == before


def test_repair_removes_what_killed_writers_left(root, new_writer):
    left = root / "shards" / ".w-000000.safetensors.0123.tmp"
    left.write_bytes(b"half a shard")
    new_writer().repair(Store(root), {})
    assert left.exists()  # it may be another writer's, just now
    os.utime(left, (time.time() - 7200,) * 2)
    new_writer().repair(Store(root), {})
    assert not left.exists()

"""Full disks, read-only and moved folders, flipped bits under an open cache, other formats, tokenizers and models."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.reference import CacheError, DamagedFileError, MissingLogpsError, ReferenceCache, files, shards, verify
from fastalign.reference.shards import write_shard

DIGEST = "0123456789abcdef" * 4
SEQUENCES = [([i, 3 * i % 7, i + 1, 5, i % 3], 2) for i in range(24)]


def known(sequence) -> np.ndarray:
    ids, start = sequence
    return (-(np.asarray(ids, np.int64).cumsum() % 997) / 8 - start)[start:].astype(np.float32)


def score(batch):
    return [known(sequence) for sequence in batch]


def build(root, sequences=SEQUENCES, digest=DIGEST, score=score):
    options = {"shard_tokens": 12, "batch_tokens": 20, "progress": False}
    return ReferenceCache.build(root, digest, sequences, score=score, **options)


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def assert_exact(cache, sequences, tally) -> None:
    wrong = [s for s, row in zip(sequences, cache.lookup(sequences), strict=True) if not np.array_equal(row, known(s))]
    tally["numbers lost"] += len(wrong)
    assert wrong == []


def failure_of(call, kind):
    try:
        call()
    except kind as error:
        return error
    return None


class FullFile:
    """A file that takes half of what it is given."""

    def __init__(self, file) -> None:
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_disk_that_fills_up_at_any_moment(tmp_path, monkeypatch, tally, call):
    """The n-th write of a build fails, for every n: the error names the folder, and all that was finished is there."""
    for n in itertools.count(1):
        root, calls = tmp_path / str(n), 0
        build(root, SEQUENCES[:6])

        def fails(*args, original, n=n, **kwargs):
            nonlocal calls
            mode = args[1] if len(args) > 1 else "r"
            if call in ("open", "write") and "b" in str(mode) and "x" not in str(mode):
                return original(*args, **kwargs)  # reading
            calls += 1
            if calls != n:
                return original(*args, **kwargs)
            if call == "write":
                return FullFile(original(*args, **kwargs))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            if call in ("open", "write"):
                patch.setattr(files, "open", lambda *a, **k: fails(*a, original=builtins.open, **k), raising=False)
            else:
                original = getattr(os, call)
                patch.setattr(os, call, lambda *a, original=original, **k: fails(*a, original=original, **k))
            failure = failure_of(lambda root=root: build(root), OSError)
        if failure is None:
            break
        assert failure.errno == errno.ENOSPC
        assert str(root) in str(failure)
        tally["disks filled"] += 1
        cache = ReferenceCache(root, DIGEST)
        assert cache.verify() == []
        assert not list(root.rglob("*.tmp"))
        missing = set(cache.missing(SEQUENCES))
        assert missing.isdisjoint(range(6))
        assert_exact(cache, [s for i, s in enumerate(SEQUENCES) if i not in missing], tally)
        again = build(root)
        assert again.report.computed == len(missing)
        assert_exact(again, SEQUENCES, tally)
    assert n > 5


def as_nobody(work) -> str:
    """What `work` returns in a process without rights to other people's folders (root has them all)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, str(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_read_only_folder(tally):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name) / "cache"
        build(root)
        os.chmod(name, 0o755)
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) | stat.S_IROTH)
            if path.is_dir():
                path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IXUSR)

        def look_up() -> str:
            cache = ReferenceCache.open(root)
            same = [np.array_equal(row, known(s)) for s, row in zip(SEQUENCES, cache.lookup(SEQUENCES), strict=True)]
            return f"{all(same)} {verify(root)} {build(root).report.computed}"  # nothing is missing: nothing to write

        try:
            assert as_nobody(look_up) == "True [] 0"
            more = [*SEQUENCES, ([9, 9, 9], 1)]
            answer = as_nobody(lambda: build(root, more).report.computed)
            assert answer.startswith("PermissionError: ")
            assert str(root) in answer
            assert_exact(ReferenceCache.open(root), SEQUENCES, tally)
        finally:
            for path in (root, *root.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)


@settings(max_examples=30)
@given(data=st.data())
def test_bits_that_flip_under_an_open_cache(tally, data):
    flip_bits(tally, data)


@pytest.mark.long
@settings(max_examples=2000)
@given(data=st.data())
def test_a_thousand_bits_that_flip(tally, data):
    flip_bits(tally, data)


def flip_bits(tally, data) -> None:
    """No number is read unchecked, whatever was checked when the cache was opened."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cache = build(root)
        paths = sorted((root / "shards").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        victims = data.draw(st.lists(st.integers(0, len(paths) - 1), min_size=1, max_size=3))
        for victim in victims:
            path = paths[victim]
            with open(path, "r+b") as file:  # in place, as a disk does it
                position = data.draw(st.integers(0, path.stat().st_size - 1))
                file.seek(position)
                (byte,) = file.read(1)
                file.seek(position)
                file.write(bytes([byte ^ data.draw(st.integers(1, 255))]))
        for sequence in SEQUENCES:
            failure = failure_of(lambda s=sequence: assert_exact(cache, [s], tally), DamagedFileError)
            assert failure is None or Path(failure.path) in paths
        named = {problem.file for problem in cache.verify()}
        changed = {paths[victim] for victim in victims if victims.count(victim) == 1}
        assert {f"shards/{path.name}" for path in changed} <= named
        tally["corruptions found"] += len(changed)
        rebuilt = build(root)
        assert_exact(rebuilt, SEQUENCES, tally)
        assert rebuilt.verify() == []


def test_a_folder_that_moves(tmp_path, tally):
    """An open cache goes on; a build that loses its folder says so, and what it had finished is sound."""
    root, moved = tmp_path / "cache", tmp_path / "moved"
    cache = build(root, SEQUENCES[:6])
    batches = itertools.count()

    def moving(batch):
        if next(batches) == 2:
            root.rename(moved)
        return score(batch)

    with pytest.raises(FileNotFoundError, match=r"could not be written \(No such file or directory\)") as caught:
        build(root, score=moving)
    assert str(root) in str(caught.value)
    assert not root.exists()
    assert_exact(cache, SEQUENCES[:6], tally)
    opened = ReferenceCache.open(moved)
    assert opened.verify() == []
    there = len(opened)
    assert 6 < there < 24
    again = build(moved)
    assert again.report.computed == 24 - there
    assert_exact(again, SEQUENCES, tally)


def test_a_shard_of_a_later_format_is_not_guessed_at(tmp_path, monkeypatch, tally):
    build(tmp_path, SEQUENCES[:6])
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_VERSION", "2")
        keys = [bytes([i]) * 16 for i in range(2)]
        write_shard(tmp_path / "shards" / "later-000000.safetensors", DIGEST, keys, [known(s) for s in SEQUENCES[:2]])
    cache = ReferenceCache.open(tmp_path)
    (problem,) = cache.verify()
    assert problem.file == "shards/later-000000.safetensors"
    assert "fastalign-reference-shard 2" in problem.what
    assert len(cache) == 6
    files.write_json(tmp_path / "format.json", {"format": "fastalign-reference-cache", "version": 2})
    for use in (ReferenceCache.open, verify, build):
        with pytest.raises(CacheError, match="version 2; this fastalign reads fastalign-reference-cache version 1"):
            use(tmp_path)
        tally["bad inputs refused"] += 1


def test_tokenizers_and_models_share_a_folder_and_no_number(tmp_path, tally):
    """Text that two tokenizers split alike has other ids, and so another key; another model has another digest."""
    other = [([(7 * token + 3) % 61 for token in ids], start) for ids, start in SEQUENCES]  # one-to-one on the ids
    cache = build(tmp_path)
    with pytest.raises(MissingLogpsError, match="24 of 24 sequences"):
        cache.lookup(other)
    both = build(tmp_path, other)
    assert_exact(both, SEQUENCES + other, tally)
    second = "f" * 64
    with pytest.raises(CacheError, match="is not among them"):
        ReferenceCache.open(tmp_path, second)
    build(tmp_path, digest=second, score=lambda batch: [known(s) - 1 for s in batch])
    assert_exact(ReferenceCache.open(tmp_path, DIGEST), SEQUENCES + other, tally)
    for sequence, row in zip(SEQUENCES, ReferenceCache.open(tmp_path, second).lookup(SEQUENCES), strict=True):
        assert np.array_equal(row, known(sequence) - 1)
    with pytest.raises(CacheError, match="holds 2 references"):
        ReferenceCache.open(tmp_path)

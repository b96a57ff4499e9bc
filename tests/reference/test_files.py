from __future__ import annotations

import hashlib
import os
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.reference import DamagedFileError
from fastalign.reference.files import (
    canonical_json,
    file_sha256,
    read_json,
    remove_stale_temporaries,
    sha256,
    write_atomic,
    write_json,
)


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "file"
    for data in (b"first, longer", b"second"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]
    assert file_sha256(path) == sha256(b"second") == hashlib.sha256(b"second").hexdigest()


def test_the_order_of_syncs(tmp_path, monkeypatch):
    """Content is on the disk before the name, and the name before the next step: what survives a power cut is whole."""
    path, steps = tmp_path / "file", []
    real_replace = os.replace

    def fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append(("sync", target, os.path.getsize(target) if os.path.isfile(target) else None))

    def replace(source, target):
        steps.append(("rename", str(source), str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(path, b"12345")
    temporary = steps[0][1]
    assert steps == [("sync", temporary, 5), ("rename", temporary, str(path)), ("sync", str(tmp_path), None)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel then refuses, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_stale_temporaries_go_and_young_ones_stay(tmp_path):
    young, old = tmp_path / ".a.1234.tmp", tmp_path / ".b.1234.tmp"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    remove_stale_temporaries(tmp_path)
    assert os.listdir(tmp_path) == [young.name]


def test_canonical_json_does_not_depend_on_order():
    assert (
        canonical_json({"b": [1, 2.5], "a": None})
        == canonical_json({"a": None, "b": [1, 2.5]})
        == b'{"a":null,"b":[1,2.5]}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


CONTENT = {"rows": 3, "names": ["a", "b"], "nested": {"x": 1.5, "none": None, "text": "ä\n"}}


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", CONTENT)
    assert read_json(tmp_path / "a.json") == CONTENT
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_every_flipped_bit_of_a_json_file_is_found(tmp_path, flip_bit):
    path = tmp_path / "a.json"
    write_json(path, CONTENT)
    for bit in range(8 * path.stat().st_size):
        flip_bit(path, bit)
        with pytest.raises(DamagedFileError, match=r"a\.json"):
            read_json(path)
        flip_bit(path, bit)
    assert read_json(path) == CONTENT


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_truncation_of_a_json_file_is_found(tmp_path, data):
    path = tmp_path / "a.json"
    write_json(path, CONTENT)
    path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
    with pytest.raises(DamagedFileError):
        read_json(path)

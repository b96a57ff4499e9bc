from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastalign.reference import DamagedFileError
from fastalign.reference.files import file_sha256
from fastalign.reference.shards import Shard, write_shard


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    keys = [rng.bytes(16) for _ in range(20)]
    return keys, [-rng.random(rng.integers(1, 30), np.float32) for _ in keys]


@pytest.fixture
def shard(tmp_path, rows, digest):
    path = tmp_path / "w-000000.safetensors"
    return path, write_shard(path, digest, *rows)


def test_round_trip(shard, rows, digest):
    path, record = shard
    keys, values = rows
    opened = Shard(path)
    assert (len(opened), opened.tokens, opened.reference) == (20, sum(map(len, values)), digest)
    assert [key.tobytes() for key in opened.read_keys()] == keys
    for index, (key, logps) in enumerate(zip(keys, values, strict=True)):
        row = opened.row(index, key)
        assert row.dtype == np.float32
        assert np.array_equal(row, logps)
    opened.check()
    assert (record.rows, record.tokens) == (20, opened.tokens)
    assert (record.bytes, record.sha256) == (path.stat().st_size, file_sha256(path))


def test_any_safetensors_reader_reads_it(shard, rows):
    tensors = load_file(shard[0])
    assert {name: (tensor.dtype.name, tensor.ndim) for name, tensor in tensors.items()} == {
        "keys": ("uint8", 2),
        "offsets": ("int64", 1),
        "crc": ("uint32", 1),
        "logps": ("float32", 1),
    }
    assert np.array_equal(tensors["logps"], np.concatenate(rows[1]))


def test_rows_need_not_be_contiguous(tmp_path, digest):
    values = np.arange(10, dtype=np.float32)[::2]
    write_shard(tmp_path / "a.safetensors", digest, [b"k" * 16], [values])
    assert np.array_equal(Shard(tmp_path / "a.safetensors").row(0, b"k" * 16), values)


def test_a_row_read_under_another_key_is_refused(shard, rows):
    keys, _ = rows
    with pytest.raises(DamagedFileError, match=r"w-000000\.safetensors: the checksum of its row 3 does not fit"):
        Shard(shard[0]).row(3, keys[4])


def reads_as_written(path, rows) -> bool:
    """False: the damage was noticed. Fails if a wrong number comes out."""
    keys, values = rows
    try:
        opened = Shard(path)
        found = {key.tobytes(): index for index, key in enumerate(opened.read_keys())}
        for key, logps in zip(keys, values, strict=True):
            assert np.array_equal(opened.row(found[key], key), logps)
        opened.check()
    except DamagedFileError as error:
        if str(path) not in str(error):
            raise
        return False
    return True


@given(st.integers(0, 2**40))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_gives_a_wrong_number(shard, rows, flip_bit, bit):
    path, record = shard
    flip_bit(path, bit)
    assert file_sha256(path) != record.sha256
    assert not reads_as_written(path, rows)
    flip_bit(path, bit)
    assert reads_as_written(path, rows)


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_truncation_is_found(tmp_path, shard, rows, data):
    whole = shard[0].read_bytes()
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert not reads_as_written(path, rows)


def test_appended_bytes_are_found(shard, rows):
    with open(shard[0], "ab") as file:
        file.write(b"\0" * 4)
    assert not reads_as_written(shard[0], rows)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "none.safetensors")


def test_foreign_safetensors_are_refused(tmp_path, digest):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(DamagedFileError, match="not a readable shard"):
        Shard(tmp_path / "model.safetensors")


def test_open_shards_hold_no_file_descriptors(shard, rows):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("needs /proc to count file descriptors")
    opened = [Shard(shard[0]) for _ in range(200)]
    assert all(np.array_equal(one.row(0, rows[0][0]), rows[1][0]) for one in opened)
    assert len(os.listdir("/proc/self/fd")) <= before + 2

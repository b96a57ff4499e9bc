"""The choice of tile sizes. What the choices cost on each architecture is test_compiled.py's business."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fastalign.kernels import _tiles

ARCHITECTURES = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "gfx90a",
    "gfx942",
    "gfx950",
)


@pytest.fixture
def user_tables(tmp_path, monkeypatch):
    """Write the user's own table of an architecture: write("sm_90", {...})."""
    monkeypatch.setattr(_tiles, "USER_TABLES", tmp_path)
    _tiles.table.cache_clear()

    def write(arch, content):
        (tmp_path / f"{arch}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        _tiles.table.cache_clear()

    yield write
    _tiles.table.cache_clear()


@pytest.mark.parametrize("v", [1, 2, 127, 128, 129, 4096, 4097, 151936])
def test_row_tiles(v):
    tiles = _tiles.row_tiles(v)
    assert tiles.block & (tiles.block - 1) == 0
    assert tiles.block >= min(v, 4096)
    assert tiles.block <= 16 * 32 * max(1, tiles.num_warps)


def test_tables_of_the_package():
    """Every entry is one the code knows; every table belongs to an architecture with a known shared memory."""
    tables = {path.stem: _tiles.read_table(path) for path in _tiles.TABLES.glob("*.json")}
    assert tables.keys() >= {"sm_80", "sm_90", "sm_100"}
    for arch, kernels in tables.items():
        assert arch in _tiles.SHARED_MEMORY_LIMIT
        for case, sizes in kernels["fused_forward"].items():
            assert case in {"16-bit", "16-bit unaligned", "32-bit"}
            dtype = torch.float32 if case == "32-bit" else torch.bfloat16
            assert (
                dataclasses.asdict(_tiles.fused_tiles(arch, dtype, aligned="unaligned" not in case)).items()
                >= sizes.items()
            )


def test_the_users_table_goes_first(user_tables):
    ours, theirs = _tiles.fused_tiles("sm_90", torch.bfloat16), _tiles.fused_tiles("sm_90", torch.float32)
    user_tables(
        "sm_90", {"about": "here", "fused_forward": {"16-bit": {"group_n": 8}}, "row_kernels": {"all": {"block": 1024}}}
    )
    assert _tiles.fused_tiles("sm_90", torch.bfloat16) == dataclasses.replace(ours, group_n=8)
    assert _tiles.fused_tiles("sm_90", torch.float32) == theirs
    assert _tiles.row_tiles(131072, "sm_90").block == 1024
    assert _tiles.row_tiles(131072).block == 4096


def test_tables_that_cannot_be(user_tables):
    user_tables("sm_90", {"fused_forward": {"16-bit": {"block_m": 8}}})
    with pytest.raises(ValueError, match=r"'fused_forward', '16-bit' for sm_90: unknown \['block_m'\], there are"):
        _tiles.fused_tiles("sm_90", torch.bfloat16)
    for broken in ("{", "[1]", '{"fused_forward": 3}', '{"fused_forward": {"16-bit": 3}}'):
        user_tables("sm_80", broken)
        with pytest.raises(ValueError, match=r"sm_80.json is no table of tile sizes .*fastalign bench tune"):
            _tiles.fused_tiles("sm_80", torch.bfloat16)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_operands_fit_shared_memory(arch, dtype, aligned):
    """The pipeline's buffers, counted generously; architectures without an entry get 64 KiB."""
    tiles = _tiles.fused_tiles(arch, dtype, aligned=aligned)
    stage = (tiles.block_n + tiles.block_v) * tiles.block_h * dtype.itemsize
    stages = tiles.num_stages - 1 if arch.startswith("gfx") else tiles.num_stages
    assert stage * stages <= _tiles.SHARED_MEMORY_LIMIT.get(arch, 65_536)
    accumulator = tiles.block_n * tiles.block_v // (tiles.num_warps * 32)
    assert accumulator <= 128, "more than half of a thread's registers"


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"arch must look like 'sm_90' or 'gfx942', got 'hopper'"):
        _tiles.fused_tiles("hopper", torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_n": 48}, "block_n must be a power of two, got 48"),
        ({"parts": 0}, "parts must be a power of two, got 0"),
        ({"num_stages": 0}, "num_stages must be positive, got 0"),
        ({"split_v": 100}, "split_v must be a multiple of block_v=256, got 100"),
    ],
)
def test_impossible_tiles(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_tiles.fused_tiles("sm_90", torch.bfloat16), **change)

"""Launchers of the C++ row kernels (csrc/cpu) on vocabulary-major CPU tiles; the contract is that of the row functions.

Tiles are (n, v) views whose row index is contiguous: tile.stride(0) == 1. Callers have checked dtypes and devices.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]


def why_unavailable() -> str | None:
    """None: importing this module already proved that the extension loads."""
    return None


def instruction_set() -> str:
    """Of the kernels in use: "avx512", "avx2" or "baseline"."""
    return _C.instruction_set()


@functools.cache
def _share_openmp() -> None:
    """Hand the kernels torch's OpenMP runtime. Its symbols are private to torch's libraries, so it is opened by its
    path.
    """
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    candidates = [
        p for name in ("libgomp*", "libiomp5*", "libomp*") for p in sorted(glob.glob(os.path.join(folder, name)))
    ]
    for path in [*candidates, "libgomp.so.1"]:
        try:
            library = ctypes.CDLL(
                path, mode=getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_LAZY
            )  # only if torch has loaded it
            addresses = [
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                for name in ("GOMP_parallel", "omp_get_thread_num")
            ]
        except (OSError, AttributeError):
            continue
        _C.use_openmp(*addresses)
        return


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(tile: Tensor, *rows: Tensor | None) -> None:
    _share_openmp()
    assert tile.stride(0) == 1 or tile.shape[0] <= 1, f"tiles must be vocabulary-major, got strides {tile.stride()}"
    assert all(row is None or row.is_contiguous() for row in rows), "per-row vectors must be contiguous"


def row_stats(
    tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, values: Tensor, argmax: Tensor | None, *, in_scale:
    float,
    out_scale: float, softcap: bool, entropy: bool, sum_sq: bool, sum_z: bool,
) -> None:  # fmt: skip
    """tile (n, v) float32; bias (v,) float32; targets (n,) int64; values (6, n) float32 and argmax (n,) int64, in
    place.
    """
    _check(tile, bias, targets, values, argmax)
    n, v = tile.shape
    logits = _C.Logits(in_scale, out_scale, softcap, _address(bias))
    _C.row_stats(
        tile.data_ptr(), tile.stride(1), n, v, logits, targets.data_ptr(), v0, values.data_ptr(), _address(argmax),
        entropy,
        sum_sq, sum_z, torch.get_num_threads(),
    )  # fmt: skip


def row_grad(
    tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, max: Tensor, log_sum: Tensor, base: Tensor, target:
    Tensor,
    entropy: Tensor | None, out: Tensor, rows: Tensor | None = None, *, in_scale: float, out_scale: float,
    softcap: bool,
) -> None:  # fmt: skip
    """tile (n, v) float32, or bfloat16 exponentials; out (n, v) float32, which may be the tile. rows (m,) int64: the
    tile's rows to work on, which must ascend; out is then (m, v), and may be tile[:m]."""
    _check(tile, bias, targets, max, log_sum, base, target, entropy, rows)
    assert out.dtype == torch.float32
    assert out.stride(0) == 1 or out.shape[0] <= 1
    n, v = out.shape
    logits = _C.Logits(in_scale, out_scale, softcap, _address(bias))
    _C.row_grad(
        tile.data_ptr(), tile.stride(1), n, v, tile.dtype == torch.bfloat16, logits, targets.data_ptr(), v0,
        max.data_ptr(),
        log_sum.data_ptr(), base.data_ptr(), target.data_ptr(), _address(entropy), out.data_ptr(), out.stride(1),
        _address(rows), torch.get_num_threads(),
    )  # fmt: skip


def row_exp(
    tile: Tensor, bias: Tensor | None, max: Tensor, out: Tensor, *, in_scale: float, out_scale: float, softcap: bool
) -> None:
    """tile (n, v) float32; out (n, v) bfloat16 = exp(z − max)."""
    _check(tile, bias, max)
    assert out.dtype == torch.bfloat16
    n, v = tile.shape
    logits = _C.Logits(in_scale, out_scale, softcap, _address(bias))
    _C.row_exp(
        tile.data_ptr(),
        tile.stride(1),
        n,
        v,
        logits,
        max.data_ptr(),
        out.data_ptr(),
        out.stride(1),
        torch.get_num_threads(),
    )


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """rewards, values (B, T) float32 and mask (B, T) bool, contiguous -> (advantages, returns), (B, T) float32."""
    _share_openmp()
    assert rewards.dtype == values.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert all(x.is_contiguous() and x.shape == rewards.shape for x in (rewards, values, mask))
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _C.gae(
        rewards.data_ptr(), values.data_ptr(), mask.data_ptr(), *rewards.shape, gamma, lam, advantages.data_ptr(),
        returns.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return advantages, returns

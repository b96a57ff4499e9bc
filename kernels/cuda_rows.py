"""Launcher of the CUDA row kernel (csrc/cuda), which holds a row in the shared memory of a cluster of thread blocks.

For compute capability 9.0 and later, where the extension `_cuda` was built (nvcc at installation). Callers have checked
shapes, dtypes and devices; what would corrupt memory is checked here.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _cuda  # type: ignore[attr-defined]
from ._alias import narrow_alias

MAX_COLUMNS: int = _cuda.MAX_COLUMNS
"""The largest vocabulary of which a cluster can hold a row."""

_ELEMENTS = {
    torch.float32: _cuda.Element.float32,
    torch.bfloat16: _cuda.Element.bfloat16,
    torch.float16: _cuda.Element.float16,
}


@functools.cache
def why_unavailable(device: int) -> str | None:
    """Why a device cannot run the kernels, None when it can."""
    return _cuda.why_not(device)


def row_loss_grad(
    tile: Tensor,  # (n, V) float32, column stride 1: the whole vocabulary
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,) int64
    values: Tensor,  # (6, n) float32, contiguous: MAX, SUM, TARGET, and with `sums` ENT, SUM_SQ, SUM_Z; written
    argmax: Tensor | None,  # (n,) int64; written with `sums`
    grad_logps: Tensor,  # (n,) float32
    grad_entropy: Tensor | None,  # (n,) float32; needs `sums`
    out: Tensor,  # (n, V) float32, bfloat16 or float16, column stride 1: the tile, a narrower view with its address and
    #               row pitch, or other memory
    *,
    in_scale: float,
    out_scale: float,
    softcap: bool,
    sums: bool,
) -> None:
    """Fill the state of each row and write ∂L/∂u, rounded once, to `out`, from one reading of the tile.

    Rows of tile and out that start on 16 bytes (a row pitch that is a multiple of 16, here) are copied in bulk.

    Raises:
        ValueError: `out` overlaps `tile` in another way; a stride that is not 1; more than MAX_COLUMNS columns;
            grad_entropy without sums.
        RuntimeError: the launch failed.
    """
    n, v = tile.shape
    if n == 0 or v == 0:
        return
    if v > MAX_COLUMNS:
        raise ValueError(f"a cluster holds rows of up to {MAX_COLUMNS} columns, got {v}; take backend='triton'")
    if tile.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"column strides must be 1, got {tile.stride(1)} (tile) and {out.stride(1)} (out)")
    if grad_entropy is not None and not sums:
        raise ValueError("grad_entropy was given without sums=True: the gradient needs each row's entropy")
    narrow_alias(tile, out)
    bias = None if bias is None else bias.float().contiguous()
    targets, grad_logps = targets.contiguous(), grad_logps.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    with torch.cuda.device_of(tile):
        _cuda.row_loss_grad(
            tile.data_ptr(), tile.stride(0), n, v, in_scale, out_scale, softcap, _address(bias), targets.data_ptr(),
            values.data_ptr(), _address(argmax), grad_logps.data_ptr(), _address(grad_entropy), out.data_ptr(),
            out.stride(0), _ELEMENTS[out.dtype], sums, torch.cuda.current_stream(tile.device).cuda_stream,
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

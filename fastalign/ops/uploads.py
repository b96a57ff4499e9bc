"""Host integers on a device: row numbers and boundaries, which a call needs there once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """One-dimensional integers on `device`, copied if they are elsewhere.

    While a CUDA graph is being captured nothing is copied from the host, whose memory a replay would read again: runs
    of equal steps, of which rows and boundaries consist, are written by kernels that hold their numbers.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.device.type == device.type:
        return tensor
    if tensor.device.type == "cpu" and _capturing(device):
        return _from_runs(tensor, device)
    return tensor.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _from_runs(host: Tensor, device: torch.device) -> Tensor:
    """The same integers, written on the device run by run."""
    out = torch.empty(host.shape, dtype=host.dtype, device=device)
    values = host.numpy()
    start = 0
    while start < len(values):
        stop = start + 1
        if stop < len(values):
            step = int(values[stop]) - int(values[start])
            change = np.flatnonzero(np.diff(values[start:]) != step)
            stop = start + int(change[0]) + 1 if len(change) else len(values)
        if stop - start < 2 or step == 0:
            out[start:stop].fill_(int(values[start]))
        else:
            torch.arange(int(values[start]), int(values[stop - 1]) + (1 if step > 0 else -1), step, out=out[start:stop])
        start = stop
    return out


def covers(rows: Tensor, count: int) -> bool:
    """Whether rows on the host are 0 … count − 1; False where asking would wait for a device."""
    if rows.shape[0] != count or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(torch.equal(rows, torch.arange(count)))

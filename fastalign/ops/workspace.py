"""Working memory of a call: named buffers that its tiles share, and one that the next call takes over."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.schedule import DEFAULT_WORKSPACE_MB

# The last call's largest CPU buffer, for the next call: a fresh one costs a page fault for every 4 KiB, 3 % of a frozen
# head's time. Never more than the default budget; CUDA's allocator does the same by itself.
_idle: list[Tensor] = []


def free_workspace() -> None:
    """Give back the CPU workspace that is kept for the next call (at most the default budget, 128 MiB)."""
    _idle.clear()


class Workspace:
    """Buffers of one call on one device, by name and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A view of a reused allocation; it grows once to the largest shape asked for, which the planner foresaw."""
        size = shape[0] * shape[1]
        flat = self._buffers.get((name, dtype))
        if flat is None or flat.numel() < size:
            self._buffers.pop((name, dtype), None)
            flat = _take_idle(size) if name == "tile" and dtype == torch.float32 and self.device.type == "cpu" else None
            if flat is None:
                flat = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = flat
        return flat[:size].view(shape)

    def release(self) -> None:
        """The call is over: its tile may serve the next one."""
        flat = self._buffers.pop(("tile", torch.float32), None)
        if flat is not None and flat.device.type == "cpu" and flat.nbytes <= DEFAULT_WORKSPACE_MB["cpu"] * 2**20:
            _idle[:] = [flat]


def _take_idle(size: int) -> Tensor | None:
    """The idle buffer if it holds `size` elements and is not more than twice as large; a smaller one is let go."""
    try:
        flat = _idle.pop()
    except IndexError:  # none, or another thread was faster
        return None
    return flat if size <= flat.numel() <= 2 * size else None

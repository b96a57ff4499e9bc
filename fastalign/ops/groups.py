"""Which scored rows, sequences and groups of a streamed loss go together: integers on the host, worked out once per
call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastalign.ops.arguments import check_boundaries, scored_rows
from fastalign.ops.uploads import on_device
from fastalign.types import LinearLogps


@dataclass(slots=True)
class Chunk:
    """Some whole groups: their sequences (ascending) and the positions of their rows among all scored rows (ascending).

    uploaded: both on the device, where they are no ranges and several chunks share one copy (`Layout.upload`).
    """

    sequences: np.ndarray
    positions: np.ndarray
    cu_seqlens: Tensor | None
    num_groups: int
    uploaded: tuple[Tensor, Tensor] | None = None

    def pick(self, layout: Layout) -> dict[str, Tensor]:
        """This chunk's part of the loss's inputs."""
        return {name: self._part(layout, name, tensor) for name, tensor in layout.inputs.items()}

    def _part(self, layout: Layout, name: str, tensor: Tensor) -> Tensor:
        if name not in layout.per_token:
            index = None if self.uploaded is None else self.uploaded[1]
            return _taken(tensor, self.sequences, index)
        numbers = layout.row_numbers[self.positions]
        if _span(numbers) is not None:
            return _taken(tensor, numbers, None)
        first, last, index = self.rows(layout, tensor.device)
        if index is None:
            rows = layout.rows_on(tensor.device)
            assert rows is not None
            index = rows[first:last]
        return tensor.index_select(0, index)

    def rows(self, layout: Layout, device: torch.device) -> tuple[int, int, Tensor | None]:
        """(first, last, index): scored rows first:last where they are consecutive, and None; else the rows of hidden in
        `index`, on `device`, which first:last spans."""
        span = _span(self.positions)
        if span is not None:
            return *span, None
        index = self.positions if self.uploaded is None or self.uploaded[0].device != device else self.uploaded[0]
        index, rows = on_device(index, device), layout.rows_on(device)
        return 0, len(self.positions), index if rows is None else rows.index_select(0, index)

    def losses(self, loss_fn: Callable[..., Tensor], layout: Layout, scored: LinearLogps) -> Tensor:
        losses = loss_fn(scored, self.cu_seqlens, **self.pick(layout))
        expected = (len(self.positions) if layout.by_token else self.num_groups,)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != expected:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn must return one loss per {'token' if layout.by_token else 'group'}, shape {expected}; "
                f"got {got}"
            )
        return losses


@dataclass(slots=True)
class Layout:
    row_numbers: np.ndarray  # (n,) flat indices of scored tokens, ascending
    cu: np.ndarray  # (S + 1,) over the scored tokens
    members: list[np.ndarray]  # group -> its sequences; empty when by_token
    by_token: bool
    inputs: dict[str, Tensor]
    per_token: set[str]
    every: bool = False  # all rows of hidden are scored
    _rows: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, groups: Tensor | Sequence[int] | str | None,
        rows: Tensor | None, ignore_index: int, V: int, inputs: Mapping[str, Tensor],
    ) -> Layout:  # fmt: skip
        # the one synchronisation of a call whose rows are not on the host already
        host = (targets.reshape(-1) != ignore_index if rows is None else rows).cpu()
        rows = host.nonzero()[:, 0] if rows is None else host
        if targets.device.type == "cpu":
            scored_rows(targets.reshape(-1), rows, ignore_index, V)  # in range
        row_numbers = rows.numpy()
        if len(row_numbers) > 1 and not (np.diff(row_numbers) > 0).all():
            raise ValueError("rows must ascend, without repeats, for a loss over sequences")
        by_token = isinstance(groups, str)
        if by_token and groups != "tokens":
            raise ValueError(f"groups must be integers per sequence, None or 'tokens', got {groups!r}")
        bounds = _boundaries(hidden, targets, cu_seqlens, by_token)
        cu = np.searchsorted(row_numbers, bounds)
        members = [] if by_token else _members(groups, len(bounds) - 1)  # type: ignore[arg-type]
        flat, per_token = _inputs(inputs, targets, len(bounds) - 1, by_token)
        every = len(row_numbers) == targets.numel() and _span(row_numbers) is not None
        return cls(row_numbers, cu, members, by_token, flat, per_token, every)

    @property
    def n(self) -> int:
        return len(self.row_numbers)

    @property
    def rows(self) -> Tensor:
        return torch.from_numpy(self.row_numbers)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """The scored rows on a device, copied there once; None: all of them."""
        if self.every:
            return None
        if device not in self._rows:
            self._rows[device] = on_device(self.row_numbers, device)
        return self._rows[device]

    def upload(self, chunks: list[Chunk], device: torch.device) -> None:
        """Copy to the device, at once, what its chunks will ask for there."""
        if device.type == "cpu" or all(_span(c.positions) and _span(c.sequences) for c in chunks):
            return
        positions = on_device(np.concatenate([c.positions for c in chunks]), device)
        sequences = on_device(np.concatenate([c.sequences for c in chunks]), device)
        sizes = [len(c.positions) for c in chunks], [len(c.sequences) for c in chunks]
        for chunk, *parts in zip(chunks, positions.split(sizes[0]), sequences.split(sizes[1]), strict=True):
            chunk.uploaded = parts[0], parts[1]

    def everything(self) -> Chunk:
        if self.by_token:
            return Chunk(np.arange(0), np.arange(self.n), None, self.n)
        return Chunk(
            np.arange(len(self.cu) - 1),
            np.arange(self.n),
            torch.from_numpy(self.cu.astype(np.int32)),
            len(self.members),
        )

    def chunk(self, first: int, last: int) -> Chunk:
        """Groups (tokens) first:last."""
        if self.by_token:
            return Chunk(np.arange(0), np.arange(first, last), None, last - first)
        sequences = np.sort(np.concatenate(self.members[first:last]))
        lengths = self.cu[sequences + 1] - self.cu[sequences]
        cu = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(cu[-1]) + np.repeat(self.cu[sequences] - cu[:-1], lengths)
        return Chunk(sequences, positions, torch.from_numpy(cu.astype(np.int32)), last - first)

    def group_rows(self) -> np.ndarray:
        if self.by_token:
            return np.ones(self.n, dtype=np.int64)
        lengths = np.diff(self.cu)
        return np.array([lengths[m].sum() for m in self.members], dtype=np.int64)

    def chunks(self, capacity: int) -> list[Chunk]:
        """Consecutive groups packed into chunks of at most `capacity` rows; a larger group is a chunk of its own."""
        if self.by_token:
            return [self.chunk(i, min(i + capacity, self.n)) for i in range(0, self.n, capacity)]
        chunks, first, filled = [], 0, 0
        for i, size in enumerate(self.group_rows()):
            if i > first and filled + size > capacity:
                chunks.append(self.chunk(first, i))
                first, filled = i, 0
            filled += size
        if self.members:
            chunks.append(self.chunk(first, len(self.members)))
        return chunks


def _span(numbers: np.ndarray) -> tuple[int, int] | None:
    """(first, last) of ascending numbers that are all of first:last."""
    if not len(numbers):
        return 0, 0
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    return (first, last) if last - first == len(numbers) else None


def _taken(tensor: Tensor, numbers: np.ndarray, uploaded: Tensor | None) -> Tensor:
    """Entries of the first dimension; a view where they are consecutive."""
    span = _span(numbers)
    if span is not None:
        return tensor if span == (0, tensor.shape[0]) else tensor[span[0] : span[1]]
    index = on_device(numbers, tensor.device) if uploaded is None or uploaded.device != tensor.device else uploaded
    return tensor.index_select(0, index)


def _boundaries(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, by_token: bool) -> np.ndarray:
    if by_token:
        return np.array([0, targets.numel()])
    if cu_seqlens is None:
        if targets.dim() != 2:
            raise ValueError(
                f"give padded hidden (B, T, H), or packed hidden (N, H) with cu_seqlens; got hidden "
                f"{tuple(hidden.shape)}"
            )
        return np.arange(targets.shape[0] + 1) * targets.shape[1]
    if targets.dim() != 1:
        raise ValueError(f"cu_seqlens goes with packed hidden (N, H), got hidden {tuple(hidden.shape)}")
    check_boundaries(cu_seqlens, hidden.device)
    bounds = cu_seqlens.cpu().numpy()
    if bounds[0] != 0 or bounds[-1] != targets.numel() or (np.diff(bounds.astype(np.int64)) < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {targets.numel()}, got "
            f"{bounds.tolist()[:8]}{' …' if len(bounds) > 8 else ''}"
        )
    return bounds


def _members(groups: Tensor | Sequence[int] | None, S: int) -> list[np.ndarray]:
    """Sequences of each group, groups in the order of their first sequence."""
    if groups is None:
        return list(np.arange(S)[:, None])
    ids = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if ids.shape != (S,):
        raise ValueError(f"groups must give one integer per sequence, shape ({S},); got {ids.shape}")
    found: dict[int, list[int]] = {}
    for sequence, group in enumerate(ids.tolist()):
        found.setdefault(group, []).append(sequence)
    return [np.array(m) for m in found.values()]


def _inputs(
    inputs: Mapping[str, Tensor], targets: Tensor, S: int, by_token: bool
) -> tuple[dict[str, Tensor], set[str]]:
    flat: dict[str, Tensor] = {}
    per_token: set[str] = set()
    for name, tensor in inputs.items():
        if tensor.device.type not in ("cpu", targets.device.type) or tensor.is_complex():
            raise ValueError(
                f"inputs[{name!r}] is {tensor.dtype} on {tensor.device}, accepted are real numbers on "
                f"{targets.device} or on the host"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"inputs[{name!r}] requires grad, but a streamed loss gives gradients to the head only; detach it"
            )
        if (
            not by_token
            and tensor.dim() >= 1
            and tensor.shape[0] == S
            and (tensor.dim() == 1 or tensor.shape != targets.shape)
        ):
            flat[name] = tensor
        elif tensor.shape == targets.shape:
            flat[name] = tensor.reshape(-1)
            per_token.add(name)
        else:
            accepted = f"per token {tuple(targets.shape)}" + ("" if by_token else f" or per sequence ({S}, ...)")
            raise ValueError(f"inputs[{name!r}] must be {accepted}, got {tuple(tensor.shape)}")
    return flat, per_token

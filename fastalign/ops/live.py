"""Rows without a gradient on an accelerator: left out of its gradient GEMMs though the host never learns how many.

On the CPU `rows.live_rows` knows the rows and every GEMM shrinks. On an accelerator the coefficients are there and the
library's GEMMs take their sizes from the host, so kernels of ours read the number of rows from device memory
(fastalign.kernels.live_gemm). The tile stays as it is: the row kernel writes every row's gradient, zeros where there is
none, and only what is multiplied changes.

    skip_rows="always"   those kernels, whatever the rows are: no state, and a captured graph skips anew at every replay
    skip_rows="never"    the library's GEMMs over all rows
    skip_rows="auto"     those kernels where the last known share of live rows lies below what they cost more

What is known is a count that an earlier call of the same kind sent to pinned memory, asynchronously; a call looks
whether it has arrived and never waits for it. Its arrival depends on time, so which GEMMs "auto" takes may differ from
run to run; results then differ as two orders of the same float32 sums do, before the one rounding at the end, and in
nothing else. Under torch.use_deterministic_algorithms "auto" is "never". While a graph is captured nothing is sent or
looked at: the graph has the GEMMs that the share known before it speaks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import backends
from fastalign.ops import rows as R
from fastalign.ops.tile_sizes import align

if TYPE_CHECKING:
    from fastalign.ops.tiles import Block, Tiles

SKIP_ROWS = ("auto", "never", "always")

# Share of live rows below which our GEMMs over them take less time than the library's over all: their relative speed,
# less a few percent for finding and gathering the rows. Estimates; a GPU's owner measures them with the suite.
WORTH_BELOW = {"sm_80": 0.75, "sm_90": 0.8, "sm_100": 0.5, "gfx942": 0.5}
ENOUGH_ROWS = 1024  # GEMMs of fewer are bound by reading the weight
PATIENCE = 8  # calls of a kind whose rows are mostly alive, of which one is counted


def check_skip_rows(skip_rows: str, backend: str, hidden: Tensor) -> None:
    """Raise ValueError unless it is one of SKIP_ROWS that the backend can serve."""
    if skip_rows not in SKIP_ROWS:
        raise ValueError(f"skip_rows must be one of {SKIP_ROWS}, got {skip_rows!r}")
    if skip_rows == "always" and hidden.device.type == "cuda":
        found = backends.resolve(backend, hidden)
        if not served(found, hidden.device):
            raise ValueError(
                f"skip_rows='always' needs Triton's kernels on a GPU, but the backend is {found.name!r}; take "
                "backend='triton', or skip_rows='auto'"
            )


def served(backend: backends.Backend, device: torch.device) -> bool:
    """Whether the kernels can serve a backend's tiles: Triton's, on an accelerator or interpreted."""
    return backend.name in ("triton", "cuda") and (device.type == "cuda" or backends.interpreting())


@dataclass(slots=True)
class LiveRows:
    """Rows of one block that have a gradient, on the device, and the block's GEMMs over them alone.

    index: (n,) int64, all rows of the block, live ones in front, each part ascending; count: (1,) int32, how many.
    where: (n,) int64, the rows of hidden that these are. front: (≥ n, H), the inputs of live rows, in front of zeros
    as far as `add_depth` reads.
    """

    index: Tensor
    count: Tensor
    where: Tensor
    front: Tensor
    arch: str
    programs: int

    def scale(self, factors: Tensor) -> None:
        """Multiply the live rows' inputs by theirs of factors (n,)."""
        self.front[: len(self.index)].mul_(factors.index_select(0, self.index)[:, None])

    def logits(self, weight: Tensor, out: Tensor) -> None:
        """Head outputs of live rows, to their own rows of out (≥ n, v); other rows stay as they are."""
        _kernels().rows_matmul(
            self.front, weight.t(), self.count, out, out_index=self.index, arch=self.arch, programs=self.programs
        )  # fmt: skip

    def add_rows(self, out: Tensor, grad: Tensor, weight: Tensor, *, first: bool) -> None:
        """Rows of a block, out (≥ n, H), = (first) or += grad @ weight; 0 where they are not alive."""
        if first:
            out.zero_()
        _kernels().rows_matmul(
            grad, weight, self.count, out, index=self.index, out_index=self.index, start=None if first else out,
            arch=self.arch, programs=self.programs,
        )  # fmt: skip

    def store_rows(
        self, sink: Tensor, grad: Tensor, weight: Tensor, *, factors: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Live rows of a sink (N, H) = scale · factors · (grad @ weight), factors (n,); others stay as they are."""
        _kernels().rows_matmul(
            grad, weight, self.count, sink, index=self.index, out_index=self.where, factors=factors, scale=scale,
            arch=self.arch, programs=self.programs,
        )  # fmt: skip

    def add_depth(self, out: Tensor, grad: Tensor, *, first: bool, scale: Tensor | None = None) -> None:
        """out (v, H) = (first) or += scale · gradᵀ @ inputs, over live rows."""
        _kernels().depth_matmul(
            grad, self.front, self.count, out, index=self.index, start=None if first else out, scale=scale,
            arch=self.arch, programs=self.programs,
        )  # fmt: skip


def find(tiles: Tiles, block: Block, coef: R.RowCoef) -> LiveRows | None:
    """The live rows of a block on an accelerator, where its GEMMs should go over them alone; None: over all rows.

    They take the memory of the block's `h` if that is a copy.
    """
    if tiles.vocab_major or tiles.skip_rows == "never" or not block.n or not served(tiles.backend, tiles.device):
        return None
    if tiles.skip_rows == "always":
        return _live_rows(tiles, block, _partition(coef))
    if tiles.operand.itemsize != 2 or block.n < ENOUGH_ROWS or torch.are_deterministic_algorithms_enabled():
        return None
    share = _shares.setdefault(Kind((tiles.V, tiles.hidden.shape[1]), tiles.device), Share())
    below = WORTH_BELOW.get(backends.architecture(tiles.device), min(WORTH_BELOW.values()))
    captured = tiles.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = share.known if captured else share.look()
    skips = known is not None and known < below
    counts = not captured and share.wants_count(below)
    if not skips and not counts:
        return None
    found = _partition(coef)
    if counts:
        share.send(found[1], block.n)
    return _live_rows(tiles, block, found) if skips else None


def _partition(coef: R.RowCoef) -> tuple[Tensor, Tensor]:
    return _kernels().live_rows(coef.base, coef.target, coef.entropy)


def _live_rows(tiles: Tiles, block: Block, found: tuple[Tensor, Tensor]) -> LiveRows:
    index, count = found
    where = index + block.start if block.index is None else block.index.index_select(0, index)
    front = tiles.workspace.buffer("rows", (align(block.n), tiles.hidden.shape[1]), tiles.operand)
    _kernels().gather_rows(tiles.hidden, where, count, front)
    arch, programs = backends.architecture(tiles.device), backends.multiprocessors(tiles.device)
    return LiveRows(index, count, where, front, arch, programs)


class _Kernels(NamedTuple):
    live_rows: Callable[..., tuple[Tensor, Tensor]]
    gather_rows: Callable[..., None]
    rows_matmul: Callable[..., None]
    depth_matmul: Callable[..., None]


def _kernels() -> _Kernels:
    from fastalign.kernels import live_gemm, live_rows

    return _Kernels(live_rows.live_rows, live_rows.gather_rows, live_gemm.rows_matmul, live_gemm.depth_matmul)


# ---- what "auto" goes by


class Kind(NamedTuple):
    """Calls that are taken to have similar shares of live rows: those of one head on one device."""

    shape: tuple[int, int]
    device: torch.device


class Share:
    """The last known share of live rows of one kind of calls."""

    def __init__(self) -> None:
        self.known: float | None = None
        self._sent: tuple[Callable[[], bool], Tensor, int] | None = None
        self._host: Tensor | None = None
        self._calls = 0

    def look(self) -> float | None:
        """The share, after taking note of a count that has arrived."""
        if self._sent is not None and self._sent[0]():
            _, host, n = self._sent
            self.known, self._sent = float(host.numpy()[0]) / n, None
        return self.known

    def wants_count(self, below: float) -> bool:
        """Whether this call should send its count: where rows are skipped or nothing is known, else now and then."""
        self._calls += 1
        often = self.known is None or self.known < below
        return self._sent is None and (often or self._calls % PATIENCE == 0)

    def send(self, count: Tensor, n: int) -> None:
        """Copy a count of n rows to the host, behind the work that is queued."""
        if count.device.type != "cuda":
            self._sent = (lambda: True), count.clone(), n
            return
        if self._host is None:
            self._host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        self._host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = event.query, self._host, n


_shares: dict[Kind, Share] = {}


def forget_shares() -> None:
    """Forget the shares of live rows that skip_rows="auto" goes by."""
    _shares.clear()

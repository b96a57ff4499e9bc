"""One call of the head on an accelerator, in numbers: what the GPU planner and its time model share."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.ops.devices import Device
from fastalign.ops.plans import Needs

SPLIT = 1024  # columns of a unit of the fused forward's work
GATHER_BYTES = 2**24  # rows that it copies side by side at a time


def pitch(columns: int) -> int:
    """Columns from one row of a tile to the next: a multiple of 16, by which Triton knows that rows of 16-bit elements,
    picked by index, can be copied 16 bytes at a time."""
    return -(-columns // 16) * 16


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which kernels that multiply and reduce in one can serve a call: its dtypes, its backend, its options.

    forward: statistics without logits in memory. exponentials: those, and exp(z − reference) of each logit in 16 bits.
    """

    forward: bool = False
    exponentials: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """Sizes, and what the tensors ask for.

    size, weight_size: bytes of an element of hidden (the compute dtype) and of weight
    rounds: the weight is rounded to the compute dtype on the way, slab by slab
    bf16: hidden is bfloat16, whose range holds exponentials relative to any reference
    cacheable: exponentials can serve the backward (no softcap, no entropy)
    gathered: the rows that count have to be copied together
    sums: float32 numbers that the fused forward keeps for a row and split: max, Σ exp and those asked for
    piece_rows: of hidden's gradient, where one GEMM over the whole vocabulary writes them to float32 scratch
    """

    n: int
    H: int
    V: int
    size: int
    weight_size: int
    rounds: bool
    bf16: bool
    cacheable: bool
    gathered: bool
    needs: Needs
    tokens: int
    device: Device
    kernels: Kernels
    sums: int = 2
    piece_rows: int = 0

    @property
    def exponentials(self) -> bool:
        """Whether rows that are kept are kept as exponentials, in 16 bits."""
        return self.bf16 and self.cacheable

    @property
    def scalable(self) -> bool:
        """Whether exponentials can be multiplied as they lie: no row kernel in the backward."""
        return self.exponentials and not self.rounds and not self.needs[2]

    @property
    def row_bytes(self) -> int:
        """Beside a row's logits in the backward: its hidden state if gathered, its gradient in float32."""
        return self.H * (self.size * self.gathered + 4 * self.needs[0])

    @property
    def piece_bytes(self) -> int:
        return self.needs[0] * self.piece_rows * self.H * 4

    @property
    def column_bytes(self) -> int:
        """Per column of a slab: the weight in another precision; float16's scaled part of the weight's gradient."""
        return self.H * (self.size * self.rounds + 4 * (self.size == 2 and not self.bf16 and self.needs[1]))

    @property
    def fused_bytes(self) -> int:
        """What the fused forward takes: the sums of each split of the vocabulary, and some rows side by side."""
        return 4 * self.sums * self.n * -(-self.V // SPLIT) + self.gathered * min(GATHER_BYTES, self.n * self.H * 2)

    @property
    def accumulator(self) -> int:
        """Bytes of the float32 sum that several products for a 16-bit gradient of the weight take beside it."""
        return self.V * self.H * 4 if self.needs[1] and self.weight_size < 4 else 0

    @property
    def overlay(self) -> int:
        """Rows whose float32 logits fit the memory of the weight's gradient."""
        return self.H * self.weight_size // 4 // 16 * 16 if self.needs[1] else 0

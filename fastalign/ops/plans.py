"""What a plan is: the schedule of one call, its sizes, its bytes and, for a GPU, its time."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_WORKSPACE_MB = {"cpu": 128, "cuda": 1024}

SCHEDULES = ("forward", "deferred", "overlaid", "cached", "frozen", "streamed")

Needs = tuple[bool, bool, bool]


@dataclass(frozen=True, slots=True)
class Timing:
    """Predicted seconds on a device of `devices.DEVICES`, nothing overlapping: what the schedule cannot go below.

    products: matrix products, those of our kernels with what they do between them; rows: row kernels over logits;
    moves: everything else that moves (rows, V) or (V, H) bytes: sums in float32, casts, gathers; gemm: one GEMM of
    2·n·H·V FLOP.
    """

    products: float
    rows: float
    moves: float
    gemm: float

    @property
    def seconds(self) -> float:
        return self.products + self.rows + self.moves


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call does and what it allocates; every `*_bytes` is exact up to per-row vectors of a few float32.

    gradient_bytes: the gradients returned; accumulator_bytes: one float32 accumulator per 16-bit gradient that is
    summed over tiles; saved_bytes: what lives from forward to backward (part of the budget for "cached", N × H for
    "frozen").
    """

    schedule: str
    reason: str
    n: int
    rows: int
    slab: int
    overlaid_rows: int  # of the first tile; streamed groups over the budget have them too
    kept_rows: int
    transit_rows: int  # rows per tile on the way to 16-bit exponentials; 0 where no such tile is needed
    gemms: float
    budget_bytes: int
    workspace_bytes: int
    gradient_bytes: int
    accumulator_bytes: int
    saved_bytes: int
    fused: bool = False  # the forward's logits never reach memory
    exponentials: bool = False  # what is kept, or a tile over the vocabulary, is exp(z − reference) in 16 bits
    piece_rows: int = 0  # rows of hidden's gradient that are rounded together, where it is one product
    time: Timing | None = None  # None on a CPU

    @property
    def predicted_bytes(self) -> int:
        """Peak bytes beside the inputs."""
        return self.workspace_bytes + self.gradient_bytes + self.accumulator_bytes + self.saved_bytes

    @property
    def keep(self) -> bool:
        """Whether a tile spans the whole vocabulary."""
        return self.schedule in ("frozen", "streamed")

    @property
    def floor(self) -> float | None:
        """Predicted time over that of the schedule's GEMMs alone; None without a time model."""
        if self.time is None or not self.n:
            return None
        return self.time.seconds / (self.gemms * self.time.gemm)

    def __str__(self) -> str:
        mib = 2**20
        predicted = "" if self.time is None else f"; {1e3 * self.time.seconds:.2f} ms, {self.floor:.3f} × the GEMMs'"
        return (
            f"{self.schedule}: {self.reason}; {self.n} rows in tiles of {self.rows} × {self.slab}, "
            f"{self.gemms:.2f} GEMMs; "
            f"{self.predicted_bytes / mib:.1f} MiB beside the inputs (workspace {self.workspace_bytes / mib:.1f}, "
            f"gradients {self.gradient_bytes / mib:.1f}, accumulators {self.accumulator_bytes / mib:.1f}, "
            f"saved {self.saved_bytes / mib:.1f}){predicted}"
        )


def default_budget(device_type: str) -> int:
    """Bytes of working memory where the caller names none; every accelerator has CUDA's."""
    return DEFAULT_WORKSPACE_MB.get(device_type, DEFAULT_WORKSPACE_MB["cuda"]) * 2**20


def choose(needs: Needs, group_rows: int | None, schedule: str) -> tuple[str, str]:
    """(schedule, reason) by what needs a gradient and when the loss is known.

    Raises:
        ValueError: an unknown schedule, or one that cannot serve these needs.
    """
    if schedule not in ("auto", *SCHEDULES):
        raise ValueError(f"schedule must be one of {('auto', *SCHEDULES)}, got {schedule!r}")
    if not any(needs):
        return "forward", "no gradient is needed"
    if schedule != "auto":
        if schedule == "streamed" and group_rows is None:
            raise ValueError(
                "schedule='streamed' needs a loss over groups: call linear_loss or one of the linear_*_loss functions"
            )
        if schedule == "frozen" and (needs[1] or needs[2]):
            raise ValueError(
                "schedule='frozen' needs a weight and bias without gradient; detach them, or take 'deferred'"
            )
        if schedule == "overlaid" and not needs[1]:
            raise ValueError(
                "schedule='overlaid' keeps logits in the memory of weight's gradient, but weight needs none; take "
                "'deferred' or 'auto'"
            )
        if schedule == "frozen" and not needs[0]:
            raise ValueError(
                "schedule='frozen' prepares hidden's gradient, but hidden needs none; take 'forward' or 'auto'"
            )
        if schedule == "forward":
            raise ValueError(
                "schedule='forward' computes no gradient, but one is needed; detach the inputs or take 'auto'"
            )
        return schedule, "asked for"
    if group_rows is not None:
        return "streamed", "the loss of a group is known as soon as its log-probs are"
    if not needs[1] and not needs[2]:
        return "frozen", "weight and bias need no gradient"
    return "deferred", "the loss is known after the forward"


def accumulators(
    name: str, needs: Needs, H: int, V: int, tokens: int, size: int, weight_size: int, several: bool
) -> int:
    """Bytes of float32 accumulators of 16-bit gradients; `several`: the weight's is a sum of several products."""
    total = 0
    if name == "streamed" and size < 4:
        total += needs[0] * tokens * H * 4
    if weight_size < 4:
        total += needs[1] * V * H * 4 if name == "streamed" or several else 0
        total += needs[2] * V * 4
    return total

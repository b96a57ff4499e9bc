"""What the planner knows of accelerators: one table, and the time of a GEMM there. Pure arithmetic.

Nothing here is read from the device at hand: the same call makes the same plan on every machine of an architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator as the time model sees it. The figures are what large kernels sustain, not data sheets' peaks.

    processors: streaming multiprocessors (compute units), each of which works on one output tile at a time
    tile: rows and columns of the output tile of the library's fastest 16-bit GEMM, in either orientation
    flops: 16-bit FLOP/s with float32 accumulation, all processors busy; float32 GEMMs are not modelled
    bandwidth: bytes/s between the device's memory and its kernels, reading and writing together
    l2_bytes, l2_bandwidth: what a kernel finds there of what the one before it wrote, and how fast it gets it
    launch: seconds from one kernel to the next that depends on it, with the filling and draining of its pipeline
    epilogue: seconds a logit that a kernel of ours spends between its matrix products, which nothing overlaps: 3500
        clocks for a tile of 128 × 256 logits on sm_90, by the arithmetic of fastalign.kernels.fused_forward
    keeping: seconds a logit more where it leaves exponentials behind: a few instructions beside the exponential, and
        four barriers a tile
    """

    processors: int
    tile: tuple[int, int]
    flops: float
    bandwidth: float
    l2_bytes: int
    l2_bandwidth: float
    launch: float = 4e-6
    epilogue: float = 0.5e-12
    keeping: float = 0.1e-12

    def gemm(self, m: int, n: int, k: int) -> float:
        """Seconds of one (m, k) @ (k, n): whole waves of tiles over the processors, in the better orientation; where
        that pays, the sum over k is split in two or four, whose float32 parts are written and added."""
        if not (m and n and k):
            return 0.0
        a, b = self.tile
        tiles = min(-(-m // a) * -(-n // b), -(-m // b) * -(-n // a))
        wave = 2 * a * b * k * self.processors / self.flops  # every processor works on one tile
        times = [
            -(-tiles * parts // self.processors) * wave / parts + (parts > 1) * 8 * parts * m * n / self.bandwidth
            for parts in (1, 2, 4)
        ]
        return min(times) + self.launch

    def traffic(self, count: int, *, resident: int | None = None) -> float:
        """Seconds a kernel takes to move `count` bytes; `resident`: the bytes that have to stay in L2 between the
        kernel that wrote them and this one, None where nobody hopes for that."""
        cached = resident is not None and resident <= self.l2_bytes * 3 // 4  # the next operands pass through L2 too
        return count / (self.l2_bandwidth if cached else self.bandwidth)


MIB = 2**20

DEVICES: dict[str, Device] = {
    "sm_80": Device(108, (128, 256), 250e12, 1.7e12, 40 * MIB, 3.5e12, epilogue=2e-12),  # A100 80 GB
    "sm_90": Device(132, (128, 256), 790e12, 4.3e12, 50 * MIB, 5.5e12),  # H200; H100 has 3.0e12 bytes/s
    "sm_100": Device(148, (256, 256), 1600e12, 7.0e12, 126 * MIB, 10e12, epilogue=0.6e-12),  # B200
    "gfx942": Device(304, (256, 256), 600e12, 4.2e12, 4 * MIB, 4.2e12, epilogue=1e-12),  # MI300X: 4 MiB a chiplet
}
"""By architecture, as `backends.architecture` names it. Figures but those of the GEMM and of memory are estimates."""


def device_of(arch: str) -> Device:
    """The table's entry, or the nearest older one of the family; the rest take the oldest.

    Raises:
        ValueError: an architecture that is neither sm_* nor gfx*.
    """
    if arch in DEVICES:
        return DEVICES[arch]
    if re.fullmatch(r"gfx[0-9a-f]+", arch):
        return DEVICES["gfx942"]
    found = re.fullmatch(r"sm_(\d{2,3})[af]?", arch)
    if found is None:
        raise ValueError(f"arch must look like 'sm_90' or 'gfx942', got {arch!r}")
    older = [name for name in DEVICES if name.startswith("sm_") and int(name[3:]) <= int(found[1])]
    return DEVICES[max(older, key=lambda name: int(name[3:]), default="sm_80")]


def gemm_style(device: torch.device) -> str:
    """Whose GEMMs and tiles a device has, "cpu" or "cuda": every accelerator has CUDA's."""
    return "cpu" if device.type == "cpu" else "cuda"

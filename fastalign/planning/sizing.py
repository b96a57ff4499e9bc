"""How many tokens a pass may have: from the plan and a memory budget, before a lack of memory says so."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastalign.planning.plan import StepPlan

logger = logging.getLogger(__name__)

_SMALLEST = 256
_GPU_SHARE = 0.9  # of a device's memory; the rest is for fragmentation, the CUDA context and libraries


def memory_budget(device_type: str, memory_gb: float | None, device_bytes: int | None = None) -> int:
    """Bytes that a run may take on its device.

    memory_gb: GiB, where the user says so. Without it nine tenths of a GPU's whole memory (`device_bytes`), which is a
    constant of the device; never what happens to be free. On the CPU other processes share the memory, so there is
    nothing to derive a budget from, and it has to be given.

    Raises ValueError: no budget is given and none follows from the device, or one that is not positive.
    """
    if memory_gb is not None:
        if not memory_gb > 0:
            raise ValueError(f"memory_gb={memory_gb}: it must be positive")
        return int(memory_gb * 2**30)
    if device_type == "cpu" or device_bytes is None:
        reason = "on the CPU memory is shared with other processes" if device_type == "cpu" else "there is no GPU here"
        raise ValueError(f"memory_gb is missing: {reason}, so say how many GiB this run may take")
    return int(device_bytes * _GPU_SHARE)


def auto_micro_batch_tokens(plan_of: Callable[[int], StepPlan], budget: int, *, largest: int) -> tuple[int, StepPlan]:
    """The largest power of two for micro_batch_tokens, at least 256, whose plan stays within `budget` bytes.

    plan_of: the plan of the run with so many micro_batch_tokens. largest: tokens of a whole device batch: more make no
        difference.

    Returns the choice and its plan, and logs both. The choice depends on the run's settings, its data's lengths and the
    budget, and on nothing that is measured, so it is the same wherever they are.

    Raises ValueError where not even the smallest fits, naming what it takes.
    """
    sizes = [_SMALLEST]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] * 2)
    plans = {sizes[0]: plan_of(sizes[0])}
    smallest = plans[sizes[0]]
    if smallest.peak_bytes > budget:
        part = max(smallest.parts, key=lambda name: smallest.parts[name])
        less = "gradient checkpointing, LoRA, bf16 or a smaller max_length need less"
        if part == "cache":
            less = "a smaller rollout_batch_tokens or response_length needs less"
        raise ValueError(
            f"a pass of {smallest.pass_tokens} tokens takes {_gib(smallest.peak_bytes)} and the budget is "
            f"{_gib(budget)}; {part} take {_gib(smallest.parts[part])}: {less}"
        )
    low, high = 0, len(sizes) - 1  # sizes[low] fits
    while low < high:
        middle = (low + high + 1) // 2
        found = plans[sizes[middle]] = plan_of(sizes[middle])
        low, high = (middle, high) if found.peak_bytes <= budget else (low, middle - 1)
    choice = sizes[low]
    taken = plans[choice].peak_bytes
    logger.info("micro_batch_tokens: %d, planned to take %s of %s", choice, _gib(taken), _gib(budget))
    return choice, plans[choice]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"

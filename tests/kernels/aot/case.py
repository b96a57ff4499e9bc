"""What `resources.py` compiles: one kernel with one combination of flags and dtypes.

To have a kernel compiled, measured and held to its limits, write a module beside this one with

    KERNELS = {"row_stats": row_kernels._row_stats_kernel, ...}      names as they stand in resources.csv
    def cases() -> Iterator[Case]: ...
    def launch_options(case, arch) -> (constants, options): ...      tile sizes and compiler options of the launcher

and list it in `resources.py`'s SUBJECTS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PORTABLE = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Where every kernel without tiles of its own is compiled."""


@dataclass(frozen=True)
class Case:
    """Arguments as a launch would pass them.

    Attributes:
        pointers: the element type of each pointer argument; an absent one (its name ends in _ptr or _desc) is None.
        descriptors: the element type of each tensor descriptor; its block shape is a constant <name>_BLOCK, which
            `launch_options` gives and the kernel does not see.
        constants: compile-time arguments. Arguments named nowhere are int32, a multiple of 16 when `aligned`, or 1
            where `unit` names them.
        max_stack: bytes a thread may spill.
        matrix: whether the product must run on the architecture's own matrix instruction.
        float64: whether the kernel may compute in float64.
    """

    kernel: str
    variant: str
    pointers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    descriptors: dict[str, str] = field(default_factory=dict)
    aligned: bool = True
    unit: tuple[str, ...] = ()
    targets: tuple[str, ...] = PORTABLE
    max_stack: int = 0
    matrix: bool = False
    float64: bool = False

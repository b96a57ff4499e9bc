"""Which implementation of the row kernels serves a tensor. The only reader of environment variables and device
capability.

    torch    plain PyTorch, any device
    cpu      C++ (csrc/cpu): threads and SIMD, needs the compiled extension
    triton   CUDA or ROCm tensors; CPU tensors only under TRITON_INTERPRET=1
    cuda     triton, with C++ kernels (csrc/cuda) where they do less; compute capability 9.0, needs the compiled
             extension

`backend="auto"` takes triton for CUDA tensors, cpu for CPU tensors, and torch where those are not to be had, which it
says once in a process. A backend that is named and cannot run raises ValueError with the reason; nothing falls back in
silence.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops import rows as R
from fastalign.ops.known_grads import two_passes
from fastalign.ops.scans import gae_torch

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "cpu", "triton", "cuda")


@dataclass(frozen=True, slots=True)
class Backend:
    """The row functions of one backend; their contract is fastalign.ops.rows. `fused_forward` needs no logits tile, nor
    does `fused_exponentials`, which leaves exp(z − reference) behind (fastalign.ops.whole_tiles).

    fused_exponentials(hidden, weight, bias, targets, rows, spec, out) -> (state, reference (n,) float32), with out
        (n, V) bfloat16 of any row pitch, everywhere finite.
    gae(rewards, values, mask, gamma, lam) -> (advantages, returns): fastalign.ops.scans.
    """

    name: str
    row_stats: Callable[..., None]
    row_grad: Callable[..., None]
    row_exp: Callable[..., None]
    row_loss_grad: Callable[..., None]
    gae: Callable[..., tuple[Tensor, Tensor]]
    fused_forward: Callable[..., R.RowState] | None = None
    fused_exponentials: Callable[..., tuple[R.RowState, Tensor]] | None = None


def interpreting() -> bool:
    """Whether Triton kernels run through its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def checks_targets() -> bool:
    """Whether targets and rows on an accelerator are checked to be in range, at the price of a synchronisation each
    call: FASTALIGN_CHECK_TARGETS=1, for finding out where a NaN comes from. On the CPU they always are."""
    return os.environ.get("FASTALIGN_CHECK_TARGETS", "0") not in ("", "0")


def architecture(device: torch.device) -> str:
    """Name of a GPU's instruction set, "sm_90" or "gfx942"; that of an H100 where kernels are interpreted."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a large kernel run at once; a few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def _reasons() -> dict[str, str | None]:
    reasons: dict[str, str | None] = {"torch": None}
    try:
        from fastalign.kernels import cpu_rows

        reasons["cpu"] = cpu_rows.why_unavailable()
    except ImportError as error:
        reasons["cpu"] = f"the C++ extension is not built ({error}); install with a C++ compiler on the PATH"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        reasons["triton"] = f"triton cannot be imported ({error}); pip install triton"
    else:
        usable = torch.cuda.is_available() or interpreting()
        reasons["triton"] = (
            None if usable else "no CUDA or ROCm device (set TRITON_INTERPRET=1 to interpret kernels on the CPU)"
        )
    reasons["cuda"] = reasons["triton"] or _why_no_cuda()
    return reasons


def _why_no_cuda() -> str | None:
    try:
        from fastalign.kernels import cuda_rows  # noqa: F401
    except ImportError as error:
        return f"the CUDA extension is not built ({error}); install with nvcc on the PATH and FASTALIGN_BUILD_CUDA=1"
    return None if torch.cuda.is_available() and not torch.version.hip else "no CUDA device"


def available() -> dict[str, str | None]:
    """Every backend with the reason it cannot run here, None when it can."""
    return dict(_reasons())


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `name` cannot serve tensors of this device and dtype; None when it can."""
    device_type = device.type
    reason = _reasons()[name]
    if reason is not None or name == "torch":
        return reason
    if dtype == torch.float64:
        return "float64 is for checking gradients and runs on backend='torch' only"
    if name == "cpu" and device_type != "cpu":
        return f"it serves CPU tensors, hidden is on {device_type!r}"
    if name == "triton" and device_type != "cuda" and not interpreting():
        return f"it serves CUDA tensors, hidden is on {device_type!r}"
    if name == "cuda":
        if device_type != "cuda":
            return f"it serves CUDA tensors, hidden is on {device_type!r}"
        from fastalign.kernels import cuda_rows

        return cuda_rows.why_unavailable(device.index)
    return None


@functools.cache
def _load(name: str) -> Backend:
    if name == "torch":
        both = two_passes(R.row_stats, R.row_grad)
        return Backend("torch", R.row_stats, R.row_grad, R.row_exp, both, gae_torch)
    if name == "cpu":
        from fastalign.ops import cpu_backend

        return cpu_backend.BACKEND
    if name == "cuda":
        from fastalign.ops import cuda_backend

        return cuda_backend.BACKEND
    from fastalign.ops import triton_backend

    return triton_backend.BACKEND


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def resolve(name: str, tensor: Tensor) -> Backend:
    """The backend that serves `tensor` (hidden).

    Raises:
        ValueError: an unknown name, or a named backend that cannot run here.
    """
    device, dtype = tensor.device, tensor.dtype
    if name == "auto":
        preferred = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
        if (reason := _reasons()[preferred]) is not None and not torch.compiler.is_compiling():
            _say_once(f"{device.type} tensors run on the slower backend 'torch': {reason}")
        return _load(preferred if _why_not(preferred, device, dtype) is None else "torch")
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    reason = _why_not(name, device, dtype)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run: {reason}")
    return _load(name)

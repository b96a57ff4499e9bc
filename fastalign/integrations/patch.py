"""`patch`: per-token log-probs as a method of a transformers causal language model, without logits.

    fastalign.patch(model)
    out = model.logps(input_ids, completion_mask, attention_mask=attention_mask)     # LinearLogps, (B, T − 1) each
    fastalign.unpatch(model)

or, for a while, `with fastalign.patch(model): ...`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalign.models import Head, find_head, fuse_head, unfuse_head
from fastalign.models.causal import is_fused
from fastalign.models.head import base_causal_lm
from fastalign.ops import linear_logps
from fastalign.types import IGNORE_INDEX, LinearLogps

_FUSED_HERE = "_fastalign_fused_by_patch"


class PatchHandle:
    """Undoes what a call of `patch` or `patch_trl` did: by `remove()`, or on leaving a `with` block. Idempotent."""

    def __init__(self, undo: Callable[[], None] | None) -> None:
        self._undo = undo

    def remove(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def patch(model: nn.Module) -> PatchHandle:
    """Give a transformers causal language model the method `logps`, in place. A patched model is left as it is.

        logps(input_ids, completion_mask, attention_mask=None, position_ids=None, *, temperature=1.0, entropy=False,
              top1=False, log_sum_sq_probs=False, mean_logits=False, rows=None, backend="auto", schedule="auto",
              workspace_mb=None, **model_kwargs) -> LinearLogps

    What it returns has (B, T − 1) of each quantity, float32, differentiable as in `linear_logps`:

        logps[b, t] = log p(input_ids[b, t + 1] | input_ids[b, :t + 1])    where completion_mask[b, t + 1], else 0

    The forward is otherwise the model's own, so generating, saving and logits work as before. Whatever the model is
    wrapped in is patched as it is trained: give the DistributedDataParallel or PeftModel, not the model inside, or the
    wrapper's hooks see nothing of the call.

    Args of `logps`:
        input_ids: (B, T) int64, padded on either side.
        completion_mask: (B, T) bool or integer, True = a token to be scored. Others cost no FLOP in the head. The first
            token of a row has no prediction and is never scored.
        attention_mask: (B, T), True = real token; needed for padding on the left. Behind padding on the right nothing
            is scored, so it may be left out, and attention then takes its fast causal path.
        position_ids: (B, T); by default the model's own, 0 to T − 1 whatever the padding.
        temperature, entropy, top1, log_sum_sq_probs, mean_logits, backend, schedule, workspace_mb: as in
            `linear_logps`.
        rows: (n,) int64 on the host, flat indices b·(T − 1) + t of the results that are scored. Without it they are
            found, which on a GPU costs one synchronisation.
        model_kwargs: further arguments of the model's forward. With output_router_logits=True, of a mixture of experts,
            the result is (LinearLogps, aux_loss); see `fuse_head`.

    Returns a handle with `remove()`, usable as a context manager. One for a model that was patched before removes
    nothing: what it found stays until `unpatch`, or the first handle, takes it away.

    Raises ValueError, naming the class: not a transformers causal language model (bare, or wrapped by PEFT,
    DistributedDataParallel or torch.compile), a head that cannot be fused (`fuse_head`), weights sharded by FSDP2 or
    ZeRO-3.
    """
    if _FUSED_HERE in model.__dict__:
        return PatchHandle(None)
    base = base_causal_lm(model)
    check_local(base)
    if hasattr(type(model), "logps"):
        raise ValueError(f"{type(model).__name__} has a method logps of its own, which patch would hide")
    fused_before = is_fused(base)
    fuse_head(model)
    # straight into __dict__: the wrapper of torch.compile sets attributes of the model inside
    model.__dict__[_FUSED_HERE] = not fused_before
    model.__dict__["logps"] = MethodType(_logps, model)
    return PatchHandle(lambda: _remove(model))


def unpatch(model: nn.Module) -> None:
    """Undo `patch`, in place; no attribute stays behind. A model that is not patched is left alone."""
    _remove(model)


def _remove(model: nn.Module) -> None:
    fused_here = model.__dict__.pop(_FUSED_HERE, None)
    if fused_here is None:
        return
    del model.__dict__["logps"]
    if fused_here:
        unfuse_head(model)


def check_local(base: nn.Module) -> None:
    """Raise ValueError for a head whose weight is not whole in this process."""
    weight = find_head(base).weight
    if isinstance(weight, DTensor):
        raise ValueError(
            f"the head of {type(base).__name__} is sharded over processes (a DTensor, as FSDP2 and tensor parallelism "
            "make them), which is not supported yet: use DistributedDataParallel"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(f"{type(base).__name__} is sharded by DeepSpeed ZeRO-3, which is not supported yet")


def _logps(
    self: nn.Module, input_ids: Tensor, completion_mask: Tensor, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, *, temperature: float = 1.0, entropy: bool = False, top1: bool = False,
    log_sum_sq_probs: bool = False, mean_logits: bool = False, rows: Tensor | None = None, backend: str = "auto",
    schedule: str = "auto", workspace_mb: float | None = None, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """Per-token log-probs of a completion, without logits; documented at `fastalign.patch`."""
    _check(input_ids, completion_mask)
    length = input_ids.shape[1]
    scored = torch.where(completion_mask[:, 1:] != 0, input_ids[:, 1:], IGNORE_INDEX)
    targets = nn.functional.pad(scored, (0, 1), value=IGNORE_INDEX)  # aligned with hidden, whose last column has none
    if rows is not None:
        rows = rows + rows // max(length - 1, 1)

    def score(hidden: Tensor, head: Head) -> LinearLogps:
        out = linear_logps(
            hidden[:, -length:],  # prompt learning puts virtual tokens in front
            head.weight, targets.to(hidden.device), temperature=temperature, entropy=entropy, top1=top1,
            log_sum_sq_probs=log_sum_sq_probs, mean_logits=mean_logits, rows=rows, backend=backend, schedule=schedule,
            workspace_mb=workspace_mb, **head.options,
        )  # fmt: skip
        return LinearLogps._make(None if values is None else values[:, :-1] for values in out)

    masks = {"attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in masks.items() if value is not None}
    return self(input_ids=input_ids, head_fn=score, **given, **model_kwargs)


def _check(input_ids: Tensor, completion_mask: Tensor) -> None:
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must be (B, T) with T at least 1, got shape {tuple(input_ids.shape)}")
    if completion_mask.shape != input_ids.shape:
        raise ValueError(
            f"completion_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(completion_mask.shape)}"
        )
    if completion_mask.is_floating_point():
        raise ValueError(f"completion_mask must be bool or integer, got {completion_mask.dtype}")

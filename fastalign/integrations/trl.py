"""TRL's trainers on fastalign's log-probs, by one call.

    trainer = trl.DPOTrainer(...)
    fastalign.patch_trl(trainer)
    trainer.train()

TRL gives its models a fused head (`trl.trainer.utils.add_fused_lm_head`): called with `fused_lm_head=True`, the forward
returns a `FusedCausalLMOutput` of per-token quantities instead of logits, and the trainers' losses and metrics are made
of those alone. Here such a call is answered by `linear_logps`; every other one reaches TRL's forward.

A script written for TRL may also take fastalign's own trainers, by its imports:

    from fastalign import DPOConfig, DPOTrainer
    from fastalign.integrations.trl import TrlParser     # where the script parses a command line
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.integrations.patch import PatchHandle, check_local
from fastalign.integrations.trl_parser import parser_class
from fastalign.models import Head
from fastalign.models.causal import original_forward, run_head, verify_head
from fastalign.models.head import base_causal_lm
from fastalign.ops import linear_logps
from fastalign.types import IGNORE_INDEX

TESTED = "1.16.0"
_OUTPUTS = {
    "log_probs": "", "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logits",
    "is_top1": "top1",
}  # fmt: skip
"""TRL's per-token outputs, and the arguments of `linear_logps` that ask for them."""
_FIELDS = {"loss", "label_mask", "aux_loss", *_OUTPUTS}
_MARK = "_fastalign_trl"
_PREPARED = "_original_forward"  # where accelerate keeps the forward that it wraps


def __getattr__(name: str) -> Any:
    if name == "TrlParser":  # its base is TRL's, which is imported when it is asked for
        return parser_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Settings(NamedTuple):
    """What TRL's fused head was made with."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]


def patch_trl(
    trainer: Any, *, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None
) -> PatchHandle:
    """Make a TRL trainer compute log-probs with fastalign: the same losses and metrics, in less time and memory.

    trainer: a trl DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer or SFTTrainer, constructed and not yet trained;
        its reference model, if it holds one, is patched too. Every option of theirs is TRL's own matter, as losses,
        metrics and data stay with it.
    backend, schedule, workspace_mb: as in `linear_logps`.

    Returns a handle: `remove()`, or leaving it as a `with` block, gives the trainer back to TRL. A trainer that is
    patched already is left as it is. Once training has wrapped the forward for mixed precision, what was put there
    stays in that chain after `remove()` and does nothing.

    Raises ValueError: an object whose model has no such head (another library's trainer, TRL before it had one); a TRL
    that asks for quantities which are unknown here; FSDP, DeepSpeed or tensor parallelism; a head that cannot be fused,
    see `fuse_head`.
    """
    _check_trainer(trainer)
    options = {"backend": backend, "schedule": schedule, "workspace_mb": workspace_mb}
    planned = []
    for model in (trainer.model, getattr(trainer, "ref_model", None)):  # all are checked before one is changed
        if model is None or _is_active(base := base_causal_lm(model)):
            continue
        check_local(base)
        planned.append((base, _settings_of(base)))
        with _without_autocast(base):
            verify_head(model)
    removers = [_install(base, settings, options, trainer.accelerator.autocast) for base, settings in planned]

    def undo() -> None:
        for remove in removers:
            remove()

    return PatchHandle(undo if removers else None)


def _check_trainer(trainer: Any) -> None:
    name = type(trainer).__name__
    if not isinstance(getattr(trainer, "model", None), nn.Module) or not hasattr(trainer, "accelerator"):
        raise ValueError(f"patch_trl takes a TRL trainer, got {name}; for a model there is fastalign.patch")
    for feature in ("fsdp", "deepspeed"):
        if getattr(trainer, f"is_{feature}_enabled", False):
            raise ValueError(f"{name} runs with {feature}, which is not supported yet: use DistributedDataParallel")


@contextlib.contextmanager
def _without_autocast(base: PreTrainedModel) -> Iterator[None]:
    """Inside, the forward is the one that accelerate wrapped for mixed precision, as it does with reference models."""
    wrapped, inner = base.__dict__["forward"], base.__dict__.get(_PREPARED)
    if inner is not None:
        base.forward = inner
    try:
        yield
    finally:
        base.forward = wrapped


def _is_active(base: PreTrainedModel) -> bool:
    return hasattr(base.forward, _MARK)


def _settings_of(base: PreTrainedModel) -> _Settings:
    """The arguments of TRL's `add_fused_lm_head`, which its forward alone still knows."""
    outermost = original_forward(base)
    function: Any = getattr(outermost, "__func__", outermost)
    while function is not None:  # accelerate wraps the forward for mixed precision
        if (known := getattr(function, _MARK, None)) is not None:  # removed from here before
            return known
        if "fused_lm_head" in getattr(getattr(function, "__code__", None), "co_varnames", ()):
            break
        function = getattr(function, "__wrapped__", None)
    trl = _trl()
    if function is None:
        raise ValueError(
            f"{type(base).__name__} has no fused head of TRL's (add_fused_lm_head), which DPO, GRPO, KTO, RLOO and SFT "
            f"trainers of TRL {TESTED} give their models; TRL here is {trl.__version__}"
        )
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    output_fields = {field.name for field in fields(_output_class())}
    if (missing := set(_Settings._fields) - cells.keys()) or output_fields != _FIELDS:
        raise ValueError(
            f"TRL {trl.__version__} has another fused head than TRL {TESTED}: without settings {sorted(missing)}, and "
            f"outputs {sorted(output_fields ^ _FIELDS)} are not known to both; install trl=={TESTED}"
        )
    settings = _Settings(**{name: cells[name].cell_contents for name in _Settings._fields})
    if unknown := set(settings.outputs) - _OUTPUTS.keys():
        raise ValueError(f"TRL {trl.__version__} asks for {sorted(unknown)}; known are {sorted(_OUTPUTS)}")
    return settings


def _trl() -> Any:
    return importlib.import_module("trl")


def _output_class() -> Any:
    return importlib.import_module("trl.trainer.utils").FusedCausalLMOutput


def _install(
    base: PreTrainedModel, settings: _Settings, options: dict[str, Any], autocast: Callable[[], Any]
) -> Callable[[], None]:
    """Answer the calls of `base` that ask for TRL's fused head; returns what undoes it."""
    previous, output_class = base.__dict__["forward"], _output_class()
    # one that is wrapped for mixed precision already enters autocast inside of what is replaced here
    context = autocast if _PREPARED in base.__dict__ else contextlib.nullcontext
    active = True

    @functools.wraps(type(base).forward)  # `generate` looks at the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not (active and kwargs.get("fused_lm_head")):
            return previous(*args, **kwargs)
        with context():
            return output_class(**_fused_output(self, settings, options, args, kwargs))

    setattr(forward, _MARK, settings)
    base.forward = MethodType(forward, base)

    def remove() -> None:
        nonlocal active
        active = False
        if getattr(base.__dict__.get("forward"), "__func__", None) is forward:
            base.forward = previous

    return remove


def _fused_output(
    base: PreTrainedModel, settings: _Settings, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What TRL's forward returns with fused_lm_head=True, field by field."""
    kwargs = {name: value for name, value in kwargs.items() if name != "fused_lm_head"}
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    wanted: dict[str, Any] = {flag: name in settings.outputs for name, flag in _OUTPUTS.items() if flag}

    def score(hidden: Tensor, head: Head) -> dict[str, Tensor | None]:
        scored = labels[:, 1:] if shift_labels is None else shift_labels
        # aligned with hidden rather than hidden cut to fit: its last column is not copied away
        targets = nn.functional.pad(scored, (0, hidden.shape[1] - scored.shape[1]), value=IGNORE_INDEX)
        in_fp32 = settings.cast_lm_head_to_fp32
        if in_fp32:
            hidden = hidden.float()
        with torch.autocast(hidden.device.type, enabled=False) if in_fp32 else contextlib.nullcontext():
            out = linear_logps(
                hidden, head.weight, targets.to(hidden.device), temperature=settings.temperature, **wanted, **options,
                **head.options,
            )  # fmt: skip
        found = {"log_probs": out.logps} | {name: getattr(out, name) for name in _OUTPUTS if name != "log_probs"}
        width = scored.shape[1]
        return {name: None if values is None else values[:, :width] for name, values in found.items()} | {
            "label_mask": scored.to(hidden.device) != IGNORE_INDEX
        }

    with_router = bool(kwargs.get("output_router_logits"))
    result = run_head(base, score, args, kwargs)
    found, aux_loss = result if with_router else (result, None)
    count = found["label_mask"].sum().clamp(min=1) if num_items is None else num_items
    loss = -found["log_probs"].sum() / count
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return {"loss": loss, "aux_loss": aux_loss, **found}

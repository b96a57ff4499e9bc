"""Scalar models: one number for each token position, from a transformers sequence classifier with one label.

    model = fuse_scalar_head(load_scalar_model("…"))
    scores = model(input_ids=ids, rows=last)        # (n,) float32, at the rows asked for and no others

Reward models are read at the last token of a sequence, value models at every completion token. `rows` takes both from
the (wrapped) model's own forward, so that the hooks of DDP and PEFT see it, and the head is applied to nothing else.
Padding is on the right and attention causal: a token never sees padding, so no mask is needed.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fastalign.models.inference import evaluating
from fastalign.models.loading import check_source, short_refusal
from fastalign.models.sharding import call_within

logger = logging.getLogger(__name__)

HEAD_NAMES = ("score", "classifier")
"""Under which transformers' sequence classifiers keep their head."""

Model = TypeVar("Model", bound=nn.Module)

_ORIGINAL = "_fastalign_original_scalar_forward"
_PROBE_SCORE = 100.0  # the probe is amplified until a score reaches this, so that a squashing function shows


# Loading --------------------------------------------------------------------------------------------------------------


def load_scalar_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "float32",
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A scalar model from a folder or the hub: `AutoModelForSequenceClassification` with one label.

    A checkpoint with a scalar head keeps it. For a causal language model the head is new: normal with standard
    deviation 1/√(H + 1) (arXiv 2403.17031), bias 0, so that first scores have variance of about 1.

    dtype: float32 by default; "auto" is the checkpoint's own (right for a frozen model). generator: random numbers for
        a new head; torch's default generator if None, so `set_seed` decides. kwargs go to `from_pretrained`.

    Raises ValueError where there is no model, and for a checkpoint that has a head of more than one label or lacks
    weights of the backbone.
    """
    name = str(name_or_path)
    check_source(name)
    one_label = {"num_labels": 1, "problem_type": "regression"}
    if (config := kwargs.pop("config", None)) is not None:  # with a config, from_pretrained takes no settings of one
        kwargs["config"] = config = copy.deepcopy(config)
        for setting, value in one_label.items():
            setattr(config, setting, value)
        one_label = {}
    with _load_report_silenced(), short_refusal(name):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **one_label, **kwargs
        )  # fmt: skip
    head_name, _ = _named_head(model)
    if info["mismatched_keys"]:
        key, found, expected = next(iter(info["mismatched_keys"]))
        several = key.startswith(f"{head_name}.")
        raise ValueError(
            f"{name} has {key} of shape {tuple(found)}, a scalar model needs {tuple(expected)}"
            + (": a classifier with several labels is no reward or value model" if several else "")
        )
    missing = set(info["missing_keys"])
    head_keys = {key for key in missing if key.rpartition(".")[0] == head_name}
    if missing - head_keys:
        raise ValueError(f"{name} lacks weights of the backbone: {', '.join(sorted(missing - head_keys)[:3])}")
    if head_keys:
        _init_head(scalar_head(model), generator)
        logger.info("%s has no scalar head: a new one is initialised", name)
    return model


@torch.no_grad()
def _init_head(head: nn.Linear, generator: torch.Generator | None) -> None:
    # drawn on the host in float32, so that device and dtype do not decide which head it is
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.zero_()


@contextmanager
def _load_report_silenced() -> Iterator[None]:
    """transformers reports the head that a causal LM has and a classifier lacks, and the other way round, at length.

    What matters of it is checked, and raised, by the caller.
    """
    loading = logging.getLogger("transformers.modeling_utils")

    def no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loading.addFilter(no_report)
    try:
        yield
    finally:
        loading.removeFilter(no_report)


def load_scalar_adapter(folder: str | Path, *, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
    """A scalar model that was saved as an adapter: its base model, with the adapter and the head it was trained with.

    A config.json beside the adapter (RewardTrainer writes it: pad token, normalisation of rewards) replaces the base's.
    kwargs go to `load_scalar_model`.
    """
    base_name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_name:
        raise ValueError(f"{folder} names no base model: load the two and put them together with PeftModel")
    if (Path(folder) / "config.json").is_file():
        kwargs = {"config": AutoConfig.from_pretrained(str(folder)), **kwargs}
    base = load_scalar_model(base_name, **kwargs)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)


# The head -------------------------------------------------------------------------------------------------------------


def base_scalar_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"expected a transformers sequence classifier (or a PeftModel around one), got {type(base).__name__}"
        )
    return base


def scalar_head(model: nn.Module) -> nn.Linear:
    """The head of a scalar model (bare or PEFT-wrapped): the copy that trains, where an adapter has one.

    Raises ValueError, naming the model's and the head's class, for a head that is not one linear layer with one output.
    """
    base = base_scalar_model(model)
    name, module = _named_head(base)
    if isinstance(module, ModulesToSaveWrapper):
        active = not module.disable_adapters and module.active_adapters
        module = module.modules_to_save[module.active_adapters[0]] if active else module.original_module
    if isinstance(module, AuxiliaryTrainingWrapper) or not _is_plain_linear(module):
        raise ValueError(
            f"{name} of {type(base).__name__} is a {type(module).__module__}.{type(module).__name__}; it must be a "
            "torch.nn.Linear: keep it out of quantisation and of an adapter's target_modules, and in modules_to_save"
        )
    assert isinstance(module, nn.Linear)
    if module.out_features != 1:
        raise ValueError(f"{name} of {type(base).__name__} has {module.out_features} outputs; a scalar model has one")
    return module


def _named_head(base: PreTrainedModel) -> tuple[str, nn.Module]:
    for name in HEAD_NAMES:
        if isinstance(module := getattr(base, name, None), nn.Module):
            return name, module
    raise ValueError(
        f"{type(base).__name__} has no {' or '.join(HEAD_NAMES)}: a scalar model is an "
        "AutoModelForSequenceClassification with num_labels=1 (`load_scalar_model` makes one of a causal LM)"
    )


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


# Fusing ---------------------------------------------------------------------------------------------------------------


def fuse_scalar_head(model: Model, *, verify: bool = True) -> Model:
    """Give a scalar model, or a PeftModel around one, the forward argument `rows`; in place, idempotent.

    `model(input_ids=ids, rows=rows)` runs the backbone on ids (B, T), padded on the right, and returns the output of
    the head at the positions `rows`, flat indices b·T + t, int64 (n,), tensor or numpy array: (n,) float32. The head is
    computed in float32 at least, outside autocast. A backbone without trainable parameters runs without autograd.
    Without `rows` the forward is the original one.

    verify: compare with the model's own pooled logits on a few tokens (small forwards in evaluation mode).

    Raises ValueError, naming the model's class: see `scalar_head`; or its own scores are others, because something more
    happens between backbone and score or because attention is not causal.
    """
    base = base_scalar_model(model)
    if is_scalar_fused(base):
        return model
    head = scalar_head(model)
    if head.weight.is_meta:
        raise ValueError(f"the head of {type(base).__name__} is on the meta device: load the weights before fusing")
    wrapped = base.__dict__.get("forward")  # another library's instance-level forward, kept and restored
    setattr(base, _ORIGINAL, wrapped if wrapped is not None else MethodType(type(base).forward, base))
    base.forward = MethodType(_fused_forward(type(base)), base)
    if verify:
        try:
            verify_scalar_head(model)
        except BaseException:
            unfuse_scalar_head(model)
            raise
    return model


def unfuse_scalar_head(model: Model) -> Model:
    """Undo `fuse_scalar_head`, in place; a model that is not fused is left alone."""
    base = base_scalar_model(model)
    if is_scalar_fused(base):
        original = getattr(base, _ORIGINAL)
        if getattr(original, "__func__", None) is type(base).forward:
            del base.forward
        else:
            base.forward = original
        delattr(base, _ORIGINAL)
    return model


def is_scalar_fused(model: nn.Module) -> bool:
    return _ORIGINAL in base_scalar_model(model).__dict__


def _fused_forward(cls: type[PreTrainedModel]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)  # Trainer looks at the signature
    def forward(self: PreTrainedModel, *args: Any, rows: Tensor | np.ndarray | None = None, **kwargs: Any) -> Any:
        if rows is None:
            return getattr(self, _ORIGINAL)(*args, **kwargs)
        if kwargs.pop("labels", None) is not None:
            raise ValueError("labels cannot be combined with rows: scores are returned, and no loss")
        kwargs.pop("return_dict", None)
        kwargs["use_cache"] = False
        backbone = self.base_model
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in backbone.parameters())
        with torch.set_grad_enabled(trains):
            hidden = backbone(*args, **kwargs).last_hidden_state
        index, head = torch.as_tensor(rows), scalar_head(self)
        return call_within((_named_head(self)[1], head), lambda states: _scores_at(states, index, head), hidden)

    return forward


def _scores_at(hidden: Tensor, rows: Tensor, head: nn.Linear) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(flat):
        raise ValueError(
            f"rows from {int(rows.min())} to {int(rows.max())}; accepted are flat indices into "
            f"{tuple(hidden.shape[:2])} positions, 0 … {len(flat) - 1}"
        )
    picked = flat.index_select(0, rows.to(flat.device, non_blocking=True)).to(head.weight.device)
    dtype = torch.promote_types(torch.promote_types(picked.dtype, head.weight.dtype), torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(picked.device.type, enabled=False):
        return (
            F.linear(picked.to(dtype), head.weight.to(dtype), bias).squeeze(-1).float().clone()
        )  # FSDP2 warns of views


def verify_scalar_head(model: nn.Module) -> None:
    """Raise ValueError unless a fused model's scores in a padded batch are its own pooled logits, amplified too."""
    base = base_scalar_model(model)
    embedding, pad = base.get_input_embeddings().weight, base.config.get_text_config().pad_token_id
    ids = torch.tensor([token for token in range(12) if token != pad][:8], device=embedding.device)
    ids = (ids % embedding.shape[0]).view(2, 4)
    lengths, factor = (4, 3), 1.0
    rows = torch.tensor([b * 4 + length - 1 for b, length in enumerate(lengths)])
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False), evaluating(base):
        for _ in range(2):
            with _amplified(base, factor):
                ours = base(input_ids=ids, rows=rows)
                own = [base(input_ids=ids[b : b + 1, :length]).logits for b, length in enumerate(lengths)]
            theirs = torch.cat(own).float().squeeze(-1).to(ours.device)
            if not theirs.isfinite().all():
                if factor != 1.0:  # amplified beyond what float16 holds
                    break
                raise ValueError(
                    f"{type(base).__name__} has scores that are nan or infinite on a few tokens: its weights are no "
                    "numbers to train"
                )
            narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in base.parameters())
            tolerance = (3e-2 if narrow else 2e-3) * float(theirs.abs().max()) + 1e-6 * factor
            if theirs.shape != ours.shape or not torch.allclose(ours, theirs, rtol=0.0, atol=tolerance):
                raise ValueError(
                    f"the scores of {type(base).__name__} at the last tokens of a padded batch are not those that it "
                    "gives by itself: attention is not causal, or more than one linear layer lies between backbone and "
                    "score, so the head cannot be fused"
                )
            factor = _PROBE_SCORE / max(float(ours.abs().max()) / factor, 1e-6)


@contextmanager
def _amplified(base: PreTrainedModel, factor: float) -> Iterator[None]:
    """The backbone's output times `factor`, in the head's dtype: a frozen 16-bit trunk may have a float32 head."""
    dtype = scalar_head(base).weight.dtype

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = (output.last_hidden_state * factor).to(dtype)
        return output

    handle = base.base_model.register_forward_hook(amplify)
    try:
        yield
    finally:
        handle.remove()

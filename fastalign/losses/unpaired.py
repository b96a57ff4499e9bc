"""Preference losses on single responses, each labelled desirable or not. The variants stand in `catalogue`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.losses.catalogue import DPO_LOSSES, DPOLoss
from fastalign.losses.options import check_dpo_options, check_shift
from fastalign.losses.reduction import check_reduction, reduce_losses
from fastalign.losses.terms import DPOOptions, Responses
from fastalign.types import LossOutput, Metric


def kto_loss(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, *, kl: Tensor | None = None, shift: float | Tensor = 0.0,
    beta: float = 0.1, loss_type: str = "kto", desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
    reduction: str = "mean", num_items: int | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Kahneman–Tversky optimisation (arXiv 2402.01306) and its relatives on single responses, s = logps − ref_logps:

        kto:                λ_D·(1 − σ(β(s − z₀))) desirable,   λ_U·(1 − σ(β(z₀ − s))) undesirable,   z₀ = max(0, kl)
        bco:                −λ_D·log σ(βs − δ),                 −λ_U·log σ(−(βs − δ))             (arXiv 2404.04656)
        apo_zero_unpaired:  λ_D·(1 − σ(βs)),                    λ_U·σ(βs)                         (arXiv 2408.06266)

    Args:
        logps, ref_logps: (S,), each response's log-prob in nats under policy and reference, summed over its completion
            tokens. 16-bit inputs are computed in float32.
        labels: (S,) bool, True = desirable.
        kl: 0-dim, `kto_kl(...).value` of the *global* batch, nats; "kto" needs it, the others refuse it. No gradient
            flows there, and it counts as 0 where it is negative.
        shift: δ of "bco" in reward units, a number or 0-dim tensor: ½(E[βs | desirable] + E[βs | undesirable]), a
            running mean.
        desirable_weight, undesirable_weight: λ_D, λ_U ≥ 0.
        reduction: "mean" (over responses), "sum" or "none" ((S,)).
        num_items: denominator of "mean": the responses over all micro-batches and processes; None: the S at hand.

    Returns:
        LossOutput. Metrics: `rewards/chosen`, `logps/chosen` (means of βs and logps over desirable responses),
        `rewards/rejected`, `logps/rejected` (over undesirable ones), and with "kto" `kl`, z₀. They add up over
        micro-batches and processes; of one without such a response a mean has weight 0.

    Raises:
        ValueError: an unknown or pairwise `loss_type`, kl missing or given where it would be ignored, arguments of
            differing shape or device, labels that are not bool, or a value out of range.
    """
    check_reduction(reduction, num_items)
    options: dict[str, Any] = {
        "beta": beta, "loss_type": loss_type, "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }  # fmt: skip
    losses = response_losses(logps, ref_logps, labels, kl=kl, shift=shift, **options)
    metrics = response_metrics(logps, ref_logps, labels, kl=kl, beta=beta)
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def response_losses(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, *, kl: Tensor | None = None, shift: float | Tensor = 0.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The losses of `kto_loss`, (S,), without metrics: each response by itself."""
    options = {"loss_type": "kto"} | options
    variant = check_response_call(kl=kl, shift=shift, **options)
    logratios = torch.sub(*_checked(logps, ref_logps, labels))
    if kl is not None:
        if kl.device.type not in ("cpu", logps.device.type) or not kl.is_floating_point():
            raise ValueError(f"kl: {kl.dtype} on {kl.device}, accepted is a float on {logps.device} or on the host")
        kl = kl.detach().clamp(min=0).to(logratios.dtype)
    return variant.fn(Responses(logratios, labels, kl, shift, DPOOptions(**options)))


@torch.no_grad()
def response_metrics(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, *, kl: Tensor | None = None, beta: float = 0.1
) -> dict[str, Metric]:
    """The metrics of `kto_loss`, detached; arguments as there."""
    logps, ref_logps = _checked(logps, ref_logps, labels)
    metrics: dict[str, Metric] = {}
    for side, chosen in (("chosen", labels), ("rejected", ~labels)):
        counts = chosen.to(logps.dtype)
        metrics[f"rewards/{side}"] = Metric((beta * (logps - ref_logps) * counts).sum(), counts.sum())
        metrics[f"logps/{side}"] = Metric((logps * counts).sum(), counts.sum())
    if kl is not None:
        count = logps.new_full((), len(labels))
        metrics["kl"] = Metric(kl.to(logps.dtype).clamp(min=0) * count, count)
    return metrics


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Metric:
    """KTO's estimate of KL(π‖π_ref), nats: the mean of logps − ref_logps over mismatched pairs (x_i, y_{i+1}).

    Both (S,), each response's summed log-prob after *another* example's prompt. Detached; merge the metrics of all
    micro-batches and processes before taking `value`, so that every part of a batch is measured from the same point.
    """
    kl_logps, ref_kl_logps = _checked(kl_logps.detach(), ref_kl_logps.detach(), None)
    difference = kl_logps - ref_kl_logps
    return Metric(difference.sum(), difference.new_full((), difference.numel()))


def check_response_call(*, kl: Tensor | None, shift: float | Tensor, **options: Any) -> DPOLoss:
    """The variant, once `kto_loss` has what it needs and nothing that it would ignore; else ValueError."""
    given = DPOOptions(**options)
    variant = check_dpo_options(**options)[0]
    name = f"loss_type={given.loss_type!r}"
    if variant.rows != "responses":
        able = ", ".join(repr(key) for key, entry in DPO_LOSSES.items() if entry.rows == "responses")
        raise ValueError(f"{name} is a loss on pairs: call dpo_loss; on single responses there are {able}")
    if variant.needs_kl and kl is None:
        raise ValueError(f"{name} needs kl, its reference point: kto_kl(...).value of the global batch")
    if kl is not None and not variant.needs_kl:
        raise ValueError(f"{name} has no reference point: kl would be ignored; leave it out")
    if kl is not None and kl.dim() != 0:
        raise ValueError(f"kl: shape {tuple(kl.shape)}, accepted is a 0-dim tensor")
    check_shift(given, (variant,), shift)
    return variant


def _checked(logps: Tensor, ref_logps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log-probs in one dtype, float32 at least."""
    if logps.dim() != 1:
        raise ValueError(f"logps: shape {tuple(logps.shape)}, accepted is (S,), one sum per response")
    if labels is not None and labels.dtype != torch.bool:
        raise ValueError(f"labels: dtype {labels.dtype}, accepted is bool, True = desirable")
    dtype = torch.float32
    for name, values in (("logps", logps), ("ref_logps", ref_logps), ("labels", labels)):
        if values is None:
            continue
        if values.shape != logps.shape or values.device != logps.device:
            raise ValueError(
                f"{name}: shape {tuple(values.shape)} on {values.device}, accepted is that of logps, "
                f"{tuple(logps.shape)} on {logps.device}"
            )
        if values.is_floating_point():
            dtype = torch.promote_types(dtype, values.dtype)
        elif name != "labels":
            raise ValueError(f"{name}: dtype {values.dtype}, accepted are floating-point log-probs")
    return logps.to(dtype), ref_logps.to(dtype)

"""Policy-gradient losses from hidden states, streamed token by token, or sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.losses import check_policy_options, check_reduction, policy_losses, policy_metrics, token_weights
from fastalign.losses.policy_options import PolicyOptions
from fastalign.losses.sampler import check_sampler_options, sampler_weights
from fastalign.losses.sequences import Sequences
from fastalign.ops import linear_loss
from fastalign.ops.arguments import check_boundaries
from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, old_logps: Tensor, advantages: Tensor,
    ref_logps: Tensor | None = None, cu_seqlens: Tensor | None = None, loss_type: str = "ppo",
    importance_sampling_level: str | None = None, epsilon_low: float | None = None, epsilon_high: float | None = None,
    dual_clip: float | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", entropy_coef: float = 0.0,
    aggregation: str | None = None, max_completion_length: int | None = None, sampler_logps: Tensor | None = None,
    sampler_correction: str = "token_truncate", sampler_cap: float = 2.0, reduction: str = "mean",
    num_items: int | Tensor | None = None, rows: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
    token_metrics: bool = False, backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None, skip_rows: str = "auto",
) -> LossOutput:  # fmt: skip
    """PPO and its variants from hidden states, streamed: three GEMMs, no logits, no second pass.

    Equal to `losses.ppo_loss(linear_logps(...).logps, ...)` in loss, gradients and metrics; REINFORCE, RLOO and GRPO
    are this function with other advantages. It is streamed token by token where the ratio is a token's, and by whole
    sequences where it is a sequence's (GSPO). Tokens without a gradient, which are the clipped ones and those whose
    advantage is 0, unless a KL or entropy term gives them one, cost one GEMM instead of three: they are scored for the
    metrics and left out of the gradient GEMMs, on a GPU as `skip_rows` says.

    Args:
        hidden: padded (B, T, H), or packed (N, H) with cu_seqlens; targets: (B, T) or (N,) int64, aligned with hidden,
            `ignore_index` on prompt, padding and whatever was not sampled, whose rows cost nothing.
        cu_seqlens: (S + 1,) int32 on the host, over all N tokens; not needed where nothing is asked of sequences, by
            importance_sampling_level="token" and aggregation="token_mean".
        weight: (V, H) the head. bias: (V,) or None. temperature: that of the sampler, so that ratios start at 1.
        old_logps, advantages, ref_logps, sampler_logps: targets' shape, float; what they hold where targets are
            ignored, NaN included, never enters.
        loss_type, importance_sampling_level, epsilon_low, epsilon_high, dual_clip, kl_coef, kl_estimator, entropy_coef,
            aggregation, max_completion_length, sampler_correction, sampler_cap, reduction, num_items: as in
            `losses.ppo_loss`. The entropy's gradient flows through the head.
        token_metrics: also `entropy` (without entropy_coef it is computed for this metric alone).
        rows, logit_scale, softcap, backend, schedule, workspace_mb, accumulate_into, skip_rows: as in
            `linear_logps`.
    Returns:
        LossOutput with the metrics of `losses.ppo_loss`.
    Raises:
        ValueError: as those two, and for old_logps, advantages, ref_logps or sampler_logps of another shape or
            requiring grad.
    """
    check_reduction(reduction, num_items)
    if reduction == "none":
        raise ValueError("reduction='none' keeps every token's loss: call linear_logps and losses.ppo_loss")
    options = check_policy_options(
        loss_type=loss_type, importance_sampling_level=importance_sampling_level, epsilon_low=epsilon_low,
        epsilon_high=epsilon_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_estimator=kl_estimator,
        entropy_coef=entropy_coef, aggregation=aggregation, max_completion_length=max_completion_length,
        has_reference=ref_logps is not None,
    )  # fmt: skip
    check_sampler_options(sampler_correction, sampler_cap, sampler_logps is not None)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    given = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    inputs = _per_token(targets, given)
    whole = (sampler_correction,) if sampler_logps is not None else ()
    _check_sequences(targets, cu_seqlens, options, *whole)
    mask = targets != ignore_index
    inputs["weights"], denominator = token_weights(
        mask,
        options.aggregation,
        num_items,
        max_completion_length,
        cu_seqlens=cu_seqlens,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    )
    corrections: dict[str, Metric] = {}
    if sampler_logps is not None:
        inputs["sampler_weights"], corrections = sampler_weights(
            old_logps, inputs.pop("sampler_logps"), mask, sampler_correction=sampler_correction,
            sampler_cap=sampler_cap, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    streamed = _Streamed(options)
    out = linear_loss(
        streamed.losses, hidden, weight, targets, groups=None if options.by_sequence else "tokens",
        cu_seqlens=_unequal(cu_seqlens, targets) if options.by_sequence else None, inputs=inputs,
        metrics_fn=streamed.metrics, denominator=1.0 if reduction == "sum" else denominator,
        entropy=bool(entropy_coef) or token_metrics, entropy_grad=bool(entropy_coef), rows=rows, bias=bias,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index, backend=backend,
        schedule=schedule, workspace_mb=workspace_mb, accumulate_into=accumulate_into, skip_rows=skip_rows,
    )  # fmt: skip
    return LossOutput(out.loss, out.metrics | corrections)


class _Streamed:
    """The loss and metrics of a chunk: tokens, or whole sequences with cu over their scored tokens."""

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options

    def losses(self, scored: LinearLogps, cu: Tensor | None, weights: Tensor, **given: Tensor) -> Tensor:
        logps, sequences = scored.logps, _sequences(scored, cu)
        given = {name: tensor.to(logps.dtype) for name, tensor in given.items()}
        losses = weights.to(logps.dtype) * policy_losses(
            self._options, logps, **given, entropy=scored.entropy, sequences=sequences
        )
        return losses if sequences is None else sequences.sums(losses)

    def metrics(
        self, scored: LinearLogps, cu: Tensor | None, weights: Tensor, sampler_weights: Tensor | None = None,
        **given: Tensor,
    ) -> dict[str, Metric]:  # fmt: skip
        given = {name: tensor.to(scored.logps.dtype) for name, tensor in given.items()}
        return policy_metrics(
            self._options, scored.logps, **given, entropy=scored.entropy, sequences=_sequences(scored, cu)
        )


def _sequences(scored: LinearLogps, cu: Tensor | None) -> Sequences | None:
    return (
        None if cu is None else Sequences(torch.ones_like(scored.logps, dtype=torch.bool), cu, dtype=scored.logps.dtype)
    )


def _per_token(targets: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that there are, checked."""
    found = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in found.items():
        if tensor.shape != targets.shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, accepted is that of targets, {tuple(targets.shape)}"
            )
        if tensor.device != targets.device or tensor.is_complex():
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, accepted are real numbers on {targets.device}, as targets"
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient flows there: detach it")
    return found


def _check_sequences(targets: Tensor, cu_seqlens: Tensor | None, options: PolicyOptions, *correction: str) -> None:
    """Raise ValueError where sequences are needed and not known."""
    if cu_seqlens is not None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: it belongs on the host")
        check_boundaries(cu_seqlens, targets.device)
        if targets.dim() != 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != len(targets) or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens goes with packed targets (N,) and rises from 0 to N, got targets {tuple(targets.shape)} "
                f"and cu_seqlens {cu_seqlens[:8].tolist()}"
            )
    elif targets.dim() != 2:
        asked = {
            f"importance_sampling_level={options.importance_sampling_level!r}": options.by_sequence,
            f"aggregation={options.aggregation!r}": options.aggregation != "token_mean",
        } | {f"sampler_correction={name!r}": name.startswith("sequence") for name in correction}
        for name in (name for name, needed in asked.items() if needed):
            raise ValueError(
                f"{name} needs sequences: targets (B, T), or (N,) with cu_seqlens; got {tuple(targets.shape)}"
            )


def _unequal(cu_seqlens: Tensor | None, targets: Tensor) -> Tensor | None:
    """With an empty sequence more where there are as many sequences as tokens: inputs (N,) are then taken per token."""
    if cu_seqlens is None or len(cu_seqlens) - 1 != len(targets):
        return cu_seqlens
    return torch.cat([cu_seqlens, cu_seqlens[-1:]])

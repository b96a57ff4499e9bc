"""Preference losses on pairs: a chosen and a rejected response to one prompt. The variants stand in `pairwise`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.losses.metrics import correlation_metrics, mean_metric
from fastalign.losses.pairwise import Pairs, check_dpo_options
from fastalign.losses.reduction import check_reduction, reduce_losses
from fastalign.types import LossOutput, Metric


def pair_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_alpha: float = 0.0,
) -> Tensor:
    """The losses of `dpo_loss`, (P,), without metrics: each pair by itself, so that a batch can be done in pieces."""
    has_lengths = chosen_lengths is not None and rejected_lengths is not None
    variant = check_dpo_options(
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        length_alpha=length_alpha,
        has_lengths=has_lengths,
    )
    logps, lengths = _checked(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    )
    pairs = Pairs(logps[0] - logps[2], logps[1] - logps[3], *lengths, length_alpha)
    return variant.fn(pairs, beta, label_smoothing)


@torch.no_grad()
def dpo_metrics(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 0.1,
) -> dict[str, Metric]:
    """The metrics of `dpo_loss`, detached; arguments as there, and the same for every `loss_type`."""
    logps, (n_chosen, n_rejected) = _checked(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    )
    chosen_rewards, rejected_rewards = beta * (logps[0] - logps[2]), beta * (logps[1] - logps[3])
    margins = chosen_rewards - rejected_rewards
    metrics = {
        "rewards/chosen": mean_metric(chosen_rewards),
        "rewards/rejected": mean_metric(rejected_rewards),
        "rewards/margins": mean_metric(margins),
        "rewards/accuracies": mean_metric((chosen_rewards > rejected_rewards).to(margins.dtype)),
        "logps/chosen": mean_metric(logps[0]),
        "logps/rejected": mean_metric(logps[1]),
    }
    if n_chosen is not None and n_rejected is not None:
        metrics["length/chosen"] = mean_metric(n_chosen)
        metrics["length/rejected"] = mean_metric(n_rejected)
        metrics |= correlation_metrics("length/margin_correlation", margins, n_chosen - n_rejected)
    return metrics


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_alpha: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LossOutput:
    """Direct preference optimisation (arXiv 2305.18290) and its pairwise relatives, from sequence log-probs.

        sigmoid:  −log σ(βΔ),   Δ = (chosen_logps − ref_chosen_logps) − (rejected_logps − ref_rejected_logps)

    The other variants and their sources stand in `DPO_LOSSES`.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (P,), each response's log-prob in nats under
            the policy and the reference, *summed* over its completion tokens. 16-bit inputs are computed in float32;
            float64 stays float64.
        chosen_lengths, rejected_lengths: (P,), integer or float, the numbers of completion tokens. Needed by "ipo",
            "sigmoid_norm" and a `length_alpha`; where given, they add the length metrics.
        beta: strength of the tie to the reference, > 0. In "ipo" it is the paper's τ.
        label_smoothing: ε in [0, 0.5), the share of preferences taken to be flipped; in "sigmoid" the conservative
            loss (cDPO), in "robust" the unbiased one.
        length_alpha: α of length-regularised DPO (R-DPO, arXiv 2403.19159 eq. 9), reward units per token:

                −log σ(βΔ + α(|y_w| − |y_l|))

            *Plus.* The regularised objective is max E[r(x, y) − α|y|] − β·KL(π‖π_ref), its optimum
            π* ∝ π_ref·exp((r − α|y|)/β), hence r = β·log(π*/π_ref) + α|y| + const: the loss puts this r into
            Bradley–Terry. A longer chosen response owes part of its margin to its length and is pushed less. The form
            with a minus, seen in print, contradicts its own closed-form policy and rewards length. A negative α does
            just that; 0 is DPO to the bit.
        reduction: "mean" (over pairs), "sum" or "none" (the (P,) losses).
        num_items: denominator of "mean": the pairs over all micro-batches and processes of the optimiser step.
            None: the P pairs at hand.

    Returns:
        LossOutput. Metrics, means over pairs: `rewards/chosen` and `rewards/rejected` (β·s; α|y| is not in them),
        `rewards/margins`, `rewards/accuracies` (a tie is not a win), `logps/chosen`, `logps/rejected`; with lengths
        `length/chosen`, `length/rejected` and, through `summarize`, `length/margin_correlation` (Pearson, of the margin
        with |y_w| − |y_l|). All add up over micro-batches and processes.

    Raises:
        ValueError: an unknown `loss_type` or `reduction`, an option the variant cannot honour, lengths missing,
            arguments of differing shape or device, or a value out of range.
    """
    check_reduction(reduction, num_items)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = pair_losses(
        *logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        length_alpha=length_alpha,
    )
    metrics = dpo_metrics(*logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, beta=beta)
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def _checked(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
) -> tuple[list[Tensor], tuple[Tensor | None, Tensor | None]]:
    """The four log-probs and the two lengths in one dtype, float32 at least, once their shapes and devices agree."""
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: shape {tuple(chosen_logps.shape)}, accepted is (P,), one sum per response")
    dtype = torch.float32
    for name, values in zip(names, logps, strict=True):
        _check_like(name, values, chosen_logps)
        if not values.is_floating_point():
            raise ValueError(f"{name}: dtype {values.dtype}, accepted are floating-point log-probs")
        dtype = torch.promote_types(dtype, values.dtype)
    lengths = (chosen_lengths, rejected_lengths)
    for name, given in zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True):
        if given is not None:
            _check_like(name, given, chosen_logps)
    if (chosen_lengths is None) != (rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise ValueError(f"{missing} is missing: the two lengths go together")
    to = [None if given is None else given.to(dtype) for given in lengths]
    return [values.to(dtype) for values in logps], (to[0], to[1])


def _check_like(name: str, values: Tensor, like: Tensor) -> None:
    if values.shape != like.shape or values.device != like.device:
        raise ValueError(
            f"{name}: shape {tuple(values.shape)} on {values.device}, "
            f"accepted is that of chosen_logps, {tuple(like.shape)} on {like.device}"
        )

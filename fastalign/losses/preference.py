"""Preference losses on pairs: a chosen and a rejected response to one prompt. The variants stand in `catalogue`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.catalogue import DPO_LOSSES, DPOLoss
from fastalign.losses.metrics import correlation_metrics, mean_metric
from fastalign.losses.options import check_dpo_options, check_reference, check_shift
from fastalign.losses.pair_inputs import check_like, make_pairs
from fastalign.losses.reduction import check_reduction, reduce_losses
from fastalign.losses.terms import DPOOptions, Pairs, log_odds
from fastalign.types import LossOutput, Metric


def pair_losses(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None, *, chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None, tail_logps: Sequence[Tensor] | None = None, weights: Tensor | None = None,
    shift: float | Tensor = 0.0, sft_scale: float | Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The losses of `dpo_loss`, (P,), without metrics: each pair by itself, so that a batch can be done in pieces.

    sft_scale: pairs over chosen tokens of the whole batch, which "sft" needs to know in a piece; None: those at hand.
    A loss that couples its batch (aot) takes the pairs at hand for all of it.
    """
    given = DPOOptions(**options)
    has_lengths = chosen_lengths is not None and rejected_lengths is not None
    has_reference = ref_chosen_logps is not None or ref_rejected_logps is not None
    variants = check_pair_call(has_reference=has_reference, shift=shift, has_lengths=has_lengths, **options)
    _check_weights(given, variants, weights)
    pairs = make_pairs(
        given, (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps), (chosen_lengths, rejected_lengths),
        tail_logps,
    )  # fmt: skip
    if weights is not None:
        check_like("weights", weights, chosen_logps)
    if "sft" in given.loss_types and sft_scale is None:
        n_chosen = pairs.lengths()[0]
        sft_scale = len(n_chosen) / n_chosen.sum().clamp(min=1)
    pairs = pairs._replace(shift=shift, sft_scale=0.0 if sft_scale is None else sft_scale)
    factors = given.loss_weights or (1.0,) * len(variants)
    losses = [variant.fn(pairs) for variant in variants]
    total = losses[0] if given.loss_weights is None else factors[0] * losses[0]
    for factor, more in zip(factors[1:], losses[1:], strict=True):
        total = total + factor * more
    return total if weights is None else total * weights.to(total.dtype)


def check_pair_call(
    *, has_reference: bool, shift: float | Tensor, has_lengths: bool = True, **options: Any
) -> tuple[DPOLoss, ...]:
    """The variants, once `dpo_loss` has what they need and nothing that they would ignore; else ValueError."""
    given = DPOOptions(**options)
    variants = check_dpo_options(**options, has_lengths=has_lengths)
    if variants[0].rows != "pairs":
        raise ValueError(f"loss_type={given.loss_type!r} is a loss on single responses: call kto_loss")
    check_reference(given, variants, has_reference)
    check_shift(given, variants, shift)
    return variants


def _check_weights(options: DPOOptions, variants: Sequence[DPOLoss], weights: Tensor | None) -> None:
    if weights is None:
        if options.use_weighting:
            raise ValueError("use_weighting needs weights (P,), see wpo_weights")
        return
    if weights.requires_grad:
        raise ValueError("weights requires grad, but no gradient flows there: detach it")
    if any(variant.couples_batch for variant in variants):
        raise ValueError(
            f"loss_type={options.loss_type!r} does not take weights: its losses are of ranks, not of pairs"
        )


@torch.no_grad()
def dpo_metrics(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None, *, chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None, tail_logps: Sequence[Tensor] | None = None, beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid", ld_alpha: float | None = None,
) -> dict[str, Metric]:  # fmt: skip
    """The metrics of `dpo_loss`, detached; arguments as there, and the same for every `loss_type` with a reference."""
    options = DPOOptions(beta=beta, loss_type=loss_type, ld_alpha=ld_alpha)
    pairs = make_pairs(
        options, (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps),
        (chosen_lengths, rejected_lengths), tail_logps,
    )  # fmt: skip
    variants = [DPO_LOSSES[name] for name in options.loss_types]
    chosen_rewards, rejected_rewards = pairs.rewards()
    if ref_chosen_logps is None and any(variant.mean_rewards for variant in variants):
        if pairs.chosen_lengths is None:
            raise ValueError(
                f"loss_type={loss_type!r} has rewards per token: it needs chosen_lengths, rejected_lengths"
            )
        chosen_rewards, rejected_rewards = (beta * mean for mean in pairs.mean_logps())
    margins = chosen_rewards - rejected_rewards
    metrics = {
        "rewards/chosen": mean_metric(chosen_rewards),
        "rewards/rejected": mean_metric(rejected_rewards),
        "rewards/margins": mean_metric(margins),
        "rewards/accuracies": mean_metric((chosen_rewards > rejected_rewards).to(margins.dtype)),
        "logps/chosen": mean_metric(pairs.weighted_logps[0]),
        "logps/rejected": mean_metric(pairs.weighted_logps[1]),
    }
    n_chosen, n_rejected = pairs.chosen_lengths, pairs.rejected_lengths
    if n_chosen is not None and n_rejected is not None:
        metrics["length/chosen"] = mean_metric(n_chosen)
        metrics["length/rejected"] = mean_metric(n_rejected)
        metrics |= correlation_metrics("length/margin_correlation", margins, n_chosen - n_rejected)
        metrics |= _likelihood_metrics(pairs)
    return metrics


def _likelihood_metrics(pairs: Pairs) -> dict[str, Metric]:
    """Those of the losses with a likelihood term, under the names that TRL gives them."""
    found: dict[str, Metric] = {}
    names = pairs.options.loss_types
    if any(name in ("sft", "cpo", "orpo") for name in names):
        found["nll_loss"] = Metric(-pairs.chosen_logps.sum(), pairs.lengths()[0].sum())
    if "orpo" in names:
        odds = torch.sub(*(log_odds(mean) for mean in pairs.mean_logps()))
        found["log_odds_chosen"] = mean_metric(odds)
        found["log_odds_ratio"] = mean_metric(F.logsigmoid(odds))
    return found


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None, *, chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None, beta: float = 0.1, loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None, label_smoothing: float = 0.0, length_alpha: float = 0.0,
    f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5, discopop_tau: float = 0.05,
    ld_alpha: float | None = None, tail_logps: Sequence[Tensor] | None = None, use_weighting: bool = False,
    weights: Tensor | None = None, simpo_gamma: float = 0.5, cpo_alpha: float = 1.0, shift: float | Tensor = 0.0,
    num_chosen_tokens: int | Tensor | None = None, reduction: str = "mean", num_items: int | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Direct preference optimisation (arXiv 2305.18290) and its pairwise relatives, from sequence log-probs.

        sigmoid:  −log σ(βΔ),   Δ = (chosen_logps − ref_chosen_logps) − (rejected_logps − ref_rejected_logps)

    The other variants, their sources and which options each takes stand in `DPO_LOSSES`. An option that none of the
    variants takes is refused.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (P,), each response's log-prob in nats under
            the policy and the reference, *summed* over its completion tokens. 16-bit inputs are computed in float32;
            float64 stays float64. Without the reference's for "simpo", "orpo", "cpo" and "sft", which have none.
        chosen_lengths, rejected_lengths: (P,), integer or float, the numbers of completion tokens. Needed by "ipo",
            "sigmoid_norm", the losses without a reference and a `length_alpha`; where given, they add the length
            metrics.
        beta: strength of the tie to the reference, > 0. In "ipo" it is the paper's τ, in "orpo" its λ.
        loss_type: a name of `DPO_LOSSES`, or a list of names whose losses are added up. "aot" and "aot_unpaired" sort
            the pairs at hand: of micro-batches they are not the loss of the whole batch.
        loss_weights: a factor ≥ 0 per name of `loss_type`; None: 1.
        label_smoothing: ε in [0, 0.5), the share of preferences taken to be flipped; in "sigmoid" the conservative
            loss (cDPO), in "robust" the unbiased one. "exo_pair" needs it above 0.
        length_alpha: α of length-regularised DPO (R-DPO, arXiv 2403.19159 eq. 9), reward units per token:

                −log σ(βΔ + α(|y_w| − |y_l|))

            *Plus.* The regularised objective is max E[r(x, y) − α|y|] − β·KL(π‖π_ref), its optimum
            π* ∝ π_ref·exp((r − α|y|)/β), hence r = β·log(π*/π_ref) + α|y| + const: the loss puts this r into
            Bradley–Terry. A longer chosen response owes part of its margin to its length and is pushed less. The form
            with a minus, seen in print, contradicts its own closed-form policy and rewards length. A negative α does
            just that; 0 is DPO to the bit.
        f_divergence_type, f_alpha_divergence_coef: the divergence that ties the policy to the reference instead of the
            reverse KL (f-DPO, arXiv 2309.16240): replaces each log-ratio by f of it, see `F_DIVERGENCES`.
        discopop_tau: temperature of "discopop", > 0.
        ld_alpha: weight in [0, 1] of the tokens beyond min(|y_w|, |y_l|) in the log-ratios (LD-DPO, arXiv 2409.06411),
            policy and reference alike; needs `tail_logps`. Terms without a reference keep their plain log-probs.
        tail_logps: four (P,) in the order of the log-probs: their sums over those tokens (`tail_mask`) alone.
        use_weighting, weights: (P,), detached: the loss of a pair is multiplied by its weight (WPO, `wpo_weights`).
        simpo_gamma: γ of "simpo", its target margin. cpo_alpha: λ of "cpo", the weight of its likelihood term.
        shift: δ of "bco_pair" in reward units, a number or 0-dim tensor: ½(E[βs_w] + E[βs_l]), a running mean.
        num_chosen_tokens: denominator of "sft", the chosen tokens of all that `num_items` counts; None: those at hand.
        reduction: "mean" (over pairs), "sum" or "none" (the (P,) losses; of "aot" by rank instead of by pair).
        num_items: denominator of "mean": the pairs over all micro-batches and processes of the optimiser step.
            None: the P pairs at hand.

    Returns:
        LossOutput. Metrics, means over pairs: `rewards/chosen` and `rewards/rejected` (β·s; α|y| and f are not in them;
        without a reference β·logps, in "simpo" and "orpo" β times the mean log-prob), `rewards/margins`,
        `rewards/accuracies` (a tie is not a win), `logps/chosen`, `logps/rejected` (with `ld_alpha` weighted); with
        lengths `length/chosen`, `length/rejected` and, through `summarize`, `length/margin_correlation` (Pearson, of
        the margin with |y_w| − |y_l|). "sft", "cpo" and "orpo" add `nll_loss` (nats per chosen token), "orpo"
        `log_odds_chosen` and `log_odds_ratio` (the log-odds' difference, and log σ of it). All add up over
        micro-batches and processes.

    Raises:
        ValueError: an unknown `loss_type` or `reduction`, an option that no variant honours, lengths or reference
            missing, a reference that no variant looks at, arguments of differing shape or device, or a value out of
            range.
    """
    check_reduction(reduction, num_items)
    options: dict[str, Any] = {
        "beta": beta, "loss_type": loss_type, "loss_weights": loss_weights, "label_smoothing": label_smoothing,
        "length_alpha": length_alpha, "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef, "discopop_tau": discopop_tau, "ld_alpha": ld_alpha,
        "use_weighting": use_weighting, "simpo_gamma": simpo_gamma, "cpo_alpha": cpo_alpha,
    }  # fmt: skip
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    given: dict[str, Any] = {
        "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "tail_logps": tail_logps
    }  # fmt: skip
    scale = sft_scale(loss_type, chosen_lengths, num_chosen_tokens, num_items)
    losses = pair_losses(*logps, weights=weights, shift=shift, sft_scale=scale, **(given | options))
    metrics = dpo_metrics(*logps, **given, beta=beta, loss_type=loss_type, ld_alpha=ld_alpha)
    return LossOutput(reduce_losses(losses, reduction, num_items), metrics)


def sft_scale(
    loss_type: str | Sequence[str], chosen_lengths: Tensor | None, num_chosen_tokens: int | Tensor | None,
    num_items: int | Tensor | None, pairs: int | None = None,
) -> float | Tensor | None:  # fmt: skip
    """Pairs over chosen tokens, both of the whole batch: what makes "sft" a mean over tokens after the mean over pairs.

    None where both are to be those at hand. pairs: those at hand, if not as many as chosen_lengths.
    """
    has_term = "sft" in DPOOptions(loss_type=loss_type).loss_types
    if num_chosen_tokens is None:
        if has_term and num_items is not None:
            raise ValueError(
                "num_items counts the pairs of several batches: loss_type='sft' then needs num_chosen_tokens, their "
                "chosen tokens"
            )
        return None
    if not has_term:
        raise ValueError(f"num_chosen_tokens is the denominator of 'sft'; loss_type={loss_type!r} has no such term")
    if not isinstance(num_chosen_tokens, Tensor) and num_chosen_tokens <= 0:
        raise ValueError(f"num_chosen_tokens={num_chosen_tokens}: it must be positive")
    if num_items is None:
        num_items = pairs if chosen_lengths is None else len(chosen_lengths)
    if num_items is None:
        return None
    # a ratio of integer tensors would be rounded to float32
    return num_items / (num_chosen_tokens.double() if isinstance(num_chosen_tokens, Tensor) else num_chosen_tokens)

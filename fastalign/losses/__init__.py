"""Losses: pure functions of log-probs and rewards, the same on every device."""

from fastalign.losses.metrics import correlation_metrics, mean_metric, merge_metrics, summarize
from fastalign.losses.pairwise import DPO_LOSSES, DPOLoss, check_dpo_options
from fastalign.losses.preference import dpo_loss, dpo_metrics, pair_losses
from fastalign.losses.reduction import REDUCTIONS, check_reduction, reduce_losses

__all__ = [
    "DPO_LOSSES",
    "REDUCTIONS",
    "DPOLoss",
    "check_dpo_options",
    "check_reduction",
    "correlation_metrics",
    "dpo_loss",
    "dpo_metrics",
    "mean_metric",
    "merge_metrics",
    "pair_losses",
    "reduce_losses",
    "summarize",
]

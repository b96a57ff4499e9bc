"""Losses: pure functions of log-probs and rewards, the same on every device."""

from fastalign.losses.listwise import LISTWISE_LOSSES, infonce_loss, list_losses, list_metrics, pro_loss
from fastalign.losses.metrics import (
    correlation_metrics,
    deviation_metrics,
    explained_variance_metrics,
    mean_metric,
    merge_metrics,
    summarize,
)
from fastalign.losses.pairwise import DPO_LOSSES, DPOLoss, check_dpo_options
from fastalign.losses.policy import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    check_policy_options,
    kl_estimate,
    policy_losses,
    policy_metrics,
    ppo_loss,
    ppo_penalty_loss,
    token_weights,
)
from fastalign.losses.preference import dpo_loss, dpo_metrics, pair_losses
from fastalign.losses.reduction import REDUCTIONS, check_reduction, reduce_losses
from fastalign.losses.rewards import LABEL_LOSSES, bradley_terry_loss, label_loss, ranking_loss
from fastalign.losses.shaping import RunningMoments, shape_scores, token_rewards
from fastalign.losses.value import value_loss

__all__ = [
    "AGGREGATIONS",
    "DPO_LOSSES",
    "KL_ESTIMATORS",
    "LABEL_LOSSES",
    "LISTWISE_LOSSES",
    "REDUCTIONS",
    "DPOLoss",
    "RunningMoments",
    "bradley_terry_loss",
    "check_dpo_options",
    "check_policy_options",
    "check_reduction",
    "correlation_metrics",
    "deviation_metrics",
    "dpo_loss",
    "dpo_metrics",
    "explained_variance_metrics",
    "infonce_loss",
    "kl_estimate",
    "label_loss",
    "list_losses",
    "list_metrics",
    "mean_metric",
    "merge_metrics",
    "pair_losses",
    "policy_losses",
    "policy_metrics",
    "ppo_loss",
    "ppo_penalty_loss",
    "pro_loss",
    "ranking_loss",
    "reduce_losses",
    "shape_scores",
    "summarize",
    "token_rewards",
    "token_weights",
    "value_loss",
]

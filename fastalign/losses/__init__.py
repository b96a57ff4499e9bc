"""Losses: pure functions of log-probs and rewards, the same on every device."""

from fastalign.losses.catalogue import DPO_LOSSES, DPOLoss
from fastalign.losses.listwise import LISTWISE_LOSSES, infonce_loss, list_losses, list_metrics, pro_loss
from fastalign.losses.metrics import (
    correlation_metrics,
    deviation_metrics,
    explained_variance_metrics,
    mean_metric,
    merge_metrics,
    ratio_metrics,
    summarize,
)
from fastalign.losses.options import check_dpo_options
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
from fastalign.losses.policy_options import IMPORTANCE_SAMPLING_LEVELS, POLICY_LOSSES, PolicyLoss, PolicyOptions
from fastalign.losses.preference import check_pair_call, dpo_loss, dpo_metrics, pair_losses, sft_scale
from fastalign.losses.reduction import REDUCTIONS, check_reduction, reduce_losses
from fastalign.losses.rewards import LABEL_LOSSES, bradley_terry_loss, label_loss, ranking_loss
from fastalign.losses.sampler import SAMPLER_CORRECTIONS, sampler_weights
from fastalign.losses.shaping import RunningMoments, overlong_penalty, shape_scores, token_rewards
from fastalign.losses.terms import F_DIVERGENCES, DPOOptions
from fastalign.losses.unpaired import check_response_call, kto_kl, kto_loss, response_losses, response_metrics
from fastalign.losses.value import value_loss
from fastalign.losses.weighting import tail_mask, wpo_weights

__all__ = [
    "AGGREGATIONS",
    "DPO_LOSSES",
    "F_DIVERGENCES",
    "IMPORTANCE_SAMPLING_LEVELS",
    "KL_ESTIMATORS",
    "LABEL_LOSSES",
    "LISTWISE_LOSSES",
    "POLICY_LOSSES",
    "REDUCTIONS",
    "SAMPLER_CORRECTIONS",
    "DPOLoss",
    "DPOOptions",
    "PolicyLoss",
    "PolicyOptions",
    "RunningMoments",
    "bradley_terry_loss",
    "check_dpo_options",
    "check_pair_call",
    "check_policy_options",
    "check_reduction",
    "check_response_call",
    "correlation_metrics",
    "deviation_metrics",
    "dpo_loss",
    "dpo_metrics",
    "explained_variance_metrics",
    "infonce_loss",
    "kl_estimate",
    "kto_kl",
    "kto_loss",
    "label_loss",
    "list_losses",
    "list_metrics",
    "mean_metric",
    "merge_metrics",
    "overlong_penalty",
    "pair_losses",
    "policy_losses",
    "policy_metrics",
    "ppo_loss",
    "ppo_penalty_loss",
    "pro_loss",
    "ranking_loss",
    "ratio_metrics",
    "reduce_losses",
    "response_losses",
    "response_metrics",
    "sampler_weights",
    "sft_scale",
    "shape_scores",
    "summarize",
    "tail_mask",
    "token_rewards",
    "token_weights",
    "value_loss",
    "wpo_weights",
]

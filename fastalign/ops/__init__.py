"""Tensors to tensors, differentiable, stateless."""

from fastalign.ops.advantages import discounted_returns, gae, group_advantages, whiten
from fastalign.ops.linear_logps import linear_logps, linear_logps_reference
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.schedule import Plan, plan
from fastalign.ops.sequences import sequence_logps
from fastalign.ops.workspace import free_workspace

__all__ = [
    "Plan",
    "discounted_returns",
    "free_workspace",
    "gae",
    "group_advantages",
    "linear_logps",
    "linear_logps_reference",
    "linear_loss",
    "plan",
    "sequence_logps",
    "whiten",
]

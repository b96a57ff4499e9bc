"""The fused public losses: a pure loss of fastalign.losses and a schedule of fastalign.ops, a few lines each."""

from fastalign.linear.cross_entropy import linear_cross_entropy
from fastalign.linear.listwise import linear_pro_loss
from fastalign.linear.policy import linear_ppo_loss
from fastalign.linear.preference import linear_dpo_loss
from fastalign.linear.unpaired import linear_kto_loss

__all__ = ["linear_cross_entropy", "linear_dpo_loss", "linear_kto_loss", "linear_ppo_loss", "linear_pro_loss"]

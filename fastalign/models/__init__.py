"""Models: batches → hidden states. The only folder that knows transformers' model classes."""

from fastalign.models.causal import Head, find_head, fuse_head, has_router_loss, unfuse_head
from fastalign.models.layouts import TOKEN_LAYOUTS, TokenLayout, plan_layout, run_layout
from fastalign.models.loading import check_source, disable_dropout, load_causal_lm, upcast_trainable
from fastalign.models.packing import disable_segments, enable_segments
from fastalign.models.padding import separate_pad_token
from fastalign.models.rewards import (
    RewardNormalization,
    reward_normalization,
    score_sequences,
    set_reward_normalization,
)
from fastalign.models.scalar import (
    fuse_scalar_head,
    load_scalar_adapter,
    load_scalar_model,
    scalar_head,
    unfuse_scalar_head,
)
from fastalign.models.segments import Segments

__all__ = [
    "TOKEN_LAYOUTS",
    "Head",
    "RewardNormalization",
    "Segments",
    "TokenLayout",
    "check_source",
    "disable_dropout",
    "disable_segments",
    "enable_segments",
    "find_head",
    "fuse_head",
    "fuse_scalar_head",
    "has_router_loss",
    "load_causal_lm",
    "load_scalar_adapter",
    "load_scalar_model",
    "plan_layout",
    "reward_normalization",
    "run_layout",
    "scalar_head",
    "score_sequences",
    "separate_pad_token",
    "set_reward_normalization",
    "unfuse_head",
    "unfuse_scalar_head",
    "upcast_trainable",
]

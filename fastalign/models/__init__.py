"""Models: batches → hidden states. The only folder that knows transformers' model classes."""

from fastalign.models.causal import Head, find_head, fuse_head, has_router_loss, unfuse_head
from fastalign.models.loading import disable_dropout, load_causal_lm, upcast_trainable

__all__ = [
    "Head",
    "disable_dropout",
    "find_head",
    "fuse_head",
    "has_router_loss",
    "load_causal_lm",
    "unfuse_head",
    "upcast_trainable",
]

"""Rollouts: prompts → sampled completions with the sampler's log-probs, and the trainer's own beside them."""

from fastalign.rollouts.recompute import sampler_gap, score_completions
from fastalign.rollouts.transformers_sampler import TransformersSampler
from fastalign.rollouts.types import Completion, Sampler, SamplingOptions

__all__ = ["Completion", "Sampler", "SamplingOptions", "TransformersSampler", "sampler_gap", "score_completions"]

"""Rollouts: prompts → sampled completions with the sampler's log-probs, and the trainer's own beside them."""

from fastalign.rollouts.recompute import sampler_gap, score_completions
from fastalign.rollouts.transformers_sampler import TransformersSampler
from fastalign.rollouts.types import Completion, Sampler, SamplingOptions
from fastalign.rollouts.vllm_sampler import VLLMSampler

__all__ = [
    "Completion",
    "Sampler",
    "SamplingOptions",
    "TransformersSampler",
    "VLLMSampler",
    "sampler_gap",
    "score_completions",
]

"""Memory and time before running: what a step of a model's config would take, without weights and without a GPU."""

from fastalign.planning.head import HeadSettings
from fastalign.planning.models import ModelSettings, layout_of, meta_model
from fastalign.planning.plan import PARTS, StepPlan, parts_of, render, scaled_flops
from fastalign.planning.sizing import auto_micro_batch_tokens, memory_budget
from fastalign.planning.step import OptimizerSettings, StepRecord, count_tokens, record_step

__all__ = [
    "PARTS",
    "HeadSettings",
    "ModelSettings",
    "OptimizerSettings",
    "StepPlan",
    "StepRecord",
    "auto_micro_batch_tokens",
    "count_tokens",
    "layout_of",
    "memory_budget",
    "meta_model",
    "parts_of",
    "record_step",
    "render",
    "scaled_flops",
]

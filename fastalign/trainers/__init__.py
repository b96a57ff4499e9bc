"""Trainers: subclasses of transformers.Trainer on fused losses and cached references."""

from fastalign.trainers.dpo import DPOTrainer
from fastalign.trainers.dpo_config import DPOConfig

__all__ = ["DPOConfig", "DPOTrainer"]

"""Trainers: subclasses of transformers.Trainer on fused losses and cached references."""

from fastalign.trainers.dpo import DPOTrainer
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.ppo import PPOTrainer
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.pro import PROTrainer
from fastalign.trainers.pro_config import PROConfig
from fastalign.trainers.reward import RewardTrainer
from fastalign.trainers.reward_config import RewardConfig
from fastalign.trainers.sft import SFTTrainer
from fastalign.trainers.sft_config import SFTConfig

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PROConfig",
    "PROTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]

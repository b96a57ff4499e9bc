"""`RewardConfig`: the settings of reward models beside those that all trainers share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastalign.data import LABEL_TYPES
from fastalign.trainers.config import REFUSED, TrainerConfig, described

NORMALIZATIONS = ("none", "mean", "mean_std")


@dataclass
class RewardConfig(TrainerConfig):
    """Settings of `RewardTrainer`: TRL's names where TRL has one, over `TrainerConfig`. learning_rate is 1e-4.

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=1e-4, metadata=described("Peak learning rate of AdamW."))
    freeze_backbone: bool = field(
        default=False, metadata=described("Train the scalar head alone; nothing goes backward through the model.")
    )

    # ---- loss
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata=described("Weight of the squared sum of a pair's rewards, which keeps them centred; 0.01 is usual."),
    )
    label_type: str = field(
        default="auto",
        metadata=described(
            "What labels are: numbers that rewards are to equal (squared error), or good and not good (cross-entropy). "
            "auto: binary if all labels are booleans or the integers 0 and 1.",
            choices=("auto", *LABEL_TYPES),
        ),
    )

    # ---- normalisation
    normalize_rewards: str = field(
        default="none",
        metadata=described(
            "Measure trained rewards from their mean on a reference set, or by mean and standard deviation. Stored in "
            "config.json and applied by fastalign; plain transformers gives raw scores.",
            choices=NORMALIZATIONS,
        ),
    )
    reward_reference_name: str | None = field(
        default=None,
        metadata=described(
            "That reference set: rows as for training, or as for SFT. By default dataset_name, with its own split or "
            "the training data itself."
        ),
    )
    reward_reference_split: str | None = field(
        default=None, metadata=described("Split of the reference set; train unless given.")
    )
    reward_reference_samples: int | None = field(
        default=1000, metadata=described("Score at most so many of its first rows; null is all.")
    )

    # ---- options that are not supported, with the one value each may have
    chat_template_path: str | None = field(default=None, metadata=described(f"{REFUSED} Set tokenizer.chat_template."))
    eos_token: str | None = field(default=None, metadata=described(f"{REFUSED} Set tokenizer.eos_token."))
    backend: str = field(default="auto", metadata=described(f"{REFUSED} A scalar head has no row kernels."))
    schedule: str = field(default="auto", metadata=described(f"{REFUSED} A scalar head has no schedule."))
    workspace_mb: float | None = field(default=None, metadata=described(f"{REFUSED} A scalar head needs none."))
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=described(f"{REFUSED} transformers' sequence classifiers compute no load-balancing loss."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not 0 <= coefficient < math.inf:
            raise ValueError(f"center_rewards_coefficient={coefficient}: it must be at least 0 and finite")
        for name, choices in (("label_type", ("auto", *LABEL_TYPES)), ("normalize_rewards", NORMALIZATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(choices)}")
        if self.freeze_backbone and self.use_peft:
            raise ValueError("freeze_backbone=True trains the head alone, and use_peft=True an adapter: choose one")
        if self.normalize_rewards == "none":
            for name in ("reward_reference_name", "reward_reference_split"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} has no effect without normalize_rewards")
        if self.reward_reference_split is not None and self.reward_reference_name is None and self.dataset_name is None:
            raise ValueError(f"reward_reference_split={self.reward_reference_split!r} of no data set: name one")
        if (samples := self.reward_reference_samples) is not None and samples < 1:
            raise ValueError(f"reward_reference_samples={samples}: it must be at least 1, or null for all")

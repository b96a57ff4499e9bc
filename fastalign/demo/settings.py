"""The demonstration's settings. Imports nothing heavy, so that the command line can check a flag at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration does. The defaults take some three minutes of one core.

    Raises ValueError for a value that makes no sense, naming the field.
    """

    output_dir: str = _setting("demo-output", "Folder of the report, the plot, the models and the preferences.")
    seed: int = _setting(0, "Seed of everything random: the same seed gives the same figures.")

    length_bias: float = _setting(0.06, "What a token of length is worth to the annotators; in units of their logit.")
    gold_weight: float = _setting(4.0, "What a gold reward of 1 is worth to the annotators; in units of their logit.")
    length_alpha: float | None = _setting(
        None, "length_alpha of R-DPO. By default the annotators' length_bias, which in life one does not know."
    )
    beta: float = _setting(0.5, "beta of DPO and R-DPO.")

    sft_examples: int = _setting(8192, "Questions with a clerk's answer that the SFT model learns from.")
    sft_learning_rate: float = _setting(1e-2, "Peak learning rate of SFT.")
    preference_pairs: int = _setting(6144, "Pairs of answers that the annotators compare.")
    learning_rate: float = _setting(1.2e-3, "Peak learning rate of DPO and R-DPO.")
    batch_size: int = _setting(32, "Examples, or pairs, of one optimizer step.")

    ranked_questions: int = _setting(12288, "Questions with four answers each that the annotators rank.")
    reward_learning_rate: float = _setting(2e-3, "Peak learning rate of the reward model.")
    ppo_steps: int = _setting(30, "Phases of PPO, each with its rollouts and updates.")
    ppo_batch_size: int = _setting(256, "Answers that PPO samples in a phase.")
    ppo_learning_rate: float = _setting(8e-4, "Peak learning rate of PPO.")
    target_kl: float = _setting(3.0, "KL(policy ‖ SFT) of an answer, in nats, that PPO's controller holds.")

    questions: int = _setting(1024, "Questions that each model answers at the end.")
    curve_questions: int = _setting(256, "Questions answered at each point of the training curves.")
    curve_points: int = _setting(6, "Points of a training curve beside its start.")
    max_new_tokens: int = _setting(128, "An answer is cut off after so many tokens.")

    def __post_init__(self) -> None:
        at_least_two = ("questions", "curve_questions", "preference_pairs", "sft_examples", "ranked_questions")
        at_least_one = ("batch_size", "curve_points", "max_new_tokens", "ppo_steps", "ppo_batch_size")
        for names, least in ((at_least_two, 2), (at_least_one, 1)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}")
        for name in (
            "beta", "sft_learning_rate", "learning_rate", "reward_learning_rate", "ppo_learning_rate", "target_kl",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: it must be positive and finite")
        for name in ("length_bias", "gold_weight", "length_alpha"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name}={getattr(self, name)}: it must be finite")
        if self.batch_size > min(self.sft_examples, self.preference_pairs, self.ranked_questions):
            raise ValueError(f"batch_size={self.batch_size}: there are fewer examples, pairs or rankings than that")

    @property
    def alpha(self) -> float:
        """length_alpha, or what stands in for it."""
        return self.length_bias if self.length_alpha is None else self.length_alpha

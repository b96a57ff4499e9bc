"""`PROConfig`: the settings of listwise preference training beside those that all trainers share."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from fastalign.linear.listwise import DEFAULT_BETA, check_list_options
from fastalign.losses import LISTWISE_LOSSES
from fastalign.trainers.config import described
from fastalign.trainers.reference_config import ReferenceConfig


@dataclass
class PROConfig(ReferenceConfig):
    """Settings of `PROTrainer`, over `ReferenceConfig`. learning_rate is 5e-6, the paper's (arXiv 2306.17492).

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=5e-6, metadata=described("Peak learning rate of AdamW."))

    # ---- loss
    loss_type: str = field(
        default="pro",
        metadata=described(
            "pro: every response against all that are ranked behind it (without ties and rewards Plackett and Luce's "
            "likelihood). infonce: the best response against all others.",
            choices=tuple(LISTWISE_LOSSES),
        ),
    )
    reference_free: bool = field(
        default=True,
        metadata=described(
            "Score responses by the policy alone, as PRO does. false: by beta times the log-ratio to a reference, "
            "DPO's reward."
        ),
    )
    beta: float | None = field(
        default=None,
        metadata=described(f"What scores are multiplied by; by default 1, and {DEFAULT_BETA} with a reference."),
    )
    length_normalize: bool | None = field(
        default=None,
        metadata=described("Divide scores by the response's tokens; by default unless there is a reference."),
    )
    reward_temperatures: bool = field(
        default=False,
        metadata=described(
            "Weigh each comparison by the difference of the two scores in the data, which must then have a score for "
            "every response: PRO's temperatures."
        ),
    )
    sft_coef: float | str = field(
        default="auto",
        metadata=described(
            "Weight of the best response's negative log-prob per token. auto: the paper's 0.05(K - 1)^2 in a list of "
            "K, and 0 with a reference."
        ),
    )

    # ---- data
    merge_pairs: bool = field(
        default=False,
        metadata=described(
            "Of preference pairs, make one list of those that share a prompt and together rank its responses; "
            "otherwise each is a list of two."
        ),
    )

    token_metrics: bool = field(
        default=True, metadata=described("Also log entropy, and mean_token_accuracy of the best responses.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sft_coef, str):  # what a command line hands over
            with contextlib.suppress(ValueError):
                self.sft_coef = float(self.sft_coef)
        check_list_options(loss_type=self.loss_type, beta=self.beta, sft_coef=self.sft_coef)
        if self.reference_free:
            for name in ("ref_model_name_or_path", "cache_dir", "precompute_ref_batch_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with reference_free=True: no reference is asked"
                    )
        if self.merge_pairs and self.reward_temperatures:
            raise ValueError("merge_pairs=True is about pairs, and reward_temperatures=True needs scored lists")

    @property
    def sft_weight(self) -> float | str:
        """sft_coef as `linear_pro_loss` takes it."""
        return 0.0 if self.sft_coef == "auto" and not self.reference_free else self.sft_coef

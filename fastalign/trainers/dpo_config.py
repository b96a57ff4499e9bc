"""`DPOConfig`: the settings of DPO training beside those that all trainers share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastalign.losses import DPO_LOSSES, check_dpo_options
from fastalign.trainers.config import REFUSED, TrainerConfig, described

DEFAULT_CACHE_DIR = "~/.cache/fastalign/reference"
DEFAULT_REF_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass
class DPOConfig(TrainerConfig):
    """Settings of `DPOTrainer`: TRL's names where TRL has one, over `TrainerConfig`. learning_rate is 1e-6.

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=1e-6, metadata=described("Peak learning rate of AdamW."))
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata=described("Folder or hub name of the reference. By default the policy as it is before training."),
    )

    # ---- loss
    beta: float = field(
        default=0.1, metadata=described("Strength of the tie to the reference; in ipo the paper's tau.")
    )
    loss_type: str | list[str] = field(
        default="sigmoid", metadata=described("Variant of the preference loss.", choices=tuple(DPO_LOSSES))
    )
    label_smoothing: float = field(
        default=0.0, metadata=described("Share of preferences taken to be flipped, in [0, 0.5).")
    )
    length_alpha: float = field(
        default=0.0,
        metadata=described(
            "Length penalty of R-DPO in reward units per token: a longer chosen response is pushed less. 0 is DPO."
        ),
    )

    # ---- reference log-probs
    cache_dir: str | None = field(
        default=None,
        metadata=described(f"Folder of the reference log-probs, shared by all runs; by default {DEFAULT_CACHE_DIR}."),
    )
    precompute_ref_batch_tokens: int | None = field(
        default=None,
        metadata=described(
            "Padded tokens of one batch when reference log-probs are computed. By default "
            + ", ".join(f"{tokens} on {device}" for device, tokens in DEFAULT_REF_BATCH_TOKENS.items())
            + "."
        ),
    )
    token_metrics: bool = field(
        default=True, metadata=described("Also log entropy, mean_token_accuracy, logits/chosen and logits/rejected.")
    )

    # ---- TRL's options that are not supported, with the one value each may have
    precompute_ref_log_probs: bool = field(
        default=True, metadata=described("The reference is always scored beforehand; false is refused.")
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata=described(f"{REFUSED} precompute_ref_batch_tokens bounds a batch.")
    )
    loss_weights: list[float] | None = field(default=None, metadata=described(REFUSED))
    ld_alpha: float | None = field(default=None, metadata=described(REFUSED))
    f_divergence_type: str = field(default="reverse_kl", metadata=described(REFUSED))
    f_alpha_divergence_coef: float = field(default=0.5, metadata=described(REFUSED))
    discopop_tau: float = field(default=0.05, metadata=described(REFUSED))
    use_weighting: bool = field(default=False, metadata=described(REFUSED))
    sync_ref_model: bool = field(default=False, metadata=described(REFUSED))
    ref_model_mixup_alpha: float = field(default=0.6, metadata=described(REFUSED))
    ref_model_sync_steps: int = field(default=512, metadata=described(REFUSED))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs=False is not supported: the reference is always scored beforehand; "
                "accepted is True"
            )
        if isinstance(self.loss_type, list):
            if len(self.loss_type) != 1:
                raise ValueError(
                    f"loss_type={self.loss_type}: one variant is accepted; sums of several are not supported"
                )
            self.loss_type = self.loss_type[0]
        check_dpo_options(
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            length_alpha=self.length_alpha,
        )
        if (tokens := self.precompute_ref_batch_tokens) is not None and tokens <= 0:
            raise ValueError(f"precompute_ref_batch_tokens={tokens}: it must be positive")

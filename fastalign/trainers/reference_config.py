"""`ReferenceConfig`: the settings of trainers that keep a reference's log-probs on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastalign.trainers.config import TrainerConfig, described

DEFAULT_CACHE_DIR = "~/.cache/fastalign/reference"
DEFAULT_REF_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass
class ReferenceConfig(TrainerConfig):
    """What DPOConfig and PROConfig say of their reference, over `TrainerConfig`. Raises ValueError as that does."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata=described("Folder or hub name of the reference. By default the policy as it is before training."),
    )
    cache_dir: str | None = field(
        default=None,
        metadata=described(f"Folder of the reference log-probs, shared by all runs; by default {DEFAULT_CACHE_DIR}."),
    )
    precompute_ref_batch_tokens: int | None = field(
        default=None,
        metadata=described(
            "Computed tokens of one batch when reference log-probs are computed. By default "
            + ", ".join(f"{tokens} on {device}" for device, tokens in DEFAULT_REF_BATCH_TOKENS.items())
            + "."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (tokens := self.precompute_ref_batch_tokens) is not None and tokens <= 0:
            raise ValueError(f"precompute_ref_batch_tokens={tokens}: it must be positive")

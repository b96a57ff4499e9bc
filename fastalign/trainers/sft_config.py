"""`SFTConfig`: the settings of supervised fine-tuning beside those that all trainers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastalign.data.packing import PACKING_STRATEGIES
from fastalign.trainers.config import REFUSED, TrainerConfig, described

_RENAMED = {"chunked_nll": "nll", "bfd-requeue": "bfd_split"}  # TRL's deprecated names of what is honoured


@dataclass
class SFTConfig(TrainerConfig):
    """Settings of `SFTTrainer`: TRL's names where TRL has one, over `TrainerConfig`. learning_rate is 2e-5, and the
    model's own dropout stays on.

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=2e-5, metadata=described("Peak learning rate of AdamW."))
    disable_dropout: bool = field(
        default=False, metadata=described("Turn off the dropout of the model; a new adapter has lora_dropout.")
    )

    # ---- data
    dataset_text_field: str = field(default="text", metadata=described("Column of plain text to train on."))
    chat_template_path: str | None = field(
        default=None,
        metadata=described(
            "A .jinja file, or a folder or hub name of a tokenizer, whose chat template the model is to learn."
        ),
    )
    eos_token: str | None = field(
        default=None,
        metadata=described(
            "Token of the vocabulary that ends a sequence, if it is not to be the tokenizer's own. The saved model "
            "stops at it too."
        ),
    )

    packing: bool = field(
        default=False,
        metadata=described(
            "Put several sequences into one of max_length tokens, so that hardly any padding is computed. Attention "
            "keeps them apart: the loss is that of the sequences one by one."
        ),
    )
    packing_strategy: str = field(
        default="bfd",
        metadata=described(
            "Best fit, longest first. bfd: a sequence over max_length is truncated; bfd_split: it is cut into several.",
            choices=PACKING_STRATEGIES,
        ),
    )
    eval_packing: bool | None = field(
        default=None, metadata=described("Whether to pack evaluation data; by default as packing.")
    )

    # ---- loss
    completion_only_loss: bool | None = field(
        default=None,
        metadata=described(
            "Train on completions alone. By default so where rows have a prompt and a completion; true also splits "
            "conversations before their last message, false trains on prompts too."
        ),
    )
    assistant_only_loss: bool = field(
        default=False, metadata=described("Of conversations, train on what the assistant says alone, in every turn.")
    )
    token_metrics: bool = field(default=True, metadata=described("Also log entropy and mean_token_accuracy."))

    # ---- TRL's options that are not supported, with the one value each may have
    loss_type: str = field(
        default="nll",
        metadata=described(
            f"{REFUSED} chunked_nll is the same: the head computes it tile by tile in any case.",
        ),
    )
    shuffle_dataset: bool = field(
        default=False, metadata=described(f"{REFUSED} Batches are drawn at random unless train_sampling_strategy says.")
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=described(f"{REFUSED} A data set with input_ids and completion_mask is taken as it is.")
    )

    def __post_init__(self) -> None:
        self.loss_type = _RENAMED.get(self.loss_type, self.loss_type)
        self.packing_strategy = _RENAMED.get(self.packing_strategy, self.packing_strategy)
        super().__post_init__()
        if self.packing_strategy not in PACKING_STRATEGIES:
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r}: accepted are {', '.join(PACKING_STRATEGIES)}"
            )
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("packing=True needs max_length, the length to pack sequences to; max_length is None")
        if self.packing and self.packing_strategy == "bfd_split" and self.eval_packing is False:
            raise ValueError(
                "packing_strategy='bfd_split' with eval_packing=False: sequences over max_length are cut where they "
                "are packed, and evaluation would have them whole; accepted is eval_packing=None or True"
            )
        if not self.dataset_text_field:
            raise ValueError("dataset_text_field='': the name of a column is accepted")

"""Reward models on `transformers.Trainer`: comparisons, rankings and labels, read at the last token of a response."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from fastalign.models import (
    RewardNormalization,
    disable_dropout,
    fuse_scalar_head,
    load_scalar_model,
    reward_normalization,
    scalar_head,
    score_sequences,
    separate_pad_token,
    set_reward_normalization,
)
from fastalign.models.scalar import base_scalar_model
from fastalign.models.sharding import whole_weights
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.batches import Batch
from fastalign.trainers.loading import (
    add_adapter,
    autocast_dtype,
    check_trainable,
    checked_model,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_checkpointing,
    refuse_logits,
)
from fastalign.trainers.reward_config import RewardConfig
from fastalign.trainers.reward_examples import TOKENISED_COLUMNS, RewardExamples
from fastalign.trainers.reward_loss import RewardMeter, reward_loss
from fastalign.trainers.vocabulary import check_token_ids
from fastalign.types import LossOutput

logger = logging.getLogger(__name__)


class RewardTrainer(FusedTrainer):
    """Trains a reward model, a transformers sequence classifier with one label, on human or other judgements.

    What the data hold decides the loss: pairs Bradley–Terry (with a `margin` column its margin), ranked or scored lists
    the K-wise loss of InstructGPT, every response encoded once, labels squared error or cross-entropy. Scores are read
    at the last token of a sequence by its length, whatever token that is. The saved model gives the same scores in
    plain transformers: model and tokenizer get a pad token that ends no sequence (`models.separate_pad_token`).

    Args:
        model: folder or hub name of a scalar model, of a causal LM (which gets a new head) or of an adapter; or one of
            these in memory, a PeftModel being trained on. Default: args.model_name_or_path.
        args: a RewardConfig.
        data_collator: default RewardCollator; another one must return the same batches.
        train_dataset, eval_dataset: rows of `fastalign.data.prepare_preferences`, `prepare_lists` or
            `prepare_labelled` (Dataset, list of rows, file, folder, hub name), or a Dataset with their columns;
            eval_dataset may be a dict of them, and of another kind. Default: args.dataset_name and its splits.
        processing_class: the tokenizer; default the model's own.
        compute_metrics, preprocess_logits_for_metrics: refused, as there are no logits for them.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config: as in transformers and TRL;
            the config's lora_* fields make a peft_config too. The head trains in full beside an adapter, and is saved
            with it.
        reward_reference: data whose responses' rewards normalisation is measured on, see RewardConfig.

    Attributes: data_reports, what became of each data set's rows.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data.
    """

    args: RewardConfig
    columns = TOKENISED_COLUMNS

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        reward_reference: Any = None,
    ) -> None:
        model, args = checked_model(model, args, RewardConfig, compute_metrics)
        refuse_logits(preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        peft_config = scalar_adapter_config(args, peft_config)
        if reward_reference is not None and args.normalize_rewards == "none":
            raise ValueError("reward_reference has no effect with normalize_rewards='none'")
        self._reward_reference = reward_reference
        self._examples = RewardExamples(load_tokenizer(processing_class, model, args), args)
        self.data_reports = self._examples.reports
        train = self._examples.training(train_dataset)
        evaluation = self._examples.evaluation(eval_dataset)
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")

        set_seed(args.seed)  # a new head and a new adapter are initialised at random
        scalar = load_model(model, args, peft_config, quantization_config, load=load_scalar_model)
        scalar_head(scalar)  # a model that has none is refused before anything is changed
        if args.disable_dropout:
            disable_dropout(scalar)
        if peft_config is not None:
            scalar = add_adapter(scalar, peft_config, args)
        if args.freeze_backbone:
            freeze_backbone(scalar)
        check_trainable(scalar)
        prepare_checkpointing(scalar, args)
        tokenizer = self._examples.tokenizer
        self._examples.use_pad_token(separate_pad_token(scalar, tokenizer))
        check_token_ids(scalar, tokenizer, train, *evaluation.values())

        super().__init__(
            model=scalar,
            args=args,
            data_collator=data_collator or self._examples.collator,
            train_dataset=train,
            eval_dataset=evaluation.get("", evaluation or None),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._train_meter = RewardMeter(self.accelerator.gather)
        self._eval_meter = RewardMeter(self.accelerator.gather, errors=True)
        fuse_scalar_head(self.model)
        self._set_layout(self.model)

    # ---- loss

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """One forward: rewards at the last tokens, and the loss that the batch's judgements ask for.

        In the padded layout padding is on the right and attention causal, so real tokens never see it and nothing has
        to be masked.
        """
        rewards = self.run_model(model, batch)
        return reward_loss(
            rewards,
            batch,
            center_rewards_coefficient=self.args.center_rewards_coefficient or 0.0,
            label_type=self._examples.label_type or "scalar",
            num_items=num_items,
        )

    # ---- training and evaluation

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; afterwards rewards are normalised as the config asks. An older normalisation is removed first."""
        if reward_normalization(self.model) is not None:
            logger.warning("the model's normalisation of rewards is that of other weights, and is removed")
            set_reward_normalization(self.model, None)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.normalize_rewards != "none":
            self.normalize()
        return output

    def evaluation_data(self, dataset: Any, name: str) -> Any:
        return self._examples.prepare(dataset, name)

    # ---- normalisation

    def normalize(self) -> RewardNormalization:
        """Measure mean and standard deviation of the reference set's rewards and write them to the model's config.

        Processes share the work. Raises ValueError where normalize_rewards is "none" or there is no reference set.
        """
        if self.args.normalize_rewards == "none":
            raise ValueError("normalize_rewards='none': set it to 'mean' or 'mean_std'")
        state, model = self.accelerator, self.accelerator.unwrap_model(self.model)
        share = self._reference_sequences()[state.process_index :: state.num_processes]
        with whole_weights(model):
            found = score_sequences(model, share, autocast=autocast_dtype(self.args), normalise=False)
        scores = found.astype(np.float64)
        sums = torch.tensor([len(scores), scores.sum(), np.square(scores).sum()], dtype=torch.float64)
        count, total, square = self._sum_over_processes(sums.to(self.args.device)).tolist()
        mean = total / count
        std: float | None = max(square / count - mean**2, 0.0) ** 0.5
        if self.args.normalize_rewards == "mean":
            std = None
        elif not std:
            logger.warning("the rewards of the reference set are all %g: only their mean is stored", mean)
            std = None
        normalization = RewardNormalization(mean, std)
        set_reward_normalization(model, normalization)
        logger.info("rewards are measured from %g%s", mean, "" if std is None else f" in units of {std:g}")
        return normalization

    def _reference_sequences(self) -> list[tuple[list[int], int]]:
        args, given = self.args, self._reward_reference
        if given is None:
            given = args.reward_reference_name
        if given is None and args.reward_reference_split is not None:
            given = args.dataset_name
        if given is None:
            given = self.train_dataset
        if given is None:
            raise ValueError("no reference set to normalise rewards on: give reward_reference")
        return self._examples.reference_sequences(given, args.reward_reference_split, args.reward_reference_samples)

    # ---- saving

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):  # pad token and normalisation, which an adapter's own files have no place for
            base_scalar_model(model).config.save_pretrained(output_dir or self.args.output_dir)

    def summary_lines(self) -> list[str]:
        normalization = reward_normalization(self.model)
        if normalization is None:
            return []
        unit = "" if normalization.std is None else f", in units of {normalization.std:.4f}"
        return [f"rewards are measured from {normalization.mean:.4f}{unit}"]


def scalar_adapter_config(args: RewardConfig, peft_config: PeftConfig | None) -> PeftConfig | None:
    """`lora_config` for a sequence classifier: PEFT then trains and saves the head in full beside the adapter."""
    config = lora_config(args, peft_config, task_type=TaskType.SEQ_CLS)
    if config is None:
        return None
    if args.freeze_backbone:
        raise ValueError("freeze_backbone=True trains the head alone, and peft_config asks for an adapter: choose one")
    if config.task_type not in (None, TaskType.SEQ_CLS):
        raise ValueError(f"task_type of peft_config is {config.task_type}; a reward model's is {TaskType.SEQ_CLS}")
    config = copy.deepcopy(config)  # PEFT adds the head to modules_to_save in place
    config.task_type = TaskType.SEQ_CLS
    return config


def freeze_backbone(model: nn.Module) -> None:
    """Leave nothing but the scalar head trainable, in place."""
    head = scalar_head(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.parameters():
        parameter.requires_grad_(True)

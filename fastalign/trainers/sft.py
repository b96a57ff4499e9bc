"""Supervised fine-tuning on `transformers.Trainer`: cross-entropy without logits."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from fastalign.linear import linear_cross_entropy
from fastalign.models import Head, disable_dropout, enable_segments, fuse_head
from fastalign.models.head import base_causal_lm
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.batches import Batch
from fastalign.trainers.layouts import row_targets
from fastalign.trainers.loading import (
    add_adapter,
    check_trainable,
    checked_model,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_checkpointing,
    refuse_logits,
    router_coefficient,
)
from fastalign.trainers.router import with_router_loss
from fastalign.trainers.sft_config import SFTConfig
from fastalign.trainers.sft_data import COLUMNS, FormattingFunc, completion_examples, packed, prepare_tokenizer
from fastalign.trainers.vocabulary import check_token_ids
from fastalign.types import LossOutput


class SFTTrainer(FusedTrainer):
    """Trains a causal language model on text, conversations, or completions of prompts, by cross-entropy.

    The loss is the mean over the trained tokens of an optimizer step, however they are spread over micro-batches and
    processes. The head turns the hidden states of those tokens alone into loss and gradients, tile by tile.

    Args:
        model: folder or hub name, a transformers causal LM, or a PeftModel around one, whose adapter is trained on.
            Default: args.model_name_or_path. Trainable 16-bit weights are turned into float32 (see SFTConfig.dtype).
        args: an SFTConfig.
        data_collator: default CompletionCollator; another one must return the same batches.
        train_dataset, eval_dataset: what `fastalign.data.prepare_completions` takes (Dataset, list of rows, file,
            folder, hub name), or a Dataset with input_ids and completion_mask; eval_dataset may be a dict of them.
            Default: args.dataset_name and its splits.
        processing_class: the tokenizer; default the model's own.
        compute_loss_func, compute_metrics, preprocess_logits_for_metrics: refused, as there are no logits for them.
        callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config: as in transformers and TRL;
            the config's lora_* fields make a peft_config too.
        formatting_func: makes the text to train on from a row.

    Attributes: data_reports, what became of each data set's rows.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data.
    """

    args: SFTConfig
    columns = (*COLUMNS, "seq_lengths")

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: FormattingFunc | None = None,
    ) -> None:
        model, args = checked_model(model, args, SFTConfig, compute_metrics)
        refuse_logits(compute_loss_func=compute_loss_func, preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        peft_config = lora_config(args, peft_config)
        tokenizer = load_tokenizer(processing_class, model, args)
        prepare_tokenizer(tokenizer, args)
        self._examples = completion_examples(tokenizer, args, formatting_func)
        self.data_reports = self._examples.reports
        train = self._examples.training(train_dataset)
        evaluation = self._examples.evaluation(eval_dataset)
        if train is not None:
            train = self._laid_out(train, "train", args.packing)
        self._eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        evaluation = {
            name: self._laid_out(part, name or "eval", self._eval_packing) for name, part in evaluation.items()
        }
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")

        set_seed(args.seed)  # a new adapter is initialised at random
        policy = load_model(model, args, peft_config, quantization_config)
        check_token_ids(policy, tokenizer, train, *evaluation.values())
        if args.disable_dropout:
            disable_dropout(policy)
        if peft_config is not None:
            policy = add_adapter(policy, peft_config, args)
        check_trainable(policy)
        prepare_checkpointing(policy, args)
        self._router_coef = router_coefficient(policy, args)
        if args.eos_token is not None:
            _stop_at(policy, tokenizer.eos_token_id)

        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._examples.collator,
            train_dataset=train,
            eval_dataset=evaluation.get("", evaluation or None),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        fuse_head(self.model)
        if args.packing or self._eval_packing:
            enable_segments(self.model)
        self._set_layout(self.model, counts_tokens=bool(self._router_coef))

    def _laid_out(self, dataset: Dataset, name: str, packing: bool) -> Dataset:
        if packing:
            return packed(dataset, name, self._examples.args)
        if "seq_lengths" in dataset.column_names:
            raise ValueError(f"the {name} data is packed (it has seq_lengths): set packing=True, or eval_packing=True")
        return dataset

    def evaluation_data(self, dataset: Any, name: str) -> Dataset:
        return self._laid_out(self._examples.prepare(dataset, name), name, self._eval_packing)

    # ---- loss

    def num_items(self, batch: Batch) -> int:
        """Trained tokens."""
        return len(batch["rows"])

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """Cross-entropy of a batch, plus the router's loss of a mixture of experts, weighted by its trained tokens."""
        if not self._router_coef:
            return self._cross_entropy(model, batch, num_items)
        output, aux_loss = self._cross_entropy(model, batch, num_items, output_router_logits=True)
        return with_router_loss(output, aux_loss, self._router_coef, items=self.num_items(batch), num_items=num_items)

    def _cross_entropy(
        self, model: nn.Module, batch: Batch, num_items: int | Tensor | None, **model_kwargs: Any
    ) -> Any:
        """One forward. In the padded layout padding is on the right and attention causal, so real tokens never see it
        and nothing has to be masked; without a mask attention takes its fast causal path.
        """
        args = self.args

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            output = linear_cross_entropy(
                hidden,
                head.weight,
                row_targets(batch, hidden.device),
                rows=torch.arange(len(hidden)),
                num_items=num_items,
                token_metrics=args.token_metrics,
                backend=args.backend,
                schedule=args.schedule,
                workspace_mb=args.workspace_mb,
                **head.options,
            )
            output.metrics.pop("nll")  # it is the loss
            return output

        return self.run_model(model, batch, head_fn, **model_kwargs)


def _stop_at(model: nn.Module, token: int) -> None:
    """Make generation stop at `token`, beside what it stops at already."""
    base = base_causal_lm(model)
    base.config.get_text_config(decoder=True).eos_token_id = token
    if base.generation_config is not None:
        given = base.generation_config.eos_token_id
        known = [] if given is None else [given] if isinstance(given, int) else list(given)
        base.generation_config.eos_token_id = [token, *(other for other in known if other != token)]

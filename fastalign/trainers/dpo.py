"""Direct preference optimisation on `transformers.Trainer`, from cached reference log-probs and without logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from fastalign.linear import linear_dpo_loss
from fastalign.models import Head, disable_dropout, fuse_head
from fastalign.reference import PreferenceSequences, ReferenceCache, ReferenceModel
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.batches import Batch, num_examples
from fastalign.trainers.config import by_device
from fastalign.trainers.dpo_config import (
    DEFAULT_CACHE_DIR,
    DEFAULT_REF_BATCH_TOKENS,
    DPOConfig,
)
from fastalign.trainers.examples import preference_examples
from fastalign.trainers.loading import (
    add_adapter,
    autocast_dtype,
    borrowed,
    check_trainable,
    checked_arguments,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_checkpointing,
    router_coefficient,
    separate_reference,
)
from fastalign.trainers.reference import (
    EXAMPLE_COLUMNS,
    REFERENCE_COLUMNS,
    build_cache,
    check_cached,
    reference_adapter,
    sample_indices,
    with_reference,
)
from fastalign.trainers.router import with_router_loss
from fastalign.trainers.self_check import check_start
from fastalign.types import LossOutput

logger = logging.getLogger(__name__)


class DPOTrainer(FusedTrainer):
    """Trains a policy on preference pairs with DPO (arXiv 2305.18290) or a relative; see `fastalign.losses.dpo_loss`.

    The reference's per-token log-probs are computed once, kept on disk by content (`ReferenceCache`) and shared by
    every run on that reference, whatever its loss, beta or adapter. The reference is not in memory while training.
    The head turns hidden states of completion tokens into loss and gradients tile by tile: logits never exist.

    Args:
        model: folder or hub name, a transformers causal LM, or a PeftModel around one, whose adapter is trained on.
            Default: args.model_name_or_path. Trainable 16-bit weights are turned into float32 (see DPOConfig.dtype).
        ref_model: the reference: folder or hub name (loaded only when needed, and let go), or a model.
            Default: the policy as it is handed in: with `peft_config` the model without the new adapter; for a
            PeftModel base and adapter, as DPO on top of an SFT adapter needs.
        args: a DPOConfig.
        data_collator: default PreferenceCollator; another one must return the same batches.
        train_dataset, eval_dataset: what `fastalign.data.prepare_preferences` takes (Dataset, list of rows, file,
            folder, hub name), or a Dataset with prompt_ids, chosen_ids and rejected_ids; eval_dataset may be a dict of
            them. Default: args.dataset_name and its splits.
        processing_class: the tokenizer; default the model's own.
        compute_metrics: refused, as there are no logits to compute metrics from.
        callbacks, optimizers, quantization_config, peft_config: as in transformers and TRL; the config's lora_* fields
            make a peft_config too.

    Attributes: reference_cache, the open ReferenceCache (its `report` says what was found and what computed);
    data_reports, what became of each data set's rows.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data;
    ReferenceMismatchError when cached log-probs are not the reference's.
    """

    args: DPOConfig
    columns = (*EXAMPLE_COLUMNS, *REFERENCE_COLUMNS)

    def __init__(
        self,
        model: str | nn.Module | None = None,
        ref_model: str | nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        model, args = checked_arguments(model, ref_model, args, compute_metrics)
        peft_config = lora_config(args, peft_config)
        self._autocast = autocast_dtype(args)
        self._examples = preference_examples(load_tokenizer(processing_class, model, args), args)
        self.data_reports = self._examples.reports
        train = self._examples.training(train_dataset)
        evaluation = self._examples.evaluation(eval_dataset)
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")
        splits = [split for split in (train, *evaluation.values()) if split is not None]

        set_seed(args.seed)  # a new adapter is initialised at random
        self._reference: ReferenceModel | None = None  # one that can be loaded again whenever it is needed
        separate = args.ref_model_name_or_path if ref_model is None else ref_model
        if separate is not None:  # before the policy is loaded: one model in memory at a time
            self._score_separate(separate, splits, args, peft_config is not None, quantization_config)
        policy = load_model(model, args, peft_config, quantization_config)
        if args.disable_dropout:
            disable_dropout(policy)
        self._adapter = reference_adapter(policy)
        own = ReferenceModel.from_model(policy, adapter=self._adapter, autocast=self._autocast)
        if separate is None:
            self._score(own, splits, args)
        self._starts_at_reference = separate is None or own.digest() == self.reference_cache.reference
        if peft_config is not None:
            policy = add_adapter(policy, peft_config, args)
            # these two do not start as the base model
            self._starts_at_reference &= getattr(peft_config, "init_lora_weights", True) not in (False, "loftq")
        check_trainable(policy)
        prepare_checkpointing(policy, args)
        self._router_coef = router_coefficient(policy, args)

        joined = {name: with_reference(split, self.reference_cache) for name, split in evaluation.items()}
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._examples.collator,
            train_dataset=None if train is None else with_reference(train, self.reference_cache),
            eval_dataset=joined.get("", joined or None),
            processing_class=self._examples.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        fuse_head(self.model)

    # ---- reference

    reference_cache: ReferenceCache

    def _score(self, reference: ReferenceModel, splits: list[Dataset], args: DPOConfig) -> None:
        self.reference_cache = build_cache(
            str(Path(args.cache_dir or DEFAULT_CACHE_DIR).expanduser()),
            reference,
            splits,
            batch_tokens=by_device(args.precompute_ref_batch_tokens, DEFAULT_REF_BATCH_TOKENS, args),
            progress=not args.disable_tqdm,
        )

    def _score_separate(
        self,
        ref_model: str | nn.Module,
        splits: list[Dataset],
        args: DPOConfig,
        with_adapter: bool,
        quantization_config: Any,
    ) -> None:
        """Log-probs of a reference other than the policy, which is held only if it can be loaded again by name."""
        reference = separate_reference(ref_model, args, with_adapter, quantization_config)
        with borrowed(ref_model, args.device):
            self._score(reference, splits, args)
            check_cached(self.reference_cache, reference, splits[0], self._autocast)
        if isinstance(ref_model, str):
            self._reference = reference

    def evaluation_data(self, dataset: Any, name: str) -> Dataset:
        """Tokenised and with its reference log-probs."""
        if isinstance(dataset, Dataset) and set(REFERENCE_COLUMNS) <= set(dataset.column_names):
            return dataset
        examples = self._examples.prepare(dataset, name)
        if missing := self.reference_cache.missing(PreferenceSequences(examples)):
            reference = self._reference or ReferenceModel.from_model(
                self.accelerator.unwrap_model(self.model), adapter=self._adapter, autocast=self._autocast
            )
            if reference.digest() != self.reference_cache.reference:
                raise ValueError(
                    f"{len(missing)} sequences of this data set have no reference log-probs, and the reference is "
                    "gone: the policy has changed since. Give the data as eval_dataset to the constructor, or "
                    "ref_model by name"
                )
            self._score(reference, [examples], self.args)
        return with_reference(examples, self.reference_cache)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not resume_from_checkpoint and self.state.global_step == 0:
            self.check_start()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_start(self) -> float | None:
        """Compare a policy that is its own reference with the cached log-probs of a few pairs; train() does so first.

        Returns the loss on those pairs (log 2 for "sigmoid"), None where policy and reference differ by intent. Raises
        ReferenceMismatchError where log-probs or loss are not the cached ones.
        """
        if not self._starts_at_reference or self.train_dataset is None:
            return None
        examples = self.train_dataset.select(sample_indices(len(self.train_dataset)))
        return check_start(
            self.model,
            self._prepare_inputs(self.data_collator([examples[i] for i in range(len(examples))])),
            examples,
            self._autocast or next(p.dtype for p in self.model.parameters() if p.is_floating_point()),
            autocast=self.accelerator.autocast(),
            loss_fn=lambda model, batch: self._preference_loss(model, batch, None).loss,
            options=self._loss_options(),
        )

    def run_state(self) -> dict[str, Any]:
        return super().run_state() | {"reference": self.reference_cache.reference}

    def restore_run_state(self, state: dict[str, Any]) -> None:
        if state["reference"] != self.reference_cache.reference:
            raise ValueError(
                f"the checkpoint was trained against reference {state['reference'][:12]}…, this trainer has "
                f"{self.reference_cache.reference[:12]}…: construct it with the same policy and ref_model as the first "
                "run (resume_from_checkpoint loads the trained weights), or leave out resume_from_checkpoint"
            )
        super().restore_run_state(state)

    def summary_lines(self) -> list[str]:
        report = self.reference_cache.report
        if report is None:
            return []
        found = f"{report.cached} found, {report.computed} computed"
        return [f"reference log-probs: {found}, in {self.reference_cache.path}"]

    # ---- loss

    def _loss_options(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in ("beta", "loss_type", "label_smoothing", "length_alpha")}

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """The preference loss of a batch, plus the router's of a mixture of experts, weighted by its pairs."""
        if not self._router_coef:
            return self._preference_loss(model, batch, num_items)
        # the router's loss counts tokens, so it needs the mask
        router = {"attention_mask": batch["attention_mask"], "output_router_logits": True}
        output, aux_loss = self._preference_loss(model, batch, num_items, **router)
        return with_router_loss(output, aux_loss, self._router_coef, items=num_examples(batch), num_items=num_items)

    def _preference_loss(
        self, model: nn.Module, batch: Batch, num_items: int | Tensor | None, **model_kwargs: Any
    ) -> Any:
        """One forward. Padding is on the right and attention causal, so real tokens never see it and nothing has to be
        masked; without a mask attention takes its fast causal path.
        """
        args, rows = self.args, torch.from_numpy(np.asarray(batch["rows"]))

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            return linear_dpo_loss(
                hidden,
                head.weight,
                batch["targets"].to(hidden.device),
                ref_logps=batch["ref_logps"].to(hidden.device),
                rows=rows,
                num_items=num_items,
                token_metrics=args.token_metrics,
                backend=args.backend,
                schedule=args.schedule,
                workspace_mb=args.workspace_mb,
                **self._loss_options(),
                **head.options,
            )

        return model(input_ids=batch["input_ids"], head_fn=head_fn, **model_kwargs)

"""Listwise preference training on `transformers.Trainer`: ranked responses of any number, without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from fastalign.linear import linear_pro_loss
from fastalign.models import Head, disable_dropout, fuse_head
from fastalign.models.inference import evaluating
from fastalign.reference import ReferenceCache
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.batches import Batch, num_examples, sequence_groups
from fastalign.trainers.dpo_reference import CachedReference
from fastalign.trainers.layouts import scored_rows
from fastalign.trainers.loading import (
    add_adapter,
    autocast_dtype,
    check_trainable,
    checked_model,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_checkpointing,
    router_coefficient,
)
from fastalign.trainers.log_probs import batch_logps
from fastalign.trainers.pro_config import PROConfig
from fastalign.trainers.pro_examples import (
    LIST_COLUMNS,
    REFERENCE_COLUMN,
    ListExamples,
    single_responses,
    with_list_logps,
)
from fastalign.trainers.reference import RESPONSES, compare_logps, sample_indices
from fastalign.trainers.router import with_router_loss
from fastalign.trainers.vocabulary import check_token_ids
from fastalign.types import LossOutput


class PROTrainer(FusedTrainer):
    """Trains a policy on ranked responses with PRO (arXiv 2306.17492) or a relative; see `fastalign.linear_pro_loss`.

    A list is what the loss is a mean over and what a micro-batch never cuts. Its responses, of any number, are scored
    by the policy's mean log-prob (PRO) or, with `reference_free=False`, by beta times the log-ratio to a reference
    (Plackett and Luce's model on DPO's reward), whose log-probs are computed once and kept on disk, as DPOTrainer does.
    The head turns hidden states of completion tokens into loss and gradients tile by tile: logits never exist.

    Args:
        model: folder or hub name, a transformers causal LM, or a PeftModel around one, whose adapter is trained on.
            Default: args.model_name_or_path. Trainable 16-bit weights are turned into float32 (see PROConfig.dtype).
        ref_model: the reference, where there is one: folder or hub name (loaded only when needed, and let go), or a
            model. Default: the policy as it is handed in, without a new adapter.
        args: a PROConfig.
        data_collator: default ListCollator; another one must return the same batches.
        train_dataset, eval_dataset: rows of `fastalign.data.prepare_lists` or `prepare_preferences` (Dataset, list of
            rows, file, folder, hub name), or a Dataset with their columns; a pair is a list of two, see
            PROConfig.merge_pairs. eval_dataset may be a dict of them. Default: args.dataset_name and its splits.
        processing_class: the tokenizer; default the model's own.
        compute_metrics: refused, as there are no logits to compute metrics from.
        callbacks, optimizers, quantization_config, peft_config: as in transformers and TRL; the config's lora_* fields
            make a peft_config too.

    Attributes: data_reports, what became of each data set's rows; reference_cache, the open ReferenceCache, or None.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data;
    ReferenceMismatchError when cached log-probs are not the reference's.
    """

    args: PROConfig
    columns = LIST_COLUMNS

    def __init__(
        self,
        model: str | nn.Module | None = None,
        ref_model: str | nn.Module | None = None,
        args: PROConfig | None = None,
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
        model, args = checked_model(model, args, PROConfig, compute_metrics)
        peft_config = lora_config(args, peft_config)
        self._examples = ListExamples(load_tokenizer(processing_class, model, args), args)
        self.data_reports = self._examples.reports
        train = self._examples.training(train_dataset)
        evaluation = self._examples.evaluation(eval_dataset)
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")
        splits = [split for split in (train, *evaluation.values()) if split is not None]

        set_seed(args.seed)  # a new adapter is initialised at random
        self._reference = _reference_of(args, splits, model, ref_model, quantization_config, peft_config is not None)
        policy = load_model(model, args, peft_config, quantization_config)
        check_token_ids(policy, self._examples.tokenizer, *splits)
        if args.disable_dropout:
            disable_dropout(policy)
        if self._reference is not None:
            self._reference.adopt(policy, new_adapter=peft_config is not None)
        if peft_config is not None:
            policy = add_adapter(policy, peft_config, args)
        # two initialisations of an adapter do not start as the base model
        self._starts_at_policy = getattr(peft_config, "init_lora_weights", True) not in (False, "loftq")
        check_trainable(policy)
        prepare_checkpointing(policy, args)
        self._router_coef = router_coefficient(policy, args)

        evaluation = {name: self._join(split) for name, split in evaluation.items()}
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._examples.collator,
            train_dataset=None if train is None else self._join(train),
            eval_dataset=evaluation.get("", evaluation or None),
            processing_class=self._examples.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        fuse_head(self.model)
        self._set_layout(self.model, counts_tokens=bool(self._router_coef))

    # ---- reference

    @property
    def reference_cache(self) -> ReferenceCache | None:
        return None if self._reference is None else self._reference.cache

    def _join(self, lists: Dataset, policy: nn.Module | None = None) -> Dataset:
        """The lists with the reference's log-probs, if there is a reference. policy: the one in training."""
        if self._reference is None or REFERENCE_COLUMN in lists.column_names:
            return lists
        (column,) = RESPONSES.scored.values()
        scored = self._reference.join(single_responses(lists), policy)
        return with_list_logps(lists, scored.with_format("arrow")[:][column])

    def evaluation_data(self, dataset: Any, name: str) -> Dataset:
        """Tokenised and with its reference log-probs."""
        return self._join(self._examples.prepare(dataset, name), self.accelerator.unwrap_model(self.model))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not resume_from_checkpoint and self.state.global_step == 0:
            self.check_start()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_start(self) -> float | None:
        """Compare a policy that is its own reference with the cached log-probs of a few lists; train() does so first.

        Returns the largest difference, in nats a token; None where there is no reference, or another one. Raises
        ReferenceMismatchError where log-probs are not the reference's.
        """
        reference, lists = self._reference, self.train_dataset
        if reference is None or lists is None or not (self._starts_at_policy and reference.starts_at_policy):
            return None
        lists = lists.select(sample_indices(len(lists)))
        batch = self._prepare_inputs(self.data_collator([lists[i] for i in range(len(lists))]))
        with torch.no_grad(), evaluating(self.model), self.accelerator.autocast():
            logps = batch_logps(self.model, batch, self.args)
        fresh, cached = (
            np.split(values.cpu().numpy(), batch["cu_seqlens"][1:-1])
            for values in (logps, batch["ref_per_token_logps"])
        )
        dtype = autocast_dtype(self.args) or next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        whose = "the policy, which is the reference"
        return compare_logps(fresh, cached, dtype, whose, single_responses(lists), RESPONSES)

    def run_state(self) -> dict[str, Any]:
        return super().run_state() | {"reference": None if self._reference is None else self._reference.identity}

    def restore_run_state(self, state: dict[str, Any]) -> None:
        own = self.run_state()["reference"]
        if state["reference"] != own:
            theirs, ours = (f"reference {name[:12]}…" if name else "no reference" for name in (state["reference"], own))
            raise ValueError(
                f"the checkpoint was trained against {theirs}, this trainer has {ours}: construct it with the same "
                "policy, ref_model and reference_free as the first run (resume_from_checkpoint loads the trained "
                "weights), or leave out resume_from_checkpoint"
            )
        super().restore_run_state(state)

    def summary_lines(self) -> list[str]:
        return [] if self._reference is None else self._reference.summary_lines()

    # ---- loss

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """The listwise loss of a batch, plus the router's of a mixture of experts, weighted by its lists.

        One forward. In the padded layout padding is on the right and attention causal, so real tokens never see it and
        nothing has to be masked; without a mask attention takes its fast causal path.
        """
        args = self.args
        cu_lists = np.concatenate([[0], np.cumsum(np.bincount(sequence_groups(batch)))])

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            given = {name: batch[name].to(hidden.device) for name in ("rewards", "ref_logps") if name in batch}
            return linear_pro_loss(
                hidden, head.weight, ranks=batch["ranks"].to(hidden.device), cu_lists=torch.from_numpy(cu_lists),
                beta=args.beta, length_normalize=args.length_normalize, loss_type=args.loss_type,
                sft_coef=args.sft_weight, num_items=num_items, token_metrics=args.token_metrics, backend=args.backend,
                schedule=args.schedule, workspace_mb=args.workspace_mb, **given, **scored_rows(batch, hidden.device),
                **head.options,
            )  # fmt: skip

        if not self._router_coef:
            return self.run_model(model, batch, head_fn)
        output, aux_loss = self.run_model(model, batch, head_fn, output_router_logits=True)
        return with_router_loss(output, aux_loss, self._router_coef, items=num_examples(batch), num_items=num_items)


def _reference_of(
    args: PROConfig, splits: Sequence[Dataset], model: str | nn.Module, ref_model: str | nn.Module | None,
    quantization_config: Any, with_adapter: bool,
) -> CachedReference | None:  # fmt: skip
    """What scores are measured from; a reference other than the policy is scored here, before the policy is loaded."""
    if args.reference_free:
        if ref_model is not None:
            raise ValueError("ref_model is given, and reference_free=True asks none: set reference_free=False")
        return None
    if ref_model is model and isinstance(model, nn.Module):
        raise ValueError("ref_model is the model that trains; leave ref_model out for the policy as it is now")
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError("ref_model and args.ref_model_name_or_path name two references; give one of them")
    return CachedReference(
        args, RESPONSES, [single_responses(split) for split in splits],
        ref_model=args.ref_model_name_or_path if ref_model is None else ref_model,
        quantization_config=quantization_config, with_adapter=with_adapter,
    )  # fmt: skip

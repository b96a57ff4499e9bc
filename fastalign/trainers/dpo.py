"""Direct preference optimisation on `transformers.Trainer`, from cached reference log-probs and without logits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from fastalign.losses import kto_kl
from fastalign.models import disable_dropout, fuse_head
from fastalign.models.inference import evaluating
from fastalign.models.layouts import run_layout
from fastalign.models.sharding import whole_weights
from fastalign.reference import ReferenceCache
from fastalign.trainers.base import FusedTrainer
from fastalign.trainers.batches import Batch, grouped_by_prompt, num_examples, select_examples
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.dpo_loss import AfterStep, ResponseMeter, RunningShift, Surroundings, fused_loss, learned
from fastalign.trainers.dpo_reference import named
from fastalign.trainers.dpo_setup import COLUMNS, examples_of, reference_of
from fastalign.trainers.live_reference import LiveReference
from fastalign.trainers.loading import (
    add_adapter,
    check_trainable,
    checked_arguments,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_checkpointing,
    router_coefficient,
)
from fastalign.trainers.log_probs import batch_logps, sequence_sums
from fastalign.trainers.reference import list_lengths, sample_indices
from fastalign.trainers.router import with_router_loss
from fastalign.trainers.self_check import check_start
from fastalign.trainers.vocabulary import check_token_ids
from fastalign.types import LossOutput


class DPOTrainer(FusedTrainer):
    """Trains a policy on preferences with DPO (arXiv 2305.18290) or a relative; docs/losses.md lists them.

    The reference's per-token log-probs are computed once, kept on disk by content (`ReferenceCache`) and shared by
    every run on that reference, whatever its loss, beta or adapter. The reference is not in memory while training,
    unless `precompute_ref_log_probs=False` or `sync_ref_model=True` ask for it; some losses have none.
    The head turns hidden states of completion tokens into loss and gradients tile by tile: logits never exist.

    Args:
        model: folder or hub name, a transformers causal LM, or a PeftModel around one, whose adapter is trained on.
            Default: args.model_name_or_path. Trainable 16-bit weights are turned into float32 (see DPOConfig.dtype).
        ref_model: the reference: folder or hub name (loaded only when needed, and let go), or a model.
            Default: the policy as it is handed in: with `peft_config` the model without the new adapter; for a
            PeftModel base and adapter, as DPO on top of an SFT adapter needs. With sync_ref_model it is changed.
        args: a DPOConfig.
        data_collator: default PreferenceCollator, or UnpairedCollator for losses on single responses; another one must
            return the same batches.
        train_dataset, eval_dataset: what `fastalign.data.prepare_preferences` takes (Dataset, list of rows, file,
            folder, hub name), or a Dataset with prompt_ids, chosen_ids and rejected_ids; for losses on single responses
            also what `prepare_labelled` takes, or a Dataset with prompt_ids, completion_ids, label and, as kto needs
            them, kl_completion_ids (other prompts' responses; made if they are missing). eval_dataset may be a dict of
            them. Default: args.dataset_name and its splits.
        processing_class: the tokenizer; default the model's own.
        compute_metrics: refused, as there are no logits to compute metrics from.
        callbacks, optimizers, quantization_config, peft_config: as in transformers and TRL; the config's lora_* fields
            make a peft_config too.

    The loss of a step is a mean over all its pairs (or responses), however they were split; kto's z₀ and the
    denominator of "sft" are those of the whole step, and of the whole data set in an evaluation. aot and aot_unpaired
    sort over each device batch: per_device_train_batch_size pairs are their batch, per_device_eval_batch_size in an
    evaluation.

    Attributes: reference_cache, the open ReferenceCache (its `report` says what was found and what computed);
    data_reports, what became of each data set's rows.

    Raises ValueError, naming it, for anything that cannot be honoured; BadRowsError for bad data;
    ReferenceMismatchError when cached log-probs are not the reference's.
    """

    args: DPOConfig
    columns = COLUMNS

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
        self._examples = examples_of(load_tokenizer(processing_class, model, args), args)
        self.data_reports = self._examples.reports
        train = self._examples.training(train_dataset)
        evaluation = self._examples.evaluation(eval_dataset)
        if train is None and not evaluation:
            raise ValueError("no data: give train_dataset, or args.dataset_name")
        splits = [split for split in (train, *evaluation.values()) if split is not None]

        set_seed(args.seed)  # a new adapter is initialised at random
        self._reference = reference_of(args, splits, ref_model, quantization_config, peft_config is not None)
        policy = load_model(model, args, peft_config, quantization_config)
        check_token_ids(policy, self._examples.tokenizer, *splits)
        if args.disable_dropout:
            disable_dropout(policy)
        self._reference.adopt(policy, new_adapter=peft_config is not None)
        self._starts_at_reference = self._reference.starts_at_policy
        if peft_config is not None:
            policy = add_adapter(policy, peft_config, args)
            # these two do not start as the base model
            self._starts_at_reference &= getattr(peft_config, "init_lora_weights", True) not in (False, "loftq")
        check_trainable(policy)
        prepare_checkpointing(policy, args)
        self._router_coef = router_coefficient(policy, args)

        joined = {name: self._reference.join(split) for name, split in evaluation.items()}
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._examples.collator,
            train_dataset=None if train is None else self._reference.join(train),
            eval_dataset=joined.get("", joined or None),
            processing_class=self._examples.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.couples_batch:
            self.micro_batch_tokens = 0
        if not args.on_pairs:
            self._train_meter, self._eval_meter = ResponseMeter(), ResponseMeter()
        self._around = Surroundings(shift=RunningShift() if args.has_running_shift else None)
        self.add_callback(AfterStep(lambda: self.after_step()))
        fuse_head(self.model)
        self._set_layout(self.model, counts_tokens=bool(self._router_coef))
        self._reference.use_layout(self.token_layout)

    # ---- reference

    @property
    def reference_cache(self) -> ReferenceCache:
        if self._reference.cache is None:
            raise ValueError(f"loss_type={self.args.loss_type!r}: no reference log-probs are kept on disk in this run")
        return self._reference.cache

    def evaluation_data(self, dataset: Any, name: str) -> Dataset:
        """Tokenised and with its reference log-probs."""
        examples = self._examples.prepare(dataset, name)
        return self._reference.join(examples, self.accelerator.unwrap_model(self.model))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not resume_from_checkpoint and self.state.global_step == 0:
            self.check_start()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_start(self) -> float | None:
        """Compare a policy that is its own reference with the log-probs of a few examples; train() does so first.

        Returns the loss on those examples (log 2 for "sigmoid"), None where there is no reference, or policy and
        reference differ by intent. Raises ReferenceMismatchError where log-probs or loss are not the reference's.
        """
        if not self._starts_at_reference or self.train_dataset is None:
            return None
        examples = self.train_dataset.select(sample_indices(len(self.train_dataset)))
        batch = self._prepare_inputs(self.data_collator([examples[i] for i in range(len(examples))]))
        parts = [self._reference.attach(part, self.model) for part in (batch, batch.get("kl")) if part is not None]
        around = Surroundings(kl=parts[0]["ref_logps"].new_zeros(()) if self.args.needs_kl else None)
        return check_start(
            self.model,
            parts,
            examples,
            self._reference.layout,
            self.args,
            autocast=self.accelerator.autocast(),
            loss_fn=lambda: run_layout(self.model, batch, None, fused_loss(self.args, parts[0], around, None)),
        )

    def run_state(self) -> dict[str, Any]:
        shift = {} if self._around.shift is None else {"reward_shift": self._around.shift.state_dict()}
        return super().run_state() | {"reference": self._reference.identity} | shift

    def restore_run_state(self, state: dict[str, Any]) -> None:
        theirs, own = state["reference"], self._reference.identity
        if theirs != own:
            raise ValueError(
                f"the checkpoint was trained against {named(theirs)}, this trainer has {named(own)}: construct it with "
                "the same policy, ref_model and loss_type as the first run (resume_from_checkpoint loads the trained "
                "weights), or leave out resume_from_checkpoint"
            )
        if self._around.shift is not None:
            if "reward_shift" not in state:
                raise ValueError("the checkpoint was trained without a running shift of rewards: set bco_running_shift")
            self._around.shift.load_state_dict(state["reward_shift"])
        super().restore_run_state(state)

    def write_run_files(self, folder: Path) -> None:
        super().write_run_files(folder)
        if isinstance(self._reference, LiveReference):
            self._reference.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self._reference, LiveReference):
            self._reference.load(Path(resume_from_checkpoint))

    def after_step(self) -> None:
        """Between two optimizer steps: the reference follows the policy, rewards move the shift."""
        if self.args.sync_ref_model and self.state.global_step % self.args.ref_model_sync_steps == 0:
            assert isinstance(self._reference, LiveReference)
            self._reference.follow(self.accelerator.unwrap_model(self.model))
        if self._around.shift is not None:
            self._around.shift.finish_step(self._sum_over_processes)

    def summary_lines(self) -> list[str]:
        return self._reference.summary_lines()

    # ---- loss

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """The preference loss of a batch, plus the router's of a mixture of experts, weighted by its examples.

        One forward. In the padded layout padding is on the right and attention causal, so real tokens never see it and
        nothing has to be masked; without a mask attention takes its fast causal path.
        """
        batch = self._reference.attach(batch, self.model)
        head_fn = fused_loss(self.args, batch, self._around, num_items)
        if self._router_coef:
            output, aux_loss = self.run_model(model, batch, head_fn, output_router_logits=True)
            items = self.num_items(batch)
            output = with_router_loss(output, aux_loss, self._router_coef, items=items, num_items=num_items)
        else:
            output = self.run_model(model, batch, head_fn)
        if self._around.shift is not None and num_items is not None and self._counts:  # in training
            self._around.shift.add(output.metrics)
        return output

    def num_items(self, batch: Batch) -> int:
        """Pairs, or responses; several of these are one example where they share a prompt."""
        return num_examples(batch) if self.args.on_pairs else len(batch["lengths"])

    def _own_pieces(self, batch: Batch, examples: int | None = None) -> list[Batch]:
        """Responses to one prompt are in one piece where they share it, unless they have too many tokens together."""
        if self.token_layout == "shared" and "prompts" in batch:
            own = batch if examples is None else select_examples(batch, np.arange(examples))
            batch, examples = grouped_by_prompt(own, self.micro_batch_tokens), None
        return super()._own_pieces(batch, examples)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int | Tensor | None:
        """Items of an optimizer step; and what its loss has to know of all its batches before the first of them."""
        if "sft" in self.args.loss_types:
            tokens = sum(int(batch["cu_seqlens"][num_examples(batch)]) for batch in batch_samples)
            self._around.chosen_tokens = self._sum_over_processes(torch.tensor(float(tokens), device=device))
        if self.args.needs_kl:
            self._around.kl = self._kl(batch["kl"] for batch in batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    @torch.no_grad()
    def _kl(self, mismatched: Iterable[Batch], *, alike: bool = True) -> Tensor:
        """KTO's z₀ over all batches of all processes, 0-dim; see `losses.kto_kl`.

        alike: every process has as many batches.
        """
        total = torch.zeros(2, device=self.args.device)
        with evaluating(self.model), self.accelerator.autocast():
            for batch in mismatched:
                batch = self._prepare_inputs(batch)
                pieces = self._pieces(batch) if alike else [(piece, True) for piece in self._own_pieces(batch)]
                for piece, counts in pieces:
                    piece = self._reference.attach(piece, self.model)
                    logps = sequence_sums(batch_logps(self.model, piece, self.args, self.token_layout), piece)
                    total = total + torch.stack(kto_kl(logps, piece["ref_logps"].to(logps.device))) * counts
        total = self._sum_over_processes(total)
        return total[0] / total[1].clamp(min=1)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        return super().training_step(model, learned(inputs), num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        return super().prediction_step(model, learned(inputs), prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's; kto's z₀ and the denominator of "sft" are those of the whole data set."""
        examples = args[0].dataset  # of the loader
        if "sft" in self.args.loss_types:
            self._around.chosen_tokens = torch.tensor(float(list_lengths(examples, "chosen_ids").sum()))
            self._around.pairs = len(examples)
        if self.args.needs_kl:
            with self._clock_stopped(), whole_weights(self.model):
                self._around.kl = self._kl(self._mismatched(examples), alike=False)
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _mismatched(self, examples: Dataset) -> Iterable[Batch]:
        """This process's share of a data set's mismatched responses, in batches."""
        state, size = self.accelerator, self.args.eval_batch_size
        share = range(state.process_index, len(examples), state.num_processes)
        for start in range(0, len(share), size):
            yield self.data_collator([examples[i] for i in share[start : start + size]])["kl"]

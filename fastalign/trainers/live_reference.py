"""A reference in memory beside the policy, which scores each batch, and may follow the policy (TR-DPO)."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn

from fastalign.models import fuse_head
from fastalign.models.inference import evaluating
from fastalign.models.sharding import whole
from fastalign.reference import ReferenceModel
from fastalign.reference.scoring import adapter_state
from fastalign.trainers.batches import Batch
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.dpo_reference import FOLLOWS_POLICY, NoReference
from fastalign.trainers.layouts import prepare_layout
from fastalign.trainers.loading import autocast_dtype, is_movable, separate_reference
from fastalign.trainers.log_probs import batch_logps, sequence_sums
from fastalign.trainers.reference import Layout, reference_adapter

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "reference.safetensors"


class LiveReference(NoReference):
    """Scores each batch: a model that was given, a copy of the policy, or the policy with its adapter off.

    With args.sync_ref_model it is mixed with the policy every ref_model_sync_steps optimizer steps (TR-DPO, arXiv
    2404.09656), in place, with α = ref_model_mixup_alpha:

        reference ← α·policy + (1 − α)·reference

    and is part of every checkpoint. Raises ValueError where it cannot be had: a policy that trains on an adapter that
    is part of its reference; with sync_ref_model any adapter, or a reference of other tensors than the policy.
    """

    def __init__(
        self, args: DPOConfig, layout: Layout, *, ref_model: str | nn.Module | None, quantization_config: Any,
        with_adapter: bool,
    ) -> None:  # fmt: skip
        super().__init__(args, layout)
        self._autocast = autocast_dtype(args)
        self._model: nn.Module | None = None  # None: the policy with its adapter off
        self._adapter: str | None = None
        self._given: ReferenceModel | None = None
        self.token_layout = "padded"
        if ref_model is not None:
            self._given = separate_reference(ref_model, args, with_adapter, quantization_config)

    def adopt(self, policy: nn.Module, *, new_adapter: bool) -> None:
        own = ReferenceModel.from_model(policy, adapter=reference_adapter(policy), autocast=self._autocast)
        has_adapter = new_adapter or isinstance(policy, PeftModel)
        if has_adapter and self.args.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True mixes whole models, and the policy trains an adapter: leave out one of the two"
            )
        if self._given is not None:
            scorer = self._given.scorer()
            self._model, self._adapter = scorer.model, scorer.adapter
            if is_movable(self._model):
                self._model.to(self.args.device)
        elif not has_adapter:
            self._model = copy.deepcopy(policy)
        elif reference_adapter(policy) is not None:
            raise ValueError(
                "precompute_ref_log_probs=False: the policy trains on an adapter that is part of its reference, which "
                "would change with it. Leave it out, and the reference is scored before training; or give ref_model"
            )
        if self._model is not None:
            fuse_head(self._model)
        if self.args.sync_ref_model:
            self._pairs(policy)
            self.identity = FOLLOWS_POLICY
            self.starts_at_policy = self._given is None
        else:
            self.identity = (self._given or own).digest()
            self.starts_at_policy = self._given is None or own.digest() == self.identity

    def use_layout(self, token_layout: str) -> None:
        """Score batches in the policy's layout, unless the reference is a model that takes padded ones only."""
        if self._model is not None and token_layout != "padded":
            try:
                prepare_layout([self._model])
            except ValueError as error:
                logger.info("token layout of the reference: padded, because %s", error)
                return
        self.token_layout = token_layout

    @torch.no_grad()
    def attach(self, batch: Batch, policy: nn.Module) -> Batch:
        model = policy if self._model is None else self._model
        device = batch["input_ids"].device
        with (
            evaluating(model),
            adapter_state(model, self._adapter),
            torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            logps = batch_logps(model, batch, self.args, self.token_layout)
        return batch | {"ref_per_token_logps": logps, "ref_logps": sequence_sums(logps, batch)}

    # ---- TR-DPO

    @torch.no_grad()
    def follow(self, policy: nn.Module) -> None:
        """One mixing step."""
        for reference, own in self._pairs(policy).values():
            reference.lerp_(whole(own), self.args.ref_model_mixup_alpha)

    def _pairs(self, policy: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """The parameters of reference and policy by name; ValueError unless they are alike."""
        assert self._model is not None
        theirs, own = dict(self._model.named_parameters()), dict(policy.named_parameters())
        if other := sorted(theirs.keys() ^ own.keys()):
            raise ValueError(f"sync_ref_model=True: policy and reference do not both have {other[0]}")
        for name, tensor in theirs.items():
            if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
                raise ValueError(
                    f"sync_ref_model=True: {name} is {tensor.dtype} {tuple(tensor.shape)} in the reference and "
                    f"{own[name].dtype} {tuple(own[name].shape)} in the policy; they must be alike to be mixed"
                )
        return {name: (tensor, own[name]) for name, tensor in theirs.items()}

    def save(self, folder: Path) -> None:
        """Write the reference of a checkpoint, if it is not that of the beginning."""
        if self.args.sync_ref_model:
            assert self._model is not None
            tensors = {name: p.detach().cpu().contiguous() for name, p in self._model.named_parameters()}
            safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the reference of a checkpoint back; ValueError where it has none, or one of another model."""
        if not self.args.sync_ref_model:
            return
        assert self._model is not None
        own = dict(self._model.named_parameters())
        if not (file := folder / WEIGHTS_FILE).is_file():
            raise ValueError(f"{file} is missing: sync_ref_model=True goes on from the reference of the checkpoint")
        tensors = safetensors.torch.load_file(file)
        if tensors.keys() != own.keys():
            raise ValueError(f"{file} is the reference of another model: it has not the policy's tensors")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

"""Where a preference loss gets its reference from: nowhere, the cache on disk, or a model beside the policy.

DPOTrainer asks all three the same: `adopt` the policy before training, `join` what a data set needs, `attach` what a
batch needs, and `identity`, what a checkpoint was trained against. `live_reference` has the model beside the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from fastalign.models.sharding import whole_weights
from fastalign.reference import ReferenceCache, ReferenceModel
from fastalign.trainers.batches import Batch
from fastalign.trainers.config import by_device
from fastalign.trainers.loading import autocast_dtype, borrowed, separate_reference
from fastalign.trainers.reference import (
    Layout,
    build_cache,
    check_cached,
    reference_adapter,
    with_lengths,
    with_reference,
)
from fastalign.trainers.reference_config import DEFAULT_CACHE_DIR, DEFAULT_REF_BATCH_TOKENS, ReferenceConfig

logger = logging.getLogger(__name__)


FOLLOWS_POLICY = "follows its policy"  # the identity of a reference that is no longer what it was


def named(identity: str | None) -> str:
    """What a checkpoint was trained against, in words."""
    if identity is None:
        return "no reference"
    return "a reference that follows its policy" if identity == FOLLOWS_POLICY else f"reference {identity[:12]}…"


class NoReference:
    """Of losses of the policy alone. identity: what a checkpoint notes, None or a digest or `FOLLOWS_POLICY`."""

    cache: ReferenceCache | None = None
    identity: str | None = None
    starts_at_policy = False

    def __init__(self, args: ReferenceConfig, layout: Layout) -> None:
        self.args, self.layout = args, layout

    def adopt(self, policy: nn.Module, *, new_adapter: bool) -> None:
        """The policy as it was handed in: loaded, not yet under a new adapter."""

    def use_layout(self, token_layout: str) -> None:
        """How the policy's batches go through it."""

    def join(self, examples: Dataset, policy: nn.Module | None = None) -> Dataset:
        """Tokenised examples with all that the collator reads. policy: the one in training, for data that are new."""
        return with_lengths(examples, self.layout)

    def attach(self, batch: Batch, policy: nn.Module) -> Batch:
        """A batch, or a piece of one, with `ref_per_token_logps` and `ref_logps`, if there is a reference."""
        return batch

    def summary_lines(self) -> list[str]:
        return []


class CachedReference(NoReference):
    """Log-probs computed once and kept on disk by content; no reference is in memory while training."""

    def __init__(
        self, args: ReferenceConfig, layout: Layout, splits: Sequence[Dataset], *, ref_model: str | nn.Module | None,
        quantization_config: Any, with_adapter: bool,
    ) -> None:  # fmt: skip
        """ref_model: one other than the policy is scored here, before the policy is loaded: one model at a time."""
        super().__init__(args, layout)
        self._splits, self._autocast = splits, autocast_dtype(args)
        self._model: ReferenceModel | None = None  # one that can be loaded again whenever it is needed
        self._adapter: str | None = None  # of the policy, if it is part of its reference
        if ref_model is not None:
            reference = separate_reference(ref_model, args, with_adapter, quantization_config)
            with borrowed(ref_model, args.device):
                self._score(reference, splits)
                assert self.cache is not None
                check_cached(self.cache, reference, splits[0], self._autocast, layout)
            if isinstance(ref_model, str):
                self._model = reference

    def adopt(self, policy: nn.Module, *, new_adapter: bool) -> None:
        self._adapter = reference_adapter(policy)
        own = self._own(policy)
        if self.cache is None:
            self._score(own, self._splits)
            self.starts_at_policy = True
        else:
            self.starts_at_policy = own.digest() == self.identity
        self._splits = ()

    def join(self, examples: Dataset, policy: nn.Module | None = None) -> Dataset:
        """Raises ValueError where log-probs are missing and the reference cannot be had any more."""
        assert self.cache is not None
        if policy is not None and (missing := self.cache.missing(self.layout.sequences(examples))):
            reference = self._model or self._own(policy)
            if reference.digest() != self.identity:
                raise ValueError(
                    f"{len(missing)} sequences of this data set have no reference log-probs, and the reference is "
                    "gone: the policy has changed since. Give the data as eval_dataset to the constructor, or "
                    "ref_model by name"
                )
            with whole_weights(policy):  # processes have shares of their own; the digest is of the weights as they are
                self._score(reference, [examples])
        return with_reference(examples, self.cache, self.layout)

    def summary_lines(self) -> list[str]:
        report = None if self.cache is None else self.cache.report
        if self.cache is None or report is None:
            return []
        found = f"{report.cached} found, {report.computed} computed"
        return [f"reference log-probs: {found}, in {self.cache.path}"]

    def _own(self, policy: nn.Module) -> ReferenceModel:
        return ReferenceModel.from_model(policy, adapter=self._adapter, autocast=self._autocast)

    def _score(self, reference: ReferenceModel, splits: Sequence[Dataset]) -> None:
        self.cache = build_cache(
            str(Path(self.args.cache_dir or DEFAULT_CACHE_DIR).expanduser()),
            reference,
            splits,
            batch_tokens=by_device(self.args.precompute_ref_batch_tokens, DEFAULT_REF_BATCH_TOKENS, self.args),
            progress=not self.args.disable_tqdm,
            layout=self.layout,
        )
        self.identity = self.cache.reference

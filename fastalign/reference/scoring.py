"""Per-token log-probs of sequences under a transformers model: what a reference cache stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastalign.models import Head, fuse_head, unfuse_head
from fastalign.models.batches import plan_scoring, shared_prefixes
from fastalign.models.causal import is_fused
from fastalign.models.head import base_causal_lm
from fastalign.models.inference import inference, refuse_token_adapters
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.models.packing import packable
from fastalign.ops import linear_logps
from fastalign.reference.batches import PromptNotes
from fastalign.reference.identity import checked_adapter, unwrap
from fastalign.reference.progress import track
from fastalign.reference.sequences import TokenSequence, checked_length

DEFAULT_BATCH_TOKENS = 16_384


class TokenScores(NamedTuple):
    """Of each completion token: logps, and entropy of the distribution it was drawn from (nats), or None.

    Both float32 (len(input_ids) − completion_start,).
    """

    logps: np.ndarray
    entropy: np.ndarray | None


def score(
    model: nn.Module, sequences: Sequence[TokenSequence], *, adapter: str | None = None, temperature: float = 1.0,
    autocast: torch.dtype | None = None, batch_tokens: int = DEFAULT_BATCH_TOKENS, progress: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """Log-probs of each sequence's completion, in the order given: float32 (len(input_ids) − completion_start,) each.

    logps[i][t] = log p(input_ids[s + t] | input_ids[: s + t]),   s = completion_start, at the given temperature

    model: a transformers causal LM or a PeftModel around one, possibly wrapped (DDP, FSDP, torch.compile), wherever it
    is. adapter: as in ReferenceModel.from_model. autocast: as there. batch_tokens: computed tokens of one forward.
    progress: show a bar with the time left. The model comes back as it was: modes, adapters, requires_grad; no random
    number is drawn.
    """
    scorer = ModelScorer(model, adapter=adapter, temperature=temperature, autocast=autocast)
    return [scores.logps for scores in scorer.score_all(sequences, batch_tokens=batch_tokens, progress=progress)]


class ModelScorer:
    """Scores one batch of sequences a call: one forward through the backbone, the head in tiles, no logits.

    Usable inside `with scorer:`, which prepares the model for the time being and undoes it. A sequence's log-probs do
    not depend on the others in its batch, nor on the layout, beyond rounding. Sequences of one prompt that follow each
    other share it where the model takes that; else they are packed end to end, or padded. Raises ValueError for a model
    whose head cannot be fused, and for sequences of which that cannot be had.

    adapter: the adapter to score with, None for none of them. keep_adapters: instead, those that are active: a policy
    as it stands. entropy, backend: as in `linear_logps`. token_layout: "shared", "packed" or "padded", if the model
    takes it, see `fastalign.models.layouts`; inside `with` the attribute says which it is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: str | None = None,
        keep_adapters: bool = False,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        entropy: bool = False,
        backend: str = "auto",
        token_layout: str = "shared",
    ) -> None:
        self.model, self.adapter, self.keep_adapters = model, adapter, keep_adapters
        self._module = _forward_module(model)
        self.temperature, self.autocast, self.entropy, self.backend = temperature, autocast, entropy, backend
        self._inner = unwrap(model)
        if keep_adapters:
            if adapter is not None:
                raise ValueError(f"adapter={adapter!r} and keep_adapters=True exclude each other")
            refuse_token_adapters(self._inner)
        elif adapter is not None:
            checked_adapter(self._inner, adapter)
        base = base_causal_lm(self._inner)
        self._vocabulary = base.get_input_embeddings().weight.shape[0]
        self._device = base.get_input_embeddings().weight.device
        self._length_boundary, self._length_limit = _rope_lengths(base.config.get_text_config(decoder=True).to_dict())
        self._wanted = self.token_layout = token_layout
        self._undo = ExitStack()

    def __enter__(self) -> ModelScorer:
        if not is_fused(self._inner):
            with self._state():  # what is verified is what will be scored
                fuse_head(self._inner)
            self._undo.callback(unfuse_head, self._inner)
        with self._state():
            self.token_layout = self._undo.enter_context(packable(self._inner, self._wanted))
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def __call__(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        """One batch: log-probs float32 (len(input_ids) − completion_start,), in order."""
        return [scores.logps for scores in self.score_batch(sequences)]

    def score_all(
        self, sequences: Sequence[TokenSequence], *, batch_tokens: int = DEFAULT_BATCH_TOKENS, progress: bool = False
    ) -> list[TokenScores]:
        """Any number of sequences, in batches of at most `batch_tokens` computed tokens, in the order given."""
        notes = PromptNotes(TokenSequence(*sequence) for sequence in sequences)
        counts = [(len(ids), len(ids) - start) for ids, start in notes]
        lengths, completions = np.array(counts, np.int64).reshape(-1, 2).T
        results: dict[int, TokenScores] = {}
        with self, track(int(lengths.sum()), "log-probs", progress) as advance:
            for batch in plan_scoring(lengths, completions, notes.prompts, batch_tokens, self.token_layout):
                results |= zip(
                    batch.tolist(), self.score_batch([TokenSequence(*sequences[int(i)]) for i in batch]), strict=True
                )
                advance(int(lengths[batch].sum()), len(batch))
        return [results[i] for i in range(len(sequences))]

    def score_batch(self, sequences: list[TokenSequence]) -> list[TokenScores]:
        """One batch, in order."""
        boundary = self._length_boundary
        if boundary is None:
            return self._score(sequences)
        results: dict[int, TokenScores] = {}
        for is_long in (True, False):  # two forwards, where there are both
            part = [i for i, sequence in enumerate(sequences) if (len(sequence.input_ids) > boundary) == is_long]
            results |= zip(part, self._score([sequences[i] for i in part]), strict=True) if part else {}
        return [results[i] for i in range(len(sequences))]

    def _score(self, sequences: list[TokenSequence]) -> list[TokenScores]:
        batch, targets = self._collate(sequences)
        layout = plan_layout(batch, self.token_layout)
        given = {"attention_mask": batch["attention_mask"]} if layout is None else {}

        def head_fn(hidden: Tensor, head: Head) -> Tensor:
            out = linear_logps(
                hidden, head.weight, targets.to(hidden.device), temperature=self.temperature, entropy=self.entropy,
                rows=torch.arange(len(targets)), backend=self.backend, **head.options,
            )  # fmt: skip
            return torch.stack([values for values in (out.logps, out.entropy) if values is not None])

        with self._state():
            scores = run_layout(self._module, batch, layout, head_fn, **given)
        counts = np.array([len(sequence.input_ids) - sequence.completion_start for sequence in sequences])
        parts = np.split(scores.float().cpu().numpy(), counts.cumsum()[:-1], axis=1)
        return [TokenScores(part[0], part[1] if self.entropy else None) for part in parts]

    @contextmanager
    def _state(self) -> Iterator[None]:
        """As `inference`, with the adapters that are asked for."""
        with inference(self._inner, self._device, autocast=self.autocast), ExitStack() as stack:
            if not self.keep_adapters:
                stack.enter_context(adapter_state(self._inner, self.adapter))
            yield

    def _collate(self, sequences: list[TokenSequence]) -> tuple[dict[str, Any], Tensor]:
        """A padded batch as collators make them, on the model's device; targets (n,) int64 at its rows, on the host."""
        width = max(len(sequence.input_ids) for sequence in sequences)
        if self._length_limit is not None and width > self._length_limit:
            raise ValueError(
                f"a sequence has {width} tokens; with dynamic RoPE, positions beyond {self._length_limit} depend on "
                "the other sequences of a batch, so their log-probs cannot be cached: shorten max_length"
            )
        ids = np.zeros((len(sequences), width), np.int64)
        mask = np.zeros((len(sequences), width), np.int64)
        scored = np.zeros((len(sequences), width), bool)
        for row, (tokens, start) in enumerate(sequences):
            length = checked_length(row, tokens, start)
            ids[row, :length] = np.asarray(tokens)
            mask[row, :length] = 1
            scored[row, start - 1 : length - 1] = True
        if not 0 <= ids.min() <= ids.max() < self._vocabulary:  # on a GPU this would be an assertion in a kernel
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"token id {worst} is outside the model's vocabulary of {self._vocabulary}: another model's tokenizer?"
            )
        lengths, rows = mask.sum(axis=1), np.flatnonzero(scored)
        groups, prefixes = shared_prefixes(ids, lengths, [start for _, start in sequences])
        input_ids, attention_mask = (torch.from_numpy(array).to(self._device) for array in (ids, mask))
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "rows": rows, "lengths": lengths,
            "groups": groups, "prefix_lengths": prefixes,
        }  # fmt: skip
        return batch, torch.from_numpy(ids.ravel()[rows + 1])


def _forward_module(model: nn.Module) -> nn.Module:
    """What is called: FSDP and DeepSpeed must stay, since their hooks put the weights in place.

    DDP goes, whose forward waits for the other ranks, which may have fewer batches; torch.compile too, which would
    compile again for every batch.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif is_compiled_module(model):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


@contextmanager
def adapter_state(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside: every adapter off, or only `adapter` on. Afterwards as before, requires_grad of every parameter included.

    model: unwrapped. Works for PeftModel and for adapters that transformers injected.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if not layers and not isinstance(model, PeftModel):
        yield
        return
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    enabled = [not layer.disable_adapters for layer in layers]
    active = [list(layer.active_adapters) for layer in layers]
    with ExitStack() as stack:
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            stack.enter_context(model.disable_adapter())  # its layers are not in the base model
        try:
            for layer in layers:
                found = None if adapter is None else _available(layer, adapter)
                if found is not None:
                    layer.set_adapter([found])
                layer.enable_adapters(found is not None)
            yield
        finally:
            for layer, was_enabled, was_active in zip(layers, enabled, active, strict=True):
                layer.set_adapter(was_active)
                layer.enable_adapters(was_enabled)
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)


def _available(layer: BaseTunerLayer | AuxiliaryTrainingWrapper, adapter: str) -> str | None:
    """`adapter` if this layer has it: one adapter may have fewer layers than another."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return layer.check_set_adapter([adapter])
    return adapter if any(adapter in getattr(layer, name) for name in layer.adapter_layer_names) else None


def _rope_lengths(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """(boundary, limit) of sequence lengths for RoPE variants that look at the longest sequence of a batch.

    longrope takes one of two frequency sets, by whether the batch is longer than the original context: a forward must
    not mix the two. dynamic scales with the longest length: beyond the context, a sequence has no log-probs of its own.
    """
    rope = config.get("rope_parameters") or {}
    variants = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    boundary = limit = None
    for variant in variants:
        if variant.get("rope_type") == "longrope":
            boundary = variant.get("original_max_position_embeddings")
        elif variant.get("rope_type") == "dynamic":
            limit = config.get("max_position_embeddings")
    return boundary, limit

"""Preparing a model for packed batches, and the proof that it keeps their sequences apart."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.models import attention
from fastalign.models.head import base_causal_lm
from fastalign.models.inference import evaluating, refuse_token_adapters
from fastalign.models.segments import Segments

Model = TypeVar("Model", bound=nn.Module)
_Slice = tuple[int, int, int | None]  # number of a sequence, start, stop

_COMMON = 2  # tokens that two sequences of the probe share

logger = logging.getLogger(__name__)


def enable_segments(model: Model) -> Model:
    """Let a transformers model (bare or PEFT-wrapped) take the keyword `segments`; in place, idempotent.

    `model(input_ids, position_ids=…, segments=Segments(…))` then computes for every sequence of a packed batch what the
    model computes for it alone, prefixes that several sequences share included; see `fastalign.models.attention`. A few
    small forwards prove it first. `fastalign.models.layouts` makes such batches.

    Raises ValueError, naming the model's class: its attention does not go through transformers' interface, it attends
    otherwise than causally in full or within a sliding window, an active adapter depends on where tokens are, or a
    packed batch comes out differently (some other part of the model carries something from one token to the next).
    """
    base = base_causal_lm(model)
    if attention.uses_segments(model):
        return model
    refuse_token_adapters(model)
    check_packable(base)
    probe = _Probe(base)
    expected = probe.apart()
    attention.install(base)
    try:
        probe.compare_packed(expected)
        probe.compare_shared(expected)
    except BaseException:
        attention.uninstall(base)
        raise
    _skip_unneeded(base, probe, expected)
    return model


def disable_segments(model: Model) -> Model:
    """Undo `enable_segments`, in place; a model without it is left alone."""
    if attention.uses_segments(model):
        attention.uninstall(base_causal_lm(model))
    return model


@contextmanager
def packable(model: nn.Module, layout: str = "shared") -> Iterator[str]:
    """Inside, a model that can takes packed batches; yields `layout`, or "padded" where it cannot. Then as before."""
    if layout == "padded" or attention.uses_segments(model):
        yield layout
        return
    try:
        enable_segments(model)
    except ValueError as error:
        logger.info("batches are padded: %s", error)
        yield "padded"
        return
    try:
        yield layout
    finally:
        disable_segments(model)


def _skip_unneeded(base: PreTrainedModel, probe: _Probe, expected: list[Tensor]) -> None:
    """Let the last layer leave out what nobody reads, where its modules are as `LastLayer` knows them."""
    try:
        last_layer = attention.skip_unneeded(base)
    except ValueError as error:
        logger.info("the last layer is computed for every token of a packed batch: %s", error)
        return
    try:
        probe.compare_shared(expected, needed=[1, 4, 5, 7, 8, 10])
    except ValueError as error:
        attention.keep_unneeded(base, last_layer)
        logger.info("the last layer is computed for every token of a packed batch: %s", error)


def check_packable(base: PreTrainedModel) -> None:
    """Raise ValueError, naming it, for a class of models that takes no packed batch, as far as class and config tell.

    Looks at no number, so it works on the meta device.
    """
    name = type(base).__name__
    if not (base._supports_attention_backend and base._can_set_attn_implementation()):
        raise ValueError(
            f"{name} does not attend through transformers' attention interface, so it takes no packed batch"
        )
    config = base.config.get_text_config(decoder=True)
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(other))}; packed batches go through full_attention and "
            "sliding_attention alone"
        )


class _Probe:
    """Four short sequences, alone and in rows with others; two of them begin alike."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.backbone, self.name = base, base.base_model, type(base).__name__
        config = base.config.get_text_config(decoder=True)
        self.windows = _windows(config)
        device, vocab = base.get_input_embeddings().weight.device, config.vocab_size
        first, long, padded, other = (
            (torch.arange(length, device=device) * 7919 + 104729 * (i + 1)) % vocab
            for i, length in enumerate((3, 5, 4, 3))
        )
        self.sequences = [first, long, padded, torch.cat([long[:_COMMON], other])]

    @torch.no_grad()
    def apart(self) -> list[Tensor]:
        with evaluating(self.base), self._as_weights_are():
            return [self.backbone(input_ids=ids[None], use_cache=False)[0][0].float() for ids in self.sequences]

    def _as_weights_are(self) -> torch.autocast:
        """Outside autocast, which would round what is compared."""
        return torch.autocast(self.sequences[0].device.type, enabled=False)

    def compare_packed(self, expected: list[Tensor]) -> None:
        """ValueError unless two rows of sequences, the second padded, give `expected`."""
        rows: list[list[_Slice]] = [[(0, 0, None), (1, 0, None)], [(2, 0, None)]]
        self._compare(expected, rows, "in a packed batch")

    def compare_shared(self, expected: list[Tensor], needed: list[int] | None = None) -> None:
        """The same for a row in which the tokens that two sequences have in common come once."""
        row = [(0, 0, None), (1, 0, _COMMON), (1, _COMMON, None), (3, _COMMON, None)]
        self._compare(
            expected, [row], "that shares its first tokens with another", prefixes=[-1, -1, 1, 1], needed=needed
        )

    @torch.no_grad()
    def _compare(
        self,
        expected: list[Tensor],
        rows: list[list[_Slice]],
        where: str,
        prefixes: list[int] | None = None,
        needed: list[int] | None = None,
    ) -> None:
        """rows: of each segment, a sequence and the slice of it that the segment is."""
        parts = [[self.sequences[n][start:stop] for n, start, stop in row] for row in rows]
        width = max(sum(map(len, row)) for row in parts)
        lengths = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        ids = torch.zeros(len(rows), width, dtype=torch.int64, device=self.sequences[0].device)
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for b, (row, own) in enumerate(zip(rows, parts, strict=True)):
            lengths[b, : len(own)] = [len(part) for part in own]
            ids[b, : lengths[b].sum()], mask[b, : lengths[b].sum()] = torch.cat(own), 1
            begins = [torch.arange(start, start + len(part)) for (_, start, _), part in zip(row, own, strict=True)]
            positions[b, : lengths[b].sum()] = torch.cat(begins)
        segments = Segments(
            lengths, width, prefixes=None if prefixes is None else np.array(prefixes),
            needed=None if needed is None else np.array(needed),
        )  # fmt: skip
        seen: list[int | None] = []
        with evaluating(self.base), self._as_weights_are(), attention.watched(seen):
            got = self.backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, segments=segments, use_cache=False
            )[0].float()  # fmt: skip
        self._check_windows(seen)
        wanted = torch.cat([expected[n][start:stop] for row in rows for n, start, stop in row])
        got = got[mask.bool()]
        if needed is not None:
            got, wanted = got[needed], wanted[needed]
        tolerance = 5e-2 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not torch.allclose(got, wanted, rtol=0.0, atol=tolerance * float(wanted.abs().max()) + 1e-6):
            raise ValueError(
                f"{self.name} computes other hidden states for a sequence {where} than for the sequence alone: some "
                "part of it carries something from one token to the next, so it takes no packed batch"
            )

    def _check_windows(self, seen: list[int | None]) -> None:
        """ValueError unless every layer was told of its window."""
        if not seen:
            raise ValueError(
                f"{self.name} does not hand the keyword segments to its attention, so it takes no packed batch"
            )
        if self.windows is not None and seen != self.windows:
            raise ValueError(
                f"{self.name} hands sliding windows {seen} to its attention and its config says {self.windows}, so a "
                "packed batch would not be masked as the model masks a sequence"
            )


def _windows(config: Any) -> list[int | None] | None:
    """The sliding window of each layer by the config; None where it does not say."""
    window = getattr(config, "sliding_window", None)
    if (types := getattr(config, "layer_types", None)) is not None:
        return [window if kind == "sliding_attention" else None for kind in types]
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * config.num_hidden_layers
    return [window] * config.num_hidden_layers

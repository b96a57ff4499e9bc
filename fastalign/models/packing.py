"""Preparing a model for packed batches, and the proof that it keeps their sequences apart."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.models import attention
from fastalign.models.head import base_causal_lm
from fastalign.models.inference import evaluating
from fastalign.models.segments import Segments

Model = TypeVar("Model", bound=nn.Module)

_PROBE = ([3, 5], [4])  # lengths of the sequences in two rows, the second padded


def enable_segments(model: Model) -> Model:
    """Let a transformers model (bare or PEFT-wrapped) take the keyword `segments`; in place, idempotent.

    `model(input_ids, position_ids=…, segments=Segments(…))` then computes for every sequence of a packed batch what the
    model computes for it alone; see `fastalign.models.attention`. A few small forwards prove it first.

    Raises ValueError, naming the model's class: its attention does not go through transformers' interface, it attends
    otherwise than causally in full or within a sliding window, or a packed batch comes out differently (some other
    part of the model carries something from one token to the next).
    """
    base = base_causal_lm(model)
    if attention.uses_segments(model):
        return model
    _check_class(base)
    probe = _Probe(base)
    expected = probe.apart()
    attention.install(base)
    try:
        probe.compare(expected)
    except BaseException:
        attention.uninstall(base)
        raise
    return model


def disable_segments(model: Model) -> Model:
    """Undo `enable_segments`, in place; a model without it is left alone."""
    if attention.uses_segments(model):
        attention.uninstall(base_causal_lm(model))
    return model


def _check_class(base: PreTrainedModel) -> None:
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
    """Three short sequences, alone and packed in two rows."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.backbone = base, base.base_model
        config = base.config.get_text_config(decoder=True)
        self.windows = _windows(config)
        device = base.get_input_embeddings().weight.device
        lengths = [length for row in _PROBE for length in row]
        vocab = config.vocab_size
        self.sequences = [
            (torch.arange(length, device=device) * 7919 + 104729 * (i + 1)) % vocab for i, length in enumerate(lengths)
        ]

    @torch.no_grad()
    def apart(self) -> list[Tensor]:
        with evaluating(self.base):
            return [self.backbone(input_ids=ids[None], use_cache=False)[0][0].float() for ids in self.sequences]

    @torch.no_grad()
    def compare(self, expected: list[Tensor]) -> None:
        """ValueError unless the packed batch gives `expected`, and every layer was told of its window."""
        width = max(map(sum, _PROBE))
        ids = torch.zeros(len(_PROBE), width, dtype=torch.int64, device=self.sequences[0].device)
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        lengths = np.zeros((len(_PROBE), max(map(len, _PROBE))), dtype=np.int64)
        places, rest = [], iter(self.sequences)
        for row, parts in enumerate(_PROBE):
            lengths[row, : len(parts)] = parts
            for start, length in zip(np.cumsum(parts) - parts, parts, strict=True):
                place = (row, slice(int(start), int(start) + length))
                ids[place], mask[place] = next(rest), 1
                positions[place] = torch.arange(length, device=ids.device)
                places.append(place)
        name = type(self.base).__name__
        seen: list[int | None] = []
        with evaluating(self.base), attention.watched(seen):
            packed = self.backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, segments=Segments(lengths, width),
                use_cache=False,
            )[0].float()  # fmt: skip
        if not seen:
            raise ValueError(f"{name} does not hand the keyword segments to its attention, so it takes no packed batch")
        if self.windows is not None and seen != self.windows:
            raise ValueError(
                f"{name} hands sliding windows {seen} to its attention and its config says {self.windows}, so a packed "
                "batch would not be masked as the model masks a sequence"
            )
        for place, own in zip(places, expected, strict=True):
            tolerance = (5e-2 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-4) * float(
                own.abs().max()
            ) + 1e-6
            if not torch.allclose(packed[place], own, rtol=0.0, atol=tolerance):
                raise ValueError(
                    f"{name} computes other hidden states for a sequence in a packed batch than for the sequence "
                    "alone: some part of it carries something from one token to the next, so it takes no packed batch"
                )


def _windows(config: Any) -> list[int | None] | None:
    """The sliding window of each layer by the config; None where it does not say."""
    window = getattr(config, "sliding_window", None)
    if (types := getattr(config, "layer_types", None)) is not None:
        return [window if kind == "sliding_attention" else None for kind in types]
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * config.num_hidden_layers
    return [window] * config.num_hidden_layers

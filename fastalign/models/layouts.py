"""How the tokens of a padded batch go through a model: each of them, the real ones alone, or no prefix twice.

    padded   the batch (S, T) as it is
    packed   the real tokens of all sequences in one row (1, N); attention stays within each sequence
    shared   as packed, and the tokens that the sequences of a group (a pair, a list, the rollouts of a prompt) begin
             with go through once: each member's own tokens attend to the prefix's keys and to their own, and their
             positions go on from the prefix's

    layout = plan_layout(batch, "shared")                     # on the host, from what the collators leave there
    output = run_layout(model, batch, layout, head_fn)        # head_fn(hidden (n, H), head), in the order of the rows

All three give every scored token the hidden state that its sequence gives it alone. Where members share the state of a
token, the prompt's last one for example, it is handed out to each of them and autograd adds up what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.models.actor_critic import ActorCritic
from fastalign.models.attention import uses_segments
from fastalign.models.causal import HeadFn
from fastalign.models.head import Head, base_causal_lm, inside
from fastalign.models.segments import Segments

TOKEN_LAYOUTS = ("padded", "packed", "shared")


@dataclass(frozen=True)
class TokenLayout:
    """The N tokens of a batch that a model computes, in one row, and where they came from. All of it on the host.

    tokens           (N,) int64: flat index b·T + t into the padded batch (S, T); a shared one of any of its sequences
    position_ids     (N,) int64: t
    segments         over (1, N): where one may look
    rows             (n,) int64: for each of the batch's rows, the one of the N tokens whose hidden state it reads
    padded, real     tokens of the padded batch, and those of them that are no padding
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    segments: Segments
    rows: np.ndarray
    padded: int
    real: int
    _devices: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def computed(self) -> int:
        """N: tokens that go through the model."""
        return len(self.tokens)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, position_ids, rows) on a device, moved there once and together."""
        if device not in self._devices:
            parts = [self.tokens, self.position_ids, self.rows]
            moved = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
            tokens, positions, rows = moved.split([len(part) for part in parts])
            self._devices[device] = (tokens, positions, rows)
        return self._devices[device]


@dataclass(frozen=True)
class _Sequences:
    """The sequences of a batch, those inside packed rows too: (S,) each."""

    starts: np.ndarray  # flat index of the first token
    lengths: np.ndarray
    used: np.ndarray  # tokens up to the last that is scored, 1 at least
    groups: np.ndarray
    row_sequence: np.ndarray  # (n,) the sequence of each scored row
    row_position: np.ndarray  # (n,) and its place in it


def plan_layout(batch: Mapping[str, Any], mode: str, *, every_token: bool = False) -> TokenLayout | None:
    """The layout of a batch of the collators, None for "padded". Needs nothing from a device.

    batch: `lengths`, `groups`, `rows` and the shape of `input_ids`; `segment_lengths` where rows hold several
        sequences; for "shared" also `prefix_lengths` (groups,), the tokens that all sequences of a group begin with
        (0 or absent: nothing is shared).
    mode: "padded", "packed" or "shared".
    every_token: tokens behind the last scored one of a sequence go through the model too. Nothing reads what comes of
        them, except statistics over all tokens such as a router's load.

    Raises ValueError: an unknown mode, or prefixes that are not one for each group or longer than a sequence.
    """
    if mode not in TOKEN_LAYOUTS:
        raise ValueError(f"token layout {mode!r} is unknown; accepted are {', '.join(TOKEN_LAYOUTS)}")
    if mode == "padded":
        return None
    shape = tuple(batch["input_ids"].shape)
    sequences = _sequences(batch, shape[1], every_token)
    prefixes = _prefix_lengths(batch, sequences) if mode == "shared" else np.zeros(sequences.groups.max() + 1, np.int64)
    return _laid_out(sequences, prefixes, shape, every_token)


def _sequences(batch: Mapping[str, Any], width: int, every_token: bool) -> _Sequences:
    rows, lengths = np.asarray(batch["rows"], np.int64), np.asarray(batch["lengths"], np.int64)
    starts, groups = np.arange(len(lengths)) * width, np.asarray(batch["groups"], np.int64)
    if "segment_lengths" in batch:  # one group each: packed rows have nothing to share
        parts = np.asarray(batch["segment_lengths"], np.int64)
        starts = (starts[:, None] + np.cumsum(parts, axis=1) - parts)[parts > 0]
        lengths = parts[parts > 0]
        groups = np.arange(len(lengths))
    row_sequence = np.searchsorted(starts, rows, side="right") - 1
    row_position = rows - starts[row_sequence]
    used = lengths
    if not every_token:
        used = np.ones_like(lengths)
        np.maximum.at(used, row_sequence, row_position + 1)
    return _Sequences(starts, lengths, used, groups, row_sequence, row_position)


def _prefix_lengths(batch: Mapping[str, Any], sequences: _Sequences) -> np.ndarray:
    """(G,) tokens of each group that go through once."""
    count = int(sequences.groups.max()) + 1
    if "prefix_lengths" not in batch or "segment_lengths" in batch:
        return np.zeros(count, np.int64)
    prefixes = np.asarray(batch["prefix_lengths"], np.int64)
    if prefixes.shape != (count,):
        raise ValueError(f"prefix_lengths has shape {prefixes.shape}, the batch has {count} groups")
    shortest, longest_used = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(shortest, sequences.groups, sequences.lengths)
    np.maximum.at(longest_used, sequences.groups, sequences.used)
    if len(wrong := np.flatnonzero((prefixes < 0) | (prefixes > shortest))):
        group = int(wrong[0])
        raise ValueError(
            f"the prefix of group {group} has {prefixes[group]} tokens, its shortest sequence {shortest[group]}"
        )
    sizes = np.bincount(sequences.groups, minlength=count)
    return np.where(sizes > 1, np.minimum(prefixes, longest_used), 0)


def _laid_out(sequences: _Sequences, prefixes: np.ndarray, shape: tuple[int, ...], every_token: bool) -> TokenLayout:
    """Group after group: its prefix, then its members' own tokens. Parts of 0 tokens are left out."""
    count = len(prefixes)
    prefix = prefixes[sequences.groups]
    first = np.zeros(count, np.int64)  # a sequence of each group, to read the prefix from
    first[sequences.groups] = np.arange(len(sequences.groups))
    own = np.maximum(sequences.used - prefix, 0)

    groups = np.concatenate([np.arange(count), sequences.groups])
    lengths = np.concatenate([prefixes, own])
    offsets = np.concatenate([np.zeros(count, np.int64), prefix])  # position of the first token
    sources = np.concatenate([sequences.starts[first], sequences.starts + prefix])
    order = np.argsort(groups, kind="stable")
    order = order[lengths[order] > 0]
    lengths, offsets, sources = lengths[order], offsets[order], sources[order]

    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    places = np.full(len(groups), -1)  # of the first token of each part, by its old number
    places[order] = ends - lengths
    numbers = np.full(len(groups), -1)
    numbers[order] = np.arange(len(order))
    prefix_of = np.where(order < count, -1, numbers[groups[order]])

    sequence, position = sequences.row_sequence, sequences.row_position
    shift = position - prefix[sequence]
    rows = np.where(
        shift < 0, places[sequences.groups[sequence]] + position, places[count + sequence] + shift
    )  # fmt: skip
    needed = None if every_token else np.unique(rows)
    return TokenLayout(
        tokens=np.repeat(sources, lengths) + within,
        position_ids=np.repeat(offsets, lengths) + within,
        segments=Segments(lengths[None], int(ends[-1]), prefixes=prefix_of, needed=needed),
        rows=rows,
        padded=shape[0] * shape[1],
        real=int(sequences.lengths.sum()),
    )


def run_layout(
    model: nn.Module,
    batch: Mapping[str, Any],
    layout: TokenLayout | None,
    head_fn: HeadFn | None = None,
    *,
    scores: bool = False,
    **model_kwargs: Any,
) -> Any:
    """One forward of a model over a batch in a layout; returns what the model's forward returns.

    model: fused (`fuse_head`: its head_fn is handed hidden (n, H), the states of the batch's rows in their order,
        instead of (B, T, H); `fuse_scalar_head`: leave out head_fn, the scores (n,) are those at the rows), or an
        `ActorCritic`, whose values at the rows are asked for by scores=True. Prepared by `enable_segments` for any
        layout but padded. It may be wrapped.
    layout: `plan_layout` of this batch; None is the padded one.
    model_kwargs: what else its forward takes. `attention_mask`, `position_ids` and `segments` are given from here.

    Raises ValueError: a model that is not prepared, or output_router_logits in a layout that leaves tokens out (a
    router's loss counts each of them).
    """
    ids: Tensor = batch["input_ids"]
    if layout is None:
        if "segment_lengths" in batch:
            model_kwargs |= {name: batch[name] for name in ("attention_mask", "position_ids")}
            model_kwargs["segments"] = Segments(batch["segment_lengths"], ids.shape[1])
        elif model_kwargs.get("output_router_logits"):
            model_kwargs["attention_mask"] = batch["attention_mask"]
        rows = torch.from_numpy(np.asarray(batch["rows"], np.int64)).to(ids.device, non_blocking=True)
    else:
        if model_kwargs.get("output_router_logits") and layout.computed != layout.real:
            raise ValueError(
                f"output_router_logits counts every token and this layout computes {layout.computed} of {layout.real}: "
                'plan_layout(batch, "packed", every_token=True) leaves none out'
            )
        _check_prepared(model)
        tokens, positions, rows = layout.on(ids.device)
        ids = ids.reshape(-1).index_select(0, tokens)[None]
        # with a mask of ones transformers does not look, on the device, for sequences that position_ids tell apart
        model_kwargs |= {
            "position_ids": positions[None], "segments": layout.segments, "attention_mask": torch.ones_like(ids)
        }  # fmt: skip
    if head_fn is None or scores:
        model_kwargs["rows"] = rows
    if head_fn is not None:
        model_kwargs["head_fn"] = _at_rows(head_fn, rows)
    return model(input_ids=ids, **model_kwargs)


def _check_prepared(model: nn.Module) -> None:
    while (inner := inside(model)) is not None:
        model = inner
    for part in (model.policy, model.critic) if isinstance(model, ActorCritic) else (model,):
        if part is None:
            continue
        try:
            base = base_causal_lm(part)
        except ValueError:  # inside a wrapper that is not known here
            continue
        if not uses_segments(base):
            raise ValueError(f"{type(base).__name__} is not prepared for packed batches: enable_segments(model)")


def _at_rows(head_fn: HeadFn, rows: Tensor) -> HeadFn:
    def picked(hidden: Tensor, head: Head) -> Any:
        index = rows.to(hidden.device, non_blocking=True)
        return head_fn(hidden.flatten(0, -2).index_select(0, index), head)

    return picked

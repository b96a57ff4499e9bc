"""Where the gradients of a call go, and how often each is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastalign.ops.tiles import Tiles


@dataclass(slots=True)
class Sinks:
    """Where gradients go; None is not needed. Each is float32 (or float64), or a 16-bit result written exactly once."""

    hidden: Tensor | None = None  # (N, H); rows of a tile are written once, when the tile is done
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,); always added to, so it starts at zero
    first: bool = True  # nothing has been added to `weight` yet, so it needs no zeroing
    compact: bool = False  # `hidden` is (n, H), in the order of the scored rows

    def close(self) -> None:
        """All tiles are done. Without a row that contributes none was, and `weight` is still what its memory held."""
        if self.first and self.weight is not None:
            self.weight.zero_()


def make_sinks(
    tiles: Tiles, needs: Sequence[bool], *, accumulate: bool = False, weight: Tensor | None = None,
    into: Tensor | None = None,
) -> Sinks:  # fmt: skip
    """Gradient buffers: in the result's dtype where it is written once (or is wide), else a wide accumulator. They want
    `close()` when all tiles are done.

    accumulate: they are scaled later, in float32; with one chunk of all rows on an accelerator in their own dtype.
    weight: memory for the weight's gradient, if it is there already. into: a float32 gradient that it is added to.
    """
    N, V = tiles.hidden.shape[0], tiles.V
    plan, one_chunk = tiles.plan, not tiles.vocab_major and tiles.plan.n <= tiles.plan.rows
    # every row is written; not so on the CPU, where rows that contribute nothing are left out
    whole = tiles.rows is None and not accumulate and not tiles.vocab_major
    hidden = bias = None
    if needs[0]:
        dtype = tiles.wide if accumulate and not one_chunk else tiles.hidden.dtype
        new = tiles.hidden.new_empty if whole else tiles.hidden.new_zeros
        hidden = new((N, tiles.hidden.shape[1]), dtype=dtype)
    if needs[2]:
        bias = tiles.weight.new_zeros(V, dtype=tiles.wide)
    if needs[1] and into is not None:
        return Sinks(hidden, into, bias, first=False)
    if needs[1] and weight is None:
        once = one_chunk or not accumulate
        one_tile = once and plan.n <= plan.rows and not 0 < plan.kept_rows < plan.n
        dtype = tiles.weight.dtype if one_tile else torch.promote_types(tiles.weight.dtype, torch.float32)
        weight = tiles.weight.new_empty((V, tiles.weight.shape[1]), dtype=dtype)
    return Sinks(hidden, weight, bias)


def finish_sinks(tiles: Tiles, sinks: Sinks) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in their tensors' dtypes."""
    hidden = None if sinks.hidden is None else sinks.hidden.to(tiles.hidden.dtype)
    weight = None if sinks.weight is None else sinks.weight.to(tiles.weight.dtype)
    bias = None if sinks.bias is None or tiles.bias is None else sinks.bias.to(tiles.bias.dtype)
    return hidden, weight, bias


def add_scaled(out: Tensor, part: Tensor, scale: Tensor | None) -> None:
    """out += part, times a 0-dim scale if there is one."""
    if scale is None:
        out.add_(part)
    else:
        out.addcmul_(part, scale.to(part.dtype))

"""The log-probs of pairs, checked and brought into one dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.losses.terms import DPOOptions, Pairs

_NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def make_pairs(
    options: DPOOptions, logps: Sequence[Tensor | None], lengths: Sequence[Tensor | None],
    tail_logps: Sequence[Tensor] | None,
) -> Pairs:  # fmt: skip
    """Pairs of the four log-probs (the last two may be missing together) and two lengths (likewise).

    Everything in one dtype, float32 at least; `ld_alpha` applied to what has a reference. Raises ValueError where
    shapes, devices or dtypes do not agree.
    """
    sums, dtype = _checked(logps)
    n_chosen, n_rejected = _checked_lengths(lengths, sums[0], dtype)
    tails = _checked_tails(options, tail_logps, sums)
    keep = 1.0 if options.ld_alpha is None else options.ld_alpha
    weighted = sums if tails is None else [s - (1 - keep) * tail for s, tail in zip(sums, tails, strict=True)]
    policy, reference = (weighted[0], weighted[1]), None
    chosen, rejected = policy
    if len(weighted) == 4:
        reference = (weighted[2], weighted[3])
        chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    return Pairs(sums[0], sums[1], policy, reference, chosen, rejected, n_chosen, n_rejected, options)


def _checked(logps: Sequence[Tensor | None]) -> tuple[list[Tensor], torch.dtype]:
    """The log-probs that are there, two or four, in one dtype."""
    given = {name: values for name, values in zip(_NAMES, logps, strict=True) if values is not None}
    if len(given) == 3:
        missing = next(name for name in _NAMES if name not in given)
        raise ValueError(f"{missing} is missing: the reference's log-probs go together")
    first = given["chosen_logps"]
    if first.dim() != 1:
        raise ValueError(f"chosen_logps: shape {tuple(first.shape)}, accepted is (P,), one sum per response")
    dtype = torch.float32
    for name, values in given.items():
        check_like(name, values, first)
        if not values.is_floating_point():
            raise ValueError(f"{name}: dtype {values.dtype}, accepted are floating-point log-probs")
        dtype = torch.promote_types(dtype, values.dtype)
    return [values.to(dtype) for values in given.values()], dtype


def _checked_lengths(
    lengths: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    for name, given in zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True):
        if given is not None:
            check_like(name, given, like)
    if (lengths[0] is None) != (lengths[1] is None):
        missing = "chosen_lengths" if lengths[0] is None else "rejected_lengths"
        raise ValueError(f"{missing} is missing: the two lengths go together")
    chosen, rejected = (None if given is None else given.to(dtype) for given in lengths)
    return chosen, rejected


def _checked_tails(options: DPOOptions, tail_logps: Sequence[Tensor] | None, sums: list[Tensor]) -> list[Tensor] | None:
    if tail_logps is None:
        if options.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha={options.ld_alpha} needs tail_logps, the log-probs of the tokens beyond min(|y_w|, |y_l|)"
            )
        return None
    if options.ld_alpha is None:
        raise ValueError("tail_logps are what ld_alpha weighs, which is not given: leave them out")
    if len(tail_logps) != len(sums):
        raise ValueError(
            f"tail_logps holds {len(tail_logps)} tensors, accepted are {len(sums)}, as there are log-probs"
        )
    for name, tail in zip(_NAMES, tail_logps, strict=False):
        check_like(f"tail_logps of {name}", tail, sums[0])
    return [tail.to(sums[0].dtype) for tail in tail_logps]


def check_like(name: str, values: Tensor, like: Tensor) -> None:
    """Raise ValueError unless `values` has the shape and the device of `like`, which are those of chosen_logps."""
    if values.shape != like.shape or values.device != like.device or values.is_complex():
        raise ValueError(
            f"{name}: shape {tuple(values.shape)} of {values.dtype} on {values.device}, "
            f"accepted is that of chosen_logps, {tuple(like.shape)} on {like.device}"
        )

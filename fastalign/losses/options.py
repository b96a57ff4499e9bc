"""Which options a preference loss takes: every one is honoured, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastalign.losses.catalogue import DPO_LOSSES, DPOLoss
from fastalign.losses.terms import F_DIVERGENCES, DPOOptions

_EVERYWHERE = ("beta", "loss_type", "loss_weights")  # what needs no variant that takes it: β scales the metrics too


def check_dpo_options(
    *, has_lengths: bool = True, has_reference: bool | None = None, **options: Any
) -> tuple[DPOLoss, ...]:
    """The variants that `loss_type` names, once every option is found to be honoured by one of them at least.

    Args:
        has_lengths: whether the completion lengths are known.
        has_reference: whether the reference's log-probs are; None: not asked.
        options: those of `DPOOptions`; missing ones have their default.
    Raises:
        ValueError: an option that no variant honours, a value out of range, variants that do not go together, or
            what a variant needs and does not get.
        TypeError: an option that no preference loss has.
    """
    given = DPOOptions(**options)
    variants = _named(given)
    _check_weights(given)
    _check_values(given)
    for option in DPOOptions._fields:
        value = getattr(given, option)
        if option in _EVERYWHERE or value == DPOOptions._field_defaults[option]:
            continue
        if not any(option in variant.options for variant in variants):
            able = ", ".join(repr(name) for name, entry in DPO_LOSSES.items() if option in entry.options)
            raise ValueError(f"loss_type={given.loss_type!r} does not take {option} (given {value!r}): {able} do")
    if "exo_pair" in given.loss_types and not given.label_smoothing:
        raise ValueError("loss_type='exo_pair' takes the logarithm of label_smoothing: it must be above 0, given 0")
    if given.use_weighting and any(variant.couples_batch for variant in variants):
        raise ValueError(
            f"loss_type={given.loss_type!r} does not take use_weighting: its losses are of ranks, not of pairs"
        )
    if not has_lengths:
        _check_lengths(given, variants)
    if has_reference is not None:
        check_reference(given, variants, has_reference)
    return variants


def check_reference(options: DPOOptions, variants: Sequence[DPOLoss], has_reference: bool) -> None:
    """A reference is there if, and only if, a variant looks at it."""
    needed = any(variant.needs_reference for variant in variants)
    if needed and not has_reference:
        raise ValueError(f"loss_type={options.loss_type!r} needs the reference's log-probs, which are missing")
    if has_reference and not needed:
        raise ValueError(
            f"loss_type={options.loss_type!r} has no reference: its log-probs would be ignored; leave them out"
        )


def check_shift(options: DPOOptions, variants: Sequence[DPOLoss], shift: float | Tensor) -> None:
    """A shift other than the number 0 is used by a variant, and is a constant."""
    if not isinstance(shift, Tensor) and not shift:
        return
    if not any(variant.accepts_shift for variant in variants):
        able = ", ".join(repr(name) for name, entry in DPO_LOSSES.items() if entry.accepts_shift)
        raise ValueError(f"loss_type={options.loss_type!r} does not take shift: {able} do")
    if isinstance(shift, Tensor) and (shift.dim() or shift.requires_grad):
        raise ValueError(f"shift: shape {tuple(shift.shape)}, accepted is a number or a 0-dim tensor without gradient")


def _named(options: DPOOptions) -> tuple[DPOLoss, ...]:
    names = options.loss_types
    if not names:
        raise ValueError("loss_type=[] is empty: give a name, or a list of names")
    for name in names:
        if name not in DPO_LOSSES:
            raise ValueError(f"loss_type={name!r} is unknown: accepted are {', '.join(map(repr, DPO_LOSSES))}")
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type={options.loss_type!r} names a loss twice: give it a weight in loss_weights")
    variants = tuple(DPO_LOSSES[name] for name in names)
    if len(names) > 1:
        for name, variant in zip(names, variants, strict=True):
            if variant.rows == "responses":
                raise ValueError(
                    f"loss_type={options.loss_type!r}: {name!r} is a loss on single responses and stands alone; "
                    "lists are of losses on pairs"
                )
    return variants


def _check_weights(options: DPOOptions) -> None:
    weights, count = options.loss_weights, len(options.loss_types)
    if weights is None:
        return
    if len(weights) != count:
        raise ValueError(f"loss_weights={list(weights)} has {len(weights)} numbers for {count} loss_type names")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"loss_weights={list(weights)}: they must be finite and not negative")


def _check_values(options: DPOOptions) -> None:
    for name, low in (("beta", "above"), ("discopop_tau", "above"), ("cpo_alpha", "from"),
                      ("desirable_weight", "from"), ("undesirable_weight", "from")):  # fmt: skip
        value = getattr(options, name)
        if not 0 <= value < math.inf or (low == "above" and value == 0):
            kind = "positive" if low == "above" else "at least 0"
            raise ValueError(f"{name}={value}: it must be {kind} and finite")
    for name in ("length_alpha", "f_alpha_divergence_coef", "simpo_gamma"):
        value = getattr(options, name)
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name}={value}: it must be finite")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={options.label_smoothing}: the share of flipped preferences must be in [0, 0.5)"
        )
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        raise ValueError(f"ld_alpha={options.ld_alpha}: the weight of the longer response's tail must be in [0, 1]")
    if options.f_divergence_type not in F_DIVERGENCES:
        raise ValueError(
            f"f_divergence_type={options.f_divergence_type!r} is unknown: accepted are "
            f"{', '.join(map(repr, F_DIVERGENCES))}"
        )
    coef = options.f_alpha_divergence_coef
    if coef != DPOOptions._field_defaults["f_alpha_divergence_coef"] and options.f_divergence_type != (
        "alpha_divergence"
    ):
        raise ValueError(
            f"f_alpha_divergence_coef={coef} goes with f_divergence_type='alpha_divergence', given "
            f"{options.f_divergence_type!r}"
        )


def _check_lengths(options: DPOOptions, variants: Sequence[DPOLoss]) -> None:
    reason = f"length_alpha={options.length_alpha}" if options.length_alpha else None
    for name, variant in zip(options.loss_types, variants, strict=True):
        if variant.needs_lengths:
            reason = f"loss_type={name!r}"
    if reason is not None:
        raise ValueError(f"{reason} needs chosen_lengths and rejected_lengths (P,), the numbers of completion tokens")

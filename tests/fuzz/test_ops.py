"""Every public operation with each of its tensors spoilt in turn: the right result, or a ValueError that says why.

Nothing else may come of it: no other exception, no read past the end, no death of the interpreter. The meta device
stands for any device that is not that of the other tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastalign as fa
from fastalign import losses, ops
from fastalign.types import LossOutput

torch.set_num_threads(1)
S, T, H, V = 4, 5, 8, 11


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def head(packed: bool = False, rows: bool = True) -> dict[str, Any]:
    targets = (torch.arange(S * T) % V).view(S, T)
    hidden = randn(S, T, H)
    given = {"hidden": hidden, "weight": randn(V, H), "targets": targets, "bias": randn(V)}
    if rows:
        given["rows"] = torch.arange(S * T)
    if packed:
        cu = torch.arange(S + 1, dtype=torch.int32) * T
        given |= {"hidden": hidden.flatten(0, 1), "targets": targets.flatten(), "cu_seqlens": cu}
    return given


def tokens(*names: str) -> dict[str, Tensor]:
    return {name: -randn(S, T, seed=i).abs() for i, name in enumerate(names)}


def each(*names: str) -> dict[str, Tensor]:
    return {name: -randn(S, seed=i).abs() for i, name in enumerate(names)}


MASK = torch.arange(T) < torch.tensor([5, 3, 1, 4])[:, None]
PAIRS = each("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
LENGTHS = {"chosen_lengths": torch.tensor([3, 1, 4, 1]), "rejected_lengths": torch.tensor([5, 9, 2, 6])}
LABELS = torch.tensor([True, False, True, True])
LISTS = {"ranks": torch.tensor([1, 2, 1, 2]), "cu_lists": torch.tensor([0, 2, 4])}
CU = torch.tensor([0, 3, 3, 12])
ONE_SUM = {"kl": torch.tensor(0.2)}


def by_group(scored: Any, cu: Tensor, extra: Tensor) -> Tensor:
    return -ops.sequence_logps(scored.logps, cu_seqlens=cu) * extra


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear_logps": (fa.linear_logps, head() | {"entropy": True, "top1": True}),
    "linear_cross_entropy": (fa.linear_cross_entropy, head()),
    "linear_loss": (
        lambda **given: fa.linear_loss(by_group, inputs={"extra": given.pop("extra")}, **given),
        head() | each("extra"),
    ),
    "linear_dpo_loss": (fa.linear_dpo_loss, head() | each("ref_logps")),
    "linear_dpo_loss, packed": (fa.linear_dpo_loss, head(packed=True) | each("ref_logps")),
    "linear_dpo_loss, no rows": (fa.linear_dpo_loss, head(rows=False) | each("ref_logps")),
    "linear_kto_loss": (fa.linear_kto_loss, head() | each("ref_logps") | {"labels": LABELS} | ONE_SUM),
    "linear_pro_loss": (fa.linear_pro_loss, head() | each("ref_logps", "rewards") | LISTS),
    "linear_ppo_loss": (
        fa.linear_ppo_loss, head() | tokens("old_logps", "advantages", "ref_logps", "sampler_logps") | {"kl_coef": 0.1},
    ),
    "linear_ppo_loss, gspo": (
        fa.linear_ppo_loss, head() | tokens("old_logps", "advantages") | {"loss_type": "gspo"},
    ),
    "sequence_logps": (ops.sequence_logps, tokens("per_token_logps") | {"mask": MASK}),
    "sequence_logps, packed": (
        ops.sequence_logps, {"per_token_logps": randn(12), "mask": torch.ones(12).bool(), "cu_seqlens": CU},
    ),
    "gae": (ops.gae, tokens("rewards", "values") | {"mask": MASK}),
    "discounted_returns": (ops.discounted_returns, tokens("rewards") | {"mask": MASK}),
    "whiten": (ops.whiten, tokens("values") | {"mask": MASK}),
    "group_advantages": (ops.group_advantages, each("rewards") | {"groups": torch.tensor([0, 1, 1, 0])}),
    "dpo_loss": (losses.dpo_loss, PAIRS | LENGTHS),
    "kto_loss": (losses.kto_loss, each("logps", "ref_logps") | {"labels": LABELS} | ONE_SUM),
    "kto_kl": (losses.kto_kl, each("kl_logps", "ref_kl_logps")),
    "ppo_loss": (
        losses.ppo_loss,
        tokens("logps", "old_logps", "advantages", "ref_logps", "entropy", "sampler_logps")
        | {"mask": MASK, "kl_coef": 0.1, "entropy_coef": 0.1},
    ),
    "ppo_penalty_loss": (
        losses.ppo_penalty_loss, tokens("logps", "old_logps", "advantages") | {"mask": MASK, "penalty_coef": 0.1},
    ),
    "value_loss": (
        losses.value_loss, tokens("values", "returns", "old_values") | {"mask": MASK, "epsilon_value": 0.2},
    ),
    "pro_loss": (losses.pro_loss, each("scores", "rewards") | LISTS | {"lengths": LENGTHS["chosen_lengths"]}),
    "infonce_loss": (losses.infonce_loss, each("scores") | LISTS),
    "ranking_loss": (losses.ranking_loss, each("rewards") | LISTS),
    "bradley_terry_loss": (losses.bradley_terry_loss, each("chosen_rewards", "rejected_rewards", "margin")),
    "label_loss": (losses.label_loss, each("rewards", "labels")),
    "sampler_weights": (
        losses.sampler_weights,
        tokens("old_logps", "sampler_logps") | {"mask": MASK, "sampler_correction": "sequence_mask"},
    ),
    "sampler_weights, packed": (
        losses.sampler_weights,
        {"old_logps": randn(12), "sampler_logps": randn(12, seed=1), "mask": torch.ones(12).bool(), "cu_seqlens": CU}
        | {"sampler_correction": "sequence_truncate"},
    ),
    "token_rewards": (
        losses.token_rewards, each("scores") | tokens("logps", "ref_logps") | {"mask": MASK, "kl_coef": 0.1},
    ),
    "shape_scores": (
        losses.shape_scores, each("scores") | {"finished": LABELS, "missing_eos_penalty": 1.0, "clip": 2.0},
    ),
    "kl_estimate": (losses.kl_estimate, tokens("logps", "ref_logps")),
}  # fmt: skip
WHOLE = ("cu_seqlens", "cu_lists", "groups", "rows", "targets")  # numbers that say where something lies


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, in memory between others that are poison."""
    poison = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor.new_ones(()).expand_as(tensor)
    return torch.stack([tensor, poison], dim=-1)[..., 0]


def every_third(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) % 3 == 0


SAME = {
    "strided": strided,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else strided(t),
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}  # fmt: skip
SPOILT = {
    "elsewhere": lambda t: t.to("meta"),
    "shorter": lambda t: t[:-1] if t.dim() else t,
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t,
    "empty": lambda t: t[:0] if t.dim() else t,
    "deeper": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "one number": lambda t: t.new_ones(()),
    "with gradient": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "nan": lambda t: torch.where(every_third(t), torch.nan, t),
    "infinite": lambda t: torch.where(every_third(t), torch.inf, t),
    "zeros": torch.zeros_like,
} | {
    str(dtype).removeprefix("torch."): (lambda t, dtype=dtype: t.to(dtype))
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
} | {"complex64": lambda t: t.to(torch.complex64)}  # fmt: skip
ELSEWHERE = (-1, -(2**63), 99, 2**31, 2**40, 2**62, 2**63 - 1)


def misplaced(tensor: Tensor, value: int, at: int) -> Tensor:
    """Whole numbers, one of which points somewhere else."""
    spoilt = tensor.to(torch.int64).contiguous()
    if spoilt.numel():
        spoilt.view(-1)[at % spoilt.numel()] = value
    return spoilt


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, LossOutput):
        return [found.loss]
    return [t for part in found for t in tensors(part)] if isinstance(found, tuple) else []


def called(name: str, given: dict[str, Any]) -> list[Tensor]:
    function, _ = CALLS[name]
    return [t.clone() for t in tensors(function(**given))]


def names_of(given: dict[str, Any]) -> list[str]:
    return [key for key, value in given.items() if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_each_tensor_in_turn(refusal, name):
    given = CALLS[name][1]
    right = called(name, dict(given))
    for key in names_of(given):
        for how, spoil in SAME.items():
            found = called(name, given | {key: spoil(given[key].clone())})
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5, msg=lambda m, k=key, h=how: f"{k}, {h}: {m}")
        for how, spoil in SPOILT.items():
            spoilt = spoil(given[key].clone())
            found.clear()
            try:
                error = refusal(lambda to, given: to.extend(called(name, given)), found, given | {key: spoilt})
            except Exception as unexpected:
                raise AssertionError(f"{key}, {how}") from unexpected
            if how == "elsewhere":
                assert error is not None, f"{key} on another device was taken"
            if how == "nan" and key in ("hidden", "weight", "bias"):
                assert not found[0].isfinite().any(), f"nan in {key} makes a finite number"
            assert error is None or 0 < len(str(error)) < 1000


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, (_, given) in CALLS.items() for key in given if key in WHOLE]
)
def test_numbers_that_point_elsewhere(name, key):
    """A boundary, a group, a row or a target that there is not: never an address, and named."""
    given = CALLS[name][1]
    for value in ELSEWHERE:
        for at in (0, 1, -1):
            with pytest.raises(ValueError, match=r"[a-z]"):
                called(name, given | {key: misplaced(given[key].clone(), value, at)})


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_several_at_once(fuzz, name):
    given = CALLS[name][1]
    keys = names_of(given)
    ways = SAME | SPOILT

    def check(chosen: list[tuple[str, str]], places: list[tuple[str, int, int]]) -> None:
        spoilt = copy.copy(given)
        for key, how in chosen:
            spoilt[key] = ways[how](spoilt[key])
        for key, value, at in places:
            if not spoilt[key].is_meta:
                spoilt[key] = misplaced(spoilt[key].real, value, at)
        called(name, spoilt)

    change = st.tuples(st.sampled_from(keys), st.sampled_from(sorted(ways)))
    whole = [key for key in keys if key in WHOLE]
    places = st.just([])
    if whole:
        place = st.tuples(st.sampled_from(whole), st.sampled_from(ELSEWHERE), st.integers(0, 99))
        places = st.lists(place, max_size=1)
    fuzz(check, st.lists(change, min_size=1, max_size=3), places)

"""The fused listwise losses equal their unfused definitions, padded and packed, whatever the workspace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalign.linear.listwise import linear_pro_loss
from fastalign.losses import LISTWISE_LOSSES, infonce_loss, pro_loss
from fastalign.ops import linear_logps, linear_logps_reference, sequence_logps

SIZES = [2, 4, 1, 3]
LOSSES = {"pro": pro_loss, "infonce": infonce_loss}


def build(T=9, H=16, V=120, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    S = sum(SIZES)
    hidden = torch.randn(S, T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[torch.rand(S, T, generator=g) < 0.4] = -100
    targets[:, 0] = 1  # no empty response
    ranks = torch.tensor([2, 1, 3, 1, 1, 2, 1, 2, 1, 3])
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "bias": bias, "ranks": ranks,
        "cu_lists": torch.tensor([0, 2, 6, 7, 10], dtype=torch.int32),
        "rewards": -ranks + 0.3 * torch.rand(S, generator=g, dtype=torch.float64),
        "ref_logps": -3 * torch.rand(S, generator=g, dtype=torch.float64),
    }  # fmt: skip


def unfused(arguments, *, loss_type, beta, normalize, sft_coef, relative, tempered, **options):
    """(loss, metrics) by the definition; sft_coef: a number, or one per list."""
    logps = linear_logps(arguments["hidden"], arguments["weight"], arguments["targets"], bias=arguments["bias"])
    sums = sequence_logps(logps.logps)
    lengths = (arguments["targets"] != -100).sum(1)
    scores = sums - arguments["ref_logps"] if relative else sums
    scores = beta * (scores / lengths if normalize else scores)
    ranks, cu = arguments["ranks"], arguments["cu_lists"]
    rewards = arguments["rewards"] if tempered else None
    out = LOSSES[loss_type](scores, ranks, cu_lists=cu, rewards=rewards, lengths=lengths, reduction="none", **options)
    nll = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        best = [i for i in range(a, b) if ranks[i] == ranks[a:b].min()]
        nll.append(sum(-sums[i] / lengths[i] for i in best) / len(best))
    nll = torch.stack(nll)
    return out.loss + sft_coef * nll, out.metrics, nll


def packed(arguments):
    targets = arguments["targets"]
    cu = torch.arange(0, targets.numel() + 1, targets.shape[1], dtype=torch.int32)
    flat = {"hidden": arguments["hidden"].flatten(0, 1), "targets": targets.flatten(), "cu_seqlens": cu}
    return arguments | flat


VARIANTS = {
    "paper": ({}, {"beta": 1.0, "normalize": True, "relative": False, "tempered": False, "sft_coef": 0.0}),
    "tempered": (
        {"rewards": True, "beta": 0.7, "sft_coef": "auto"},
        {
            "beta": 0.7, "normalize": True, "relative": False, "tempered": True,
            "sft_coef": torch.tensor([0.05 * (k - 1) ** 2 for k in SIZES], dtype=torch.float64),
        },
    ),
    "relative": (
        {"ref_logps": True, "sft_coef": 0.3},
        {"beta": 0.1, "normalize": False, "relative": True, "tempered": False, "sft_coef": 0.3},
    ),
    "all": (
        {"ref_logps": True, "rewards": True, "beta": 2.0, "length_normalize": True, "sft_coef": 1.0},
        {"beta": 2.0, "normalize": True, "relative": True, "tempered": True, "sft_coef": 1.0},
    ),
    "sums": (
        {"length_normalize": False, "beta": 0.2},
        {"beta": 0.2, "normalize": False, "relative": False, "tempered": False, "sft_coef": 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("workspace_mb", [0.01, 0.05, None], ids=["tiny", "small", "default"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss_type", LISTWISE_LOSSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_is_unfused(variant, loss_type, layout, workspace_mb):
    options, definition = VARIANTS[variant]
    arguments = build()
    expected, metrics, nll = unfused(arguments, loss_type=loss_type, **definition)
    given = {name: value for name, value in options.items() if name not in ("rewards", "ref_logps")}
    kept = {name: v for name, v in arguments.items() if name not in ("rewards", "ref_logps") or name in options}
    call = (packed(kept) if layout == "packed" else kept) | given
    out = linear_pro_loss(**call, loss_type=loss_type, workspace_mb=workspace_mb)
    torch.testing.assert_close(out.loss, expected.mean())
    for name, metric in metrics.items():
        torch.testing.assert_close(out.metrics[name].value, metric.value, msg=name, equal_nan=True)
    torch.testing.assert_close(out.metrics["nll_loss"].value, nll.mean().detach())
    leaves = [arguments[name] for name in ("hidden", "weight", "bias")]
    mine, true = (torch.autograd.grad(loss, leaves) for loss in (out.loss, expected.mean()))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "cached"])
def test_schedules_agree(schedule):
    arguments = build(dtype=torch.float32)
    leaves = [arguments[name] for name in ("hidden", "weight", "bias")]
    options = {"sft_coef": "auto", "token_metrics": True}
    plain = linear_pro_loss(**arguments, **options)
    forced = linear_pro_loss(**arguments, **options, schedule=schedule)
    torch.testing.assert_close(forced.loss, plain.loss)
    for name, metric in plain.metrics.items():
        torch.testing.assert_close(forced.metrics[name], metric, equal_nan=True)
    for a, b in zip(torch.autograd.grad(forced.loss, leaves), torch.autograd.grad(plain.loss, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_pairs_are_dpo():
    """K = 2 measured from a reference is DPO on the pair."""
    from fastalign.losses import dpo_loss

    arguments = build()
    targets, hidden = arguments["targets"], arguments["hidden"]
    logps = sequence_logps(linear_logps(hidden, arguments["weight"], targets, bias=arguments["bias"]).logps)
    ref = arguments["ref_logps"]
    out = linear_pro_loss(
        hidden, arguments["weight"], targets, bias=arguments["bias"], ranks=torch.tensor([1, 2] * 5),
        cu_lists=torch.arange(0, 11, 2), ref_logps=ref, beta=0.4,
    )  # fmt: skip
    expected = dpo_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2], beta=0.4)
    torch.testing.assert_close(out.loss, expected.loss)
    for mine, theirs in (("accuracy", "accuracies"), ("margin", "margins"), ("scores/best", "chosen")):
        torch.testing.assert_close(out.metrics[mine].value, expected.metrics[f"rewards/{theirs}"].value)
    torch.testing.assert_close(out.metrics["logps/worst"].value, expected.metrics["logps/rejected"].value)


def test_head_options_reach_the_head():
    arguments = build()
    arguments.pop("rewards"), arguments.pop("ref_logps")
    options = {"temperature": 0.8, "logit_scale": 0.5, "softcap": 4.0}
    u = (arguments["hidden"] @ arguments["weight"].T + arguments["bias"]) * 0.5
    z = 4.0 * torch.tanh(u / 4.0) / 0.8
    targets = arguments["targets"]
    nll = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    lengths = (targets != -100).sum(1)
    expected = pro_loss(-nll.sum(1) / lengths, arguments["ranks"], cu_lists=arguments["cu_lists"])
    torch.testing.assert_close(linear_pro_loss(**arguments, **options).loss, expected.loss)


def test_reductions_and_the_global_denominator():
    arguments = build()
    mean = linear_pro_loss(**arguments).loss
    each = linear_pro_loss(**arguments, reduction="none").loss
    total = linear_pro_loss(**arguments, reduction="sum").loss
    shared = linear_pro_loss(**arguments, num_items=torch.tensor(20)).loss
    assert each.shape == (4,)
    for value, expected in ((mean, each.mean()), (total, each.sum()), (shared, each.sum() / 20)):
        torch.testing.assert_close(value, expected)


def test_token_metrics():
    arguments = build()
    metrics = linear_pro_loss(**arguments, token_metrics=True).metrics
    exact = linear_logps_reference(
        arguments["hidden"], arguments["weight"], arguments["targets"], bias=arguments["bias"]
    )
    mask, best = arguments["targets"] != -100, [1, 3, 4, 6, 8]
    torch.testing.assert_close(metrics["entropy"].value, exact.entropy[mask].mean().detach())
    right = exact.is_top1[best][mask[best]].double().mean()
    torch.testing.assert_close(metrics["mean_token_accuracy"].value, right)


def test_lists_that_are_done_in_pieces_add_up():
    arguments = build()
    whole = linear_pro_loss(**arguments, sft_coef="auto")
    per_sequence = ("hidden", "targets", "ranks", "rewards", "ref_logps")
    total = 0.0
    for start, stop, cu in ((0, 6, [0, 2, 6]), (6, 10, [0, 1, 4])):
        part = {name: v[start:stop] if name in per_sequence else v for name, v in arguments.items()}
        part["cu_lists"] = torch.tensor(cu)
        total = total + linear_pro_loss(**part, sft_coef="auto", num_items=4).loss
    torch.testing.assert_close(total, whole.loss)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("packed hidden", {"hidden": torch.randn(4, 4), "targets": torch.zeros(4, dtype=torch.int64)}),
        (r"ranks must be \(4,\)", {"ranks": torch.zeros(3)}),
        (r"rewards must be \(4,\)", {"rewards": torch.zeros(4, 2)}),
        ("ref_logps requires grad", {"ref_logps": torch.zeros(4, requires_grad=True)}),
        ("cu_lists must rise from 0 to 4", {"cu_lists": torch.tensor([0, 2])}),
        ("list 1 of cu_lists is empty", {"cu_lists": torch.tensor([0, 2, 2, 4])}),
        ("accepted are 'pro', 'infonce'", {"loss_type": "listnet"}),
        ("beta=0", {"beta": 0}),
        ("sft_coef=-1", {"sft_coef": -1}),
        ("sft_coef='paper': accepted are 'auto' and numbers", {"sft_coef": "paper"}),
        ("reduction", {"reduction": "median"}),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = {
        "hidden": torch.randn(4, 2, 4), "weight": torch.randn(9, 4), "targets": torch.zeros(4, 2, dtype=torch.int64),
        "ranks": torch.tensor([1, 2, 1, 2]), "cu_lists": torch.tensor([0, 2, 4]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_pro_loss(**(arguments | change))

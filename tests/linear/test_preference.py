"""The fused preference losses equal their unfused definitions, padded and packed."""

from __future__ import annotations

import json

import pytest
import torch

from fastalign.linear import linear_dpo_loss
from fastalign.losses import DPO_LOSSES, dpo_loss
from fastalign.ops import linear_logps, linear_logps_reference, sequence_logps


def build(P=5, T=9, H=16, V=120, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * P, T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (2 * P, T), generator=g)
    targets[torch.rand(2 * P, T, generator=g) < 0.4] = -100
    targets[:, 0] = 1  # no empty response
    return hidden, weight, bias, targets, torch.randn(2 * P, generator=g, dtype=torch.float64)


def unfused(hidden, weight, bias, targets, ref, **options):
    logps = sequence_logps(linear_logps(hidden, weight, targets, bias=bias).logps)
    lengths = (targets != -100).sum(1)
    chosen, rejected = lengths.chunk(2)
    return dpo_loss(*logps.chunk(2), *ref.chunk(2), chosen_lengths=chosen, rejected_lengths=rejected, **options)


@pytest.mark.parametrize("workspace_mb", [0.01, 0.1, None], ids=["tiny", "small", "default"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_linear_dpo_loss_is_dpo_loss_of_sequence_logps(loss_type, packed, workspace_mb):
    hidden, weight, bias, targets, ref = build()
    options = {"loss_type": loss_type, "beta": 0.3}
    if DPO_LOSSES[loss_type].accepts_label_smoothing:
        options["label_smoothing"] = 0.1
    if DPO_LOSSES[loss_type].accepts_length_alpha:
        options["length_alpha"] = 0.05
    h, t, cu = hidden, targets, None
    if packed:
        N = targets.numel()
        h, t, cu = (
            hidden.reshape(N, -1),
            targets.reshape(N),
            torch.arange(0, N + 1, targets.shape[1], dtype=torch.int32),
        )
    fused = linear_dpo_loss(h, weight, t, bias=bias, ref_logps=ref, cu_seqlens=cu, workspace_mb=workspace_mb, **options)
    plain = unfused(hidden, weight, bias, targets, ref, **options)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert fused.metrics.keys() == plain.metrics.keys()
    for name in plain.metrics:
        torch.testing.assert_close(fused.metrics[name].value, plain.metrics[name].value, msg=name)
    leaves = [hidden, weight, bias]
    for mine, true in zip(
        torch.autograd.grad(fused.loss, leaves), torch.autograd.grad(plain.loss, leaves), strict=True
    ):
        torch.testing.assert_close(mine, true)


def test_reductions_and_the_global_denominator():
    hidden, weight, bias, targets, ref = build()
    arguments = {"bias": bias, "ref_logps": ref}
    mean = linear_dpo_loss(hidden, weight, targets, **arguments).loss
    each = linear_dpo_loss(hidden, weight, targets, reduction="none", **arguments).loss
    total = linear_dpo_loss(hidden, weight, targets, reduction="sum", **arguments).loss
    shared = linear_dpo_loss(hidden, weight, targets, num_items=torch.tensor(20), **arguments).loss
    assert each.shape == (5,)
    for value, expected in ((mean, each.mean()), (total, each.sum()), (shared, each.sum() / 20)):
        torch.testing.assert_close(value, expected)


def test_token_metrics():
    hidden, weight, bias, targets, ref = build()
    metrics = linear_dpo_loss(hidden, weight, targets, bias=bias, ref_logps=ref, token_metrics=True).metrics
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    mask = targets != -100
    torch.testing.assert_close(metrics["entropy"].value, exact.entropy[mask].mean().detach())
    torch.testing.assert_close(metrics["mean_token_accuracy"].value, exact.is_top1[:5][mask[:5]].float().mean())
    torch.testing.assert_close(metrics["logits/rejected"].value, exact.mean_logits[5:][mask[5:]].mean().detach())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("equal halves", {"hidden": torch.randn(3, 2, 4), "targets": torch.zeros(3, 2, dtype=torch.int64)}),
        ("ref_logps must be", {"ref_logps": torch.zeros(3)}),
        ("ref_logps requires grad", {"ref_logps": torch.zeros(4, requires_grad=True)}),
        ("loss_type", {"loss_type": "simoid"}),
        ("reduction", {"reduction": "median"}),
        ("packed hidden", {"hidden": torch.randn(4, 4), "targets": torch.zeros(4, dtype=torch.int64)}),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = {
        "hidden": torch.randn(4, 2, 4), "weight": torch.randn(9, 4), "targets": torch.zeros(4, 2, dtype=torch.int64),
        "ref_logps": torch.zeros(4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**(arguments | change))


def test_trl_figures(shared_dir):
    """Per-token log-probs, losses and metrics of real pairs under a real model, as TRL computed them."""
    transformers = pytest.importorskip("transformers")
    golden = json.loads((shared_dir / "golden/trl_dpo.json").read_text())
    batch = golden["batch"]
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_dir / "models/hh-tiny-dpo", dtype=torch.float32)
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["completion_mask"])
    with torch.no_grad():
        attention = torch.tensor(batch["attention_mask"])
        hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]
    targets = torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)
    expected = torch.tensor(golden["policy_per_token_logps"], dtype=torch.float64)
    ours = linear_logps(hidden, model.lm_head.weight.detach(), targets).logps.double()
    assert ((ours - expected).abs() <= 3e-5 + 1e-5 * expected.abs()).all()
    ref = torch.tensor(golden["reference_logps"])
    for name, case in golden["cases"].items():
        options = dict(case["args"])
        if str(options.pop("loss_type")) not in DPO_LOSSES or options.keys() - {"beta", "label_smoothing"}:
            continue
        weight = model.lm_head.weight
        out = linear_dpo_loss(
            hidden, weight, targets, ref_logps=ref, loss_type=case["args"]["loss_type"], token_metrics=True, **options
        )
        assert abs(out.loss.item() - case["loss"]) <= 1e-5 * abs(case["loss"]) + 1e-7, name
        (grad,) = torch.autograd.grad(out.loss, weight)
        assert abs(grad.double().norm().item() - case["lm_head_grad_norm"]) <= 1e-4 * case["lm_head_grad_norm"], name
        for metric, value in case["metrics"].items():
            if metric in out.metrics:
                assert abs(out.metrics[metric].value.item() - value) <= 1e-5 * max(1, abs(value)), (name, metric)

"""The fused losses on single responses equal their unfused definitions, padded and packed."""

from __future__ import annotations

import re

import pytest
import torch

from fastalign.linear import linear_kto_loss, unpaired
from fastalign.losses import DPO_LOSSES, kto_loss
from fastalign.ops import linear_logps, linear_logps_reference, sequence_logps
from fastalign.types import LinearLogps, LossOutput

torch.set_num_threads(1)
LABELS = torch.tensor([True, False, True, False, False, True, True])


def cases():
    for name, variant in DPO_LOSSES.items():
        if variant.rows == "responses":
            plain = {"loss_type": name} | ({"kl": torch.tensor(0.4)} if variant.needs_kl else {})
            yield pytest.param(plain, id=name)
            weighted = plain | {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.3}
            yield pytest.param(weighted | ({"shift": 0.2} if variant.accepts_shift else {}), id=f"{name}-everything")


def build(S=7, T=9, H=16, V=120, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[torch.rand(S, T, generator=g) < 0.4] = -100
    targets[:, 0] = 1  # no empty response
    ref = -20 + 5 * torch.randn(S, generator=g, dtype=torch.float64)
    return hidden, weight, bias, targets, ref.to(dtype)


def same_gradients(mine, true, leaves):
    for one, other in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(true, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("workspace_mb", [0.03, None], ids=["small", "default"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [*cases()])
def test_linear_kto_loss_is_kto_loss_of_sequence_logps(options, packed, workspace_mb):
    hidden, weight, bias, targets, ref = build()
    h, t, cu = hidden, targets, None
    if packed:
        N = targets.numel()
        h, t = hidden.reshape(N, -1), targets.reshape(N)
        cu = torch.arange(0, N + 1, targets.shape[1], dtype=torch.int32)
    fused = linear_kto_loss(
        h, weight, t, bias=bias, ref_logps=ref, labels=LABELS, cu_seqlens=cu, workspace_mb=workspace_mb, **options
    )
    plain = kto_loss(sequence_logps(linear_logps(hidden, weight, targets, bias=bias).logps), ref, LABELS, **options)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert fused.metrics.keys() - plain.metrics.keys() == {"length/chosen", "length/rejected"}
    for name in plain.metrics:
        torch.testing.assert_close(fused.metrics[name].value, plain.metrics[name].value, msg=name)
    same_gradients(fused.loss, plain.loss, [hidden, weight, bias])


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "overlaid", "cached"])
@pytest.mark.parametrize("options", [*cases()])
def test_schedules_reductions_and_denominators(options, schedule):
    hidden, weight, bias, targets, ref = build(T=30, H=40)
    given = {"bias": bias, "ref_logps": ref, "labels": LABELS, **options}
    each = linear_kto_loss(hidden, weight, targets, **given, reduction="none").loss
    assert each.shape == (7,)
    mean, total, shared = (
        linear_kto_loss(hidden, weight, targets, **given, **more, schedule=schedule, workspace_mb=0.3).loss
        for more in ({}, {"reduction": "sum"}, {"num_items": torch.tensor(20)})
    )
    for value, expected in ((mean, each.mean()), (total, each.sum()), (shared, each.sum() / 20)):
        torch.testing.assert_close(value, expected)
    same_gradients(shared, each.sum() / 20, [hidden, weight, bias])


def test_micro_batches_add_up():
    hidden, weight, bias, targets, ref = build()
    given = {"bias": bias, "kl": torch.tensor(0.4)}
    whole = linear_kto_loss(hidden, weight, targets, ref_logps=ref, labels=LABELS, **given).loss
    parts = [
        linear_kto_loss(hidden[p], weight, targets[p], ref_logps=ref[p], labels=LABELS[p], num_items=7, **given).loss
        for p in (slice(0, 1), slice(1, 5), slice(5, 7))
    ]
    torch.testing.assert_close(sum(parts), whole)
    same_gradients(sum(parts), whole, [hidden, weight, bias])


def test_an_empty_batch_and_no_gradient():
    hidden, weight, bias, targets, ref = build()
    given = {"bias": bias, "loss_type": "bco"}
    nothing = linear_kto_loss(hidden[:0], weight, targets[:0], ref_logps=ref[:0], labels=LABELS[:0], **given).loss
    assert nothing.item() == 0
    trained = linear_kto_loss(hidden, weight, targets, ref_logps=ref, labels=LABELS, **given).loss
    with torch.no_grad():
        evaluated = linear_kto_loss(hidden, weight, targets, ref_logps=ref, labels=LABELS, **given).loss
    torch.testing.assert_close(trained.detach(), evaluated)


def test_token_metrics_and_lengths():
    hidden, weight, bias, targets, ref = build()
    output = linear_kto_loss(
        hidden, weight, targets, bias=bias, ref_logps=ref, labels=LABELS, loss_type="bco", token_metrics=True
    )
    exact, mask = linear_logps_reference(hidden, weight, targets, bias=bias), targets != -100
    values = {name: metric.value for name, metric in output.metrics.items()}
    torch.testing.assert_close(values["entropy"], exact.entropy[mask].mean().detach())
    torch.testing.assert_close(values["mean_token_accuracy"], exact.is_top1[mask].float().mean())
    for side, of_side in (("chosen", LABELS), ("rejected", ~LABELS)):
        picked = exact.mean_logits[of_side][mask[of_side]]
        torch.testing.assert_close(values[f"logits/{side}"], picked.mean().detach())
        torch.testing.assert_close(values[f"length/{side}"], mask[of_side].sum(1).double().mean())


@pytest.mark.parametrize("options", [*cases()])
def test_the_loss_of_a_chunk_never_reads_a_value_on_the_host(options, monkeypatch):
    """On the meta device a host sync is an error; boundaries are on the host, the reference point where it was made."""
    hidden, weight, _, targets, ref = build()
    taken = {}

    def catch(loss_fn, *args, metrics_fn, **kwargs):
        taken.update(loss_fn=loss_fn, metrics_fn=metrics_fn)
        return LossOutput(torch.zeros(()), {})

    monkeypatch.setattr(unpaired, "linear_loss", catch)
    options = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in options.items()}
    linear_kto_loss(hidden, weight, targets, ref_logps=ref, labels=LABELS, **options, token_metrics=True)
    lengths = (targets != -100).sum(1)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    values = torch.zeros(int(cu[-1]), device="meta")
    scored = LinearLogps(values, values, values, values.bool(), None, values)
    inputs = {"ref_logps": ref.to("meta", torch.float32), "labels": LABELS.to("meta")}
    assert taken["loss_fn"](scored, cu, **inputs).device.type == "meta"
    assert all(metric.total.device.type == "meta" for metric in taken["metrics_fn"](scored, cu, **inputs).values())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("ref_logps must be (4,), one per sequence, got (3,)", {"ref_logps": torch.zeros(3)}),
        ("ref_logps requires grad", {"ref_logps": torch.zeros(4, requires_grad=True)}),
        ("labels must be (4,), one per sequence", {"labels": torch.ones(2, dtype=torch.bool)}),
        ("labels: dtype torch.int64, accepted is bool", {"labels": torch.ones(4, dtype=torch.int64)}),
        ("needs kl, its reference point", {"kl": None}),
        ("kl would be ignored", {"loss_type": "apo_zero_unpaired"}),
        ("'sigmoid' is a loss on pairs: call dpo_loss", {"loss_type": "sigmoid"}),
        ("reduction", {"reduction": "median"}),
        ("packed hidden", {"hidden": torch.randn(4, 4), "targets": torch.zeros(4, dtype=torch.int64)}),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(message, change, monkeypatch):
    monkeypatch.setattr(unpaired, "linear_loss", None)
    given = {
        "hidden": torch.randn(4, 2, 4), "weight": torch.randn(9, 4), "targets": torch.zeros(4, 2, dtype=torch.int64),
        "ref_logps": torch.zeros(4), "labels": torch.ones(4, dtype=torch.bool), "kl": torch.tensor(0.1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_kto_loss(**(given | change))

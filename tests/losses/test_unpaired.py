"""kto_loss and kto_kl: value and gradient against the formulas, the reference point, metrics, refusals."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import DPO_LOSSES, dpo_loss, kto_kl, kto_loss, merge_metrics, response_losses, summarize

torch.set_num_threads(1)
BETA = 0.3
LABELS = torch.tensor([True, False, False, True, True, False, True])


def make(seed=0, dtype=torch.float64, kl=None, **options):
    g = torch.Generator().manual_seed(seed)
    logps, ref = (-40 + 4 * torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    if DPO_LOSSES[options.get("loss_type", "kto")].needs_kl:
        options["kl"] = torch.tensor(0.8, dtype=torch.float64) if kl is None else kl
    return [logps.to(dtype).requires_grad_(), ref.to(dtype), LABELS], options


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def oracle(arguments, options):
    """One response at a time, in the words of the papers."""
    losses = []
    for logp, ref, label in zip(*arguments, strict=True):
        s, name = logp - ref, options["loss_type"]
        weight = options.get("desirable_weight" if label else "undesirable_weight", 1.0)
        if name == "kto":
            z0 = max(0.0, float(options["kl"]))
            loss = 1 - sigma(BETA * (s - z0)) if label else 1 - sigma(BETA * (z0 - s))
        elif name == "bco":
            centred = BETA * s - options.get("shift", 0.0)
            loss = -torch.log(sigma(centred)) if label else -torch.log(sigma(-centred))
        else:
            loss = 1 - sigma(BETA * s) if label else sigma(BETA * s)
        losses.append(weight * loss)
    return torch.stack(losses)


@pytest.mark.parametrize("kl", [0.8, -0.5])
def test_value_and_gradient_are_the_formulas(response_options, kl):
    arguments, options = make(kl=torch.tensor(kl, dtype=torch.float64), **response_options)
    mine, expected = kto_loss(*arguments, **options, beta=BETA, reduction="none").loss, oracle(arguments, options)
    assert mine.dtype == torch.float64
    assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    push = torch.linspace(0.5, 1.5, 7, dtype=torch.float64)
    grads = [torch.autograd.grad(losses @ push, arguments[0])[0] for losses in (mine, expected)]
    assert_close(*grads, rtol=1e-10, atol=1e-14)
    assert (grads[0] < 0).equal(LABELS)  # desirable responses are pushed up, the others down


def test_gradcheck(response_options):
    arguments, options = make(**response_options)
    assert torch.autograd.gradcheck(lambda logps: kto_loss(logps, *arguments[1:], **options).loss, arguments[0])


def test_each_option_does_something():
    for name, variant in DPO_LOSSES.items():
        if variant.rows == "responses":
            arguments, options = make(loss_type=name)
            plain = kto_loss(*arguments, **options).loss
            for option in variant.options:
                assert abs(kto_loss(*arguments, **options, **{option: 0.4}).loss - plain) > 1e-4, (name, option)


def test_policy_equal_to_reference(response_options):
    (logps, _, labels), options = make(kl=torch.zeros(()), **response_options)
    expected = {"kto": 0.5, "apo_zero_unpaired": 0.5, "bco": math.log(2)}[options["loss_type"]]
    plain = {key: value for key, value in options.items() if key in ("loss_type", "kl")}
    output = kto_loss(logps, logps.detach(), labels, **plain)
    assert output.loss.item() == pytest.approx(expected)
    assert summarize(output.metrics)["rewards/chosen"] == 0


@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_a_pair_is_a_desirable_and_an_undesirable_response(seed, shift):
    g = torch.Generator().manual_seed(seed)
    w, v, rw, rv = 4 * torch.randn(4, 5, generator=g, dtype=torch.float64)
    labels = torch.arange(10) < 5
    joined = torch.cat([w, v]), torch.cat([rw, rv]), labels
    for unpaired, paired in (("apo_zero_unpaired", "apo_zero"), ("bco", "bco_pair")):
        more = {"shift": shift} if paired == "bco_pair" else {}
        both = kto_loss(*joined, loss_type=unpaired, beta=BETA, reduction="none", **more).loss
        pairs = dpo_loss(w, v, rw, rv, loss_type=paired, beta=BETA, reduction="none", **more).loss
        assert_close(both[:5] + both[5:], pairs)
    assert_close(
        kto_loss(*joined, kl=torch.tensor(-3.0), beta=BETA).loss,
        kto_loss(*joined, loss_type="apo_zero_unpaired", beta=BETA).loss,
    )


# ---- the reference point


def test_kl_is_the_mean_log_ratio_of_mismatched_pairs_without_gradient():
    logps, ref = torch.tensor([-3.0, -5.0, -1.0], requires_grad=True), torch.tensor([-4.0, -5.5, -1.0])
    metric = kto_kl(logps, ref)
    assert metric.value.item() == pytest.approx(0.5)
    assert not metric.total.requires_grad
    assert kto_kl(logps.bfloat16(), ref).total.dtype == torch.float32
    with pytest.raises(ValueError, match=r"ref_logps: shape \(2,\)"):
        kto_kl(logps, ref[:2])


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), seed=st.integers(0, 100))
def test_micro_batches_add_up_to_the_batch(sizes, seed):
    """With the reference point of the whole: loss, gradient, metrics; a part may lack one kind, or everything."""
    g = torch.Generator().manual_seed(seed)
    logps, ref, kl_logps, ref_kl = torch.randn(4, sum(sizes), generator=g, dtype=torch.float64)
    labels = torch.rand(sum(sizes), generator=g) < 0.5
    logps.requires_grad_()
    point = merge_metrics(
        *({"kl": kto_kl(*part)} for part in zip(kl_logps.split(sizes), ref_kl.split(sizes), strict=True))
    )["kl"]
    assert_close(point.value, kto_kl(kl_logps, ref_kl).value)
    whole = kto_loss(logps, ref, labels, kl=point.value)
    split = zip(logps.split(sizes), ref.split(sizes), labels.split(sizes), strict=True)
    parts = [kto_loss(*part, kl=point.value, num_items=sum(sizes)) for part in split]
    loss = torch.stack([part.loss for part in parts]).sum()
    assert_close(loss, whole.loss)
    assert_close(torch.autograd.grad(loss, logps), torch.autograd.grad(whole.loss, logps))
    merged = summarize(merge_metrics(*(part.metrics for part in parts)))
    assert_close(merged, summarize(whole.metrics), equal_nan=True)


def test_no_gradient_flows_through_the_reference_point():
    arguments, _ = make()
    kl = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    loss = kto_loss(*arguments, kl=kl).loss
    assert torch.autograd.grad(loss, kl, allow_unused=True)[0] is None


# ---- metrics, dtypes, extremes


def test_metrics():
    logps, ref = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([-2.0, -2.0, -3.0])
    labels = torch.tensor([True, True, False])
    values = summarize(kto_loss(logps, ref, labels, kl=torch.tensor(-0.2), beta=0.5).metrics)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {"rewards/chosen": 0.25, "rewards/rejected": -1.5, "logps/chosen": -1.5, "logps/rejected": -6.0, "kl": 0.0}
    )
    alone = kto_loss(logps, ref, labels, loss_type="bco").metrics
    assert "kl" not in alone
    assert all(not metric.total.requires_grad for metric in alone.values())


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_log_ratios_stay_finite(response_options, size):
    logps = torch.tensor([-size, 0.0, -size, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -size, 0.0, -size])
    _, options = make(**response_options)
    loss = kto_loss(logps, ref, LABELS[:4], **options, reduction="none").loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad.isfinite().all()


def test_16_bit_inputs_are_computed_in_float32(response_options):
    arguments, options = make(dtype=torch.bfloat16, **response_options)
    loss = kto_loss(*arguments, **options).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kto_loss(arguments[0].float(), arguments[1].float(), LABELS, **options).loss)


def test_never_reads_a_value_on_the_host(response_options):
    arguments, options = make(**response_options)
    options = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in options.items()}
    output = kto_loss(*(tensor.to("meta") for tensor in arguments), **options)
    assert output.loss.device.type == "meta"


def test_reductions_and_an_empty_batch(response_options):
    arguments, options = make(**response_options)
    losses = response_losses(*arguments, **options)
    for reduction, expected in (("none", losses), ("sum", losses.sum()), ("mean", losses.mean())):
        assert_close(kto_loss(*arguments, **options, reduction=reduction).loss, expected)
    empty = kto_loss(*(tensor[:0] for tensor in arguments), **options)
    assert empty.loss.item() == 0
    empty.loss.backward()


# ---- refusals


@pytest.mark.parametrize(
    ("given_options", "match"),
    [
        ({}, "loss_type='kto' needs kl, its reference point"),
        ({"loss_type": "bco", "kl": torch.tensor(0.1)}, "'bco' has no reference point: kl would be ignored"),
        ({"kl": torch.ones(2)}, "kl: shape (2,), accepted is a 0-dim tensor"),
        ({"kl": torch.tensor(0.1), "shift": 0.1}, "'kto' does not take shift: 'bco_pair', 'bco' do"),
        ({"loss_type": "bco", "shift": torch.ones(7)}, "shift: shape (7,), accepted is a number"),
        ({"loss_type": "sigmoid"}, "'sigmoid' is a loss on pairs: call dpo_loss"),
        ({"loss_type": "kot"}, "'kot' is unknown"),
        ({"kl": torch.tensor(0.1), "desirable_weight": -1.0}, "desirable_weight=-1.0"),
        ({"kl": torch.tensor(0.1), "beta": 0.0}, "beta=0.0"),
        ({"kl": torch.tensor(0.1), "reduction": "median"}, "reduction='median'"),
    ],
)
def test_refuses_what_it_cannot_honour(given_options, match):
    arguments, _ = make()
    with pytest.raises(ValueError, match=re.escape(match)):
        kto_loss(*arguments, **given_options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(7, 1)}, r"logps: shape \(7, 1\), accepted is \(S,\)"),
        ({1: torch.zeros(6)}, r"ref_logps: shape \(6,\)"),
        ({1: torch.zeros(7, dtype=torch.int64)}, "ref_logps: dtype torch.int64"),
        ({2: torch.ones(7)}, "labels: dtype torch.float32, accepted is bool"),
        ({2: torch.ones(6, dtype=torch.bool)}, r"labels: shape \(6,\)"),
    ],
)
def test_refuses_tensors_that_do_not_fit(change, match):
    arguments, options = make()
    with pytest.raises(ValueError, match=match):
        kto_loss(*(change.get(i, tensor) for i, tensor in enumerate(arguments)), **options)

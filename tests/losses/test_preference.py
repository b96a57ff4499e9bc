"""dpo_loss as a whole: a peer's figures, metrics, the properties that every variant shares, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import DPO_LOSSES, dpo_loss, dpo_metrics, merge_metrics, pair_losses, summarize

BETA = 0.3


def test_gradcheck(make_batch, options):
    logps, lengths = make_batch()
    for values in logps:
        values.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: dpo_loss(*args, **lengths, beta=BETA, **options).loss, logps)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("sigmoid_norm", math.log(2))],
)
def test_policy_equal_to_reference(make_batch, loss_type, expected):
    logps, lengths = make_batch()
    output = dpo_loss(logps[0], logps[1], logps[0], logps[1], **lengths, beta=0.1, loss_type=loss_type)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    values = summarize(output.metrics)
    assert values["rewards/margins"] == 0
    assert values["rewards/accuracies"] == 0  # a tie is not a win
    assert values["length/margin_correlation"].isnan()


# --- a peer's figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sigmoid", "sigmoid_b05", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_trl(shared_dir, case):
    """TRL 1.16 on real pairs. Its "sigmoid" takes neither label smoothing nor a length term; the rest must agree."""
    golden = json.loads((shared_dir / "golden" / "trl_dpo.json").read_text())
    chosen, rejected = torch.tensor(golden["policy_logps"], dtype=torch.float64).chunk(2)
    ref_chosen, ref_rejected = torch.tensor(golden["reference_logps"], dtype=torch.float64).chunk(2)
    lengths = torch.tensor([sum(mask) for mask in golden["batch"]["completion_mask"]]).chunk(2)
    expected = golden["cases"][case]
    for dtype in (torch.float64, torch.float32):
        logps = [values.to(dtype) for values in (chosen, rejected, ref_chosen, ref_rejected)]
        output = dpo_loss(*logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **expected["args"])
        assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        values = {name: value.item() for name, value in summarize(output.metrics).items()}
        shared = {name: value for name, value in expected["metrics"].items() if name.startswith(("rewards/", "logps/"))}
        assert len(shared) == 6
        # rewards are β times differences of sums of some -200 nats, which float32 holds to 1e-5
        assert {name: values[name] for name in shared} == pytest.approx(shared, rel=1e-5, abs=1e-5)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics():
    logps = [torch.tensor(v, dtype=torch.float64) for v in ([-1, -2, -3], [-4, -2, -1], [-2, -2, -4], [-3, -2, -2])]
    lengths = {"chosen_lengths": torch.tensor([5, 3, 1]), "rejected_lengths": torch.tensor([2, 3, 6])}
    values = {name: value.item() for name, value in summarize(dpo_metrics(*logps, **lengths, beta=0.5)).items()}
    margins, difference = [1.0, 0.0, 0.0], [3, 0, -5]
    assert values == pytest.approx(
        {
            "rewards/chosen": (0.5 + 0 + 0.5) / 3,
            "rewards/rejected": (-0.5 + 0 + 0.5) / 3,
            "rewards/margins": 1 / 3,
            "rewards/accuracies": 1 / 3,
            "logps/chosen": -2.0,
            "logps/rejected": -7 / 3,
            "length/chosen": 3.0,
            "length/rejected": 11 / 3,
            "length/margin_correlation": np.corrcoef(margins, difference)[0, 1],
        }
    )


def test_metrics_without_lengths_and_without_gradient(make_batch):
    logps, _ = make_batch()
    logps[0].requires_grad_()
    output = dpo_loss(*logps)
    assert output.loss.requires_grad
    assert not any("length" in name for name in output.metrics)
    for metric in output.metrics.values():
        assert not metric.total.requires_grad
        assert metric.total.shape == metric.weight.shape == ()


# --- properties of all variants -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_on_both_references_changes_nothing(make_batch, options, seed, shift):
    logps, lengths = make_batch(seed=seed)
    if DPO_LOSSES[options["loss_type"]].needs_lengths:  # averaged scores: the constant is one per token
        shifts = tuple(shift / 10 * lengths[name].double() for name in ("chosen_lengths", "rejected_lengths"))
    else:
        shifts = (shift, shift)
    shifted = [*logps[:2], logps[2] + shifts[0], logps[3] + shifts[1]]
    losses = [pair_losses(*given, **lengths, beta=BETA, **options) for given in (logps, shifted)]
    assert_close(*losses, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
def test_micro_batches_add_up_to_the_batch(make_batch, options, seed, sizes):
    """Loss, gradients and metrics, with the whole batch's pairs as the denominator; a micro-batch may be empty."""
    logps, lengths = make_batch(pairs=sum(sizes), seed=seed)
    logps[0].requires_grad_()
    logps[1].requires_grad_()
    whole = dpo_loss(*logps, **lengths, **options)
    whole_grads = torch.autograd.grad(whole.loss, logps[:2])
    split = zip(*(values.split(sizes) for values in (*logps, *lengths.values())), strict=True)
    parts = [
        dpo_loss(*part[:4], chosen_lengths=part[4], rejected_lengths=part[5], num_items=sum(sizes), **options)
        for part in split
    ]
    loss = torch.stack([part.loss for part in parts]).sum()
    assert_close(loss, whole.loss)
    assert_close(torch.autograd.grad(loss, logps[:2]), whole_grads)
    merged = summarize(merge_metrics(*(part.metrics for part in parts)))
    assert_close(merged, summarize(whole.metrics), equal_nan=True)


def test_pairs_are_independent_and_reductions_agree(make_batch, options):
    logps, lengths = make_batch()
    losses = pair_losses(*logps, **lengths, **options)
    assert losses.shape == (6,)
    for i in range(6):
        alone = pair_losses(*(v[i : i + 1] for v in logps), **{k: v[i : i + 1] for k, v in lengths.items()}, **options)
        assert torch.equal(alone[0], losses[i])
    for reduction, expected in (("none", losses), ("sum", losses.sum()), ("mean", losses.mean())):
        assert_close(dpo_loss(*logps, **lengths, reduction=reduction, **options).loss, expected)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_margins_stay_finite(options, size):
    zeros = torch.zeros(4)
    logps = [torch.tensor([-size, 0.0, -size, 0.0]), torch.tensor([0.0, -size, -size, 0.0]), zeros, zeros.clone()]
    logps = [values.requires_grad_() for values in logps]
    lengths = {"chosen_lengths": torch.tensor([1, 10**6, 1, 1]), "rejected_lengths": torch.tensor([10**6, 1, 1, 1])}
    loss = dpo_loss(*logps, **lengths, reduction="none", **options).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(values.grad.isfinite().all() for values in logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(make_batch, options, dtype):
    logps, lengths = make_batch(dtype=torch.float32)
    logps = [values.to(dtype).requires_grad_() for values in logps]
    loss = dpo_loss(*logps, **lengths, **options).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dpo_loss(*(values.float() for values in logps), **lengths, **options).loss)
    loss.backward()
    assert logps[0].grad.dtype == dtype


def test_never_reads_a_value_on_the_host(make_batch, options):
    """On the meta device a host sync is an error."""
    logps, lengths = make_batch()
    output = dpo_loss(*(v.to("meta") for v in logps), **{k: v.to("meta") for k, v in lengths.items()}, **options)
    assert output.loss.device.type == "meta"
    assert summarize(output.metrics)["length/margin_correlation"].device.type == "meta"


def test_compiles_without_a_graph_break(make_batch, options):
    torch.compiler.reset()
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="eager")
    logps, lengths = make_batch()
    for factor in (1.0, 0.5):  # a number that changes becomes a symbol, and must still not break the graph
        changed = {k: v if isinstance(v, str) else v * factor for k, v in options.items()} | {"beta": BETA * factor}
        expected, output = dpo_loss(*logps, **lengths, **changed), compiled(*logps, **lengths, **changed)
        assert_close(output.loss, expected.loss)
        assert_close(summarize(output.metrics), summarize(expected.metrics))


def test_no_pairs_give_a_zero_in_the_graph():
    logps = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    output = dpo_loss(*logps)
    assert output.loss.item() == 0
    output.loss.backward()
    assert output.metrics["rewards/margins"].weight == 0


@pytest.mark.parametrize("loss_type", [name for name, variant in DPO_LOSSES.items() if variant.needs_lengths])
def test_an_empty_response_counts_as_zero(loss_type):
    """s = 0 over 0 tokens, as a response of any length that equals its reference."""
    logps = [torch.tensor([0.0]), torch.tensor([-3.0]), torch.tensor([0.0]), torch.tensor([-2.0])]
    losses = [
        pair_losses(*logps, chosen_lengths=torch.tensor([n]), rejected_lengths=torch.tensor([2]), loss_type=loss_type)
        for n in (0, 1, 7)
    ]
    assert losses[0].isfinite()
    assert losses[0] == losses[1] == losses[2]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.zeros(5)}, r"rejected_logps: shape \(5,\).*\(6,\)"),
        ({2: torch.zeros(6, 1)}, r"ref_chosen_logps: shape \(6, 1\)"),
        ({3: torch.zeros((), device="meta").expand(6)}, "ref_rejected_logps.*meta.*cpu"),
        ({2: torch.zeros(6, dtype=torch.int64)}, "ref_chosen_logps: dtype torch.int64"),
        ({0: torch.zeros(3, 2)}, r"chosen_logps: shape \(3, 2\), accepted is \(P,\)"),
    ],
)
def test_refuses_log_probs_that_do_not_fit(change, match):
    logps = [change.get(i, torch.zeros(6)) for i in range(4)]
    with pytest.raises(ValueError, match=match):
        dpo_loss(*logps)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        ({"chosen_lengths": torch.ones(6)}, "rejected_lengths is missing"),
        ({"rejected_lengths": torch.ones(6)}, "chosen_lengths is missing"),
        ({"chosen_lengths": torch.ones(6), "rejected_lengths": torch.ones(5)}, r"rejected_lengths: shape \(5,\)"),
    ],
)
def test_refuses_lengths_that_do_not_fit(lengths, match):
    with pytest.raises(ValueError, match=match):
        dpo_loss(*(torch.zeros(6) for _ in range(4)), **lengths)


def test_refuses_before_it_computes(make_batch):
    logps, _ = make_batch()
    with pytest.raises(ValueError, match="'hinge' does not take label_smoothing"):
        dpo_loss(*logps, loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="'ipo' needs chosen_lengths"):
        dpo_loss(*logps, loss_type="ipo")
    with pytest.raises(ValueError, match=r"length_alpha=0\.1 needs chosen_lengths"):
        dpo_loss(*logps, length_alpha=0.1)
    with pytest.raises(ValueError, match="reduction='batchmean'"):
        dpo_loss(*logps, reduction="batchmean")

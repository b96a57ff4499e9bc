"""dpo_loss as a whole: metrics, the properties that every variant shares, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import DPO_LOSSES, F_DIVERGENCES, dpo_loss, dpo_metrics, merge_metrics, pair_losses, summarize

torch.set_num_threads(1)
BETA = 0.3
LOG2 = math.log(2)
AT_THE_REFERENCE = {  # β = 0.1, ε = 0.01 in exo_pair
    "sigmoid": LOG2, "robust": LOG2, "hinge": 1.0, "ipo": 25.0, "sigmoid_norm": LOG2,
    "exo_pair": -LOG2 - math.log(0.99) / 2 - math.log(0.01) / 2, "nca_pair": 2 * LOG2, "bco_pair": 2 * LOG2,
    "sppo_hard": 50.0, "aot": LOG2, "aot_unpaired": LOG2, "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
}  # fmt: skip


# ---- at the reference


@pytest.mark.parametrize(
    "loss_type", [name for name, v in DPO_LOSSES.items() if v.rows == "pairs" and v.needs_reference]
)
def test_policy_equal_to_reference(make_call, loss_type):
    assert set(AT_THE_REFERENCE) == {n for n, v in DPO_LOSSES.items() if v.rows == "pairs" and v.needs_reference}
    options = {"loss_type": loss_type} | ({"label_smoothing": 0.01} if loss_type == "exo_pair" else {})
    call = make_call(options)
    same = [call.logps[0], call.logps[1]] * 2
    for name in F_DIVERGENCES if DPO_LOSSES[loss_type].accepts_f_divergence else ["reverse_kl"]:
        output = dpo_loss(*same, **call.given, **options, beta=0.1, f_divergence_type=name)
        assert output.loss.item() == pytest.approx(AT_THE_REFERENCE[loss_type], rel=1e-12)
        values = summarize(output.metrics)
        assert values["rewards/margins"] == 0
        assert values["rewards/accuracies"] == 0  # a tie is not a win
        assert values["length/margin_correlation"].isnan()


@pytest.mark.parametrize("name", [name for name in F_DIVERGENCES if name != "reverse_kl"])
@pytest.mark.parametrize("loss_type", [name for name, v in DPO_LOSSES.items() if v.accepts_length_alpha])
def test_all_divergences_pull_alike_at_the_reference(make_call, loss_type, name):
    call = make_call({"loss_type": loss_type} | ({"label_smoothing": 0.01} if loss_type == "exo_pair" else {}))
    grads = []
    for f in ("reverse_kl", name):
        logps = [values.clone().requires_grad_() for values in call.logps[:2]]
        loss = dpo_loss(*logps, *call.logps[:2], **call.given, **call.options, f_divergence_type=f).loss
        grads.append(torch.stack(torch.autograd.grad(loss, logps)))
    assert_close(grads[1], grads[0] * (0.5 if name == "js_divergence" else 1.0))
    assert grads[0].all()


# ---- metrics


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


@pytest.mark.parametrize(
    ("loss_type", "chosen", "more"),
    [
        ("cpo", -0.5 * (1 + 2 + 3) / 3, {"nll_loss": 6 / 9}),
        ("sft", -0.5 * (1 + 2 + 3) / 3, {"nll_loss": 6 / 9}),
        ("simpo", -0.5 * (1 / 5 + 2 / 3 + 3) / 3, {}),
        (["simpo", "sft"], -0.5 * (1 / 5 + 2 / 3 + 3) / 3, {"nll_loss": 6 / 9}),
    ],
)
def test_metrics_without_a_reference(loss_type, chosen, more):
    logps = [torch.tensor(v, dtype=torch.float64) for v in ([-1, -2, -3], [-4, -2, -1])]
    lengths = {"chosen_lengths": torch.tensor([5, 3, 1]), "rejected_lengths": torch.tensor([2, 3, 6])}
    values = summarize(dpo_loss(*logps, **lengths, beta=0.5, loss_type=loss_type).metrics)
    assert values["rewards/chosen"].item() == pytest.approx(chosen)
    assert values["logps/chosen"].item() == -2.0
    assert {name: values[name].item() for name in ("nll_loss",) if name in values} == pytest.approx(more)
    with pytest.raises(ValueError, match=r"needs chosen_lengths|per token"):
        dpo_loss(*logps, loss_type=loss_type)


def test_metrics_of_orpo():
    logps = [torch.tensor([-2.0, -6.0], dtype=torch.float64), torch.tensor([-8.0, -3.0], dtype=torch.float64)]
    lengths = {"chosen_lengths": torch.tensor([2, 2]), "rejected_lengths": torch.tensor([4, 3])}
    values = summarize(dpo_loss(*logps, **lengths, loss_type="orpo").metrics)

    def odds(m):
        return math.log(math.exp(m) / (1 - math.exp(m)))

    gaps = [odds(-1) - odds(-2), odds(-3) - odds(-1)]
    expected = {
        "log_odds_chosen": sum(gaps) / 2,
        "log_odds_ratio": -sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 2,
        "nll_loss": 2.0,
        "rewards/margins": 0.1 * -0.5,
        "rewards/accuracies": 0.5,
    }
    assert {name: values[name].item() for name in expected} == pytest.approx(expected)


def test_metrics_with_ld_alpha_weigh_the_tails(make_call):
    call = make_call({"loss_type": "sigmoid", "ld_alpha": 0.4})
    sums = [s - 0.6 * t for s, t in zip(call.logps, call.given["tail_logps"], strict=True)]
    lengths = {name: call.given[name] for name in ("chosen_lengths", "rejected_lengths")}
    assert_close(summarize(call().metrics), summarize(dpo_loss(*sums, **lengths).metrics))
    assert_close(call().loss, dpo_loss(*sums, **lengths).loss)


def test_metrics_without_lengths_and_without_gradient(make_batch):
    logps, _ = make_batch()
    logps[0].requires_grad_()
    output = dpo_loss(*logps)
    assert output.loss.requires_grad
    assert not any("length" in name for name in output.metrics)
    for metric in output.metrics.values():
        assert not metric.total.requires_grad
        assert metric.total.shape == metric.weight.shape == ()


# ---- properties of all variants


def depends_on_the_difference(call):
    """Whether a constant on both log-ratios (per token, where they are averaged) drops out."""
    f = call.options.get("f_divergence_type", "reverse_kl")
    linear = f == "reverse_kl" or call.options.get("f_alpha_divergence_coef") == 1.0
    return linear and all(
        v.needs_reference and (v.accepts_length_alpha or v.needs_lengths or v.couples_batch) for v in call.variants
    )


@settings(max_examples=3)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_on_both_references_changes_nothing(make_call, options, seed, shift):
    call = make_call(options, seed=seed)
    if not depends_on_the_difference(call):
        return
    shifts = (shift, shift)
    if call.variants[0].needs_lengths:
        shifts = tuple(shift / 10 * call.given[name].double() for name in ("chosen_lengths", "rejected_lengths"))
    shifted = [*call.logps[:2], call.logps[2] + shifts[0], call.logps[3] + shifts[1]]
    losses = [pair_losses(*logps, **call.given, **options, beta=BETA) for logps in (call.logps, shifted)]
    assert_close(*losses, rtol=1e-9, atol=1e-9)


def test_most_of_the_grid_is_invariant(make_call, plain_options):
    """Else the test before would be empty."""
    call = make_call(plain_options)
    if isinstance(plain_options["loss_type"], str) and call.variants[0].accepts_length_alpha:
        assert depends_on_the_difference(call)


@settings(max_examples=3)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
def test_micro_batches_add_up_to_the_batch(make_call, options, seed, sizes):
    """Loss, gradients and metrics, with the whole batch's pairs and tokens as denominators; a part may be empty."""
    call = make_call(options, pairs=sum(sizes), seed=seed).requires_grad()
    if any(variant.couples_batch for variant in call.variants):
        return
    whole = call()
    whole_grads = torch.autograd.grad(whole.loss, call.logps[:2], allow_unused=True, materialize_grads=True)
    more = {"num_items": sum(sizes)}
    if "sft" in options["loss_type"]:
        more["num_chosen_tokens"] = call.given["chosen_lengths"].sum()
    stops = np.cumsum(sizes).tolist()
    parts = [call.map(lambda v, a=stop - n, b=stop: v[a:b])(**more) for n, stop in zip(sizes, stops, strict=True)]
    loss = torch.stack([part.loss for part in parts]).sum()
    assert_close(loss, whole.loss)
    grads = torch.autograd.grad(loss, call.logps[:2], allow_unused=True, materialize_grads=True)
    assert_close(grads, whole_grads)
    merged = summarize(merge_metrics(*(part.metrics for part in parts)))
    assert_close(merged, summarize(whole.metrics), equal_nan=True)


def test_pairs_are_independent_and_reductions_agree(make_call, options):
    call = make_call(options)
    losses = call(reduction="none").loss
    assert losses.shape == (6,)
    if not any(variant.couples_batch for variant in call.variants):
        scale = {"sft_scale": 6 / call.given["chosen_lengths"].sum().double()}
        for i in range(6):
            alone = call.map(lambda v, i=i: v[i : i + 1])(pair_losses, **scale)
            assert_close(alone[0], losses[i], rtol=1e-12, atol=0)
    for reduction, expected in (("sum", losses.sum()), ("mean", losses.mean())):
        assert_close(call(reduction=reduction).loss, expected)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_margins_stay_finite(make_call, options, size):
    call = make_call(options, pairs=4, dtype=torch.float32)
    zeros = torch.zeros(4)
    logps = [torch.tensor([-size, 0.0, -size, 0.0]), torch.tensor([0.0, -size, -size, 0.0]), zeros, zeros.clone()]
    logps = [values.requires_grad_() for values in logps[: len(call.logps)]]
    given = {
        "chosen_lengths": torch.tensor([1, 10**6, 1, 1]), "rejected_lengths": torch.tensor([10**6, 1, 1, 1])
    }  # fmt: skip
    if "tail_logps" in call.given:
        given["tail_logps"] = [0.5 * values.detach() for values in logps]
    if "weights" in call.given:
        given["weights"] = call.given["weights"]
    loss = dpo_loss(*logps, **given, **options, reduction="none").loss
    grads = torch.autograd.grad(loss.sum(), logps, allow_unused=True, materialize_grads=True)
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(make_call, plain_options, dtype):
    call = make_call(plain_options, dtype=torch.float32).map(lambda v: v.to(dtype) if v.is_floating_point() else v)
    call.requires_grad()
    loss = call().loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, call.map(lambda v: v.float() if v.is_floating_point() else v)().loss)
    loss.backward()
    assert call.logps[0].grad.dtype == dtype


def test_never_reads_a_value_on_the_host(make_call, options):
    """On the meta device a host sync is an error."""
    output = make_call(options).map(lambda v: v.to("meta"))(num_chosen_tokens=None)
    assert output.loss.device.type == "meta"
    assert summarize(output.metrics)["length/margin_correlation"].device.type == "meta"


def test_compiles_without_a_graph_break(make_call, compiled_options):
    torch.compiler.reset()
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="eager")
    call = make_call(compiled_options)
    for factor in (1.0, 0.5):  # a number that changes becomes a symbol, and must still not break the graph
        changed = {k: v * factor if isinstance(v, float) else v for k, v in compiled_options.items()}
        arguments = call.given | changed | {"beta": BETA * factor}
        expected, output = dpo_loss(*call.logps, **arguments), compiled(*call.logps, **arguments)
        assert_close(output.loss, expected.loss)
        assert_close(summarize(output.metrics), summarize(expected.metrics))


def test_no_pairs_give_a_zero_in_the_graph(make_call, options):
    call = make_call(options, pairs=0).requires_grad()
    output = call()
    assert output.loss.item() == 0
    output.loss.backward()
    assert output.metrics["rewards/margins"].weight == 0


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_an_empty_response_counts_as_zero(loss_type):
    """s = 0 over 0 tokens, as a response of any length that equals its reference."""
    logps = [torch.tensor([0.0]), torch.tensor([-3.0]), torch.tensor([0.0]), torch.tensor([-2.0])]
    losses = [
        pair_losses(*logps, chosen_lengths=torch.tensor([n]), rejected_lengths=torch.tensor([2]), loss_type=loss_type)
        for n in (0, 1, 7)
    ]
    assert losses[0].isfinite()
    assert losses[0] == losses[1] == losses[2]


def test_a_list_is_the_weighted_sum_of_its_losses(make_call):
    call = make_call({"loss_type": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.5, 2.0, 0.1]})
    logps, given = call.logps, call.given
    parts = [dpo_loss(*logps, **given, loss_type=name).loss for name in ("sigmoid", "nca_pair")]
    sft = dpo_loss(*logps[:2], **given, loss_type="sft").loss
    assert_close(call().loss, 0.5 * parts[0] + 2.0 * parts[1] + 0.1 * sft)
    assert_close(sft, -logps[0].sum() / given["chosen_lengths"].sum())


def test_sft_and_ld_alpha_do_not_mix(make_call):
    """The likelihood term is one of all tokens, whatever the tails weigh elsewhere."""
    call = make_call({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 1.0], "ld_alpha": 0.0})
    assert_close(call().loss, -call.logps[0].sum() / call.given["chosen_lengths"].sum())

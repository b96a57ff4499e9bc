"""Each variant by itself: closed forms, what the theory promises of it, and which options it takes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import DPO_LOSSES, check_dpo_options, dpo_loss, pair_losses

BETA = 0.3


def logsig(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def closed_form(loss_type, s_w, s_l, n_w, n_l, beta, eps, alpha):
    """The sheet's formulas in the standard library's arithmetic, one pair at a time."""
    z = beta * (s_w - s_l) + alpha * (n_w - n_l)
    mean = s_w / n_w - s_l / n_l
    return {
        "sigmoid": -(1 - eps) * logsig(z) - eps * logsig(-z),
        "robust": (-(1 - eps) * logsig(z) + eps * logsig(-z)) / (1 - 2 * eps),
        "hinge": max(0.0, 1 - z),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -logsig(beta * mean),
    }[loss_type]


def test_closed_form(make_batch, options):
    logps, lengths = make_batch(pairs=40)
    losses = dpo_loss(*logps, **lengths, beta=BETA, reduction="none", **options).loss
    s_w, s_l = (logps[0] - logps[2]).tolist(), (logps[1] - logps[3]).tolist()
    expected = [
        closed_form(
            options["loss_type"], *pair, BETA, options.get("label_smoothing", 0.0), options.get("length_alpha", 0.0)
        )
        for pair in zip(s_w, s_l, lengths["chosen_lengths"].tolist(), lengths["rejected_lengths"].tolist(), strict=True)
    ]
    assert losses.dtype == torch.float64
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# --- what the theory says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_minimiser_is_the_optimum_of_the_length_regularised_objective(loss_type, alpha):
    """Over free logits, with all pairs weighed by Bradley–Terry, the minimiser is π_ref·exp((r − α|y|)/β)/Z: the sign.

    "robust" sees flipped preferences and must find the same optimum: it undoes the noise.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(1, 8)
    reward = torch.randn(7, generator=generator, dtype=torch.float64)
    log_ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    beta, eps = 0.7, 0.2 if loss_type == "robust" else 0.0
    optimum = (log_ref + (reward - alpha * lengths) / beta).log_softmax(0)

    w, v = (index.flatten() for index in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))
    preferred = torch.sigmoid(reward[w] - reward[v])
    preferred = (1 - eps) * preferred + eps * (1 - preferred)
    logits = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        losses = pair_losses(
            logps[w], logps[v], log_ref[w], log_ref[v], chosen_lengths=lengths[w], rejected_lengths=lengths[v],
            beta=beta, loss_type=loss_type, label_smoothing=eps, length_alpha=alpha,
        )  # fmt: skip
        total = (preferred * losses).sum()
        total.backward()
        return total

    optimizer.step(loss)
    assert_close(logits.detach().log_softmax(0), optimum, atol=1e-6, rtol=0)


def test_length_alpha_zero_is_dpo_to_the_bit(make_batch):
    logps, lengths = make_batch(dtype=torch.float32)
    plain = dpo_loss(*logps, reduction="none").loss
    assert torch.equal(dpo_loss(*logps, **lengths, length_alpha=0.0, reduction="none").loss, plain)
    assert torch.equal(dpo_loss(*logps, **lengths, label_smoothing=0.0, reduction="none").loss, plain)
    same = dict.fromkeys(lengths, lengths["chosen_lengths"])
    assert torch.equal(dpo_loss(*logps, **same, length_alpha=0.03, reduction="none").loss, plain)


@given(seed=st.integers(0, 1000), alpha=st.floats(0.001, 1.0), extra=st.integers(1, 50))
def test_a_longer_chosen_response_is_pushed_less(make_batch, seed, alpha, extra):
    logps, lengths = make_batch(seed=seed)
    logps[0].requires_grad_()
    longer = lengths | {"chosen_lengths": lengths["chosen_lengths"] + extra}
    pushes = []
    for given_lengths in (lengths, longer):
        (grad,) = torch.autograd.grad(dpo_loss(*logps, **given_lengths, length_alpha=alpha).loss, logps[0])
        pushes.append(-grad)
    assert (pushes[1] < pushes[0]).all()
    assert (pushes[1] >= 0).all()


@given(seed=st.integers(0, 1000), eps=st.floats(0.0, 0.45))
def test_label_smoothing_averages_over_flips_and_robust_undoes_them(make_batch, seed, eps):
    logps, _ = make_batch(seed=seed)
    flipped = [logps[1], logps[0], logps[3], logps[2]]
    clean, wrong = (pair_losses(*given, beta=BETA) for given in (logps, flipped))
    assert_close(pair_losses(*logps, beta=BETA, label_smoothing=eps), (1 - eps) * clean + eps * wrong)
    noisy = [pair_losses(*given, beta=BETA, loss_type="robust", label_smoothing=eps) for given in (logps, flipped)]
    assert_close((1 - eps) * noisy[0] + eps * noisy[1], clean)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_variant_says_what_it_is(loss_type):
    variant = DPO_LOSSES[loss_type]
    assert check_dpo_options(loss_type=loss_type) is variant
    assert variant.formula
    assert "arXiv" in variant.source
    assert ("ε" in variant.formula) == variant.accepts_label_smoothing
    assert ("z" in variant.formula) == variant.accepts_length_alpha  # z is what holds α
    assert ("|y_w|" in variant.formula) == variant.needs_lengths


@pytest.mark.parametrize("option", ["label_smoothing", "length_alpha"])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_an_option_is_honoured_or_refused_by_name(loss_type, option):
    if getattr(DPO_LOSSES[loss_type], f"accepts_{option}"):
        check_dpo_options(loss_type=loss_type, **{option: 0.1})
    else:
        with pytest.raises(ValueError, match=rf"{loss_type}.*{option}.*0\.1.*'sigmoid', 'robust'"):
            check_dpo_options(loss_type=loss_type, **{option: 0.1})


def test_an_unknown_variant_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'dpo' is unknown.*" + ".*".join(map(repr, DPO_LOSSES))):
        check_dpo_options(loss_type="dpo")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("beta", value) for value in (0.0, -0.1, math.inf, math.nan)),
        *(("label_smoothing", value) for value in (-0.1, 0.5, 1.0, math.nan)),
        *(("length_alpha", value) for value in (math.inf, math.nan)),
    ],
)
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        check_dpo_options(**{option: value})


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_asks_for_the_lengths_it_needs(loss_type):
    variant = DPO_LOSSES[loss_type]
    if variant.needs_lengths:
        with pytest.raises(ValueError, match=f"{loss_type}.*chosen_lengths and rejected_lengths"):
            check_dpo_options(loss_type=loss_type, has_lengths=False)
    else:
        check_dpo_options(loss_type=loss_type, has_lengths=False)
    if variant.accepts_length_alpha:
        with pytest.raises(ValueError, match=r"length_alpha=0\.2 needs chosen_lengths"):
            check_dpo_options(loss_type=loss_type, length_alpha=0.2, has_lengths=False)

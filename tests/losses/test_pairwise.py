"""Each variant on pairs by itself: value and gradient against the formulas, and what the theory promises of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import DPO_LOSSES, dpo_loss, pair_losses

torch.set_num_threads(1)
BETA = 0.3


# ---- the formulas, one pair at a time, in the plainest words; float64 and autograd do the rest


def log_sigma(x):
    return -torch.log(1 + torch.exp(-x))


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def f(s, o):
    kind, a = o.get("f_divergence_type", "reverse_kl"), o.get("f_alpha_divergence_coef", 0.5)
    if kind == "reverse_kl" or (kind == "alpha_divergence" and a == 1):
        return s
    if kind == "forward_kl":
        return 1 - torch.exp(-s)
    if kind == "js_divergence":
        return math.log(2) + log_sigma(s)
    return (torch.exp((a - 1) * s) - 1) / (a - 1)


def odds(mean):
    return torch.exp(mean) / (1 - torch.exp(mean))


def smoothed(x, o):
    eps = o.get("label_smoothing", 0.0)
    return -(1 - eps) * log_sigma(x) - eps * log_sigma(-x)


def one_pair(name, x, y, rx, ry, nw, nl, plain, tokens_per_pair, o):
    """x, y, rx, ry: log-probs of chosen and rejected under policy and reference; plain: x and y before LD-DPO."""
    beta, eps, alpha = BETA, o.get("label_smoothing", 0.0), o.get("length_alpha", 0.0)
    pw, pl = plain
    s_w, s_l = x - rx, y - ry
    z = beta * (f(s_w, o) - f(s_l, o)) + alpha * (nw - nl)
    gamma, delta, tau = o.get("simpo_gamma", 0.5), o.get("shift", 0.0), o.get("discopop_tau", 0.05)
    formulas = {
        "sigmoid": lambda: smoothed(z, o),
        "robust": lambda: (-(1 - eps) * log_sigma(z) + eps * log_sigma(-z)) / (1 - 2 * eps),
        "hinge": lambda: max(0 * z, 1 - z),
        "ipo": lambda: (f(s_w, o) / nw - f(s_l, o) / nl - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -log_sigma(beta * (f(s_w, o) / nw - f(s_l, o) / nl)),
        "exo_pair": lambda: (
            sigma(z) * (torch.log(sigma(z)) - math.log(1 - eps)) + sigma(-z) * (torch.log(sigma(-z)) - math.log(eps))
        ),
        "nca_pair": lambda: -log_sigma(beta * s_w) - log_sigma(-beta * s_w) / 2 - log_sigma(-beta * s_l) / 2,
        "bco_pair": lambda: -log_sigma(beta * s_w - delta) - log_sigma(-(beta * s_l - delta)),
        "sppo_hard": lambda: (s_w - 0.5 / beta) ** 2 + (s_l + 0.5 / beta) ** 2,
        "apo_zero": lambda: (1 - sigma(beta * s_w)) + sigma(beta * s_l),
        "apo_down": lambda: sigma(beta * s_w) + (1 - sigma(beta * (s_w - s_l))),
        "discopop": lambda: (1 - sigma(z / tau)) * -log_sigma(z) + sigma(z / tau) * torch.exp(-z),
        "sft": lambda: -pw / tokens_per_pair,
        "simpo": lambda: smoothed(beta * (pw / nw - pl / nl) - gamma, o),
        "orpo": lambda: -pw / nw - beta * log_sigma(torch.log(odds(pw / nw)) - torch.log(odds(pl / nl))),
        "cpo": lambda: smoothed(beta * (pw - pl), o) + o.get("cpo_alpha", 1.0) * -pw / nw,
    }
    return formulas[name]()


def of_batch(name, x, y, rx, ry, o):
    """The sorted losses of a batch."""

    def differences(first, second):
        return sorted(a - b for a, b in zip(first, second, strict=True))

    sides = (differences(x, y), differences(rx, ry)) if name == "aot" else (differences(x, rx), differences(y, ry))
    return [smoothed(BETA * (a - b), o) for a, b in zip(*sides, strict=True)]


def oracle(call):
    o = call.options
    plain = [list(values) for values in call.logps]
    sums = plain
    if "tail_logps" in call.given:
        tails = [list(values) for values in call.given["tail_logps"]]
        sums = [
            [(value - tail) + o["ld_alpha"] * tail for value, tail in zip(*both, strict=True)]
            for both in zip(plain, tails, strict=True)
        ]
    count = len(plain[0])
    if len(sums) == 2:
        sums = [*sums, [torch.zeros((), dtype=torch.float64)] * count, [torch.zeros((), dtype=torch.float64)] * count]
    n = [call.given["chosen_lengths"].tolist(), call.given["rejected_lengths"].tolist()]
    names = [o["loss_type"]] if isinstance(o["loss_type"], str) else o["loss_type"]
    total = [0.0] * count
    for name, factor in zip(names, o.get("loss_weights", [1.0] * len(names)), strict=True):
        if DPO_LOSSES[name].couples_batch:
            losses = of_batch(name, *sums, o)
        else:
            losses = [
                one_pair(name, *(v[i] for v in (*sums, *n)), (plain[0][i], plain[1][i]), sum(n[0]) / count, o)
                for i in range(count)
            ]
        total = [before + factor * loss for before, loss in zip(total, losses, strict=True)]
    if "weights" in call.given:
        total = [loss * weight for loss, weight in zip(total, call.given["weights"], strict=True)]
    return torch.stack(total)


def test_value_and_gradient_are_the_formulas(make_call, options):
    call = make_call(options, pairs=8, scale=1.0).requires_grad()  # where the plain words do not overflow
    mine, expected = call(beta=BETA, reduction="none").loss, oracle(call)
    assert mine.dtype == torch.float64
    assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    push = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)  # tells pairs apart
    leaves = call.logps
    grads = torch.autograd.grad(mine @ push, leaves, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad(expected @ push, leaves, allow_unused=True, materialize_grads=True)
    assert_close(grads, true, rtol=1e-10, atol=1e-12)
    assert grads[0].any()  # each variant moves the chosen response


def test_gradcheck(make_call, plain_options):
    call = make_call(plain_options).requires_grad()

    def loss(*logps):
        return dpo_loss(*logps, **(call.given | call.options), beta=BETA).loss

    assert torch.autograd.gradcheck(loss, call.logps)


# ---- what the theory says


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


MINIMA = {  # where the loss of a pair of one-token responses ends: log-ratios at which nothing pulls any more
    "sigmoid": lambda beta, eps: (math.log((1 - eps) / eps) / beta, 0.0),
    "exo_pair": lambda beta, eps: (math.log((1 - eps) / eps) / beta, 0.0),
    "ipo": lambda beta, eps: (1 / (2 * beta), 0.0),
    "sppo_hard": lambda beta, eps: (1 / (2 * beta), -1 / (2 * beta)),
    "hinge": lambda beta, eps: (1.001 / beta, 0.0),
}


@pytest.mark.parametrize("loss_type", MINIMA)
def test_the_minimum_is_where_the_paper_puts_it(loss_type):
    """EXO and SPPO end at a loss of 0, IPO at its margin, cDPO at the odds of a flip."""
    eps = 0.2 if DPO_LOSSES[loss_type].accepts_label_smoothing else 0.0
    s = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in MINIMA[loss_type](BETA, eps)]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    options = {"beta": BETA, "loss_type": loss_type, "label_smoothing": eps}
    lengths = {"chosen_lengths": one, "rejected_lengths": one}
    loss = dpo_loss(*s, zero, zero, **lengths, **options).loss
    assert_close(torch.stack(torch.autograd.grad(loss, s)), torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    if loss_type != "sigmoid":
        assert loss.item() == pytest.approx(0, abs=1e-12)
    for step in (-0.3, 0.3):
        assert dpo_loss(s[0] + step, s[1], zero, zero, **lengths, **options).loss >= loss


def test_length_alpha_zero_is_dpo_to_the_bit(make_batch):
    logps, lengths = make_batch(dtype=torch.float32)
    plain = dpo_loss(*logps, reduction="none").loss
    reference = -torch.nn.functional.logsigmoid(0.1 * ((logps[0] - logps[2]) - (logps[1] - logps[3])))
    assert torch.equal(plain, reference)
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


@given(seed=st.integers(0, 1000), gamma=st.floats(0.0, 3.0))
def test_losses_without_a_reference_are_dpo_against_a_uniform_one(make_batch, seed, gamma):
    """log π_ref = 0 for every response; SimPO of responses of one token, its margin a difference of lengths."""
    logps, lengths = make_batch(seed=seed)
    zeros = torch.zeros_like(logps[0])
    plain = pair_losses(*logps[:2], zeros, zeros, beta=BETA)
    assert_close(pair_losses(*logps[:2], **lengths, beta=BETA, loss_type="cpo", cpo_alpha=0.0), plain)
    one = dict.fromkeys(lengths, torch.ones(6))
    simpo = pair_losses(*logps[:2], **one, beta=BETA, loss_type="simpo", simpo_gamma=gamma)
    shorter = {"chosen_lengths": torch.ones(6), "rejected_lengths": torch.full((6,), 2.0)}
    assert_close(simpo, pair_losses(*logps[:2], zeros, zeros, **shorter, beta=BETA, length_alpha=gamma))


@given(seed=st.integers(0, 1000))
def test_optimal_transport_does_not_see_the_pairing(make_batch, seed):
    """aot_unpaired: the same whichever response stood beside which, and no pairing has a smaller sum of −log σ(βΔ):
    sorting both sides is optimal for every convex cost of a difference."""
    logps, _ = make_batch(seed=seed, pairs=7)
    shuffle = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    mixed = [logps[0], logps[1][shuffle], logps[2], logps[3][shuffle]]
    for given_logps in (logps, mixed):
        sorted_loss = dpo_loss(*given_logps, beta=BETA, loss_type="aot_unpaired").loss
        assert_close(sorted_loss, dpo_loss(*logps, beta=BETA, loss_type="aot_unpaired").loss)
        assert sorted_loss <= dpo_loss(*given_logps, beta=BETA).loss + 1e-12

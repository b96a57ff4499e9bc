"""Fisher products against the explicit matrix, conjugate gradient against a solver, the KL by hand, and refusals."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

from fastalign import linear_logps
from fastalign.trainers.fisher import (
    FisherProduct,
    categorical_kl,
    check_double_backward,
    conjugate_gradient,
    natural_gradient,
)


def softmax_policy(seed=0):
    """logits = features @ weight + bias over 4 actions in 5 states."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 3, generator=g, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    old = (features @ weight + bias).log_softmax(-1).detach()

    def kl(rows=slice(None)):
        return categorical_kl(old[rows], features[rows] @ weight + bias, num_items=5)

    total = torch.zeros(16, 16, dtype=torch.float64)  # mean of Jᵀ(diag p − ppᵀ)J, J the Jacobian in (weight, bias)
    for x, p in zip(features, old.exp(), strict=True):
        jacobian = torch.cat([torch.kron(x[None], torch.eye(4)), torch.eye(4)], 1)
        total += jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian / 5
    return [weight, bias], kl, total


@pytest.mark.parametrize("split", [False, True])
def test_against_the_explicit_matrix(split):
    parameters, kl, explicit = softmax_policy()
    product = FisherProduct(parameters, [lambda: kl(slice(0, 2)), lambda: kl(slice(2, 5))] if split else [kl])
    for column in torch.eye(16, dtype=torch.float64):
        torch.testing.assert_close(product(column), explicit @ column, rtol=1e-12, atol=1e-14)


def test_a_parameter_that_the_policy_does_not_use_has_no_curvature():
    parameters, kl, explicit = softmax_policy()
    critic = torch.ones(3, dtype=torch.float32, requires_grad=True)
    vector = torch.randn(19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = FisherProduct([critic, *parameters], [kl])(vector)
    assert not product[:3].any()
    torch.testing.assert_close(product[3:], explicit @ vector[3:])


def test_sums_over_processes():
    parameters, kl, explicit = softmax_policy()
    product = FisherProduct(parameters, [kl], reduce=lambda tensor: 3 * tensor)
    vector = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(product(vector), 3 * (explicit @ vector))


def test_natural_gradient():
    parameters, kl, explicit = softmax_policy()
    target = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, curvature, residual = natural_gradient(
        FisherProduct(parameters, [kl]), target, damping=0.1, iterations=30, tolerance=1e-12
    )
    expected = torch.linalg.solve(explicit + 0.1 * torch.eye(16), target)
    torch.testing.assert_close(x, expected)
    assert curvature == pytest.approx(float(expected @ explicit @ expected))
    assert residual <= 1e-12


def test_conjugate_gradient():
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(12, 12, generator=g, dtype=torch.float64)
    matrix, target = factor @ factor.T + torch.eye(12), torch.randn(12, generator=g, dtype=torch.float64)
    products = []

    def product(v):
        products.append(v)
        return matrix @ v

    x, residual = conjugate_gradient(product, target, iterations=50, tolerance=1e-9)
    assert len(products) < 20  # exact arithmetic takes 12
    assert residual <= 1e-9
    torch.testing.assert_close(x, torch.linalg.solve(matrix, target), rtol=1e-7, atol=1e-9)
    for iterations in (1, 3):
        x, residual = conjugate_gradient(product, target, iterations=iterations, tolerance=0)
        assert residual == pytest.approx(float((target - matrix @ x).norm() / target.norm()), rel=1e-9)
    assert conjugate_gradient(product, torch.zeros_like(target), iterations=5, tolerance=0)[1] == 0
    x, _ = conjugate_gradient(lambda v: -v, target, iterations=5, tolerance=0)  # not positive: it stops
    assert not x.any()


def llama(attention):
    config = tf.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attn_implementation=attention,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def test_fused_attention_is_refused_by_name():
    check_double_backward(llama("eager"))
    check_double_backward(torch.nn.Linear(2, 2))
    wrapped = peft.get_peft_model(llama("sdpa"), peft.LoraConfig(task_type="CAUSAL_LM"))
    for refused in (llama("sdpa"), wrapped, torch.nn.Sequential(llama("sdpa"))):
        with pytest.raises(ValueError, match=r"attn_implementation='sdpa' .* attn_implementation='eager'"):
            check_double_backward(refused)


def test_fused_attention_fails_with_the_way_out():
    ids = torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(0))
    for attention in ("eager", "sdpa"):
        model = llama(attention)

        def kl(model=model):
            logits = model(input_ids=ids, use_cache=False).logits
            return categorical_kl(logits.detach().log_softmax(-1), logits)

        parameters = list(model.parameters())
        product, vector = FisherProduct(parameters, [kl]), torch.ones(sum(p.numel() for p in parameters))
        if attention == "eager":
            assert product(vector).isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"kl\(\) has no second derivative .* attn_implementation='eager'"):
            product(vector)


def test_the_fused_head_is_refused():
    weight = torch.randn(9, 4, requires_grad=True)
    hidden, targets = torch.randn(6, 4), torch.randint(9, (6,))
    old = linear_logps(hidden, weight, targets).logps.detach()

    def kl():
        difference = linear_logps(hidden, weight, targets).logps - old
        return (torch.expm1(difference) - difference).mean()

    with pytest.raises(ValueError, match=r"kl\(\) has no second derivative"):
        FisherProduct([weight], [kl])(torch.ones(36))


def test_a_kl_that_is_linear_is_refused():
    theta = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="linear in the parameters"):
        FisherProduct([theta], [theta.sum])(torch.ones(3))


def test_categorical_kl():
    g = torch.Generator().manual_seed(0)
    old = torch.randn(3, 4, 7, generator=g, dtype=torch.float64)
    old[0, 0, 2] = -torch.inf  # a token that cannot be drawn
    old = old.log_softmax(-1)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.rand(3, 4, generator=g) < 0.6
    mask[0, 0] = True
    expected = sum(
        float(p * (p.log() - q))
        for ps, qs in zip(old.exp()[mask], logits.detach().log_softmax(-1)[mask], strict=True)
        for p, q in zip(ps, qs, strict=True)
        if p > 0
    ) / int(mask.sum())
    assert categorical_kl(old, logits, mask).item() == pytest.approx(expected, rel=1e-12)
    parts = [categorical_kl(old[i], logits[i], mask[i], num_items=int(mask.sum())) for i in range(3)]
    torch.testing.assert_close(sum(parts), categorical_kl(old, logits, mask))
    bad = mask.logical_not()[..., None]
    dirty = logits.detach().masked_fill(bad, torch.nan).requires_grad_()
    out = categorical_kl(old.masked_fill(bad, torch.nan), dirty, mask)
    torch.testing.assert_close(out, categorical_kl(old, logits, mask))
    assert torch.autograd.grad(out, dirty)[0].isfinite().all()
    assert torch.autograd.gradgradcheck(lambda z: categorical_kl(old, z, mask), logits)
    at_old = old[1:].clone().requires_grad_()
    assert categorical_kl(old[1:], at_old).item() == pytest.approx(0, abs=1e-12)
    assert categorical_kl(old.bfloat16(), logits.detach().bfloat16()).dtype == torch.float32
    assert categorical_kl(old, logits, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"old_logps \(2, 3, 5\) and logits \(2, 3, 4\)"),
        ({"mask": torch.ones(2, 3)}, r"mask: torch.float32 \(2, 3\), accepted is bool \(2, 3\)"),
        ({"old_logps": torch.zeros(2, 3, 5, requires_grad=True)}, "old_logps requires grad"),
    ],
)
def test_categorical_kl_refusals(change, message):
    arguments = {"old_logps": torch.zeros(2, 3, 5), "logits": torch.zeros(2, 3, 5)}
    with pytest.raises(ValueError, match=message):
        categorical_kl(**arguments | change)
